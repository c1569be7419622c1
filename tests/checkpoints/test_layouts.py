"""Every layout that a base or a tower comes in, written by the software that writes it or key by
key as its older versions did, loads to the same numbers.
"""
import json
import os
import shutil

import pytest
import torch
from conftest import as_llava, largest_difference, load_json, shake, small_llava
from public_checkpoints import (
    VISION,
    PublicCheckpoints,
    agrees,
    as_bin,
    edit,
    expected_of,
    llava_of_transformers,
    transformers,
    variant_of,
)
from safetensors.torch import load_file, save_file

from checkpoints.load import load_base
from checkpoints.save import save_base
from clip_vit import CLIPVisionConfig, CLIPVisionTower
from data import Tokenizer
from support.common import InputError

HEADS = [(4, 4), (4, 2), (40, 40)]  # as many key heads, grouped-query, LLaVA-1.5-13B's count


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


# ---- Hugging Face's LLaVA ------------------------------------------------------------------------


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("layer", (-1, -2))
def test_save_pretrained(public, tmp_path, heads, kv_heads, layer):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    model = llava_of_transformers(public.pieces, heads, kv_heads, layer, rope_parameters=rope)
    public.save(model, tmp_path)
    what = f"{kv_heads} of {heads} heads, layer {layer}"
    agrees(what, expected_of(model, public.pieces), tmp_path)


def prefixes(**changes):
    """A renaming of the keys that transformers 5 writes."""
    def rename(key):
        old = next((old for old in changes if key.startswith(old + ".")), None)
        return key if old is None else changes[old] + key[len(old):]
    return rename


def state_dict_keys(vision_tower):
    """The renaming that gives the keys of state_dict() instead of those of the files."""
    parts = prefixes(language_model="model.language_model", vision_tower=vision_tower,
                     multi_modal_projector="model.multi_modal_projector")

    def rename(key):
        key = parts(key).replace("language_model.model.", "language_model.")
        return key.replace("model.language_model.lm_head", "lm_head")
    return rename


KEYS = {
    "transformers 4.36 to 4.57, files": prefixes(vision_tower="vision_tower.vision_model"),
    "transformers 4.52 to 4.57, state_dict": state_dict_keys("model.vision_tower.vision_model"),
    "transformers 5, state_dict": state_dict_keys("model.vision_tower"),
    "DistributedDataParallel": lambda key: "module." + key}


@pytest.mark.parametrize("layout", KEYS)
def test_older_keys(public, tmp_path, layout):
    """With the sparse nested config that older versions wrote: only what differs from their
    defaults.
    """
    left_out = ("rope_parameters", "head_dim", "num_key_value_heads")
    text = load_json(public.hf / "config.json")["text_config"]
    text = {name: value for name, value in text.items() if name not in left_out}
    text |= {"_name_or_path": "lmsys/vicuna-7b-v1.5", "torch_dtype": "float16"}
    old = variant_of(public.hf, tmp_path / "old", KEYS[layout], text_config=text)
    agrees(layout, public.expected, old)


def test_sharded_bin(public, tmp_path):
    folder = variant_of(public.hf, tmp_path / "bin")
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    shard = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(tensors)}
    for name in set(shard.values()):
        part = {key: tensor for key, tensor in tensors.items() if shard[key] == name}
        torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": shard}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    agrees("sharded .bin", public.expected, folder)
    # As torch before 1.6 wrote it, which cannot be mapped.
    for name in set(shard.values()):
        part = torch.load(folder / name)
        torch.save(part, folder / name, _use_new_zipfile_serialization=False)
    agrees("old .bin", public.expected, folder)


def test_tied_embeddings(public, tmp_path):
    def without_lm_head(key):
        return None if key.endswith("lm_head.weight") else key

    model = llava_of_transformers(public.pieces)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    whole = public.save(model, tmp_path / "whole")
    tied = variant_of(whole, tmp_path / "tied", without_lm_head, tie_word_embeddings=True)
    agrees("tied embeddings", expected_of(model, public.pieces), tied)


# ---- LLaVA's own ---------------------------------------------------------------------------------


def test_llava_with_the_tower_outside(public, tmp_path):
    model = agrees("--vision_tower", public.expected, public.llava, public.clip)
    assert model.preprocess.pad and model.config.max_length == 256
    named = variant_of(public.llava, tmp_path / "named", mm_vision_tower=str(public.clip))
    agrees("mm_vision_tower", public.expected, named)


@pytest.mark.parametrize("ratio, pads", (("pad", True), ("square", False), (None, False)))
def test_how_pictures_become_square(public, tmp_path, ratio, pads):
    """As in LLaVA, where a config.json that says nothing means that the middle is cut out."""
    folder = variant_of(public.llava, tmp_path / "model", image_aspect_ratio=ratio)
    model = load_base(str(folder), str(public.clip))
    assert model.config.pad_images == model.preprocess.pad == pads
    assert load_base(str(public.hf)).preprocess.pad              # which does not say it


