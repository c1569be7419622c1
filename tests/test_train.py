"""Training: what gets a gradient, what stays as it was, and that one process and several do the same thing.

The first half takes the pieces of train.py one by one; the second half starts real runs on the session's tiny world.
"""
import copy
import csv
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import weakref
from glob import glob
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, dpo_flags, largest_difference, load_json, preference_rows, run_train, shake, succeeds
from safetensors.torch import save_file

import features
import train
from checkpoint import fill, fingerprint, load_base, load_trained, read_file
from data import ImageProcessor, PackedDataset, ResumableSampler
from features import keep_features
from loop import MasterAdamW, cosine, deepspeed_config
from model import Head
from objective import Objective, reference_of, set_trained
from post_decoder import VARIANTS
from readers import InputError, read_hadpo, read_llava, row_lengths
from train import STAGES

SOME = [5, 17, 2, 40, 41, 90, 146]       # rows of the preference data: question pairs, and (from 144 on) a description


def base_and_head(world, variant="full", zero_init=True):
    """The session's base with a block on top; `lm_head` is the base's own."""
    trunk, base_head, *_ = load_base(world.base)
    head = Head(trunk.config, trunk.config.block(**VARIANTS[variant], zero_init=zero_init) if variant else None)
    if not zero_init:
        shake(head)
    head.lm_head = base_head.lm_head
    return trunk, head


# ---------------------------------------------------------------------------------------------------------------------
# Loss and gradients


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("stage", (1, 2))
def test_first_loss_is_ln_2(world, variant, stage):
    torch.manual_seed(0)
    trunk, head = base_and_head(world, variant)
    set_trained(trunk, head, STAGES[stage])
    loss, metrics = Objective(trunk, head, "dpo", beta=0.1, sft_weight=0.0)(preference_rows(world, trunk)[SOME])
    assert largest_difference("loss against ln 2", loss, math.log(2)) < 1e-6
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0 and metrics["logps/chosen"] != metrics["logps/rejected"]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_the_stages_tensors_and_no_other(world, stage):
    """With a block that is no longer the identity (there, most gradients are exactly 0) every trained tensor learns."""
    torch.manual_seed(0)
    trunk, head = base_and_head(world, "full" if stage else None, zero_init=False)
    named = dict(trunk.named_parameters()) | dict(head.named_parameters())
    expected = {name for name in named if name.startswith({0: ("model.", "lm_head."), 1: "post_interaction_block.",
                                                          2: ("post_interaction_block.", "lm_head.")}[stage])}
    trunk.requires_grad_(True), head.requires_grad_(True)                        # whatever another stage has left behind
    trained = set_trained(trunk, head, STAGES[stage])
    assert set(trained) == expected and all(trained[name] is named[name] for name in expected)
    rows = preference_rows(world, trunk)
    if stage == 0:
        rows = PackedDataset(read_llava(world.llava, world.images), rows.tokenizer, rows.preprocess, rows.num_patches, rows.max_length)
    objective = Objective(trunk, head, "dpo" if stage else "sft", beta=0.1, sft_weight=0.0)
    objective(rows[SOME[:-1]])[0].backward()
    assert not any(p.requires_grad for name, p in objective.named_parameters() if name.startswith("reference."))
    assert {name for name, p in named.items() if p.grad is not None} == expected
    assert [name for name in expected if not named[name].grad.any()] == []


def test_sft_weight_adds_the_chosen_answers_nll(world):
    trunk, head = base_and_head(world, "full", zero_init=False)
    batch = preference_rows(world, trunk)[SOME]
    plain, metrics = Objective(trunk, head, "dpo", 0.1, 0.0)(batch)
    weighted, _ = Objective(trunk, head, "dpo", 0.1, 0.5)(batch)
    alone = [Objective(trunk, head, "dpo", 0.1, 0.0)(preference_rows(world, trunk)[[i]])[1]["logps/chosen"] for i in SOME]
    tokens = (batch.target_branch == 1).sum(1)
    nll = -(torch.stack(alone) / tokens).mean()                                  # mean per token, then over the pairs
    assert largest_difference("weighted loss", weighted, plain + 0.5 * nll) < 1e-5


@pytest.mark.parametrize("groups", (("clip",), ("projector",), ("llama",), ("post_decoder",), ("lm_head",),
                                    ("clip", "projector", "post_decoder")))
@pytest.mark.parametrize("loss", ("sft", "dpo"))
def test_every_group_can_be_trained_by_every_loss(world, groups, loss):
    trunk, head = base_and_head(world, "full", zero_init=False)
    rows = preference_rows(world, trunk)
    if loss == "sft":
        rows = PackedDataset(read_llava(world.llava, world.images), rows.tokenizer, rows.preprocess, rows.num_patches, rows.max_length)
    trained = set_trained(trunk, head, groups)
    prefixes = {"clip": "vision_tower.", "projector": "model.mm_projector.", "llama": ("model.embed", "model.layers", "model.norm"),
                "post_decoder": "post_interaction_block.", "lm_head": "lm_head."}
    named = dict(trunk.named_parameters()) | dict(head.named_parameters())
    assert set(trained) == {n for n in named if any(n.startswith(prefixes[g]) for g in groups)}
    objective = Objective(trunk, head, loss)
    loss, _ = objective(rows[SOME[:-1]], reference=torch.full((len(SOME) - 1, 2), -20.0))
    loss.backward()
    assert [n for n, p in named.items() if p.grad is not None and p.grad.any()] == [n for n in named if n in trained]


