"""Nothing is lost, no traceback, no hang: damaged files, kills, full disks, folders of others.

    python bench/faults.py [--seed 0] [--short]         # ten minutes on two cores; --short: one

In a small world of its own, in a temporary folder, on the CPU. Four things are done:

* Every kind of file that is read (bench/readers.py) is damaged in many ways (bench/damage.py) and
  read. It must end in an InputError of one line, or in what the whole file gives. Where nothing can
  tell the change (a weight with another value) it is counted as "another value".
* Programs (bench/forked.py) are killed, with SIGKILL and Ctrl-C, at random moments of a run, of its
  saves, of the frozen pass and of an evaluation, several times each; then the same command is left
  alone, and its files must have the bytes of a run that never stopped.
* The disk is full (a tmpfs of a few kilobytes; without the right to mount, a limit on file sizes),
  then there is room, and the same command must end with the same bytes.
* The folder cannot be written (a tmpfs mounted read-only): one line.

What is not ours and lies beside all this must not be touched. Prints a line per phase, a table, and
every fault; exit code 1 if there is any.
"""
import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from glob import glob

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from bench.damage import copied, try_damages
from bench.forked import Kill, run_forked
from bench.readers import ASK, FORMATS, LORA, STAGE_2, make_sound
from support.common import Number, run_program

MEMORY = 4 << 30        # bytes that a reader may take
COLUMNS = ("what", "tried", "refused", "right", "another value", "faults")
FOREIGN = "somebody else's\n"
# What is killed → its command, which part of its moments, and the files that it leaves.
PROGRAMS = {
    "a run": ([*LORA, "--save_steps", "3", "--resume", "--output_dir", "out/one"], "",
              "out/one/*.safetensors"),
    "a save": ([*STAGE_2, "--save_steps", "1", "--resume", "--output_dir", "out/one"], "out/",
               "out/one/*.safetensors"),
    "the frozen pass": ([*STAGE_2, "--cache_features", "kept", "--output_dir", "out/one"], "kept",
                        "out/one/*.safetensors"),
    "an evaluation": ([*ASK, "--output_dir", "out/pope"], "", "out/pope/*.json*")}
CLONE_NEWNS = 0x20000


# ---- Kills ---------------------------------------------------------------------------------------


def put_foreign(*folders):
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/notes.txt", "w") as file:
            file.write(FOREIGN)


def foreign_is_intact(*folders):
    """"" or what is wrong."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError), open(f"{folder}/notes.txt") as file:
            if file.read() == FOREIGN:
                continue
        return f"{folder}/notes.txt is not what it was"
    return ""


def results(pattern):
    """{path: bytes} of what a program leaves."""
    found = {}
    for path in sorted(path for path in glob(pattern) if not path.endswith(".partial")):
        with open(path, "rb") as file:
            found[path] = file.read()
    return found


def kill_program(name, sound, rng, chains):
    """Chains of four kills, each with a run at its end that is left alone. A single chain is killed
    twice, in front of moments only, so that it is the same every time.
    """
    command, within, pattern = PROGRAMS[name]
    with copied(sound):
        counted = run_forked(command, Kill(0, within=within))
        whole = results(pattern)
    if counted.code or not whole:
        yield name, "undisturbed", "faults", counted.said[-300:]
        return
    for chain in range(chains):
        with copied(sound):
            put_foreign("out", ".", "kept")
            for number in (signal.SIGKILL, signal.SIGINT) * (2 if chains > 1 else 1):
                at = dict(moment=rng.randrange(1, counted.moments + 1), within=within)
                if chains > 1 and rng.random() < 0.4:
                    at = dict(seconds=counted.seconds * rng.random())
                ended = run_forked(command, Kill(number, **at))
                how = f"chain {chain}, {signal.Signals(number).name} {at}"
                allowed = (0, -9) if number == signal.SIGKILL else (0, 130)
                wrong = ended.fault or ended.code not in allowed and f"exit code {ended.code}: " \
                    f"{ended.said[-300:]}" or foreign_is_intact("out", ".", "kept")
                if wrong:
                    yield name, how, "faults", wrong
                elif ended.code:                    # else it had ended before
                    yield name, how, "right", ""
            ended = run_forked(command)
            wrong = ended.fault or ended.code and ended.said[-300:]
            if not wrong and results(pattern) != whole:
                wrong = "other bytes than the run that never stopped"
            yield (f"{name}: left alone", f"chain {chain}", "faults" if wrong else "right",
                   wrong or "")


# ---- Disks ---------------------------------------------------------------------------------------


def own_mounts():
    """Let this process mount what no other one sees → whether it may."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode


