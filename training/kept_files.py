"""Kept features on disk: what a frozen trunk made of every row, in a few large files.

    rows = pack_rows("rows.npz", dataset, whole=False)                # all but the trunk's numbers
    files = kept_files(folder, rows, hidden_size, (576, 1024), dtype)    # their space is reserved
    files["hidden"].write(start, hidden_states)
    batch = KeptFeatures(files, rows, examples)[[3, 7]]                  # as PackedDataset gives it

`hidden.bin` holds the hidden states of the kept tokens, `features.bin` the image features,
`sums.bin` a checksum a row and a checksum an image, 0 until it is kept, `rows.npz` everything that
is no number of the trunk. Files are written in place and read through a memory map, so a run can
train on more rows than memory holds. A row is compared with its checksum when it is read first.
"""
import math
import os
import shutil
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from data import PADDING, Batch
from support.anyres import numbered_tiles
from support.common import InputError, progress, temporary

# Of a Row; the first two per kept token.
FIELDS = ("position", "branch", "source", "target", "target_branch")


def kept_tokens(row, whole):
    """Row → indices of the tokens to keep, and `source` counted among them."""
    tokens = np.arange(len(row.position)) if whole else np.unique(row.source)
    return tokens, np.searchsorted(tokens, row.source)


def pack_rows(path, dataset, whole):
    """What is kept of every row beside the trunk's numbers → {field: (values end to end, offsets)}.

    "token" is where the kept tokens stand in the whole row, "image" is one number a row, -1 = none.
    """
    if not os.path.exists(path):
        write_packed_rows(path, dataset, whole)
    return read_packed_rows(path, len(dataset))


def write_packed_rows(path, dataset, whole):
    names, images, tiles = (*FIELDS, "token", "image"), {}, {}
    flat = {name: [] for name in names}
    for i in progress(range(len(dataset)), "packing rows", unit="row"):
        row = dataset.row(i)
        tokens, source = kept_tokens(row, whole)
        image = images.setdefault(row.image, len(images)) if row.image else -1
        if row.tiles > 1:
            tiles[image] = row.tiles
        values = (np.array(row.position)[tokens], np.array(row.branch)[tokens], source, row.target,
                  row.target_branch, tokens, [image])
        for name, value in zip(names, values, strict=True):
            flat[name].append(np.asarray(value, dtype=np.int32))
    arrays = {name: np.concatenate(values) for name, values in flat.items()}
    arrays |= {f"{name}_offsets": np.cumsum([0] + [len(x) for x in values])
               for name, values in flat.items()}
    if tiles:                   # any resolution: how many of them each image has
        arrays["tiles"] = np.array([tiles[image] for image in range(len(images))])
    partial = temporary(path) + ".npz"
    try:
        np.savez(partial, **arrays)
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); make room there, or name "
                         "another folder with --cache_features") from e


def read_packed_rows(path, count):
    folder = os.path.dirname(path)
    try:
        with np.load(path) as file:
            rows = {name: (file[name], file[f"{name}_offsets"])
                    for name in (*FIELDS, "token", "image")}
            images = int(rows["image"][0].max()) + 1
            tiles = file["tiles"] if "tiles" in file else np.ones(images, int)
    except Exception as e:      # a damaged file may raise anything
        raise InputError(f"{path}: cannot be read ({e}); it was cut or changed: remove "
                         f"{folder}") from e
    if len(rows["image"][0]) != count:
        raise InputError(f"{path}: tells of {len(rows['image'][0]):,} rows and the data have "
                         f"{count:,}; it was changed: remove {folder}")
    rows["tiles"] = tiles, np.cumsum([0, *tiles])
    return rows


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def checksum(tensor):
    """(1,) int64, never 0."""
    return torch.tensor([zlib.crc32(as_bytes(tensor)) + 1])


