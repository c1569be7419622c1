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
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import PADDING, Batch

FIELDS = ("position", "branch", "source", "target", "target_branch")      # of a Row; the first two per kept token


class KeptFeatures(torch.utils.data.Dataset):
    """Batches from kept features. `rows`: {field: (values of all rows end to end, offsets)}."""

    def __init__(self, folder, rows, image_index, num_images, hidden_size, feature_shape, dtype):
        self.rows, self.image_index = rows, image_index
        tokens = int(rows["position"][1][-1])

        def mapped(name, *shape, dtype=dtype):
            return torch.from_file(os.path.join(folder, name), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)

        self.hidden = mapped("hidden.bin", tokens, hidden_size)
        self.features = mapped("features.bin", num_images, *feature_shape)
        self.done = mapped("done.bin", len(image_index), dtype=torch.uint8)

    def __len__(self):
        return len(self.image_index)

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


def keep_features(folder, dataset, trunk, block, base, batch_size, rank=0, world_size=1):
    """Run the trunk over all rows that are not kept yet → KeptFeatures. `base`: the trunk's fingerprint."""
    parameter, whole = next(trunk.parameters()), block is not None and block.attention == "self"
    flat, images, tokens_of = {name: [] for name in FIELDS}, {}, []
    digest = hashlib.sha256()
    rows = (dataset.row(i) for i in range(len(dataset)))
    for row in tqdm(rows, "packing rows", total=len(dataset), unit="row", leave=False, disable=rank != 0, mininterval=1):
        tokens, source = kept_tokens(row, whole)
        digest.update(f"{row.input_ids}{row.branch}{row.image}".encode())
        images.setdefault(row.image, len(images)) if row.image else None
        tokens_of.append((tokens, images.get(row.image, -1)))
        for name, values in (("position", np.array(row.position)[tokens]), ("branch", np.array(row.branch)[tokens]),
                             ("source", source), ("target", row.target), ("target_branch", row.target_branch)):
            flat[name].append(np.asarray(values, dtype=np.int32))
    source = block.image_source if block else "clip"
    key = {"base": base, "data": digest.hexdigest(), "preprocess": asdict(dataset.preprocess), "features": source,
           "whole_rows": whole, "dtype": str(parameter.dtype)}
    folder = os.path.join(folder, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12])
    os.makedirs(folder, exist_ok=True)
    if rank == 0:
        with open(os.path.join(folder, "key.json"), "w") as file:
            json.dump(key, file, indent=2)
    text, vision = trunk.config.text, trunk.config.vision
    shape = (vision.num_patches, vision.hidden_size if source == "clip" else text.hidden_size)
    packed = {name: (np.concatenate(v), np.cumsum([0] + [len(x) for x in v])) for name, v in flat.items()}
    kept = KeptFeatures(folder, packed, np.array([image for _, image in tokens_of]), len(images), text.hidden_size, shape,
                        parameter.dtype)
    missing = (kept.done == 0).nonzero().flatten().tolist()
    offsets, starts = packed["position"][1], range(rank * batch_size, len(missing), batch_size * world_size)
    for start in tqdm(starts, "one frozen pass", unit="batch", leave=False, disable=rank != 0 or not missing):
        indices = missing[start:start + batch_size]
        batch = dataset[indices].to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            hidden, features = trunk(batch)
            features = trunk.image_context(block, features)
        hidden = hidden.cpu()
        for n, i in enumerate(indices):
            tokens, image = tokens_of[i]
            kept.hidden[offsets[i]:offsets[i + 1]] = hidden[n, tokens]
            if image >= 0:
                kept.features[image] = features[batch.image_index[n]].cpu()
        kept.done[indices] = 1
    if world_size > 1:
        dist.barrier()
    return kept
