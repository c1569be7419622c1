"""Other people's files: every layout that the public checkpoints come in, told in our names, settings and tensors.

    tensors = read_tensors("llava-1.5-7b-hf")                  # {our name: Stored}; nothing but headers is read
    config = llava_config(read_json(".../config.json"), ".../config.json", vision)
    vision, tower, processor = read_tower("open_clip:ViT-L-14-336/openai")

What a folder is follows from what it holds, never from what it is called. checkpoint.py puts the tensors into modules.
Known here: LLaVA's own layout, Hugging Face's LLaVA and CLIP in the names that transformers has written over time,
open_clip's CLIP, peft's LoRA adapters, and the training notes' `non_lora_trainables.bin`. A setting that our modules do
not build is refused by its name, because loading it as something else would only give wrong numbers.
"""
import ctypes
import json
import math
import mmap
import os
import zipfile
from dataclasses import dataclass, fields
from functools import partial
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open

from clip_vit import ACTIVATIONS, CLIP_MEAN, CLIP_STD, TOWER, CLIPVisionConfig, from_open_clip, open_clip_config
from data import ImageProcessor
from llama import LlamaConfig
from model import LlavaConfig
from post_decoder import BlockConfig
from readers import InputError, field, read_json

# ---------------------------------------------------------------------------------------------------------------------
# Files of tensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass
class Stored:
    """A tensor that still lies in its file: its shape, the function that reads it, and one that reads a few numbers of it.

    `read(pinned=True)` takes memory that a GPU can fetch from by itself, where the file's own numbers are what is read.
    """
    shape: tuple
    read: Callable
    few: Callable = None

    def numbers(self, at):
        """The numbers at the indices `at` (n,) of the flattened tensor, of which no more is read where the file allows it."""
        return self.few(at) if self.few else self.read().flatten()[at]


def weight_files(folder):
    """The files of a folder's weights: safetensors or .bin, in shards or whole; [] without any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, name + ".index.json")
        if os.path.isfile(index):
            shards = sorted(set(field(read_json(index, dict), "weight_map", dict, index, 1).values()))
            absent = [n for n in shards if not os.path.isfile(os.path.join(folder, n))]
            if absent:
                raise InputError(f"{index}: names {', '.join(absent)}, which {folder} does not hold; download the missing shards")
            return [os.path.join(folder, n) for n in shards]
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    return []


def read_tensors(folder):
    """All tensors of a folder's weight files → {our name: Stored}."""
    paths = weight_files(folder)
    if not paths:
        raise InputError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin, with their index if sharded); "
                         "download them")
    return our_names({key: stored for path in paths for key, stored in read_file(path).items()})


def read_file(path):
    """One weight file → {key: Stored}. Nothing is read but the header; a .bin is memory-mapped."""
    return read_safetensors(path) if path.endswith(".safetensors") else read_bin(path)


