"""Stopping and going on: what a run leaves beside its output folder, and when it may be taken up again.

    state, lock = begin(args, facts)                          # OUTPUT_DIR.run made ready; the state to go on from, or None
    start = load_state(engine, folder, state)
    with Interruptions() as interruptions: ...                # Ctrl-C: finish the step, save_state, exit code 130

Everything random in a step follows from (seed, step, rank), and the order of the data from (seed, epoch). So a state holds
trained weights and optimizer and nothing else, and a run that went on from one ends with the very numbers (on a CPU, to
the last bit) of the run that did not stop. OUTPUT_DIR.run lasts as long as the run:

    lock             held by the process that trains here
    run.json         what determines the result; other arguments cannot go on from here
    metrics.jsonl    one line per logged step
    reference.pt     the reference's log-probabilities, where the trunk is trained
    step-40/         DeepSpeed's state after that step, the last two; `latest` names one that is whole

A state is written under another name, opened once, renamed, and published by replacing `latest`: a kill at any moment
leaves the state before or the new one. Nothing is promised about a machine that loses power.
"""
import fcntl
import glob
import json
import os
import platform
import shlex
import shutil
import signal
import sys

import torch
import torch.distributed as dist

from checkpoint import write_json
from readers import InputError, read_json

# Arguments that change nothing about the result beyond rounding.
INCIDENTAL = ("output_dir", "resume", "save_steps", "logging_steps", "dataloader_num_workers", "local_rank", "deepspeed", "bf16",
              "offload", "gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps", "default_batch",
              "default_micro", "plot")
IN_FACTS = ("num_train_epochs", "max_steps", "model_name_or_path")          # what a run's facts tell better: steps, fingerprint


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


class Interruptions:
    """While this lasts, Ctrl-C and SIGTERM only make a note, which the loop reads after every step."""

    def __enter__(self):
        self.noted, self.before = [], {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, lambda number, frame: self.noted.append(number))
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def resume_command(world_size):
    typed = [a for a in sys.argv if not a.startswith("--local_rank") and a != "--resume"] + ["--resume"]
    several = int(os.environ.get("CROSS_SIZE", 1)) > 1              # machines, which DeepSpeed's launcher counts so
    launcher = "python" if world_size == 1 else "deepspeed --hostfile …" if several else f"deepspeed --num_gpus {world_size}"
    return f"{launcher} {shlex.join(typed)}"


def what_determines(args, facts):
    arguments = {k: v for k, v in vars(args).items() if k not in INCIDENTAL + IN_FACTS}
    return json.loads(json.dumps(facts | arguments | {"cache_features": bool(args.cache_features)}))


def read_latest(folder):
    path = os.path.join(folder, "latest")
    if os.path.isfile(path):
        with open(path) as file:
            return file.read()


def discard(folder):
    """Remove a folder that others may look at: it is gone at once, or it is there."""
    gone = folder + ".gone"
    shutil.rmtree(gone, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, gone)
        shutil.rmtree(gone)


def is_finished(args):
    """Whether a run of these arguments has left its checkpoint, and nothing is to be resumed."""
    path = os.path.join(args.output_dir, "config.json")
    if os.path.isdir(args.output_dir + ".run") or not os.path.isfile(path):
        return False
    before = read_json(path, dict).get("arguments", {})
    now = json.loads(json.dumps({k: v for k, v in vars(args).items() if v is not None}))
    finished = all(before.get(k) == now.get(k) for k in before.keys() | now.keys() if k not in INCIDENTAL)
    if finished:
        say(f"{args.output_dir}: finished already")
    return finished


def claim(folder):
    """Lock a run's folder against other processes for as long as the file that is returned stays open. InputError where one
    trains there: kill -9 of a launcher leaves its processes behind, and two would write one run."""
    lock = open(os.path.join(folder, "lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise InputError(f"{folder}: {lock.read().strip()} still trains there; wait for it, or end it")
    except OSError:
        pass                # a disk that knows no locks
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


def begin(args, facts):
    """Make OUTPUT_DIR.run ready. Returns the name of the state to go on from, or None, and on rank 0 the lock to hold."""
    folder, facts = args.output_dir + ".run", what_determines(args, facts)
    state, path, lock = read_latest(folder), os.path.join(folder, "run.json"), None
    if state and args.resume:
        before = read_json(path, dict)
        processes, now = before.pop("processes"), dist.get_world_size()
        changed = [f"{k} was {before.get(k)} and is {facts.get(k)}" for k in facts if before.get(k) != facts.get(k)]
        if changed:
            raise InputError(f"{folder}: --resume goes on with the run that was interrupted, but {'; '.join(changed)}: type its "
                             "own arguments, or leave --resume out to start anew")
        if processes != now and glob.glob(os.path.join(folder, state, "*zero_pp_rank*")):
            raise InputError(f"{folder}: was written by {processes} processes, each of which has a part of the optimizer (ZeRO), "
                             f"so {now} cannot go on; start {processes}")
    dist.barrier()
    if dist.get_rank() == 0:
        if os.path.isdir(folder):
            lock = claim(folder)
        if state and args.resume:
            cut_log(os.path.join(folder, "metrics.jsonl"), int(state.removeprefix("step-")))
            say(f"going on from {os.path.join(folder, state)}")
        else:
            if state or args.resume:
                what = f"holds {state} of an interrupted run, which is discarded" if state else "no state in it"
                say(f"{folder}: {what}; from the beginning")
            discard(folder)
            os.makedirs(folder)
            lock = claim(folder)
        write_json(path, facts | {"processes": dist.get_world_size()})
        for rest in glob.glob(os.path.join(folder, "step-*.*")):        # .partial, .gone
            shutil.rmtree(rest)
    dist.barrier()
    if not os.path.isfile(path):
        raise InputError(f"{folder}: is not on a disk that all machines share; name an --output_dir that is")
    return state if args.resume else None, lock


def cut_log(path, step):
    """Keep the lines up to a step: those behind it will be written again, and the last may be half a line."""
    with open(path) as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path + ".partial", "w") as file:
        file.writelines(lines)
    os.replace(path + ".partial", path)


def save_state(engine, folder, step):
    """DeepSpeed's state after a step, of all ranks. Killed at any moment, `latest` names a state that is whole."""
    name = f"step-{step}"
    path, latest = os.path.join(folder, name), os.path.join(folder, "latest")
    engine.save_checkpoint(folder, tag=name + ".partial", save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if dist.get_rank() == 0:
        for file in glob.glob(os.path.join(path + ".partial", "*.pt")):
            torch.load(file, map_location="cpu", mmap=True, weights_only=False)        # opens, or the disk was full
        discard(path)
        os.rename(path + ".partial", path)
        with open(latest + ".partial", "w") as file:
            file.write(name)
        os.replace(latest + ".partial", latest)
        states = sorted(glob.glob(os.path.join(folder, "step-*")), key=lambda p: int(p.rpartition("-")[2]))
        for old in states[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_state(engine, folder, state):
    """Put a state into the engine → its step."""
    path, _ = engine.load_checkpoint(folder, tag=state, load_module_strict=False)
    if path is None:
        raise InputError(f"{os.path.join(folder, state)}: cannot be loaded; leave --resume out to start anew")
    return int(state.removeprefix("step-"))
