"""tools/plots.py: sweeps as a picture, and the program that draws runs and sweeps."""
import json
import re
import xml.etree.ElementTree as xml

import pytest
from conftest import largest_difference
from drawings import SVG, dots_of, is_dashed, lines_of, panels, path_points, place_of, write_run
from programs import ROOT, shell, succeeds

from eval_pope import leans
from post_decoder import VARIANTS, BlockConfig
from support.common import InputError
from tools.plots import draw_sweep, variant

# The training notes' runs of the block on HA-DPO's data, popular split: learning rate, accuracy,
# precision, recall, yes ratio.
NOTES = {"full": [(2e-7, 87.43, 86.30, 89.00, 51.57), (5e-7, 87.23, 85.87, 89.13, 51.90),
                  (2e-6, 83.83, 97.48, 69.47, 35.63)],
         "align_after_align": [(2e-7, 86.27, 83.25, 90.80, 54.53),
                               (5e-7, 87.33, 86.08, 89.07, 51.73),
                               (1e-6, 87.83, 90.33, 84.73, 46.90)]}
BASE = {"accuracy": 86.23, "precision": 83.28, "recall": 90.67, "f1": 86.82, "yes_ratio": 54.43,
        "tp": 1360, "fp": 273, "tn": 1227, "fn": 140}


def write_checkpoint(folder, block, arguments):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"block": block, "arguments": arguments}))


def write_sweep(folder, seeds=1, shift=0.):
    """The notes' runs as checkpoints, and as eval_pope.py's metrics.json → its path."""
    checkpoints, models = {}, {"base": BASE}
    for name, runs in NOTES.items():
        for rate, accuracy, precision, recall, yes_ratio in runs:
            for seed in range(seeds):
                model = f"{name}-{rate:g}-{seed}"
                block = vars(BlockConfig(**VARIANTS[name]))
                write_checkpoint(folder / model, block, {"block": "full", "learning_rate": rate})
                checkpoints[model] = str(folder / model)
                tp = round(15 * recall)
                fp = round(30 * yes_ratio) - tp
                models[model] = {"accuracy": accuracy + seed * shift, "precision": precision,
                                 "recall": recall, "f1": 87., "yes_ratio": yes_ratio, "tp": tp,
                                 "fp": fp, "tn": 1500 - fp, "fn": 1500 - tp}
    content = {"protocol": "hadpo", "checkpoints": checkpoints, "metrics": {"popular": models}}
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder / "metrics.json")


# ---- A sweep -------------------------------------------------------------------------------------


def test_sweep_shows_the_collapse(tmp_path):
    """The notes' learning rates: 2e-6 collapses (recall 69 %, yes-ratio 36 %), and no other run has
    a ring.
    """
    found = panels(draw_sweep([write_sweep(tmp_path)]))
    assert list(found) == ["popular: accuracy", "popular: yes ratio"]
    for panel in found.values():
        dots, rings = dots_of(panel)
        assert len(dots) == 6 and len(rings) == 1
        x, y = place_of(rings[0])
        assert x == max(x for x, _ in map(place_of, dots))                  # the highest rate
        assert y == max(y for _, y in map(place_of, dots))                  # the lowest point
        assert list(map(is_dashed, lines_of(panel))) == [True, False, False]


def test_variants_are_known_by_their_blocks(tmp_path):
    """Every variant, the head alone, and a block that none of our names fits."""
    blocks = {name: vars(BlockConfig(**changes)) for name, changes in VARIANTS.items()}
    other = vars(BlockConfig(attention="self", align="linear"))
    for name, block in (blocks | {"head": None, "another block": other}).items():
        write_checkpoint(tmp_path, block, {"learning_rate": 1e-6})
        assert variant(str(tmp_path)) == (name, 1e-6)


def test_seeds_of_a_sweep(tmp_path):
    """Every seed has its dot, the line goes through their mean."""
    panel = panels(draw_sweep([write_sweep(tmp_path, seeds=3, shift=1.)]))["popular: accuracy"]
    dots, lines = [place_of(dot) for dot in dots_of(panel)[0]], lines_of(panel)[1:]
    lines = [path_points(line) for line in lines]
    assert len(dots) == 18 and [len(line) for line in lines] == [3, 3]
    first = dots[:9]                    # of one variant; the middle one of each rate is the mean
    middle = [(x, y) for x, y in first if sum(a == x and b < y for a, b in first) == 1]
    assert largest_difference("means", sorted(lines[0]), sorted(middle)) < 0.02


def test_variants_stand_side_by_side(tmp_path):
    """Equal numbers of two variants at one rate do not hide each other. A variant's line and its
    dots stand in the same place.
    """
    panel = panels(draw_sweep([write_sweep(tmp_path)]))["popular: accuracy"]
    places = [group.get("transform") for group in panel.iter(SVG + "g")]
    # The base, then line and dots of each.
    assert places == ["translate(0)", *["translate(-3.5)"] * 2, *["translate(3.5)"] * 2]


def test_leaning_is_measured_against_the_labels():
    assert not leans({"yes_ratio": 85., "tp": 80, "fn": 0, "fp": 5, "tn": 15})
    assert leans({"yes_ratio": 50., "tp": 50, "fn": 30, "fp": 0, "tn": 20})


MISTAKES = {
    "holds no metrics": {},
    "knows no trained checkpoint": {"metrics": {"random": {"base": {"accuracy": 1}}}},
    "nowhere/config.json.*no such file": {"checkpoints": {"a": "nowhere"},
                                          "metrics": {"random": {"a": {"accuracy": 1}}}}}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(tmp_path, message):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(MISTAKES[message]))
    with pytest.raises(InputError, match=message):
        draw_sweep([str(path)])


# ---- The program ---------------------------------------------------------------------------------


def test_typed_by_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    program = "python", "-m", "tools.plots"
    run, _ = write_run(tmp_path / "run", 20)
    said = succeeds(*program, run, "--output", "training.svg", cwd=tmp_path, fresh=True)
    assert "training.svg: 1 file drawn" in said
    xml.parse(tmp_path / "training.svg")
    sweep = write_sweep(tmp_path / "sweep")
    succeeds(*program, sweep, "--output", "sweep.svg", cwd=tmp_path)
    text = (tmp_path / "sweep.svg").read_text()
    assert "prefers-color-scheme: dark" in text and not re.search(r"(href|src|url\()", text)
    for wrong, of in (([run, sweep, "--output", "x.svg"], "not both"),
                      ([__file__, "--output", "x.svg"], "is neither metrics.jsonl of a run nor"),
                      ([run, "--output", "nowhere/x.svg"], "nowhere/x.svg"),
                      (["nope", "--output", "x.svg"], "nope: no such file"),
                      ([run, "--output", "x.png"], "--output x.png: an SVG is written; name a")):
        done = shell(*program, *wrong, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and of in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.svg").exists() and not (tmp_path / "x.png").exists()
