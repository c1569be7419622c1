"""What was trained elsewhere loads over its base: the notes' file, peft's adapters. Damaged and
foreign files give one line that names the cure.
"""
import json
import os
import re
import shutil

import pytest
import torch
from conftest import as_llava, dpo_flags, largest_difference, load_json, shake, small_llava
from programs import ROOT, shell, succeeds
from public_checkpoints import PublicCheckpoints, agrees, as_bin, edit
from safetensors.torch import load_file, save_file

from checkpoints.layouts import read_seed_file, read_tensors
from checkpoints.load import checkpoint_type, load_base, load_trained
from model import Head
from post_decoder import VARIANTS, PostInteractionBlock
from support.common import InputError
from support.tensors import LazyTensor

NOTES_FILE = "non_lora_trainables.bin"


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


# ---- The notes' file -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("prefix", ("", "base_model.model."))
def test_the_notes_files(tmp_path, variant, prefix):
    """A random block in the original's form, with the `align` that the original builds everywhere.
    The block's config follows from the tensors.
    """
    trunk, base_head = small_llava(heads=4)
    base = as_llava(trunk, base_head)
    _, head = small_llava(heads=4, variant=variant)
    tensors = dict(head.state_dict())
    if variant:
        head.block_config.outer_residual = True
        width = head.block_config.mm_hidden_size
        leftovers = {"align.fc1.weight": torch.randn(56, width), "align.fc1.bias": torch.randn(56),
                     "align.fc2.weight": torch.randn(32, 56), "align.fc2.bias": torch.randn(32),
                     "image_norm.weight": torch.randn(32), "image_norm.bias": torch.randn(32)}
        if head.block_config.attention != "cross":
            tensors |= {"post_interaction_block." + key: t for key, t in leftovers.items()}
    path = tmp_path / NOTES_FILE
    torch.save({prefix + key: tensor for key, tensor in tensors.items()}, path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert checkpoint_type(str(tmp_path)) == checkpoint_type(str(path)) == "seed"
    for place in (tmp_path, path):
        again = load_trained(str(place), base)
        assert again.block_config == head.block_config
        assert again.state_dict().keys() == head.state_dict().keys()
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, head.state_dict()[key]), key


def test_only_the_last_block_of_the_original_counts(tmp_path):
    trunk, base_head = small_llava()
    torch.manual_seed(0)
    config = trunk.config.block_config(outer_residual=True, depth=2, zero_init=False)
    original = shake(PostInteractionBlock(config))
    tensors = {"post_interaction_block." + key: t for key, t in original.state_dict().items()}
    torch.save(tensors, tmp_path / NOTES_FILE)
    head = load_trained(str(tmp_path), as_llava(trunk, base_head))
    h, features = torch.randn(2, 5, 32), torch.randn(2, 9, 24)
    aligned = original.image_norm(original.align(features))
    last = original.blocks[1](h, aligned, None) + h
    assert head.block_config.depth == 1 and head.lm_head is base_head.lm_head
    said = head.post_interaction_block(h, features)
    assert largest_difference("depth 2 of the original", said, last) < 1e-6


def test_block_of_another_base(tmp_path):
    trunk, _ = small_llava()
    tensors = {"post_interaction_block.align.fc1.weight": torch.ones(5, 77),
               "post_interaction_block.blocks.0.mlp.fc1.weight": torch.ones(5, 32)}
    torch.save(tensors, tmp_path / NOTES_FILE)
    with pytest.raises(InputError, match="features of width 77.*--model_name_or_path"):
        read_seed_file(str(tmp_path / NOTES_FILE), trunk.config)


# ---- peft's adapters -----------------------------------------------------------------------------