def test_sft_loss_is_the_mean_over_the_answer_tokens_given(world):
    trunk, head = base_and_head(world, None)
    rows = preference_rows(world, trunk)
    rows = PackedDataset(read_llava(world.llava, world.images), rows.tokenizer, rows.preprocess, rows.num_patches, rows.max_length)
    objective, batch = Objective(trunk, head, "sft"), rows[SOME[:-1]]
    hidden, _ = trunk(batch)
    nll = torch.nn.functional.cross_entropy(head.lm_head(hidden[torch.arange(len(hidden))[:, None], batch.source]).transpose(1, 2),
                                            batch.target, ignore_index=-100, reduction="none")
    tokens = (batch.target != -100).sum()
    assert largest_difference("mean", objective(batch)[0], nll.sum() / tokens) < 1e-5
    parts = [objective(rows[part], answer_tokens=tokens)[0] for part in (SOME[:3], SOME[3:-1])]
    assert largest_difference("sum of two parts", sum(parts), objective(batch)[0]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Kept features


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_kept_features_give_the_same_losses(world, tmp_path, variant):
    trunk, head = base_and_head(world, variant, zero_init=False)
    dataset = preference_rows(world, trunk)
    kept = keep_features(str(tmp_path), dataset, trunk, head.block, "base", batch_size=16)
    assert len(kept) == len(dataset)
    reference = base_and_head(world, variant, zero_init=False)[1]
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 0.9                                                     # or all rewards are 0 and compare nothing
    results = []
    for rows, with_trunk in ((dataset, trunk), (kept, None)):
        objective = Objective(with_trunk, head, "dpo", 0.1, 0.1)
        objective.reference = reference
        _, metrics = objective(rows[SOME])
        results.append(torch.stack(list(metrics.values())))
    assert results[0][1].abs() > 1e-4
    assert largest_difference(f"metrics with block {variant}", *results) < 1e-4


def test_a_killed_pass_goes_on(world, tmp_path, monkeypatch):
    """After kill -9 in its fourth batch, the next run does the rest, and a third run does nothing."""
    trunk, head = base_and_head(world)
    dataset, forward, passes = preference_rows(world, trunk), trunk.forward, []
    keep = lambda: keep_features(str(tmp_path), dataset, trunk, head.block, "base", batch_size=16)

    def counted(batch, cache=None):
        if len(passes) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        passes.append(len(batch.input_ids))
        return forward(batch, cache)

    monkeypatch.setattr(trunk, "forward", counted)
    limit, child = 3, multiprocessing.get_context("fork").Process(target=keep)
    child.start(), child.join()
    assert child.exitcode == -signal.SIGKILL
    limit = None
    kept = keep()
    assert sum(passes) == len(dataset) - 3 * 16                                  # no row twice
    keep()
    assert sum(passes) == len(dataset) - 3 * 16 and len(os.listdir(tmp_path)) == 1

    whole = keep_features(str(tmp_path / "whole"), dataset, trunk, head.block, "base", batch_size=16)
    for name in ("hidden", "features"):
        assert largest_difference(f"{name}, interrupted or not", getattr(kept, name), getattr(whole, name)) < 1e-5


def test_kept_features_belong_to_base_data_and_preprocessing(world, tmp_path):
    trunk, head = base_and_head(world)
    dataset = preference_rows(world, trunk)
    dataset.examples = dataset.examples[:8]
    keep = lambda base="base", block=head.block: keep_features(str(tmp_path), dataset, trunk, block, base, 16)
    keep(), keep("another base"), keep(block=base_and_head(world, "align_after_align")[1].block)
    dataset.examples = dataset.examples[:7]
    keep()
    dataset.preprocess = ImageProcessor(24, pad=False)
    keep()
    assert len(os.listdir(tmp_path)) == 5


def test_why_features_are_made_anew(world, tmp_path, capsys):
    """One line says what is different, and nothing is said where nothing is."""
    trunk, head = base_and_head(world)
    dataset = preference_rows(world, trunk)
    dataset.examples = dataset.examples[:8]

    def keep(base="base", block=head.block):
        keep_features(str(tmp_path), dataset, trunk, block, base, 16)
        return capsys.readouterr().out

    assert keep() == keep() == ""
    assert "another base;" in keep("another") and keep("another") == ""
    assert "another kind of block;" in keep(block=base_and_head(world, "self_attn")[1].block)
    dataset.preprocess = ImageProcessor(24, pad=False)
    assert "another preprocessing;" in keep()
    dataset.examples, dataset.max_length = dataset.examples[:7], dataset.max_length - 1
    assert f"{tmp_path}: what is kept there is for other data and rows of another prompt or length;" in keep()


DAMAGED = {  # file: how it is changed
    "hidden.bin": lambda path: os.truncate(path, os.path.getsize(path) // 2), "features.bin": os.remove,
    "done.bin": lambda path: os.truncate(path, 9), "rows.npz": lambda path: os.truncate(path, os.path.getsize(path) - 40),
    "key.json": os.remove}


@pytest.mark.parametrize("name", [*DAMAGED, "another's key.json", "another's rows.npz"])
def test_damaged_features_are_refused_by_name(world, tmp_path, name):
    trunk, head = base_and_head(world)
    dataset = preference_rows(world, trunk)
    every = dataset.examples
    for count in (7, 8):
        dataset.examples = every[:count]
        keep_features(str(tmp_path / str(count)), dataset, trunk, head.block, "base", 16)
    folder, = (str(path) for path in (tmp_path / "8").iterdir())
    if name in DAMAGED:
        DAMAGED[name](f"{folder}/{name}")
    else:
        name = name.removeprefix("another's ")
        shutil.copy(*glob(f"{tmp_path}/7/*/{name}"), f"{folder}/{name}")
    with pytest.raises(InputError) as error:
        keep_features(str(tmp_path / "8"), dataset, trunk, head.block, "base", 16)
    print(error.value)
    assert f"{folder}/{name}" in str(error.value) and f"remove {folder}" in str(error.value)


def test_a_disk_that_is_too_small(world, tmp_path, monkeypatch):
    """For all files together, though each alone would fit."""
    trunk, head = base_and_head(world)
    dataset = preference_rows(world, trunk)
    hidden = sum(len(np.unique(dataset.row(i).source)) for i in range(len(dataset))) * trunk.config.text.hidden_size * 4
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=hidden))
    with pytest.raises(InputError, match="--cache_features"):
        keep_features(str(tmp_path), dataset, trunk, head.block, "base", 16)
    assert not glob(f"{tmp_path}/*/*.bin")


