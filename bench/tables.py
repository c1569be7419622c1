"""The training notes' tables, made again on the tiny world, one command each: what happens over a range of learning rates?

    python bench/tables.py variants      # the block, its ablations, and lm_head alone
    python bench/tables.py lora          # HA-DPO itself: LoRA on the whole decoder
    python bench/tables.py sft           # the block, trained on LLaVA's conversations instead of pairs
        [--seeds 42 43 44] [--jobs 3] [--validation] [--output_dir out/effect] [flags of train.py]

A table is a sweep by train.py in fp32, POPE asked by eval_pope.py, mean ± half the range over the seeds. Each seed has a world,
tower, base and preference data of its own; those of bench/effect.py are found again. Written are OUTPUT_DIR/variants.md and
variants.svg, or what else the table is called. What train.py is told beside the table's own flags comes last, and so wins.

Trained as published, so that the tables can be laid beside the notes': one epoch, only what the base got wrong, DPO without
the NLL term. (The tiny world's own defaults, six epochs over all questions with it, are the subject of effect.py.) The
learning rates were chosen with --validation, on one seed and other images, to span too low, right and too high: the variants' are
about 100 times the notes', LoRA's 10 to 100 times HA-DPO's. SFT's span a factor of 100 and find none that is right.
"""
import argparse
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from effect import COLUMNS, HERE, ask, run, spread      # which also puts the project's folder on the path
from eval_pope import COLUMNS as TITLES
from plots import draw_sweep
from readers import run_program
from train import combinations, parse

PUBLISHED = "--no-keep_correct --sft_weight 0 --num_train_epochs 1"
TABLES = {  # table: {beginning of the runs' folders: flags of train.py}; a command of train.py each
    "variants": {
        "variants": f"--stage 1 {PUBLISHED} --block full,align_linear,align_after_align,self_attn,no_cross_attn,no_cross_attn_v2 "
                    "--learning_rate 2e-5 5e-5 1e-4 2e-4 1e-3",
        "variants-head": f"--tune lm_head {PUBLISHED} --learning_rate 2e-5 5e-5 1e-4 2e-4 1e-3"},
    "lora": {"lora": f"--lora_r 16 --lora_alpha 32 {PUBLISHED} --learning_rate 2e-5 5e-5 1e-4 2e-4"},
    "sft": {"sft": "--tune post_decoder --loss sft --num_train_epochs 1 --learning_rate 5e-5 2e-4 5e-4 5e-3"}}
NOTES = {"full": "post interaction", "align_linear": "align MLP → linear", "align_after_align": "MLP after MLP",
         "self_attn": "TransformerBlock", "no_cross_attn": "no cross-attention", "no_cross_attn_v2": "no cross-attention v2"}


def one_seed(table, root, seed, validation, more):
    """Train and ask everything of one seed → {split: {(what was trained, learning rate): numbers}}, metrics.json files."""
    runs = {}
    for name, flags in TABLES[table].items():
        command = [*flags.split(), "--no-bf16", "--seed", str(seed), "--output_dir", os.path.join(root, name), *more]
        run("train.py", *command, "--resume")           # what is finished is left as it is
        runs |= {run.output_dir: run for run in combinations(parse(command))}
    lora, asked = table == "lora", os.path.join(root, ("validation-" if validation else "pope-") + table)
    # Checkpoints of one base are asked together; an adapter changes the base, so that it is asked alone.
    groups = [[os.path.join(root, "base")], *([folder] for folder in runs)] if lora else [list(runs)]
    folders = [os.path.join(asked, str(n)) for n in range(len(groups))] if lora else [asked]
    found = defaultdict(dict)
    for group, folder in zip(groups, folders):
        for split, models in ask(group, root, validation, folder, 12).items():
            for model, numbers in models.items():
                of = runs.get(group[0] if model == "adapter" else os.path.join(root, model))
                found[split]["base" if of is None else (called(of), of.learning_rate)] = numbers
    return found, [os.path.join(folder, "metrics.json") for folder in folders]


def called(run):
    """What the notes call what a run has trained."""
    if "lora" in run.tune:
        return f"LoRA r {run.lora_r}"
    return NOTES[run.block] if "post_decoder" in run.tune else "head"


def markdown(results):
    """Results of several seeds → a table per split, the base and its best threshold first."""
    titles = TITLES | {"well_formed": "well-formed"}
    columns, lines = [c for c in COLUMNS if c != "best_threshold"], []
    for split in results[0]:
        lines += [f"\n{split}\n", f"| trained | learning rate | {' | '.join(titles[c] for c in columns)} |",
                  "|---" * (len(columns) + 2) + "|"]
        for key in results[0][split]:
            trained, rate = ("base", "–") if key == "base" else (key[0], f"{key[1]:g}")
            cells = [trained, rate, *(spread([r[split][key][c] for r in results]) for c in columns)]
            lines.append(f"| {' | '.join(cells)} |")
            if key == "base":
                best = spread([r[split][key]["best_threshold"] for r in results])
                lines.append(f"| base with its best single threshold (control) | – | {best}" + " |" * len(columns))
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", default=os.path.join("out", "effect"), help="whose worlds and bases are found again")
    parser.add_argument("--validation", action="store_true", help="ask about the validation images")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    args, more = parser.parse_known_args(argv)
    output_dir = os.path.abspath(args.output_dir)
    os.chdir(HERE)
    roots = [os.path.join(output_dir, f"seed{seed}") for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda root, seed: one_seed(args.table, root, seed, args.validation, more), roots, args.seeds)
        results, files = zip(*done)
    images = "validation" if args.validation else "evaluation"
    text = f"{args.table}, {images} images, seeds {', '.join(map(str, args.seeds))}\n" + markdown(results)
    written = [os.path.join(output_dir, f"{args.table}{'-validation' * args.validation}.{kind}") for kind in ("md", "svg")]
    for path, content in zip(written, (text, draw_sweep([path for paths in files for path in paths]))):
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    print(text + "\nwritten: " + ", ".join(os.path.relpath(path) for path in written))


if __name__ == "__main__":
    run_program(main)