def test_lora(public, tmp_path):
    """peft's own forward, unmerged, against the merged weights: over Hugging Face's layout and over
    LLaVA's, there as .bin and with other tensors beside.
    """
    folder, expected = public.adapted
    assert checkpoint_type(folder) == "adapter"
    assert not torch.allclose(expected.logits, public.expected.logits, atol=0.01)
    agrees("LoRA over HF's layout", expected, public.hf, adapter=folder)

    adapter = tmp_path / "bin"
    shutil.copytree(folder, adapter)
    as_bin(adapter, "adapter_model.safetensors", "adapter_model.bin")
    named = str(public.llava), str(public.clip)
    projector = {"base_model.model." + key: 0 * tensor
                 for key, tensor in load_file(public.llava / "model.safetensors").items()
                 if "mm_projector" in key}
    torch.save(projector, adapter / NOTES_FILE)         # what was trained beside the adapter
    trunk = load_base(*named, adapter=str(adapter)).trunk
    assert not trunk.model.mm_projector[0].weight.any()
    os.remove(adapter / NOTES_FILE)

    trunk = agrees("LoRA over LLaVA's layout", expected, *named, adapter=str(adapter)).trunk
    half = load_base(*named, torch.bfloat16, adapter=str(adapter)).trunk
    for key, tensor in trunk.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[key], tensor.bfloat16()), key    # rounded once


def test_wrong_adapters(public, tmp_path):
    folder, _ = public.adapted

    def broken(name, change=None, **settings):
        target = str(tmp_path / name)
        shutil.copytree(folder, target)
        with open(f"{target}/adapter_config.json", "w") as file:
            json.dump(load_json(f"{folder}/adapter_config.json") | settings, file)
        if change:
            tensors = change(load_file(f"{folder}/adapter_model.safetensors"))
            save_file(tensors, f"{target}/adapter_model.safetensors")
        with pytest.raises(InputError) as error:
            load_base(str(public.hf), adapter=target)
        assert "\n" not in str(error.value)
        print(error.value)
        return str(error.value)

    def other_layers(tensors):
        return {key.replace("layers.2", "layers.7"): tensor for key, tensor in tensors.items()}

    def without_numbers(tensors):
        return {key: tensor[:0] for key, tensor in tensors.items()}

    assert "layers.7" in broken("other", other_layers)
    assert "holds no LoRA weights" in broken("empty", lambda tensors: {})
    assert "ZeRO-3" in broken("zero3", without_numbers)
    assert "use_dora" in broken("dora", use_dora=True)
    assert "rank_pattern" in broken("pattern", rank_pattern={"q_proj": 8})


# ---- The programs --------------------------------------------------------------------------------


def write_adapter(folder):
    """A LoRA of one linear of the session's base."""
    os.makedirs(folder)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_programs_take_them(world, tmp_path):
    """The notes' file and an adapter where a trained checkpoint is meant: --init, CKPT. An adapter
    is not taken beside others.
    """
    base = load_base(world.base)
    notes, lora, whole = tmp_path / "notes", tmp_path / "lora", tmp_path / "whole"
    head = shake(Head(base.config, base.config.block_config(zero_init=False)))
    os.makedirs(notes)
    torch.save(head.state_dict(), notes / NOTES_FILE)
    write_adapter(lora)
    train = ["python", f"{ROOT}/train.py", "--max_steps", 1]
    succeeds(*train, "--stage", 2, "--init", notes, *dpo_flags(world),
             "--output_dir", tmp_path / "out")
    assert load_trained(str(tmp_path / "out"), base).block_config.outer_residual

    def ask(base, *checkpoints):
        return ["python", f"{ROOT}/eval_pope.py", "--model_name_or_path", base,
                "--coco_path", world.coco, "--pope_path", world.pope, "--set", "random",
                "--max_new_tokens", 4, *checkpoints]

    assert "| notes |" in succeeds(*ask(world.base, notes))
    succeeds(*ask(world.base, notes / NOTES_FILE))
    assert "| adapter |" in succeeds(*ask(world.base, lora))
    done = shell(*ask(world.base, lora, notes))
    assert done.returncode == 1 and "name it alone" in done.stderr
    assert "Traceback" not in done.stderr

    # A base that has a block already.
    succeeds("python", "-m", "tools.merge", notes, whole, "--model_name_or_path", world.base)
    said = succeeds(*train, "--stage", 1, "--model_name_or_path", whole, *dpo_flags(world)[2:],
                    "--output_dir", tmp_path / "more")
    assert "the base's own block" in said
    assert "| more |" in succeeds(*ask(whole, tmp_path / "more"))


# ---- Damaged and foreign -------------------------------------------------------------------------