def read_safetensors(path):
    """The library checks the header; the numbers are read straight into new tensors: no more memory than one of them."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            dtypes = {key: DTYPES[file.get_slice(key).get_dtype()] for key in file.keys()}
    except (SafetensorError, OSError, KeyError) as e:
        raise InputError(f"{path}: not a whole safetensors file of floats ({e}); download it again")
    with open(path, "rb") as file:          # the format: length of the header (8 bytes), header (JSON), numbers
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    def read(key, pinned=False):
        tensor = torch.empty(shapes[key], dtype=dtypes[key], pin_memory=pinned)
        with open(path, "rb", buffering=0) as file:
            file.seek(8 + length + header[key]["data_offsets"][0])
            rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while rest:
                rest = rest[file.readinto(rest):]
        return tensor

    def few(key, at):
        size, begin = dtypes[key].itemsize, 8 + length + header[key]["data_offsets"][0]
        with open(path, "rb", buffering=0) as file:
            found = b"".join(os.pread(file.fileno(), size, begin + size * i) for i in at.tolist())
        return torch.frombuffer(bytearray(found), dtype=dtypes[key])

    return {key: Stored(shape, partial(read, key), partial(few, key)) for key, shape in shapes.items()}


def read_bin(path):
    """A file of torch.save. Unpickling its table is slow, so it is mapped once."""
    mapped = zipfile.is_zipfile(path)       # files older than torch 1.6 are none, and cannot be mapped
    try:
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as e:      # whatever unpickling of a damaged or foreign file may raise
        raise InputError(f"{path}: cannot be read as a file of tensors ({str(e).splitlines()[0]}); download it again")
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]     # open_clip's training checkpoints
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: holds a {type(tensors).__name__} and no tensors by name; name another file")
    strange = next((k for k, v in tensors.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)), None)
    if strange is not None:
        raise InputError(f"{path}: {strange} is no tensor; a weight file holds tensors and nothing else: name another file")

    def read(key, pinned=False):
        tensor = tensors[key]
        copy = torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)
        if mapped:          # its pages are given back; they are the file's, so it can be read again
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - start
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        return copy

    def few(key, at):
        return tensors[key].flatten()[at]

    return {key: Stored(tuple(t.shape), partial(read, key), partial(few, key)) for key, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Names

RENAMES = [  # (prefix of a public key, ours); the first that fits, and a key that none fits has our name already
    ("model.vision_tower.vision_tower.vision_model.", TOWER),   # LLaVA, tower inside the checkpoint
    ("model.vision_tower.vision_tower.", TOWER),                #   the same, saved with transformers 5
    ("model.vision_tower.vision_model.", TOWER),                # transformers 4.52: state_dict() of LlavaForConditionalGeneration
    ("model.vision_tower.", TOWER),                             #   the same in transformers 5
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("language_model.model.", "model."),                        # transformers 4.36 and later: files of save_pretrained
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("mm_projector.", "model.mm_projector."),                   # LLaVA's mm_projector.bin, of some versions
    ("vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),                                   #   save_pretrained of transformers 5
    ("vision_model.", TOWER),                                   # transformers: CLIPModel, CLIPVisionModel before 5
    ("embeddings.", TOWER + "embeddings."),                     # CLIPVisionModel of transformers 5
    ("encoder.", TOWER + "encoder."),
    ("pre_layrnorm.", TOWER + "pre_layrnorm."),
    ("post_layernorm.", TOWER + "post_layernorm."),
]
# What public files hold and no LLaVA reads: CLIP's other half, and RoPE's frequencies, which follow from config.json.
NOT_OURS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def our_name(key):
    key = key.removeprefix("module.").removeprefix("base_model.model.")         # what DDP and peft put in front of a key
    return next((ours + key[len(theirs):] for theirs, ours in RENAMES if key.startswith(theirs)), key)


def our_names(tensors):
    return {our_name(key): value for key, value in tensors.items()
            if not key.startswith(NOT_OURS) and not key.endswith("rotary_emb.inv_freq")}


# ---------------------------------------------------------------------------------------------------------------------
# Settings

BUILT = {  # the only value of a setting that our modules build
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mm_projector_type": "mlp2x_gelu",
    "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "mm_vision_select_feature": "patch",
    "vision_feature_select_strategy": "default", "mm_use_im_start_end": False, "mm_patch_merge_type": "flat"}
# What a config.json means that leaves a setting out: the defaults of transformers, which are not LLaVA-1.5's.
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CLIP_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "image_size": 224, "patch_size": 32}


def pick(cls, values, defaults=None):
    """A config dataclass from those entries of a JSON object that it knows."""
    values = {**(defaults or {}), **{k: v for k, v in values.items() if v is not None}}
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def refuse(values, allowed, path):
    for name, only in allowed.items():
        if values.get(name) not in (None, only):
            raise InputError(f"{path}: {name} is {json.dumps(values[name])} and only {json.dumps(only)} is built here; "
                             "name a LLaVA-1.5 checkpoint")


def llama_config(values, path):
    refuse(values, BUILT, path)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}    # transformers 5, and before
    refuse({"rope_type": rope.get("rope_type", rope.get("type"))}, {"rope_type": "default"}, path)
    if rope.get("rope_theta"):
        values = values | {"rope_theta": rope["rope_theta"]}
    config = pick(LlamaConfig, values, LLAMA_DEFAULTS)
    if values.get("num_key_value_heads") is None:
        config.num_key_value_heads = config.num_attention_heads
    refuse(values, {"head_dim": config.head_dim}, path)
    return config


def clip_config(values, path):
    config = pick(CLIPVisionConfig, values, CLIP_DEFAULTS)
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act of the vision tower is {config.hidden_act!r} and must be one of "
                         f"{', '.join(ACTIVATIONS)}; name a CLIP tower")
    return config


def llava_config(values, path, vision):
    """LLaVA's flat config.json or Hugging Face's nested one → LlavaConfig. `vision`: the tower's CLIPVisionConfig."""
    refuse(values, {k: v for k, v in BUILT.items() if k != "hidden_act"}, path)
    nested = values.get("text_config")
    text = llama_config(values if nested is None else nested, path)
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise InputError(f"{path}: the tower's selected layer is {layer} and must be one of its {vision.num_hidden_layers}; "
                         "name the tower that this model was trained with")
    # Hugging Face's conversion lost LLaVA's image_aspect_ratio, which was "pad" when LLaVA-1.5 was trained.
    pad = values.get("image_aspect_ratio", None if nested is None else "pad") == "pad"
    return LlavaConfig(text, vision, layer, values.get("mm_projector_hidden_size"),
                       values.get("tokenizer_model_max_length") or text.max_position_embeddings, pad)


