"""What a run says of its steps: a progress bar, `metrics.jsonl`, DeepSpeed's monitor.

    announce(run, "an identity block")           # before the first step
    with StepLog(run, engine, start) as log:
        log.write(step, values)          # once per optimizer step

`metrics.jsonl` gets one line per `--logging_steps`, the monitor (TensorBoard, W&B or CSV:
monitors.py) the same numbers. Only rank 0 writes.
"""
import contextlib
import os
import shlex
import sys
import time

import torch
import torch.distributed as dist

from checkpoints.load import checkpoint_type, read_config
from support.common import progress, say
from support.outputs import Lines
from training.monitors import reporting
from training.recipes import world_of_files

SHOWN = {"loss": "loss", "rewards/margin": "margin", "rewards/accuracy": "accuracy"}    # in the bar


def announce(run, start_name):
    """One line: what is trained, on how much, and how."""
    args, config = run.args, run.config
    if start_name == args.init:
        start_name += length_of(start_name)
    what = args.loss if args.stage is None else f"stage {args.stage}"
    numbers = sum(parameter.numel() for parameter in run.trained.values())
    say(f"{what} from {start_name}: {len(run.trained)} tensors trained ({', '.join(args.tune)}, "
        f"{numbers:,} numbers); {len(run.rows):,} examples, {run.steps} steps of "
        f"{config['train_batch_size']} = {config['train_micro_batch_size_per_gpu']} × "
        f"{config['gradient_accumulation_steps']} × {dist.get_world_size()}, learning rate "
        f"{args.learning_rate:g}, {str(run.dtype).removeprefix('torch.')}, "
        f"ZeRO-{config['zero_optimization']['stage']}")


def length_of(checkpoint):
    """How long a checkpoint was trained, in brackets; nothing where it does not tell."""
    if checkpoint_type(checkpoint) == "seed":
        return ""
    config = read_config(checkpoint)
    steps, arguments = config.get("steps"), config.get("arguments") or {}
    if steps and arguments.get("max_steps"):
        return f" (ended by --max_steps at step {steps})"
    return f" ({steps} steps, {arguments['num_train_epochs']:g} epochs)" if steps else ""


class StepLog:
    def __init__(self, run, engine, start):
        self.run, self.engine, self.start, self.values = run, engine, start, {}
        self.began, self.reports = time.perf_counter(), contextlib.ExitStack()

    def __enter__(self):
        self.reports.enter_context(reporting(self.run))
        first = dist.get_rank() == 0
        path = os.path.join(self.run.folder, "metrics.jsonl") if first else os.devnull
        self.file = Lines(path, "make room there, and go on with --resume")
        self.bar = progress(total=self.run.steps, initial=self.start, desc="training", unit="step",
                            leave=True, delay=0, mininterval=0.5)
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.file.close()
        self.reports.close()

    def write(self, step, values):
        """`values`: {name: number} of this step, the same on all ranks."""
        self.values = values
        self.bar.update()
        if step % self.run.args.logging_steps and step != self.run.steps:
            return
        self.file.add({"step": step, **values})
        self.engine.monitor.write_events([(f"train/{name}", v, step) for name, v in values.items()])
        shown = " ".join(f"{SHOWN[name]} {v:.3f}" for name, v in values.items() if name in SHOWN)
        self.bar.set_postfix_str(shown, refresh=False)

    def seconds(self):
        """Since this was asked last, or since the beginning."""
        before, self.began = self.began, time.perf_counter()
        return self.began - before

    def summary(self):
        """One line about the last step, behind the last one."""
        if self.values:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
            say(f"{self.run.steps} steps: {numbers}")


def say_what_next(args, folders):
    """The last line: how to evaluate what a command has trained."""
    tiny = world_of_files(args.vg_path, args.data_path)
    files = "" if tiny else " --coco_path … --pope_path …"
    installed = os.path.basename(sys.argv[0]).startswith("nanohadpo-")
    program = ["nanohadpo-pope"] if installed else ["python", "eval_pope.py"]
    say(f"done; look at it with: {shlex.join([*program, *folders])}{files}")


def gradient_norm(trained):
    """Norm of the gradients that are whole on this process; of others only the engine knows it."""
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def mean_of_all_ranks(seen):
    """[(ids, {name: scalar})] of this rank's micro batches → {name: mean over everybody's}."""
    names = list(seen[0][1])
    means = [torch.stack([metrics[name] for _, metrics in seen]).float().mean() for name in names]
    values = torch.stack(means)
    dist.all_reduce(values)
    return dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