def test_a_process_that_starts_late_has_its_share(world, tmp_path, monkeypatch):
    """Process 0 works while process 1 waits at the first barrier: together they keep every row, and none twice."""
    trunk, head = base_and_head(world)
    dataset, forward, rows, waiting = preference_rows(world, trunk), trunk.forward, [], []
    keep = lambda rank: keep_features(str(tmp_path), dataset, trunk, head.block, "base", 16, rank, 2)
    monkeypatch.setattr(trunk, "forward", lambda batch: rows.append(len(batch.input_ids)) or forward(batch))
    monkeypatch.setattr(features.dist, "barrier", lambda: waiting.append(1) or len(waiting) == 1 and keep(0))
    assert keep(1).done.all() and sum(rows) == len(dataset)


@pytest.mark.parametrize("layout", ("safetensors", "bin"))
def test_fingerprint_of_a_trunk_in_its_files(world, tmp_path, layout):
    """The same as of the one in memory, in any dtype, though no tensor of it is read; filled, it is that trunk."""
    folder = str(tmp_path / "base")
    shutil.copytree(world.base, folder)
    if layout == "bin":
        tensors = {key: stored.read() for key, stored in read_file(f"{folder}/model.safetensors").items()}
        torch.save(tensors, f"{folder}/pytorch_model.bin")
        os.remove(f"{folder}/model.safetensors")
    for dtype in (None, torch.bfloat16):
        loaded, (trunk, head, *_) = load_base(folder, dtype=dtype), load_base(folder, dtype=dtype, read_trunk=False)
        read = {name: p.lies_in[0].read for name, p in trunk.named_parameters()}
        for p in trunk.parameters():
            p.lies_in[0].read = lambda: pytest.fail("a tensor was read")
        assert fingerprint(trunk, head) == fingerprint(*loaded[:2]) == fingerprint(*load_base(world.base)[:2])
        for name, p in trunk.named_parameters():
            p.lies_in[0].read = read[name]
        assert all(torch.equal(t, fill(trunk).state_dict()[name]) for name, t in loaded[0].state_dict().items())
        assert not any(p.is_meta or p.requires_grad for p in trunk.parameters())


def test_what_is_kept_is_all_that_is_needed(world, two, tmp_path, monkeypatch, in_this_process):
    """Two kinds of features. Once they are kept the trunk is let go; a second run, without images, reads nothing of it and ends
    with the very same weights. So do two processes under ZeRO-3, but for rounding."""
    shutil.copytree(world.vg, tmp_path / "VG")
    flags = ["--stage", 2, "--init", "identity", "--max_steps", 3, "--learning_rate", 1e-2, "--keep_correct",
             "--per_device_train_batch_size", 8, "--block", "full,self_attn", "--cache_features", tmp_path / "features",
             *dpo_flags(world), "--vg_path", tmp_path / "VG"]
    keep, train_one, filled, lying = train.keep_features, train.train_one, [], []

    def watched(folder, dataset, trunk, *rest):
        kept = keep(folder, dataset, trunk, *rest)
        filled.extend(weakref.ref(p) for p in trunk.parameters() if not p.is_meta)
        return kept

    def started(deepspeed, run, config, base, *rest):
        gc.collect()
        lying.append(all(p.is_meta for p in base.trunk.parameters()) and not any(ref() is not None for ref in filled))
        train_one(deepspeed, run, config, base, *rest)

    monkeypatch.setattr(train, "keep_features", watched)
    monkeypatch.setattr(train, "train_one", started)
    run_train(*flags, "--output_dir", tmp_path / "first", "--gradient_accumulation_steps", 2)
    assert filled and lying == [True, True]
    for folder in ("VG_100K", "VG_100K_2"):
        shutil.rmtree(tmp_path / "VG" / folder, ignore_errors=True)
    monkeypatch.setattr(features, "fill", lambda trunk: pytest.fail("the trunk was read"))
    run_train(*flags, "--output_dir", tmp_path / "again", "--gradient_accumulation_steps", 2)
    assert lying == 4 * [True]
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"train_batch_size": 16, "zero_optimization": {"stage": 3}}))
    two(*flags, "--output_dir", tmp_path / "two", "--deepspeed", config)
    for variant in ("full", "self_attn"):
        first, again = (open(f"{tmp_path}/{name}-{variant}/trained.safetensors", "rb").read() for name in ("first", "again"))
        assert first == again
        losses = [[row["loss"] for row in logged(tmp_path, f"{name}-{variant}")] for name in ("first", "two")]
        assert largest_difference("losses", *losses) < 1e-4 and len(set(losses[0])) == 3
    with pytest.raises(InputError, match="24 images missing"):               # other data: these would have to be read
        run_train(*flags[:-4], "--vg_path", tmp_path / "VG", "--pope_data_path", world.pairs, "--no-keep_correct",
                  "--output_dir", tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------------
# Order, schedule, configuration


def global_batches(world_size, micro, steps=7, start=0, seed=42, examples=22, size=8):
    """Per step the set of examples that all ranks together see."""
    ranks = [list(ResumableSampler(examples, steps, size, micro, rank, world_size, seed, start)) for rank in range(world_size)]
    assert all(len(batches) == (steps - start) * size // (micro * world_size) for batches in ranks)
    per_step = size // (micro * world_size)
    return [sorted(i for batches in ranks for batch in batches[s * per_step:(s + 1) * per_step] for i in batch) for s in range(steps - start)]


def test_global_batches_do_not_depend_on_the_number_of_processes():
    expected = global_batches(1, 8)
    for world_size, micro in ((1, 1), (1, 4), (2, 4), (2, 2), (4, 1), (8, 1)):
        assert global_batches(world_size, micro) == expected
    assert global_batches(1, 8, seed=43) != expected
    assert global_batches(2, 2, start=3) == expected[3:]                         # resumed


def test_every_epoch_sees_every_example_once():
    stream = [i for batch in ResumableSampler(22, 11, 8, 8, 0, 1, 42) for i in batch]             # 88 = 4 epochs
    epochs = [stream[n:n + 22] for n in range(0, 88, 22)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs) and epochs[0] != epochs[1]
    assert len(ResumableSampler(22, 11, 8, 2, 1, 2, 42)) == 11 * 2


def test_cosine():
    # 4 steps of warm-up, 8 of cosine: half way down, the factor is a half.
    assert [cosine(step, 12, 4) for step in (0, 1, 3, 4)] == [0, 0.25, 0.75, 1]
    assert largest_difference("cosine", [cosine(6, 12, 4), cosine(8, 12, 4), cosine(12, 12, 4), cosine(99, 12, 4)],
                              [0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0, 0]) < 1e-12
    assert cosine(0, 5, 0) == 1


def configured(tmp_path, content, micro, accumulation=None, processes=1, offload=False):
    path = None
    if content is not None:
        path = str(tmp_path / "ds.json")
        with open(path, "w") as file:
            json.dump(content, file)
    args = train.parse([])
    args.deepspeed, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.offload = path, micro, accumulation, offload
    return deepspeed_config(args, processes, False)


@pytest.mark.parametrize("content, micro, accumulation, processes, total, steps", (
    (None, 4, None, 1, 128, 32), (None, 4, None, 2, 128, 16), (None, 4, 2, 2, 16, 2), ({"train_batch_size": 12}, 3, None, 2, 12, 2),
    ({"train_batch_size": 12}, 3, 2, 2, 12, 2), ({"zero_optimization": {"stage": 3}}, 64, None, 2, 128, 1)))
def test_batch_arithmetic(tmp_path, content, micro, accumulation, processes, total, steps):
    config = configured(tmp_path, content, micro, accumulation, processes)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (total, micro, steps)
    assert total == micro * steps * processes                                    # what DeepSpeed insists on


@pytest.mark.parametrize("content, micro, accumulation, processes, said", (
    ({"train_batch_size": 128}, 3, None, 1, ("128 ≠ 3 per device", "1 processes", "2 (accumulation 64), 4 (accumulation 32)")),
    ({"train_batch_size": 16}, 16, None, 2, ("16 ≠ 16 per device", "2 processes", "8 (accumulation 1)")),
    ({"train_batch_size": 8}, 2, 3, 1, ("8 ≠ 2 per device", "3 accumulation", "accumulation 4")),
    ({"train_batch_size": 3}, 1, None, 2, ("3 ≠ 1 per device", "2 processes", "no multiple of 2")),                     # nothing would fit
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}, 8, None, 1, ("is 4", "8; remove one")),
    ({"train_batch_size": 8, "gradient_clipping": "auto"}, 8, None, 1, ("ds.json", "gradient_clipping", "auto")),
    ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 8, None, 1, ("zero_optimization.reduce_bucket_size",)),
    ({"train_batch_size": "auto"}, 8, None, 1, ("train_batch_size", "auto")),
    ({"optimizer": {"params": {"betas": [0.9, "auto"]}}}, 8, None, 1, ("optimizer.params.betas.1", "auto")),
    ({"train_batch_size": 128, "gradient_accumulation_steps": 1}, 16, None, 1, ("128 ≠ 16 per device", "1 accumulation", "16 (accumulation 8)")),
    ({"gradient_accumulation_steps": 2}, 8, 4, 1, ("ds.json", "gradient_accumulation_steps is 2", "4; remove one")),
    ({"train_batch_size": "128"}, 8, None, 1, ("ds.json", "train_batch_size must be a whole number")),
    ({"train_batch_size": 0}, None, None, 1, ("ds.json", "above 0")),
    ([{"train_batch_size": 8}], 8, None, 1, ("ds.json", "holds a list")),
    ({"zero_optimization": 3}, 8, None, 1, ("ds.json", "zero_optimization must be an object")),
    ({"optimizer": {"type": "AdamW"}}, 8, None, 1, ("ds.json", "optimizer", "--learning_rate")),
    ({"scheduler": {"type": "WarmupLR"}}, 8, None, 1, ("ds.json", "scheduler", "--warmup_ratio")),
    ({"fp16": {"enabled": True}}, 8, None, 1, ("ds.json", "fp16", "--bf16")),
    ({"bf16": True}, 8, None, 1, ("ds.json: bf16: ", '"bf16": {"enabled": true}')),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, 8, None, 1, ("ds.json: bf16: ", "masters fp32")),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "torch_autocast": {"enabled": True}}, 8, None, 1, ("torch_autocast, data_types: ",)),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 8, None, 1, ("ds.json", "offload_optimizer", "--offload")),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 8, None, 1, ("ds.json", "offload_param", "--offload"))))
