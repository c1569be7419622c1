"""Runs and sweeps at a glance, as SVG.

    python -m tools.plots out/*/metrics.jsonl --output training.svg       # the steps of all runs
    python -m tools.plots out/*/pope/metrics.json --output sweep.svg      # POPE over the rates

A `metrics.jsonl` is what train.py writes, one line per optimizer step (training/picture.py draws
it). A `metrics.json` is what eval_pope.py writes; the variant and the learning rate of each model
in it stand in the `config.json` of its checkpoint. Each run of a sweep has its dot, and the line
goes through the mean of the runs with the same variant and learning rate (they differ in the seed).
A dot has a ring where the yes-ratio is more than 10 points away from the labels': such a model has
learnt to give one answer, which a high learning rate does.
"""
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import numpy as np

from eval_pope import LEANS, labelled_yes, leans
from post_decoder import VARIANTS, BlockConfig
from support.charts import COLOURS, Axis, Line, panel, sheet, span
from support.command_line import Parser
from support.common import InputError, check_file, field, read_json, run_program
from support.outputs import check_output_file, write_text
from training.picture import draw_training


def read_sweep(paths):
    """metrics.json files → {split: [(variant or None for a base, learning rate, numbers), ...]}"""
    found = {}
    for path in paths:
        content = read_json(path, dict)
        if not isinstance(content.get("metrics"), dict):
            raise InputError(f"{path}: holds no metrics; name a metrics.json of eval_pope.py")
        folders, variants = content.get("checkpoints", {}), {}
        for split, models in content["metrics"].items():
            for model, numbers in models.items():
                if model not in variants:
                    known = model in folders
                    variants[model] = variant(folders[model]) if known else (None, math.nan)
                found.setdefault(split, []).append((*variants[model], numbers))
    return found


def variant(folder):
    """A checkpoint's folder → name of its block's variant, learning rate.

    The block itself decides, not the flag --block: --init may have brought another block.
    """
    path = os.path.join(folder, "config.json")
    config = read_json(path, dict)
    arguments = field(config, "arguments", dict, path, 0)
    rate = float(field(arguments, "learning_rate", (int, float), path, 0))
    block = config.get("block")
    if not block:
        return "LoRA" if "lora" in arguments.get("tune", ()) else "head", rate
    parts = "attention", "align", "image_source"
    for name, changes in VARIANTS.items():
        settings = vars(BlockConfig()) | changes
        if all(settings[part] == block.get(part) for part in parts):
            return name, rate
    return "another block", rate


def sweep_lines(rows, metric, colours):
    """Lines and dots of one split.

    `rows`: [(variant, learning rate, numbers), ...]; `colours`: {variant: colour}. The variants
    stand a few pixels apart, so that equal numbers do not hide each other.
    """
    low, high = span([rate for name, rate, _ in rows if name], log=True)
    lines = [Line([low, high], [value, value], 0, dashed=True)
             for value in dict.fromkeys(numbers[metric] for name, _, numbers in rows if not name)]
    for n, name in enumerate(colours):
        shift = (n - (len(colours) - 1) / 2) * min(7, 28 / len(colours))
        runs = sorted((rate, numbers[metric], leans(numbers))
                      for other, rate, numbers in rows if other == name)
        means = {rate: np.mean([y for r, y, _ in runs if r == rate]) for rate, _, _ in runs}
        x, y, ringed = (list(values) for values in zip(*runs, strict=True))
        dots = Line(x, y, colours[name], radius=[3] * len(runs), ringed=ringed, joined=False,
                    shift=shift)
        lines += [Line(list(means), list(means.values()), colours[name], shift=shift), dots]
    return lines


def draw_sweep(paths):
    """Several metrics.json → SVG: accuracy above, yes-ratio below, against learning rate.

    Each split is a column. InputError where no trained checkpoint is among them.
    """
    splits = read_sweep(paths)
    variants = dict.fromkeys(name for rows in splits.values() for name, _, _ in rows if name)
    if not variants:
        raise InputError(f"{paths[0]}: knows no trained checkpoint, so there is no learning rate "
                         "to draw against")
    colours = {name: 1 + n % COLOURS for n, name in enumerate(variants)}
    panels = []
    for metric in ("accuracy", "yes_ratio"):
        for split, rows in splits.items():
            rates = span([rate for name, rate, _ in rows if name], log=True)
            guides = [labelled_yes(rows[0][2])] if metric == "yes_ratio" else []
            panels.append(panel(f"{split}: {metric.replace('_', ' ')}",
                                sweep_lines(rows, metric, colours),
                                Axis("learning rate", rates, log=True), Axis("%"), guides))
    notes = ("a dot is a run, a line the runs' mean; dashed: base; dotted: the labels' yes-ratio",
             f"ring: the yes-ratio is more than {LEANS} points away from the labels': "
             "the model leans to one answer")
    return sheet(panels, {"base": 0} | colours, notes, len(splits))


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="metrics.jsonl of runs, or metrics.json of evaluations")
    parser.add_argument("--output", required=True, metavar="SVG", help="the file to write")
    args = parser.parse_args()
    for path in args.files:
        check_file(path)
    others = [path for path in args.files if not path.endswith((".jsonl", ".json"))]
    if others:
        raise InputError(f"{others[0]}: is neither metrics.jsonl of a run nor metrics.json of an "
                         "evaluation")
    endings = {os.path.splitext(path)[1] for path in args.files}
    if len(endings) > 1:
        raise InputError(f"{', '.join(args.files)}: name either metrics.jsonl of runs or "
                         "metrics.json of evaluations, not both")
    if not args.output.endswith(".svg"):
        raise InputError(f"--output {args.output}: an SVG is written; name a file that ends with "
                         ".svg")
    check_output_file(args.output, "--output")
    draw = draw_training if endings == {".jsonl"} else draw_sweep
    write_text(args.output, draw(args.files))
    print(f"{args.output}: {len(args.files)} file{'s' * (len(args.files) > 1)} drawn")


if __name__ == "__main__":
    run_program(main)
