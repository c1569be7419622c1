"""open_clip's CLIP towers, in our names.

    vision, tensors, processor = read_open_clip("open_clip:ViT-L-14-336/openai")

Follows mlfoundations/open_clip. Its files keep q, k and v in one tensor. Which GELU a tower has
does not follow from its sizes: it belongs to the weights. What stands behind the transformer's
layers is left out, because LLaVA does not use it.
"""
import math
import os

from clip_vit import TOWER, CLIPVisionConfig
from support.common import InputError
from support.tensors import LazyTensor, read_file

# A part of open_clip's key → ours.
OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2"}
# The entries of open_clip's vision_cfg that we understand. The last three act behind the layers.
KNOWN_SETTINGS = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size",
                  "pool_type", "final_ln_after_pool", "output_tokens")


def from_open_clip(tensors, third):
    """{open_clip's key: tensor} → {our name: tensor}, without the text half.

    `third(tensor, n)` must give the n-th third of a tensor's rows: q, k or v.
    """
    ours = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("visual.")
        if name == key or name.startswith(("ln_post.", "attn_pool.")) or name == "proj":
            continue
        for theirs, our in OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, our)
        name = TOWER + name
        before, fused, end = name.partition("attn.in_proj_")        # the end: weight or bias
        if not fused:
            ours[name] = tensor
            continue
        for n, part in enumerate("qkv"):
            ours[f"{before}self_attn.{part}_proj.{end}"] = third(tensor, n)
    return ours


def open_clip_config(values, quick_gelu):
    """open_clip's model config → CLIPVisionConfig. `quick_gelu`: whether the weights have it.

    ValueError names the first setting that our tower does not build.
    """
    vision = values["vision_cfg"]
    unknown = [name for name in vision if name not in KNOWN_SETTINGS]
    unknown += [name for name in ("image_size", "layers", "patch_size")
                if not isinstance(vision.get(name), int)]
    if unknown:
        raise ValueError(f"its {unknown[0]} ({vision.get(unknown[0])}) is not built here")
    width = vision["width"]
    quick_gelu = quick_gelu or values.get("quick_gelu")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision["layers"],
        num_attention_heads=width // vision.get("head_width", 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act="quick_gelu" if quick_gelu else "gelu")


def read_open_clip(name):
    """One of open_clip's towers → CLIPVisionConfig, {our name: LazyTensor}, preprocessor settings.

    open_clip downloads open_clip:ViT-L-14-336/openai; open_clip:ViT-L-14-336/path/to/weights is a
    local file. InputError if open_clip does not know the model or its weights.
    """
    import open_clip  # optional: only these towers need it

    model, _, weights = name.removeprefix("open_clip:").partition("/")
    sizes = open_clip.get_model_config(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if sizes is None:
        raise InputError(f"{name}: open_clip knows no model {model!r}; write for example "
                         "open_clip:ViT-L-14-336/openai")
    pretrained = open_clip.get_pretrained_cfg(model, weights)
    if not pretrained and not os.path.isfile(weights):
        raise InputError(f"{name}: {weights!r} is neither a file nor one of open_clip's weights "
                         f"for {model} ({', '.join(tags)})")

    # A tag says which GELU its weights have. A file does not: quick-GELU if all tags have it.
    known = [pretrained] if pretrained else [open_clip.get_pretrained_cfg(model, t) for t in tags]
    quick_gelu = bool(known) and all(entry.get("quick_gelu") for entry in known)
    try:
        config = open_clip_config(sizes, quick_gelu)
    except ValueError as e:
        raise InputError(f"{name}: {e}; name a plain ViT of open_clip") from e
    if pretrained:
        try:
            weights = open_clip.download_pretrained(pretrained)
        except Exception as e:      # a download may raise anything
            reason = str(e).splitlines()[0]
            raise InputError(f"{name}: not downloaded ({reason}); name a file: "
                             f"open_clip:{model}/path/to/weights") from e
    tensors = {key.removeprefix("module."): lazy for key, lazy in read_file(weights).items()}

    def third(whole, n):
        shape = (whole.shape[0] // 3, *whole.shape[1:])

        def read(pinned=False):
            return whole.read(pinned).chunk(3)[n]

        def read_values(indices):
            return whole.values_at(n * math.prod(shape) + indices)

        return LazyTensor(shape, read, read_values)

    processor = {"image_mean": pretrained.get("mean"), "image_std": pretrained.get("std")}
    return config, from_open_clip(tensors, third), processor