@dataclass
class KeptFile:
    """One file of numbers: `shape` rows of `dtype`, written and read in place."""
    path: str
    shape: tuple
    dtype: torch.dtype

    @property
    def row_bytes(self):
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self):
        return self.shape[0] * self.row_bytes

    def size(self):
        """Bytes that are there already."""
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def reserve(self):
        """Take the space on the disk now: a full disk would end a pass in its middle."""
        with open(self.path, "ab") as file:
            if self.bytes:
                os.posix_fallocate(file.fileno(), 0, self.bytes)

    def write(self, start, rows):
        """Write rows (n, ...) from row `start` on; a NumPy number would overflow behind 2 GiB."""
        with open(self.path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), as_bytes(rows), int(start) * self.row_bytes)

    def flush(self):
        """To the disk, so that other machines read it there."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def mapped(self):
        """The numbers, read when they are looked at."""
        if not self.bytes:
            return torch.zeros(self.shape, dtype=self.dtype)
        return torch.from_file(self.path, shared=False, size=math.prod(self.shape),
                               dtype=self.dtype).view(self.shape)


def kept_files(folder, rows, hidden_size, feature_shape, dtype):
    """The files of a folder → {name: KeptFile}, made ready: whole, and their space reserved."""
    image_index = rows["image"][0]
    shapes = {"hidden": ((int(rows["position"][1][-1]), hidden_size), dtype),
              "features": ((int(rows["tiles"][1][-1]), *feature_shape), dtype),
              "sums": ((len(image_index) + int(image_index.max()) + 1,), torch.int64)}
    files = {name: KeptFile(os.path.join(folder, f"{name}.bin"), *shape)
             for name, shape in shapes.items()}
    begun = files["sums"].size() > 0        # it is made last, when the space of the others is there
    for file in files.values():
        if file.size() > file.bytes or begun and file.size() != file.bytes:
            raise InputError(f"{file.path}: has {file.size():,} bytes and should have "
                             f"{file.bytes:,}; it was cut or changed: remove {folder}")
    missing = [file for file in files.values() if file.size() < file.bytes]
    needed = sum(file.bytes - file.size() for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} "
                         "GB left; name another folder with --cache_features")
    try:
        for file in missing:
            file.reserve()
    except OSError as e:
        raise InputError(f"{folder}: {needed / 1e9:.1f} GB cannot be reserved there "
                         f"({e.strerror}); name another folder with --cache_features") from e
    return files


class KeptFeatures(torch.utils.data.Dataset):
    """Batches from kept features. `rows`: {field: (values of all rows end to end, offsets)}."""

    def __init__(self, files, rows, examples):
        self.files, self.rows, self.examples = files, rows, examples
        self.image_index, self.first_tile = rows["image"][0], rows["tiles"][1]
        self.checked = np.zeros(len(self.image_index) + int(self.image_index.max()) + 1, bool)
        self.map_files()

    def map_files(self):
        self.sums = self.files["sums"].mapped()
        self.hidden_states = self.files["hidden"].mapped()
        self.image_features = self.files["features"].mapped()

    def __getstate__(self):
        # A worker that was not forked maps the files itself.
        return {name: value for name, value in self.__dict__.items()
                if name not in ("sums", "hidden_states", "image_features")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.map_files()

    def __len__(self):
        return len(self.image_index)

    def lengths(self):
        """How many tokens are kept of each row, (n,)."""
        return np.diff(self.rows["position"][1])

    def check(self, indices):
        """InputError where a row, or its image, is not what was kept. Each is looked at once."""
        offsets, count = self.rows["position"][1], len(self)
        images = self.image_index[indices]
        for n in {*indices.tolist(), *(count + images[images >= 0]).tolist()}:
            if self.checked[n]:
                continue
            if n < count:
                file, part = "hidden", self.hidden_states[offsets[n]:offsets[n + 1]]
            else:
                start, end = self.first_tile[n - count:n - count + 2]
                file, part = "features", self.image_features[start:end]
            if checksum(part) != self.sums[n]:
                path = self.files[file].path
                raise InputError(f"{path}: does not hold what was kept there; it was damaged or "
                                 f"changed: remove {os.path.dirname(path)}")
            self.checked[n] = True

    def _padded(self, name, indices):
        values, offsets = self.rows[name]
        start, length = offsets[indices], offsets[indices + 1] - offsets[indices]
        at = start[:, None] + np.arange(length.max())                                 # (B, longest)
        real = np.arange(length.max()) < length[:, None]
        return np.where(real, values[np.where(real, at, 0)], PADDING[name][0]), at, real

    def __getitem__(self, indices):
        indices = np.asarray(indices)
        self.check(indices)
        padded = {name: self._padded(name, indices) for name in FIELDS}
        batch = Batch(**{name: torch.from_numpy(values.astype(np.int64))
                         for name, (values, _, _) in padded.items()})
        _, at, real = padded["position"]
        at = torch.from_numpy(np.where(real, at, 0))                                        # (B, K)
        images, index = np.unique(self.image_index[indices], return_inverse=True)
        missing = (images < 0).sum()
        # index_select copies whole rows: less than half the time of [...], which copies number by
        # number.
        flat = self.hidden_states.index_select(0, at.flatten())
        batch.hidden_states = flat.view(*at.shape, -1)                              # (B, K, hidden)
        images = images[images >= 0]
        counts = self.rows["tiles"][0][images]
        there = [np.arange(self.first_tile[i], self.first_tile[i + 1]) for i in images]
        there = torch.from_numpy(np.concatenate([np.zeros(0, int), *there]))
        batch.image_features = self.image_features.index_select(0, there)                # (N, P, C)
        if (counts > 1).any():
            batch.tiles = torch.from_numpy(numbered_tiles(counts))
        batch.image_index = torch.from_numpy(index - missing)        # a missing image stays -1
        return batch