def test_impossible_configurations_are_explained(tmp_path, content, micro, accumulation, processes, said):
    with pytest.raises(InputError) as error:
        configured(tmp_path, content, micro, accumulation, processes)
    print(error.value)
    assert all(part in str(error.value) for part in said)


def test_micro_batch_follows_from_the_number_of_processes(tmp_path):
    # Nobody has to know that two processes halve it: the default is the largest that fits, at most the stage's.
    for content, accumulation, processes, micro in ((None, None, 1, 128), (None, None, 2, 64), (None, 4, 2, 16),
                                                    ({"train_batch_size": 12}, None, 2, 6),
                                                    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}, None, 1, 3)):
        assert configured(tmp_path, content, None, accumulation, processes)["train_micro_batch_size_per_gpu"] == micro


def test_micro_batch_is_larger_from_kept_features(world, tmp_path):
    for flags, micro in (([], 4), (["--cache_features", "f"], 16), (["--learning_rate", "1e-6", "5e-7"], 16),
                         (["--cache_features", "f", "--lora_r", "8"], 4)):
        args = train.parse([*dpo_flags(world), *flags])
        assert deepspeed_config(args, 2, False)["train_micro_batch_size_per_gpu"] == micro


def test_offload_only_when_asked_for(tmp_path):
    for content, offload in (({"zero_optimization": {"stage": 2}}, True), ({"zero_optimization": {"stage": 2}}, False)):
        config = configured(tmp_path, content, 4, offload=offload)
        assert ("offload_optimizer" in config["zero_optimization"]) is offload and config["zero_force_ds_cpu_optimizer"] is False
    copied = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "fp16": {"enabled": False}}
    assert "offload_optimizer" in configured(tmp_path, copied, 4, offload=True)["zero_optimization"]
    configured(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": None}}, 4)
    with pytest.raises(InputError, match="--offload needs ZeRO stage 1, 2 or 3"):
        configured(tmp_path, None, 4, offload=True)


def test_the_shipped_configuration_is_plain(tmp_path):
    for processes in (1, 2, 4, 8):
        config = configured(tmp_path, load_json(os.path.join(ROOT, "ds_zero3.json")), 4, None, processes)
        assert config["zero_optimization"]["stage"] == 3 and config["train_batch_size"] == 128
    assert not any("offload" in key for key in config["zero_optimization"])      # pitfall 4


# ---------------------------------------------------------------------------------------------------------------------
# Real runs


STEPS, GLOBAL_BATCH = 5, 8
LOGGED = {"step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected",
          "logps/reference_chosen", "logps/reference_rejected", "learning_rate", "grad_norm", "pairs_per_second"}


def typed(world, folder, name, zero_stage, *flags, **ds):
    """Flags of a stage-2 run of five steps with a DeepSpeed file of its own."""
    config = folder / f"{name}.json"
    config.write_text(json.dumps({"train_batch_size": GLOBAL_BATCH, "zero_optimization": {"stage": zero_stage}, **ds}))
    return ["--stage", 2, "--deepspeed", config, "--output_dir", folder / name, "--max_steps", STEPS,
            "--learning_rate", 1e-2, "--keep_correct", *flags, *dpo_flags(world)]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory, in_this_process):
    """The same five steps twice: one process under ZeRO-0; two under ZeRO-3 with gradient accumulation. → folder"""
    folder = tmp_path_factory.mktemp("runs")
    before = {path: open(path, "rb").read() for path in glob(f"{world.base}/**/*.*", recursive=True)}
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "monitor"}}
    run_train(*typed(world, folder, "one", 0, "--per_device_train_batch_size", 8, **monitor))
    print(succeeds("deepspeed", "--num_gpus", 2, "train.py", *typed(world, folder, "two", 3, "--per_device_train_batch_size", 2)))
    assert before == {path: open(path, "rb").read() for path in before}          # a run writes nothing into its base
    return folder


