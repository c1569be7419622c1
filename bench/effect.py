"""What the method does on the tiny world: several seeds, controls beside the effect, collapses shown on purpose.

    python bench/effect.py [--seeds 42 43 44] [--validation] [--jobs 3]

For every seed it makes world, tower, base and preference data anew, trains the runs below through train.py (fp32), asks
POPE through eval_pope.py, and prints mean ± half the range over the seeds as Markdown. Settings were chosen with
--validation, on other images than those of the tables in the README. About 15 minutes a seed on two cores.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import shapes
from data import PackedDataset
from eval_pope import load_all
from model import answer
from readers import DESCRIBE, IMAGE, Example

RUNS = {  # folder: (what the table calls it, flags of train.py); stage1 first, the others start from its world and base
    "stage1": ("stage 1", "--stage 1"),
    "no_cross_attn": ("stage 1, block without cross-attention", "--stage 1 --block no_cross_attn"),
    "stage2": ("stage 2 from stage 1", "--stage 2"),
    "stage2_identity": ("stage 2 from the identity", "--stage 2 --init identity"),
    "no_nll": ("stage 1 without the NLL term", "--stage 1 --sft_weight 0"),
    "wrong_only": ("stage 1, only what the base got wrong, no NLL", "--stage 1 --no-keep_correct --sft_weight 0"),
    "high_rate": ("stage 1, learning rate 3e-2, no NLL", "--stage 1 --learning_rate 3e-2 --sft_weight 0"),
}
COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc", "best_threshold", "well_formed")


def run(*command):
    """A command of ours in this folder, its output passed through; its failure is ours."""
    subprocess.run([sys.executable, *command], check=True, cwd=HERE)


def ask(folders, root, validation, asked, max_new_tokens=40):
    """POPE's numbers of checkpoints of one base → {split: {model: numbers}}, the share of well-formed answers added."""
    world = os.path.join(root, "world", "val" if validation else ".")
    run("eval_pope.py", *folders, "--no-bf16", "--coco_path", os.path.join(world, "coco"),
        "--pope_path", os.path.join(world, "pope"), "--output_dir", asked, "--max_new_tokens", str(max_new_tokens))
    with open(os.path.join(asked, "metrics.json")) as file:
        metrics = json.load(file)["metrics"]
    for split, models in metrics.items():
        for model, row in models.items():
            with open(os.path.join(asked, f"{model}_{split}.jsonl")) as file:
                answers = [json.loads(line) for line in file]
            row["well_formed"] = 100 * np.mean([shapes.well_formed(a["question"], a["answer"]) for a in answers])
    return metrics


def one_seed(root, seed, validation):
    """Train and ask everything of one seed → {split: {folder: numbers}}."""
    folders = [os.path.join(root, name) for name in RUNS]
    for folder, (_, flags) in zip(folders, RUNS.values()):
        if not os.path.isdir(folder):
            run("train.py", *flags.split(), "--no-bf16", "--seed", str(seed), "--output_dir", folder)
    return ask(folders, root, validation, os.path.join(root, "validation" if validation else "pope"))


def descriptions(root, validation):
    """{model: percent of the objects named in descriptions that are not in the image}."""
    with open(os.path.join(root, "world", "world.json")) as file:
        truth = json.load(file)["validation" if validation else "evaluation"]
    images = os.path.join(root, "world", "val" if validation else ".", "coco", "val2014")
    args = argparse.Namespace(checkpoints=[os.path.join(root, name) for name in ("stage1", "no_cross_attn", "stage2")],
                              model_name_or_path=None, vision_tower=None)
    trunk, heads, tokenizer, preprocess = load_all(args, "cpu", None)
    dataset = PackedDataset([Example(os.path.join(images, name), [[(f"{IMAGE}\n{DESCRIBE[0]}", None)]]) for name in truth],
                            tokenizer, preprocess, trunk.config.vision.num_patches, trunk.config.max_length)
    result = {}
    for model, answers in zip(heads, answer(trunk, list(heads.values()), dataset, 40, batch_size=64)):
        said = [(answers[i][0][0], facts["objects"]) for i, facts in enumerate(truth.values())]
        wrong = sum(len(shapes.hallucinated(text, objects)) for text, objects in said)
        result[model] = 100 * wrong / max(1, sum(len(shapes.hallucinated(text, [])) for text, _ in said))
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
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda root, seed: one_seed(root, seed, args.validation), roots, args.seeds))
    names = {"base": "base"} | {folder: name for folder, (name, _) in RUNS.items()}
    for split in results[0]:
        print(f"\n{split}, {'validation' if args.validation else 'evaluation'} images, seeds {', '.join(map(str, args.seeds))}\n")
        print("| model | accuracy | precision | recall | F1 | yes ratio | AUC | best threshold | well-formed |")
        print("|---|---|---|---|---|---|---|---|---|")
        for model, name in names.items():
            print(f"| {name} | " + " | ".join(spread([r[split][model][c] for r in results]) for c in COLUMNS) + " |")
    told = [descriptions(root, args.validation) for root in roots]
    print("\nobjects named in descriptions that are not in the image, percent: "
          + ", ".join(f"{names[m]} {spread([t[m] for t in told])}" for m in told[0]))


if __name__ == "__main__":
    main()
