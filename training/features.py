"""One frozen pass: what the trunk makes of every row, kept on disk and read back as batches.

In stages 1 and 2 nothing before the head is trained, so the trunk gives the same numbers in every
epoch, at every learning rate and for every ablation. `keep_features` runs it once over a
PackedDataset; the KeptFeatures that it returns stands in for the dataset: `kept[[3, 7]]` is the
Batch that `dataset[[3, 7]]` would be after the trunk.

The pass packs all examples about an image into one row, as POPE is asked: the system sentence and
the image stand there once, then a branch for each answer. HA-DPO's descriptions, which its data
name twice, run once. Every example then gets the numbers that its own row would have given.

Of a row only the tokens that predict an answer token are kept (all of them when the block attends
to the row itself), of an image the features that the block reads. A folder belongs to one
combination of base, data, preprocessing and kind of features, named by a hash of these and told in
its `key.json`; files are memory-mapped, each process writes its own rows, and a row's checksum
comes only behind its numbers, so that an interrupted pass goes on where it stopped, batch by batch,
and keeps the very numbers of one that did not. Where everything is kept already, neither the
trunk's weights nor any image are read. Images are known by their paths: with other pictures under
the same names the folder has to go.

The pass comes before the first epoch and not within it: it goes through the rows sorted by length,
with equal work for every process, serves all runs of a sweep, and costs 8 % more than that epoch
would (7B, one H100: 0.020 s a pair, and 0.0016 s for a step of training from what is kept).
"""
import glob
import hashlib
import itertools
import json
import os
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from checkpoints.identity import base_of_model, data_digest
from checkpoints.load import load_weights
from data import Example, PackedDataset
from llama import PAD_BRANCH
from support.common import InputError, progress, read_json, say, write_json
from support.folders import check_can_write
from support.images import check_images
from support.loading import batches_ahead, spare_cores
from support.processes import place
from training.conversations import image_paths
from training.kept_files import KeptFeatures, checksum, kept_files, pack_rows

# What a folder depends on, and how we say that it is another.
KEY = {"base": "another base", "settings": "a base with other settings", "data": "other data",
       "rows": "rows of another prompt or length",
       "dtype": "another dtype or number of bits", "preprocess": "another preprocessing",
       "features": "another kind of block", "whole_rows": "another kind of block"}


def key_of(dataset, model, block_config):
    """What kept features depend on: a value for each of KEY."""
    row_format, base = dataset.format, base_of_model(model)
    dtype, bits = next(model.trunk.parameters()).dtype, model.config.bits
    return {"base": base["base"].partition("-")[0], "settings": base["settings"],
            "data": data_digest(dataset.examples, row_format.tokenizer),
            "rows": [row_format.template.system, row_format.num_patches, row_format.max_length],
            "preprocess": {name: value for name, value in asdict(row_format.preprocess).items()
                           if value is not None},       # older keys have no grid
            "features": block_config.image_source if block_config else "clip",
            "whole_rows": block_config is not None and block_config.attention == "self",
            "dtype": f"{dtype}, {bits} bits" if bits < 16 else str(dtype)}


def folder_of(root, key, quiet):
    """The folder below `root` that belongs to a key. A changed one is refused; why others are of
    no use is said.
    """
    text = json.dumps(key, sort_keys=True)
    name, key = hashlib.sha256(text.encode()).hexdigest()[:12], json.loads(text)
    folder = os.path.join(root, name)
    begun = os.path.exists(os.path.join(folder, "sums.bin"))
    paths = glob.glob(os.path.join(glob.escape(root), "*", "key.json"))
    keys = {path: read_json(path, dict) for path in paths}
    unlike = {path: [words for name, words in KEY.items() if other.get(name) != key[name]]
              for path, other in keys.items()}
    path = os.path.join(folder, "key.json")
    if unlike.get(path) or begun and path not in keys:
        wrong = "is missing"
        if path in keys:
            wrong = f"says that {folder} is for {listed(unlike[path])}"
        raise InputError(f"{path}: {wrong}, so what lies there cannot be trusted: remove {folder}")
    if keys and path not in keys and not quiet:
        nearest = min(unlike.values(), key=len)
        print(f"{root}: what is kept there is for {listed(nearest)}; so one frozen pass comes "
              "first", flush=True)
    return folder