def logged(folder, name):
    with open(folder / name / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_zero3_on_two_processes_follows_zero0_on_one(runs):
    one, two = logged(runs, "one"), logged(runs, "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, STEPS + 1))
    assert largest_difference("first loss against ln 2", one[0]["loss"], math.log(2)) < 1e-6
    losses = [[row["loss"] for row in rows] for rows in (one, two)]
    print("losses", losses)
    assert abs(losses[0][-1] - losses[0][0]) > 0.01                              # they went somewhere
    assert largest_difference("losses", *losses) < 1e-5
    for name in LOGGED - {"step", "pairs_per_second"}:
        ours, theirs = ([row[name] for row in rows] for rows in (two, one))
        assert largest_difference(name, ours, theirs) < 2e-3 * max(1, np.abs(theirs).max())
    tensors = [read_file(str(runs / name / "trained.safetensors")) for name in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
    assert max(largest_difference(key, stored.read(), tensors[1][key].read()) for key, stored in tensors[0].items()) < 1e-2


MATRIX = [(stage, offload, processes) for stage in (0, 1, 2, 3) for offload in (False, True) for processes in (1, 2)
          if stage or not offload]


@pytest.fixture(scope="module")
def matrix(world, two, tmp_path_factory, in_this_process):
    """The trunk's LoRA, the block and lm_head, three steps, under every ZeRO stage, on one and two processes → folder."""
    folder = tmp_path_factory.mktemp("matrix")
    for stage, offload, processes in MATRIX:
        config = folder / f"zero{stage}.json"
        config.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": stage}}))
        run = two if processes == 2 else run_train
        run("--tune", "lora,post_decoder,lm_head", "--lora_r", 4, "--lora_dropout", 0, "--learning_rate", 1e-2, "--max_steps", 3,
            "--keep_correct", "--per_device_train_batch_size", 2, "--deepspeed", config, *dpo_flags(world),
            *["--offload"] * offload, "--output_dir", folder / f"{stage}-{offload}-{processes}")
    return folder


@pytest.mark.parametrize("stage, offload, processes", MATRIX)
def test_every_zero_stage_gives_the_same_losses(matrix, stage, offload, processes):
    """ZeRO 0 to 3, optimizer on the CPU or not, one process or two, accumulation 4 or 2: the same global batches."""
    reference, ours = logged(matrix, "0-False-1"), logged(matrix, f"{stage}-{offload}-{processes}")
    for name in ("loss", "rewards/margin", "logps/chosen", "grad_norm"):
        expected = [row[name] for row in reference]
        assert largest_difference(name, [row[name] for row in ours], expected) < 1e-5 * max(1, np.abs(expected).max())
    assert len({row["loss"] for row in ours}) == 3


@pytest.mark.parametrize("max_norm", (0.0, 1.0))
def test_masters_are_adamw_in_fp32(max_norm):
    """bf16 parameters follow AdamW of fp32 ones that gets their gradients, also where bf16 alone would not have moved."""
    torch.manual_seed(0)
    rounded = [torch.nn.Parameter(torch.randn(5, 3).bfloat16()), torch.nn.Parameter(torch.randn(7).bfloat16())]
    exact = [torch.nn.Parameter(p.detach().float()) for p in rounded]
    options = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
    ours, theirs = MasterAdamW(rounded, max_norm, **options), torch.optim.AdamW(exact, **options)
    for step in range(60):
        for p, q in zip(rounded, exact):
            p.grad = (3 * torch.ones_like(p) + torch.randn(p.shape)).bfloat16()
            q.grad = p.grad.float()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(exact, max_norm)
        ours.step()
        theirs.step()
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(rounded, exact)) and rounded[0].grad is None
        if step == 30:                                                           # what is saved is all that is needed
            state = copy.deepcopy(ours.state_dict())
            ours = MasterAdamW(rounded, max_norm, **options)
            ours.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(ours.masters, exact))


def test_small_steps_are_not_lost_in_bf16(world, two, tmp_path, in_this_process):
    """At a rate of which bf16 keeps nothing, under ZeRO 0 (masters of ours) and 1 (DeepSpeed's), on one process and two."""
    def run(name, start, stage):
        config = tmp_path / f"zero{stage}.json"
        config.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": stage}}))
        start("--stage", 2, "--init", "identity", "--bf16", "--learning_rate", 2e-5, "--max_steps", 6, "--keep_correct",
              "--per_device_train_batch_size", 4, "--deepspeed", config, "--output_dir", tmp_path / name, *dpo_flags(world))
        return {k: s.read().float() for k, s in read_file(str(tmp_path / name / "trained.safetensors")).items()}

    one, other, both = run("one", run_train, 0), run("other", run_train, 1), run("both", two, 0)
    before = load_base(world.base)[1].lm_head.weight.bfloat16().float()
    moved = one["lm_head.weight"] != before
    step = 2e-5 / (before.abs() * 2 ** -8)                                       # of the distance to the next number in bf16
    assert moved[step < 0.4].float().mean() > 0.005                              # several steps together reach it, one does not
    for name, result in (("ZeRO-1", other), ("two processes", both)):
        differ = (result["lm_head.weight"] != one["lm_head.weight"]).float().mean().item()
        print(name, "differ in", differ, "of", moved.float().mean().item(), "moved")
        assert differ < 0.2 * moved.float().mean()


def test_text_only_batches_under_zero3(world, two, tmp_path, in_this_process):
    """Conversations without an image, some batches of nothing else, on two processes: no hang, and the losses of one process."""
    rows = load_json(world.llava)[:16]
    said = "Is a dog an animal?", "Yes, a dog is an animal."
    text = [{"conversations": [{"from": who, "value": value} for who, value in zip(("human", "gpt"), said)]}] * 16
    data, config = tmp_path / "mixed.json", tmp_path / "zero3.json"
    data.write_text(json.dumps(rows + text))
    config.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 3}}))
    flags = ["--tune", "clip,projector,llama", *llava_flags(world), "--data_path", data, "--learning_rate", 1e-3, "--max_steps", 4,
             "--per_device_train_batch_size", 2]
    two(*flags, "--deepspeed", config, "--output_dir", tmp_path / "two")
    run_train(*flags, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "one")
    losses = [[row["loss"] for row in logged(tmp_path, name)] for name in ("one", "two")]
    assert largest_difference("losses", *losses) < 1e-4
    lengths = row_lengths(read_llava(str(data), world.images), 9)                # what the test is about did happen:
    ranks = [[(lengths[ids] < 0).all() for ids in ResumableSampler(32, 4, 8, 2, rank, 2, 42, lengths=lengths)] for rank in (0, 1)]
    assert any(a and not b or b and not a for a, b in zip(*ranks))               # text on one, images on the other


