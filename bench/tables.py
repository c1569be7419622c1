"""The training notes' tables, made again on the tiny world, one command each: what happens over a
range of learning rates?

    python bench/tables.py variants      # the block, its ablations, and lm_head alone
    python bench/tables.py lora          # HA-DPO itself: LoRA on the whole decoder
    python bench/tables.py sft           # the block, trained on LLaVA's conversations, not on pairs
        [--seeds 42 43 44] [--jobs 3] [--validation] [--output_dir out/effect] [flags of train.py]

A table is a sweep by train.py in fp32. eval_pope.py asks POPE, and the table shows mean ± half the
range over the seeds. Each seed has a world, tower, base and preference data of its own; those of
bench/effect.py are found again. The table is written to OUTPUT_DIR/variants.md, its picture to
variants.svg (or whatever the table is called). Flags of train.py on the command line come behind
the table's own flags, and so they win.

The runs are trained as published, so that the tables can be laid beside the notes': one epoch, only
what the base got wrong, DPO without the NLL term. (effect.py tests the tiny world's own defaults:
six epochs over all questions, with that term.) The learning rates were chosen with --validation, on
one seed and other images, to span too low, right and too high. The variants' rates are about 100
times the notes', LoRA's 10 to 100 times HA-DPO's. SFT's span a factor of 100, and none is right.
"""
import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval_pope import COLUMNS as TITLES
from support.common import run_program
from tiny.world import well_formed
from tools.plots import draw_sweep
from training.flags import combinations, parse_flags

PUBLISHED = "--no-keep_correct --sft_weight 0 --num_train_epochs 1"
BLOCKS = "full,align_linear,align_after_align,self_attn,no_cross_attn,no_cross_attn_v2"
RATES = "--learning_rate 2e-5 5e-5 1e-4 2e-4"
# Table: {beginning of the runs' folders: flags of train.py}, one command of train.py each.
TABLES = {
    "variants": {"variants": f"--stage 1 {PUBLISHED} --block {BLOCKS} {RATES} 1e-3",
                 "variants-head": f"--tune lm_head {PUBLISHED} {RATES} 1e-3"},
    "lora": {"lora": f"--lora_r 16 --lora_alpha 32 {PUBLISHED} {RATES}"},
    "sft": {"sft": "--tune post_decoder --loss sft --num_train_epochs 1 "
                   "--data_path {root}/world/llava/train.json --image_folder "
                   "{root}/world/llava/images --learning_rate 5e-5 2e-4 5e-4 5e-3"}}
NOTES = {"full": "post interaction", "align_linear": "align MLP → linear",
         "align_after_align": "MLP after MLP", "self_attn": "TransformerBlock",
         "no_cross_attn": "no cross-attention", "no_cross_attn_v2": "no cross-attention v2"}
CONTROL = "base with its best single threshold (control)"
MAX_NEW_TOKENS = 12
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc", "best_threshold",
           "well_formed")


def run(*command):
    """Run a command of ours in the repository's folder and show its output. Raises if it fails."""
    subprocess.run([sys.executable, *command], check=True, cwd=HERE)


def world_of(root, validation):
    """The folder of the images that are asked about."""
    return os.path.join(root, "world", "val" if validation else ".")


def ask(folders, root, validation, asked):
    """POPE's numbers of checkpoints of one base → {split: {model: numbers}}, with the share of
    well-formed answers. The answers are written to the folder `asked`.
    """
    world = world_of(root, validation)
    run("eval_pope.py", *folders, "--no-bf16", "--coco_path", os.path.join(world, "coco"),
        "--pope_path", os.path.join(world, "pope"), "--output_dir", asked,
        "--max_new_tokens", str(MAX_NEW_TOKENS))
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


def one_seed(table, root, seed, validation, more):
    """Train and ask everything of one seed → {split: {(what was trained, learning rate): numbers}},
    metrics.json files.
    """
    runs = {}
    make_base(root, seed)
    for name, flags in TABLES[table].items():
        command = [*flags.format(root=root).split(), "--no-bf16", "--seed", str(seed),
                   "--output_dir", os.path.join(root, name), *more]
        run("train.py", *command, "--resume")           # what is finished is left as it is
        runs |= {one.output_dir: one for one in combinations(parse_flags(command))}
    asked = os.path.join(root, ("validation-" if validation else "pope-") + table)
    # Checkpoints of one base are asked together. An adapter changes the base, so it is asked alone.
    groups = {asked: list(runs)}
    if table == "lora":
        alone = [os.path.join(root, "base"), *runs]
        groups = {os.path.join(asked, str(n)): [folder] for n, folder in enumerate(alone)}
    found = defaultdict(dict)
    for folder, group in groups.items():
        results = ask(group, root, validation, folder)
        for split, models in results.items():
            for model, numbers in models.items():
                path = group[0] if model == "adapter" else os.path.join(root, model)
                found[split][key_of(runs.get(path))] = numbers
    return found, [os.path.join(folder, "metrics.json") for folder in groups]


def key_of(run):
    """What the notes call what a run has trained, and its learning rate; "base" without a run."""
    if run is None:
        return "base"
    if "lora" in run.tune:
        return f"LoRA r {run.lora_r}", run.learning_rate
    trained = NOTES[run.block] if "post_decoder" in run.tune else "head"
    return trained, run.learning_rate


def spread(values):
    """Mean ± half the range."""
    return f"{np.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def markdown(results):
    """Results of several seeds → a table per split, the base and its best threshold first."""
    titles = TITLES | {"well_formed": "well-formed"}
    columns, lines = [c for c in COLUMNS if c != "best_threshold"], []
    for split in results[0]:
        head = " | ".join(titles[c] for c in columns)
        lines += [f"\n{split}\n", f"| trained | learning rate | {head} |",
                  "|---" * (len(columns) + 2) + "|"]
        for key in results[0][split]:
            trained, rate = ("base", "–") if key == "base" else (key[0], f"{key[1]:g}")
            cells = [spread([r[split][key][c] for r in results]) for c in columns]
            lines.append(f"| {' | '.join([trained, rate, *cells])} |")
            if key == "base":
                best = spread([r[split][key]["best_threshold"] for r in results])
                lines.append(f"| {CONTROL} | – | {best}" + " |" * len(columns))
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", default=os.path.join("out", "effect"),
                        help="worlds and bases that are there are used again")
    parser.add_argument("--validation", action="store_true", help="ask about the validation images")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    args, more = parser.parse_known_args(argv)
    output_dir = os.path.abspath(args.output_dir)
    os.chdir(HERE)
    roots = [os.path.join(output_dir, f"seed{seed}") for seed in args.seeds]

    def of_seed(root, seed):
        return one_seed(args.table, root, seed, args.validation, more)

    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(of_seed, roots, args.seeds))
    results, files = [found for found, _ in done], [path for _, paths in done for path in paths]
    images = "validation" if args.validation else "evaluation"
    text = f"{args.table}, {images} images, seeds {', '.join(map(str, args.seeds))}\n"
    text += markdown(results)
    name = os.path.join(output_dir, f"{args.table}-validation" if args.validation else args.table)
    contents = {f"{name}.md": text, f"{name}.svg": draw_sweep(files)}
    for path, content in contents.items():
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    print(f"{text}\nwritten: {', '.join(os.path.relpath(path) for path in contents)}")


if __name__ == "__main__":
    run_program(main)
