"""Files: what a checkpoint looks like on disk, and how its tensors reach the modules of model.py.

    trunk, head, tokenizer, preprocess = load_base("llava-v1.5-7b", vision_tower="clip-vit-large-patch14-336")
    head = load_trained("out/stage2", trunk.config, head, fingerprint(trunk, head))     # the base's head, with what was trained
    save_trained("out/stage2", {name: tensor}, info, tokenizer)

A base is a folder in LLaVA's layout (`config.json`, weights as safetensors or .bin, `tokenizer.model`) with its CLIP
tower in a folder of its own. A trained checkpoint is a folder with `config.json` (what it is, its base and that base's
fingerprint), `trained.safetensors` (only what was trained) and `tokenizer.model`. Layouts are recognised by content.

Modules are made on the meta device and filled tensor by tensor from memory-mapped files, so that loading needs about
one tensor of extra RAM. A missing or unexpected key is an error that lists it.
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip_vit import CLIPVisionConfig
from data import ImageProcessor, InputError, Tokenizer, read_json
from llama import LlamaConfig
from model import Head, LlavaConfig, Trunk
from post_decoder import BlockConfig

OURS = "nanohadpo"        # config.json's model_type of a trained checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def read_tensors(folder):
    """All tensors of a folder's weight files → {key: function that reads it}. Safetensors or .bin, sharded or not."""
    for stem, single in (("model.safetensors", "model.safetensors"), ("pytorch_model.bin", "pytorch_model.bin")):
        index = os.path.join(folder, stem + ".index.json")
        if os.path.isfile(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
            absent = [n for n in names if not os.path.isfile(os.path.join(folder, n))]
            if absent:
                raise InputError(f"{index}: names {', '.join(absent)}, which {folder} does not hold; download the missing shards")
            return {key: get for name in names for key, get in read_file(os.path.join(folder, name)).items()}
        if os.path.isfile(os.path.join(folder, single)):
            return read_file(os.path.join(folder, single))
    raise InputError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin, with their index if sharded)")


def read_file(path):
    """One weight file → {key: function that reads the tensor}. Nothing is read but the header (.bin: memory-mapped)."""
    if path.endswith(".safetensors"):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: not a whole safetensors file ({e}); download it again")
        return {key: (lambda key=key: file.get_tensor(key)) for key in file.keys()}
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:      # whatever unpickling of a damaged or foreign file may raise
        raise InputError(f"{path}: cannot be read as a file of tensors ({str(e).splitlines()[0]}); download it again")
    if not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{path}: holds something else than tensors; it is not a weight file")
    return {key: (lambda t=t: t) for key, t in tensors.items()}


def fill(module, tensors, source, dtype=None, device="cpu"):
    """Give `module` (on the meta device) its parameters from {key: function}. InputError lists what does not fit."""
    own = dict(module.state_dict())
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise InputError(f"{source}: does not fit this model; missing keys: {missing[:5] or 'none'} ({len(missing)}), "
                         f"unexpected keys: {unexpected[:5] or 'none'} ({len(unexpected)})")
    for key, parameter in own.items():
        tensor = tensors[key]()
        if tensor.shape != parameter.shape:
            raise InputError(f"{source}: {key} has shape {tuple(tensor.shape)} and config.json makes it {tuple(parameter.shape)}")
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {key} holds NaN or infinity; the file is damaged or its training diverged")
        module.load_state_dict({key: tensor}, strict=False, assign=True)
    return module.requires_grad_(False)


