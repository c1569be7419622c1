"""Stopping and going on: what a run leaves beside its output folder, and when it may be taken up
again.

    with claimed_folder(run) as state:                      # OUTPUT_DIR.run made ready; None = anew
        start = load_state(engine, run.folder, state) if state else 0
        with Interruptions() as interruptions: ...            # Ctrl-C: finish the step, save_state

Everything random in a step follows from (seed, step, rank), and the order of the data from (seed,
epoch). So a state holds trained weights and optimizer and nothing else. A run that went on from one
ends with the very numbers (on a CPU, to the last bit) of the run that did not stop. OUTPUT_DIR.run
lasts as long as the run:

    lock             held by the process that trains here
    run.json         what determines the result; other arguments cannot go on from here
    metrics.jsonl    one line per logged step
    reference.pt     the reference's log-probabilities, where the trunk is trained
    step-40/         DeepSpeed's state after that step, the last two; `latest` names a whole one;
                     checksums.json says what was written there

A state is written under another name, opened once, renamed, and published by replacing `latest`: a
kill at any moment leaves the state before or the new one. What a disk, or a machine that loses
power, makes of it afterwards is known by its checksums, and refused.
"""
import contextlib
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

from checkpoints.identity import differences, identity_of, told_identity
from checkpoints.layouts import typed
from support.common import (
    InputError,
    check_file,
    read_json,
    say,
    temporary,
    write_json,
)
from support.folders import check_only_ours, discard
from support.outputs import parsed
from training.states import SUMS, digests, read_latest, refuse_damaged

# What may lie in OUTPUT_DIR.run. NFS makes ".nfs…" of a file that is removed while it is open.
RUN_FILES = {"lock": None, "run.json": None, "metrics.jsonl": None, "reference.pt": None,
             "latest": None, "step-*": "*", "*.partial": None, ".nfs*": None,
             "zero_to_fp32.py": None, "zero_to_torch.py": None}        # DeepSpeed puts these there
# Arguments that change nothing about the result beyond rounding.
INCIDENTAL = ("output_dir", "resume", "save_steps", "logging_steps", "dataloader_num_workers",
              "local_rank", "deepspeed", "bf16", "offload", "gradient_checkpointing",
              "per_device_train_batch_size", "gradient_accumulation_steps", "default_batch",
              "default_micro", "plot", "report_to", "run_name")
# Facts that `differences` compares and words.
IDENTITY = ("base", "settings", "initial head", "data")
# Arguments that `what_determines` tells better: by steps, by the base's fingerprint.
IN_FACTS = ("num_train_epochs", "max_steps", "model_name_or_path")


class Interruptions:
    """While this lasts, Ctrl-C and SIGTERM only make a note, which the loop reads after every
    step.
    """

    def __enter__(self):
        self.noted, self.before = [], {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, lambda number, _: self.noted.append(number))
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def heard_by_any(self, device):
        """Whether any rank was interrupted: the rank that heard it tells the others."""
        noted = torch.tensor(len(self.noted), device=device)
        dist.all_reduce(noted)
        return bool(noted)


def resume_command():
    """What to type to go on."""
    typed = [word for word in sys.argv
             if not word.startswith("--local_rank") and word != "--resume"]
    processes, launcher = dist.get_world_size(), "python"
    if int(os.environ.get("CROSS_SIZE", 1)) > 1:          # machines, as DeepSpeed's launcher counts
        launcher = "deepspeed --hostfile …"
    elif processes > 1:
        launcher = f"deepspeed --num_gpus {processes}"
    return f"{launcher} {shlex.join([*typed, '--resume'])}"


def what_determines(run):
    """What the result of a run follows from: {name: JSON value}, its identity among it."""
    args, config = run.args, run.config
    facts = {**run.identity, "max_length": run.model.config.max_length, "examples": len(run.rows),
             "steps": run.steps, "global batch": config["train_batch_size"],
             "ZeRO stage": config["zero_optimization"]["stage"],
             "dtype": str(run.dtype).removeprefix("torch."),
             "gradient_clipping": config.get("gradient_clipping", 0)}
    arguments = {k: v for k, v in vars(args).items() if k not in INCIDENTAL + IN_FACTS}
    arguments["cache_features"] = bool(args.cache_features)
    return json.loads(json.dumps(facts | arguments))


def is_finished(run, initial_head):
    """Whether this very run has left its checkpoint, and nothing is to be resumed.

    InputError if another run was interrupted: before long work begins. `initial_head(run)[0]` is
    the head that it starts from, which is made only to be compared.
    """
    args = run.args
    path, state = os.path.join(args.output_dir, "config.json"), read_latest(run.folder)
    if state:
        run.identity = identity_of(run.model, initial_head(run)[0], run.rows.examples)
        refuse_other_run(run.folder, state, what_determines(run))
    if os.path.isdir(run.folder) or not os.path.isfile(path):
        return False
    told = read_json(path, dict)
    before = typed(told, "arguments", dict, path) or {}
    now = json.loads(json.dumps({k: v for k, v in vars(args).items() if v is not None}))
    names = (before.keys() | now.keys()) - set(INCIDENTAL)
    if any(before.get(name) != now.get(name) for name in names):
        return False
    told = told_identity(told, path)
    if told:
        identity = identity_of(run.model, initial_head(run)[0], run.rows.examples)
        changed = differences(told, identity)
        if changed:
            say(f"{args.output_dir}: is finished, but {'; '.join(changed)}: it is trained anew")
            return False
    say(f"{args.output_dir}: finished already")
    return True


