"""Files that are no weights of ours are called what they are, in one line with the cure: quantised
checkpoints, GGUF, what ZeRO-3 left empty, pointers of Git LFS, folders, odd dtypes, odd settings.
"""
import json
import os
import re
import shutil
import struct

import pytest
import torch
from conftest import load_json
from programs import shell
from public_checkpoints import PublicCheckpoints, agrees, as_bin, edit, variant_of
from safetensors.torch import load_file, save_file

from checkpoints.load import checkpoint_type, load_base, load_trained
from checkpoints.save import save_trained
from support.common import InputError
from support.tensors import read_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 134\n"
Q = "language_model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


def refused(load, *said):
    """The InputError, which says all of these patterns in one line, and nothing of torch's."""
    with pytest.raises(InputError) as error:
        load()
    text = str(error.value)
    print(text)
    assert all(re.search(words, text) for words in said) and "\n" not in text
    assert not re.search("weights_only|allowlist|arbitrary code|trust", text)


# ---- Bases ---------------------------------------------------------------------------------------


def with_tensors(**tensors):
    """Other tensors, or ones more, of the layer's q_proj."""
    def change(folder):
        def put(whole):
            whole.update({f"{Q}.{name.replace('__', '.')}": t for name, t in tensors.items()})
        edit(folder / "model.safetensors", put)
    return change


def in_bin(change):
    """change(tensors), then everything as .bin."""
    def write(folder):
        path, tensors = as_bin(folder)
        change(tensors)
        torch.save(tensors, path)
    return write


def bin_of(value):
    def write(folder):
        os.remove(folder / "model.safetensors")
        torch.save(value, folder / "pytorch_model.bin")
    return write


