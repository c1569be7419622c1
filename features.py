"""One frozen pass: what the trunk makes of every row, kept on disk and read back as batches.

In stages 1 and 2 nothing before the head is trained, so the trunk gives the same numbers in every epoch, at every
learning rate and for every ablation. `keep_features` runs it once over a PackedDataset; the KeptFeatures that it returns
stands in for the dataset: `kept[[3, 7]]` is the Batch that `dataset[[3, 7]]` would be after the trunk.

Of a row only the tokens that predict an answer token are kept (all of them when the block attends to the row itself), of
an image the features that the block reads. A folder belongs to one combination of base, data, preprocessing and kind of
features, named by a hash of these and told in its `key.json`; files are memory-mapped, each process writes its own rows,
and `done` is set for a row only behind its numbers, so that an interrupted pass goes on where it stopped. Where everything
is kept already, neither the trunk's weights nor any image are read. Images are known by their paths: with other pictures
under the same names the folder has to go.

The pass comes before the first epoch and not within it: it goes through the rows sorted by length, with equal work for every
process, serves all runs of a sweep, and costs 8 % more than that epoch would (7B, one H100: 0.020 s a pair, and 0.0016 s for a
step of training from what is kept).
"""
import glob
import hashlib
import json
import math
import os
import shutil
import zipfile
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import fill, write_json
from data import PADDING, Batch, batches_ahead, check_images, pad, spare_cores
from model import take
from readers import ConversationFile, InputError, image_paths, read_json

# What a folder depends on, and how we say that it is another.
KEY = {"base": "another base", "data": "other data", "rows": "rows of another prompt or length", "dtype": "another dtype",
       "preprocess": "another preprocessing", "features": "another kind of block", "whole_rows": "another kind of block"}
FIELDS = ("position", "branch", "source", "target", "target_branch")      # of a Row; the first two per kept token


class KeptFeatures(torch.utils.data.Dataset):
    """Batches from kept features. `rows`: {field: (values of all rows end to end, offsets)}."""

    def __init__(self, folder, rows, image_index, num_images, hidden_size, feature_shape, dtype):
        self.rows, self.image_index = rows, image_index
        files = {"done": ((len(image_index),), torch.uint8), "hidden": ((int(rows["position"][1][-1]), hidden_size), dtype),
                 "features": ((num_images, *feature_shape), dtype)}
        paths = {name: os.path.join(folder, f"{name}.bin") for name in files}
        there = {name: os.path.getsize(path) if os.path.exists(path) else 0 for name, path in paths.items()}
        sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in files.items()}
        for name, size in sizes.items():
            if there[name] != size and (there[name] or there["done"]):      # `done` is made last, when the others are whole
                raise InputError(f"{paths[name]}: has {there[name]:,} bytes and should have {size:,}; it was cut or changed: "
                                 f"remove {folder}")
        needed, free = sum(sizes.values()) - sum(there.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{folder}: needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left; name another "
                             "folder with --cache_features")

        def mapped(name):
            shape, kind = files[name]
            return torch.from_file(paths[name], shared=True, size=math.prod(shape), dtype=kind).view(shape)

        self.hidden, self.features, self.done = mapped("hidden"), mapped("features"), mapped("done")

    def __len__(self):
        return len(self.image_index)

    def lengths(self):
        """How many tokens are kept of each row, (n,)."""
        return np.diff(self.rows["position"][1])

    def _padded(self, name, indices):
        values, offsets = self.rows[name]
        start, length = offsets[indices], offsets[indices + 1] - offsets[indices]
        at = start[:, None] + np.arange(length.max())                                       # (B, longest)
        real = np.arange(length.max()) < length[:, None]
        return np.where(real, values[np.where(real, at, 0)], PADDING[name]), at, real

    def __getitem__(self, indices):
        indices = np.asarray(indices)
        padded = {name: self._padded(name, indices) for name in FIELDS}
        batch = Batch(**{name: torch.from_numpy(values.astype(np.int64)) for name, (values, _, _) in padded.items()})
        _, at, real = padded["position"]
        at, (images, index) = np.where(real, at, 0), np.unique(self.image_index[indices], return_inverse=True)
        # index_select copies whole rows: less than half the time of [...], which copies number by number.
        batch.hidden = self.hidden.index_select(0, torch.from_numpy(at.ravel())).view(*at.shape, -1)        # (B, K, hidden)
        batch.features = self.features.index_select(0, torch.from_numpy(images[images >= 0]))              # (N, P, C)
        batch.image_index = torch.from_numpy(index - (images < 0).sum())                    # a missing image stays -1
        return batch


def kept_tokens(row, whole):
    """Row → indices of the tokens to keep, and `source` counted among them."""
    tokens = np.arange(len(row.position)) if whole else np.unique(row.source)
    return tokens, np.searchsorted(tokens, row.source)


