"""A clean process that has imported torch and DeepSpeed, and forks once per command.

    python -m tests.fork_server FD          # programs.py starts it; FD is its socket

A real start of Python imports both for three seconds, a fork does not. What is forked leaves the
loop below and becomes the program, with the argv, the working folder, the environment and the files
of the request. Nothing of another program is in it: this process only imports, and nothing of ours
that a program uses, so that each imports our modules itself.

A request is JSON, with four files: stdin, stdout, stderr, and the pipe that gets the program's pid
and, at its end, its exit code (negative: the signal that ended it). It may name more modules of
others, which are then imported here.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"        # or DeepSpeed warns that it found none
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import numpy
import PIL.Image  # noqa: F401
import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import torch
import torch._dynamo
import tqdm  # noqa: F401

from bench.ending import ending, leave

LARGEST = 1 << 20       # bytes of a request
# Places of PYTHONPATH in sys.path, behind the first.
OWN = len(list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))))


def serve(control):
    """Answer requests until there are no more. Only a forked process returns, with its request."""
    running = {}        # a program's pidfd → its pid, and the pipe that is told of its end
    while True:
        ready, _, _ = select.select([control, *running], [], [])
        for ended in set(ready) - {control}:
            tell_end(*running.pop(ended))
            os.close(ended)
        if control not in ready:
            continue
        message, files, _, _ = socket.recv_fds(control, LARGEST, 4)
        if not message:
            break
        request = json.loads(message)
        for name in request["imports"]:
            importlib.import_module(name)
        pid = os.fork()
        if not pid:
            control.close()
            take_place(files, running)
            return request
        told = files.pop()
        for file in files:          # the reader of a pipe waits for its last writer
            os.close(file)
        os.write(told, f"{pid}\n".encode())
        running[os.pidfd_open(pid)] = pid, told
    # Nobody waits for what is left.
    for pid, _ in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)        # one that has no group of its own yet
        os.waitpid(pid, 0)
    os._exit(0)


def take_place(files, others):
    """In a forked process: a group of its own, the program's files, and no pipe of other ones."""
    os.setpgid(0, 0)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    for process, (_, told) in others.items():
        os.close(process)
        os.close(told)


def tell_end(pid, told):
    """Tell how a program has ended, if anybody still asks."""
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os.close(told)


def compiled(path):
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec")


def become(request):
    """What Python does when it is started: folder, environment, sys.path, sys.argv, the script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.seed()                # as every process draws its own, which is not the next one's
    numpy.random.seed()
    os.environ.clear()
    os.environ.update(request["environment"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]           # it looks at the environment when it is imported
    os.chdir(request["cwd"])
    script, *rest = request["command"]
    is_module = script == "-m"
    beside = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1 + OWN] = [os.getcwd() if is_module else os.path.dirname(os.path.abspath(script)),
                          *(os.path.abspath(path) for path in beside if path)]
    sys.argv = request["command"][is_module:]
    if is_module:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = os.path.abspath(script)
        exec(compiled(main.__file__), vars(main))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()         # what is imported stays; a program's own collections do not look at it
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    code = ending(lambda: become(request))
    threading._shutdown()       # waits for the program's threads
    atexit._run_exitfuncs()
    leave(code)