def test_every_metric_is_logged(runs):
    for name in ("one", "two"):
        for row in logged(runs, name):
            assert LOGGED <= row.keys() and all(math.isfinite(value) for value in row.values())
            assert row["grad_norm"] > 0 and row["pairs_per_second"] > 0
            assert largest_difference("margin", row["rewards/margin"], row["rewards/chosen"] - row["rewards/rejected"]) < 1e-5
        rates = [row["learning_rate"] for row in logged(runs, name)]
        assert largest_difference("learning rates", rates, [1e-2 * cosine(step, STEPS, 0) for step in range(STEPS)]) < 1e-9


def test_deepspeeds_own_monitor_writes(runs):
    files = glob(str(runs / "csv" / "**" / "*.csv"), recursive=True)
    rows = {os.path.basename(path): list(csv.reader(open(path))) for path in files}
    loss, = (table for name, table in rows.items() if name.endswith("_loss.csv"))
    assert largest_difference("CSV against metrics.jsonl", [float(row[1]) for row in loss[1:]], [row["loss"] for row in logged(runs, "one")]) < 1e-5
    assert len(files) >= len(LOGGED) - 1


def test_checkpoint_holds_exactly_what_was_trained(world, runs):
    trunk, base_head, *_ = load_base(world.base)
    expected = {name: p.shape for name, p in Head(trunk.config, trunk.config.block()).named_parameters()}
    for name in ("one", "two"):
        assert sorted(os.listdir(runs / name)) == ["config.json", "metrics.jsonl", "tokenizer.model", "trained.safetensors", "training.svg"]
        tensors = {key: stored.read() for key, stored in read_file(str(runs / name / "trained.safetensors")).items()}
        assert {key: t.shape for key, t in tensors.items()} == expected
        assert all(t.any() and t.isfinite().all() for t in tensors.values())     # pitfalls 14 and 15: nothing empty
        assert load_json(runs / name / "config.json")["fingerprint"] == fingerprint(trunk, base_head)
        head = load_trained(str(runs / name), trunk.config, base_head, fingerprint(trunk, base_head))
        assert all(torch.equal(t, tensors[key]) for key, t in head.state_dict().items())
    assert not glob(str(runs / "*.partial")) and not glob(str(runs / "*.run"))


def test_frozen_tensors_are_bit_identical_after_training(world, tmp_path, monkeypatch, in_this_process):
    """The modules of real runs, after their last step, against the base loaded again; stage by stage."""
    initial_head = train.initial_head
    for stage in STAGES:
        seen, heads = [], []
        monkeypatch.setattr(train, "load_base", lambda *args, **options: seen.append(load_base(*args, **options)) or seen[-1])
        monkeypatch.setattr(train, "initial_head", lambda *args: heads.append(initial_head(*args)) or heads[-1])
        data = ["--data_path", world.llava, "--image_folder", world.images, "--model_name_or_path", world.base] if stage == 0 else dpo_flags(world)
        train.train(train.parse(["--stage", str(stage), "--init", "identity", "--output_dir", str(tmp_path / f"stage{stage}"), "--max_steps", "2", "--learning_rate", "1e-2",
                                 "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--keep_correct", *data]))
        (trunk, base_head, *_), (fresh_trunk, fresh_head, *_), head = seen[0], load_base(world.base), heads[-1][0]
        assert torch.equal(base_head.lm_head.weight, fresh_head.lm_head.weight)  # a run trains a copy: the next one starts anew
        after = trunk.state_dict() | {"lm_head.weight": head.lm_head.weight}
        before = fresh_trunk.state_dict() | fresh_head.state_dict()
        changed = {key for key in before if not torch.equal(after[key], before[key])}
        assert changed == {0: {key for key in before if key.startswith(("model.", "lm_head."))}, 1: set(), 2: {"lm_head.weight"}}[stage]
        base_head.lm_head = head.lm_head
        assert (fingerprint(trunk, base_head) == fingerprint(fresh_trunk, fresh_head)) is (stage == 1)
        if stage:
            names = read_file(str(tmp_path / f"stage{stage}" / "trained.safetensors"))
            assert {name.split(".")[0] for name in names} == {1: {"post_interaction_block"}, 2: {"post_interaction_block", "lm_head"}}[stage]
        else:
            saved = load_base(str(tmp_path / "stage0"))
            assert all(torch.equal(t, after[key]) for key, t in (saved[0].state_dict() | saved[1].state_dict()).items())


