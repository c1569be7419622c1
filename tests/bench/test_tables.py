"""The notes' tables are made again at tiny size: every run has its row, and its numbers are those
of its own answers.
"""
import json
import shutil
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import load_json
from programs import ROOT

import eval_pope
import train
from bench import tables
from eval_pope import read_pope, says_yes
from post_decoder import VARIANTS
from tools.plots import read_sweep

QUICK = ["--seeds", "42", "--validation", "--max_steps", "2", "--learning_rate"]
BASE, BEST_THRESHOLD = ("base", "–"), ("base with its best single threshold (control)", "–")


class InTurn(nullcontext):
    """Instead of a pool of threads: everything in the main one, the only one that may listen for
    Ctrl-C.
    """

    def __enter__(self):
        return self

    map = staticmethod(map)


@pytest.fixture
def seed(world, tmp_path, in_this_process, monkeypatch):
    """A folder for tables.py with one seed's world, base and preference data in it. The programs
    that tables.py starts run in this process.
    """
    def run(program, *flags):
        monkeypatch.setattr(sys, "argv", [program, *flags])
        {"train.py": train, "eval_pope.py": eval_pope}[program].main()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tables, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(tables, "run", run)
    folder = tmp_path / "seed42"
    folder.mkdir()
    shutil.copytree(world.folder, folder / "world")         # its preference data are made anew
    (folder / "base").symlink_to(world.base)
    return folder


def rows_of(path):
    """{split: {(trained, learning rate): [the cells behind]}}"""
    found, split = {}, None
    for line in path.read_text().splitlines()[1:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "trained":
            found[split][cells[0], cells[1]] = cells[2:]
        elif line and not line.startswith("|"):
            found[split := line] = {}
    return found


def check(rows, seed, asked, model, key):
    """Count a row's accuracy anew from the answers of `model` in the folder `asked`. Returns the
    answers of a split.
    """
    for split, cells in rows.items():
        pope = read_pope(str(seed / "world" / "val" / "pope"), split)
        labels = {(q["image"], q["text"]): q["label"] == "yes" for q in pope}
        with open(seed / asked / f"{model}_{split}.jsonl") as file:
            said = [json.loads(line) for line in file]
        right = np.mean([says_yes(row["answer"]) == labels[row["image"], row["question"]]
                         for row in said])
        assert cells[key][0] == f"{100 * right:.1f} ± 0.0" and len(cells[key]) == 7
    return said


def test_variants(seed, capsys):
    tables.main(["variants", "--output_dir", str(seed.parent), *QUICK, "0.3"])
    said = capsys.readouterr().out
    rows = rows_of(seed.parent / "variants-validation.md")
    assert list(rows) == ["random", "popular", "adversarial"]
    assert "variants-validation.svg" in said.splitlines()[-1]
    names = ["head", *(tables.NOTES[name] for name in VARIANTS)]
    for cells in rows.values():
        assert cells.keys() == {(name, "0.3") for name in names} | {BASE, BEST_THRESHOLD}

    # Every row holds the accuracy of its own answers, and these are not the base's.
    base = check(rows, seed, "validation-variants", "base", BASE)
    for name, called in {"head": "head", **tables.NOTES}.items():
        key = called, "0.3"
        assert base != check(rows, seed, "validation-variants", f"variants-{name}", key)

    # Every run was trained as the table says.
    for name in ("head", *VARIANTS):
        arguments = load_json(seed / f"variants-{name}" / "config.json")["arguments"]
        assert arguments["tune"] == (["lm_head"] if name == "head" else ["post_decoder"])
        assert arguments["sft_weight"] == 0 and arguments["keep_correct"] is False
    sweep = read_sweep([str(seed / "validation-variants" / "metrics.json")])["random"]
    assert {name for name, _, _ in sweep} == {None, "head", *VARIANTS}


def test_adapters_are_asked_alone(seed):
    tables.main(["lora", "--output_dir", str(seed.parent), *QUICK, "0.1"])
    rows = rows_of(seed.parent / "lora-validation.md")
    lora = "LoRA r 16", "0.1"
    assert all(cells.keys() == {BASE, BEST_THRESHOLD, lora} for cells in rows.values())
    base = check(rows, seed, "validation-lora/0", "base", BASE)
    assert base != check(rows, seed, "validation-lora/1", "adapter", lora)
    paths = [str(seed / "validation-lora" / n / "metrics.json") for n in "01"]
    sweep = read_sweep(paths)["random"]
    assert [(name, rate) for name, rate, _ in sweep[1:]] == [("LoRA", 0.1)] and sweep[0][0] is None


def test_mean_and_half_the_range():
    def numbers(x):
        return {c: float(x) for c in tables.COLUMNS}

    results = [{"random": {"base": numbers(60), ("head", 1e-3): numbers(a)}} for a in (70, 71, 75)]
    text = tables.markdown(results)
    assert f"| head | 0.001 |{' 72.0 ± 2.5 |' * 7}" in text
    assert "| base | – |" + " 60.0 ± 0.0 |" * 7 in text
    assert eval_pope.COLUMNS["f1"] in text and "control" in text
