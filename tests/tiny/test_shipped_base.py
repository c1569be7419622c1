"""The tiny base that comes with the code: seed 42's runs start from it; it can be asked at once.

Worlds here have few images; the base is the real one.
"""
import json
import os
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import load_json
from programs import ROOT
from short_runs import read_bytes

import eval_pope
import train
from checkpoints.load import load_base
from support.common import InputError, write_json
from support.tensors import read_file
from tiny import places, world
from tiny.places import SHIPPED_BASE
from tiny.preferences import Pairs
from tiny.prepare import mined_from
from tiny.world import Sizes, draw_supervised, make_world

FEW = Sizes(sft=40, preference=12, validation=2, evaluation=8)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A folder `out` with a world of seed 42 in which nothing is drawn for stage 0."""
    root = tmp_path_factory.mktemp("shipped")
    make_world(str(root / "out" / "world"), 42, FEW, supervised=False, progress=False)
    return root


@pytest.fixture
def typed(monkeypatch, in_this_process, small_world):
    """A program as it is typed, in this process and in `small_world`."""
    def run(program, *flags):
        monkeypatch.chdir(small_world)
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        program.main()

    return run


def files_of(folder):
    return {os.path.relpath(os.path.join(place, name), folder): read_bytes(f"{place}/{name}")
            for place, _, names in os.walk(folder) for name in names}


def test_what_is_shipped():
    """Small, in fp16, and its folder says how it was made."""
    files = files_of(SHIPPED_BASE)
    assert sum(map(len, files.values())) < 2e6
    tensors = read_file(os.path.join(SHIPPED_BASE, "model.safetensors"))
    assert {lazy.read().dtype for lazy in tensors.values()} == {torch.float16}
    said = files["README.md"].decode()
    for part in ("train.py --stage 0", "tools.merge", "--seed 42", "commit "):
        assert part in said, part


def test_it_is_asked_at_once(typed, small_world, capsys):
    """It speaks in sentences and says yes too often; nothing is written into its folder."""
    before = files_of(SHIPPED_BASE)
    typed(eval_pope, os.path.relpath(SHIPPED_BASE, small_world), "--max_new_tokens", 12)
    assert files_of(SHIPPED_BASE) == before
    assert "answers and metrics.json: out/pope" in capsys.readouterr().out
    metrics = load_json(small_world / "out" / "pope" / "metrics.json")["metrics"]
    assert metrics["adversarial"]["base"]["yes_ratio"] > 55
    assert metrics["random"]["base"]["accuracy"] > 70
    with open(small_world / "out" / "pope" / "base_random.jsonl") as file:
        answers = [json.loads(line) for line in file]
    assert all(world.well_formed(row["question"], row["answer"]) for row in answers)


def test_its_world_is_drawn_where_none_is(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "Sizes", lambda: FEW)
    monkeypatch.chdir(tmp_path)
    assert places.world_beside(SHIPPED_BASE) == ("out/world", "out")
    assert "drawing it (seed 42" in capsys.readouterr().out
    assert not os.path.exists("out/world/llava/images")
    assert places.world_beside("runs/7/stage2") == ("out/world", "runs/7")          # no folder
    os.makedirs("runs/7/stage2")
    assert places.world_beside("runs/7/stage2") == ("out/world", "runs/7/stage2")
    os.makedirs("runs/7/world")
    assert places.world_beside("runs/7/stage2") == ("runs/7/world", "runs/7/stage2")


def test_another_worlds_seed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_world("out/world", 7, FEW, supervised=False, progress=False)
    with pytest.raises(InputError, match="out/world: was made with --seed 7.*--coco_path"):
        places.world_beside(SHIPPED_BASE)


def test_runs_start_from_it(typed, small_world):
    """No tower and no stage 0; another seed or another size makes a base of its own."""
    typed(train, "--stage", 1, "--max_steps", 1)
    out = small_world / "out"
    assert {"base", "untrained"}.isdisjoint(os.listdir(out))
    assert not os.path.exists(out / "world" / "llava" / "images")
    config = load_json(out / "stage1" / "config.json")
    assert os.path.realpath(config["base"]) == SHIPPED_BASE
    assert config["fingerprint"] == load_base(SHIPPED_BASE).fingerprint
    assert load_json(out / "world" / "hadpo" / "base.json") == {
        "fingerprint": config["fingerprint"], "pairs": asdict(Pairs())}
    for flags in (["--seed", 7], ["--tiny_base_steps", 3], ["--tiny_sizes", '{"sft": 9}']):
        args = train.parse_flags([str(flag) for flag in ["--stage", 1, *flags]])
        assert not places.ships_base_of(args)


def test_its_path_is_short_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert places.shipped_base() == "tiny/base"
    monkeypatch.chdir(tmp_path)
    assert places.shipped_base() == SHIPPED_BASE


def mined(folder, base, pairs):
    """A hadpo/ as mine_preferences leaves it; `said` tells whose it is."""
    folder.mkdir()
    write_json(str(folder / "base.json"), {"fingerprint": base, **pairs})
    (folder / "said").write_text(base + str(pairs))


def test_preferences_of_another_base_move_aside(tmp_path, capsys):
    """They are what a base said, so each base has its own, and none is mined twice."""
    folder, hadpo, pairs = str(tmp_path), tmp_path / "hadpo", {"pairs": asdict(Pairs())}
    assert not mined_from(folder, "a")
    mined(hadpo, "a", pairs)
    assert mined_from(folder, "a") and hadpo.exists()
    assert not mined_from(folder, "b") and not hadpo.exists()
    assert f"was mined from another base; it is {hadpo}-a now" in capsys.readouterr().out
    mined(hadpo, "b", pairs)
    assert mined_from(folder, "b")
    assert mined_from(folder, "a") and (hadpo / "said").read_text().startswith("a")
    assert (tmp_path / "hadpo-b" / "said").read_text().startswith("b")


@pytest.mark.parametrize("old", ({}, {"pairs": asdict(Pairs(described="true", every=8))}))
def test_other_pairs_of_the_same_base_move_aside(tmp_path, capsys, old):
    """Those of an earlier version, whose base.json does not tell which pairs there are, too."""
    folder, hadpo = str(tmp_path), tmp_path / "hadpo"
    mined(hadpo, "a", old)
    assert not mined_from(folder, "a") and not hadpo.exists()
    assert f"other pairs than this version makes; it is {hadpo}-a-others now" in (
        capsys.readouterr().out)
    assert (tmp_path / "hadpo-a-others" / "said").read_text() == "a" + str(old)
    # Nothing that stands there already is written over.
    mined(hadpo, "a", old)
    with pytest.raises(InputError, match="hadpo-a-others, where it would go, is there already"):
        mined_from(folder, "a")
    assert hadpo.exists()


def test_other_pairs_do_not_come_back(tmp_path):
    """A base's own folder that had moved aside may hold an earlier version's pairs."""
    folder, hadpo = str(tmp_path), tmp_path / "hadpo"
    mined(tmp_path / "hadpo-b", "b", {})
    mined(hadpo, "a", {"pairs": asdict(Pairs())})
    assert not mined_from(folder, "b") and not hadpo.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hadpo-a", "hadpo-b-others"}


def test_images_of_stage_0_can_come_later(tmp_path):
    """Drawn with the world or behind it, they are the same, and so is everything else."""
    for name, supervised in (("at_once", True), ("later", False)):
        make_world(str(tmp_path / name), 42, FEW, supervised, progress=False)
    assert not os.path.exists(tmp_path / "later" / "llava" / "images")
    draw_supervised(str(tmp_path / "later"))
    at_once, later = (files_of(tmp_path / name) for name in ("at_once", "later"))
    assert at_once.keys() == later.keys() and len(at_once) > 60
    different = [name for name in at_once if at_once[name] != later[name]]
    assert set(different) <= {"tokenizer.model"}            # it holds the name of a temporary file