def listed(words):
    return " and ".join(dict.fromkeys(words))


def keep_features(folder, dataset, model, block_config, batch_size=16):
    """Run the trunk of a Llava over all rows that are not kept yet → KeptFeatures.

    A trunk that is still in its files (checkpoints/load.py) is read when a row is missing, else it
    stays there. Every process runs its share.
    """
    key, text, vision = key_of(dataset, model, block_config), model.config.text, model.config.vision
    rank, world_size = place()
    folder = folder_of(folder, key, rank != 0)
    done = rows_done(os.path.join(folder, "sums.bin"), len(dataset))
    examples = dataset.examples
    if done.any():
        examples = [examples[i] for i in np.flatnonzero(~done)]
    check_images(image_paths(examples))

    # The key comes before all other files, from whichever process is first; then the packed rows.
    if not done.all() or len(done) < len(dataset):
        check_can_write(folder)
        say(f"one frozen pass over {len(dataset) - done.sum():,} rows, kept in {folder} (once; the "
            "bars say how long)")
    path = os.path.join(folder, "key.json")
    if not os.path.isfile(path):
        write_json(path, key)
    rows = pack_rows(os.path.join(folder, "rows.npz"), dataset, key["whole_rows"])
    width = vision.hidden_size if key["features"] == "clip" else text.hidden_size
    dtype = next(model.trunk.parameters()).dtype
    files = kept_files(folder, rows, text.hidden_size, (vision.num_patches, width), dtype)

    # All rows by image, sorted by length; the batches that lack one, dealt out to the processes. A
    # batch is made as a whole: others would give it other last bits.
    done = rows_done(files["sums"].path, len(dataset))
    groups = groups_by_image(dataset, range(len(dataset)), rows["image"][0])
    starts = range(0, len(groups), batch_size)
    batches = [groups[start:start + batch_size] for start in starts]
    batches = [batch for batch in batches if not done[list(itertools.chain(*batch))].all()]
    batches = batches[rank::world_size]
    if world_size > 1:
        dist.barrier()              # all have seen what is missing; from here on it gets less
    if batches:
        run_trunk(files, rows, dataset, batches, load_trunk(model.trunk), block_config)
    if world_size > 1:
        dist.barrier()              # all have written, and what they wrote is on the disk
    return KeptFeatures(files, rows, dataset.examples)


def rows_done(path, count):
    """Which rows have a checksum, (count,), or none of them yet: (0,)."""
    return np.fromfile(path, np.int64)[:count] != 0 if os.path.isfile(path) else np.zeros(0, bool)


def load_trunk(trunk):
    """The trunk with its weights. InputError where the GPU has no memory for them."""
    try:
        return load_weights(trunk)
    except torch.OutOfMemoryError as e:
        reason = str(e).partition("\n")[0]
        raise InputError(f"the GPU has no memory for the model's weights ({reason}): end what else "
                         "runs there, or take a larger one; --bf16 halves fp32, --bits 4 quarters "
                         "bf16") from e


def groups_by_image(dataset, indices, image_index):
    """Rows of the data → lists of those that the pass reads as one row, the shortest first.

    Their texts together have no more tokens than the model's longest row.
    """
    lengths = dataset.lengths()
    text = np.where(lengths > 0, lengths - dataset.format.num_patches, -lengths)
    groups, open_groups = [], {}            # open_groups: {image: (its last group, tokens of it)}
    for i in indices:
        group, tokens = open_groups.get(image_index[i], (None, 0))
        if group is None or image_index[i] < 0 or tokens + text[i] > dataset.format.max_length:
            group, tokens = [], 0
            groups.append(group)
        group.append(i)
        open_groups[image_index[i]] = group, tokens + text[i]
    return sorted(groups, key=lambda group: text[group].sum())


