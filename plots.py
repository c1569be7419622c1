"""Training and sweeps at a glance, as SVG: nothing to install, any browser shows it, in light and in dark mode.

    python plots.py out/stage1/metrics.jsonl out/stage2/metrics.jsonl --output training.svg      # runs over each other
    python plots.py out/stage1-*/pope/metrics.json --output sweep.svg                             # POPE over learning rate

A `metrics.jsonl` is what train.py writes, one line per optimizer step; a `metrics.json` is eval_pope.py's, and the variant
and learning rate of each model in it stand in the `config.json` of its checkpoint. train.py draws its own run when it is
done; report.py puts `panel` into its page.

A line goes through the means of bins of steps, the band around it is each bin's smallest and largest value: thousands of
steps stay readable and no spike is lost. A sweep's line goes through the mean of the runs with the same variant and rate
(seeds), each of which has its dot. A dot has a ring where the yes-ratio is more than 10 points away from the labels', which
is how a model looks that a high learning rate has taught one single word.
"""
import argparse
import math
import os
from dataclasses import dataclass
from html import escape

import numpy as np

from post_decoder import VARIANTS, BlockConfig
from readers import InputError, field, read_json, run_program

BINS = 200                # points of a line at most
COLOURS = 7               # of lines; then they begin anew
LEANS = 10                # points between yes-ratio and the labels' from which a model leans to one answer
TRAINING = (  # title, metrics of metrics.jsonl (the second one dashed), logarithmic
    ("loss", ("loss",), False), ("reward margin", ("rewards/margin",), False), ("reward accuracy", ("rewards/accuracy",), False),
    ("log-probability: chosen —, rejected - -", ("logps/chosen", "logps/rejected"), False),
    ("gradient norm", ("grad_norm",), True), ("learning rate", ("learning_rate",), False))
# One palette for charts and report: ink, its fainter shades, and lines that colour-blind readers can tell apart (Okabe and Ito's
# hues). Line 0 is grey: the base.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --soft: #5d6670; --faint: #d9dee3;
  --c0: #7a838c; --c1: #0068a8; --c2: #c8550b; --c3: #00805f; --c4: #a04f83; --c5: #a67800; --c6: #3b8fc4;
  --c7: #1d2126; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --faint: #343a41;
  --c0: #939ca5; --c1: #58b0ea; --c2: #f08a45; --c3: #2fc79c; --c4: #d98fbd; --c5: #dfb13f; --c6: #9bd0f2;
  --c7: #e4e7ea; } }
svg.chart { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg.chart .title { font-weight: 600; font-size: 12px; }
svg.chart .soft { fill: var(--soft); }
svg.chart .grid { stroke: var(--faint); }
svg.chart .guide { stroke: var(--soft); stroke-dasharray: 2 3; }
svg.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg.chart .band { opacity: .16; }
svg.chart .ring { fill: none; stroke-width: 1.4; }
"""
WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 38          # margins of a panel


@dataclass
class Line:
    """One line of a panel: points that are not finite (or, on a logarithmic axis, not positive) are left out."""
    x: list
    y: list
    colour: int = 0
    dashed: bool = False
    band: tuple = None          # (lows, highs), as long as y
    radius: list = None         # of a dot at each point; None: no dots
    ringed: list = None         # whether a point has a ring
    joined: bool = True         # whether the points are joined
    shift: float = 0            # pixels to the right, so that lines with the same x do not hide each other


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def ticks(low, high, log=False):
    """Round numbers within [low, high]: 1, 2 or 5 times a power of ten, about five of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 6)
        steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        found = [s * 10.0 ** d for d in decades if d % every == 0 for s in steps]
    else:
        power = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= 5)
        found = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9) or low <= t <= high]


def number(value):
    """As short as a person would type it: 5e-7, 0.25, 1500."""
    mantissa, _, exponent = (f"{value:.5e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}").partition("e")
    return f"{float(mantissa):g}".replace("-", "−") + (f"e{int(exponent)}" if exponent else "")


def span(values, log):
    """The range of an axis: all values, with a little room."""
    values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return (1, 10) if log else (0, 1)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.2)
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1
    return low - room, high + room


