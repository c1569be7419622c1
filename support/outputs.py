"""What programs leave: tested before long work, whole under its name, and kept while it grows.

    check_output_folder("out/stage1/pope", "--output_dir")      # before long work; makes nothing
    check_output_file("report.html", flag)                      # `flag`: what the user typed
    write_text("report.html", page)                             # the whole file or the one before
    log = Lines("chat.jsonl")
    log.add({"role": "user"})                                   # now it is in the file

    journal = Journal("out/stage1/pope", identity)              # answers that took long
    before = journal.read()                                     # what an interrupted run has left
    journal.add({"image": image, "answers": texts})
    journal.remove()                                            # when the results are written
"""
import contextlib
import glob
import hashlib
import json
import os
import sys
import zlib

import torch.distributed as dist

from support.common import InputError, check_file
from support.folders import check_can_write, temporary

# ---- Before long work ----------------------------------------------------------------------------


def check_output_folder(folder, flag):
    """InputError if nothing can be written into `folder`. It need not exist yet and is not made."""
    place = os.path.realpath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise InputError(f"{flag} {folder}: {place} is a file, where a folder would be; name "
                         "another folder")
    try:
        check_can_write(place)
    except InputError as e:
        raise InputError(f"{flag} {folder}: {e}") from e


def check_output_file(path, flag):
    """InputError if the file `path` cannot be written into a folder that exists."""
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise InputError(f"{flag} {path}: is a folder or lies in none; name a file in a folder "
                         "that exists")
    if is_plain(path):
        check_output_folder(folder, flag)


def is_plain(path):
    """Whether `path` is a file or still nothing; a pipe or a device is neither."""
    return os.path.isfile(path) or not os.path.exists(path)


# ---- Whole files ---------------------------------------------------------------------------------


def write_text(path, text):
    """Write a file. A kill at any moment leaves the file before or the new one, never a part.

    A symlink is followed. A pipe or a device cannot be replaced and is written directly.
    """
    real = os.path.realpath(path)
    partial = temporary(real) if is_plain(path) else path
    try:
        # Half a character (JSON can say it, UTF-8 cannot) stays the escape that it was in JSON.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        if partial != path:
            os.replace(partial, real)
    except OSError as e:
        if partial != path:
            with contextlib.suppress(OSError):
                os.remove(partial)
        raise InputError(f"{path}: cannot be written ({e.strerror}); make room there, or name "
                         "another path") from e


def write_value(path, value):
    """The same of a value, as JSON to be read by people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path, rows):
    """The same of rows, a JSON row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- Files that grow -----------------------------------------------------------------------------


class Lines:
    """A file of JSON lines. Each is in the file when `add` returns, so a kill cannot lose it.

    `cure` is what an error tells the user to do.
    """

    def __init__(self, path, cure="make room there, or name another file"):
        self.path, self.cure = path, cure
        try:
            self.file = open(path, "a+b", buffering=0)
            if self.file.seekable() and self.file.tell():
                self.file.seek(-1, os.SEEK_END)
                if self.file.read(1) != b"\n":
                    self.file.write(b"\n")          # a kill cut the last line short
        except OSError as e:
            raise self.error(e) from e

    def error(self, e):
        return InputError(f"{self.path}: cannot be written ({e.strerror}); {self.cure}")

    def add(self, value):
        text = json.dumps(value, ensure_ascii=False) + "\n"
        data = text.encode("utf-8", "backslashreplace")             # as in write_text
        try:
            while data:
                data = data[self.file.write(data):]
        except OSError as e:
            raise self.error(e) from e

    def close(self):
        self.file.close()


def digest(value):
    """Sixteen hex digits of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def gathered(value):
    """What every process has, in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checksum(row):
    return zlib.crc32(json.dumps(row).encode())


class Journal:
    """Answers of long work, on disk as soon as they are there, until its results are written.

    `identity` (a dict) says what is asked of whom. It is the first line of the file and a part of
    its name, so other work in the same folder has other journals. Each process has its own file,
    and reads the files of all. A line that a kill cut short is left out, and so is a damaged one:
    it is asked again.
    """

    def __init__(self, folder, identity, rank=0):
        self.folder, self.identity, self.rank = folder, {"unfinished": identity}, rank
        self.stem = os.path.join(folder, f"unfinished-{digest(identity)}")
        self.lines = None

    def files(self):
        return sorted(glob.glob(glob.escape(self.stem) + ".*.jsonl"))

    def read(self):
        """All rows of this identity that are kept."""
        kept = []
        for path in self.files():
            check_file(path)
            with open(path, "rb") as file:
                lines = [parsed(line) for line in file]
            if self.identity in lines:
                kept += [line["row"] for line in lines
                         if "row" in line and line.get("crc32") == checksum(line["row"])]
        return kept

    def add(self, row):
        if self.lines is None:
            check_can_write(self.folder)
            self.lines = Lines(f"{self.stem}.{self.rank}.jsonl", "make room there; what was "
                               "answered is kept, and the same command goes on")
            self.lines.add(self.identity)
        self.lines.add({"crc32": checksum(row), "row": row})

    def remove(self):
        """The results are written: the files of all processes go."""
        if self.lines:
            self.lines.close()
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    @contextlib.contextmanager
    def kept_on_interrupt(self, total, unit):
        """Ctrl-C inside of this block ends the program with a line that says what is kept."""
        try:
            yield
        except KeyboardInterrupt:
            if self.rank == 0:
                print(f"\ninterrupted: the answers about {len(self.read())} of {total} {unit} are "
                      f"kept in {self.folder}; the same command goes on from there",
                      file=sys.stderr)
            sys.exit(130)


def parsed(line):
    """The object of a JSON line; an empty one where the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
