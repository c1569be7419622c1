"""QLoRA: LoRA on a trunk in 4 bits. Its gradients are those of the weights as they come back, and
differ from those of the original weights by what their rounding explains.
"""
import os

import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, preference_rows, run_train
from short_runs import logged, zero_file

import train
from checkpoints.identity import differences
from checkpoints.load import Source, load_all, load_base
from dpo import Loss, Objective
from llama import LINEARS
from model import set_trained
from support.packed import PackedLinear, packed
from training.engine import checkpoint_layers
from training.lora import add_lora

ROWS = [5, 17, 2, 40, 90, 146]


def gradients(world, change=None, bits=None, checkpointing=False):
    """{name: gradient} of LoRA's matrices after one DPO loss. `change(weight)` → another weight of
    each of LLaMA's linears.
    """
    model = load_all(Source([world.base], bits=bits), torch.device("cpu"), torch.float32)
    for name, module in model.trunk.model.layers.named_modules():
        if change and name.split(".")[-1] in LINEARS:
            module.weight.data = change(module.weight.data)
    torch.manual_seed(3)
    add_lora(model.trunk.model, 4, 8, 0.0)
    for name, parameter in model.trunk.named_parameters():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.05)          # at 0, A has no gradient
    trained = set_trained(model.trunk, model.head, ("lora",))
    if checkpointing:
        checkpoint_layers(model.trunk.model)
    objective = Objective(model.trunk, model.head, Loss("dpo", 0.1, 1.0))
    batch = preference_rows(world, model.trunk)[ROWS]
    loss, _ = objective(batch, torch.zeros(len(ROWS), 2))
    loss.backward()
    assert len(trained) == 2 * 7 * len(model.trunk.model.layers)
    return {name: parameter.grad for name, parameter in trained.items()}


def share(ours, theirs):
    """How far two sets of gradients are apart, as a share of the second's size."""
    apart = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return (apart / sum(g.square().sum() for g in theirs.values())).sqrt().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_weights_as_they_come_back(world, bits, checkpointing):
    whole = gradients(world, lambda weight: packed(weight, bits).dequantised(torch.float32))
    held = gradients(world, bits=bits, checkpointing=checkpointing)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        assert torch.equal(held[name], gradient), name


def test_rounding_explains_the_difference_to_the_original(world):
    """As far as noise of the same size on every weight moves them, and no further."""
    original = gradients(world)
    generator = torch.Generator().manual_seed(0)
    for bits, most in (4, 0.5), (8, 0.05):
        def noisy(weight, bits=bits):
            error = packed(weight, bits).dequantised(torch.float32) - weight
            noise = torch.randn(weight.shape, generator=generator)
            return weight + noise * error.norm() / noise.norm()

        found = share(gradients(world, bits=bits), original)
        noise = sum(share(gradients(world, noisy), original) for _ in range(3)) / 3
        print(f"{bits} bits: {100 * found:.1f} %, noise of the same size: {100 * noise:.1f} %")
        assert 0.5 * noise < found < 1.5 * noise and found < most


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory, in_this_process):
    """{bits: folder} of the same short run."""
    root = tmp_path_factory.mktemp("qlora")
    for bits in 16, 4:
        run_train("--lora_r", 4, "--gradient_checkpointing", "--bits", bits, "--max_steps", 3,
                  "--learning_rate", "1e-2", "--keep_correct", "--save_steps", 3,
                  "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
                  "--output_dir", root / str(bits), *dpo_flags(world))
    return {bits: root / str(bits) for bits in (16, 4)}


def test_a_run(world, runs):
    """Its adapter is one of the base, in every number of bits."""
    losses = {bits: [row["loss"] for row in logged(folder)] for bits, folder in runs.items()}
    assert losses[4] != losses[16]
    assert largest_difference("losses in 4 and 16 bits", losses[4], losses[16]) < 0.1
    told = load_json(runs[4] / "config.json")
    assert told["identity"]["bits"] == 4 and told["arguments"]["bits"] == 4
    assert told["fingerprint"] == load_base(world.base).fingerprint
    assert differences(told["identity"], told["identity"] | {"bits": 16}) == [
        "LLaMA's linears were held in 4 bits and are in 16"]
    older = {name: value for name, value in told["identity"].items() if name != "bits"}
    assert differences(older, told["identity"] | {"bits": 16}) == []
    for bits in 4, 8, 16:
        model = load_all(Source([str(runs[4])], bits=bits), torch.device("cpu"), torch.float32)
        assert list(model.heads) == ["adapter"] and model.config.bits == bits


@pytest.mark.parametrize("stage", [0, 2])
def test_an_engine_in_bf16_leaves_the_bits_alone(world, tmp_path, monkeypatch, in_this_process,
                                                 stage):
    """DeepSpeed casts whole modules; scales keep their 32 bits, and only LoRA is trained."""
    runs = []
    monkeypatch.setattr(train, "save", lambda deepspeed, run: runs.append(run))
    run_train("--lora_r", 4, "--bits", 4, "--max_steps", 2, "--keep_correct", "--deepspeed",
              zero_file(tmp_path, stage, bf16={"enabled": True}), "--output_dir",
              tmp_path / "out", *dpo_flags(world))
    read = load_all(Source([world.base], bits=4), torch.device("cpu"), torch.bfloat16)
    trained = runs[0].model.trunk.model.layers
    for name, module in read.trunk.model.layers.named_modules():
        if isinstance(module, PackedLinear):
            mine = trained.get_submodule(name).packed.packed
            assert mine.nested_absmax.dtype == torch.float32
            assert all(torch.equal(getattr(mine, part), getattr(module.packed, part))
                       for part in mine.TENSORS)
    assert all(".lora_" in name for name in runs[0].trained)
    assert all(p.dtype == torch.bfloat16 for p in runs[0].trained.values())


def test_kept_features_and_states_belong_to_a_number_of_bits(world, tmp_path, capsys,
                                                             in_this_process):
    """Features in other bits are made anew, and an interrupted run goes on only with its own."""
    def run(bits, *more):
        run_train("--stage", 1, "--init", "identity", "--bits", bits, "--max_steps", 2,
                  "--keep_correct", "--per_device_train_batch_size", 8,
                  "--gradient_accumulation_steps", 1, "--cache_features", tmp_path / "features",
                  "--output_dir", tmp_path / f"out{bits}", *more, *dpo_flags(world))

    for bits in 16, 4, 8:
        run(bits)
    said = capsys.readouterr().out
    assert said.count("another dtype or number of bits; so one frozen pass comes first") == 2
    assert len(os.listdir(tmp_path / "features")) == 3
    losses = [[row["loss"] for row in logged(tmp_path / f"out{bits}")] for bits in (16, 4, 8)]
    assert len({tuple(loss) for loss in losses}) == 3
