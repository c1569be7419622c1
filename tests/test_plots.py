"""Pictures of training and sweeps: what is drawn stands where the numbers say, and what cannot be drawn is said in one line."""
import json
import math
import os
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from conftest import ROOT, dpo_flags, largest_difference, shell, succeeds

import plots
from plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, binned, draw_sweep, draw_training, leans, number, panel, ticks
from post_decoder import VARIANTS, BlockConfig
from readers import InputError

SVG = "{http://www.w3.org/2000/svg}"
# The training notes' runs of the block on HA-DPO's data, popular split: learning rate, accuracy, precision, recall, yes ratio.
NOTES = {"full": [(2e-7, 87.43, 86.30, 89.00, 51.57), (5e-7, 87.23, 85.87, 89.13, 51.90), (2e-6, 83.83, 97.48, 69.47, 35.63)],
         "align_after_align": [(2e-7, 86.27, 83.25, 90.80, 54.53), (5e-7, 87.33, 86.08, 89.07, 51.73),
                               (1e-6, 87.83, 90.33, 84.73, 46.90)]}


def path_points(path):
    return [tuple(map(float, point.split())) for point in path.get("d")[1:].rstrip("Z").split("L")]


def panels(svg):
    """{title: its <svg>}"""
    found = {}
    for inner in xml.fromstring(svg).iter(SVG + "svg"):
        if inner.get("aria-label"):
            found[inner.get("aria-label")] = inner
    return found


@pytest.mark.parametrize("low, high, log, expected", [
    (0, 1, False, [0, .2, .4, .6, .8, 1]), (-0.06, 1.06, False, [0, .5, 1]), (-41, 1, False, [-40, -30, -20, -10, 0]),
    (0, 1672, False, [0, 500, 1000, 1500]), (1e-7, 1e-5, True, [1e-7, 2e-7, 5e-7, 1e-6, 2e-6, 5e-6, 1e-5]),
    (.01, 300, True, [.01, .1, 1, 10, 100]), (1e-12, 1, True, None), (3, 3.001, False, None)])
def test_ticks(low, high, log, expected):
    found = ticks(low, high, log)
    assert expected is None or np.allclose(found, expected)
    assert 2 <= len(found) <= 8 and low - 1e-12 <= min(found) and max(found) <= high + 1e-12 and found == sorted(found)
    assert len({number(t) for t in found}) == len(found)


def test_numbers_as_they_are_typed():
    assert [number(x) for x in (5e-7, 0.25, 1500., -3., 2e-4, -2.5e-6, 0.)] == ["5e-7", "0.25", "1500", "−3", "2e-4", "−2.5e-6", "0"]


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_where_the_numbers_say(log):
    x, y = [1e-7, 1e-6, 1e-4], [2., 30., 5.]
    points = Line(x, y, radius=[3, 3, 3], ringed=[False, True, False])
    drawn = xml.fromstring(panel("a < b", [points], x_range=(1e-7, 1e-4), y_range=(1, 100), log_x=log, log_y=log))
    f = np.log10 if log else np.array
    at = [LEFT + (WIDTH - RIGHT - LEFT) * (f(x) - f(1e-7)) / (f(1e-4) - f(1e-7)),
          HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (f(y) - f(1)) / (f(100) - f(1))]
    circles = [c for c in drawn.iter(SVG + "circle") if not c.get("class")]
    assert largest_difference("dots", [[float(c.get(k)) for c in circles] for k in ("cx", "cy")], np.array(at)) < 0.006
    line, = (p for p in drawn.iter(SVG + "path") if p.get("class") == "line")
    assert largest_difference("line", path_points(line), np.array(at).T) < 0.006
    ring, = (c for c in drawn.iter(SVG + "circle") if c.get("class") == "ring")
    assert ring.get("cx") == circles[1].get("cx") and drawn.get("aria-label") == "a < b"


def test_what_cannot_be_drawn_is_left_out():
    drawn = xml.fromstring(panel("", [Line([1, 2, 3, 4, 5], [1., math.nan, 0., math.inf, 10.])], log_y=True))
    line, = (p for p in drawn.iter(SVG + "path") if p.get("class") == "line")
    assert len(path_points(line)) == 2
    xml.fromstring(panel("nothing", [Line([], [])]))
    xml.fromstring(panel("one value", [Line([1, 1], [5., 5.])]))


