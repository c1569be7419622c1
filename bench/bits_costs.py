"""What fewer bits cost: POPE and CHAIR of the tiny world at 16, 8 and 4 bits, on several seeds.

    python bench/bits_costs.py SEED… [--checkpoint stage2] [--bits 16 8 4] [--output results.jsonl]

Each SEED is a folder as `train.py --output_dir SEED/stage2 --seed N` leaves it: `base`, a
checkpoint that was trained on it in 16 bits (or more), and `world`, which is drawn anew from the
base's seed where it is missing. Base and checkpoint are asked with the same trunk, so that their
difference has no part of its rounding. "16 bits" are the files' own, fp32 on a CPU.

The table gives means over the seeds, and the paired difference to 16 bits with Student's 95 %
interval over seeds. What was measured is kept in --output and not measured again.
"""
import argparse
import os
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval_pope
from bench.effect_table import paired, student_interval
from bench.measuring import add_rows, read_rows
from checkpoints.quantised import BITS
from evals import chair
from support.common import read_json, run_program
from tiny.places import draw_world
from tiny.world import Sizes

COLUMNS = {"adversarial": "adversarial", "popular": "popular", "random": "random",
           "yes_ratio": "yes (adversarial)", "chair_i": "CHAIR_i", "chair_s": "CHAIR_s",
           "recall": "recall"}


def measured(folder, checkpoint, bits):
    """{model: {column: number}} of the base and the checkpoint of a seed's folder."""
    base, world = os.path.join(folder, "base"), os.path.join(folder, "world")
    seed = read_json(os.path.join(base, "config.json"), dict)["arguments"]["seed"]
    draw_world(world, seed, Sizes(), supervised=False)
    with tempfile.TemporaryDirectory() as output:
        typed = [os.path.join(folder, checkpoint), "--model_name_or_path", base, "--bits",
                 str(bits), "--output_dir", output]
        asked = eval_pope.evaluate(eval_pope.flags(eval_pope.__doc__).parse_args(typed))
        asked.journal.remove()
        described = chair.evaluate(chair.parser().parse_args(typed))
    found = {}
    for name, texts in described.items():
        of_chair = chair.measure(texts)
        found["base" if name == "base" else "checkpoint"] = {
            **{split: numbers[name]["accuracy"] for split, numbers in asked.metrics.items()},
            "yes_ratio": asked.metrics["adversarial"][name]["yes_ratio"],
            **{column: of_chair[column] for column in ("chair_i", "chair_s", "recall")}}
    return found


def table(rows):
    """Rows of the results → Markdown: a line for each model and number of bits."""
    by_line = {}
    for row in rows:
        line = by_line.setdefault((row["model"], row["bits"]), {})
        line[row["seed"]] = row
    text = [f"| model | bits | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (model, bits), found in sorted(by_line.items(), key=lambda item: (item[0][0], -item[0][1])):
        cells = []
        for column in COLUMNS:
            mean = np.mean([row["numbers"][column] for row in found.values()])
            changes = paired(found, by_line.get((model, 16), {}), column)
            if bits == 16 or len(changes) < 2:
                cells.append(f"{mean:.1f}")
            else:
                half = student_interval(changes)
                cells.append(f"{mean:.1f} ({changes.mean():+.1f} ± {half:.1f})")
        text.append(f"| {model} | {bits} | {' | '.join(cells)} |")
    return "\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="SEED")
    parser.add_argument("--checkpoint", default="stage2", help="the checkpoint's name in each SEED")
    parser.add_argument("--bits", type=int, choices=BITS, nargs="+", default=[16, 8, 4])
    parser.add_argument("--output", help="JSON lines, each appended as soon as it is measured")
    args = parser.parse_args(argv)
    rows = read_rows(args.output) if args.output else []
    for folder in args.folders:
        for bits in args.bits:
            seed = os.path.basename(folder.rstrip("/"))
            if any(row["seed"] == seed and row["bits"] == bits for row in rows):
                continue
            for model, numbers in measured(folder, args.checkpoint, bits).items():
                rows.append({"seed": seed, "bits": bits, "model": model, "numbers": numbers})
                if args.output:
                    add_rows(args.output, rows[-1:])
    print("\n" + table(rows))


if __name__ == "__main__":
    run_program(main)
