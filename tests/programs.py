"""Commands as a user types them: in a fresh interpreter, or forked from a clean one.

    said = succeeds("python", "eval_pope.py", base, cwd=folder)         # its stdout
    done = shell("python", "-m", "tools.merge", base, cwd=folder)       # as subprocess.run's
    said = succeeds("deepspeed", "train.py", "--stage", 2)              # the launcher forked
    done = shell("python", "train.py", fresh=True)                      # Python itself is started

A start of Python takes three seconds for its imports, so what is typed is forked from a process
that has made them (fork_server.py), unless `fresh` is asked for. What a launcher starts is always
fresh.
"""
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What a launcher, or a test in this process, tells its own processes; and what would have every
# program compile our modules anew.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR",
           "PYTHONDONTWRITEBYTECODE")
LIMIT = 200         # seconds, until a command hangs


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def user_environment(**more):
    """The variables that a command finds."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    own = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return own | {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), "PATH": path} | more


# ---- Forked --------------------------------------------------------------------------------------


class ForkServer:
    """fork_server.py and the socket to it. It starts with the first command."""

    def __init__(self):
        self.process = self.control = None

    def start(self):
        self.control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.fork_server", str(other.fileno())]
        # Pipes, because Python remembers of its own three files whether they are pipes.
        self.process = subprocess.Popen(command, cwd=ROOT, env=user_environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, pass_fds=[other.fileno()])
        other.close()

    def stop(self):
        """End it, and with it every program that still runs."""
        if self.process:
            self.control.close()
            self.process.wait()

    def send(self, request, files):
        if self.process is None:
            self.start()
        socket.send_fds(self.control, [json.dumps(request).encode()], files)


SERVER = ForkServer()


class Forked:
    """A forked program, with the part of subprocess.Popen that the tests use.

    `command` is what stands behind `python`; `files` are its stdin, stdout and stderr.
    """

    def __init__(self, command, cwd, environment, imports, files):
        ends, told = os.pipe()
        request = {"command": [str(word) for word in command], "cwd": str(cwd),
                   "environment": environment, "imports": imports}
        SERVER.send(request, [*(file.fileno() for file in files), told])
        os.close(told)
        self.told, self.returncode = os.fdopen(ends, "rb", buffering=0), None
        pid = self.told.readline()
        assert pid, f"the fork server has ended: {SERVER.process.communicate()[0].decode()}"
        self.pid = int(pid)

    def wait(self, timeout=LIMIT):
        """The exit code, or None if it still runs after so many seconds."""
        if self.returncode is None and select.select([self.told], [], [], timeout)[0]:
            self.returncode = int(self.told.readline())
        return self.returncode

    def poll(self):
        return self.wait(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Begun(Forked):
    """A forked program that is not waited for. It prints into one pipe: `output`, text."""

    def __init__(self, *command, cwd=ROOT, imports=(), **environment):
        reader, writer = os.pipe()
        self.output = os.fdopen(reader, encoding="utf-8")
        with open(os.devnull) as nothing, os.fdopen(writer, "w") as both:
            super().__init__(command, cwd, user_environment(**environment), imports,
                             (nothing, both, both))

    def end(self):
        """Wait for it → what it said that has not been read yet. Killed when it hangs."""
        clock = threading.Timer(LIMIT, self.kill)
        clock.start()
        said = self.output.read()
        self.wait()
        clock.cancel()
        return said


def run_forked(command, cwd, environment, imports, typed):
    """A forked program from its beginning to its end → as subprocess.run's."""
    with (tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout,
          tempfile.TemporaryFile() as stderr):
        stdin.write(typed)
        stdin.seek(0)
        process = Forked(command, cwd, environment, imports, (stdin, stdout, stderr))
        if process.wait() is None:
            process.kill()
            raise TimeoutError(f"{command}: still runs after {LIMIT} s")
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, stdout.read().decode(),
                                           stderr.read().decode())


# ---- Typed ---------------------------------------------------------------------------------------


def shell(*command, cwd=ROOT, fresh=False, typed=b"", imports=(), **environment):
    """Type a command → what subprocess.run returns.

    `python`, `deepspeed` and `torchrun` are this environment's. fresh: Python itself is started.
    typed: what the command reads. imports: modules of others that many of its kind need. More
    variables of the environment can be given.
    """
    environment = user_environment(**environment)
    program, *rest = map(str, command)
    port = environment["MASTER_PORT"]
    deepspeed = shutil.which("deepspeed", path=environment["PATH"]) or "deepspeed"
    programs = {"python": [], "deepspeed": [deepspeed, "--master_port", port],
                "torchrun": ["-m", "torch.distributed.run", "--master_port", port]}
    words = [*programs[program], *rest]
    if not fresh:
        return run_forked(words, cwd, environment, imports, typed)
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, input=typed,
                          capture_output=True, timeout=LIMIT)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(),
                                       done.stderr.decode())


def succeeds(*command, **options):
    """Type a command, which must end well → its stdout."""
    done = shell(*command, **options)
    typed = " ".join(map(str, command))
    assert done.returncode == 0, f"{typed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class TwoProcesses:
    """Two processes of a program that work together, as a launcher starts them: `two(*flags)`."""

    def __init__(self, script="train.py", imports=()):
        self.script, self.imports, self.processes = script, imports, []

    def begin(self, *flags):
        both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
        self.processes = [Begun(self.script, *flags, imports=self.imports, **both, RANK=rank,
                                LOCAL_RANK=rank) for rank in ("0", "1")]

    def end(self):
        """Wait for both → (exit code, what it said) of each."""
        said = [process.end() for process in self.processes]
        return [(process.returncode, text)
                for process, text in zip(self.processes, said, strict=True)]

    def __call__(self, *flags):
        self.begin(*flags)
        ends = self.end()
        said = "\n".join(said[-3000:] for _, said in ends)
        assert [code for code, _ in ends] == [0, 0], said
        return ends[0][1]