def fingerprint(trunk, head):
    """Sixteen hex digits of names, shapes and 64 sampled values of every tensor: which base this is, in any dtype ≥ bf16."""
    digest = hashlib.sha256()
    for module in (trunk, head.lm_head):
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.flatten()
            at = torch.arange(64, device=flat.device) * (len(flat) - 1) // 63      # whole numbers: fp32 cannot count past 2^24
            sample = flat[at].to(torch.bfloat16).float()
            digest.update(f"{key}{tuple(tensor.shape)}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Bases


def pick(cls, values):
    """A config dataclass from those entries of a JSON object that it knows."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})


def tower_folder(folder, config, vision_tower):
    """Where the CLIP tower of a base lies: as named by the user, else by config.json, as it stands or inside `folder`."""
    name = vision_tower or config.get("mm_vision_tower")
    if name is None:
        raise InputError(f"{folder}/config.json: names no mm_vision_tower; name CLIP's folder with --vision_tower")
    for path in (name, os.path.join(folder, name)):
        if os.path.isdir(path):
            return path
    raise InputError(f"vision tower {name}: no such folder; name CLIP's folder (config.json and weights) with --vision_tower")


def read_config(folder):
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; a local path is meant (nothing is downloaded)")
    return read_json(path)


def load_base(folder, vision_tower=None, dtype=None, device="cpu"):
    """A base in LLaVA's layout → Trunk, Head (no block), Tokenizer, ImageProcessor, everything frozen.

    dtype None keeps that of the files. Raises InputError naming the file and the cure.
    """
    values = read_config(folder)
    vision_folder = tower_folder(folder, values, vision_tower)
    vision = read_config(vision_folder)
    text = pick(LlamaConfig, values)
    config = LlavaConfig(text, pick(CLIPVisionConfig, vision.get("vision_config", vision)),
                         select_layer=values.get("mm_vision_select_layer", -2),
                         projector_hidden_size=values.get("mm_projector_hidden_size"),
                         max_length=values.get("tokenizer_model_max_length", text.max_position_embeddings),
                         pad_images=values.get("image_aspect_ratio") == "pad")
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.model"))
    if len(tokenizer) > config.text.vocab_size:
        raise InputError(f"{tokenizer.path}: has {len(tokenizer)} pieces, the model only {config.text.vocab_size} embeddings")
    with torch.device("meta"):
        trunk, head = Trunk(config), Head(config)
    tensors = {key: get for key, get in read_tensors(folder).items() if not key.endswith("rotary_emb.inv_freq")}
    clip = {key: get for key, get in read_tensors(vision_folder).items() if not trunk.vision_tower.unused_key(key)}
    fill(head, {k: tensors.pop(k) for k in list(tensors) if k.startswith("lm_head.")}, folder, dtype, device)
    fill(trunk.vision_tower, clip, vision_folder, dtype, device)
    fill(trunk.model, {k.removeprefix("model."): get for k, get in tensors.items()}, folder, dtype, device)
    preprocess = ImageProcessor(config.vision.image_size, pad=config.pad_images)
    return trunk, head, tokenizer, preprocess


def save_base(folder, trunk, head, tokenizer, tensors=None):
    """Write a whole model in LLaVA's layout, the tower in `vision_tower/`. Atomic.

    `tensors` {public name: tensor} stand in for the modules' own, which under ZeRO-3 are in pieces.
    """
    tensors = tensors or dict(trunk.state_dict()) | dict(head.state_dict())
    tower = {k.removeprefix("vision_tower."): v.contiguous() for k, v in tensors.items() if k.startswith("vision_tower.")}
    rest = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("vision_tower.")}
    config, partial = trunk.config, folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "vision_tower"))
    values = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **asdict(config.text),
              "mm_vision_tower": "vision_tower", "mm_hidden_size": config.vision.hidden_size,
              "mm_projector_type": "mlp2x_gelu", "mm_projector_hidden_size": config.projector_hidden_size,
              "mm_vision_select_layer": config.select_layer, "mm_vision_select_feature": "patch",
              "image_aspect_ratio": "pad" if config.pad_images else "square",
              "tokenizer_model_max_length": config.max_length}
    write_json(os.path.join(partial, "config.json"), values)
    write_json(os.path.join(partial, "vision_tower", "config.json"), {"model_type": "clip_vision_model", **asdict(config.vision)})
    save_file(rest, os.path.join(partial, "model.safetensors"), {"format": "pt"})
    save_file(tower, os.path.join(partial, "vision_tower", "model.safetensors"), {"format": "pt"})
    shutil.copyfile(tokenizer.path, os.path.join(partial, "tokenizer.model"))
    put_in_place(partial, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Trained checkpoints


def is_trained(folder):
    """Whether a folder is a trained checkpoint of ours, not a base: by content."""
    return read_config(folder).get("model_type") == OURS


def save_trained(folder, tensors, info, tokenizer):
    """Write a trained checkpoint, read it back and put it in its place. `tensors`: {public name: tensor}."""
    partial = folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    path = os.path.join(partial, "trained.safetensors")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    again = read_file(path)
    bad = [k for k, v in tensors.items() if k not in again or again[k]().shape != v.shape or (v != 0).any() and not again[k]().any()]
    if bad or not tensors:
        raise RuntimeError(f"{path}: what was written is not what was trained ({bad or 'nothing was trained'})")
    write_json(os.path.join(partial, "config.json"), {"model_type": OURS, **info})
    shutil.copyfile(tokenizer.path, os.path.join(partial, "tokenizer.model"))
    put_in_place(partial, folder)


def load_trained(folder, config, base_head, base_fingerprint, dtype=None, device="cpu"):
    """A trained checkpoint over its base → Head. Parts that were not trained are the base's own tensors, shared."""
    info = read_config(folder)
    if info.get("fingerprint") != base_fingerprint:
        raise InputError(f"{folder}: was trained on base {info.get('base')} (fingerprint {info.get('fingerprint')}), which is not "
                         f"the base given here ({base_fingerprint}); name the right one with --model_name_or_path")
    with torch.device("meta"):
        head = Head(config, BlockConfig(**info["block"]) if info.get("block") else None)
    tensors = read_file(os.path.join(folder, "trained.safetensors"))
    base = {f"lm_head.{k}": (lambda t=t: t) for k, t in base_head.lm_head.state_dict().items()}
    fill(head, base | tensors, folder, dtype, device)
    if "lm_head.weight" not in tensors:
        head.lm_head = base_head.lm_head
    return head


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def put_in_place(partial, folder):
    """Rename a finished folder to its name, replacing an older one; at no moment is there a half-written one."""
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
