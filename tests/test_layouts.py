"""Every layout that a checkpoint comes in, written by the software that writes it (transformers, peft, open_clip) or key by
key as its older versions did, loads to the same numbers. Then damaged and foreign files: one line that names the cure.
"""
import json
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, dpo_flags, largest_difference, load_json, shake, shell, small_llava, succeeds
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from checkpoint import fingerprint, kind, load_base, load_trained, save_base
from clip_vit import CLIPVisionConfig, CLIPVisionTower, from_open_clip, open_clip_config
from data import BOS, EOS, IGNORE, IMAGE_ID, InputError, Tokenizer, collate, pack
from layouts import Stored, read_seed_file, read_tensors
from model import Head, answer_states, generate
from post_decoder import VARIANTS, PostInteractionBlock

HEADS = [(4, 4), (4, 2), (40, 40)]       # as many key heads, grouped-query, LLaVA-1.5-13B's count
VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=24, patch_size=8)


def randomised(model):
    """Also norms and biases, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter) if parameter.dim() == 1 else 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def llava_of_transformers(pieces, heads=4, kv_heads=4, select_layer=-2, **changes):
    """A random LlavaForConditionalGeneration; like llava-1.5-7b-hf it has 64 embeddings more than its tokenizer has pieces."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=pieces + 64, hidden_size=8 * heads, intermediate_size=56, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=256, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=BOS,
        eos_token_id=EOS, **changes)
    return randomised(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=pieces,
        vision_feature_layer=select_layer)))


def expected_of(theirs, pieces):
    """What transformers says → (batch, pixels' rows), logits, 20 greedy tokens."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    rows = [[BOS, 7, 8, IMAGE_ID, 9, 10, 11], [BOS, 20, 21, IMAGE_ID, 12, 14, 13]]
    batch = collate([pack([(ids, [IGNORE] * len(ids))], 9, 256, str(n)) for n, ids in enumerate(rows)], lambda n: pixels[int(n)])
    ids = batch.input_ids[:, :6 + 9].masked_fill(batch.input_ids[:, :6 + 9] == IMAGE_ID, pieces)    # without our padding
    theirs.generation_config.pad_token_id = 0
    tokens = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=20, do_sample=False)[:, ids.shape[1]:].tolist()
    return batch, theirs(input_ids=ids, pixel_values=pixels).logits, [row[:row.index(EOS)] if EOS in row else row for row in tokens]


def agrees(what, expected, folder, *named, **options):
    """The folder as we load it gives the expected logits and tokens. Returns what load_base returned."""
    batch, logits, tokens = expected
    trunk, head, *rest = loaded = load_base(str(folder), *map(str, named), **options)
    hidden, _ = trunk(batch)
    assert logits.std() > 0.1 and max(map(len, tokens)) > 5
    assert largest_difference(what, head(hidden[:, :logits.shape[1]]), logits) < 1e-4
    (answers, _), = generate(trunk, [head], batch, 20)
    assert [row[0] for row in answers] == tokens
    return loaded


@pytest.fixture(scope="module")
def pieces(world):
    return len(Tokenizer(world.tokenizer))


@pytest.fixture(scope="module")
def saved(world, pieces, tmp_path_factory):
    """One model as save_pretrained writes it → (model, folder, what it says)."""
    folder, model = tmp_path_factory.mktemp("hf"), llava_of_transformers(pieces)
    model.save_pretrained(folder)
    shutil.copy(world.tokenizer, folder / "tokenizer.model")
    return model, folder, expected_of(model, pieces)


def variant_of(folder, target, rename=lambda key: key, **changes):
    """A copy of a folder with other keys (None leaves one out) and another config.json."""
    shutil.copytree(folder, target)
    tensors = {rename(key): t for key, t in load_file(target / "model.safetensors").items()}
    save_file({key: t for key, t in tensors.items() if key is not None}, target / "model.safetensors", {"format": "pt"})
    config = load_json(target / "config.json") | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's LLaVA


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("layer", (-1, -2))
def test_save_pretrained(world, pieces, tmp_path, heads, kv_heads, layer):
    model = llava_of_transformers(pieces, heads, kv_heads, layer, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model.save_pretrained(tmp_path)
    shutil.copy(world.tokenizer, tmp_path / "tokenizer.model")
    agrees(f"{kv_heads} of {heads} heads, layer {layer}", expected_of(model, pieces), tmp_path)


def prefixes(**changes):
    """A renaming of the keys that transformers 5 writes."""
    def rename(key):
        old = next((old for old in changes if key.startswith(old + ".")), None)
        return key if old is None else changes[old] + key[len(old):]
    return rename


KEYS = {
    "transformers 4.36 to 4.57, files": prefixes(vision_tower="vision_tower.vision_model"),
    "transformers 4.52 to 4.57, state_dict": lambda key: prefixes(
        language_model="model.language_model", vision_tower="model.vision_tower.vision_model",
        multi_modal_projector="model.multi_modal_projector")(key).replace("language_model.model.", "language_model.")
        .replace("model.language_model.lm_head", "lm_head"),
    "transformers 5, state_dict": lambda key: prefixes(
        language_model="model.language_model", vision_tower="model.vision_tower",
        multi_modal_projector="model.multi_modal_projector")(key).replace("language_model.model.", "language_model.")
        .replace("model.language_model.lm_head", "lm_head"),
    "DistributedDataParallel": lambda key: "module." + key}


@pytest.mark.parametrize("layout", KEYS)
def test_older_keys(saved, tmp_path, layout):
    """And the sparse nested config that they wrote: only what differs from transformers' own defaults."""
    config = load_json(saved[1] / "config.json")
    text = {k: v for k, v in config["text_config"].items() if k not in ("rope_parameters", "head_dim", "num_key_value_heads")}
    text |= {"_name_or_path": "lmsys/vicuna-7b-v1.5", "torch_dtype": "float16"}
    agrees(layout, saved[2], variant_of(saved[1], tmp_path / "old", KEYS[layout], text_config=text))


