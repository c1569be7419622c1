"""A forked program is the one that was typed: what it is given, what it says, and how it ends.

Every small program below runs in a fresh interpreter and in a forked one, and both must do the
same.
"""
import json
import re
import signal

import pytest
from programs import ROOT, Begun, shell

ENDS = {  # a program → its exit code
    "print('well')": 0,
    "import sys; print('out'); print('err', file=sys.stderr); sys.exit(2)": 2,
    "import sys; sys.exit('a text')": 1,
    "import sys; sys.exit()": 0,
    "import sys; sys.exit(300)": 300 & 0xff,
    "print('before'); 1 / 0": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "import os; os.abort()": -signal.SIGABRT,
    "import os; os._exit(7)": 7,
    "import atexit; atexit.register(print, 'at the end'); 1 / 0": 1,
    "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(1), print('late'))).start()": 0,
    "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)": 0,
    "import signal; signal.raise_signal(signal.SIGINT)": -signal.SIGINT,
    "import sys; print(sys.stdin.read().upper(), end='')": 0,
}
SHOWN = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), sys.path, __name__, __file__]))
"""
# What it finds, and what it leaves behind for the next one to find.
LEAVES = """
import numpy, os, random, signal, sys, threading, torch
found = (os.environ.get("LEFT"), sys.path[-1], hasattr(torch, "left"), "train" in sys.modules,
         torch.get_default_dtype(), torch.is_grad_enabled(),
         torch.get_num_threads(), os.getcwd(), os.umask(0), threading.active_count(),
         signal.getsignal(signal.SIGTERM), sorted(os.listdir("/proc/self/fd")))
print(found)
print(torch.initial_seed(), random.random(), numpy.random.random(), file=sys.stderr)
import train
os.environ["LEFT"], torch.left = "here", True
sys.path.append("left")
torch.set_default_dtype(torch.float64)
torch.manual_seed(7)
torch.set_grad_enabled(False)
torch.set_num_threads(2)
os.chdir("/")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
opened = [open(os.devnull) for _ in range(5)]
"""


def both(tmp_path, program, *rest, **options):
    """A program in a fresh interpreter and in a forked one → what each did."""
    (tmp_path / "program.py").write_text(program)
    return [shell("python", tmp_path / "program.py", *rest, fresh=fresh, **options)
            for fresh in (True, False)]


def own_lines(text):
    """Of a traceback only what is about the program: the fork server's own lines stand above."""
    return re.sub(r'(?s)(Traceback [^\n]*\n).*?(?=  File "[^"]*program.py")', r"\1", text)


@pytest.mark.parametrize("program", ENDS)
def test_every_end_is_the_true_one(tmp_path, program):
    fresh, forked = both(tmp_path, program, typed=b"two\nlines\n")
    print(fresh, forked)
    assert forked.returncode == fresh.returncode == ENDS[program]
    assert forked.stdout == fresh.stdout
    assert own_lines(forked.stderr) == own_lines(fresh.stderr)


@pytest.mark.parametrize("command", (["program.py"], ["-m", "program"], ["SCRIPT"]), ids=str)
def test_it_gets_what_it_is_given(tmp_path, monkeypatch, command):
    """argv, folder, environment, sys.path: from inside the folder and from another one."""
    monkeypatch.setenv("RANK", "5")                                 # of a launcher: not passed on
    (tmp_path / "program.py").write_text(SHOWN)
    more = {"PYTHONPATH": "beside:/elsewhere"} if "SCRIPT" in command else {}
    cwd = ROOT if more else tmp_path
    command = [word.replace("SCRIPT", f"{tmp_path}/program.py") for word in command]
    fresh, forked = (json.loads(shell("python", *command, "two words", 3, "", "ü", cwd=cwd,
                                      fresh=fresh, MASTER_PORT="1", ODD="a=b\nc", **more).stdout)
                     for fresh in (True, False))
    assert forked[0][1:] == ["two words", "3", "", "ü"] and forked[1] == str(cwd)
    assert forked[2]["ODD"] == "a=b\nc" and "RANK" not in forked[2]
    for name in set(fresh[2]) ^ set(forked[2]):
        assert name == "LC_CTYPE", name             # that Python itself sets at its start
    assert forked == fresh[:2] + [forked[2]] + fresh[3:]


def test_nothing_is_left_for_the_next(tmp_path):
    fresh, forked = both(tmp_path, LEAVES, cwd=tmp_path, PYTHONPATH=ROOT)
    again = shell("python", tmp_path / "program.py", cwd=tmp_path, PYTHONPATH=ROOT)
    print(fresh.stdout, forked.stdout, again.stdout, again.stderr)
    assert fresh.returncode == forked.returncode == again.returncode == 0
    assert fresh.stdout == forked.stdout == again.stdout != ""
    seeds = [done.stderr.splitlines()[0].split() for done in (forked, again)]
    assert len(seeds[0]) == 3 and not set(seeds[0]) & set(seeds[1])     # each draws its own


def test_what_is_killed_from_outside(tmp_path):
    """Its pid is the program's own; what it said before is there."""
    (tmp_path / "program.py").write_text(
        "import os, sys, time; sys.stdout.reconfigure(errors='replace'); print(os.getpid(), "
        "flush=True); time.sleep(100)")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = Begun(tmp_path / "program.py", cwd=tmp_path)
        assert process.output.readline() == f"{process.pid}\n" and process.poll() is None
        process.send_signal(number)
        said = process.end()
        assert process.returncode == process.poll() == -number
        assert ("KeyboardInterrupt" in said) is (number == signal.SIGINT)
