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
    groups = {}         # of the commands that may still run
    while True:
        message, files, _, _ = socket.recv_fds(control, LARGEST, 4)
        if not message:
            break
        request = json.loads(message)
        for name in request["imports"]:
            importlib.import_module(name)
        pid = os.fork()
        if not pid:
            control.close()
            request = watch(request, *files)
            if request:
                return request
            os._exit(0)
        groups[pid] = True
        for file in files:
            os.close(file)
        while ended := os.waitpid(-1, os.WNOHANG)[0] if groups else 0:
            del groups[ended]
    # Nobody waits for what is left.
    for pid in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os._exit(0)


def watch(request, stdin, stdout, stderr, told):
    """Fork the program and tell its pid and how it ended → the request, in the program."""
    os.setpgid(0, 0)
    pid = os.fork()
    if not pid:
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file, number)
    for file in (stdin, stdout, stderr):        # the reader of a pipe waits for its last writer
        os.close(file)
    if not pid:
        os.close(told)
        return request
    os.write(told, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


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
