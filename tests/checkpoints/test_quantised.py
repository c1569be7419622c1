"""A base in 4 and 8 bits: held so, written so and read again, and refused where it is another."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, run_train
from programs import succeeds
from public_checkpoints import prompts

from checkpoints import weights
from checkpoints.load import Source, load_all, load_base, load_whole
from checkpoints.quantised import QUANTISATION, STATE, in_bits
from checkpoints.save import save_base
from data import BOS, IMAGE_ID
from llama import LINEARS
from support.common import InputError, write_json
from support.nf4 import NF4
from support.packed import PackedLinear
from support.tensors import read_file, write_tensors
from training.flags import parse_flags

CPU = torch.device("cpu")
Q = "model.layers.1.self_attn.q_proj.weight"


def held(base, bits=None, dtype=torch.float32):
    return load_all(Source([str(base)], bits=bits), CPU, dtype)


def linears(model):
    """{name: module} of LLaMA's linears."""
    return {name: module for name, module in model.trunk.model.named_modules()
            if name.split(".")[-1] in LINEARS}


def logits_of(model):
    batch = prompts([BOS, 7, 8, IMAGE_ID, 9, 10, 11], pixels=torch.ones(1, 3, 24, 24))
    return model.head.lm_head(model.trunk(batch)[0])


@pytest.mark.parametrize("bits, low, high", [(16, 0, 0), (8, 1e-6, 0.03), (4, 0.01, 0.5)])
def test_llamas_linears_alone_are_held_in_few_bits(world, bits, low, high):
    plain, model = load_base(world.base), held(world.base, bits)
    assert model.fingerprint == plain.fingerprint and model.config.bits == bits
    assert all(isinstance(m, PackedLinear) == (bits < 16) for m in linears(model).values())
    mine = model.trunk.state_dict()
    for name, tensor in plain.trunk.state_dict().items():
        is_linear = name.startswith("model.layers.") and name.split(".")[-2] in LINEARS
        assert (name in mine) == (bits == 16 or not is_linear)
        assert name not in mine or torch.equal(mine[name], tensor)
    assert low <= largest_difference(f"logits in {bits} bits", logits_of(model),
                                     logits_of(plain)) <= high


@pytest.fixture(scope="module")
def quarter(world, tmp_path_factory):
    """The session's base in a 4-bit file."""
    folder = tmp_path_factory.mktemp("quantised") / "quarter"
    succeeds("python", "-m", "tools.merge", world.base, folder, "--bits", 4)
    return folder


def test_a_file_in_four_bits(world, quarter):
    """It holds what --bits 4 makes of the base, is recognised without a flag, and says the same."""
    told = load_json(quarter / "config.json")["quantization_config"]
    assert told["load_in_4bit"] and told["bnb_4bit_quant_type"] == "nf4"
    with pytest.raises(InputError, match="quantised"):
        read_file(str(quarter / "model.safetensors"))
    rounded, again = held(world.base, 4), held(quarter)
    assert again.config.bits == 4 and again.fingerprint != rounded.fingerprint
    theirs = linears(again)
    for name, module in linears(rounded).items():
        for part in NF4.TENSORS:
            assert torch.equal(getattr(module.packed, part), getattr(theirs[name].packed, part))
        assert module.packed.offset == theirs[name].packed.offset
    assert torch.equal(logits_of(rounded), logits_of(again))

    # The fingerprint follows from a few values of the file, and from the whole tensors alike.
    whole = held(quarter, 16)
    assert whole.config.bits == 16 and whole.fingerprint == again.fingerprint
    for name, module in linears(again).items():
        expected = module.packed.dequantised(torch.float32)
        assert torch.equal(linears(whole)[name].weight, expected)
        lazy = linears(load_base(str(quarter), read_trunk=False))[name].weight.in_file[0]
        at = torch.tensor([0, 1, 63, 64, 65, expected.numel() - 1])
        assert torch.equal(lazy.values_at(at), expected.flatten()[at])


def test_a_file_in_four_bits_becomes_one_in_sixteen(quarter, tmp_path):
    save_base(str(tmp_path / "whole"), load_whole(Source([str(quarter)], bits=16)))
    assert "quantization_config" not in load_json(tmp_path / "whole" / "config.json")
    assert torch.equal(logits_of(load_base(str(tmp_path / "whole"))), logits_of(held(quarter, 16)))


