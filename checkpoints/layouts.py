"""Other people's files: all layouts of the public checkpoints, in our names.

    tensors = read_tensors("llava-1.5-7b-hf")                  # {our name: LazyTensor}
    config = llama_config(read_json(".../config.json"), ".../config.json")

load.py puts the tensors into modules. Known here: LLaVA's own layout, Hugging Face's LLaVA and CLIP
in all names that transformers has written over time, and the training notes'
`non_lora_trainables.bin`. What LLaVA's versions have each on its own is in versions.py, peft's
adapters are in adapters.py, what only a vision tower has in towers.py, open_clip's names in
openclip.py.

A setting that our modules do not build is refused by its name: to ignore it would give wrong
numbers without any error.
"""
import glob
import json
import math
import os
from dataclasses import fields

from checkpoints.quantised import refuse_quantised, with_packed
from clip_vit import TOWER
from llama import LlamaConfig
from post_decoder import BlockConfig
from support.common import InputError, read_json
from support.tensors import read_file, refuse_gguf

OURS = "nanohadpo"                          # model_type in a trained checkpoint's config.json
TRAINED_FILE = "trained.safetensors"        # the tensors of a trained checkpoint
SEED_FILE = "non_lora_trainables.bin"       # the tensors of the training notes' checkpoints


# ---- Files and names -----------------------------------------------------------------------------


def weight_files(folder):
    """The paths of a folder's weights: safetensors or .bin, in shards or whole; [] without any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, name + ".index.json")
        if os.path.isfile(index):
            weight_map = typed(read_json(index, dict), "weight_map", dict, index)
            if not weight_map:
                raise InputError(f"{index}: names no weights (weight_map); download it again")
            for key in weight_map:
                typed(weight_map, key, str, index)
            shards = sorted(set(weight_map.values()))
            absent = [n for n in shards if not os.path.isfile(os.path.join(folder, n))]
            if absent:
                raise InputError(f"{index}: names {', '.join(absent)}, which {folder} does not "
                                 "hold; download the missing shards")
            return [os.path.join(folder, n) for n in shards]
        if os.path.exists(os.path.join(folder, name)):      # a folder is refused by read_file
            return [os.path.join(folder, name)]
    return []


def read_tensors(folder):
    """All tensors of a folder's weight files → {our name: LazyTensor}."""
    paths = weight_files(folder)
    if not paths:
        for path in glob.glob(os.path.join(glob.escape(folder), "*.gguf")):
            refuse_gguf(path)
        cure = "download them"
        if os.path.isfile(os.path.join(folder, "zero_to_fp32.py")):
            cure = ("they are still in DeepSpeed's pieces: put them together with the "
                    "zero_to_fp32.py that lies there")
        raise InputError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin, "
                         f"with their index if sharded); {cure}")
    tensors = {}
    for path in paths:
        tensors |= read_file(path, nf4=True)
    return our_names(with_packed(tensors, folder))


# (prefix of a public key, our prefix). The first that fits is used; if none fits, the key is ours.
RENAMES = [
    # LLaVA with the tower inside the checkpoint; the second was saved with transformers 5
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_tower.", TOWER),
    # state_dict() of transformers' LlavaForConditionalGeneration from 4.52 on, and from 5 on
    ("model.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.", TOWER),
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    # Its save_pretrained, from 4.36 on
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),                               # from 5 on
    ("image_newline", "model.image_newline"),
    # mm_projector.bin of some versions of LLaVA
    ("mm_projector.", "model.mm_projector."),
    # transformers' CLIPModel and CLIPVisionModel; from 5 on CLIPVisionModel has no prefix
    ("vision_model.", TOWER),
    ("embeddings.", TOWER + "embeddings."),
    ("encoder.", TOWER + "encoder."),
    ("pre_layrnorm.", TOWER + "pre_layrnorm."),
    ("post_layernorm.", TOWER + "post_layernorm."),
]
# LLaVA does not use these tensors of public files: CLIP's text half, and RoPE's frequencies, which
# follow from config.json.
UNUSED_PREFIXES = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
UNUSED_SUFFIX = "rotary_emb.inv_freq"