def test_sharded_bin(saved, tmp_path):
    folder = variant_of(saved[1], tmp_path / "bin")
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    shard = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(tensors)}
    for name in set(shard.values()):
        torch.save({key: t for key, t in tensors.items() if shard[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    agrees("sharded .bin", saved[2], folder)
    for name in set(shard.values()):                                # as torch before 1.6 wrote it, which cannot be mapped
        torch.save(torch.load(folder / name), folder / name, _use_new_zipfile_serialization=False)
    agrees("old .bin", saved[2], folder)


def test_tied_embeddings(world, pieces, tmp_path):
    model = llava_of_transformers(pieces)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(world.tokenizer, tmp_path / "whole" / "tokenizer.model")
    tied = variant_of(tmp_path / "whole", tmp_path / "tied", lambda key: None if key.endswith("lm_head.weight") else key,
                      tie_word_embeddings=True)
    agrees("tied embeddings", expected_of(model, pieces), tied)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA's own


@pytest.fixture(scope="module")
def llava(saved, tmp_path_factory):
    """The same model in LLaVA's layout, CLIP outside of it → (folder, CLIP's folder, what it says)."""
    root = tmp_path_factory.mktemp("llava")
    model, folder, expected = saved
    named = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "multi_modal_projector.linear_1.": "model.mm_projector.0.",
             "multi_modal_projector.linear_2.": "model.mm_projector.2.", "vision_tower.": "model.vision_tower.vision_tower.vision_model."}
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        old = next(old for old in named if key.startswith(old))
        tensors[named[old] + key[len(old):]] = tensor
    for n in range(3):
        tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 1e9)      # must not be used
    text = load_json(folder / "config.json")["text_config"]
    config = {k: v for k, v in text.items() if k not in ("rope_parameters", "head_dim")} | {
        "model_type": "llava_llama", "rope_scaling": None, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    whole = root / "inside"
    os.makedirs(whole)
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    (whole / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "tokenizer.model", whole / "tokenizer.model")
    outside = variant_of(whole, root / "outside", lambda key: None if "vision_tower" in key else key)
    model.model.vision_tower.save_pretrained(root / "clip")
    return whole, outside, root / "clip", expected


def test_llava_with_the_tower_outside(llava, tmp_path):
    _, outside, clip, expected = llava
    trunk, *_, preprocess = agrees("--vision_tower", expected, outside, clip)
    assert preprocess.pad and trunk.config.max_length == 256
    agrees("mm_vision_tower", expected, variant_of(outside, tmp_path / "named", mm_vision_tower=str(clip)))


def test_llava_with_the_tower_inside(llava, tmp_path):
    """It counts, and a folder that is named lends only its config.json."""
    whole, _, clip, expected = llava
    shutil.copytree(clip, tmp_path / "zeros")
    edit(tmp_path / "zeros" / "model.safetensors", lambda tensors: [t.zero_() for t in tensors.values()])
    agrees("tower inside", expected, variant_of(whole, tmp_path / "named", mm_vision_tower=str(tmp_path / "zeros")))
    agrees("tower inside, --vision_tower", expected, whole, tmp_path / "zeros")


def test_tower_inside_without_its_config(world, tmp_path):
    """Sizes follow from the shapes; OpenAI's towers have heads of 64."""
    trunk, head = small_llava(vocab_size=len(Tokenizer(world.tokenizer)))
    trunk.config.vision = CLIPVisionConfig(128, 48, 2, 2, image_size=24, patch_size=8)
    trunk.vision_tower = shake(CLIPVisionTower(trunk.config.vision, -1))
    trunk.model.mm_projector[0] = torch.nn.Linear(128, 12).requires_grad_(False)
    trunk.config.select_layer = -1
    save_base(str(tmp_path / "base"), trunk, head, Tokenizer(world.tokenizer))
    tensors = load_file(tmp_path / "base" / "model.safetensors") | {
        f"model.vision_tower.vision_tower.{k}": t for k, t in load_file(tmp_path / "base" / "vision_tower" / "model.safetensors").items()}
    shutil.rmtree(tmp_path / "base" / "vision_tower")
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    again, *_ = load_base(str(tmp_path / "base"))
    assert again.config.vision == trunk.config.vision
    pixels = torch.randn(1, 3, 24, 24)
    assert largest_difference("features", again.vision_tower(pixels), trunk.vision_tower(pixels)) == 0


@pytest.mark.parametrize("prefix", ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."))
def test_mm_projector_bin(llava, tmp_path, prefix):
    _, outside, clip, expected = llava
    folder = variant_of(outside, tmp_path / "apart", lambda key: None if "mm_projector" in key else key)
    tensors = {prefix + k.removeprefix("model.mm_projector."): t for k, t in load_file(outside / "model.safetensors").items() if "mm_projector" in k}
    torch.save(tensors, folder / "mm_projector.bin")
    agrees("mm_projector.bin", expected, folder, clip)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def test_full_clip_as_the_tower(saved, llava, tmp_path):
    """CLIPModel's files, which hold a text half, with every setting of the preprocessor; then the older .bin and keys."""
    _, outside, _, expected = llava
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=VISION, text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)))
    clip.vision_model.load_state_dict(saved[0].model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    settings = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[.1, .2, .3], image_std=[.4, .5, .6])
    transformers.CLIPImageProcessor(**settings).save_pretrained(tmp_path / "clip")
    *_, preprocess = agrees("full CLIP", expected, outside, tmp_path / "clip")
    assert preprocess.mean == (.1, .2, .3) and preprocess.std == (.4, .5, .6) and preprocess.size == 24
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    os.remove(tmp_path / "clip" / "model.safetensors")
    torch.save(tensors | {"vision_model.embeddings.position_ids": torch.arange(10)[None]}, tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"size": 24, "crop_size": 24, "resample": 3}')      # of 2022
    agrees("full CLIP, .bin", expected, outside, tmp_path / "clip")
    for name, bad in (("resample", 2), ("crop_size", {"height": 30, "width": 24}), ("do_center_crop", False)):
        (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({name: bad}))
        with pytest.raises(InputError, match=name):
            load_base(str(outside), str(tmp_path / "clip"))