def image_processor(values, config, path):
    """CLIP's preprocessor_config.json (or {}) → ImageProcessor of a LlavaConfig. PIL's number of bicubic is 3."""
    size = config.vision.image_size
    for name in ("size", "crop_size"):                      # {"shortest_edge": 336}, {"height": 336, "width": 336} or 336
        said = values.get(name) or size
        for edge in said.values() if isinstance(said, dict) else [said]:
            refuse({name: edge}, {name: size}, path)
    refuse(values, {"resample": 3, "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}, path)
    return ImageProcessor(size, tuple(values.get("image_mean") or CLIP_MEAN), tuple(values.get("image_std") or CLIP_STD),
                          config.pad_images)


# ---------------------------------------------------------------------------------------------------------------------
# The vision tower


def read_tower(name):
    """A CLIP folder, or open_clip:MODEL/TAG-OR-FILE → CLIPVisionConfig, {our name: Stored}, preprocessor settings."""
    if name.startswith("open_clip:"):
        return read_open_clip(name)
    path = os.path.join(name, "config.json")
    values = read_json(path, dict)
    tensors = {key: stored for key, stored in read_tensors(name).items() if key.startswith(TOWER)}
    if not tensors:
        raise InputError(f"{name}: holds no CLIP vision tower (vision_model.*); name CLIP's folder with --vision_tower")
    return clip_config(values.get("vision_config") or values, path), tensors, read_preprocessor(name)


def read_preprocessor(folder):
    # The second name is that of transformers 5.
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if os.path.isfile(os.path.join(folder, name)):
            values = read_json(os.path.join(folder, name), dict)
            return values.get(part) or {} if part else values
    return {}


def read_open_clip(name):
    """open_clip:ViT-L-14-336/openai is downloaded by open_clip, open_clip:ViT-L-14-336/path/to/weights is a local file."""
    import open_clip                                        # only here: nothing else needs it
    model, _, weights = name.removeprefix("open_clip:").partition("/")
    sizes, tags = open_clip.get_model_config(model), open_clip.list_pretrained_tags_by_model(model)
    if sizes is None:
        raise InputError(f"{name}: open_clip knows no model {model!r}; write for example open_clip:ViT-L-14-336/openai")
    tag = open_clip.get_pretrained_cfg(model, weights)
    if not tag and not os.path.isfile(weights):
        raise InputError(f"{name}: {weights!r} is neither a file nor one of open_clip's weights for {model} ({', '.join(tags)})")
    # Which GELU is a property of the weights: what the tag says; for a file what the model's name says, or all its tags.
    tagged = [bool(open_clip.get_pretrained_cfg(model, t).get("quick_gelu")) for t in ([weights] if tag else tags)]
    try:
        config = open_clip_config(sizes, bool(tagged) and all(tagged))
    except ValueError as e:
        raise InputError(f"{name}: {e}; name a plain ViT of open_clip")
    if tag:
        try:
            weights = open_clip.download_pretrained(tag)
        except Exception as e:      # whatever a download may raise
            raise InputError(f"{name}: not downloaded ({str(e).splitlines()[0]}); name a file: open_clip:{model}/path/to/weights")
    tensors = {key.removeprefix("module."): stored for key, stored in read_file(weights).items()}

    def third(whole, n):
        shape = (whole.shape[0] // 3, *whole.shape[1:])
        return Stored(shape, lambda pinned=False: whole.read(pinned).chunk(3)[n],
                      lambda at: whole.numbers(n * math.prod(shape) + at))

    return config, from_open_clip(tensors, third), {"image_mean": tag.get("mean"), "image_std": tag.get("std")}


def clip_config_of(tensors):
    """Sizes of a tower that comes without its config.json. Heads are 64 wide in all of OpenAI's CLIP ViTs."""
    shape = {key.removeprefix(TOWER): stored.shape for key, stored in tensors.items()}
    hidden, _, patch, _ = shape["embeddings.patch_embedding.weight"]
    layers = 1 + max(int(key.split(".")[2]) for key in shape if key.startswith("encoder.layers."))
    side = round((shape["embeddings.position_embedding.weight"][0] - 1) ** 0.5)
    inner = shape["encoder.layers.0.mlp.fc1.weight"][0]
    return CLIPVisionConfig(hidden, inner, layers, max(1, hidden // 64), side * patch, patch)


# ---------------------------------------------------------------------------------------------------------------------
# What was trained elsewhere

SEED_FILE = "non_lora_trainables.bin"


def read_seed_file(path, config):
    """The training notes' trained tensors → BlockConfig (or None), {our name: Stored}. `config`: the base's LlavaConfig.

    The file says nothing about itself, so the block follows from its keys and shapes, in the original's form: h added
    once more, LLaMA's heads. The original builds `align` even where nothing reads it, and feeds h to every block, so that
    only the last one counts: what has no effect is left out.
    """
    tensors, prefix = our_names(read_file(path)), "post_interaction_block."
    block = {key.removeprefix(prefix): stored for key, stored in tensors.items() if key.startswith(prefix)}
    if not block:
        return None, tensors
    last = "blocks.{}.".format(max((int(key.split(".")[1]) for key in block if key.startswith("blocks.")), default=0))
    attention = next((kind for kind in ("cross", "self") if f"{last}{kind}_attn.q_proj.weight" in block), "none")
    if f"{last}mlp.fc1.weight" not in block:
        raise InputError(f"{path}: {prefix}{last}mlp.fc1.weight is missing; this is not a whole post-interaction block")
    width = block["align.fc1.weight"].shape[1] if "align.fc1.weight" in block else config.vision.hidden_size
    sources = {config.text.hidden_size: "projector", config.vision.hidden_size: "clip"}      # the same width: clip
    if width not in sources:
        raise InputError(f"{path}: align reads features of width {width}; this base has {config.vision.hidden_size} (CLIP) and "
                         f"{config.text.hidden_size} (projector): name the base that it was trained on with --model_name_or_path")
    changes = dict(attention=attention, outer_residual=True, image_source=sources[width], zero_init=False,
                   intermediate_size=block[f"{last}mlp.fc1.weight"].shape[0],
                   align="linear" if "align.fc1.weight" in block and "align.fc2.weight" not in block else "mlp")
    parts = (last, "align.", "image_norm.") if attention == "cross" else (last,)
    block = {prefix + key.replace(last, "blocks.0."): stored for key, stored in block.items() if key.startswith(parts)}
    return config.block(**changes), block | {key: stored for key, stored in tensors.items() if not key.startswith(prefix)}


def merge_lora(tensors, folder, dtype=None):
    """{our name: Stored} with peft's LoRA adapter of `folder` merged in: W + alpha / r · B A, in fp32, rounded once.

    `dtype` is the one that the tensors will have; None keeps W's. peft's other inventions are refused by name.
    """
    path = os.path.join(folder, "adapter_config.json")
    values = read_json(path, dict)
    rank, alpha = (field(values, name, (int, float), path, 1) for name in ("r", "lora_alpha"))
    refuse(values, {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}, path)
    for name in ("rank_pattern", "alpha_pattern"):
        refuse({name: values.get(name) or None}, {name: None}, path)
    files = [os.path.join(folder, name) for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((f for f in files if os.path.isfile(f)), None)
    if file is None:
        raise InputError(f"{folder}: holds neither adapter_model.safetensors nor adapter_model.bin; copy them there")
    lora = our_names(read_file(file))
    targets = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}
    strange = sorted([key for key in lora if key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") not in targets]
                     + [target for target in targets if target + ".weight" not in tensors])
    if strange:
        raise InputError(f"{file}: {strange[0]} ({len(strange)} such keys) is no LoRA of a tensor of this base; "
                         "name the adapter's own base")
    if not targets:
        raise InputError(f"{file}: holds no LoRA weights, so its saving went wrong; save it again")

    def merged(whole, a, b, pinned=False):
        weight = whole.read(pinned)
        return (weight.float() + alpha / rank * (b.read().float() @ a.read().float())).to(dtype or weight.dtype)

    result = dict(tensors)
    for target in targets:
        whole, a, b = tensors[target + ".weight"], lora[target + ".lora_A.weight"], lora.get(target + ".lora_B.weight")
        if b is None or (b.shape[0], a.shape[1]) != whole.shape or (a.shape[0], b.shape[1]) != (rank, rank):
            raise InputError(f"{file}: lora_A and lora_B of {target} have shapes {a.shape} and {b and b.shape}, which is "
                             f"no change of rank {rank} to {whole.shape}; name the adapter's own base, or save it again")
        result[target + ".weight"] = Stored(whole.shape, partial(merged, whole, a, b))
    return result