def write_run(folder, steps, seed=0, **changes):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    rows = [{"step": n + 1, "loss": .69 * math.exp(-n / steps) + .01 * rng.standard_normal(), "rewards/margin": n / steps,
             "rewards/accuracy": .5, "logps/chosen": -1., "logps/rejected": -1. - n, "grad_norm": 1 + rng.random(),
             "learning_rate": 1e-3 * (1 - n / steps)} for n in range(steps)]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return str(path), rows


def test_training(tmp_path):
    """Two runs over each other, one of them long: means of bins, a band that loses no spike, a small file."""
    long, rows = write_run(tmp_path / "long", 5000)
    rows[3210]["loss"], rows[1234]["loss"] = 7., -5.
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, _ = write_run(tmp_path / "a & b", 3, seed=1)
    svg = draw_training([long, short, long])
    assert len(svg) < 150_000 and "a &amp; b" in svg and svg.count("long</text>") == 1
    found = panels(svg)
    assert list(found) == ["loss", "reward margin", "reward accuracy", "log-probability: chosen —, rejected - -", "gradient norm",
                           "learning rate"]
    for title, inner in found.items():
        lines = [p for p in inner.iter(SVG + "path") if p.get("class") == "line"]
        assert len(lines) == (4 if "chosen" in title else 2)
        assert sum(p.get("stroke-dasharray") is not None for p in lines) == (2 if "chosen" in title else 0)
        assert len(path_points(lines[0])) == 200 and len(path_points(lines[-1])) == 3
    line, band = ([y for _, y in path_points(next(p for p in found["loss"].iter(SVG + "path") if p.get("class") == which))]
                  for which in ("line", "band"))
    assert min(band) < min(line) - 50 and max(band) > max(line) + 50             # both spikes are drawn
    steps, mean, low, high = binned([r["step"] for r in rows], [r["loss"] for r in rows])
    assert (max(high), min(low)) == (7, -5) and all(a <= b <= c for a, b, c in zip(low, mean, high)) and steps == sorted(steps)
    assert abs(np.mean(mean) - np.mean([r["loss"] for r in rows])) < 1e-9        # all bins are alike full


def test_supervised_runs_have_fewer_panels(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1 / n, "grad_norm": 0., "learning_rate": .1}) + "\n" for n in (1, 2, 3)))
    assert list(panels(draw_training([str(path)]))) == ["loss", "gradient norm", "learning rate"]


def write_sweep(folder, seeds=1, shift=0.):
    """The notes' runs as checkpoints and as eval_pope.py's metrics.json."""
    base = dict(accuracy=86.23, precision=83.28, recall=90.67, f1=86.82, yes_ratio=54.43, tp=1360, fp=273, tn=1227, fn=140)
    checkpoints, models = {}, {"base": base}
    for variant, runs in NOTES.items():
        for rate, accuracy, precision, recall, yes_ratio in runs:
            for seed in range(seeds):
                name = f"{variant}-{rate:g}-{seed}"
                (folder / name).mkdir(parents=True)
                (folder / name / "config.json").write_text(json.dumps({
                    "block": vars(BlockConfig(**VARIANTS[variant])), "arguments": {"block": "full", "learning_rate": rate}}))
                checkpoints[name] = str(folder / name)
                tp = round(15 * recall)
                fp = round(30 * yes_ratio) - tp
                models[name] = dict(accuracy=accuracy + seed * shift, precision=precision, recall=recall, f1=87.,
                                    yes_ratio=yes_ratio, tp=tp, fp=fp, tn=1500 - fp, fn=1500 - tp)
    content = {"protocol": "hadpo", "checkpoints": checkpoints, "metrics": {"popular": models}}
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder / "metrics.json")


def test_sweep_shows_the_collapse(tmp_path):
    """The notes' learning rates: 2e-6 collapses (recall 69 %, yes-ratio 36 %), and no other run has a ring."""
    found = panels(draw_sweep([write_sweep(tmp_path)]))
    assert list(found) == ["popular: accuracy", "popular: yes ratio"]
    for title, inner in found.items():
        rings = [c for c in inner.iter(SVG + "circle") if c.get("class") == "ring"]
        dots = [c for c in inner.iter(SVG + "circle") if not c.get("class")]
        assert len(dots) == 6 and len(rings) == 1
        assert float(rings[0].get("cx")) == max(float(c.get("cx")) for c in dots)                          # the highest rate,
        assert float(rings[0].get("cy")) == max(float(c.get("cy")) for c in dots)                          # and the lowest point
        dashed = [p.get("stroke-dasharray") is not None for p in inner.iter(SVG + "path") if p.get("class") == "line"]
        assert dashed == [True, False, False]