@pytest.mark.parametrize("ratio", ("anyres_max_9", "crop", "keep", "Pad", 1, ["pad"]))
def test_other_ways_to_see_a_picture_are_refused(public, tmp_path, ratio):
    """A model that was trained with other pictures would load, and see wrongly."""
    for n, (layout, tower) in enumerate(((public.llava, str(public.clip)), (public.hf, None))):
        folder = variant_of(layout, tmp_path / str(n), image_aspect_ratio=ratio)
        with pytest.raises(InputError) as error:
            load_base(str(folder), tower)
        said = f"{folder}/config.json: image_aspect_ratio is {json.dumps(ratio)} and only pad and "
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_relatives_of_llava_are_refused_by_name(public, tmp_path):
    folder = variant_of(public.hf, tmp_path / "model", model_type="llava_next_video")
    with pytest.raises(InputError, match='config.json: model_type is "llava_next_video", which'):
        load_base(str(folder))


def test_llava_with_the_tower_inside(public, tmp_path):
    """The tower inside counts, and a folder that is named lends only its config.json."""
    zeros = tmp_path / "zeros"
    shutil.copytree(public.clip, zeros)
    edit(zeros / "model.safetensors", lambda tensors: [t.zero_() for t in tensors.values()])
    named = variant_of(public.llava_inside, tmp_path / "named", mm_vision_tower=str(zeros))
    agrees("tower inside", public.expected, named)
    agrees("tower inside, --vision_tower", public.expected, public.llava_inside, zeros)


def test_tower_inside_without_its_config(world, tmp_path):
    """Sizes follow from the shapes; OpenAI's towers have heads of 64."""
    tokenizer, base = Tokenizer(world.tokenizer), tmp_path / "base"
    trunk, head = small_llava(vocab_size=len(tokenizer))
    trunk.config.vision = CLIPVisionConfig(128, 48, 2, 2, image_size=24, patch_size=8)
    trunk.config.select_layer = -1
    trunk.vision_tower = shake(CLIPVisionTower(trunk.config.vision, -1))
    trunk.model.mm_projector[0] = torch.nn.Linear(128, 12).requires_grad_(False)
    save_base(str(base), as_llava(trunk, head, tokenizer=tokenizer))
    tensors = load_file(base / "model.safetensors")
    for key, tensor in load_file(base / "vision_tower" / "model.safetensors").items():
        tensors[f"model.vision_tower.vision_tower.{key}"] = tensor
    shutil.rmtree(base / "vision_tower")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    again = load_base(str(base)).trunk
    assert again.config.vision == trunk.config.vision
    pixels = torch.randn(1, 3, 24, 24)
    features = again.vision_tower(pixels)
    assert largest_difference("features", features, trunk.vision_tower(pixels)) == 0


@pytest.mark.parametrize("prefix", ("model.mm_projector.", "mm_projector.",
                                    "base_model.model.model.mm_projector."))
def test_mm_projector_bin(public, tmp_path, prefix):
    def without_projector(key):
        return None if "mm_projector" in key else key

    folder = variant_of(public.llava, tmp_path / "apart", without_projector)
    tensors = {prefix + key.removeprefix("model.mm_projector."): tensor
               for key, tensor in load_file(public.llava / "model.safetensors").items()
               if "mm_projector" in key}
    torch.save(tensors, folder / "mm_projector.bin")
    agrees("mm_projector.bin", public.expected, folder, public.clip)


# ---- CLIP ----------------------------------------------------------------------------------------


def test_full_clip_as_the_tower(public, tmp_path):
    """CLIPModel's files, which hold a text half, with every setting of the preprocessor; then the
    older .bin and keys.
    """
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text)
    theirs, clip = transformers.CLIPModel(config), tmp_path / "clip"
    theirs.vision_model.load_state_dict(public.model.model.vision_tower.state_dict())
    theirs.save_pretrained(clip)
    settings = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
                    image_mean=[.1, .2, .3], image_std=[.4, .5, .6])
    transformers.CLIPImageProcessor(**settings).save_pretrained(clip)
    preprocess = agrees("full CLIP", public.expected, public.llava, clip).preprocess
    assert preprocess.mean == (.1, .2, .3) and preprocess.std == (.4, .5, .6)
    assert preprocess.size == 24

    path, tensors = as_bin(clip)
    position_ids = torch.arange(10)[None]
    torch.save(tensors | {"vision_model.embeddings.position_ids": position_ids}, path)
    processor = clip / "preprocessor_config.json"
    processor.write_text('{"size": 24, "crop_size": 24, "resample": 3}')        # as in 2022
    agrees("full CLIP, .bin", public.expected, public.llava, clip)
    for name, bad in (("resample", 2), ("crop_size", {"height": 30, "width": 24}),
                      ("do_center_crop", False)):
        processor.write_text(json.dumps({name: bad}))
        with pytest.raises(InputError, match=name):
            load_base(str(public.llava), str(clip))