def test_a_tensor_beside_the_model_is_all_that_is_read(world, monkeypatch):
    """Each weight is rounded before the next one is read."""
    model, held_now = load_base(world.base, read_trunk=False), []

    def quantised(weight, before=NF4.quantised):
        held_now.append(sum(isinstance(m, PackedLinear) for m in model.trunk.modules()))
        return before(weight)

    monkeypatch.setattr(NF4, "quantised", staticmethod(quantised))
    monkeypatch.setattr(weights, "ThreadPoolExecutor", lambda workers: InTurn(workers))
    weights.load_weights(in_bits(model, 4).trunk)
    assert held_now == list(range(len(linears(model))))


class InTurn:
    """Stands in for a pool: as many calls at once as there are workers, which must be one."""

    def __init__(self, workers):
        assert workers == 1

    def __enter__(self):
        return SimpleNamespace(map=map)

    def __exit__(self, *error):
        pass


# ---- What is refused -----------------------------------------------------------------------------


def changed(quarter, tmp_path, change):
    """A copy of the 4-bit base after `change(tensors)`."""
    folder = tmp_path / "changed"
    tensors = {key: lazy.read() for key, lazy in read_file(
        str(quarter / "model.safetensors"), nf4=True).items()}
    change(tensors)
    save_base(str(folder), held(quarter))
    write_tensors(str(folder / "model.safetensors"), tensors)
    return folder


def state(**values):
    def change(tensors):
        told = json.loads(bytes(tensors[Q + STATE].tolist())) | values
        tensors[Q + STATE] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return change


OTHERS = {
    "FP4": (state(quant_type="fp4"), "quant_type is \"fp4\" and only \"nf4\""),
    "blocks of 128": (state(blocksize=128), "blocksize is 128 and only 64"),
    "other nested blocks": (state(nested_blocksize=128), "nested_blocksize is 128 and only 256"),
    "another shape": (state(shape=[32, 64]), "should have \\(1024, 1\\)"),
    "a dtype that is none": (state(dtype="floaty"), "quant_state cannot be read"),
    "no scales": (lambda tensors: tensors.pop(Q + ".absmax"), "has no .absmax"),
    "other quantiles": (lambda tensors: tensors[Q + ".quant_map"].mul_(0.5), "other values"),
    "bytes that are no JSON": (lambda tensors: tensors[Q + STATE].zero_(), "cannot be read"),
    "scales that are no numbers": (lambda tensors: tensors[Q + ".nested_absmax"].fill_(torch.inf),
                                   "NaN or infinity"),
}


@pytest.mark.parametrize("change, said", OTHERS.values(), ids=OTHERS)
def test_other_settings_and_damage(quarter, tmp_path, change, said):
    with pytest.raises(InputError, match=said) as error:
        held(changed(quarter, tmp_path, change))
    print(error.value)
    assert "\n" not in str(error.value)


def test_other_settings_in_config_json(quarter, tmp_path):
    for name, value in (("bnb_4bit_quant_type", "fp4"), ("load_in_4bit", False),
                        ("bnb_4bit_quant_storage", "bfloat16"), ("quant_method", "awq")):
        folder = tmp_path / name
        save_base(str(folder), held(quarter))
        values = load_json(folder / "config.json")
        values["quantization_config"] = QUANTISATION | {name: value}
        write_json(str(folder / "config.json"), values)
        with pytest.raises(InputError, match=f"config.json: .*{name}|{value}") as error:
            load_base(str(folder))
        print(error.value)


def test_eight_bits_of_four(quarter):
    with pytest.raises(InputError, match="--bits 8: .*holds LLaMA's linears in 4 bits already"):
        held(quarter, 8)


@pytest.mark.parametrize("flags", ["--tune llama", "--tune projector,lm_head", "--stage 0"])
def test_a_trained_trunk(world, flags):
    with pytest.raises(InputError, match="--tune .*which 4 bits cannot hold"):
        parse_flags([*flags.split(), "--bits", "4", *dpo_flags(world)])


def test_a_trained_trunk_of_a_file_in_four_bits(world, quarter, tmp_path, in_this_process):
    flags = dpo_flags(world)
    flags[1] = quarter
    with pytest.raises(InputError, match="--tune llama: .*which 4 bits cannot hold"):
        run_train(*flags, "--tune", "llama", "--output_dir", tmp_path / "out")
    write_json(str(tmp_path / "zero3.json"),
               {"train_batch_size": 8, "zero_optimization": {"stage": 3}})
    with pytest.raises(InputError, match="ZeRO-3 divides weights"):
        run_train(*flags, "--tune", "lora", "--deepspeed", tmp_path / "zero3.json",
                  "--output_dir", tmp_path / "out")
