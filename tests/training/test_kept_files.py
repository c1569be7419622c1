"""Kept features on disk: workers of every kind read them, and a full or read-only disk is said."""
import errno
import multiprocessing
import os
import stat

import numpy as np
import pytest
import torch
from conftest import preference_rows, small_config

from checkpoints.load import load_base
from support.common import InputError
from support.loading import batches_ahead
from training import kept_files
from training.features import keep_features
from training.kept_files import KeptFile


@pytest.fixture(scope="module")
def model(world):
    return load_base(world.base)


@pytest.fixture(scope="module")
def dataset(world, model):
    return preference_rows(world, model.trunk)


def keep(folder, dataset, model):
    return keep_features(str(folder), dataset, model, small_config().block_config())


def same(one, other):
    return all(torch.equal(x, other.tensors()[name]) for name, x in one.tensors().items())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_every_kind(tmp_path, dataset, model, method):
    """Python 3.14 starts workers by forkserver: what reaches them is sent, not inherited."""
    kept = keep(tmp_path, dataset, model)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        for rows in (kept, dataset):
            sent = list(batches_ahead(rows, [[0, 3], [2]], 1))
            assert same(sent[0], rows[[0, 3]]) and same(sent[1], rows[[2]])
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_full_disk_is_said_before_the_pass(tmp_path, dataset, model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_files.os, "posix_fallocate", full)
    monkeypatch.setattr("training.features.run_trunk", lambda *_: pytest.fail("the pass began"))
    with pytest.raises(InputError, match="cannot be reserved there.*No space left.*--cache_feat"):
        keep(tmp_path, dataset, model)


def test_space_is_taken_before_the_pass(tmp_path, dataset, model, monkeypatch):
    """A sparse file would end in SIGBUS on a disk that is full by then."""
    monkeypatch.setattr("training.features.run_trunk", lambda *_: None)
    keep(tmp_path, dataset, model)
    folder, = tmp_path.iterdir()
    for name in ("hidden", "features", "sums"):
        status = (folder / f"{name}.bin").stat()
        assert status.st_size and status.st_blocks * 512 >= status.st_size


def test_a_row_behind_2_gib(tmp_path):
    """Rows of the 7B's size: image 2,000 lies where 32 bits no longer count bytes."""
    file = KeptFile(str(tmp_path / "features.bin"), (2001, 576, 1024), torch.bfloat16)
    with open(file.path, "wb") as empty:
        empty.truncate(file.bytes)                                      # takes no space on the disk
    row = torch.randn(1, 576, 1024).bfloat16()
    file.write(np.arange(2000, 2001, dtype=np.int32)[0], row)
    assert torch.equal(file.mapped()[2000], row[0]) and not file.mapped()[1999].any()


def test_files_take_the_umask(tmp_path, dataset, model):
    before = os.umask(0o022)
    try:
        keep(tmp_path, dataset, model)
    finally:
        os.umask(before)
    folder, = tmp_path.iterdir()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o644}


def test_what_is_complete_is_only_read(tmp_path, dataset, model, monkeypatch):
    """A folder on a disk that cannot be written serves as well, once everything is there."""
    kept = keep(tmp_path, dataset, model)
    opened, real = [], open

    def noted(path, mode="r", *rest, **options):
        if str(path).startswith(str(tmp_path)) and set(mode) & set("wax+"):
            opened.append(path)
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", noted)
    again = keep(tmp_path, dataset, model)
    assert opened == [] and same(again[[1, 4]], kept[[1, 4]])


def test_an_interrupted_pass_goes_on(tmp_path, dataset, model, monkeypatch):
    whole = keep(tmp_path / "whole", dataset, model)
    real, calls = kept_files.KeptFile.write, []

    def write(self, *rest):
        calls.append(self)
        if len(calls) == 40:
            raise KeyboardInterrupt
        real(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(kept_files.KeptFile, "write", write)
        with pytest.raises(KeyboardInterrupt):
            keep_features(str(tmp_path / "part"), dataset, model, small_config().block_config(), 4)
    kept = keep(tmp_path / "part", dataset, model)
    every = list(range(len(dataset)))
    for name, x in kept[every].tensors().items():
        assert torch.equal(x, whole[every].tensors()[name]), name


@pytest.mark.parametrize("name, at", (("hidden", 1000), ("features", 1000), ("sums", 3)))
def test_a_byte_that_is_another(tmp_path, dataset, model, name, at):
    """It is found when its row is read, and by no other row."""
    keep(tmp_path, dataset, model)
    path, = tmp_path.glob(f"*/{name}.bin")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    kept = keep(tmp_path, dataset, model)
    with pytest.raises(InputError, match=f"does not hold what was kept.*remove {path.parent}"):
        kept[list(range(len(kept)))]
    last = len(kept) - 1
    assert len(kept[[last]].hidden_states) == 1


def test_rows_that_are_a_folder(tmp_path, dataset, model):
    keep(tmp_path, dataset, model)
    path, = tmp_path.glob("*/rows.npz")
    os.remove(path)
    path.mkdir()
    with pytest.raises(InputError, match="rows.npz: cannot be read"):
        keep(tmp_path, dataset, model)