def pack_rows(path, dataset, whole, quiet):
    """What is kept of every row beside the numbers of the trunk: {field: (values end to end, offsets)}, written to `path`.

    "token" is where the kept tokens stand in the whole row, "image" is one number a row, -1 = none.
    """
    if not os.path.isfile(path):
        flat, images = {name: [] for name in (*FIELDS, "token", "image")}, {}
        for i in tqdm(range(len(dataset)), "packing rows", unit="row", leave=False, disable=quiet, mininterval=1):
            row = dataset.row(i)
            tokens, source = kept_tokens(row, whole)
            image = images.setdefault(row.image, len(images)) if row.image else -1
            for name, values in {"position": np.array(row.position)[tokens], "branch": np.array(row.branch)[tokens], "source": source,
                                 "target": row.target, "target_branch": row.target_branch, "token": tokens, "image": [image]}.items():
                flat[name].append(np.asarray(values, dtype=np.int32))
        arrays = {name: np.concatenate(values) for name, values in flat.items()}
        arrays |= {f"{name}_offsets": np.cumsum([0] + [len(x) for x in values]) for name, values in flat.items()}
        partial = f"{path}.{os.getpid()}.partial.npz"
        np.savez(partial, **arrays)
        os.replace(partial, path)
    try:
        with np.load(path) as file:
            rows = {name: (file[name], file[f"{name}_offsets"]) for name in (*FIELDS, "token", "image")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise InputError(f"{path}: cannot be read ({e}); it was cut or changed: remove {os.path.dirname(path)}")
    if len(rows["image"][0]) != len(dataset):
        raise InputError(f"{path}: tells of {len(rows['image'][0]):,} rows and the data have {len(dataset):,}; it was changed: "
                         f"remove {os.path.dirname(path)}")
    return rows


def key_of(dataset, trunk, block, base):
    """What kept features depend on: a value for each of KEY."""
    data = hashlib.sha256(file_digest(dataset.tokenizer.path).encode())
    if isinstance(dataset.examples, ConversationFile):
        data.update(f"{file_digest(dataset.examples.path)}{dataset.examples.image_folder}".encode())
    else:
        for example in dataset.examples:
            data.update(f"{example.image}{example.conversations}".encode())
    return {"base": base, "data": data.hexdigest(), "rows": [dataset.system, dataset.num_patches, dataset.max_length],
            "preprocess": asdict(dataset.preprocess), "features": block.image_source if block else "clip",
            "whole_rows": block is not None and block.attention == "self", "dtype": str(next(trunk.parameters()).dtype)}


def folder_of(root, key, quiet):
    """The folder below `root` that belongs to a key. A changed one is refused; why others are of no use is said."""
    text = json.dumps(key, sort_keys=True)
    folder, key = os.path.join(root, hashlib.sha256(text.encode()).hexdigest()[:12]), json.loads(text)
    begun = os.path.exists(os.path.join(folder, "done.bin"))
    keys = {path: read_json(path, dict) for path in glob.glob(os.path.join(glob.escape(root), "*", "key.json"))}
    unlike = {path: [words for name, words in KEY.items() if other.get(name) != key[name]] for path, other in keys.items()}
    path = os.path.join(folder, "key.json")
    if unlike.get(path) or begun and path not in keys:
        wrong = f"says that {folder} is for {listed(unlike[path])}" if path in keys else "is missing"
        raise InputError(f"{path}: {wrong}, so what lies there cannot be trusted: remove {folder}")
    if keys and path not in keys and not quiet:
        nearest = min(unlike.values(), key=len)
        print(f"{root}: what is kept there is for {listed(nearest)}; so one frozen pass comes first", flush=True)
    return folder


def listed(words):
    return " and ".join(dict.fromkeys(words))


def keep_features(folder, dataset, trunk, block, base, batch_size, rank=0, world_size=1):
    """Run the trunk over all rows that are not kept yet → KeptFeatures. `base`: the trunk's fingerprint.

    A trunk that is still in its files (checkpoint.py) is read when a row is missing, else it stays there.
    """
    key, text, vision = key_of(dataset, trunk, block, base), trunk.config.text, trunk.config.vision
    folder = folder_of(folder, key, rank != 0)
    path = os.path.join(folder, "done.bin")
    done = np.fromfile(path, bool)[:len(dataset)] if os.path.isfile(path) else np.zeros(0, bool)
    check_images(image_paths([dataset.examples[i] for i in np.flatnonzero(~done)] if done.any() else dataset.examples))
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "key.json"), key)           # before all others, by whichever process is first
    rows = pack_rows(os.path.join(folder, "rows.npz"), dataset, key["whole_rows"], rank != 0)
    image_index, (tokens, offsets), dtype = rows["image"][0], rows["token"], next(trunk.parameters()).dtype
    shape = (vision.num_patches, vision.hidden_size if key["features"] == "clip" else text.hidden_size)
    kept = KeptFeatures(folder, rows, image_index, int(image_index.max()) + 1, text.hidden_size, shape, dtype)
    kept.examples = dataset.examples
    missing = sorted((kept.done == 0).nonzero().flatten().tolist(), key=dataset.lengths().__getitem__)
    batches = [missing[start:start + batch_size] for start in range(rank * batch_size, len(missing), batch_size * world_size)]
    if world_size > 1:
        dist.barrier()              # all have seen what is missing; from here on it gets less
    if batches:
        run_trunk(kept, dataset, batches, fill(trunk), block, tokens, offsets, rank)
    if world_size > 1:
        dist.barrier()
    return kept


def run_trunk(kept, dataset, batches, trunk, block, tokens, offsets, rank):
    """The pass itself, over this process's share: lists of rows."""
    parameter, image_index, loader = next(trunk.parameters()), kept.image_index, batches_ahead(dataset, batches, spare_cores())
    for indices, batch in zip(batches, tqdm(loader, "one frozen pass", unit="batch", leave=False, disable=rank != 0)):
        batch = batch.to(parameter.device, parameter.dtype)
        at = pad([tokens[offsets[i]:offsets[i + 1]] for i in indices], 0).to(parameter.device)      # (B, K)
        with torch.inference_mode():
            hidden, features = trunk(batch)
            hidden, features = take(hidden, at).cpu(), trunk.image_context(block, features)
            features = None if features is None else features.cpu()
        for n, i in enumerate(indices):
            kept.hidden[offsets[i]:offsets[i + 1]] = hidden[n, :offsets[i + 1] - offsets[i]]
            if image_index[i] >= 0:
                kept.features[image_index[i]] = features[batch.image_index[n]]
        kept.done[indices] = 1


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