def llava_flags(world):
    return ["--loss", "sft", "--data_path", world.llava, "--image_folder", world.images, "--model_name_or_path", world.base]


def test_sft_of_a_global_batch_is_one_mean(world, two, tmp_path, in_this_process):
    """However it is cut: one micro batch, eight of one row, or two processes. Rows differ in length, so a mean of means would not be."""
    common = ["--tune", "projector,llama,lm_head", "--learning_rate", 1e-2, "--max_steps", 4, *llava_flags(world)]
    cut = lambda name, micro, accumulation: [*common, "--output_dir", tmp_path / name, "--per_device_train_batch_size", micro,
                                             "--gradient_accumulation_steps", accumulation]
    run_train(*cut("whole", 8, 1)), run_train(*cut("singles", 1, 8))
    two(*cut("two", 2, 2))
    losses = {name: [row["loss"] for row in logged(tmp_path, name)] for name in ("whole", "singles", "two")}
    print(losses)
    for name in ("singles", "two"):
        assert largest_difference(name, losses[name], losses["whole"]) < 1e-4
    rows = [read_file(str(tmp_path / name / "model.safetensors")) for name in ("whole", "singles")]
    assert max(largest_difference(k, stored.read(), rows[1][k].read()) for k, stored in rows[0].items()) < 1e-2


def test_sft_of_the_block(world, tmp_path, in_this_process):
    """The notes' "Llava" rows: conversations instead of pairs, from kept features as with the frozen trunk in the loop."""
    flags = ["--tune", "post_decoder", "--learning_rate", 1e-2, "--max_steps", 4, "--per_device_train_batch_size", 8,
             *llava_flags(world)]
    run_train(*flags, "--output_dir", tmp_path / "loop")
    run_train(*flags, "--output_dir", tmp_path / "kept", "--cache_features", tmp_path / "features")
    losses = [[row["loss"] for row in logged(tmp_path, name)] for name in ("loop", "kept")]
    assert largest_difference("losses", *losses) < 1e-4 and losses[0][0] != losses[0][3]
    trunk, base_head, *_ = load_base(world.base)
    head = load_trained(str(tmp_path / "kept"), trunk.config, base_head, fingerprint(trunk, base_head))
    assert head.lm_head is base_head.lm_head and not head.post_interaction_block.is_identity()


