"""What the method does on the tiny world: several seeds, controls beside the effect, collapses shown on purpose.

    python bench/effect.py [--seeds 42 43 44] [--validation]

For every seed it makes world, tower, base and preference data anew, trains the runs below through train.py, asks POPE
through eval_pope.py, and prints mean ± half the range over the seeds as Markdown. Settings were chosen with --validation
(other images); the tables in the README are without it. About 10 minutes a seed on two cores.
"""
import argparse
import json
import os
import subprocess
import sys

import numpy as np

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import shapes

RUNS = {  # name: flags of train.py
    "stage 1": "--stage 1",
    "stage 1, block without cross-attention": "--stage 1 --block no_cross_attn",
    "stage 2 from stage 1": "--stage 2",
    "stage 2 from the identity": "--stage 2 --init identity",
    "stage 1, wrong answers only, no NLL (HA-DPO's reading)": "--stage 1 --no-keep_correct --sft_weight 0",
    "stage 1, learning rate 3e-2, no NLL": "--stage 1 --learning_rate 3e-2 --sft_weight 0",
}
SPLITS = ("random", "popular", "adversarial")


def folder_of(root, name, flags):
    """stage1 keeps its default name, so that stage 2 finds it there."""
    return os.path.join(root, "stage1" if flags == "--stage 1" else name.replace(" ", "-").replace(",", "").replace("'", ""))


def run(*command):
    """A command of ours in this folder, its output passed through; its failure is ours."""
    subprocess.run([sys.executable, *command], check=True, cwd=HERE)


def one_seed(root, seed, runs, validation):
    """Train and ask everything of one seed → {split: {model: numbers}} with the share of well-formed answers added."""
    for name, flags in runs.items():
        folder = folder_of(root, name, flags)
        if not os.path.isdir(folder):
            run("train.py", *flags.split(), "--seed", str(seed), "--output_dir", folder)
    folders = {folder_of(root, name, flags): name for name, flags in runs.items()}
    names = {os.path.basename(folder): name for folder, name in folders.items()}
    world = os.path.join(root, "world", "val" if validation else "")
    asked = os.path.join(root, "pope-validation" if validation else "pope")
    run("eval_pope.py", *folders, "--coco_path", os.path.join(world, "coco"), "--pope_path", os.path.join(world, "pope"),
        "--output_dir", asked, "--max_new_tokens", "40")
    with open(os.path.join(asked, "metrics.json")) as file:
        metrics = json.load(file)["metrics"]
    for split, models in metrics.items():
        for model, row in models.items():
            with open(os.path.join(asked, f"{model}_{split}.jsonl")) as file:
                answers = [json.loads(line) for line in file]
            row["well_formed"] = 100 * np.mean([shapes.well_formed(a["question"], a["answer"]) for a in answers])
        metrics[split] = {names.get(model, model): row for model, row in models.items()}
    return metrics


def spread(values):
    """Mean ± half the range."""
    return f"{np.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", default=os.path.join(HERE, "out", "effect"))
    parser.add_argument("--validation", action="store_true", help="ask about the validation images")
    parser.add_argument("--only", nargs="+", help="words that a run's name must contain")
    args = parser.parse_args()
    runs = {n: f for n, f in RUNS.items() if not args.only or n == "stage 1" or any(word in n for word in args.only)}
    results = [one_seed(os.path.join(args.output_dir, f"seed{seed}"), seed, runs, args.validation) for seed in args.seeds]
    for split in SPLITS:
        print(f"\n{split}, seeds {', '.join(map(str, args.seeds))}\n")
        print("| model | accuracy | precision | recall | F1 | yes ratio | AUC | best threshold | well-formed |")
        print("|---|---|---|---|---|---|---|---|---|")
        for model in results[0][split]:
            cells = [spread([r[split][model][c] for r in results]) for c in
                     ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc", "best_threshold", "well_formed")]
            print(f"| {model} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
