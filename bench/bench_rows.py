"""How long conversations take until the first row is there, and how much memory they hold.

    python bench/bench_rows.py [--rows 100 10000 1000000] [--kilobytes 0.3 1.5] [--folder /tmp]

Writes LLaVA's conversation JSON of so many rows of so many kilobytes, three rows an image as in
LLaVA's own file, every tenth row without an image. Then it opens each file in a process of its own:
`read_llava`, the first and the last row, the check that every image is there. Beside it stands, up
to 200,000 rows (--peer_all: always), what LLaVA does: `json.load` of the whole file.

Prints a Markdown table. Memory is the highest resident (VmHWM) without what the process had before.
The files have just been written, so they come from the page cache where that is large enough; the
time to only read them is given too. CPU is the processor time up to the first row, which says more
than the clock where cores are shared. Images are links to small files.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from PIL import Image

from bench.bench_load import memory
from support.images import check_images
from training.conversations import image_paths, read_llava

WORDS = ('a the man woman dog "sign" stands near red car with umbrella street {left} and '
         '35\u00b0 back\\slash of photo\n').split(" ")
PEER_ROWS = 200_000
FOLDER = 1000       # rows whose images share a folder
COLUMNS = ("rows", "file", "only read", "first row", "CPU", "images checked", "extra memory",
           "json.load", "its extra memory")


# ---- The files -----------------------------------------------------------------------------------


def image_name(n):
    """Image of row n, one in three rows; a tenth of the rows has none."""
    return None if n % 10 == 9 else f"{n // FOLDER:05d}/{n // 3:09d}.png"


def write_rows(path, rows, kilobytes):
    """A list of rows in LLaVA's layout, about `kilobytes` each: 500 different conversations, again
    and again.
    """
    rng = random.Random(0)

    def words(length):
        count = max(1, int(length / 5.7))
        return "".join(word + " " for word in rng.choices(WORDS, k=count))[:-1]

    turns = 2 if kilobytes < 1 else 8
    each = max(10, (1000 * kilobytes - 60) / turns - 34)
    said = [[words(each) for _ in range(turns)] for _ in range(500)]
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for n in range(rows):
            image, row, (first, *others) = image_name(n), {"id": f"{n:09d}"}, said[n % 500]
            if image:
                row["image"] = image
                first = "<image>\n" + first
            row["conversations"] = [{"from": "gpt" if t % 2 else "human", "value": text}
                                    for t, text in enumerate([first, *others])]
            file.write((",\n" if n else "") + json.dumps(row, ensure_ascii=False))
        file.write("]")


def write_images(folder, rows):
    """One small image under every name. A file may have only so many names, so there are several.
    """
    source = None
    for n, name in enumerate(sorted({image_name(n) for n in range(rows)} - {None})):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if n % 30_000 == 0:
            Image.new("RGB", (8, 8)).save(path)
            source = path
        else:
            os.link(source, path)


# ---- What is measured ----------------------------------------------------------------------------


def measure(how, path, image_folder):
    """What the measured process does → one line of JSON."""
    before, began, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    if how == "read":
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(2 ** 20)
            while file.readinto(buffer):
                pass
        count = None
    elif how == "peer":
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        count = len(rows)
    else:
        examples = read_llava(path, image_folder)
        count = len(examples)
        assert examples[0].conversations and examples[count - 1].conversations
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    began = time.perf_counter()
    if how == "ours":
        check_images(image_paths(examples))
    checked = time.perf_counter() - began
    print(json.dumps({"rows": count, "seconds": seconds, "cpu": cpu, "checked": checked,
                      "extra": memory("VmHWM") - before}))


def in_its_own_process(how, path, folder):
    command = [sys.executable, os.path.abspath(__file__), "--measure", how, path, folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def line_of(path, folder, rows, with_peer):
    """One file, measured → a line of the table."""
    read, ours = (in_its_own_process(how, path, folder) for how in ("read", "ours"))
    assert ours["rows"] == rows
    cells = [f"{rows:,}", f"{os.path.getsize(path) / 1e6:,.1f} MB", f"{read['seconds']:.2f} s",
             f"{ours['seconds']:.2f} s", f"{ours['cpu']:.2f} s", f"+ {ours['checked']:.2f} s",
             f"{ours['extra'] / 1e6:,.0f} MB", "not run", ""]
    if with_peer:
        peer = in_its_own_process("peer", path, folder)
        assert peer["rows"] == rows
        cells[-2:] = f"{peer['seconds']:.2f} s", f"{peer['extra'] / 1e6:,.0f} MB"
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+",
                        default=[100, 10_000, 1_000_000, 2_000_000])
    parser.add_argument("--kilobytes", type=float, nargs="+", default=[0.3, 1.5], help="of a row")
    parser.add_argument("--peer_all", action="store_true",
                        help=f"json.load also above {PEER_ROWS:,} rows (needs 4 to 5 times the "
                             "file's size)")
    parser.add_argument("--folder", help="where the files are written for a while; default: the "
                                         "system's temporary folder")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_images(folder, max(args.rows))
        for kilobytes in args.kilobytes:
            for rows in args.rows:
                path = os.path.join(folder, "talk.json")
                write_rows(path, rows, kilobytes)
                with_peer = rows <= PEER_ROWS or args.peer_all
                print(line_of(path, folder, rows, with_peer), flush=True)


if __name__ == "__main__":
    main()
