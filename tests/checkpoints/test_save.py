"""What is written is what was there: a base in LLaVA's layout, a trained checkpoint, and a folder
that is whole or not there at all.
"""
import os
from dataclasses import asdict

import pytest
import torch
from conftest import as_llava, largest_difference, load_json, small_llava
from safetensors.torch import load_file, save_file

from checkpoints import save
from checkpoints.load import checkpoint_type, load_base, load_trained
from checkpoints.save import save_base, save_trained
from data import ImageProcessor, Tokenizer
from post_decoder import VARIANTS
from support import folders
from support.tensors import write_tensors


@pytest.fixture
def model(world):
    """A random base with a block, and a preprocessing that is not the default."""
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(variant="full", vocab_size=len(tokenizer), pad_images=False)
    preprocess = ImageProcessor(24, (.1, .2, .3), (.4, .5, .6), pad=False)
    return as_llava(trunk, head, tokenizer=tokenizer, preprocess=preprocess)


# ---- A base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", (None, *VARIANTS))
def test_a_base_loads_as_it_was(world, tmp_path, model, variant):
    trunk, head = small_llava(variant=variant, vocab_size=len(model.tokenizer), pad_images=False)
    model = as_llava(trunk, head, tokenizer=model.tokenizer, preprocess=model.preprocess)
    save_base(str(tmp_path / "base"), model, arguments={"learning_rate": 0.5})
    again = load_base(str(tmp_path / "base"))
    assert again.config == model.config
    assert again.head.block_config == head.block_config
    assert again.preprocess == model.preprocess and again.fingerprint == model.fingerprint
    state = {**again.trunk.state_dict(), **again.head.state_dict()}
    for key, tensor in {**trunk.state_dict(), **head.state_dict()}.items():
        assert torch.equal(state.pop(key), tensor), key
    assert not state
    assert checkpoint_type(str(tmp_path / "base")) == "base"
    assert load_json(tmp_path / "base" / "config.json")["arguments"] == {"learning_rate": 0.5}


def test_given_tensors_stand_in_for_the_modules(tmp_path, model):
    """Under ZeRO-3 the modules' own are in pieces."""
    tensors = {**model.trunk.state_dict(), **model.head.state_dict()}
    tensors = {key: tensor + 1 for key, tensor in tensors.items()}
    save_base(str(tmp_path / "base"), model, tensors)
    again = load_base(str(tmp_path / "base"))
    state = {**again.trunk.state_dict(), **again.head.state_dict()}
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


def test_transformers_reads_the_tower(tmp_path, model):
    """The folder vision_tower/ is CLIP's in Hugging Face's layout, preprocessing included."""
    transformers = pytest.importorskip("transformers")
    save_base(str(tmp_path / "base"), model)
    folder = tmp_path / "base" / "vision_tower"
    theirs = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = theirs(pixels, output_hidden_states=True).hidden_states
    expected = hidden[model.config.select_layer][:, 1:]
    features = model.trunk.vision_tower(pixels)
    assert largest_difference("features", features, expected) < 1e-5
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    assert tuple(processor.image_mean) == (.1, .2, .3)
    assert tuple(processor.image_std) == (.4, .5, .6)
    assert dict(processor.crop_size)["height"] == 24


# ---- A trained checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_checkpoint_loads_as_it_was(tmp_path, model, variant):
    """Only what was trained is in the file; the rest is the base's own, shared."""
    _, head = small_llava(variant=variant, seed=1, vocab_size=len(model.tokenizer))
    prefix = "post_interaction_block."
    tensors = {key: t for key, t in head.state_dict().items() if key.startswith(prefix)}
    info = {"base": "somewhere", "fingerprint": model.fingerprint,
            "block": asdict(head.block_config)}
    folder = str(tmp_path / "stage1")
    save_trained(folder, tensors, info, model.tokenizer)
    assert sorted(os.listdir(folder)) == ["config.json", "tokenizer.model", "trained.safetensors"]
    assert load_file(f"{folder}/trained.safetensors").keys() == tensors.keys()
    assert checkpoint_type(folder) == "trained"
    assert load_json(f"{folder}/config.json").items() >= info.items()
    again = load_trained(folder, model)
    assert again.block_config == head.block_config and again.lm_head is model.head.lm_head
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


def test_nothing_trained_is_a_fault_of_ours(tmp_path, model):
    with pytest.raises(RuntimeError, match="nothing was trained"):
        save_trained(str(tmp_path / "stage1"), {}, {}, model.tokenizer)
    assert os.listdir(tmp_path) == []


# ---- Whole or not at all -------------------------------------------------------------------------


def save_weight(folder, model, value):
    weight = torch.full_like(model.head.lm_head.weight, value)
    save_trained(folder, {"lm_head.weight": weight}, {"value": value}, model.tokenizer)


def saved_value(folder):
    """The value under config.json and in the tensors, which must be the same."""
    value = load_json(f"{folder}/config.json")["value"]
    assert (load_file(f"{folder}/trained.safetensors")["lm_head.weight"] == value).all()
    return value


def test_a_folder_is_replaced_as_a_whole(tmp_path, model, monkeypatch):
    """A save that stops in the middle leaves the older folder. The next one clears up after it."""
    folder = str(tmp_path / "stage1")
    save_weight(folder, model, 1)
    with monkeypatch.context() as patch:
        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(save.shutil, "copyfile", stop)                # the last file of a folder
        with pytest.raises(KeyboardInterrupt):
            save_weight(folder, model, 2)
    assert saved_value(folder) == 1
    save_weight(folder, model, 3)
    assert saved_value(folder) == 3 and saved_value(f"{folder}-old1") == 1
    assert set(os.listdir(tmp_path)) == {"stage1", "stage1-old1"}


def test_a_save_that_stopped_before_its_last_step(tmp_path, model, monkeypatch):
    """The older folder is renamed before the new one takes its place. What was killed between the
    two leaves both, under other names.
    """
    folder = str(tmp_path / "stage1")
    save_weight(folder, model, 1)
    rename = os.rename
    with monkeypatch.context() as patch:
        def stop(source, target):
            if source.endswith("-new"):
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr(folders.os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            save_weight(folder, model, 2)
    old, new = (tmp_path / f".stage1.nanohadpo-{which}" for which in ("old", "new"))
    assert set(os.listdir(tmp_path)) == {old.name, new.name}
    assert saved_value(old) == 1 and saved_value(new) == 2
    save.check_output_folder(folder)                    # the new one was whole: it takes its place
    assert saved_value(folder) == 2 and saved_value(f"{folder}-old1") == 1
    save_weight(folder, model, 3)
    assert saved_value(folder) == 3 and saved_value(f"{folder}-old2") == 2
    assert set(os.listdir(tmp_path)) == {"stage1", "stage1-old1", "stage1-old2"}


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    """NaN, an empty file, and a disk that loses a number: none of them passes for a checkpoint."""
    path = str(tmp_path / "x.safetensors")
    write_tensors(path, {"a": torch.ones(3)})
    with pytest.raises(RuntimeError, match="holds NaN.*'a'"):
        write_tensors(path, {"a": torch.tensor([1., float("nan")])})
    with pytest.raises(RuntimeError, match="nothing"):
        write_tensors(path, {})

    def lossy(tensors, path, metadata):
        save_file({key: tensor * 0 for key, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr("support.tensors.save_file", lossy)
    with pytest.raises(RuntimeError, match="not what was to be written.*'b'"):
        write_tensors(path, {"b": torch.ones(3)})
