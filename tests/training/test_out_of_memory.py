"""The GPU has no memory left: the frozen pass halves its batches, and whatever advice is given has
an effect."""
import sys

import numpy as np
import pytest
import torch
from conftest import dpo_flags, largest_difference, preference_rows, run_train
from short_runs import base_and_head, trained_tensors, zero_file

import train
from support.common import InputError
from training import features
from training.engine import deepspeed_config, start_deepspeed
from training.features import keep_features
from training.flags import parse_flags


def short_of_memory(trunk, monkeypatch, tokens):
    """From now on a forward of more than so many tokens fails, as on a GPU → sizes that passed."""
    forward, passed = trunk.forward, []

    def limited(batch, cache=None):
        if batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")
        passed.append(tuple(batch.input_ids.shape))
        return forward(batch, cache)

    monkeypatch.setattr(trunk, "forward", limited)
    return passed


def padded_lengths(dataset):
    """Tokens of each row as the trunk gets it, in a batch of its own."""
    return [dataset[[i]].input_ids.shape[1] for i in range(len(dataset))]


@pytest.mark.parametrize("variant", ("full", "self_attn", "align_after_align"))
def test_the_frozen_pass_halves_its_batches(world, tmp_path, monkeypatch, variant):
    """First a batch, then what is asked about one image. What is kept does not depend on it."""
    base, head = base_and_head(world, variant)
    dataset = preference_rows(world, base.trunk)
    whole = keep_features(str(tmp_path / "whole"), dataset, base, head.block_config, batch_size=16)
    longest = max(padded_lengths(dataset))
    for rows in (5, 1):             # of the longest, fit together
        with monkeypatch.context() as patch:
            passed = short_of_memory(base.trunk, patch, rows * longest)
            kept = keep_features(str(tmp_path / str(rows)), dataset, base, head.block_config,
                                 batch_size=16)
        images = len({example.image for example in dataset.examples})
        assert images <= sum(count for count, _ in passed) <= len(dataset)
        assert 1 <= max(count for count, _ in passed) <= 16 and min(passed)[0] <= rows
        assert np.fromfile(kept.files["sums"].path, np.int64).all()
        for name in ("hidden_states", "image_features"):
            ours, theirs = getattr(kept, name), getattr(whole, name)
            assert largest_difference(f"{name}, {rows} rows", ours, theirs) < 1e-5


def test_one_row_too_large_is_one_line(world, tmp_path, monkeypatch):
    """What was kept before stays, and with more memory the pass goes on there."""
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.format.max_length = 512              # all that is asked about an image is one row
    # Only one image is described, so that one row is longer than all others.
    longest = dataset.examples[-1].image
    dataset.examples = [example for example in dataset.examples if example.image == longest
                        or "Is there a" in example.conversations[0][0][0]]
    lengths = sorted(padded_lengths(dataset))
    with monkeypatch.context() as patch:
        passed = short_of_memory(base.trunk, patch, lengths[-1] - 1)
        with pytest.raises(InputError, match=f"row of {lengths[-1]} tokens") as error:
            keep_features(str(tmp_path), dataset, base, head.block_config, batch_size=16)
    print(error.value)
    assert "\n" not in str(error.value) and "--per_device" not in str(error.value)
    before, = tmp_path.glob("*/sums.bin")
    missing = np.flatnonzero(np.fromfile(before, np.int64)[:len(dataset)] == 0).tolist()
    assert passed and 0 < len(missing) < len(dataset)
    with monkeypatch.context() as patch:
        passed = short_of_memory(base.trunk, patch, 10 ** 9)
        keep_features(str(tmp_path), dataset, base, head.block_config, batch_size=16)
    images = {example.image for example in dataset.examples}
    assert sum(count for count, _ in passed) == len(images) - 16    # the batch that was not whole


def test_no_memory_for_the_weights_is_said(world, tmp_path, monkeypatch):
    def fails(module):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 MiB.")

    base, head = base_and_head(world)
    monkeypatch.setattr(features, "load_weights", fails)
    with pytest.raises(InputError, match="weights") as error:
        keep_features(str(tmp_path), preference_rows(world, base.trunk), base, head.block_config)
    print(error.value)
    assert "--per_device" not in str(error.value)


