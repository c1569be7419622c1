"""VoCo-LLaMA on the tiny world: an image in 1, 2, 4 or 8 tokens beside all of its 36.

    python bench/bench_voco.py --jobs 16                    # 20 models; then the table
    python bench/bench_voco.py --tokens 1 36 --seeds 46

Each seed has its own world, tower and base. From this base stage 0 trains each model on, with the
same conversations for --steps: with all tokens of the image, or with --voco N. A model with <voco>
tokens is asked in two passes (training/compressed.py): POPE's questions and CHAIR's descriptions,
of which none sees the image.

Each model appends a line to --output_dir/results.jsonl, and what stands there is not made again, so
an interrupted experiment goes on. --jobs processes work at the same time, each on one core and,
where there are GPUs, on one of them. Then, with nothing else running, the models of the first seed
are timed.

Follows arXiv 2406.12275. "kept" here is the part of what the whole image gives above chance (50 %),
in POPE's accuracy over its three sets; the paper's retention has another lower bound.
"""
import argparse
import os
import shutil
import sys
import time
import traceback
from concurrent.futures import as_completed

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

import train
from bench.effect import SMALL, SMALL_STEPS, workers
from bench.effect_asked import asked, judge, load, questions_of
from bench.effect_rows import read_results
from bench.effect_table import mean_and_sd
from bench.measuring import add_rows
from support.common import InputError, progress, run_program
from tiny.places import draw_world
from tiny.prepare import TINY_LLAVA, prepare_tiny_world
from tiny.world import Sizes
from training.engine import start_deepspeed
from training.flags import parse_flags

IMAGE = TINY_LLAVA.vision.num_patches           # tokens of an image that is not compressed
TOKENS = (IMAGE, 8, 4, 2, 1)
SEEDS = (46, 47, 48, 49)
STEPS, RATE = 1000, 2e-3        # two epochs of 16,000 conversations, 32 at once, as the base before
SETS = "random", "popular", "adversarial"
COLUMNS = {"random/accuracy": "random", "popular/accuracy": "popular",
           "adversarial/accuracy": "adversarial", "adversarial/f1": "F1", "adversarial/auc": "AUC",
           "adversarial/yes_ratio": "yes", "chair_i": "CHAIR_i", "coverage": "recall", "nll": "NLL"}
TIMES = {"one_pass": "POPE in one pass", "first_pass": "compressing",
         "second_pass": "POPE without images"}


# ---- One model -----------------------------------------------------------------------------------


def flags_of(root, seed, tokens, steps):
    """train.py's flags for one model."""
    voco = [] if tokens == IMAGE else ["--voco", str(tokens)]
    return ["--stage", "0", *voco, "--model_name_or_path", os.path.join(root, "base"),
            "--data_path", os.path.join(root, "world", "llava", "train.json"),
            "--image_folder", os.path.join(root, "world", "llava", "images"),
            "--learning_rate", str(RATE), "--max_steps", str(steps), "--seed", str(seed),
            "--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "1",
            "--no-bf16", "--dataloader_num_workers", "0",
            "--output_dir", model_folder(root, tokens)]


def model_folder(root, tokens):
    return os.path.join(root, f"tokens{tokens}")


def make_base(root, seed, small):
    """The seed's world and base. Nothing is asked of the base: no preference pairs are needed."""
    args = parse_flags(["--stage", "0", "--voco", "1", "--seed", str(seed),
                        *(SMALL if small else ()), "--output_dir", model_folder(root, 1)])
    _, device = start_deepspeed()
    draw_world(os.path.join(root, "world"), seed, Sizes(**args.tiny_sizes), True)
    prepare_tiny_world(args, train.train, device)       # what stage 0 with --voco starts from


def make(args, seed, tokens):
    """Train a model and ask it → its line in results.jsonl; None where it failed, as the log
    tells.
    """
    root = os.path.join(args.output_dir, f"seed{seed}")
    checkpoint = model_folder(root, tokens)
    try:
        if not os.path.isdir(checkpoint):
            steps = SMALL_STEPS if args.small else args.steps
            train.train(parse_flags(flags_of(root, seed, tokens, steps)))
        compressed = None if tokens == IMAGE else f"{checkpoint}-compressed"
        line = judge(root, checkpoint, False, compressed)
    except Exception:           # one model must not end the others
        traceback.print_exc()
        return None
    line = {"tokens": tokens, "seed": seed, "steps": args.steps, **line}
    add_rows(os.path.join(args.output_dir, "results.jsonl"), [line])
    return line


