"""The tables of docs/results.md, from what effect.py has measured.

    python bench/effect_table.py [--question loss] [--least 3] [--validation]

A row stands beside the reference, trained on the same seeds: the mean and the standard deviation
over the seeds; the paired difference in adversarial accuracy with Student's 95 % interval over
seeds; and a second interval, of the same seeds with other images: in each seed the images are drawn
again with replacement (Efron's bootstrap), each with all its questions, because those about one
image are not independent.
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from bench.effect_rows import REFERENCE, ROWS, best_rates, read_results
from support.common import InputError, run_program

UNTRAINED = {"base": "base", "threshold": "base, the best threshold (fitted on validation images)",
             "class_threshold": "base, the best threshold of each class (likewise)",
             "probe": "linear probe on the tower's features"}
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)
COLUMNS = {"adversarial/accuracy": "adversarial", "popular/accuracy": "popular",
           "random/accuracy": "random", "adversarial/auc": "AUC", "adversarial/yes_ratio": "yes",
           "well_formed": "well-formed", "chair_i": "CHAIR_i", "coverage": "recall",
           "nll": "NLL"}
DRAWS = 2000


def read(output_dir, validation=False):
    """{row: {seed: line}} of the evaluation images; or of the validation images, at the best rates.
    The last line of a row and seed counts.
    """
    found, lines = {}, read_results(output_dir)
    rates = best_rates(lines) | {"base": 0}
    for line in lines:
        if line["validation"] == validation and (
                not validation or line["rate"] == rates[line["row"]]):
            found.setdefault(line["row"], {})[line["seed"]] = line
    if REFERENCE not in found:
        raise InputError(f"{output_dir}/results.jsonl: has no row {REFERENCE!r} to compare with; "
                         "python bench/effect.py makes it")
    return found


def mean_and_sd(values, digits=1):
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def paired(row, reference, column):
    """Differences to the reference, on the seeds that both have."""
    seeds = sorted(row.keys() & reference.keys())
    return np.array([row[s]["numbers"][column] - reference[s]["numbers"][column] for s in seeds])


def student_interval(differences):
    """Half the width of the 95 % interval of their mean."""
    n = len(differences)
    return STUDENT[n - 2] * np.std(differences, ddof=1) / np.sqrt(n)


def image_interval(row, reference, split="adversarial"):
    """2.5 % and 97.5 % quantiles of the mean difference in accuracy, with images drawn again."""
    rng, draws = np.random.default_rng(0), []
    seeds = sorted(row.keys() & reference.keys())
    for s in seeds:
        a, b = (np.array(list(line[s]["right"][split]), int) for line in (row, reference))
        drawn = rng.integers(len(a), size=(DRAWS, len(a)))
        draws.append(100 * (a - b)[drawn].mean(1) / 6)                  # six questions an image
    return np.quantile(np.mean(draws, 0), (0.025, 0.975))


def cells(row, reference):
    lines = list(row.values())
    values = []
    for column in COLUMNS:
        numbers = [line["numbers"][column] for line in lines if column in line["numbers"]]
        values.append(mean_and_sd(numbers, 2 if column == "nll" else 1) if numbers else "")
    difference = ""
    if row is not reference:
        of_seed = paired(row, reference, "adversarial/accuracy")
        low, high = image_interval(row, reference)
        over_seeds = f" ± {student_interval(of_seed):.1f}" if len(of_seed) > 1 else ""
        difference = f"{of_seed.mean():+.1f}{over_seeds} [{low:+.1f}, {high:+.1f}]"
    return [str(len(lines)), values[0], difference, *values[1:]]


def table(found, question, least):
    """Markdown of one question's rows that have `least` seeds, the reference last."""
    head, *rest = COLUMNS.values()
    titles = ["", "seeds", head, "difference", *rest]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    names = {name: row.title for name, row in ROWS.items()
             if row.question == question and name != REFERENCE}
    names, reference = UNTRAINED if question == "untrained" else names, found[REFERENCE]
    for name, title in (names | {REFERENCE: f"*reference: {ROWS[REFERENCE].title}*"}).items():
        if len(found.get(name, ())) >= least:
            lines.append(f"| {' | '.join([title, *cells(found[name], reference)])} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default=os.path.join("out", "effect"), help="effect.py's")
    parser.add_argument("--least", type=int, default=1, help="leave rows of fewer seeds out")
    parser.add_argument("--validation", action="store_true",
                        help="what the rates were chosen by, instead of the results")
    questions = list(dict.fromkeys(["untrained", *(row.question for row in ROWS.values())]))
    parser.add_argument("--question", choices=questions, help="default: all")
    args = parser.parse_args(argv)
    found = read(args.output_dir, args.validation)
    for question in [args.question] if args.question else questions:
        print(f"\n### {question}\n\n{table(found, question, args.least)}")


if __name__ == "__main__":
    run_program(main)
