"""Weight decay leaves norms and biases alone, as transformers' Trainer does, under every ZeRO
stage."""
import json

import pytest
import torch
from conftest import run_train, small_llava
from short_runs import five_steps, read_bytes, trained_tensors
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

import train
from model import set_trained
from support.common import InputError
from training import resume
from training.engine import (
    MasterAdamW,
    Schedule,
    is_decayed,
    start_deepspeed,
    start_engine,
)
from training.lora import add_lora

RATE, DECAY = 0.1, 0.5
# What Trainer.get_decay_parameter_names of transformers 5 leaves out, beside nn.LayerNorm.
PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class Toy(nn.Module):
    """Matrices, norms and biases under the names that they have in models, without a gradient."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.layer_norm1 = nn.Linear(6, 4), nn.LayerNorm(4)
        self.input_layernorm, self.norm = nn.RMSNorm(4), nn.RMSNorm(4)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))

    def forward(self, x):
        x = self.norm(self.input_layernorm(self.layer_norm1(self.q_proj(x))))
        return 0 * (self.lora_A(x).sum() + self.class_embedding.sum())


def after_one_step(stage, bf16, weight_decay):
    """The toy's numbers before and after a step of the engine, whose gradients are all 0."""
    torch.manual_seed(0)
    deepspeed, _ = start_deepspeed()
    toy = Toy()
    if bf16:
        toy.bfloat16()
    before = {name: p.detach().float().clone() for name, p in toy.named_parameters()}
    config = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16},
              "gradient_accumulation_steps": 1, "zero_optimization": {"stage": stage},
              "zero_allow_untested_optimizer": True, "steps_per_print": 10 ** 9}
    trained = dict(toy.named_parameters())
    engine = start_engine(deepspeed, toy, trained, config, Schedule(RATE, weight_decay))
    x = torch.randn(3, 6, dtype=next(toy.parameters()).dtype)
    engine.backward(engine(x))
    engine.step()
    after = {}
    for name, parameter in toy.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            after[name] = parameter.detach().float().clone()
    engine.destroy()
    return before, after


@pytest.mark.parametrize("stage, bf16", [(stage, bf16) for stage in (0, 1, 2, 3)
                                         for bf16 in (False, True)])
def test_only_matrices_shrink(in_this_process, stage, bf16):
    """Without a gradient a step of AdamW is nothing but the decay: p (1 - rate · decay)."""
    before, after = after_one_step(stage, bf16, DECAY)
    decayed = {"q_proj.weight", "lora_A.weight", "class_embedding"}
    for name, value in before.items():
        expected = value * (1 - RATE * DECAY) if name in decayed else value
        if bf16:
            expected = expected.bfloat16().float()
        assert torch.allclose(after[name], expected, rtol=1e-6, atol=0), name
    assert set(after) > decayed


@pytest.mark.parametrize("stage, bf16", ((0, False), (0, True), (2, False)))
def test_nothing_shrinks_by_default(in_this_process, stage, bf16):
    before, after = after_one_step(stage, bf16, 0.0)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_names_are_those_of_transformers():
    """Of all tensors of a model with a block and LoRA, their function and ours choose the same."""
    trunk, head = small_llava(variant="full")
    add_lora(trunk.model, 2, 4, 0.0)
    groups = ("clip", "projector", "llama", "post_decoder", "lm_head", "lora")
    trained = set_trained(trunk, head, groups)
    theirs = {name for module in (trunk, head)
              for name in get_parameter_names(module, [nn.LayerNorm], PATTERNS)}
    ours = {name for name in trained if is_decayed(name)}
    left_out = sorted(set(trained) - ours)
    print(left_out)
    assert ours == theirs & set(trained) and len(left_out) > 20
    assert any("layrnorm" in name for name in left_out)                 # CLIP's own spelling


@pytest.mark.parametrize("max_norm", (0.0, 1.0))
def test_masters_are_adamw_with_groups(max_norm):
    """bf16 parameters in two groups follow AdamW of fp32 ones, one group without decay."""
    torch.manual_seed(0)
    rounded = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((5, 3), (7,), (2, 2))]
    exact = [nn.Parameter(p.detach().float()) for p in rounded]

    def groups(parameters):
        return [{"params": [parameters[0], parameters[2]]},
                {"params": [parameters[1]], "weight_decay": 0.0}]

    options = {"lr": 1e-3, "weight_decay": DECAY, "fused": True}
    ours = MasterAdamW(groups(rounded), max_norm, **options)
    theirs = torch.optim.AdamW(groups(exact), **options)
    for _ in range(20):
        for p, q in zip(rounded, exact, strict=True):
            p.grad = torch.randn(p.shape).bfloat16()
            q.grad = p.grad.float()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([exact[0], exact[2], exact[1]], max_norm)
        ours.step()
        theirs.step()
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(rounded, exact, strict=True))


def test_a_run_decays_and_says_so(world, tmp_path, in_this_process):
    """Norms and biases of a run move otherwise than matrices; what was left out is recorded, and
    a run without decay is as it ever was."""
    names = {"plain": [], "zero": ["--weight_decay", 0], "decayed": ["--weight_decay", 0.5]}
    for name, flags in names.items():
        run_train(*five_steps(world, tmp_path, name, 0, "--init", "identity", *flags))
    plain, zero, decayed = (trained_tensors(tmp_path / name) for name in names)
    assert read_bytes(tmp_path / "plain" / "trained.safetensors") == read_bytes(
        tmp_path / "zero" / "trained.safetensors")
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert decayed["lm_head.weight"].norm() < 0.999 * plain["lm_head.weight"].norm()
    for name, said in (("plain", None), ("decayed", "norms and biases")):
        arguments = json.loads((tmp_path / name / "config.json").read_text())["arguments"]
        assert arguments.get("undecayed") == said


@pytest.mark.parametrize("stage", (0, 1))
def test_an_older_state_is_not_taken_for_ours(world, tmp_path, in_this_process, stage):
    """States from before norms and biases were left out hold one group of parameters. With decay
    they are another run, which is said; without it they are the same."""
    class Stopped(Exception):
        pass

    def stop(*args, **options):
        raise Stopped

    def old_and_new(decay, last):
        name = f"run{decay}"
        flags = five_steps(world, tmp_path, name, stage, "--init", "identity", "--weight_decay",
                           decay, "--save_steps", 2)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(train, "save", stop)
            run_train(*flags)
        path = tmp_path / f"{name}.run" / "run.json"
        facts = json.loads(path.read_text())
        assert (facts.pop("undecayed") is None) is (decay == 0)
        path.write_text(json.dumps(facts))                          # as it was written before
        assert resume.read_latest(tmp_path / f"{name}.run") == last
        run_train(*flags, "--resume")

    with pytest.raises(InputError, match="undecayed was None and is norms and biases") as error:
        old_and_new(0.1, "step-4")
    print(error.value)
    old_and_new(0, "step-4")
    assert (tmp_path / "run0" / "trained.safetensors").exists()