# ---- Advice --------------------------------------------------------------------------------------


LOWER, CHECKPOINT = "--per_device_train_batch_size", "--gradient_checkpointing"
OFFLOAD, ZERO3, BITS = "--offload", "ds_zero3.json", "--bits 4"
ADVICE = (      # flags, ZeRO stage of the file or None; what is advised, what would have no effect
    (["--stage", "1"], None, {LOWER, BITS}, {CHECKPOINT, ZERO3}),
    (["--stage", "1", LOWER, "1"], None, {BITS}, {LOWER, CHECKPOINT}),
    (["--stage", "1", LOWER, "1", *BITS.split()], None, {"of more memory"}, {LOWER, BITS}),
    (["--stage", "1", LOWER, "1", "--cache_features", "kept"], None, {"of more memory"}, {BITS}),
    (["--lora_r", "8"], None, {LOWER, CHECKPOINT, BITS, ZERO3}, {OFFLOAD}),
    (["--lora_r", "8", CHECKPOINT], None, {LOWER, ZERO3}, {CHECKPOINT, OFFLOAD}),
    (["--lora_r", "8"], 3, {LOWER, CHECKPOINT, OFFLOAD}, {BITS}),
    (["--tune", "llama"], 1, {LOWER, CHECKPOINT, OFFLOAD, ZERO3}, {BITS}),
    (["--tune", "llama", OFFLOAD], 2, {LOWER, CHECKPOINT, ZERO3}, {OFFLOAD}),
    (["--tune", "llama", OFFLOAD, CHECKPOINT, LOWER, "1"], 3, {"more GPUs"},
     {OFFLOAD, CHECKPOINT, LOWER, ZERO3}),
)


@pytest.mark.parametrize("flags, stage, advised, useless", ADVICE)
def test_only_what_helps_is_advised(world, tmp_path, monkeypatch, in_this_process, flags, stage,
                                    advised, useless):
    """main() as it ends where the GPU is full."""
    more = ["--deepspeed", zero_file(tmp_path, stage)] if stage else []
    typed = ["train.py", *flags, *more, *dpo_flags(world), "--output_dir", str(tmp_path / "out")]

    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.setattr(train, "train", full)
    with pytest.raises(InputError) as error:
        train.main()
    said = str(error.value)
    print(said)
    assert said.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.") and "\n" not in said
    assert all(part in said for part in advised) and not any(part in said for part in useless)


def test_the_batch_of_the_file_counts(world, tmp_path, monkeypatch, in_this_process):
    """A micro batch of one row in the DeepSpeed file cannot be lowered either."""
    start_deepspeed()
    path = zero_file(tmp_path, 1, train_micro_batch_size_per_gpu=1)
    args = parse_flags(["--stage", "1", "--deepspeed", path, *dpo_flags(world)])
    assert deepspeed_config(args, 1, False)["train_micro_batch_size_per_gpu"] == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "1", "--deepspeed", path,
                                      *dpo_flags(world)])
    monkeypatch.setattr(train, "train", lambda args: (_ for _ in ()).throw(
        torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(InputError) as error:
        train.main()
    assert LOWER not in str(error.value)


def test_a_run_with_halved_batches_ends_with_the_same_weights(world, tmp_path, monkeypatch,
                                                              in_this_process):
    """Training from kept features, a frozen pass of which ran short of memory now and then."""
    def run(name):
        run_train("--stage", 1, "--max_steps", 3, "--learning_rate", 1e-2, "--keep_correct",
                  "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
                  "--cache_features", tmp_path / f"{name}_features", "--output_dir",
                  tmp_path / name, *dpo_flags(world))
        return trained_tensors(tmp_path / name)

    before, load = run("before"), train.load_base
    sizes = []

    def loaded(*args, **options):
        model = load(*args, **options)
        sizes.append(short_of_memory(model.trunk, monkeypatch, 400))
        return model

    monkeypatch.setattr(train, "load_base", loaded)
    after = run("after")
    assert len(sizes) == 1 and {count for count, _ in sizes[0]} != {16}
    for key, tensor in before.items():
        assert largest_difference(key, after[key], tensor) < 1e-3
