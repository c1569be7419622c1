"""A folder of ours is replaced whole and put right after a kill; others are never touched."""
import os
import shutil

import pytest

from support import folders
from support.common import InputError, temporary, write_json
from support.folders import (
    check_can_write,
    check_output,
    discard,
    foreign_files,
    put_right,
    replace_folder,
)

OWN = {"config.json": None, "trained.safetensors": None, "*.partial": None,
       "vision_tower": {"config.json": None}, "pope": "*"}


class Killed(BaseException):
    pass


def write(folder, **files):
    for name, text in files.items():
        path = os.path.join(folder, name.replace("__", "/").replace("_dot_", "."))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)


def read(*parts):
    with open(os.path.join(*parts)) as file:
        return file.read()


def fill(text):
    return lambda partial: write(partial, config_dot_json=text)


def replace(folder, text):
    replace_folder(str(folder), fill(text), OWN)


@pytest.mark.parametrize("name", ["thesis.txt", "runs/older/config.json", "vision_tower/notes.txt",
                                  ".git/HEAD", "pope", "config.json/x"])
def test_a_foreign_folder_is_refused_and_stays(tmp_path, name):
    folder = tmp_path / "runs"
    write(folder, **{name.replace("/", "__"): "mine"})
    for attempt in (lambda: check_output(str(folder), OWN), lambda: replace(folder, "new")):
        with pytest.raises(InputError, match="runs: holds .*not ours"):
            attempt()
    assert read(folder, name) == "mine" and os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("beside", [".out.nanohadpo-new", ".out.nanohadpo-old"])
def test_a_foreign_folder_beside_is_refused_and_stays(tmp_path, beside):
    write(tmp_path / beside, thesis_dot_txt="mine")
    for attempt in (lambda: check_output(str(tmp_path / "out"), OWN),
                    lambda: replace(tmp_path / "out", "new")):
        with pytest.raises(InputError, match="thesis.txt"):
            attempt()
    assert read(tmp_path / beside, "thesis.txt") == "mine"


def test_a_backup_that_somebody_made_stays(tmp_path):
    for name in ("out.old", "out.partial", "out"):
        replace(tmp_path / name, name)
    replace(tmp_path / "out", "new")
    assert read(tmp_path, "out.old", "config.json") == "out.old"
    assert read(tmp_path, "out.partial", "config.json") == "out.partial"


def test_what_was_finished_is_kept(tmp_path):
    """With the results that are about it, under the next free name."""
    folder = tmp_path / "stage1"
    replace(folder, "first")
    write(folder, pope__metrics_dot_json="asked", pope__deep__x="y")
    check_output(str(folder), OWN)
    replace(folder, "second")
    assert read(folder, "config.json") == "second" and os.listdir(folder) == ["config.json"]
    old = tmp_path / "stage1-old1"
    assert read(old, "config.json") == "first"
    assert read(old, "pope", "metrics.json") == "asked" and read(old, "pope/deep/x") == "y"
    (tmp_path / "stage1-old2").write_text("mine")
    replace(folder, "third")
    assert read(folder, "config.json") == "third"
    assert read(tmp_path / "stage1-old3", "config.json") == "second"
    assert (tmp_path / "stage1-old2").read_text() == "mine" and len(os.listdir(tmp_path)) == 4


def test_a_symlink_is_followed(tmp_path):
    replace(tmp_path / "disk" / "stage1", "first")
    os.symlink(tmp_path / "disk" / "stage1", tmp_path / "link")
    replace(tmp_path / "link", "second")
    assert os.path.islink(tmp_path / "link")
    assert read(tmp_path, "disk", "stage1", "config.json") == "second"
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    replace(tmp_path / "dangling", "third")
    assert read(tmp_path, "nowhere", "config.json") == "third"


def test_what_cannot_be_replaced_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, file="mine")
    for folder, said in ((".", "folder that you are in"), ("..", "folder that you are in"),
                         ("/", "folder that you are in"), ("/proc", "mount point"),
                         ("file", "is a file"),
                         ("file/run", "file: .*cannot be written|Not a dir")):
        with pytest.raises(InputError, match=said):
            check_output(folder, OWN)
    assert read(tmp_path, "file") == "mine"


def test_what_cannot_be_written_is_said(tmp_path):
    write(tmp_path, file="mine")
    for folder in (tmp_path / "file" / "deep", "/proc/nothing"):
        with pytest.raises(InputError, match="cannot be written"):
            check_can_write(str(folder))
    check_can_write(str(tmp_path / "new" / "deep"))
    assert os.listdir(tmp_path / "new" / "deep") == []


@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch, at, first):
    """Killed before its n-th call that changes the disk: a rerun finds the old or new folder."""
    folder, calls = tmp_path / "stage1", [0]
    if not first:
        replace(folder, "first")
        write(folder, pope__metrics_dot_json="asked")

    def counted(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return real(*args, **kwargs)
        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "makedirs"):
            patched.setattr(folders.os, name, counted(getattr(os, name)))
        patched.setattr(folders.shutil, "rmtree", counted(shutil.rmtree))
        try:
            replace(folder, "second")
        except Killed:
            pass
    put_right(str(folder), OWN)
    if first:
        assert not folder.exists() or read(folder, "config.json") == "second"
    else:
        second = read(folder, "config.json") == "second"
        before = tmp_path / "stage1-old1" if second else folder
        assert read(before, "config.json") == "first"
        assert read(before, "pope", "metrics.json") == "asked"
    left = set(os.listdir(tmp_path))
    assert left <= {"stage1", "stage1-old1"}
    replace(folder, "third")
    assert read(folder, "config.json") == "third"
    old = {f"stage1-old{len(left)}"} if left else set()
    assert set(os.listdir(tmp_path)) == {"stage1"} | left | old


def test_foreign_files_looks_into_folders_of_ours(tmp_path):
    write(tmp_path, config_dot_json="", vision_tower__config_dot_json="", vision_tower__x="", y="")
    assert foreign_files(tmp_path, OWN) == ["vision_tower/x", "y"]


def test_temporary_names_differ_and_files_are_whole(tmp_path):
    assert len({temporary("x") for _ in range(100)}) == 100
    os.umask(before := os.umask(0o027))
    write_json(str(tmp_path / "a.json"), {"a": 1})
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~before
    write(tmp_path / "gone", x="")
    discard(str(tmp_path / "gone"))
    assert os.listdir(tmp_path) == ["a.json"]
