"""open_clip's towers: its modules' features, and its files as --vision_tower."""
import re

import pytest
import torch
from conftest import largest_difference
from public_checkpoints import PublicCheckpoints, agrees, randomised
from safetensors.torch import load_file, save_file

from checkpoints.load import load_base
from checkpoints.openclip import from_open_clip, open_clip_config
from clip_vit import CLIPVisionTower
from support.common import InputError

open_clip = pytest.importorskip("open_clip")

# Hugging Face's names and open_clip's.
NAMES = {"embeddings.position_embedding.weight": "positional_embedding",
         "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre",
         "embeddings.class_embedding": "class_embedding", "encoder.layers": "transformer.resblocks",
         "layer_norm": "ln_", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj", "post_layernorm": "ln_post"}


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


@pytest.mark.parametrize("quick_gelu", (True, False))
def test_features(quick_gelu):
    torch.manual_seed(0)
    vision = dict(image_size=24, layers=3, width=128, head_width=32, mlp_ratio=2.0, patch_size=8)
    sizes = {"vision_cfg": vision, "quick_gelu": quick_gelu}
    text = dict(context_length=7, vocab_size=30, width=16, heads=2, layers=1)
    theirs = randomised(open_clip.model.CLIP(8, text_cfg=text, **sizes))
    config, pixels, seen = open_clip_config(sizes, False), torch.randn(2, 3, 24, 24), []
    tensors = from_open_clip(theirs.state_dict(), lambda whole, n: whole.chunk(3)[n])
    tensors = {key.removeprefix("vision_tower."): tensor for key, tensor in tensors.items()}
    for block in theirs.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs.visual(pixels)
    for layer in (-1, -2):
        ours = CLIPVisionTower(config, layer)
        ours.load_state_dict({key: tensor for key, tensor in tensors.items()
                              if not ours.unused_key(key)})
        expected = seen[layer][:, 1:]
        what = f"open_clip, layer {layer}, {config.hidden_act}"
        assert largest_difference(what, ours(pixels), expected) < 1e-4
    with pytest.raises(ValueError, match="ls_init_value"):
        open_clip_config({"vision_cfg": vision | {"ls_init_value": 0.1}}, False)


def written_by_open_clip(tensors):
    """A tower's tensors under open_clip's names, with what else its files hold."""
    theirs = {"visual.proj": torch.zeros(24, 8), "logit_scale": torch.ones(()),
              "token_embedding.weight": torch.zeros(3, 3)}
    for key, tensor in tensors.items():
        name = key
        for new, old in NAMES.items():
            name = name.replace(new, old)
        if "q_proj" in key:
            parts = [tensors[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            theirs["visual." + name] = torch.cat(parts)
        elif "k_proj" not in key and "v_proj" not in key:
            theirs["visual." + name] = tensor
    return theirs


@pytest.mark.parametrize("suffix", ("pt", "safetensors"))
def test_a_file_as_the_tower(public, tmp_path, monkeypatch, suffix):
    """--vision_tower open_clip:MODEL/FILE, weights written under open_clip's names; quick-GELU
    where all known weights have it.
    """
    vision = dict(image_size=24, layers=4, width=24, head_width=6, mlp_ratio=2.0, patch_size=8)
    sizes = {"ViT-L-14-336": {"vision_cfg": vision}}
    monkeypatch.setattr(open_clip, "get_model_config", sizes.get)
    theirs = written_by_open_clip(load_file(public.clip / "model.safetensors"))
    path = str(tmp_path / f"weights.{suffix}")
    if suffix == "safetensors":
        save_file(theirs, path)
    else:
        state = {"module." + key: tensor for key, tensor in theirs.items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    named = str(public.llava), f"open_clip:ViT-L-14-336/{path}"
    model = agrees("open_clip file", public.expected, *named)
    assert model.config.vision.hidden_act == "quick_gelu"
    unread = load_base(*named, read_trunk=False)
    assert unread.fingerprint == load_base(*named).fingerprint
    for wrong in ("open_clip:ViT-X/openai", "open_clip:ViT-L-14-336/nowhere.pt"):
        with pytest.raises(InputError, match=re.escape(wrong)):
            load_base(str(public.llava), wrong)
