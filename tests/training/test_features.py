"""Kept features: they give the same numbers, survive a kill, and are refused where they do not fit.
"""
import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import weakref
from glob import glob
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dpo_flags, largest_difference, preference_rows, run_train
from short_runs import SOME, base_and_head, losses_of, read_bytes, zero_file

import train
from data import Example, ImageProcessor
from dpo import Loss, Objective
from post_decoder import VARIANTS
from support.common import InputError
from training import features, kept_files
from training.features import keep_features


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_kept_features_give_the_same_losses(world, tmp_path, variant):
    base, head = base_and_head(world, variant, zero_init=False)
    dataset = preference_rows(world, base.trunk)
    kept = keep_features(str(tmp_path), dataset, base, head.block_config, batch_size=16)
    assert len(kept) == len(dataset)
    reference = base_and_head(world, variant, zero_init=False)[1]
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 0.9                     # or all rewards are 0 and compare nothing
    results = []
    for rows, trunk in ((dataset, base.trunk), (kept, None)):
        objective = Objective(trunk, head, Loss("dpo", 0.1, 0.1))
        objective.reference = reference
        _, metrics = objective(rows[SOME])
        results.append(torch.stack(list(metrics.values())))
    assert results[0][1].abs() > 1e-4
    assert largest_difference(f"metrics with block {variant}", *results) < 1e-4


@pytest.mark.parametrize("variant", (None, "full", "self_attn"))
@pytest.mark.parametrize("max_length", (512, 40))           # 40: some answers are cut
def test_pairs_of_an_image_are_one_row(world, tmp_path, monkeypatch, variant, max_length):
    """The pass packed by image keeps what the pass over each example's own row keeps."""
    base, head = base_and_head(world, variant)
    dataset = preference_rows(world, base.trunk)
    texts = [Example(None, [[("Say it.", answer)] for answer in ("Yes", "No, there is a dog.")]),
             Example(None, [[("Say it.", answer)] for answer in ("No", "Yes")])]
    dataset.examples = dataset.examples + dataset.examples[-3:] + texts        # three stand twice
    dataset.format.max_length = max_length
    images = {example.image for example in dataset.examples if example.image}
    forward, passed, kept = base.trunk.forward, [], {}

    def counted(batch, cache=None):
        passed.append(batch.input_ids.shape)
        return forward(batch, cache)

    monkeypatch.setattr(base.trunk, "forward", counted)
    cost = {}
    for name in ("by image", "row by row"):
        if name == "row by row":
            monkeypatch.setattr(features, "groups_by_image",
                                lambda dataset, missing, image_index: [[i] for i in missing])
        passed.clear()
        kept[name] = keep_features(str(tmp_path / name), dataset, base, head.block_config, 16)
        cost[name] = sum(rows for rows, _ in passed), sum(rows * T for rows, T in passed)
    assert cost["row by row"][0] == len(dataset)
    if max_length == 512:
        assert cost["by image"][0] == len(images) + len(texts)
        assert cost["by image"][1] < cost["row by row"][1]                          # tokens
    else:
        assert sum(dataset.row(i).cut for i in range(len(dataset))) > 0
    for name in ("hidden_states", "image_features"):
        ours, theirs = (getattr(kept[which], name) for which in ("by image", "row by row"))
        assert ours.abs().sum() > 1
        assert largest_difference(f"{name} by image, row by row", ours, theirs) < 1e-5


def test_a_killed_pass_goes_on(world, tmp_path, monkeypatch):
    """After kill -9 in its fourth batch, the next run does the rest, and a third run nothing."""
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.format.max_length = 512              # all that is asked about an image is one row
    images = len({example.image for example in dataset.examples})
    forward, passes = base.trunk.forward, []

    def keep(folder=tmp_path):
        return keep_features(str(folder), dataset, base, head.block_config, batch_size=4)

    def counted(batch, cache=None):
        if len(passes) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        passes.append(len(batch.input_ids))
        return forward(batch, cache)

    monkeypatch.setattr(base.trunk, "forward", counted)
    limit, child = 3, multiprocessing.get_context("fork").Process(target=keep)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    limit = None
    kept = keep()
    assert sum(passes) == images - 3 * 4                                        # no row twice
    keep()
    assert sum(passes) == images - 3 * 4 and len(os.listdir(tmp_path)) == 1

    whole = keep(tmp_path / "whole")
    for name in ("hidden_states", "image_features"):
        ours, theirs = getattr(kept, name), getattr(whole, name)
        assert largest_difference(f"{name}, interrupted or not", ours, theirs) < 1e-5