@pytest.mark.parametrize("quick_gelu", (True, False))
def test_open_clip(quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    sizes = {"vision_cfg": dict(image_size=24, layers=3, width=128, head_width=32, mlp_ratio=2.0, patch_size=8), "quick_gelu": quick_gelu}
    theirs = randomised(open_clip.model.CLIP(
        8, text_cfg=dict(context_length=7, vocab_size=30, width=16, heads=2, layers=1), **sizes))
    config, pixels, seen = open_clip_config(sizes, False), torch.randn(2, 3, 24, 24), []
    tensors = from_open_clip(theirs.state_dict(), lambda whole, n: whole.chunk(3)[n])
    for number, block in enumerate(theirs.visual.transformer.resblocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs.visual(pixels)
    for layer in (-1, -2):
        ours = CLIPVisionTower(config, layer)
        ours.load_state_dict({k.removeprefix("vision_tower."): t for k, t in tensors.items()
                              if not ours.unused_key(k.removeprefix("vision_tower."))})
        expected = seen[layer][:, 1:]
        assert largest_difference(f"open_clip, layer {layer}, {config.hidden_act}", ours(pixels), expected) < 1e-4
    with pytest.raises(ValueError, match="ls_init_value"):
        open_clip_config({"vision_cfg": sizes["vision_cfg"] | {"ls_init_value": 0.1}}, False)


@pytest.mark.parametrize("suffix", ("pt", "safetensors"))
def test_open_clip_file_as_the_tower(llava, tmp_path, monkeypatch, suffix):
    """--vision_tower open_clip:MODEL/FILE, weights written under open_clip's names; quick-GELU where all known weights have it."""
    open_clip = pytest.importorskip("open_clip")
    _, outside, clip, expected = llava
    sizes = {"vision_cfg": dict(image_size=24, layers=4, width=24, head_width=6, mlp_ratio=2.0, patch_size=8)}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: sizes if name == "ViT-L-14-336" else None)
    names = {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre",
             "embeddings.class_embedding": "class_embedding", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
             "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "post_layernorm": "ln_post"}
    theirs = {"visual.proj": torch.zeros(24, 8), "logit_scale": torch.ones(()), "token_embedding.weight": torch.zeros(3, 3)}
    tensors = load_file(clip / "model.safetensors")
    for key, tensor in tensors.items():
        for new, old in names.items():
            key = key.replace(new, old)
        if "q_proj" in key:
            parts = [tensors[key.replace("transformer.resblocks", "encoder.layers").replace("q_proj", f"{n}_proj")] for n in "qkv"]
            theirs["visual." + key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif "k_proj" not in key and "v_proj" not in key:
            theirs["visual." + key] = tensor
    path = str(tmp_path / f"weights.{suffix}")
    save_file(theirs, path) if suffix == "safetensors" else torch.save({"epoch": 3, "state_dict": {"module." + k: t for k, t in theirs.items()}}, path)
    trunk, *_ = agrees("open_clip file", expected, outside, f"open_clip:ViT-L-14-336/{path}")
    assert trunk.config.vision.hidden_act == "quick_gelu"
    named = str(outside), f"open_clip:ViT-L-14-336/{path}"
    assert fingerprint(*load_base(*named, read_trunk=False)[:2]) == fingerprint(*load_base(*named)[:2])
    for wrong in ("open_clip:ViT-X/openai", "open_clip:ViT-L-14-336/nowhere.pt"):
        with pytest.raises(InputError, match=re.escape(wrong)):
            load_base(str(outside), wrong)


# ---------------------------------------------------------------------------------------------------------------------
# What was trained elsewhere


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("prefix", ("", "base_model.model."))
def test_the_notes_files(tmp_path, variant, prefix):
    """A random block in the original's form, with the `align` that the original builds everywhere; and the block's config."""
    trunk, base = small_llava(heads=4)
    _, head = small_llava(heads=4, variant=variant)
    tensors = dict(head.state_dict())
    if variant:
        head.block.outer_residual = True
        width = head.block.mm_hidden_size
        leftovers = {"align.fc1.weight": torch.randn(56, width), "align.fc1.bias": torch.randn(56), "align.fc2.weight": torch.randn(32, 56),
                     "align.fc2.bias": torch.randn(32), "image_norm.weight": torch.randn(32), "image_norm.bias": torch.randn(32)}
        if head.block.attention != "cross":
            tensors |= {"post_interaction_block." + k: t for k, t in leftovers.items()}
    torch.save({prefix + k: t for k, t in tensors.items()}, tmp_path / "non_lora_trainables.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert kind(str(tmp_path)) == kind(str(tmp_path / "non_lora_trainables.bin")) == "seed"
    for path in (tmp_path, tmp_path / "non_lora_trainables.bin"):
        again = load_trained(str(path), trunk.config, base, "any base")
        assert again.block == head.block and again.state_dict().keys() == head.state_dict().keys()
        assert all(torch.equal(t, head.state_dict()[k]) for k, t in again.state_dict().items())


def test_only_the_last_block_of_the_original_counts(tmp_path):
    trunk, base = small_llava()
    torch.manual_seed(0)
    config = trunk.config.block(outer_residual=True, depth=2, zero_init=False)
    original = shake(PostInteractionBlock(config))
    torch.save({"post_interaction_block." + k: t for k, t in original.state_dict().items()}, tmp_path / "non_lora_trainables.bin")
    head = load_trained(str(tmp_path), trunk.config, base, None)
    h, F = torch.randn(2, 5, 32), torch.randn(2, 9, 24)
    last = original.blocks[1](h, original.image_norm(original.align(F)), None) + h
    assert head.block.depth == 1 and head.lm_head is base.lm_head
    assert largest_difference("depth 2 of the original", head.post_interaction_block(h, F), last) < 1e-6


@pytest.fixture(scope="module")
def adapted(saved, llava, pieces, tmp_path_factory):
    """A LoRA of peft on the LLaMA of the saved model, every linear of it → (adapter folder, what the adapted model says)."""
    peft = pytest.importorskip("peft")
    folder = str(tmp_path_factory.mktemp("lora"))
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(saved[1])
    causal = transformers.LlamaForCausalLM(theirs.config.text_config)
    causal.model, causal.lm_head = theirs.model.language_model, theirs.lm_head
    torch.manual_seed(3)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(causal, peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, lora_dropout=0.05)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return folder, expected_of(theirs, pieces)                   # the layers that peft adapted are theirs


def test_lora(saved, llava, adapted, tmp_path):
    """peft's own forward, unmerged, against the merged weights: over Hugging Face's layout and over LLaVA's, then as .bin."""
    folder, expected = adapted
    assert kind(folder) == "adapter" and not torch.allclose(expected[1], saved[2][1], atol=0.01)
    agrees("LoRA over HF's layout", expected, saved[1], adapter=folder)
    _, outside, clip, _ = llava
    shutil.copytree(folder, tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin" / "adapter_model.safetensors"), tmp_path / "bin" / "adapter_model.bin")
    os.remove(tmp_path / "bin" / "adapter_model.safetensors")
    projector = {k: 0 * t for k, t in load_file(outside / "model.safetensors").items() if "mm_projector" in k}
    torch.save({"base_model.model." + k: t for k, t in projector.items()}, tmp_path / "bin" / "non_lora_trainables.bin")
    trunk, *_ = load_base(str(outside), str(clip), adapter=str(tmp_path / "bin"))
    assert not trunk.model.mm_projector[0].weight.any()                             # what was trained beside the adapter
    os.remove(tmp_path / "bin" / "non_lora_trainables.bin")
    trunk, head, *_ = agrees("LoRA over LLaVA's layout", expected, outside, clip, adapter=str(tmp_path / "bin"))
    half, *_ = load_base(str(outside), str(clip), torch.bfloat16, adapter=str(tmp_path / "bin"))
    for key, tensor in trunk.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[key], tensor.bfloat16()), key    # rounded once


def test_programs_take_them(world, tmp_path):
    """The notes' file and an adapter where a trained checkpoint is meant: --init, CKPT; and an adapter not beside others."""
    trunk, base, *_ = load_base(world.base)
    head = shake(Head(trunk.config, trunk.config.block(zero_init=False)))
    os.makedirs(tmp_path / "notes")
    torch.save(head.state_dict(), tmp_path / "notes" / "non_lora_trainables.bin")
    os.makedirs(tmp_path / "lora")
    with open(tmp_path / "lora" / "adapter_config.json", "w") as file:
        json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(32, 2)}, tmp_path / "lora" / "adapter_model.safetensors")
    succeeds("python", f"{ROOT}/train.py", "--stage", 2, "--init", tmp_path / "notes", *dpo_flags(world), "--max_steps", 1,
             "--output_dir", tmp_path / "out")
    assert load_trained(str(tmp_path / "out"), trunk.config, base, fingerprint(trunk, base)).block.outer_residual
    ask = ["python", f"{ROOT}/eval_pope.py", "--model_name_or_path", world.base, "--coco_path", world.coco, "--pope_path", world.pope,
           "--set", "random", "--max_new_tokens", 4]
    assert "| notes |" in succeeds(*ask, tmp_path / "notes")
    succeeds(*ask, tmp_path / "notes" / "non_lora_trainables.bin")
    assert "| adapter |" in succeeds(*ask, tmp_path / "lora")
    done = shell(*ask, tmp_path / "lora", tmp_path / "notes")
    assert done.returncode == 1 and "name it alone" in done.stderr and "Traceback" not in done.stderr
    succeeds("python", f"{ROOT}/checkpoint.py", tmp_path / "notes", tmp_path / "whole", "--model_name_or_path", world.base)
    rest = ["--model_name_or_path", tmp_path / "whole", *dpo_flags(world)[2:]]              # a base that has a block already
    assert "the base's own block" in succeeds("python", f"{ROOT}/train.py", "--stage", 1, *rest, "--max_steps", 1, "--output_dir", tmp_path / "more")
    assert "| more |" in succeeds(*[tmp_path / "whole" if a == world.base else a for a in ask], tmp_path / "more")


def test_wrong_adapters(saved, adapted, tmp_path):
    def broken(name, said=None, **settings):
        target = str(tmp_path / name)
        shutil.copytree(adapted[0], target)
        with open(f"{target}/adapter_config.json", "w") as file:
            json.dump(load_json(f"{adapted[0]}/adapter_config.json") | settings, file)
        if said:
            save_file(said(load_file(f"{adapted[0]}/adapter_model.safetensors")), f"{target}/adapter_model.safetensors")
        with pytest.raises(InputError) as error:
            load_base(str(saved[1]), adapter=target)
        assert "\n" not in str(error.value)
        print(error.value)
        return str(error.value)

    assert "layers.7" in broken("other", lambda t: {k.replace("layers.2", "layers.7"): x for k, x in t.items()})
    assert "holds no LoRA weights" in broken("empty", lambda t: {})
    assert "rank 4" in broken("zero3", lambda t: {k: x[:0] for k, x in t.items()})
    assert "use_dora" in broken("dora", use_dora=True)
    assert "rank_pattern" in broken("pattern", rank_pattern={"q_proj": 8})


# ---------------------------------------------------------------------------------------------------------------------
# Merged: one whole model


def test_merge(world, tmp_path):
    """Base and the notes' file written as one model, which is a base again and says the same; an HF base likewise."""
    trunk, base, *_ = load_base(world.base)
    torch.manual_seed(1)
    head = shake(Head(trunk.config, trunk.config.block(zero_init=False)))
    torch.save(head.state_dict(), tmp_path / "non_lora_trainables.bin")
    head = load_trained(str(tmp_path), trunk.config, base, None)
    succeeds("python", f"{ROOT}/checkpoint.py", tmp_path, tmp_path / "whole", "--model_name_or_path", world.base)
    again, merged, _, preprocess = load_base(str(tmp_path / "whole"))
    assert asdict(merged.block) == asdict(head.block) and merged.block.outer_residual and preprocess.size == 24
    assert all(torch.equal(t, merged.state_dict()[k]) for k, t in head.state_dict().items())
    assert fingerprint(again, merged) != fingerprint(trunk, base) and kind(str(tmp_path / "whole")) == "base"
    rows = [[BOS, 7, 8, IMAGE_ID, 9, 10, 11]]
    batch = collate([pack([(ids, [IGNORE] * len(ids))], 9, 256, "x") for ids in rows], lambda n: torch.ones(3, 24, 24))
    at = torch.arange(batch.input_ids.shape[1])[None]
    logits = [h(*answer_states(h, *t(batch), batch, at)) for t, h in ((trunk, head), (again, merged))]
    assert largest_difference("merged", *logits) == 0
    done = shell("python", f"{ROOT}/checkpoint.py", tmp_path, tmp_path / "whole", "--model_name_or_path", world.base)
    assert done.returncode == 1 and "exists already" in done.stderr and "Traceback" not in done.stderr


def test_merge_of_an_hf_base_and_an_adapter(saved, adapted, tmp_path):
    succeeds("python", f"{ROOT}/checkpoint.py", saved[1], tmp_path / "llava")
    agrees("HF to LLaVA", saved[2], tmp_path / "llava")
    succeeds("python", f"{ROOT}/checkpoint.py", adapted[0], tmp_path / "adapted", "--model_name_or_path", saved[1])
    agrees("adapter merged", adapted[1], tmp_path / "adapted")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and foreign


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def nan(tensors):
    tensors["language_model.model.norm.weight"][3] = float("nan")


def index(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name, "x": "model.safetensors"}}))