def mount(options, folder="out"):
    os.makedirs(folder, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def one_line(ended):
    """"" where a program ended with one line and exit code 1; else what is wrong."""
    last = ended.said.strip().rpartition("\n")[2].rpartition("\r")[2]
    if ended.fault or ended.code == 1 and last.startswith("error: "):
        return ended.fault
    return f"exit code {ended.code}: {ended.said[-300:]}"


def fill_disk(name, sound, rng, count):
    """A program on a disk that is too small at another place each time, then with room."""
    command, _, pattern = PROGRAMS[name]
    command = [word.replace("kept", "out/kept") if word == "kept" else word for word in command]
    mounts = own_mounts()
    with copied(sound):
        if mounts:
            mount("size=64m")
        ended = run_forked(command)
        whole, used = results(pattern), shutil.disk_usage("out").used if mounts else 0
        largest = max([len(content) for content in whole.values()] + [used], default=0)
        if mounts:
            subprocess.run(["umount", "out"], check=True)
    if ended.code or not whole:
        yield name, "undisturbed", "faults", ended.said[-300:]
        return
    for _ in range(count):
        with copied(sound):
            size = rng.randrange(8192, largest)
            if mounts:
                mount(f"size={size}")
                put_foreign("out")
                ended = run_forked(command)
                subprocess.run(["mount", "-o", "remount,size=64m", "out"], check=True)
            else:
                put_foreign("out")
                ended = run_forked(command, file_limit=size)
            how = f"{size:,} bytes" + ("" if mounts else " a file")
            wrong = ended.code and one_line(ended) or foreign_is_intact("out")
            column = "faults" if wrong else "refused" if ended.code else "right"
            yield f"full disk: {name}", how, column, wrong or ended.said[-200:]
            ended = run_forked(command)
            wrong = ended.fault or ended.code and ended.said[-300:]
            if not wrong and results(pattern) != whole:
                wrong = "other bytes than with room from the beginning"
            yield f"then with room: {name}", how, "faults" if wrong else "right", wrong or ""
            if mounts:
                subprocess.run(["umount", "out"], check=True)


def forbid_writing(name, sound, rng, count):
    """A folder that cannot be written, empty and with an interrupted run in it."""
    command = PROGRAMS[name][0]
    if not own_mounts():
        print(f"read-only: not tried ({name}): mounting is not allowed here", flush=True)
        return
    for begun in (False, True)[:count]:
        with copied(sound):
            mount("size=64m")
            put_foreign("out")
            if begun:
                run_forked(command, Kill(signal.SIGKILL, moment=20, within="out/"))
            subprocess.run(["mount", "-o", "remount,ro", "out"], check=True)
            ended = run_forked(command)
            wrong = one_line(ended) or foreign_is_intact("out")
            yield (f"read-only: {name}", f"begun: {begun}", "faults" if wrong else "refused",
                   wrong or ended.said[-200:])
            subprocess.run(["umount", "out"], check=True)


# ---- The campaign --------------------------------------------------------------------------------


def side_by_side(tasks, folder, workers):
    """Run tasks {name: generator of rows}, so many at a time, each in a process of its own.

    A row is in a file as soon as it is there, so a crash is known by the row before it.
    """
    waiting, running, rows = list(tasks), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            path = f"{folder}/{len(waiting)}.jsonl"
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                    with open(path, "w", buffering=1) as file:
                        for row in tasks[name]:
                            print(json.dumps(row), file=file)
                    code = 0
                except BaseException:
                    with open(path, "a") as file:
                        said = traceback.format_exc()[-600:]
                        print(json.dumps([name, "the campaign", "faults", said]), file=file)
                    code = 0
                finally:
                    os._exit(code)
            running[pid] = name, path, time.monotonic()
        pid, status = os.wait()
        name, path, began = running.pop(pid)
        with open(path) as file:
            found = [json.loads(line) for line in file]
        code = os.waitstatus_to_exitcode(status)
        if code:
            found.append([name, f"behind row {len(found)}", "faults", f"the process ended: {code}"])
        count = Counter(row[2] for row in found)
        print(f"{name}: {len(found)} in {time.monotonic() - began:.0f} s, "
              f"{count['faults']} faults", flush=True)
        rows += found
    return rows


def table(rows):
    """Rows → Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    kinds = list(dict.fromkeys(row[0] for row in rows))
    for name, chosen in [(name, [name]) for name in kinds] + [("**all**", kinds)]:
        mine = [row[2] for row in rows if row[0] in chosen]
        count = Counter(mine)
        cells = [name, len(mine), *(count[column] for column in COLUMNS[2:])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def campaign(args):
    """All phases → the rows."""
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None      # files are copied all the time
    def rng(name):
        return random.Random(f"{args.seed} {name}")

    with tempfile.TemporaryDirectory(dir=memory) as folder:
        sound, few, tasks = f"{folder}/sound", args.short, {}
        for name, kind in FORMATS.items():
            count = args.damages or (3 if few else 16 if kind.checked else 40)
            tasks[name] = try_damages((name, kind), sound, rng(name), count)
        for name in PROGRAMS:
            tasks[f"kills: {name}"] = kill_program(name, sound, rng(name), 1 if few else 5)
            tasks[f"full disk: {name}"] = fill_disk(name, sound, rng(name), 1 if few else 8)
            tasks[f"read-only: {name}"] = forbid_writing(name, sound, rng(name), 1 if few else 2)
        tasks = {name: task for name, task in tasks.items() if re.search(args.only, name)}

        began = time.monotonic()
        os.makedirs(sound)
        os.chdir(sound)
        pid = os.fork()                 # so that this process never computes, and can be forked
        if not pid:
            code = 1
            try:
                make_sound(tasks)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the world could not be made")
        os.chdir(folder)
        print(f"the world: {time.monotonic() - began:.0f} s", flush=True)
        return side_by_side(tasks, folder, args.workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seed", type=Number("--seed", int, low=0), default=0, help="another campaign")
    add("--short", action="store_true", help="a few of everything")
    add("--damages", type=Number("--damages", int, above=0), help="of every kind of file")
    add("--only", default="", help="phases whose name this regular expression finds")
    add("--workers", type=Number("--workers", int, above=0), default=2, help="phases at a time")
    rows = campaign(parser.parse_args())
    print("\n" + table(rows))
    faults = [row for row in rows if row[2] == "faults"]
    for name, how, _, said in faults:
        print(f"\nFAULT {name}, {how}:\n  {said}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    run_program(main)