def test_dpo_of_the_whole_trunk(world, two, tmp_path, in_this_process):
    """The reference is the base as it was, at every step and in the second epoch; what is saved is a base of its own."""
    flags = ["--tune", "projector,llama", "--learning_rate", 3e-3, "--max_steps", 7, "--num_train_epochs", 3, *dpo_flags(world)]
    run_train(*flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 32, "--gradient_accumulation_steps", 1)
    config = tmp_path / "two.json"
    config.write_text(json.dumps({"train_batch_size": 32, "zero_optimization": {"stage": 3}}))
    two(*flags, "--output_dir", tmp_path / "two", "--deepspeed", config, "--per_device_train_batch_size", 8)
    one, other = logged(tmp_path, "one"), logged(tmp_path, "two")
    assert one[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and one[0]["rewards/margin"] == 0
    assert largest_difference("losses", [r["loss"] for r in one], [r["loss"] for r in other]) < 1e-3
    trunk, head, tokenizer, preprocess = load_base(world.base)
    patches = trunk.config.vision.num_patches
    dataset = PackedDataset(read_hadpo(world.desc, world.pairs, world.vg), tokenizer, preprocess, patches, 256)
    assert len(dataset) < 7 * 32                                                 # into the second epoch
    objective = Objective(trunk.requires_grad_(True), head, "dpo").eval()
    for row, ids in zip(one, ResumableSampler(len(dataset), 7, 32, 32, 0, 1, 42)):
        chosen, rejected = objective(dataset[ids]).mean(0).tolist()
        logged_reference = [row["logps/reference_chosen"], row["logps/reference_rejected"]]
        assert largest_difference("reference", logged_reference, [chosen, rejected]) < 1e-4
    assert abs(one[-1]["rewards/margin"]) > 0.01
    trained, *_ = load_base(str(tmp_path / "one"))
    changed = {k for k, t in trained.state_dict().items() if not torch.equal(t, trunk.state_dict()[k])}
    assert changed == {k for k in trunk.state_dict() if k.startswith("model.")} and not os.path.exists(tmp_path / "one.run")


def test_what_init_brought_along_is_kept(world, runs, tmp_path, in_this_process):
    """Stage 1 from a stage-2 checkpoint trains the block alone; the lm_head that came with it must not be lost."""
    flags = typed(world, tmp_path, "again", 0, "--per_device_train_batch_size", 8, "--init", runs / "one")
    run_train(*flags, "--stage", 1)
    before, after = ({k: stored.read() for k, stored in read_file(f"{folder}/trained.safetensors").items()} for folder in (runs / "one", tmp_path / "again"))
    assert before.keys() == after.keys() and torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_run_of_a_sweep_is_the_run_alone(world, tmp_path, monkeypatch, in_this_process):
    """Two variants that read different features, two rates: one load of the base, a folder each, and not a bit of difference."""
    loads = []
    monkeypatch.setattr(train, "load_base", lambda *args, **options: loads.append(1) or load_base(*args, **options))
    run = lambda *flags: run_train("--stage", 2, "--init", "identity", "--max_steps", 3, "--per_device_train_batch_size", 8,
                                   "--gradient_accumulation_steps", 2, "--keep_correct", *flags, *dpo_flags(world))
    run("--output_dir", tmp_path / "sweep", "--block", "align_after_align,self_attn,head", "--learning_rate", "1e-2", "3e-3")
    names = [f"sweep-{block}-{rate}" for block in ("align_after_align", "self_attn", "head") for rate in ("0.01", "0.003")]
    assert len(loads) == 1 and sorted(os.listdir(tmp_path)) == sorted(["features", *names])
    assert len(os.listdir(tmp_path / "features")) == 3                           # projector's, whole rows, the tower's
    for block, rate in (("align_after_align", "0.003"), ("self_attn", "0.01"), ("head", "0.003")):
        run("--output_dir", tmp_path / "alone", "--block", block, "--learning_rate", rate, "--cache_features", tmp_path / "f")
        alone, swept = (open(f"{tmp_path}/{name}/trained.safetensors", "rb").read() for name in ("alone", f"sweep-{block}-{rate}"))
        assert alone == swept
    assert len({open(f"{tmp_path}/{name}/trained.safetensors", "rb").read() for name in names}) == 6


def test_a_sweep_over_the_trunk_starts_every_run_from_the_base(world, tmp_path, in_this_process):
    run = lambda name, *rates: run_train("--stage", 0, "--max_steps", 2, "--per_device_train_batch_size", 8, *llava_flags(world),
                                         "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / name, "--learning_rate", *rates)
    run("sweep", 1e-2, 1e-3), run("alone", 1e-3)
    first, second, alone = (open(f"{tmp_path}/{name}/model.safetensors", "rb").read()
                            for name in ("sweep-0.01", "sweep-0.001", "alone"))
    assert second == alone != first


def test_flags_that_cannot_be(world, runs):
    """Before anything is made or loaded: numbers that mean nothing, files without the model that they are for, no base at all."""
    for flags, said in ((["--max_steps", "-1"], "--max_steps -1: must be above 0"), (["--num_train_epochs", "0"], "--num_train_epochs 0"),
                        (["--learning_rate", "1e-6", "0"], "--learning_rate 0"), (["--logging_steps", "0"], "--logging_steps 0"),
                        (["--save_steps", "-5"], "--save_steps -5"), (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
                        (["--vg_path", world.vg], "--vg_path is given and --model_name_or_path is not.*tiny world"),
                        (dpo_flags(world)[2:] + ["--model_name_or_path", "liuhaotian/llava-v1.5-7b"], "llava-v1.5-7b: no such folder"),
                        (dpo_flags(world)[2:] + ["--model_name_or_path", str(runs / "one")], "one: is no whole model.*--init")):
        with pytest.raises(InputError, match=said):
            train.parse(flags)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_trained_tensor_without_gradient_is_an_error(world, tmp_path, monkeypatch, in_this_process, stage):
    """Nothing would train it, and nobody would notice: under every ZeRO stage it is named in the first step."""
    set_trained = train.set_trained

    def one_more(trunk, head, groups):
        head.unused = torch.nn.Parameter(torch.ones(3))
        return set_trained(trunk, head, groups) | {"unused": head.unused.requires_grad_(True)}

    monkeypatch.setattr(train, "set_trained", one_more)
    with pytest.raises(InputError, match=r"1 trained tensors get no gradient \(unused\)"):
        run_train(*typed(world, tmp_path, "run", stage, "--per_device_train_batch_size", 8))


def test_a_policy_that_is_not_its_reference_at_the_start(world, tmp_path, monkeypatch, in_this_process):
    """Then the loss is not ln 2, and what is learnt is measured against something else: the run ends in its first step."""
    def other_reference(head):
        other = reference_of(head)
        other.lm_head = torch.nn.Linear(head.lm_head.in_features, head.lm_head.out_features, bias=False)
        return other

    monkeypatch.setattr("objective.reference_of", other_reference)
    with pytest.raises(RuntimeError, match="policy and reference differ before the first step"):
        run_train(*typed(world, tmp_path, "run", 0, "--per_device_train_batch_size", 8))


@pytest.mark.parametrize("damage", ("a key is lost", "zeros", "one number"))
@pytest.mark.parametrize("stage", (0, 2))
def test_a_save_that_went_wrong_is_found(world, tmp_path, monkeypatch, in_this_process, stage, damage):
    """The written file is opened again, whether it is what was trained or a whole model; what was there before stays."""
    def damaged(tensors, path, metadata):
        name = max(tensors, key=lambda k: tensors[k].numel())
        wrong = {k: t for k, t in tensors.items() if k != name}
        if damage != "a key is lost":
            wrong[name] = torch.zeros_like(tensors[name]) if damage == "zeros" else tensors[name].clone()
            wrong[name].view(-1)[7] += 1
        save_file(wrong, path, metadata)

    monkeypatch.setattr("checkpoint.save_file", damaged)
    flags = llava_flags(world) if stage == 0 else ["--keep_correct", "--init", "identity", *dpo_flags(world)]
    with pytest.raises(RuntimeError, match="safetensors: what was written is not"):
        run_train("--stage", stage, "--max_steps", 1, "--output_dir", tmp_path / "run", *flags)
    assert not os.path.exists(tmp_path / "run")


def test_sweeps_that_cannot_be(world):
    with pytest.raises(SystemExit):
        train.parse(["--block", "full,nonsense"])
    for flags, said in ((["--stage", "1", "--block", "full,head"], "head"),
                        (["--block", "full,self_attn", "--init", f"{world.base}/none"], "none")):
        with pytest.raises(InputError, match=said):
            train.parse(flags)


def test_fingerprint_of_large_tensors():
    """A tensor of more than 2^24 numbers, as a 7B model has: its last sample is its last number, not one behind it."""
    large, head = torch.nn.Linear(1, 2 ** 25 + 1, bias=False), SimpleNamespace(lm_head=torch.nn.Linear(1, 1), block=None)
    before = fingerprint(large, head)
    with torch.no_grad():
        large.weight[-1] += 1
    assert fingerprint(large, head) != before
