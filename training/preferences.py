"""Files of preference pairs that stay on disk.

    examples = read_preferences(["rlaif.jsonl", "mine.json"], "images")   # a sequence of Example
    examples[1234]                                                        # is read and parsed now

A file is a JSON list, a JSON object per line, or (where pyarrow is installed) parquet. What a row
means follows from its keys (pairs.py). Each row is read once at the start: whatever is wrong with
it is an InputError that names file and row, before anything is trained. After that memory holds
some 30 bytes of a row. Several files are one data set, in the order in which they are named.

SENTINEL's file is one object {image: [row, ...]}, and small; its rows stay in memory.
"""
import bisect
import functools
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from data import Example
from support.common import InputError, id_text, of_type, progress, read_json
from support.hadpo import read_image_index
from support.images import ImageInFile, below
from training.conversations import chunks_of_rows, parse_row
from training.pairs import picture_bytes, read_pair

TURN = 64       # tokens of the template around a turn, at most
HEAD = 2 ** 16  # characters from which a file of SENTINEL's form is known


def read_preferences(paths, image_folder):
    """Files of preference pairs → Preferences, a sequence of Example: [chosen, rejected]."""
    return Preferences([PreferenceFile(path, image_folder) for path in paths], image_folder)


class Preferences(Sequence):
    """The rows of several files, one behind the other."""

    def __init__(self, files, image_folder):
        self.files, self.image_folder = files, image_folder
        self.paths = [file.path for file in files]
        self.ends = np.cumsum([len(file) for file in files]).tolist()

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        n = bisect.bisect_right(self.ends, i)
        return self.files[n].example(i - (self.ends[n - 1] if n else 0))

    def sizes(self):
        """At most so many tokens of text each row has, and whether it has an image: (n,), (n,)."""
        return tuple(np.concatenate([getattr(file, name) for file in self.files])
                     for name in ("tokens", "has_image"))

    def image_paths(self):
        """Distinct images, without reading the rows again."""
        return list(dict.fromkeys(image for file in self.files for image in file.images))


class PreferenceFile:
    """One file. No file stays open, so DataLoader workers can be forked or get it pickled."""

    def __init__(self, path, image_folder):
        self.path, self.image_folder = path, image_folder
        if is_parquet(path):
            self.rows = ParquetRows(path)
        else:
            self.rows = RowsByImage(path, image_folder) if is_by_image(path) else JsonRows(path)
        tokens, has_image, images = [], [], {}
        for i, row in enumerate(self.rows.all()):
            example = self.made(read_pair(row, self.place(i)), i)
            words = [text for turns in example.conversations for turn in turns for text in turn]
            turns = sum(map(len, example.conversations))
            tokens.append(sum(len(text.encode()) for text in words) + TURN * turns)
            has_image.append(bool(example.image))
            if example.image:
                images[example.image] = None
        self.tokens, self.has_image = np.array(tokens, np.int64), np.array(has_image, bool)
        self.images = list(images)
        if not tokens:
            raise InputError(f"{path}: holds no rows; was the download cut short?")

    def __len__(self):
        return len(self.tokens)

    def place(self, i):
        return f"{self.path}, row {i}"

    def example(self, i):
        return self.made(read_pair(self.rows.row(i), self.place(i)), i)

    def made(self, pair, i):
        """A Pair → Example. Answers of earlier turns belong to the prompt."""
        image = pair.image and below(self.image_folder, pair.image, self.place(i))
        if pair.has_bytes:
            image = ImageInFile(self.place(i))
            image.read = functools.partial(picture, self.rows, i, self.place(i))
        return Example(image, pair.conversations(), len(pair.turns) - 1, pair.context)


def picture(rows, i, place):
    return picture_bytes(rows.row(i), place)


# ---- Rows ----------------------------------------------------------------------------------------


class JsonRows:
    """A list of JSON objects, indented or not, or one per line: read again by their places."""

    def __init__(self, path):
        self.path, self.spans = path, []

    def all(self):
        for text, position, found in chunks_of_rows(self.path):
            for begin, end in found.tolist():
                yield parse_row(text[begin:end], self.path, len(self.spans))
                self.spans.append((position + begin, position + end))
        self.spans = np.array(self.spans, np.int64).reshape(-1, 2)

    def row(self, i):
        begin, end = self.spans[i].tolist()
        with open(self.path, "rb", buffering=0) as file:
            return parse_row(os.pread(file.fileno(), end - begin, begin), self.path, i)


def is_by_image(path):
    """Whether a file is an object {image: [row, ...]} with SENTINEL's rows."""
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.read(HEAD)
    begins = re.match(r'\s*\{\s*"[^"]*"\s*:\s*\[\s*(?=\{)', head)
    try:
        row, _ = json.JSONDecoder().raw_decode(head, begins.end()) if begins else ({}, 0)
    except (ValueError, RecursionError):
        return False
    return "y_win" in row


class RowsByImage:
    """SENTINEL's file. An image is called by its path below `image_folder`, or by its number in the
    image_data.json that lies there: then the folder is Visual Genome's.
    """

    def __init__(self, path, image_folder):
        folder, names = image_folder or "", {}
        if os.path.isfile(os.path.join(folder, "image_data.json")):
            names = {number: os.path.relpath(found, folder)
                     for number, found in read_image_index(folder).items()}
        self.rows = []
        for image, rows in read_json(path, dict).items():
            place, name = f"{path}, image {image}", names.get(id_text(image), image)
            self.rows += [of_type(row, dict, place) | {"image": name}
                          for row in of_type(rows, list, place)]

    def all(self):
        return self.rows

    def row(self, i):
        return self.rows[i]


def is_parquet(path):
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


class ParquetRows:
    """Parquet. A row is read with its whole group, which is kept until another one is needed."""

    def __init__(self, path):
        self.path = path
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise InputError(f"{path}: is parquet, and pyarrow cannot be imported ({e}): pip "
                             "install pyarrow, or save the rows as JSON lines") from e
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(n).num_rows
                         for n in range(file.metadata.num_row_groups)]
        except (OSError, ValueError) as e:
            reason = str(e).partition("\n")[0]
            raise InputError(f"{path}: not readable as parquet ({reason}); was the download cut "
                             "short?") from e
        self.ends = np.cumsum(sizes, dtype=np.int64).tolist()

    def all(self):
        for n in progress(range(len(self.ends)), "reading rows", unit="group"):
            yield from group_of(self.path, n)

    def row(self, i):
        n = bisect.bisect_right(self.ends, i)
        return group_of(self.path, n)[i - (self.ends[n - 1] if n else 0)]


@functools.lru_cache(maxsize=2)
def group_of(path, n):
    """The rows of a group of a parquet file."""
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(n).to_pylist()