def test_variants_are_known_by_their_blocks(tmp_path):
    """Every variant, the head alone, and a block that none of our names fits."""
    blocks = {name: vars(BlockConfig(**changes)) for name, changes in VARIANTS.items()}
    blocks |= {"head": None, "another block": vars(BlockConfig(attention="self", align="linear"))}
    for name, block in blocks.items():
        (tmp_path / "config.json").write_text(json.dumps({"block": block, "arguments": {"learning_rate": 1e-6}}))
        assert plots.variant(str(tmp_path)) == (name, 1e-6)


def test_seeds_of_a_sweep(tmp_path):
    """Every seed has its dot, the line goes through their mean."""
    inner = panels(draw_sweep([write_sweep(tmp_path, seeds=3, shift=1.)]))["popular: accuracy"]
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in inner.iter(SVG + "circle") if not c.get("class")]
    lines = [path_points(p) for p in inner.iter(SVG + "path") if p.get("class") == "line"][1:]
    assert len(dots) == 18 and [len(line) for line in lines] == [3, 3]
    middle = {(x, y) for x, y in dots if sum(a == x and b < y for a, b in dots[:9]) == 1}
    assert largest_difference("means", sorted(lines[0]), sorted(p for p in dots[:9] if p in middle)) < 0.02


def test_variants_stand_side_by_side(tmp_path):
    """Equal numbers of two variants at one rate do not hide each other; a variant's line and its dots stand in the same place."""
    inner = panels(draw_sweep([write_sweep(tmp_path)]))["popular: accuracy"]
    places = [g.get("transform") for g in inner.iter(SVG + "g")]
    assert places == ["translate(0)", *["translate(-3.5)"] * 2, *["translate(3.5)"] * 2]       # base, then line and dots of each


def test_leaning_is_measured_against_the_labels():
    assert not leans(dict(yes_ratio=85., tp=80, fn=0, fp=5, tn=15)) and leans(dict(yes_ratio=50., tp=50, fn=30, fp=0, tn=20))


MISTAKES = {"no such file": (None, ".jsonl"), "holds no step": ("", ".jsonl"),
            "'loss' should be": ('{"step": 1, "loss": "low"}', ".jsonl"),
            "'step' should be": ('{"loss": 1.0}', ".jsonl"), "not readable as JSON": ('{"step": 1, "lo', ".jsonl"),
            "holds no metrics": ("{}", ".json"),
            "knows no trained checkpoint": ('{"metrics": {"random": {"base": {"accuracy": 1}}}}', ".json"),
            "nowhere/config.json.*no such file":
                ('{"checkpoints": {"a": "nowhere"}, "metrics": {"random": {"a": {"accuracy": 1}}}}', ".json")}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(tmp_path, message):
    content, ending = MISTAKES[message]
    path = tmp_path / f"m{ending}"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        (draw_training if ending == ".jsonl" else draw_sweep)([str(path)])


def test_typed_by_a_user(tmp_path):
    program = os.path.join(ROOT, "plots.py")
    run, _ = write_run(tmp_path / "run", 20)
    assert "training.svg: 1 file drawn" in succeeds("python", program, run, "--output", "training.svg", cwd=tmp_path)
    xml.parse(tmp_path / "training.svg")
    sweep = write_sweep(tmp_path / "sweep")
    succeeds("python", program, sweep, "--output", "sweep.svg", cwd=tmp_path)
    text = (tmp_path / "sweep.svg").read_text()
    assert "prefers-color-scheme: dark" in text and not re.search(r"(href|src|url\()", text)
    for wrong in ([run, sweep, "--output", "x.svg"], [run, "--output", "nowhere/x.svg"]):
        done = shell("python", program, *wrong, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.svg").exists()


def test_training_draws_itself(world, tmp_path):
    """A run leaves its picture, with the runs named by --plot beside it; what cannot be drawn is said before it begins."""
    other, _ = write_run(tmp_path / "other", 4)
    command = ["python", os.path.join(ROOT, "train.py"), "--stage", 1, *dpo_flags(world), "--max_steps", 2, "--output_dir", "mine", "--plot"]
    done = shell(*command, "nowhere.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "error: nowhere.jsonl: no such file" in done.stderr and not (tmp_path / "mine").exists()
    succeeds(*command, other, cwd=tmp_path)
    svg = (tmp_path / "mine" / "training.svg").read_text()
    assert ">mine</text>" in svg and ">other</text>" in svg
    lines = [p for p in panels(svg)["reward margin"].iter(SVG + "path") if p.get("class") == "line"]
    assert [len(path_points(line)) for line in lines] == [2, 4]
