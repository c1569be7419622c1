"""Programs in processes of their own that are killed, at a moment of their work or of the clock.

    ended = run_forked(["train.py", "--stage", "2", …])             # .code, .said, .moments
    run_forked(command, Kill(signal.SIGKILL, moment=7))             # in front of its 7th moment
    run_forked(command, Kill(signal.SIGINT, seconds=0.4))
    run_forked(command, file_limit=5000)                            # no file can be larger

A process is forked from this one, which has imported everything already, so it costs a second and
not ten; start-up is the only part that it leaves out. A moment is whatever changes the disk: a file
opened to be written, a rename, a removal, a new folder. They come in the same order in every run,
so a kill in front of the nth needs no luck.
"""
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

os.environ["CUDA_VISIBLE_DEVICES"] = ""             # the same bytes on every machine
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["MASTER_PORT"] = "0"                     # each takes a free one
import deepspeed  # noqa: F401  (so that no forked process imports these two)
import torch
import torch._dynamo  # noqa: F401

import eval_pope
import train
from bench.ending import ending, leave
from support.common import run_program

MAINS = {"train.py": train.main, "eval_pope.py": eval_pope.main}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
LIMIT = 120         # seconds, until a program hangs


@dataclass
class Kill:
    """When a program is killed: in front of a moment, or after so many seconds."""
    number: int                 # the signal
    moment: int = None          # counted from 1
    seconds: float = None
    within: str = ""            # only moments whose path holds this text are counted


@dataclass
class Ended:
    code: int                   # negative: the signal that ended it
    said: str                   # stdout and stderr
    moments: int                # how many there were; 0 where it was killed
    seconds: float

    @property
    def hung(self):
        return self.seconds >= LIMIT

    @property
    def fault(self):
        """What no program may do, whatever happens to it; "" if it did none of it."""
        if self.hung:
            return "hangs"
        if "Traceback" in self.said:
            return "a traceback: " + self.said.strip().splitlines()[-1]
        if self.code < 0 and -self.code not in (signal.SIGKILL, signal.SIGINT):
            return f"ended by {signal.Signals(-self.code).name}"
        return ""


def run_forked(command, kill=None, file_limit=None):
    """Run a program of MAINS in a forked process → Ended."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as count:
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = inside(command, kill, file_limit, log, count)
            finally:
                leave(code)
        if kill and kill.seconds is not None:
            time.sleep(kill.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kill.number)
        code = None
        while code is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - began > LIMIT:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
        log.seek(0)
        count.seek(0)
        return Ended(code, log.read().decode(errors="replace"), int(count.read() or 0),
                     time.monotonic() - began)


def inside(command, kill, file_limit, log, count):
    """The forked process → its exit code."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    moments = watch(kill)
    sys.argv = list(command)
    code = ending(lambda: run_program(MAINS[command[0]]))
    if file_limit is None:
        os.write(count.fileno(), str(len(moments)).encode())
    return code


def watch(kill):
    """Note every moment of this process from here on, and kill it in front of the one that is
    meant → the list of them, which grows.
    """
    moments, here = [], os.getpid()

    def noted(event, values):
        if event == "open" and isinstance(values[0], str):
            changes = bool(values[2] & WRITES) and not values[0].startswith("/dev")
        else:
            changes = event in CHANGES
        if not changes or os.getpid() != here or kill and kill.within not in str(values[:2]):
            return
        moments.append(event)
        if kill and len(moments) == kill.moment:
            os.kill(here, kill.number)

    sys.addaudithook(noted)
    return moments
