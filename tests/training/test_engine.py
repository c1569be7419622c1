"""DeepSpeed: its configuration, the schedule, the optimizer, and that no ZeRO stage changes a loss.
"""
import copy
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, row_format, run_train
from programs import ROOT
from short_runs import llava_flags, logged, losses_of, trained_tensors, zero_file

from checkpoints.load import load_base
from data import PackedDataset
from support.common import InputError, versions
from training.batches import ResumableSampler, Share
from training.conversations import read_llava
from training.engine import MasterAdamW, cosine, deepspeed_config, start_deepspeed
from training.flags import parse_flags

# ---- Schedule and configuration ------------------------------------------------------------------


def test_cosine():
    # 4 steps of warm-up, 8 of cosine: half way down, the factor is a half.
    assert [cosine(step, 12, 4) for step in (0, 1, 3, 4)] == [0, 0.25, 0.75, 1]
    factors = [cosine(step, 12, 4) for step in (6, 8, 12, 99)]
    expected = [0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0, 0]
    assert largest_difference("cosine", factors, expected) < 1e-12
    assert cosine(0, 5, 0) == 1


def configured(tmp_path, content, micro, accumulation=None, processes=1, offload=False):
    """What DeepSpeed gets from a file of this content (None: no file) and these flags."""
    args = parse_flags([])
    if content is not None:
        args.deepspeed = str(tmp_path / "ds.json")
        with open(args.deepspeed, "w") as file:
            json.dump(content, file)
    args.per_device_train_batch_size = micro
    args.gradient_accumulation_steps = accumulation
    args.offload = offload
    return deepspeed_config(args, processes, False)


@pytest.mark.parametrize("content, micro, accumulation, processes, total, steps", (
    (None, 4, None, 1, 128, 32),
    (None, 4, None, 2, 128, 16),
    (None, 4, 2, 2, 16, 2),
    ({"train_batch_size": 12}, 3, None, 2, 12, 2),
    ({"train_batch_size": 12}, 3, 2, 2, 12, 2),
    ({"zero_optimization": {"stage": 3}}, 64, None, 2, 128, 1)))
def test_batch_arithmetic(tmp_path, content, micro, accumulation, processes, total, steps):
    config = configured(tmp_path, content, micro, accumulation, processes)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[name] for name in names] == [total, micro, steps]
    assert total == micro * steps * processes                        # what DeepSpeed insists on


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}


@pytest.mark.parametrize("content, micro, accumulation, processes, said", (
    ({"train_batch_size": 128}, 3, None, 1,
     ("128 ≠ 3 per device", "1 processes", "2 (accumulation 64), 4 (accumulation 32)")),
    ({"train_batch_size": 16}, 16, None, 2,
     ("16 ≠ 16 per device", "2 processes", "8 (accumulation 1)")),
    ({"train_batch_size": 8}, 2, 3, 1, ("8 ≠ 2 per device", "3 accumulation", "accumulation 4")),
    ({"train_batch_size": 3}, 1, None, 2,                                        # nothing would fit
     ("3 ≠ 1 per device", "2 processes", "no multiple of 2")),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}, 8, None, 1,
     ("is 4", "8; remove one")),
    ({"train_batch_size": 8, "gradient_clipping": "auto"}, 8, None, 1,
     ("ds.json", "gradient_clipping", "auto")),
    ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 8, None, 1,
     ("zero_optimization.reduce_bucket_size",)),
    ({"train_batch_size": "auto"}, 8, None, 1, ("train_batch_size", "auto")),
    ({"optimizer": {"params": {"betas": [0.9, "auto"]}}}, 8, None, 1,
     ("optimizer.params.betas.1", "auto")),
    ({"train_batch_size": 128, "gradient_accumulation_steps": 1}, 16, None, 1,
     ("128 ≠ 16 per device", "1 accumulation", "16 (accumulation 8)")),
    ({"gradient_accumulation_steps": 2}, 8, 4, 1,
     ("ds.json", "gradient_accumulation_steps is 2", "4; remove one")),
    ({"train_batch_size": "128"}, 8, None, 1,
     ("ds.json", "train_batch_size must be a whole number")),
    ({"train_batch_size": 0}, None, None, 1, ("ds.json", "above 0")),
    ([{"train_batch_size": 8}], 8, None, 1, ("ds.json", "holds a list")),
    ({"zero_optimization": 3}, 8, None, 1, ("ds.json", "zero_optimization must be an object")),
    ({"optimizer": {"type": "AdamW"}}, 8, None, 1, ("ds.json", "optimizer", "--learning_rate")),
    ({"scheduler": {"type": "WarmupLR"}}, 8, None, 1, ("ds.json", "scheduler", "--warmup_ratio")),
    ({"fp16": {"enabled": True}}, 8, None, 1, ("ds.json", "fp16", "--bf16")),
    ({"bf16": True}, 8, None, 1, ("ds.json: bf16: ", '"bf16": {"enabled": true}')),
    ({"bf16": MASTERS}, 8, None, 1, ("ds.json: bf16: ", "masters fp32")),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "torch_autocast": {"enabled": True}}, 8, None, 1,
     ("torch_autocast, data_types: ",)),
    ({"zero_optimization": OFFLOADED}, 8, None, 1, ("ds.json", "offload_optimizer", "--offload")),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 8, None, 1,
     ("ds.json", "offload_param", "--offload"))))
