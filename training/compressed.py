"""VoCo-LLaMA in two passes: images are compressed once and kept, then asked about without them.

    dataset = without_images("out/compressed", dataset, model)      # compresses what is missing
    for i, said in answer(model, dataset, 128): …                   # any questions, any number

Text behind the <voco> tokens sees only them, so all that it needs of an image are their keys and
values in every layer: 0.5 MB a token at 7B in bf16, where the cache of the whole image takes 300.
They stand at the same positions in every row, and the text goes on where they end, so the answers
are those of one pass, to rounding.

A file an image, named by the image's content, in a folder for this base, preprocessing and dtype. A
file appears when it is whole, so an interrupted pass goes on where it stopped.
"""
import os
from dataclasses import asdict

import torch
import torch.distributed as dist

from data import VOCO_ID, PackedDataset, Row, collate
from llama import KVCache, rows_at_once
from support.common import InputError, file_digest, progress, say, temporary
from support.folders import check_can_write
from support.loading import batches_ahead, spare_cores
from support.outputs import digest, write_value
from support.processes import place
from support.tensors import read_file, write_tensors
from training.kept_files import checksum

COMPRESSED_HELP = ("of a base with <voco> tokens: compress each image once and keep it there; then "
                   "ask without it")


def without_images(folder, dataset, model):
    """A PackedDataset of open prompts about images → the same, of which no image is opened again.

    The first pass runs over the images that `folder` does not know yet; processes share them.
    """
    refuse_unfit(folder, model)
    dtype = next(model.trunk.parameters()).dtype
    key = {"base": model.fingerprint, "preprocess": asdict(model.preprocess), "dtype": str(dtype)}
    folder = os.path.join(folder, digest(key))
    check_can_write(folder)
    rank, world_size = place()
    if rank == 0:
        write_value(os.path.join(folder, "key.json"), key)
    images = {}                                         # {image: (its file, a row about it)}
    for i, example in enumerate(dataset.examples):
        if example.image not in images:
            name = file_digest(example.image)[:32]
            images[example.image] = os.path.join(folder, f"{name}.safetensors"), i
    files = {image: file for image, (file, _) in images.items()}
    missing = {file: i for file, i in images.values() if not os.path.exists(file)}
    say(f"{len(missing)} of {len(images)} images are still to be compressed, into "
        f"{model.config.num_voco} tokens each; they are kept in {folder}")
    if world_size > 1:
        dist.barrier()                                  # all have seen what is missing
    mine = list(missing.values())[rank::world_size]
    compress(mine, Fronts(dataset), model, {i: file for file, i in missing.items()})
    if world_size > 1:
        dist.barrier()                                  # and all is there
    return WithoutImages(dataset, files, shape_of(model))


def refuse_unfit(folder, model):
    """InputError where a model cannot answer without the image."""
    if not model.config.num_voco:
        raise InputError(f"--compressed {folder}: this base has no <voco> tokens (num_voco in its "
                         "config.json), so it cannot compress an image; leave --compressed out")
    for name, head in model.heads.items():
        if head.block_config and head.block_config.attention != "none":
            raise InputError(f"--compressed {folder}: {name} has a block that looks at the image "
                             "or at the whole row, and neither is there in the second pass; leave "
                             "--compressed out")


def shape_of(model):
    """Of what is kept of an image: (2, L, H_kv, V, D)."""
    text = model.config.text
    return (2, text.num_hidden_layers, text.num_key_value_heads, model.config.num_voco,
            text.head_dim)


def end_of_voco(row):
    """How many tokens a row has up to its last <voco> token."""
    return len(row.input_ids) - row.input_ids[::-1].index(VOCO_ID)


# ---- The first pass ------------------------------------------------------------------------------


class Fronts(torch.utils.data.Dataset):
    """Rows up to the last <voco> token, with their images: `fronts[[3, 7]]` is the Batch of two."""

    def __init__(self, dataset):
        self.dataset = dataset

    def row(self, i):
        row = self.dataset.row(i)
        end = end_of_voco(row)
        return Row(row.input_ids[:end], row.position[:end], row.branch[:end], [], [], [], [end - 1],
                   row.image)

    def __getitem__(self, indices):
        return collate([self.row(i) for i in indices], self.dataset.format.preprocess)


@torch.inference_mode()
def compress(indices, fronts, model, files):
    """Keep the images of these rows. `files`: {row: where to}."""
    if not indices:
        return
    config, parameter = model.config, next(model.trunk.parameters())
    end = len(fronts.row(indices[0]).input_ids)                 # of every row
    size = rows_at_once(config.text, end, parameter)
    batches = [indices[start:start + size] for start in range(0, len(indices), size)]
    loader = batches_ahead(fronts, batches, spare_cores())
    for rows, batch in zip(batches, progress(loader, "compressing", unit="batch"), strict=True):
        batch = batch.to(parameter.device, parameter.dtype)
        cache = KVCache(config.text, *batch.input_ids.shape, parameter.device, parameter.dtype)
        model.trunk(batch, cache)
        at = slice(end - config.num_voco, end)
        kept = torch.stack((cache.keys[:, :, :, at], cache.values[:, :, :, at]))
        for i, of_row in zip(rows, kept.movedim(2, 0).cpu(), strict=True):  # (2, L, H_kv, V, D)
            partial = f"{temporary(files[i])}.safetensors"
            write_tensors(partial, {"compressed": of_row, "crc32": checksum(of_row)})
            os.replace(partial, files[i])


# ---- The second ----------------------------------------------------------------------------------


class WithoutImages(PackedDataset):
    """Rows that begin behind the <voco> tokens, whose keys and values come from files."""

    def __init__(self, dataset, files, shape):
        super().__init__(dataset.examples, dataset.format)
        self.files, self.shape = files, shape           # {image: file}; of what it holds

    def row(self, i):
        row = super().row(i)
        begin = end_of_voco(row)
        return Row(row.input_ids[begin:], row.position[begin:], row.branch[begin:],
                   [source - begin for source in row.source], row.target, row.target_branch,
                   [end - begin for end in row.ends], None, row.cut)

    def __getitem__(self, indices):
        batch = collate([self.row(i) for i in indices], None)
        images = [self.examples[i].image for i in indices]
        batch.compressed = torch.stack([read_kept(self.files[image], self.shape)
                                        for image in images])       # (B, 2, L, H_kv, V, D)
        return batch


def read_kept(path, shape):
    """What was kept of an image. InputError where the file is damaged."""
    tensors = read_file(path)
    found = [tensors[name].read() if name in tensors else torch.zeros(0)
             for name in ("compressed", "crc32")]
    if tuple(found[0].shape) != shape or not torch.equal(found[1], checksum(found[0])):
        raise InputError(f"{path}: is not what was written there; remove it, and its image is "
                         "compressed again")
    return found[0]