def test_kept_features_belong_to_base_data_and_preprocessing(world, tmp_path):
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.examples = dataset.examples[:8]

    def keep(fingerprint="base", block_config=head.block_config):
        model = dataclasses.replace(base, fingerprint=fingerprint)
        keep_features(str(tmp_path), dataset, model, block_config, 16)

    keep()
    keep("another base")
    keep(block_config=base_and_head(world, "align_after_align")[1].block_config)
    dataset.examples = dataset.examples[:7]
    keep()
    dataset.format.preprocess = ImageProcessor(24, pad=False)
    keep()
    assert len(os.listdir(tmp_path)) == 5


def test_why_features_are_made_anew(world, tmp_path, capsys):
    """One line says what is different, and nothing is said where nothing is."""
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.examples = dataset.examples[:8]

    def keep(fingerprint="base", block_config=head.block_config):
        model = dataclasses.replace(base, fingerprint=fingerprint)
        keep_features(str(tmp_path), dataset, model, block_config, 16)
        return capsys.readouterr().out

    first = keep()
    assert first.startswith("one frozen pass over 8 rows") and first.count("\n") == 1
    assert keep() == ""
    assert "another base;" in keep("another")
    assert keep("another") == ""
    self_attention = base_and_head(world, "self_attn")[1].block_config
    assert "another kind of block;" in keep(block_config=self_attention)
    dataset.format.preprocess = ImageProcessor(24, pad=False)
    assert "another preprocessing;" in keep()
    dataset.examples = dataset.examples[:7]
    dataset.format.max_length -= 1
    assert (f"{tmp_path}: what is kept there is for other data and rows of another prompt or "
            "length;") in keep()


def shortened(size):
    """A function that cuts a file: to `size(bytes)` of them."""
    return lambda path: os.truncate(path, size(os.path.getsize(path)))