def panel(title, lines, x_label="", y_label="", x_range=None, y_range=None, log_x=False, log_y=False, guides=(), diagonal=False):
    """One chart as an `<svg>` of WIDTH × HEIGHT. `guides`: y values with a dotted line; `diagonal`: one from corner to corner."""
    x_low, x_high = x_range or span([x for line in lines for x in line.x], log_x)
    y_low, y_high = y_range or span([y for line in lines for y in (*line.y, *(line.band[0] if line.band else ()),
                                                                   *(line.band[1] if line.band else ()))] + list(guides), log_y)

    def at(value, low, high, start, end, log):
        f = math.log10 if log else float
        return round(start + (end - start) * (f(value) - f(low)) / (f(high) - f(low)), 2)

    def x_at(value):
        return at(value, x_low, x_high, LEFT, WIDTH - RIGHT, log_x)

    def y_at(value):
        return at(value, y_low, y_high, HEIGHT - BOTTOM, TOP, log_y)

    def path(points):
        return "M" + "L".join(f"{x_at(x)} {y_at(y)}" for x, y in points)

    def drawable(x, *ys):
        return all(map(math.isfinite, (x, *ys))) and (x > 0 or not log_x) and (min(ys) > 0 or not log_y)

    out = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for t in ticks(y_low, y_high, log_y):
        out.append(f'<path class="grid" d="M{LEFT} {y_at(t)}H{WIDTH - RIGHT}"/>'
                   f'<text class="soft" x="{LEFT - 6}" y="{y_at(t) + 4}" text-anchor="end">{number(t)}</text>')
    for t in ticks(x_low, x_high, log_x):
        out.append(f'<path class="grid" d="M{x_at(t)} {HEIGHT - BOTTOM}v4"/>'
                   f'<text class="soft" x="{x_at(t)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(t)}</text>')
    out += [f'<path class="guide" d="M{LEFT} {y_at(g)}H{WIDTH - RIGHT}"/>' for g in guides]
    if diagonal:
        out.append(f'<path class="guide" d="M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"/>')
    for line in lines:
        colour, points = f"var(--c{line.colour})", [n for n in range(len(line.x)) if drawable(line.x[n], line.y[n])]
        out.append(f'<g transform="translate({line.shift:g})">')
        if line.band:
            edge = [n for n in points if drawable(line.x[n], line.band[0][n], line.band[1][n])]
            around = [(line.x[n], line.band[0][n]) for n in edge] + [(line.x[n], line.band[1][n]) for n in reversed(edge)]
            out.append(f'<path class="band" fill="{colour}" d="{path(around)}Z"/>' if edge else "")
        if line.joined and len(points) > 1:
            dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
            out.append(f'<path class="line" stroke="{colour}"{dashes} d="{path((line.x[n], line.y[n]) for n in points)}"/>')
        for n in points if line.radius else ():
            where, said = f'cx="{x_at(line.x[n])}" cy="{y_at(line.y[n])}"', f"{number(line.x[n])}: {line.y[n]:.4g}"
            out.append(f'<circle {where} r="{line.radius[n]:.3g}" fill="{colour}"><title>{said}</title></circle>')
            if line.ringed and line.ringed[n]:
                out.append(f'<circle class="ring" stroke="{colour}" {where} r="{line.radius[n] + 3.5:.3g}"/>')
        out.append("</g>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="soft" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    out.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="16" text-anchor="end">{escape(y_label)}</text>')
    return svg(WIDTH, HEIGHT, "".join(out), f' role="img" aria-label="{escape(title)}"')


def svg(width, height, content, attributes=""):
    return (f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}"{attributes}>{content}</svg>')


def sheet(panels, names, notes=(), columns=3):
    """Panels side by side under one legend ({name: colour}) → a whole SVG file."""
    columns, x, y, legend = min(columns, len(panels)), 16, 20, []
    width = columns * WIDTH
    for name, colour in names.items():
        needed = 34 + 6.5 * len(name)
        if x > 16 and x + needed > width:
            x, y = 16, y + 18
        legend.append(f'<path stroke="var(--c{colour})" stroke-width="3" d="M{x} {y - 4}h16"/>'
                      f'<text x="{x + 22}" y="{y}">{escape(name)}</text>')
        x += needed
    top = y + 14
    height = top + math.ceil(len(panels) / columns) * HEIGHT + 16 * len(notes) + 8
    placed = [p.replace("<svg ", f'<svg x="{n % columns * WIDTH}" y="{top + n // columns * HEIGHT}" ', 1)
              for n, p in enumerate(panels)]
    below = [f'<text class="soft" x="16" y="{height - 16 * n - 8}">{escape(note)}</text>' for n, note in enumerate(reversed(notes))]
    paper = f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="var(--paper)"/>'
    return svg(width, height, "".join([paper, *legend, *placed, *below])) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Training


def read_run(path):
    """metrics.jsonl → {metric: values}, the steps among them; NaN where a step lacks a metric."""
    rows = read_json(path, lines=True)
    if not rows:
        raise InputError(f"{path}: holds no step; did the run end before its first one?")
    for n, row in enumerate(rows):
        field(row, "step", int, path, n)
        for name in row:
            field(row, name, (int, float), path, n)
    return {name: [row.get(name, math.nan) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def binned(steps, values):
    """→ mean step, mean, smallest and largest value of at most BINS bins; what is not finite counts nowhere."""
    real = [(s, v) for s, v in zip(steps, values) if math.isfinite(v)]
    bins = [np.array(part) for part in np.array_split(np.array(real, ndmin=2), min(BINS, len(real)))] if real else []
    return tuple([float(f(b)) for b in bins] for f in (lambda b: b[:, 0].mean(), lambda b: b[:, 1].mean(),
                                                      lambda b: b[:, 1].min(), lambda b: b[:, 1].max()))


def draw_training(paths):
    """Several metrics.jsonl → SVG: loss, rewards, log-probabilities, gradient norm and learning rate against steps."""
    paths = list(dict.fromkeys(paths))
    runs = [read_run(path) for path in paths]
    panels = []
    for title, metrics, log in TRAINING:
        lines = []
        for n, run in enumerate(runs):
            for k, metric in enumerate(metrics):
                if metric in run:
                    steps, mean, low, high = binned(run["step"], run[metric])
                    lines.append(Line(steps, mean, 1 + n % COLOURS, k == 1, (low, high)))
        if lines:
            panels.append(panel(title, lines, "step", log_y=log and any(y > 0 for line in lines for y in line.band[0])))
    return sheet(panels, {name: 1 + n % COLOURS for n, name in enumerate(short_names(paths))})


def short_names(paths):
    """The folders that the files lie in, or the whole paths where these are alike."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    return folders if len(set(folders)) == len(folders) else paths


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def read_sweep(paths):
    """metrics.json files → {split: [(variant or None for a base, learning rate, numbers), ...]}"""
    found = {}
    for path in paths:
        content = read_json(path, dict)
        if not isinstance(content.get("metrics"), dict):
            raise InputError(f"{path}: holds no metrics; eval_pope.py's metrics.json is meant")
        folders, variants = content.get("checkpoints", {}), {}
        for split, models in content["metrics"].items():
            for model, numbers in models.items():
                if model not in variants:
                    variants[model] = variant(folders[model]) if model in folders else (None, math.nan)
                found.setdefault(split, []).append((*variants[model], numbers))
    return found


def variant(folder):
    """A checkpoint's folder → name of its block's variant (--init may have brought another than --block says), learning rate."""
    path = os.path.join(folder, "config.json")
    config = read_json(path, dict)
    arguments = field(config, "arguments", dict, path, 0)
    rate = field(arguments, "learning_rate", (int, float), path, 0)
    parts, whole = ("attention", "align", "image_source"), config.get("block")
    names = {tuple((vars(BlockConfig()) | changes)[p] for p in parts): name for name, changes in VARIANTS.items()}
    without = "LoRA" if "lora" in arguments.get("tune", ()) else "head"
    return names.get(tuple(whole.get(p) for p in parts), "another block") if whole else without, float(rate)


def labels_yes(numbers):
    """The share of labels that are yes, percent, which the counts tell."""
    return 100 * (numbers["tp"] + numbers["fn"]) / sum(numbers[count] for count in ("tp", "fp", "tn", "fn"))


def leans(numbers):
    return abs(numbers["yes_ratio"] - labels_yes(numbers)) > LEANS


def draw_sweep(paths):
    """Several metrics.json → SVG: accuracy above, yes-ratio below, against learning rate; a column per split."""
    splits = read_sweep(paths)
    variants = list(dict.fromkeys(name for rows in splits.values() for name, _, _ in rows if name))
    if not variants:
        raise InputError(f"{paths[0]}: knows no trained checkpoint, so there is no learning rate to draw against")
    colours = {name: 1 + n % COLOURS for n, name in enumerate(variants)}
    panels = []
    for metric in ("accuracy", "yes_ratio"):
        for split, rows in splits.items():
            rates = [rate for name, rate, _ in rows if name]
            lines = []
            for base in dict.fromkeys(numbers[metric] for name, _, numbers in rows if not name):
                low, high = span(rates, log=True)
                lines.append(Line([low, high], [base, base], 0, dashed=True))
            for n, name in enumerate(variants):
                shift = (n - (len(variants) - 1) / 2) * min(7, 28 / len(variants))
                runs = sorted((rate, numbers[metric], leans(numbers)) for v, rate, numbers in rows if v == name)
                means = {rate: np.mean([y for r, y, _ in runs if r == rate]) for rate, _, _ in runs}
                lines.append(Line(list(means), list(means.values()), colours[name], shift=shift))
                x, y, ringed = (list(values) for values in zip(*runs))
                lines.append(Line(x, y, colours[name], radius=[3] * len(runs), ringed=ringed, joined=False, shift=shift))
            guides = [labels_yes(rows[0][2])] if metric == "yes_ratio" else []
            title = f"{split}: {metric.replace('_', ' ')}"
            panels.append(panel(title, lines, "learning rate", "%", span(rates, log=True), log_x=True, guides=guides))
    notes = ("a dot is a run, a line the runs' mean; dashed: base; dotted: the labels' yes-ratio",
             f"ring: the yes-ratio is more than {LEANS} points away from the labels': the model leans to one answer")
    return sheet(panels, {"base": 0} | colours, notes, len(splits))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="metrics.jsonl of runs, or metrics.json of evaluations")
    parser.add_argument("--output", required=True, metavar="SVG")
    args = parser.parse_args()
    kinds = {os.path.splitext(path)[1] for path in args.files}
    if kinds not in ({".jsonl"}, {".json"}):
        raise InputError(f"{', '.join(args.files)}: name either metrics.jsonl of runs or metrics.json of evaluations, not both")
    picture = (draw_training if kinds == {".jsonl"} else draw_sweep)(args.files)
    try:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(picture)
    except OSError as e:
        raise InputError(f"--output {args.output}: cannot be written ({e.strerror}); name another path")
    print(f"{args.output}: {len(args.files)} file{'s' * (len(args.files) > 1)} drawn")


if __name__ == "__main__":
    run_program(main)