def settings(**changes):
    def change(folder):
        config = load_json(folder / "config.json")
        for part, values in changes.items():
            config[part] = config[part] | values if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(config))
    return change


MISTAKES = {  # what: (what is done to a copy of the Hugging Face folder, what the error line says)
    "missing shard": (lambda f: index(f, "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors.*download"),
    "no weights": (lambda f: os.remove(f / "model.safetensors"), "holds no weights.*download"),
    "cut safetensors": (lambda f: halve(f / "model.safetensors"), "model.safetensors: not a whole.*again"),
    "cut bin": (lambda f: (torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"), os.remove(f / "model.safetensors"),
                           halve(f / "pytorch_model.bin")), "pytorch_model.bin: cannot be read.*again"),
    "no tensor in a bin": (lambda f: (torch.save({"a": torch.ones(1), "b": [1]}, f / "pytorch_model.bin"), os.remove(f / "model.safetensors")),
                           "pytorch_model.bin: b is no tensor"),
    "code in a bin": (lambda f: (torch.save({"a": shell}, f / "pytorch_model.bin"), os.remove(f / "model.safetensors")),
                      "pytorch_model.bin: cannot be read"),
    "another model's size": (settings(text_config={"intermediate_size": 88}), "mlp.gate_proj.weight has shape .56, 32.*.88, 32.*another"),
    "fewer layers": (settings(text_config={"num_hidden_layers": 4}), "missing keys.*layers.3"),
    "more layers": (settings(text_config={"num_hidden_layers": 2}), "unexpected keys.*layers.2"),
    "NaN": (lambda f: edit(f / "model.safetensors", nan), "norm.weight holds NaN"),
    "too few embeddings": (settings(text_config={"vocab_size": 7}), "tokenizer.model: has .* pieces.*7 embeddings.*copy"),
    "no tokenizer": (lambda f: os.remove(f / "tokenizer.model"), "tokenizer.model: no such file; copy"),
    "config cut": (lambda f: halve(f / "config.json"), "config.json: not readable as JSON"),
    "rope scaling": (settings(text_config={"rope_parameters": {"rope_type": "linear", "factor": 2.0}}), "rope_type is \"linear\""),
    "attention bias": (settings(text_config={"attention_bias": True}), "attention_bias is true"),
    "another activation": (settings(text_config={"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
    "another tower activation": (settings(vision_config={"hidden_act": "relu"}), "relu.*quick_gelu"),
    "class token too": (settings(vision_feature_select_strategy="full"), "vision_feature_select_strategy is \"full\""),
    "several layers": (settings(vision_feature_layer=[-2, -5]), "selected layer is .-2, -5"),
    "no such layer": (settings(vision_feature_layer=-9), "selected layer is -9"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_damaged(saved, tmp_path, what):
    change, said = MISTAKES[what]
    shutil.copytree(saved[1], tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(InputError) as error:
        load_base(str(tmp_path / "model"))
    print(error.value)
    assert re.search(said, str(error.value)) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_hub_ids_are_paths(llava, saved):
    """Nothing is downloaded: a name that is no folder is said to be exactly that."""
    for arguments in (("liuhaotian/llava-v1.5-7b",), (str(llava[1]), "openai/clip-vit-large-patch14-336"), (str(llava[1]),)):
        with pytest.raises(InputError, match="(llava-v1.5-7b|patch14-336): no such folder"):
            load_base(*arguments)
    with pytest.raises(InputError, match="no such folder"):
        kind("liuhaotian/llava-v1.5-7b-lora")


def test_nothing_is_read_before_shapes_agree(saved, tmp_path, monkeypatch):
    """A 13.5 GB download of the wrong size is refused at once."""
    shutil.copytree(saved[1], tmp_path / "model")
    settings(text_config={"intermediate_size": 88})(tmp_path / "model")
    original = read_tensors(str(tmp_path / "model"))
    unread = {key: Stored(stored.shape, lambda: pytest.fail("a tensor was read")) for key, stored in original.items()}
    monkeypatch.setattr("checkpoint.read_tensors", lambda folder: unread)
    with pytest.raises(InputError, match="another model"):
        load_base(str(tmp_path / "model"))


def test_block_of_another_base(tmp_path):
    trunk, base = small_llava()
    torch.save({"post_interaction_block.align.fc1.weight": torch.ones(5, 77), "post_interaction_block.blocks.0.mlp.fc1.weight": torch.ones(5, 32)},
               tmp_path / "non_lora_trainables.bin")
    with pytest.raises(InputError, match="features of width 77.*--model_name_or_path"):
        read_seed_file(str(tmp_path / "non_lora_trainables.bin"), trunk.config)