def halve(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    return damage


def remove(name):
    return lambda folder: os.remove(folder / name)


def cut_bin(folder):
    as_bin(folder)
    halve("pytorch_model.bin")(folder)


def bin_of(content):
    """The weights are a .bin that holds something else."""
    def damage(folder):
        path, _ = as_bin(folder)
        torch.save(content, path)
    return damage


def missing_shard(folder):
    weight_map = {"lm_head.weight": "model-00002-of-00003.safetensors", "x": "model.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def damaged_norm(folder):
    def damage(tensors):
        tensors["language_model.model.norm.weight"][3] = float("nan")

    edit(folder / "model.safetensors", damage)


def settings(**changes):
    """Another config.json; a dict changes entries of a nested part."""
    def change(folder):
        config = load_json(folder / "config.json")
        for part, values in changes.items():
            config[part] = config[part] | values if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(config))
    return change


def text_settings(**changes):
    return settings(text_config=changes)


MISTAKES = {  # what: (what is done to a copy of the Hugging Face folder, what the error line says)
    "missing shard": (missing_shard, "model-00002-of-00003.safetensors.*download"),
    "no weights": (remove("model.safetensors"), "holds no weights.*download"),
    "cut safetensors": (halve("model.safetensors"), "model.safetensors: not a whole.*again"),
    "cut bin": (cut_bin, "pytorch_model.bin: cannot be read.*again"),
    "no tensor in a bin": (bin_of({"a": torch.ones(1), "b": [1]}),
                           "pytorch_model.bin: b is no tensor"),
    "code in a bin": (bin_of({"a": shell}), "pytorch_model.bin: cannot be read"),
    "another model's size": (text_settings(intermediate_size=88),
                             "mlp.gate_proj.weight has shape .56, 32.*.88, 32.*another"),
    "fewer layers": (text_settings(num_hidden_layers=4), "missing keys.*layers.3"),
    "more layers": (text_settings(num_hidden_layers=2), "unexpected keys.*layers.2"),
    "NaN": (damaged_norm, "norm.weight holds NaN"),
    "too few embeddings": (text_settings(vocab_size=7),
                           "tokenizer.model: has .* pieces.*7 embeddings.*copy"),
    "no tokenizer": (remove("tokenizer.model"), "tokenizer.model: no such file; copy"),
    "config cut": (halve("config.json"), "config.json: not readable as JSON"),
    "rope scaling": (text_settings(rope_parameters={"rope_type": "linear", "factor": 2.0}),
                     "rope_type is \"linear\""),
    "attention bias": (text_settings(attention_bias=True), "attention_bias is true"),
    "another activation": (text_settings(hidden_act="gelu"), "hidden_act is \"gelu\""),
    "another tower activation": (settings(vision_config={"hidden_act": "relu"}),
                                 "relu.*quick_gelu"),
    "class token too": (settings(vision_feature_select_strategy="full"),
                        "vision_feature_select_strategy is \"full\""),
    "several layers": (settings(vision_feature_layer=[-2, -5]), "selected layer is .-2, -5"),
    "no such layer": (settings(vision_feature_layer=-9), "selected layer is -9"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_damaged(public, tmp_path, what):
    change, said = MISTAKES[what]
    shutil.copytree(public.hf, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(InputError) as error:
        load_base(str(tmp_path / "model"))
    message = str(error.value)
    print(message)
    assert re.search(said, message) and "\n" not in message and str(tmp_path) in message


def test_names_without_a_folder(public):
    """A name that is no folder, and offline not on the hub, is said to be exactly that."""
    llava, message = str(public.llava), "(llava-v1.5-7b|patch14-336): no such folder"
    for arguments in (("liuhaotian/llava-v1.5-7b",), (llava, "openai/clip-vit-large-patch14-336"),
                      (llava,)):
        with pytest.raises(InputError, match=message):
            load_base(*arguments)
    with pytest.raises(InputError, match="no such folder"):
        checkpoint_type("liuhaotian/llava-v1.5-7b-lora")


def test_nothing_is_read_before_shapes_agree(public, tmp_path, monkeypatch):
    """A 13.5 GB download of the wrong size is refused at once."""
    shutil.copytree(public.hf, tmp_path / "model")
    text_settings(intermediate_size=88)(tmp_path / "model")

    def read(pinned=False):
        pytest.fail("a tensor was read")

    original = read_tensors(str(tmp_path / "model"))
    unread = {key: LazyTensor(lazy.shape, read) for key, lazy in original.items()}
    monkeypatch.setattr("checkpoints.load.read_tensors", lambda folder: unread)
    with pytest.raises(InputError, match="another model"):
        load_base(str(tmp_path / "model"))