def settings(part=None, **changes):
    def change(folder):
        config = load_json(folder / "config.json")
        (config[part] if part else config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return change


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def index(value):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def folder_named(name):
    def change(folder):
        if os.path.isfile(folder / name):
            os.remove(folder / name)
        os.makedirs(folder / name)
    return change


def only(name, content=b""):
    def change(folder):
        os.remove(folder / "model.safetensors")
        (folder / name).write_bytes(content)
    return change


def put(name, value):
    return lambda tensors: tensors.__setitem__(f"{Q}.{name}", value)


BYTES = torch.zeros(512, 1, dtype=torch.uint8)
FILES = {  # what a copy of Hugging Face's folder becomes → (how, patterns of the error)
    "bitsandbytes, 4 bits": (with_tensors(weight=BYTES, weight__absmax=torch.ones(16),
                                          weight__quant_map=torch.ones(16)),
                             "belongs to no 4-bit weight", "download the checkpoint again"),
    "bitsandbytes, FP4": (with_tensors(weight__quant_state__bitsandbytes__fp4=BYTES),
                          "quantised \\(bitsandbytes\\)", "16 or 32 bits"),
    "bitsandbytes, 8 bits": (with_tensors(weight=torch.zeros(32, 32, dtype=torch.int8),
                                          SCB=torch.ones(32)), "quantised \\(bitsandbytes\\)"),
    "GPTQ": (with_tensors(qweight=torch.zeros(4, 32, dtype=torch.int32), scales=torch.ones(1, 32),
                          qzeros=torch.zeros(1, 4, dtype=torch.int32),
                          g_idx=torch.zeros(32, dtype=torch.int32)), "quantised \\(GPTQ or AWQ\\)"),
    "AWQ in a bin": (in_bin(put("qzeros", torch.zeros(1, 4, dtype=torch.int32))),
                     "quantised \\(GPTQ or AWQ\\)"),
    "FP8": (with_tensors(weight=torch.zeros(32, 32).to(torch.float8_e4m3fn)), "F8_E4M3",
            "16 or 32 bits"),
    "FP8 with scales": (with_tensors(weight_scale_inv=torch.ones(1)), "quantised \\(FP8"),
    "compressed-tensors": (with_tensors(weight_packed=torch.zeros(32, 4, dtype=torch.int32)),
                           "quantised \\(FP8 or compressed-tensors"),
    "bytes in a bin": (in_bin(put("weight", BYTES)), "q_proj.weight has dtype uint8"),
    "bytes of the same shape": (in_bin(put("weight", torch.ones(32, 32, dtype=torch.uint8))),
                                "q_proj.weight has dtype uint8", "quantised"),
    "whole numbers": (with_tensors(weight=torch.ones(32, 32, dtype=torch.int64)),
                      "q_proj.weight has dtype int64"),
    "complex": (in_bin(put("weight", torch.ones(32, 32, dtype=torch.complex64))), "complex64"),
    "bool": (with_tensors(weight=torch.ones(32, 32, dtype=torch.bool)), "BOOL"),
    "float8 in a bin": (in_bin(put("weight", torch.ones(32, 32).to(torch.float8_e5m2))),
                        "float8_e5m2"),
    "sparse": (in_bin(put("weight", torch.eye(32).to_sparse())), "q_proj.weight.*sparse_coo",
               "dense"),
    "without values": (in_bin(put("weight", torch.ones(32, 32, device="meta"))), "meta"),
    "quantization_config": (settings(quantization_config={"quant_method": "gptq", "bits": 4}),
                            "config.json: quantization_config .*\\(gptq\\)"),
    "a nested one": (settings("text_config", quantization_config={"load_in_8bit": True}),
                     "quantization_config .*load_in_8bit"),
    "GGUF": (only("ggml-model-q4_k.gguf", b"GGUF\x03\x00"), "ggml-model-q4_k.gguf: is a GGUF"),
    "GGUF by another name": (only("pytorch_model.bin", b"GGUF\x03\x00\x00"), "is a GGUF file"),
    "ZeRO-3": (with_tensors(weight=torch.empty(0)), "q_proj.weight has shape \\(0,\\).*ZeRO-3",
               "zero_to_fp32.py", "stage3_gather_16bit_weights_on_model_save"),
    "ZeRO-3 in a bin": (in_bin(put("weight", torch.empty(0))), "ZeRO-3"),
    "DeepSpeed's pieces": (only("zero_to_fp32.py"), "holds no weights", "zero_to_fp32.py"),
    "LFS: weights": (pointer("model.safetensors"), "model.safetensors: .*git lfs pull"),
    "LFS: a bin": (only("pytorch_model.bin", POINTER.encode()),
                   "pytorch_model.bin: .*git lfs pull"),
    "LFS: a shard": (lambda folder: (index({"weight_map": {"a": "one.safetensors"}})(folder),
                                     pointer("one.safetensors")(folder)),
                     "one.safetensors: .*git lfs pull"),
    "LFS: the index": (pointer("model.safetensors.index.json"), "index.json: .*git lfs pull"),
    "LFS: the tokenizer": (pointer("tokenizer.model"), "tokenizer.model: .*git lfs pull"),
    "LFS: config.json": (pointer("config.json"), "config.json: .*git lfs pull"),
    "LFS: the preprocessor": (pointer("preprocessor_config.json"), "git lfs pull"),
    "a folder of weights": (folder_named("model.safetensors"), "model.safetensors: is a folder"),
    "a folder for a bin": (lambda folder: (os.remove(folder / "model.safetensors"),
                                           os.makedirs(folder / "pytorch_model.bin")),
                           "pytorch_model.bin: is a folder"),
    "a folder for a tokenizer": (folder_named("tokenizer.model"), "tokenizer.model: is a folder"),
    "a folder for settings": (folder_named("config.json"), "config.json: is a folder"),
    "a pickle of Python objects": (bin_of({"a": shell}), "cannot be read", "programs.shell",
                                   "state_dict"),
    "a whole module": (bin_of(torch.nn.Linear(1, 1)), "cannot be read", "Linear"),
    "a text": (only("pytorch_model.bin", b"<!DOCTYPE html>\n<html>"), "cannot be read.*again"),
    "nothing": (only("pytorch_model.bin"), "cannot be read.*again"),
    "a list": (bin_of([torch.ones(1)]), "holds a list"),
    "a list for settings": (lambda folder: (folder / "config.json").write_text("[1, 2]"),
                            "config.json: holds a list"),
    "an index that is a list": (index({"weight_map": ["a"]}), "weight_map is .*an object"),
    "an index without names": (index({"metadata": {}}), "index.json: names no weights"),
    "an empty index": (index({"weight_map": {}}), "index.json: names no weights"),
    "layers that nobody saved": (settings("text_config", num_hidden_layers=10 ** 8),
                                 "num_hidden_layers is 100,000,000"),
    "layers of a tower": (settings("vision_config", num_hidden_layers=10 ** 8),
                          "num_hidden_layers of the vision tower is 100,000,000"),
    "more than a machine can count": (settings("text_config", intermediate_size=10 ** 20),
                                      "intermediate_size is 1000"),
    "a number of 400 digits": (settings("text_config", rope_theta=10 ** 400), "of 401 digits"),
    "a thousand levels": (lambda folder: (folder / "config.json").write_text("[" * 100_000),
                          "config.json: not readable as JSON"),
    "an index of numbers": (index({"weight_map": {"lm_head.weight": 3, "a": "b"}}),
                            "lm_head.weight is 3 and should be a text"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_base_is_called_what_it_is(public, tmp_path, what):
    change, *said = FILES[what]
    folder = tmp_path / "model"
    shutil.copytree(public.hf, folder)
    change(folder)
    refused(lambda: load_base(str(folder)), str(folder), *said)


WRONG = {  # a setting of a wrong type or out of range → (part of config.json, value)
    "hidden_size": ("text_config", "32"), "num_hidden_layers": ("text_config", 2.5),
    "num_attention_heads": ("text_config", 0), "num_key_value_heads": ("text_config", [4]),
    "vocab_size": ("text_config", True), "rms_norm_eps": ("text_config", "1e-5"),
    "intermediate_size": ("text_config", -56), "max_position_embeddings": ("text_config", {}),
    "rope_parameters": ("text_config", "linear"), "rope_scaling": ("text_config", [1]),
    "patch_size": ("vision_config", "8"),
    "image_size": ("vision_config", [24, 24]), "layer_norm_eps": ("vision_config", float("nan")),
    "text_config": (None, ["a"]), "vision_config": (None, "clip"),
    "tokenizer_model_max_length": (None, "2048"), "mm_projector_hidden_size": (None, [1]),
    "vision_feature_layer": (None, True),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_of_another_type(public, tmp_path, name):
    part, value = WRONG[name]
    folder = tmp_path / "model"
    shutil.copytree(public.hf, folder)
    if name == "rope_scaling":
        settings("text_config", rope_parameters=None)(folder)
    settings(part, **{name: value})(folder)
    named = "selected layer is True" if name == "vision_feature_layer" else f"{name} is "
    refused(lambda: load_base(str(folder)), f"config.json: .*{named}")


def test_heads_that_do_not_divide(public, tmp_path):
    for n, (part, name, value) in enumerate((("text_config", "num_attention_heads", 5),
                                             ("text_config", "num_key_value_heads", 3),
                                             ("vision_config", "num_attention_heads", 7))):
        folder = tmp_path / f"{n}"
        shutil.copytree(public.hf, folder)
        settings(part, head_dim=None)(folder)
        settings(part, **{name: value})(folder)
        refused(lambda folder=folder: load_base(str(folder)), f"{name} is {value}, which does not")


@pytest.mark.parametrize("name, value", (
    ("image_mean", [0.5, 0.5]), ("image_mean", "half"), ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", [0.5, "a", 0.5]), ("image_mean", 0.5)))
def test_colours_of_the_preprocessor(public, tmp_path, name, value):
    folder = tmp_path / "model"
    shutil.copytree(public.hf, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({name: value}))
    refused(lambda: load_base(str(folder)), f"{name} .*three numbers", str(folder))


def test_a_tower_inside_that_is_not_whole(public, tmp_path):
    """Without a config.json of its own its sizes follow from its tensors, one of which is lost."""
    folder = variant_of(public.llava_inside, tmp_path / "model",
                        lambda key: None if "patch_embedding" in key else key)
    refused(lambda: load_base(str(folder)), "patch_embedding.weight", "whole")


def test_the_tower_and_the_projector(public, tmp_path):
    """The same words for the files beside a base."""
    clip = tmp_path / "clip"
    shutil.copytree(public.clip, clip)
    (clip / "model.safetensors").write_text(POINTER)
    refused(lambda: load_base(str(public.llava), str(clip)), "clip/model.safetensors.*git lfs pull")
    folder = variant_of(public.llava, tmp_path / "apart",
                        lambda key: None if "mm_projector" in key else key)
    empty = {"model.mm_projector.0.weight": torch.empty(0)}
    for content, said in ((empty, "ZeRO-3"), (shell, "cannot be read")):
        torch.save(content, folder / "mm_projector.bin")
        refused(lambda: load_base(str(folder), str(public.clip)), "mm_projector.bin", said)
    os.remove(folder / "mm_projector.bin")
    os.makedirs(folder / "mm_projector.bin")
    refused(lambda: load_base(str(folder), str(public.clip)), "mm_projector.bin: is a folder")


# ---- Checkpoints and adapters --------------------------------------------------------------------


def test_the_notes_file(world, tmp_path):
    base, path = load_base(world.base), str(tmp_path / "non_lora_trainables.bin")
    block = "post_interaction_block.align.fc1.weight"
    for content, said in (({block: torch.empty(0)}, "ZeRO-3"),
                          ({block: torch.ones(2, 2, dtype=torch.uint8)}, "uint8"),
                          ({block: shell}, "cannot be read.*programs.shell")):
        torch.save(content, path)
        refused(lambda: load_trained(path, base), f"{path}: ", said)
    with open(path, "w") as file:
        file.write(POINTER)
    refused(lambda: load_trained(path, base), "git lfs pull")
    refused(lambda: checkpoint_type(str(shutil.copy(path, tmp_path / "x.gguf"))), "is a GGUF file")


def test_adapters(public, tmp_path):
    for n, (content, said) in enumerate((
            (torch.empty(0), "ZeRO-3"), (torch.ones(4, 32, dtype=torch.int8), "I8.*quantised"),
            (torch.ones(4, 32).to(torch.float8_e4m3fn), "F8_E4M3"))):
        adapter = tmp_path / f"{n}"
        shutil.copytree(public.adapted[0], adapter)
        edit(adapter / "adapter_model.safetensors",
             lambda tensors, content=content: tensors.update({min(tensors): content}))
        refused(lambda adapter=adapter: load_base(str(public.hf), adapter=str(adapter)),
                str(adapter), said)
    (adapter / "adapter_model.safetensors").write_text(POINTER)
    refused(lambda: load_base(str(public.hf), adapter=str(adapter)), "git lfs pull")
    (adapter / "adapter_config.json").write_text(POINTER)
    refused(lambda: load_base(str(public.hf), adapter=str(adapter)), "adapter_config.json.*git lfs")
    (adapter / "adapter_config.json").write_text("[]")
    refused(lambda: load_base(str(public.hf), adapter=str(adapter)), "holds a list")
    (adapter / "adapter_config.json").unlink()
    shutil.copy(f"{public.adapted[0]}/adapter_config.json", adapter)
    os.remove(adapter / "adapter_model.safetensors")
    os.makedirs(adapter / "adapter_model.safetensors")
    refused(lambda: load_base(str(public.hf), adapter=str(adapter)), "is a folder")


@pytest.mark.parametrize("block, said", (
    ([1], "no setting of a post-interaction block"), ({"widht": 3}, "'widht' is no setting"),
    ({"attention": "crosss"}, "attention of the .* is 'crosss'"), ({"hidden_size": "32"}, "hidden"),
    ({"outer_residual": 1}, "outer_residual is 1 and should be true or false"),
    ({"hidden_size": 30, "num_attention_heads": 4}, "does not divide"),
    ({"attention": "self", "depth": 2}, "depth 1, not 2")))
def test_the_block_of_a_checkpoint(world, tmp_path, block, said):
    base = load_base(world.base)
    info = {"base": world.base, "fingerprint": base.fingerprint, "block": block}
    save_trained(str(tmp_path / "one"), {"lm_head.weight": torch.ones(2, 2)}, info, base.tokenizer)
    refused(lambda: load_trained(str(tmp_path / "one"), base), "one/config.json: ", said)


def test_a_trained_checkpoint_without_its_tensors(world, tmp_path):
    base, folder = load_base(world.base), tmp_path / "one"
    info = {"base": world.base, "fingerprint": base.fingerprint, "block": None}
    save_trained(str(folder), {"lm_head.weight": torch.ones(2, 2)}, info, base.tokenizer)
    os.remove(folder / "trained.safetensors")
    refused(lambda: load_trained(str(folder), base), "trained.safetensors: no such file")
    (folder / "trained.safetensors").write_text(POINTER)
    refused(lambda: load_trained(str(folder), base), "git lfs pull")


# ---- What still loads ----------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", (False, True))
def test_bins_of_every_age(public, tmp_path, legacy):
    """And whole numbers that are no weights: positions, as old transformers wrote them."""
    folder = tmp_path / "model"
    shutil.copytree(public.hf, folder)
    path, tensors = as_bin(folder)
    tensors["vision_tower.embeddings.position_ids"] = torch.arange(10)[None]
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    agrees(f"legacy {legacy}", public.expected, folder)


def test_whole_numbers_that_are_no_weights(tmp_path):
    save_file({"a.position_ids": torch.arange(4), "b": torch.tensor(3, dtype=torch.int32),
               "c.weight": torch.ones(2, dtype=torch.float64)}, tmp_path / "x.safetensors")
    tensors = read_file(str(tmp_path / "x.safetensors"))
    assert {key: lazy.read().tolist() for key, lazy in tensors.items()} == {
        "a.position_ids": [0, 1, 2, 3], "b": 3, "c.weight": [1.0, 1.0]}


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """An error, not an endless loop."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensors = read_file(str(path))
    length, = struct.unpack("<Q", path.read_bytes()[:8])
    os.truncate(path, 8 + length + 100)
    refused(tensors["a"].read, "x.safetensors: was cut while it was read")


def test_a_program_says_one_line(public, tmp_path):
    """Nothing of torch reaches the screen, not even as a warning."""
    folder = tmp_path / "model"
    shutil.copytree(public.hf, folder)
    bin_of({"a": shell})(folder)
    done = shell("python", "-m", "tools.merge", folder, tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "programs.shell" in done.stderr and "weights_only" not in done.stderr + done.stdout
    assert len(load_file(public.hf / "model.safetensors")) > 3