def test_impossible_configurations_are_explained(tmp_path, content, micro, accumulation, processes,
                                                 said):
    with pytest.raises(InputError) as error:
        configured(tmp_path, content, micro, accumulation, processes)
    print(error.value)
    assert all(part in str(error.value) for part in said)


def test_micro_batch_follows_from_the_number_of_processes(tmp_path):
    # Nobody has to know that two processes halve it: the default is the largest that fits, at most
    # the stage's.
    in_file = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}
    for content, accumulation, processes, micro in (
            (None, None, 1, 128), (None, None, 2, 64), (None, 4, 2, 16),
            ({"train_batch_size": 12}, None, 2, 6), (in_file, None, 1, 3)):
        config = configured(tmp_path, content, None, accumulation, processes)
        assert config["train_micro_batch_size_per_gpu"] == micro


def test_micro_batch_is_larger_from_kept_features(world):
    for flags, micro in (([], 4), (["--cache_features", "f"], 16),
                         (["--learning_rate", "1e-6", "5e-7"], 16),
                         (["--cache_features", "f", "--lora_r", "8"], 4)):
        args = parse_flags([*dpo_flags(world), *flags])
        assert deepspeed_config(args, 2, False)["train_micro_batch_size_per_gpu"] == micro


def test_offload_only_when_asked_for(tmp_path):
    for offload in (True, False):
        config = configured(tmp_path, {"zero_optimization": {"stage": 2}}, 4, offload=offload)
        assert ("offload_optimizer" in config["zero_optimization"]) is offload
        assert config["zero_force_ds_cpu_optimizer"] is False
    copied = {"zero_optimization": OFFLOADED, "fp16": {"enabled": False}}
    config = configured(tmp_path, copied, 4, offload=True)
    assert "offload_optimizer" in config["zero_optimization"]
    nowhere = {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": None}
    configured(tmp_path, {"zero_optimization": nowhere}, 4)
    with pytest.raises(InputError, match="--offload needs ZeRO stage 1, 2 or 3"):
        configured(tmp_path, None, 4, offload=True)


def test_the_shipped_configuration_is_plain(tmp_path):
    content = load_json(os.path.join(ROOT, "ds_zero3.json"))
    for processes in (1, 2, 4, 8):
        config = configured(tmp_path, content, 4, None, processes)
        assert config["zero_optimization"]["stage"] == 3 and config["train_batch_size"] == 128
    assert not any("offload" in key for key in config["zero_optimization"])      # pitfall 4


def test_deepspeed_that_cannot_be_imported(monkeypatch, in_this_process):
    """Pitfall 3: what a version that does not fit this torch does."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    said = "deepspeed cannot be imported.*torch.*driver.*pip install -r requirements.txt"
    with pytest.raises(InputError, match=said):
        start_deepspeed()
    assert "deepspeed 0." in versions()


# ---- The optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", (0.0, 1.0))
def test_masters_are_adamw_in_fp32(max_norm):
    """bf16 parameters follow AdamW of fp32 ones that gets their gradients, also where bf16 alone
    would not have moved."""
    torch.manual_seed(0)
    rounded = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((5, 3), (7,))]
    exact = [torch.nn.Parameter(p.detach().float()) for p in rounded]
    options = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
    ours = MasterAdamW([{"params": rounded}], max_norm, **options)
    theirs = torch.optim.AdamW(exact, **options)
    for step in range(60):
        for p, q in zip(rounded, exact, strict=True):
            p.grad = (3 * torch.ones_like(p) + torch.randn(p.shape)).bfloat16()
            q.grad = p.grad.float()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(exact, max_norm)
        ours.step()
        theirs.step()
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(rounded, exact, strict=True))
        assert rounded[0].grad is None
        if step == 30:                                       # what is saved is all that is needed
            state = copy.deepcopy(ours.state_dict())
            ours = MasterAdamW([{"params": rounded}], max_norm, **options)
            ours.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(ours.masters, exact, strict=True))


def test_small_steps_are_not_lost_in_bf16(world, two, tmp_path, in_this_process):
    """At a rate of which bf16 keeps nothing, under ZeRO 0 (masters of ours) and 1 (DeepSpeed's), on
    one process and two."""
    def run(name, start, stage):
        start("--stage", 2, "--init", "identity", "--bf16", "--learning_rate", 2e-5,
              "--max_steps", 6, "--keep_correct", "--per_device_train_batch_size", 4,
              "--deepspeed", zero_file(tmp_path, stage), "--output_dir", tmp_path / name,
              *dpo_flags(world))
        return trained_tensors(tmp_path / name)["lm_head.weight"].float()

    one, other, both = run("one", run_train, 0), run("other", run_train, 1), run("both", two, 0)
    before = load_base(world.base).head.lm_head.weight.bfloat16().float()
    moved = one != before
    step = 2e-5 / (before.abs() * 2 ** -8)           # of the distance to the next number in bf16
    # Several steps together reach it, one does not.
    assert moved[step < 0.4].float().mean() > 0.005
    for name, weight in (("ZeRO-1", other), ("two processes", both)):
        differ = (weight != one).float().mean().item()
        print(name, "differ in", differ, "of", moved.float().mean().item(), "moved")
        assert differ < 0.2 * moved.float().mean()


# ---- ZeRO ----------------------------------------------------------------------------------------


MATRIX = [(stage, offload, processes) for stage in (0, 1, 2, 3) for offload in (False, True)
          for processes in (1, 2) if stage or not offload]


@pytest.fixture(scope="module")
def matrix(world, two, tmp_path_factory, in_this_process):
    """The trunk's LoRA, the block and lm_head, three steps, under every ZeRO stage, on one and two
    processes → folder."""
    folder = tmp_path_factory.mktemp("matrix")
    for stage, offload, processes in MATRIX:
        run = two if processes == 2 else run_train
        run("--tune", "lora,post_decoder,lm_head", "--lora_r", 4, "--lora_dropout", 0,
            "--learning_rate", 1e-2, "--max_steps", 3, "--keep_correct",
            "--per_device_train_batch_size", 2, "--deepspeed", zero_file(folder, stage),
            *dpo_flags(world), *["--offload"] * offload,
            "--output_dir", folder / f"{stage}-{offload}-{processes}")
    return folder


@pytest.mark.parametrize("stage, offload, processes", MATRIX)
def test_every_zero_stage_gives_the_same_losses(matrix, stage, offload, processes):
    """ZeRO 0 to 3, optimizer on the CPU or not, one process or two, accumulation 4 or 2: the same
    global batches."""
    reference = logged(matrix / "0-False-1")
    ours = logged(matrix / f"{stage}-{offload}-{processes}")
    for name in ("loss", "rewards/margin", "logps/chosen", "grad_norm"):
        expected, said = ([row[name] for row in rows] for rows in (reference, ours))
        bound = 1e-5 * max(1, np.abs(expected).max())
        assert largest_difference(name, said, expected) < bound
    assert len({row["loss"] for row in ours}) == 3


def test_text_only_batches_under_zero3(world, two, tmp_path, in_this_process):
    """Conversations without an image, some batches of nothing else, on two processes: no hang, and
    the losses of one process."""
    rows = load_json(world.llava)[:16]
    said = ("human", "Is a dog an animal?"), ("gpt", "Yes, a dog is an animal.")
    text = [{"conversations": [{"from": who, "value": value} for who, value in said]}] * 16
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(rows + text))
    flags = ["--tune", "clip,projector,llama", *llava_flags(world), "--data_path", data,
             "--learning_rate", 1e-3, "--max_steps", 4, "--per_device_train_batch_size", 2]
    two(*flags, "--deepspeed", zero_file(tmp_path, 3), "--output_dir", tmp_path / "two")
    run_train(*flags, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "one")
    losses = [losses_of(tmp_path / name) for name in ("one", "two")]
    assert largest_difference("losses", *losses) < 1e-4
    # What the test is about did happen: text on one process, images on the other.
    base = load_base(world.base)
    examples = read_llava(str(data), world.images)
    lengths = PackedDataset(examples, row_format(base.config, base.tokenizer)).lengths()
    samplers = [ResumableSampler(32, 4, Share(8, 2, rank, 2), 42, lengths=lengths)
                for rank in (0, 1)]
    ranks = [[(lengths[ids] < 0).all() for ids in sampler] for sampler in samplers]
    assert any(a != b for a, b in zip(*ranks, strict=True))
