"""Runs of training as one picture: loss, rewards, log-probabilities, gradient norm, learning rate.

    svg = draw_training(["out/stage1/metrics.jsonl", "out/stage2/metrics.jsonl"])

train.py draws its own run when it is done; `python -m tools.plots` draws others. The steps are
divided into bins. A line goes through the means of the bins, and the band around it is each bin's
smallest and largest value: thousands of steps stay readable and no spike is lost.
"""
import math
import os
from dataclasses import dataclass

import numpy as np

from support.charts import COLOURS, Axis, Line, panel, sheet
from support.common import InputError, field, read_json

BINS = 200                # points of a line at most


@dataclass
class Panel:
    title: str
    metrics: tuple        # names in metrics.jsonl; the second one is dashed
    log: bool = False     # whether y is logarithmic


PANELS = (
    Panel("loss", ("loss",)),
    Panel("reward margin", ("rewards/margin",)),
    Panel("reward accuracy", ("rewards/accuracy",)),
    Panel("log-probability: chosen —, rejected - -", ("logps/chosen", "logps/rejected")),
    Panel("gradient norm", ("grad_norm",), log=True),
    Panel("learning rate", ("learning_rate",)))


def read_run(path):
    """metrics.jsonl → {metric: values}, the steps among them; NaN where a step lacks a metric."""
    rows = read_json(path, lines=True)
    if not rows:
        raise InputError(f"{path}: holds no step; did the run end before its first one?")
    for n, row in enumerate(rows):
        field(row, "step", int, path, n)
        for name in row:
            field(row, name, (int, float), path, n)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def binned(steps, values):
    """→ mean step, mean, smallest and largest value of at most BINS bins: four lists.

    Values that are not finite are left out.
    """
    finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    bins = []
    if finite:
        parts = np.array_split(np.array(finite, ndmin=2), min(BINS, len(finite)))      # (n, 2) each
        bins = [(part[:, 0].mean(), part[:, 1].mean(), part[:, 1].min(), part[:, 1].max())
                for part in parts]
    return tuple([float(one[k]) for one in bins] for k in range(4))


def draw_training(paths):
    """Several metrics.jsonl → SVG, every metric against steps. InputError where one is damaged."""
    paths = list(dict.fromkeys(paths))
    runs = [read_run(path) for path in paths]
    panels = []
    for wanted in PANELS:
        lines = []
        for n, run in enumerate(runs):
            for k, metric in enumerate(wanted.metrics):
                if metric in run:
                    steps, mean, low, high = binned(run["step"], run[metric])
                    lines.append(Line(steps, mean, 1 + n % COLOURS, k == 1, (low, high)))
        # A logarithmic axis needs something positive.
        log = wanted.log and any(low > 0 for line in lines for low in line.band[0])
        if lines:
            panels.append(panel(wanted.title, lines, x=Axis("step"), y=Axis(log=log)))
    return sheet(panels, {name: 1 + n % COLOURS for n, name in enumerate(short_names(paths))})


def short_names(paths):
    """The names of the files' folders, or the whole paths where two of these are the same."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    return folders if len(set(folders)) == len(folders) else paths