DAMAGED = {  # file: how it is changed
    "hidden.bin": shortened(lambda size: size // 2), "features.bin": os.remove,
    "sums.bin": shortened(lambda size: 9), "rows.npz": shortened(lambda size: size - 40),
    "key.json": os.remove}


@pytest.mark.parametrize("name", [*DAMAGED, "another's key.json", "another's rows.npz"])
def test_damaged_features_are_refused_by_name(world, tmp_path, name):
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    every = dataset.examples
    for count in (7, 8):
        dataset.examples = every[:count]
        keep_features(str(tmp_path / str(count)), dataset, base, head.block_config, 16)
    folder, = (str(path) for path in (tmp_path / "8").iterdir())
    if name in DAMAGED:
        DAMAGED[name](f"{folder}/{name}")
    else:
        name = name.removeprefix("another's ")
        shutil.copy(*glob(f"{tmp_path}/7/*/{name}"), f"{folder}/{name}")
    with pytest.raises(InputError) as error:
        keep_features(str(tmp_path / "8"), dataset, base, head.block_config, 16)
    print(error.value)
    assert f"{folder}/{name}" in str(error.value) and f"remove {folder}" in str(error.value)


def test_a_disk_that_is_too_small(world, tmp_path, monkeypatch):
    """For all files together, though each alone would fit."""
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    tokens = sum(len(np.unique(dataset.row(i).source)) for i in range(len(dataset)))
    free = tokens * base.config.text.hidden_size * 4
    monkeypatch.setattr(kept_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="--cache_features"):
        keep_features(str(tmp_path), dataset, base, head.block_config, 16)
    assert not glob(f"{tmp_path}/*/*.bin")


def test_a_process_that_starts_late_has_its_share(world, tmp_path, monkeypatch):
    """Process 0 works while process 1 waits at the first barrier: they keep all rows, none twice.
    """
    base, head = base_and_head(world)
    dataset, forward = preference_rows(world, base.trunk), base.trunk.forward
    rows, waiting, ranks = [], [], []
    dataset.format.max_length = 512              # all that is asked about an image is one row

    def keep(rank):
        ranks.append(rank)
        return keep_features(str(tmp_path), dataset, base, head.block_config, 16)

    def counted(batch):
        rows.append(len(batch.input_ids))
        return forward(batch)

    def barrier():
        waiting.append(1)
        if len(waiting) == 1:
            keep(0)

    monkeypatch.setattr(base.trunk, "forward", counted)
    for name, function in (("is_initialized", lambda: True), ("get_world_size", lambda: 2),
                           ("get_rank", lambda: ranks[-1]), ("barrier", barrier)):
        monkeypatch.setattr(features.dist, name, function)
    done = np.fromfile(keep(1).files["sums"].path, np.int64)
    assert done.all() and sum(rows) == len({example.image for example in dataset.examples})
    assert ranks == [1, 0]


def test_what_is_kept_is_all_that_is_needed(world, two, tmp_path, monkeypatch, in_this_process):
    """Two kinds of features. Once they are kept the trunk is let go; a second run, without images,
    reads nothing of it and ends with the very same weights. So do two processes under ZeRO-3, but
    for rounding."""
    shutil.copytree(world.vg, tmp_path / "VG")
    flags = ["--stage", 2, "--init", "identity", "--max_steps", 3, "--learning_rate", 1e-2,
             "--keep_correct", "--per_device_train_batch_size", 8, "--block", "full,self_attn",
             "--cache_features", tmp_path / "features", *dpo_flags(world),
             "--vg_path", tmp_path / "VG"]
    keep, train_run, filled, lying = train.keep_features, train.train_run, [], []

    def watched(folder, dataset, model, *rest):
        kept = keep(folder, dataset, model, *rest)
        filled.extend(weakref.ref(p) for p in model.trunk.parameters() if not p.is_meta)
        return kept

    def started(deepspeed, run):
        gc.collect()
        on_meta = all(p.is_meta for p in run.model.trunk.parameters())
        lying.append(on_meta and not any(ref() is not None for ref in filled))
        train_run(deepspeed, run)

    monkeypatch.setattr(train, "keep_features", watched)
    monkeypatch.setattr(train, "train_run", started)
    run_train(*flags, "--output_dir", tmp_path / "first", "--gradient_accumulation_steps", 2)
    assert filled and lying == [True, True]
    for folder in ("VG_100K", "VG_100K_2"):
        shutil.rmtree(tmp_path / "VG" / folder, ignore_errors=True)
    monkeypatch.setattr(features, "load_weights", lambda trunk: pytest.fail("the trunk was read"))
    run_train(*flags, "--output_dir", tmp_path / "again", "--gradient_accumulation_steps", 2)
    assert lying == 4 * [True]
    config = zero_file(tmp_path, 3, train_batch_size=16)
    two(*flags, "--output_dir", tmp_path / "two", "--deepspeed", config)
    for variant in ("full", "self_attn"):
        first, again = (read_bytes(f"{tmp_path}/{name}-{variant}/trained.safetensors")
                        for name in ("first", "again"))
        assert first == again
        losses = [losses_of(tmp_path / f"{name}-{variant}") for name in ("first", "two")]
        assert largest_difference("losses", *losses) < 1e-4 and len(set(losses[0])) == 3
    with pytest.raises(InputError, match="24 images missing"):         # other data has to be read
        run_train(*flags[:-4], "--vg_path", tmp_path / "VG", "--pope_data_path", world.pairs,
                  "--no-keep_correct", "--output_dir", tmp_path / "other")
