"""What the method does on the tiny world: several seeds, controls beside the effect, and collapses
shown on purpose.

    python bench/effect.py [--seeds 42 43 44] [--validation] [--jobs 3]

For every seed it makes world, tower, base and preference data anew, trains the runs below through
train.py (fp32), asks POPE through eval_pope.py, and prints mean ± half the range over the seeds as
Markdown. Settings were chosen with --validation, on other images than those of the tables in the
README. It takes about 15 minutes a seed on two cores.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from checkpoints.load import Source, load_all
from data import DESCRIBE, IMAGE, Example, PackedDataset
from model import answer
from tiny.world import hallucinated, well_formed

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Folder: (what the table calls it, flags of train.py). stage1 is the first, because stage2 starts
# from it.
RUNS = {
    "stage1": ("stage 1", "--stage 1"),
    "no_cross_attn": ("stage 1, block without cross-attention", "--stage 1 --block no_cross_attn"),
    "stage2": ("stage 2 from stage 1", "--stage 2"),
    "stage2_identity": ("stage 2 from the identity", "--stage 2 --init identity"),
    "no_nll": ("stage 1 without the NLL term", "--stage 1 --sft_weight 0"),
    "wrong_only": ("stage 1, only what the base got wrong, no NLL",
                   "--stage 1 --no-keep_correct --sft_weight 0"),
    "high_rate": ("stage 1, learning rate 3e-2, no NLL",
                  "--stage 1 --learning_rate 3e-2 --sft_weight 0"),
}
COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc", "best_threshold",
           "well_formed")
TITLES = ("accuracy", "precision", "recall", "F1", "yes ratio", "AUC", "best threshold",
          "well-formed")
MAX_NEW_TOKENS = 40


def run(*command):
    """Run a command of ours in the repository's folder and show its output. Raises if it fails."""
    subprocess.run([sys.executable, *command], check=True, cwd=HERE)


def world_of(root, validation):
    """The folder of the images that are asked about."""
    return os.path.join(root, "world", "val" if validation else ".")


def ask(folders, root, validation, asked, max_new_tokens=MAX_NEW_TOKENS):
    """POPE's numbers of checkpoints of one base → {split: {model: numbers}}, with the share of
    well-formed answers. The answers are written to the folder `asked`.
    """
    world = world_of(root, validation)
    run("eval_pope.py", *folders, "--no-bf16", "--coco_path", os.path.join(world, "coco"),
        "--pope_path", os.path.join(world, "pope"), "--output_dir", asked,
        "--max_new_tokens", str(max_new_tokens))
    with open(os.path.join(asked, "metrics.json")) as file:
        metrics = json.load(file)["metrics"]
    for split, models in metrics.items():
        for model, row in models.items():
            with open(os.path.join(asked, f"{model}_{split}.jsonl")) as file:
                answers = [json.loads(line) for line in file]
            good = [well_formed(a["question"], a["answer"]) for a in answers]
            row["well_formed"] = 100 * np.mean(good)
    return metrics


def make_base(root, seed):
    """A world, tower and base of a seed's own: the base that comes with the code is only one."""
    run("train.py", "--stage", "0", "--seed", str(seed), "--output_dir", os.path.join(root, "base"))


def one_seed(root, seed, validation):
    """Train and ask everything of one seed → {split: {folder: numbers}}."""
    make_base(root, seed)
    folders = [os.path.join(root, name) for name in RUNS]
    for folder, (_, flags) in zip(folders, RUNS.values(), strict=True):
        if not os.path.isdir(folder):
            run("train.py", *flags.split(), "--no-bf16", "--seed", str(seed),
                "--output_dir", folder)
    asked = os.path.join(root, "validation" if validation else "pope")
    return ask(folders, root, validation, asked)


def descriptions(root, validation):
    """{model: percent of the objects named in descriptions that are not in the image}."""
    with open(os.path.join(root, "world", "world.json")) as file:
        truth = json.load(file)["validation" if validation else "evaluation"]
    images = os.path.join(world_of(root, validation), "coco", "val2014")
    folders = [os.path.join(root, name) for name in ("stage1", "no_cross_attn", "stage2")]
    model = load_all(Source(folders), "cpu", None)
    conversations = [[(f"{IMAGE}\n{DESCRIBE[0]}", None)]]
    examples = [Example(os.path.join(images, name), conversations) for name in truth]
    dataset = PackedDataset(examples, model.row_format())
    result, answered = {}, dict(answer(model, dataset, MAX_NEW_TOKENS, batch_size=64))
    for n, name in enumerate(model.heads):
        said = [(answered[i][n][0][0], facts["objects"]) for i, facts in enumerate(truth.values())]
        wrong = sum(len(hallucinated(text, objects)) for text, objects in said)
        named = sum(len(hallucinated(text, [])) for text, _ in said)
        result[name] = 100 * wrong / max(1, named)
    return result


def spread(values):
    """Mean ± half the range."""
    return f"{np.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", default=os.path.join("out", "effect"))
    parser.add_argument("--validation", action="store_true", help="ask about the validation images")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    args = parser.parse_args()
    os.chdir(HERE)
    roots = [os.path.join(args.output_dir, f"seed{seed}") for seed in args.seeds]

    def of_seed(root, seed):
        return one_seed(root, seed, args.validation)

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(of_seed, roots, args.seeds))
    names = {"base": "base"} | {folder: name for folder, (name, _) in RUNS.items()}
    images = "validation" if args.validation else "evaluation"
    seeds = ", ".join(map(str, args.seeds))
    for split in results[0]:
        print(f"\n{split}, {images} images, seeds {seeds}\n")
        print(f"| model | {' | '.join(TITLES)} |")
        print("|---" * (len(TITLES) + 1) + "|")
        for model, name in names.items():
            cells = [spread([r[split][model][c] for r in results]) for c in COLUMNS]
            print(f"| {name} | {' | '.join(cells)} |")
    told = [descriptions(root, args.validation) for root in roots]
    percents = [f"{names[m]} {spread([t[m] for t in told])}" for m in told[0]]
    print("\nobjects named in descriptions that are not in the image, percent: "
          + ", ".join(percents))


if __name__ == "__main__":
    main()