def our_name(key):
    """A public key → our name of the same tensor."""
    key = key.removeprefix("module.")                       # DistributedDataParallel
    key = key.removeprefix("base_model.model.")             # peft
    for theirs, ours in RENAMES:
        if key.startswith(theirs):
            return ours + key[len(theirs):]
    return key


def our_names(tensors):
    """{public key: value} → {our name: value}, without what LLaVA does not use."""
    return {our_name(key): value for key, value in tensors.items()
            if not key.startswith(UNUSED_PREFIXES) and not key.endswith(UNUSED_SUFFIX)}


# ---- Settings ------------------------------------------------------------------------------------

# The only value of a setting that our modules build.
BUILT = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
    "mm_vision_select_feature": "patch", "vision_feature_select_strategy": "default"}
# How a message calls the types of settings.
NAMES = {int: "a whole number above 0", float: "a number above 0", bool: "true or false",
         str: "a text", dict: "an object"}
BLOCK_FORMS = {"attention": ("cross", "self", "none"), "align": ("mlp", "linear"),
               "image_source": ("clip", "projector")}
# What a config.json means when it leaves a setting out: transformers' defaults, not LLaVA-1.5's.
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
MISTRAL_DEFAULTS = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                    "intermediate_size": 14336, "num_key_value_heads": 8}
MISTRALS = "mistral", "llava_mistral"       # values of model_type


def typed(values, name, expected, path):
    """values[name], or None if it is absent or null. InputError unless it is of type `expected`.

    Numbers must be finite and above 0; a whole number will do for a float.
    """
    value = values.get(name)
    if value is None:
        return None
    fits = isinstance(value, (int, float) if expected is float else expected)
    if expected in (int, float):
        below = 2 ** 31 if expected is int else math.inf
        fits = fits and not isinstance(value, bool) and 0 < value < below
    if not fits:
        raise InputError(f"{path}: {name} is {json.dumps(value)} and should be {NAMES[expected]}; "
                         "mend the file, or download it again")
    return value


def pick(cls, values, defaults, path):
    """A config dataclass, filled with those `values` that are its fields and are not None.

    `path`: of the file, for an InputError where a value is of another type or out of range.
    """
    found = {f.name: typed(values, f.name, f.type, path) for f in fields(cls)}
    found = {name: value for name, value in found.items() if value is not None}
    return cls(**{name: value for name, value in (defaults | found).items()
                  if name in cls.__dataclass_fields__})


def refuse_made_up(layers, tensors, path):
    """InputError for more layers than there are tensors, before they are built. `layers`: {name
    of a setting: how many}."""
    for name, count in layers.items():
        if count > len(tensors):
            raise InputError(f"{path}: {name} is {count:,}, and the weights hold {len(tensors):,} "
                             "tensors in all; mend the file, or download it again")


def refuse_uneven(values, number, divisor, path):
    """InputError unless the one divides the other. Both are names of settings in `values`."""
    n, d = values[number], values[divisor]
    if n % d:
        raise InputError(f"{path}: {number} is {n} and {divisor} is {d}, which does not divide it; "
                         "mend the file, or download it again")


def refuse_others(values, built, path):
    """InputError if a setting in `values` is there, not None, and not as in `built`."""
    for name, only in built.items():
        if values.get(name) not in (None, only):
            raise InputError(f"{path}: {name} is {json.dumps(values[name])} and only "
                             f"{json.dumps(only)} is built here; name a LLaVA-1.5 checkpoint")