def claim(folder):
    """Lock a run's folder against other processes for as long as the file that is returned stays
    open. InputError where one trains there: kill -9 of a launcher leaves its processes behind, and
    two would write one run."""
    lock = open(os.path.join(folder, "lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip()
        raise InputError(f"{folder}: {holder} still trains there; wait for it, or end it") from None
    except OSError:
        pass                # a disk that knows no locks
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


@contextlib.contextmanager
def claimed_folder(run):
    """Make OUTPUT_DIR.run ready, and hold its lock inside → the state to go on from, or None."""
    folder, facts = run.folder, what_determines(run)
    state = read_latest(folder)
    if state and run.args.resume:
        refuse_other_run(folder, state, facts)
    dist.barrier()
    lock = None
    if dist.get_rank() == 0:
        lock = make_ready(folder, state, run.args.resume)
        write_json(os.path.join(folder, "run.json"), facts | {"processes": dist.get_world_size()})
        for rest in glob.glob(os.path.join(glob.escape(folder), "step-*.*")):      # .partial, .gone
            shutil.rmtree(rest)
    dist.barrier()
    if not os.path.isfile(os.path.join(folder, "run.json")):
        raise InputError(f"{folder}: is not on a disk that all machines share; name an "
                         "--output_dir that is")
    try:
        if state and run.args.resume:
            refuse_damaged(folder, state)
        yield state if run.args.resume else None
        if lock:
            empty(folder)
    finally:
        # NFS keeps a file that is removed while it is open, and then the folder cannot go.
        if lock:
            lock.close()
    if lock:
        discard(folder)
    dist.barrier()


def refuse_other_run(folder, state, facts):
    """InputError where the run that was interrupted is not this one."""
    path = os.path.join(folder, "run.json")
    before = read_json(path, dict)
    told_identity({"identity": before}, path)
    processes, now = typed(before, "processes", int, path), dist.get_world_size()
    changed = differences(before, facts)
    changed += [f"{name} was {before.get(name)} and is {value}" for name, value in facts.items()
                if name not in IDENTITY and before.get(name) != value]
    if changed:
        raise InputError(f"{folder}: --resume goes on with the run that was interrupted, but "
                         f"{'; '.join(changed)}: type its own arguments, or leave --resume out to "
                         "start anew")
    split = glob.glob(os.path.join(glob.escape(folder), state, "*zero_pp_rank*"))
    if processes != now and split:
        raise InputError(f"{folder}: was written by {processes} processes, each of which has a "
                         f"part of the optimizer (ZeRO), so {now} cannot go on; start {processes}")


def make_ready(folder, state, resume):
    """An empty folder, or the one to go on in → its lock. InputError while another holds it."""
    if os.path.lexists(folder):
        check_only_ours(folder, RUN_FILES)
    os.makedirs(folder, exist_ok=True)
    lock = claim(folder)
    if state and resume:
        cut_log(os.path.join(folder, "metrics.jsonl"), int(state.removeprefix("step-")))
        say(f"going on from {os.path.join(folder, state)}")
        return lock
    if state:
        say(f"{folder}: holds {state} of an interrupted run, which is discarded; from the "
            "beginning")
    elif resume:
        say(f"{folder}: no state in it; from the beginning")
    empty(folder)
    return lock


def empty(folder):
    """Remove what a run has left, but for its lock."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            shutil.rmtree(entry.path)
        elif entry.name != "lock" and not entry.name.startswith(".nfs"):
            os.remove(entry.path)


def cut_log(path, step):
    """Keep the lines up to a step: those behind it will be written again, and the last may be half
    a line.
    """
    check_file(path)
    lines = []
    with open(path, "rb") as file:
        for n, line in enumerate(file):
            number = parsed(line).get("step")
            if line.endswith(b"\n") and type(number) is not int:
                raise InputError(f"{path}, row {n}: is no step of a log; remove that line, or "
                                 "leave --resume out to start anew")
            lines += [line] if line.endswith(b"\n") and number <= step else []
    partial = temporary(path)
    with open(partial, "wb") as file:
        file.writelines(lines)
    os.replace(partial, path)


def save_state(engine, folder, step):
    """DeepSpeed's state after a step, of all ranks. Killed at any moment, `latest` names a state
    that is whole. InputError where the disk is full.
    """
    try:
        write_state(engine, folder, f"step-{step}")
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as e:            # torch's writer raises RuntimeError
        reason = getattr(e, "strerror", None) or "is the disk full?"
        raise InputError(f"{folder}: the state after step {step} cannot be written ({reason}); "
                         "make room there, and go on from the state before with --resume") from e


def write_state(engine, folder, name):
    path, latest = os.path.join(folder, name), os.path.join(folder, "latest")
    engine.save_checkpoint(folder, tag=name + ".partial", save_latest=False,
                           exclude_frozen_parameters=True)
    dist.barrier()
    if dist.get_rank() == 0:
        for file in glob.glob(os.path.join(path + ".partial", "*.pt")):
            # Opens, or the disk was full
            torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        with open(os.path.join(path + ".partial", SUMS), "w") as file:
            json.dump(digests(folder, name + ".partial"), file)
        discard(path)
        os.rename(path + ".partial", path)
        partial = temporary(latest)
        with open(partial, "w") as file:
            file.write(name)
        os.replace(partial, latest)
        states = glob.glob(os.path.join(glob.escape(folder), "step-*[0-9]"))
        states = sorted(states, key=lambda path: int(path.rpartition("-")[2]))
        for old in states[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_state(engine, folder, state):
    """Put a state into the engine → its step."""
    path, _ = engine.load_checkpoint(folder, tag=state, load_module_strict=False)
    if path is None:
        raise InputError(f"{os.path.join(folder, state)}: cannot be loaded; leave --resume out to "
                         "start anew")
    return int(state.removeprefix("step-"))
