"""training/picture.py: the picture of a run shows its numbers, and what cannot be drawn is said in
one line.
"""
import os

import numpy as np
import pytest
from conftest import dpo_flags
from drawings import is_dashed, lines_of, panels, path_points, paths_of, write_rows, write_run
from programs import ROOT, shell, succeeds

from support.common import InputError
from training.picture import binned, draw_training


def test_training(tmp_path):
    """Two runs over each other, one of them long: means of bins, a band that loses no spike, a
    small file.
    """
    long, rows = write_run(tmp_path / "long", 5000)
    rows[3210]["loss"], rows[1234]["loss"] = 7., -5.
    write_rows(tmp_path / "long" / "metrics.jsonl", rows)
    short, _ = write_run(tmp_path / "a & b", 3, seed=1)
    svg = draw_training([long, short, long])
    assert len(svg) < 150_000 and "a &amp; b" in svg and svg.count("long</text>") == 1
    found = panels(svg)
    assert list(found) == ["loss", "reward margin", "reward accuracy",
                           "log-probability: chosen —, rejected - -", "gradient norm",
                           "learning rate"]
    for title, panel in found.items():
        lines = lines_of(panel)
        assert len(lines) == (4 if "chosen" in title else 2)
        assert sum(map(is_dashed, lines)) == (2 if "chosen" in title else 0)
        assert len(path_points(lines[0])) == 200 and len(path_points(lines[-1])) == 3

    # Both spikes are drawn.
    line, band = ([y for _, y in path_points(paths_of(found["loss"], name)[0])]
                  for name in ("line", "band"))
    assert min(band) < min(line) - 50 and max(band) > max(line) + 50
    losses = [row["loss"] for row in rows]
    steps, mean, low, high = binned([row["step"] for row in rows], losses)
    assert (max(high), min(low)) == (7, -5) and steps == sorted(steps)
    assert all(a <= b <= c for a, b, c in zip(low, mean, high, strict=True))
    assert abs(np.mean(mean) - np.mean(losses)) < 1e-9          # all bins are equally full


def test_supervised_runs_have_fewer_panels(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [{"step": n, "loss": 1 / n, "grad_norm": 0., "learning_rate": .1}
                      for n in (1, 2, 3)])
    assert list(panels(draw_training([str(path)]))) == ["loss", "gradient norm", "learning rate"]


MISTAKES = {"no such file": None, "holds no step": "",
            "'loss' should be": '{"step": 1, "loss": "low"}',
            "'step' should be": '{"loss": 1.0}',
            "not readable as JSON": '{"step": 1, "lo'}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(tmp_path, message):
    content, path = MISTAKES[message], tmp_path / "m.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        draw_training([str(path)])


def test_training_draws_itself(world, tmp_path):
    """A run leaves its picture, with the runs named by --plot beside it. What cannot be drawn is
    said before it begins.
    """
    other, _ = write_run(tmp_path / "other", 4)
    command = ["python", os.path.join(ROOT, "train.py"), "--stage", 1, *dpo_flags(world),
               "--max_steps", 2, "--output_dir", "mine", "--plot"]
    done = shell(*command, "nowhere.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "error: nowhere.jsonl: no such file" in done.stderr
    assert not (tmp_path / "mine").exists()
    succeeds(*command, other, cwd=tmp_path)
    svg = (tmp_path / "mine" / "training.svg").read_text()
    assert ">mine</text>" in svg and ">other</text>" in svg
    lines = lines_of(panels(svg)["reward margin"])
    assert [len(path_points(line)) for line in lines] == [2, 4]