def llama_config(values, path):
    """The values of a LLaMA's config.json → LlamaConfig."""
    refuse_quantised(values, path)
    refuse_others(values, BUILT, path)
    # transformers 5 writes rope_parameters, earlier versions wrote rope_scaling.
    rope = [typed(values, name, dict, path) for name in ("rope_parameters", "rope_scaling")]
    rope = rope[0] or rope[1] or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    refuse_others({"rope_type": rope_type}, {"rope_type": "default"}, path)
    if rope.get("rope_theta"):
        values = values | {"rope_theta": rope["rope_theta"]}
    is_mistral = values.get("model_type") in MISTRALS
    config = pick(LlamaConfig, values, MISTRAL_DEFAULTS if is_mistral else LLAMA_DEFAULTS, path)
    if values.get("num_key_value_heads") is None and not is_mistral:
        config.num_key_value_heads = config.num_attention_heads
    refuse_uneven(vars(config), "hidden_size", "num_attention_heads", path)
    refuse_uneven(vars(config), "num_attention_heads", "num_key_value_heads", path)
    refuse_others(values, {"head_dim": config.head_dim}, path)
    return config


def block_config_of(values, path):
    """What a config.json of ours says of a post-interaction block → BlockConfig, None without one.

    InputError if this is no block of ours.
    """
    if values is None:
        return None
    known = BlockConfig.__dataclass_fields__
    unknown = sorted(values.keys() - known.keys()) if isinstance(values, dict) else [values]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is no setting of a post-interaction block; mend "
                         "the file, or copy it again")
    config = pick(BlockConfig, values, {}, path)
    for name, allowed in BLOCK_FORMS.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"{path}: {name} of the post-interaction block is "
                             f"{getattr(config, name)!r} and must be one of {', '.join(allowed)}; "
                             "mend the file, or copy it again")
    refuse_uneven(vars(config), "hidden_size", "num_attention_heads", path)
    if config.attention == "self" and config.depth > 1:
        raise InputError(f"{path}: a post-interaction block with self-attention has depth 1, not "
                         f"{config.depth}; mend the file, or copy it again")
    return config


# ---- What was trained elsewhere ------------------------------------------------------------------


def read_seed_file(path, config):
    """The training notes' file → BlockConfig (or None), {our name: LazyTensor}.

    `config`: the base's LlavaConfig. The file holds tensors only, so the block's form follows from
    their names and shapes. It is the original's: h is added once more, heads are LLaMA's. The
    original builds `align` even where nothing uses it, and feeds h to every block, so that only the
    last block counts. What has no effect is left out here.
    """
    prefix = "post_interaction_block."
    tensors = our_names(read_file(path))
    block = {key.removeprefix(prefix): lazy for key, lazy in tensors.items()
             if key.startswith(prefix)}
    beside = {key: lazy for key, lazy in tensors.items() if not key.startswith(prefix)}
    if not block:
        return None, beside

    numbers = [int(key.split(".")[1]) for key in block if key.startswith("blocks.")]
    last = f"blocks.{max(numbers, default=0)}."
    if f"{last}mlp.fc1.weight" not in block:
        raise InputError(f"{path}: {prefix}{last}mlp.fc1.weight is missing; this is not a whole "
                         "post-interaction block")
    attention = next((name for name in ("cross", "self")
                      if f"{last}{name}_attn.q_proj.weight" in block), "none")

    # The width of the image features says where they come from. If both are as wide: from CLIP.
    has_align = "align.fc1.weight" in block
    width = block["align.fc1.weight"].shape[1] if has_align else config.vision.hidden_size
    sources = {config.text.hidden_size: "projector", config.vision.hidden_size: "clip"}
    if width not in sources:
        raise InputError(f"{path}: align reads features of width {width}; this base has "
                         f"{config.vision.hidden_size} (CLIP) and {config.text.hidden_size} "
                         "(projector): name the base that it was trained on with "
                         "--model_name_or_path")
    block_config = config.block_config(
        attention=attention, outer_residual=True, image_source=sources[width], zero_init=False,
        intermediate_size=block[f"{last}mlp.fc1.weight"].shape[0],
        align="linear" if has_align and "align.fc2.weight" not in block else "mlp")
    used = (last, "align.", "image_norm.") if attention == "cross" else (last,)
    block = {prefix + key.replace(last, "blocks.0."): lazy for key, lazy in block.items()
             if key.startswith(used)}
    return block_config, block | beside
