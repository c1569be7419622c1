"""One frozen pass: what the trunk makes of every row, kept on disk and read back as batches.

In stages 1 and 2 nothing before the head is trained, so the trunk gives the same numbers in every epoch, at every
learning rate and for every ablation. `keep_features` runs it once over a PackedDataset; the KeptFeatures that it returns
stands in for the dataset: `kept[[3, 7]]` is the Batch that `dataset[[3, 7]]` would be after the trunk.

Of a row only the tokens that predict an answer token are kept (all of them when the block attends to the row itself), of
an image the features that the block reads. A folder belongs to one combination of base, data, preprocessing and kind of
features, named by a hash of these; files are memory-mapped, each process writes its own rows, and `done` is set for a
row only behind its numbers, so that an interrupted pass goes on where it stopped.
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import PADDING, Batch, batches_ahead, pad, spare_cores
from model import take
from readers import InputError

FIELDS = ("position", "branch", "source", "target", "target_branch")      # of a Row; the first two per kept token


class KeptFeatures(torch.utils.data.Dataset):
    """Batches from kept features. `rows`: {field: (values of all rows end to end, offsets)}."""

    def __init__(self, folder, rows, image_index, num_images, hidden_size, feature_shape, dtype):
        self.rows, self.image_index = rows, image_index
        tokens = int(rows["position"][1][-1])

        def mapped(name, *shape, dtype=dtype):
            path, size = os.path.join(folder, name), int(np.prod(shape)) * dtype.itemsize
            there = os.path.getsize(path) if os.path.exists(path) else 0
            if there not in (0, size):
                raise InputError(f"{path}: has {there:,} bytes and should have {size:,}; it was cut or changed: remove {folder}")
            if size > there and size > (free := shutil.disk_usage(folder).free):
                raise InputError(f"{path}: will have {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left; name another "
                                 "folder with --cache_features")
            return torch.from_file(path, shared=True, size=size // dtype.itemsize, dtype=dtype).view(shape)

        self.hidden = mapped("hidden.bin", tokens, hidden_size)
        self.features = mapped("features.bin", num_images, *feature_shape)
        self.done = mapped("done.bin", len(image_index), dtype=torch.uint8)

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
        batch.hidden = self.hidden[torch.from_numpy(np.where(real, at, 0))]                 # (B, K, hidden)
        images, index = np.unique(self.image_index[indices], return_inverse=True)
        batch.features = self.features[torch.from_numpy(images[images >= 0])]               # (N, P, C)
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
    with np.load(path) as file:
        return {name: (file[name], file[f"{name}_offsets"]) for name in (*FIELDS, "token", "image")}


def keep_features(folder, dataset, trunk, block, base, batch_size, rank=0, world_size=1):
    """Run the trunk over all rows that are not kept yet → KeptFeatures. `base`: the trunk's fingerprint."""
    parameter, whole = next(trunk.parameters()), block is not None and block.attention == "self"
    source, text, vision = block.image_source if block else "clip", trunk.config.text, trunk.config.vision
    digest = hashlib.sha256(file_digest(dataset.tokenizer.path).encode())
    for example in dataset.examples:
        digest.update(f"{example.image}{example.conversations}".encode())
    key = {"base": base, "data": digest.hexdigest(), "rows": [dataset.system, dataset.num_patches, dataset.max_length],
           "preprocess": asdict(dataset.preprocess), "features": source, "whole_rows": whole, "dtype": str(parameter.dtype)}
    folder = os.path.join(folder, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12])
    os.makedirs(folder, exist_ok=True)
    if rank == 0:
        with open(os.path.join(folder, "key.json"), "w") as file:
            json.dump(key, file, indent=2)
    rows = pack_rows(os.path.join(folder, "rows.npz"), dataset, whole, rank != 0)
    image_index, (tokens, offsets) = rows["image"][0], rows["token"]
    shape = (vision.num_patches, vision.hidden_size if source == "clip" else text.hidden_size)
    kept = KeptFeatures(folder, rows, image_index, int(image_index.max()) + 1, text.hidden_size, shape, parameter.dtype)
    missing = sorted((kept.done == 0).nonzero().flatten().tolist(), key=dataset.lengths().__getitem__)
    batches = [missing[start:start + batch_size] for start in range(rank * batch_size, len(missing), batch_size * world_size)]
    loader = batches_ahead(dataset, batches, spare_cores())
    for indices, batch in zip(batches, tqdm(loader, "one frozen pass", unit="batch", leave=False, disable=rank != 0 or not missing)):
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
    if world_size > 1:
        dist.barrier()
    return kept


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