def time_model(args, seed, tokens):
    """Seconds that all of POPE's questions take, image files and all, when nothing else runs."""
    root = os.path.join(args.output_dir, f"seed{seed}")
    model, (questions, folder, _) = load(model_folder(root, tokens)), questions_of(root, False)
    kept, few = f"{model_folder(root, tokens)}-timed", {"few": questions["random"][:192]}
    passes = {"one_pass": lambda: asked(model, questions, folder)}
    asked(model, few, folder)                                                       # warm-up
    if tokens != IMAGE:
        asked(model, few, folder, kept)
        shutil.rmtree(kept)
        # What compresses and asks, less what only asks.
        passes["first_pass"] = passes["second_pass"] = lambda: asked(model, questions, folder, kept)
    seconds = {}
    for name, run in passes.items():
        start = time.perf_counter()
        run()                                               # its answers are on the CPU in the end
        seconds[name] = time.perf_counter() - start
    if tokens != IMAGE:
        seconds["first_pass"] -= seconds["second_pass"]
    shutil.rmtree(kept, ignore_errors=True)
    line = {"tokens": tokens, "seed": seed, "seconds": seconds, "on": where()}
    add_rows(os.path.join(args.output_dir, "results.jsonl"), [line])
    return line


def where():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core"


# ---- The table -----------------------------------------------------------------------------------


def accuracy(line):
    """Mean of the three sets, percent."""
    return np.mean([line["numbers"][f"{name}/accuracy"] for name in SETS])


def bytes_of_a_token():
    """Of its keys and values in the tiny model, fp32."""
    text = TINY_LLAVA.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4


def table(lines):
    """results.jsonl's lines → Markdown: means and standard deviations over the seeds."""
    found, seconds = {}, {}
    for line in lines:
        of_tokens = found if "numbers" in line else seconds
        of_tokens.setdefault(line["tokens"], {})[line["seed"]] = line
    whole = found.get(IMAGE, {})
    titles = ["tokens", "seeds", *COLUMNS.values(), "kept", "cache an image", *TIMES.values()]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for tokens in sorted(found, reverse=True):
        of_seed = found[tokens]
        cells = [mean_and_sd([line["numbers"][name] for line in of_seed.values()],
                             2 if name == "nll" else 1) for name in COLUMNS]
        kept = [100 * (accuracy(line) - 50) / (accuracy(whole[seed]) - 50)
                for seed, line in of_seed.items() if seed in whole and accuracy(whole[seed]) != 50]
        times = next(iter(seconds.get(tokens, {}).values()), {"seconds": {}})["seconds"]
        rows.append("| " + " | ".join(
            [str(tokens), str(len(of_seed)), *cells,
             mean_and_sd(kept, 0) + " %" if kept else "",
             f"{tokens * bytes_of_a_token() / 1024:.1f} KiB",
             *(f"{times[name]:.2f} s" if name in times else "" for name in TIMES)]) + " |")
    places = {line["on"] for of_seed in seconds.values() for line in of_seed.values()}
    return "\n".join([*rows, "", f"Times: the first seed's models, one after the other, on "
                                 f"{' and '.join(sorted(places))}." if places else ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N",
                        choices=range(1, IMAGE + 1),
                        help=f"tokens an image; {IMAGE} is the image itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each model; default {STEPS}")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time; default 1")
    parser.add_argument("--small", action="store_true", help="a world and models of no use, to see "
                                                             "that everything runs")
    parser.add_argument("--output_dir", default=os.path.join("out", "voco"))
    args = parser.parse_args(argv)
    logs = os.path.join(args.output_dir, "logs")
    lines = read_results(args.output_dir)
    others = {line["steps"] for line in lines if "numbers" in line} - {args.steps}
    if others:
        raise InputError(f"--steps {args.steps}: {args.output_dir}/results.jsonl holds models of "
                         f"{others.pop()} steps; name another --output_dir")
    done = {(line["seed"], line["tokens"]) for line in lines if "numbers" in line}
    timed = {line["tokens"] for line in lines if "seconds" in line}
    missing = {seed: [n for n in args.tokens if (seed, n) not in done] for seed in args.seeds}
    failed, total = 0, sum(map(len, missing.values()))

    # What a seed's models start from; when it is there, they are trained.
    with workers(args.jobs, logs) as pool, \
            progress(total=total, desc="models", unit="model", leave=True, delay=0) as bar:
        worlds = {pool.submit(make_base, os.path.join(args.output_dir, f"seed{seed}"), seed,
                              args.small): seed for seed, tokens in missing.items() if tokens}
        models = []
        for future in as_completed(worlds):
            future.result()
            seed = worlds[future]
            models += [pool.submit(make, args, seed, tokens) for tokens in missing[seed]]
        for future in as_completed(models):
            failed += future.result() is None
            bar.update()
        first = args.seeds[0]
        ready = {line["tokens"] for line in read_results(args.output_dir)
                 if "numbers" in line and line["seed"] == first}
        for tokens in args.tokens:
            if tokens in ready - timed:
                pool.submit(time_model, args, first, tokens).result()
    print(table(read_results(args.output_dir)))
    print(f"{total - failed} models in {args.output_dir}/results.jsonl"
          + f"; {failed} failed, see {logs}" * bool(failed))


if __name__ == "__main__":
    run_program(main)