class ByImage(torch.utils.data.Dataset):
    """Examples about the same image as one row: `by_image[[[3, 7], [8]]]` is the Batch of two rows,
    and for each example the numbers of its branches there.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, groups):
        merged, numbers = [], []
        for group in groups:
            examples, branches = [self.dataset.examples[i] for i in group], {}
            for example in examples:
                of_example = []
                for turns in example.conversations:
                    same = tuple(map(tuple, turns))         # what is said twice is one branch
                    of_example.append(branches.setdefault(same, len(branches) + 1))
                numbers.append(of_example)
            merged.append(Example(examples[0].image, list(branches)))
        rows = PackedDataset(merged, self.dataset.format, self.dataset.always_image)
        return rows[range(len(merged))], numbers


def kept_in(batch, groups, numbers, rows):
    """Where the kept tokens of all examples in a ByImage batch stand in its (B * T) tokens.

    A token stands in the prefix, or in the branch of its own example, at its position.
    """
    in_prefix = (batch.branch <= 0) & (batch.branch != PAD_BRANCH)
    prefix = in_prefix.sum(1).numpy()                                                       # (B,)
    first = np.concatenate([prefix[:, None], batch.ends[:, :-1].numpy() + 1], axis=1)       # (B, N)
    offsets, width, found, numbers = rows["token"][1], batch.input_ids.shape[1], [], iter(numbers)
    for n, group in enumerate(groups):
        for i in group:
            position, branch = (rows[name][0][offsets[i]:offsets[i + 1]]
                                for name in ("position", "branch"))
            # Branch 0 is the prefix of the example's own row; each of its branches has it, too.
            start = first[n, np.asarray(next(numbers))[np.maximum(branch, 1) - 1] - 1]
            inside = np.where(position < prefix[n], position, start + position - prefix[n])
            found.append(n * width + inside)
    return torch.from_numpy(np.concatenate(found))


def run_trunk(files, rows, dataset, batches, trunk, block_config):
    """The pass itself, over this process's share: lists of groups of rows."""
    parameter, offsets, by_image = next(trunk.parameters()), rows["token"][1], ByImage(dataset)
    image_index, first_tile = rows["image"][0], rows["tiles"][1]

    @torch.inference_mode()
    def states_of(groups, batch, numbers):
        at = kept_in(batch, groups, numbers, rows).to(parameter.device)
        batch = batch.to(parameter.device, parameter.dtype)
        hidden_states, image_features = trunk(batch)                 # (B, T, hidden), (N, P, C)
        image_features = trunk.image_context(block_config, image_features)
        hidden_states = hidden_states.flatten(0, 1).index_select(0, at).cpu()
        return hidden_states, None if image_features is None else image_features.cpu()

    def keep(groups, batch, numbers):
        try:
            states = states_of(groups, batch, numbers)
        except torch.OutOfMemoryError:
            states = None                           # half as much needs half the memory
        if states is None:
            whole = groups if len(groups) > 1 else groups[0]
            if len(whole) == 1:
                raise InputError("the GPU has no memory for the model and one row of "
                                 f"{batch.input_ids.shape[1]} tokens: end what else runs there, or "
                                 "take a larger one; --bf16 halves fp32, --bits 4 quarters bf16")
            for part in (whole[:len(whole) // 2], whole[len(whole) // 2:]):
                part = part if whole is groups else [part]
                keep(part, *by_image[part])
            return
        # A row is done behind its numbers, so that an interrupted pass goes on where it stopped.
        hidden_states, image_features = states
        tiles = batch.row_tiles()
        lengths = [offsets[i + 1] - offsets[i] for group in groups for i in group]
        kept, sums = iter(hidden_states.split(lengths)), {}
        for n, group in enumerate(groups):
            for i in group:
                states = next(kept)
                files["hidden"].write(offsets[i], states)
                sums[i] = checksum(states)
            image = image_index[group[0]]
            if image >= 0:
                features = image_features[tiles[n][tiles[n] >= 0]]
                files["features"].write(first_tile[image], features)
                files["sums"].write(len(image_index) + image, checksum(features))
        for i, value in sums.items():
            files["sums"].write(i, value)

    loader = batches_ahead(by_image, batches, spare_cores())
    bar = progress(loader, "one frozen pass", unit="batch")
    for groups, (batch, numbers) in zip(batches, bar, strict=True):
        keep(groups, batch, numbers)
    for file in files.values():
        file.flush()
