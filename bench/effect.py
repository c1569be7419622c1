"""What causes the effect: the runs of effect_rows.py on the tiny world, seed by seed.

    python bench/effect.py --validation              # every row at each rate, on validation images
    python bench/effect.py                           # at its best rate, on evaluation images
    python bench/effect.py --rows sft --seeds 46 47 --jobs 2
    python bench/effect_table.py                     # the tables of docs/results.md

Each seed has its own world, tower, base and preference pairs. A run goes through train.py's own
functions, flag by flag as a user would type it, and is asked POPE's questions by eval_pope.py's.
Each run appends a line to --output_dir/results.jsonl; what stands there is not made again, so rows
and seeds can be added later, and an interrupted experiment goes on. Runs that read the same kept
features follow each other in one process; --jobs processes work at the same time, each on one core
and, where there are GPUs, on one of them.
"""
import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import sys
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

import train
from bench.effect_asked import judge, judge_base
from bench.effect_rows import (
    LADDER,
    REFERENCE,
    ROWS,
    SAME_RATE,
    STEPS,
    VALIDATION_SEEDS,
    best_rates,
    read_results,
    seeds_of,
)
from bench.measuring import add_rows
from model import Trunk
from support.common import InputError, progress, run_program
from tiny import prepare
from training.engine import configure, start_deepspeed
from training.flags import parse_flags

BASE = "base"                   # the rows of the base itself: bench/effect_asked.py
# The flags of --small: all of it in two minutes, to see that it runs.
SMALL = ["--tiny_sizes", '{"sft": 64, "preference": 48, "validation": 8, "evaluation": 8}',
         "--tiny_tower", '{"images": 64, "epochs": 1}', "--tiny_base_steps", "4"]
SMALL_STEPS = 4
AT_ONCE = 4                     # rows that follow each other in one process


# ---- One run -------------------------------------------------------------------------------------


def run_train(flags):
    """`train.py FLAGS`, in this process."""
    args = parse_flags(flags)
    deepspeed, device = start_deepspeed()
    configure(args, deepspeed, device)
    if not prepare.prepare_tiny_world(args, train.train, device):
        train.train(args)


def root_of(output_dir, seed, projector):
    return os.path.join(output_dir, f"seed{seed}" + (f"-projector{projector}" if projector else ""))


def make_base(root, seed, projector, small):
    """The base, and its world and pairs: what is there already is not made again."""
    width = ["--tiny_projector", str(projector)] if projector else []
    run_train(["--stage", "0", "--seed", str(seed), *width, *(SMALL if small else ()),
               "--output_dir", os.path.join(root, "base")])


def make_pairs(root, flags, of="base"):
    """Flags of train.py that name the pairs which tiny.prepare makes of `flags` and of what a model
    says: the base, or a checkpoint in `root`.
    """
    if not flags and of == "base":
        return []
    folder = os.path.join(root, f"pairs-{of}" + flags.replace(" ", "").replace("/", "-"))
    if not os.path.isdir(folder):
        partial = f"{folder}.{os.getpid()}.partial"     # another process may make the same
        prepare.main([os.path.join(root, of), "--output", partial, *flags.split()])
        with contextlib.suppress(OSError):
            os.rename(partial, folder)
    return ["--desc_data_path", f"{folder}/desc_data.json",
            "--pope_data_path", f"{folder}/pope_data.json"]


def train_row(root, seed, name, rate, steps):
    """Train one row at one learning rate, for `row.steps` of `steps` → its checkpoint."""
    if ROWS[name].image == "test":
        name = REFERENCE                                # only what is asked differs
    row, folder = ROWS[name], os.path.join(root, f"{name}-{rate:g}")
    if os.path.isdir(folder):
        return folder
    common = ["--no-bf16", "--seed", str(seed), "--learning_rate", str(rate),
              "--dataloader_num_workers", "0", "--max_steps", str(max(1, round(row.steps * steps))),
              "--cache_features", os.path.join(root, f"features{os.getpid()}")]
    start, flags, of = [], row.pairs, "base"
    if row.first:
        run_train([*row.first.split(), *common, "--output_dir", f"{folder}-first"])
        start = ["--init", f"{folder}-first"]
    if row.second_round:
        of = os.path.basename(f"{folder}-first")
    if row.teacher:
        run_train([*row.teacher.split(), *common, "--output_dir", f"{folder}-teacher"])
        flags += f" --teacher {folder}-teacher"
    with another_image() if row.image == "always" else contextlib.nullcontext():
        run_train([*row.flags.split(), *start, *common, *make_pairs(root, flags, of),
                   "--output_dir", folder])
    return folder


@contextlib.contextmanager
def another_image():
    """In training the block sees the features of the next image instead of the row's own."""
    keep = train.keep_features

    def shifted(*args):
        kept = keep(*args)
        kept.image_index = (kept.image_index + 1) % (kept.image_index.max() + 1)
        return kept

    train.keep_features = shifted
    try:
        yield
    finally:
        train.keep_features = keep


@contextlib.contextmanager
def another_image_asked():
    """While it is asked, too: the features of the next image of the batch."""
    context = Trunk.image_context
    Trunk.image_context = lambda *args: context(*args).roll(1, 0)
    try:
        yield
    finally:
        Trunk.image_context = context


