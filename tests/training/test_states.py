"""A state that is not what was saved, or that is named wrongly, is one line and never loaded."""
import json
import os

import pytest

from support.common import InputError
from training.resume import cut_log
from training.states import SUMS, digests, read_latest, refuse_damaged


@pytest.fixture
def folder(tmp_path):
    state = tmp_path / "step-4"
    state.mkdir()
    (tmp_path / "step-2").mkdir()
    (state / "weights.pt").write_bytes(bytes(range(99)))
    (tmp_path / "reference.pt").write_bytes(b"reference")
    (tmp_path / "latest").write_text("step-4")
    (state / SUMS).write_text(json.dumps(digests(str(tmp_path), "step-4")))
    return tmp_path


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr("training.states.dist.get_rank", lambda: 0)


def test_a_whole_state(folder, processes):
    assert read_latest(str(folder)) == "step-4"
    refuse_damaged(str(folder), "step-4")
    os.remove(folder / "step-4" / SUMS)                     # of an earlier version
    refuse_damaged(str(folder), "step-4")


@pytest.mark.parametrize("path", ("step-4/weights.pt", "reference.pt"))
@pytest.mark.parametrize("change", ("flipped", "cut", "missing"))
def test_a_damaged_state(folder, processes, path, change):
    content = (folder / path).read_bytes()
    if change == "missing":
        os.remove(folder / path)
    else:
        (folder / path).write_bytes(content[:-1] + (b"\x07" if change == "flipped" else b""))
    with pytest.raises(InputError, match=f"step-4: {os.path.basename(path)} is not.*step-2"):
        refuse_damaged(str(folder), "step-4")


@pytest.mark.parametrize("name", (b"", b"step-", b"step-40", b"4step-", b"\xff\xfe", b"../x",
                                  b"step-4\0"))
def test_latest_names_no_state(folder, name):
    (folder / "latest").write_bytes(name)
    with pytest.raises(InputError, match="latest: names .*no state.*step-2, step-4"):
        read_latest(str(folder))


@pytest.mark.parametrize("line", (b"<html>", b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"\0\0"))
def test_a_damaged_log(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match="metrics.jsonl, row 1: is no step"):
        cut_log(str(path), 3)