# ---- Work ----------------------------------------------------------------------------------------


def kind_of(name):
    """Rows of a kind read the same kept features."""
    row = ROWS[name]
    block = [word for word in ("self_attn", "align_after_align") if word in row.flags]
    return row.projector, row.pairs, "sft" in row.flags, "no-keep_correct" in row.flags, *block


@dataclasses.dataclass(order=True)
class Task:
    """Rows of one seed that read the same kept features; `rows` empty: its base is made."""
    priority: int                           # 0 a base, 1 rows that carry a claim, 2 the others
    seed: int
    projector: int
    rows: list = dataclasses.field(default_factory=list)            # (row, rate), in this order


def tasks_of(args, done):
    """What is missing, as Tasks: the bases, {(seed, projector): [what starts from it]}."""
    rates = {} if args.validation else best_rates(read_results(args.output_dir))
    groups = {}
    for name in args.rows:
        row = ROWS.get(name)
        seeds = args.seeds or (VALIDATION_SEEDS if args.validation else seeds_of(name))
        of_row = LADDER if args.validation else (rates.get(name),)
        if row is None or row.rate:
            of_row = (row.rate if row else 0,)
        if None in of_row:
            of = SAME_RATE.get(name, name)
            raise InputError(f"{name}: {args.output_dir}/results.jsonl knows no rate of it; run "
                             f"--validation --rows {of} first")
        priority = 1 if row is None or row.claim else 2
        for seed in seeds:
            key = priority, seed, row.projector if row else 0, kind_of(name) if row else BASE
            groups.setdefault(key, []).extend(
                (name, rate) for rate in of_row if (name, seed, rate, args.validation) not in done)
    behind = {}
    for (priority, seed, projector, _), rows in groups.items():
        for start in range(0, len(rows), AT_ONCE):
            task = Task(priority, seed, projector, rows[start:start + AT_ONCE])
            behind.setdefault((seed, projector), []).append(task)
    return [Task(0, *key) for key in behind], behind


def begin(counter, gpus, logs):
    """Start of a worker: its core, its GPU, and a file for what it prints."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    log = os.open(os.path.join(logs, f"{number}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                  0o666)
    for stream in (1, 2):
        os.dup2(log, stream)


def workers(jobs, logs):
    """A pool of processes, each on one core, on one of the GPUs, and printing into `logs`."""
    os.makedirs(logs, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Value("i", 0), torch.cuda.device_count(), logs
    return ProcessPoolExecutor(jobs, spawn, begin, start)


def work_on(args, task):
    """Make a base, or train and ask rows → how many failed, which the log tells."""
    root, failed = root_of(args.output_dir, task.seed, task.projector), 0
    if not task.rows:
        make_base(root, task.seed, task.projector, args.small)
    for name, rate in task.rows:
        try:
            if name == BASE:
                lines = judge_base(root, args.validation)
            else:
                steps = SMALL_STEPS if args.small else STEPS
                folder = train_row(root, task.seed, name, rate, steps)
                with another_image_asked() if ROWS[name].image else contextlib.nullcontext():
                    lines = {name: judge(root, folder, args.validation)}
        except Exception:       # one row must not end the others
            traceback.print_exc()
            failed += 1
            continue
        add_rows(os.path.join(args.output_dir, "results.jsonl"),
                 [{"row": row, "seed": task.seed, "rate": rate, "validation": args.validation,
                   **line} for row, line in lines.items()])
    shutil.rmtree(os.path.join(root, f"features{os.getpid()}"), ignore_errors=True)
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", default=[BASE, *ROWS], choices=[BASE, *ROWS],
                        metavar="ROW", help="default: all of bench/effect_rows.py, and the base")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="default: 46 to 61 for rows that carry a claim, else 62 to 67; with "
                             "--validation 42 and 43")
    parser.add_argument("--validation", action="store_true",
                        help="each row at each rate of the ladder, asked about validation images")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time; default 1")
    parser.add_argument("--small", action="store_true", help="a world, a base and runs of no use, "
                                                             "to see that everything runs")
    parser.add_argument("--output_dir", default=os.path.join("out", "effect"))
    args = parser.parse_args(argv)
    logs = os.path.join(args.output_dir, "logs")
    done = {(line["row"], line["seed"], line["rate"], line["validation"])
            for line in read_results(args.output_dir)}
    ready, behind = tasks_of(args, done)
    total, failed = sum(len(task.rows) for tasks in behind.values() for task in tasks), 0

    # The bases first; when one is there, all that starts from it is ready.
    with workers(args.jobs, logs) as pool, \
            progress(total=total, desc="rows", unit="row", leave=True, delay=0) as bar:
        running = {}
        while ready or running:
            ready.sort(reverse=True)
            while ready and len(running) < args.jobs:
                task = ready.pop()
                running[pool.submit(work_on, args, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                failed += future.result()
                bar.update(len(task.rows))
                ready += [] if task.rows else behind[task.seed, task.projector]
    print(f"{total - failed} rows in {args.output_dir}/results.jsonl"
          + f"; {failed} failed, see {logs}" * bool(failed))


if __name__ == "__main__":
    run_program(main)
