"""Files: what a checkpoint looks like on disk, and how its tensors reach the modules of model.py.

    trunk, head, tokenizer, preprocess = load_base("llava-v1.5-7b", vision_tower="clip-vit-large-patch14-336")
    head = load_trained("out/stage2", trunk.config, head, fingerprint(trunk, head))     # the base's head, with what was trained
    save_trained("out/stage2", {name: tensor}, info, tokenizer)

    python checkpoint.py out/stage2 whole          # write base and checkpoint as one model, which is a base again
    python checkpoint.py non_lora_trainables.bin whole --model_name_or_path llava-v1.5-7b

A base is a whole model, in LLaVA's layout or Hugging Face's; what of it is called how is told in layouts.py. A trained
checkpoint is a folder with `config.json` (what it is, its base and that base's fingerprint), `trained.safetensors` (only
what was trained) and `tokenizer.model`, or the training notes' `non_lora_trainables.bin`. A base with one of peft's LoRA
adapters is another base; ours are in peft's layout too (`adapter_config.json`, `adapter_model.safetensors`, which peft
loads), beside `config.json` and what of the head was trained. Which of these a folder is follows from what it holds.

Modules are made on the meta device and filled tensor by tensor, so that loading needs about one tensor of extra RAM (on a
GPU eight, read by as many threads). Names and shapes are compared before anything is read; what does not fit is listed. A
trunk whose outputs are kept (features.py) stays in its files: `load_base(..., read_trunk=False)`, and `fill(trunk)` if it is
needed after all.
"""
import argparse
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from safetensors.torch import save_file
from torch import nn

from clip_vit import TOWER
from data import Tokenizer
from layouts import (SEED_FILE, Stored, clip_config, clip_config_of, image_processor, llava_config, merge_lora, our_names,
                     read_file, read_preprocessor, read_seed_file, read_tensors, read_tower, weight_files)
from lora import LINEARS
from model import Head, Trunk
from post_decoder import BlockConfig
from readers import InputError, progress, read_json, run_program

OURS, TRAINED_FILE = "nanohadpo", "trained.safetensors"       # config.json's model_type of a trained checkpoint, and its tensors


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def fit(module, tensors, source, dtype=None, device="cpu"):
    """Tell the parameters of `module` (on the meta device) where in files they lie: {key: Stored}. Nothing is read.

    InputError unless these are exactly its parameters. `dtype` and `device` are those that `fill` will give it.
    """
    own = {key: tuple(parameter.shape) for key, parameter in module.state_dict().items()}
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise InputError(f"{source}: does not fit this model; missing keys: {missing[:5] or 'none'} ({len(missing)}), "
                         f"unexpected keys: {unexpected[:5] or 'none'} ({len(unexpected)}); is it whole, and of this base?")
    for key, shape in own.items():
        if tensors[key].shape != shape:
            raise InputError(f"{source}: {key} has shape {tensors[key].shape} and config.json makes it {shape}; "
                             "its weights belong to another model")
    for key, parameter in module.to(dtype=dtype).state_dict(keep_vars=True).items():
        parameter.lies_in = tensors[key], source, dtype, device


def fill(module):
    """Read those parameters of `module` that are still in their files, frozen. InputError where one holds NaN."""
    waiting = {key: p.lies_in for key, p in module.state_dict(keep_vars=True).items() if p.is_meta}
    on_gpu = any(torch.device(device).type == "cuda" for *_, device in waiting.values())

    def read(place):
        stored, _, dtype, device = place
        tensor = stored.read(on_gpu).to(device, non_blocking=on_gpu)
        return tensor.to(dtype or tensor.dtype)

    # A GPU takes tensors faster than one core reads them. In a CPU's memory each more at a time is memory beyond the model.
    with ThreadPoolExecutor(8 if on_gpu else 1) as pool:
        tensors = progress(pool.map(read, waiting.values()), "reading weights", len(waiting), unit="tensor")
        for (key, (_, source, _, _)), tensor in zip(waiting.items(), tensors):
            if not all(x.isfinite() for x in tensor.aminmax()):     # 40 times as fast as tensor.isfinite().all()
                pool.shutdown(cancel_futures=True)
                raise InputError(f"{source}: {key} holds NaN or infinity; it is damaged or its training diverged: take another")
            owner, _, name = key.rpartition(".")
            setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))
    return module


def write_tensors(path, tensors):
    """Write {key: tensor}, open the file again and compare: no key is lost, nothing is empty."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    again = read_file(path)
    bad = [k for k, v in tensors.items() if k not in again or not torch.equal(again[k].read(), v)]
    if bad or not tensors:
        raise RuntimeError(f"{path}: what was written is not what was to be written, or holds NaN ({bad[:5] or 'nothing'})")


def fingerprint(trunk, head):
    """Sixteen hex digits of names, shapes and 64 sampled values of every tensor: which base this is, in any dtype ≥ bf16.

    Of tensors that are still in their files only these values are read.
    """
    digest = hashlib.sha256()
    for module in (trunk, head.lm_head, *([head.post_interaction_block] if head.block else [])):
        for key, parameter in sorted(module.state_dict(keep_vars=True).items()):
            at = torch.arange(64) * (parameter.numel() - 1) // 63              # whole numbers: fp32 cannot count past 2^24
            if parameter.is_meta:
                sample = parameter.lies_in[0].numbers(at)
            else:
                sample = parameter.detach().flatten()[at.to(parameter.device)].cpu()
            digest.update(f"{key}{tuple(parameter.shape)}".encode() + sample.to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Bases


def holds_model(path):
    """Whether a folder is one of those that `kind` tells apart; also True where there is none, of which `kind` complains."""
    names = ("config.json", "adapter_config.json", SEED_FILE)
    return not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in names)


def kind(path):
    """What a path holds: "trained" (ours), "seed" (the notes' trained file), "adapter" (peft's LoRA) or "base"."""
    if os.path.isfile(path):
        return "seed"
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        return "adapter"
    if os.path.isfile(os.path.join(path, SEED_FILE)) and not weight_files(path):
        return "seed"
    return "trained" if read_config(path).get("model_type") == OURS else "base"


def read_config(folder):
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; a local path is meant (nothing is downloaded)")
    return read_json(os.path.join(folder, "config.json"), dict)


def find_tower(folder, values, inside, vision_tower):
    """The tower of a base, whose own tensors of one are `inside` → CLIPVisionConfig, {our name: Stored}, preprocessor, source.

    A tower inside the base is the one that it was trained with. Else it is the one that the user or config.json names.
    """
    path = os.path.join(folder, "config.json")
    if values.get("vision_config"):
        return clip_config(values["vision_config"], path), inside, read_preprocessor(folder), folder
    name = vision_tower or values.get("mm_vision_tower")
    found = next((p for p in (name, os.path.join(folder, name)) if os.path.isdir(p)), None) if name else None
    if inside and found is None and not vision_tower:
        return clip_config_of(inside), inside, read_preprocessor(folder), folder
    if name is None:
        raise InputError(f"{path}: names no mm_vision_tower; name CLIP's folder with --vision_tower")
    if found is None and not name.startswith("open_clip:"):
        raise InputError(f"vision tower {name}: no such folder; name CLIP's folder (config.json and weights) with --vision_tower")
    vision, tensors, processor = read_tower(found or name)
    return vision, inside or tensors, processor, folder if inside else found or name


def load_base(folder, vision_tower=None, dtype=None, device="cpu", adapter=None, read_trunk=True):
    """A base, with a LoRA adapter if one is named → Trunk, Head, Tokenizer, ImageProcessor, everything frozen.

    dtype None keeps that of the files. A trunk that is not read is on the meta device, and can be `fill`ed later.
    Raises InputError naming the file and the cure, most of them before weights are read.
    """
    values, tensors = read_config(folder), read_tensors(folder)
    projector = os.path.join(folder, "mm_projector.bin")
    if os.path.isfile(projector) and not any(key.startswith("model.mm_projector.") for key in tensors):
        tensors |= our_names(read_file(projector))
    inside = {key: stored for key, stored in tensors.items() if key.startswith(TOWER)}
    vision, tower, processor, tower_source = find_tower(folder, values, inside, vision_tower)
    config = llava_config(values, os.path.join(folder, "config.json"), vision)
    block = BlockConfig(**values["post_interaction_block"]) if values.get("post_interaction_block") else None
    if values.get("tie_word_embeddings") or (values.get("text_config") or {}).get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors |= tower
    if adapter:
        tensors = merge_lora(tensors, adapter, dtype)
        if os.path.isfile(os.path.join(adapter, SEED_FILE)):        # what was trained beside the adapter
            other, trained = read_seed_file(os.path.join(adapter, SEED_FILE), config)
            block, tensors = other or block, tensors | trained
        elif os.path.isfile(os.path.join(adapter, TRAINED_FILE)):
            block, trained = read_trained(adapter)
            tensors |= trained
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.model"))
    if len(tokenizer) > config.text.vocab_size:
        raise InputError(f"{tokenizer.path}: has {len(tokenizer)} pieces, the model only {config.text.vocab_size} embeddings; "
                         "copy the tokenizer.model that belongs to this model")
    preprocess = image_processor(processor, config, tower_source)
    with torch.device("meta"):
        trunk, head = Trunk(config), Head(config, block)
    parts = [(head, {}, folder), (trunk.vision_tower, {}, tower_source), (trunk.model, {}, folder)]
    for key, stored in tensors.items():
        if key.startswith(("lm_head.", "post_interaction_block.")):
            parts[0][1][key] = stored
        elif not key.startswith(TOWER):
            parts[2][1][key.removeprefix("model.")] = stored
        elif not trunk.vision_tower.unused_key(key):
            parts[1][1][key.removeprefix("vision_tower.")] = stored
    for part in parts:
        fit(*part, dtype, device)
    for module in (head, trunk) if read_trunk else (head,):
        fill(module)
    return trunk, head, tokenizer, preprocess


def save_base(folder, trunk, head, tokenizer, tensors=None, preprocess=None, arguments=None):
    """Write a whole model in LLaVA's layout, the tower in `vision_tower/`. Atomic.

    `tensors` {public name: tensor} stand in for the modules' own, which under ZeRO-3 are in pieces. A post-interaction
    block, which LLaVA's layout does not know, is told in config.json under its own name, and so are `arguments` of a run.
    """
    tensors = tensors or dict(trunk.state_dict()) | dict(head.state_dict())
    tower = {k.removeprefix("vision_tower."): v for k, v in tensors.items() if k.startswith("vision_tower.")}
    rest = {k: v for k, v in tensors.items() if not k.startswith("vision_tower.")}
    config, partial = trunk.config, folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "vision_tower"))
    values = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **asdict(config.text),
              "mm_vision_tower": "vision_tower", "mm_hidden_size": config.vision.hidden_size,
              "mm_projector_type": "mlp2x_gelu", "mm_projector_hidden_size": config.projector_hidden_size,
              "mm_vision_select_layer": config.select_layer, "mm_vision_select_feature": "patch",
              "image_aspect_ratio": "pad" if config.pad_images else "square",
              "tokenizer_model_max_length": config.max_length}
    if head.block:
        values["post_interaction_block"] = asdict(head.block)
    if arguments:
        values["arguments"] = arguments
    write_json(os.path.join(partial, "config.json"), values)
    write_json(os.path.join(partial, "vision_tower", "config.json"), {"model_type": "clip_vision_model", **asdict(config.vision)})
    if preprocess:
        size, settings = preprocess.size, {"image_mean": preprocess.mean, "image_std": preprocess.std}
        write_json(os.path.join(partial, "vision_tower", "preprocessor_config.json"), settings | {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_normalize": True})
    write_tensors(os.path.join(partial, "model.safetensors"), rest)
    write_tensors(os.path.join(partial, "vision_tower", "model.safetensors"), tower)
    shutil.copyfile(tokenizer.path, os.path.join(partial, "tokenizer.model"))
    put_in_place(partial, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Trained checkpoints


def is_trained(path):
    """Whether a path holds what was trained on top of a base, not a base: by content."""
    return kind(path) in ("trained", "seed")


def base_of(path, named=None):
    """The base that a checkpoint belongs to: as the user names it, else as the checkpoint does."""
    what = kind(path)
    if what == "base" or named:
        return path if what == "base" else named
    name = {"trained": ("config.json", "base"), "adapter": ("adapter_config.json", "base_model_name_or_path")}.get(what)
    base = name and read_json(os.path.join(path, name[0]), dict).get(name[1])
    if not base or what == "adapter" and not os.path.isdir(base):       # peft writes names of the hub, too
        raise InputError(f"{path}: does not say which base it belongs to{f' ({base} is no folder here)' if base else ''}; name it "
                         "with --model_name_or_path")
    return base


def tower_of(path, named=None):
    """The vision tower to load with a checkpoint: as the user names it, else as one of ours does, else None."""
    config = os.path.join(path, "config.json")
    values = read_json(config, dict) if os.path.isfile(config) else {}
    return named or (values.get("vision_tower") if values.get("model_type") == OURS else None)


def adapter_config(info):
    """What peft wants to know of an adapter. The pattern keeps it to LLaMA: CLIP's linears have the same names."""
    r, alpha, dropout = (info["arguments"][f"lora_{name}"] for name in ("r", "alpha", "dropout"))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": info["base"], "inference_mode": True,
            "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
            "target_modules": rf"model\.layers\.\d+\.\w+\.({'|'.join(LINEARS)})"}


def save_trained(folder, tensors, info, tokenizer):
    """Write a trained checkpoint and put it in its place. `tensors`: {public name: tensor}."""
    partial = folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    lora = {"base_model.model." + k: v for k, v in tensors.items() if ".lora_" in k}            # the names that peft gives
    head = {k: v for k, v in tensors.items() if ".lora_" not in k}
    if not tensors:
        raise RuntimeError(f"{folder}: nothing was trained")
    for name, part in ((TRAINED_FILE, head), ("adapter_model.safetensors", lora)):
        if part:
            write_tensors(os.path.join(partial, name), part)
    if lora:
        write_json(os.path.join(partial, "adapter_config.json"), adapter_config(info))
    write_json(os.path.join(partial, "config.json"), {"model_type": OURS, **info})
    shutil.copyfile(tokenizer.path, os.path.join(partial, "tokenizer.model"))
    put_in_place(partial, folder)


def read_trained(folder):
    """A trained checkpoint's head → BlockConfig (or None), {our name: Stored}."""
    block = read_config(folder).get("block")
    return BlockConfig(**block) if block else None, read_file(os.path.join(folder, TRAINED_FILE))


def load_trained(path, config, base_head, base_fingerprint, dtype=None, device="cpu"):
    """A trained checkpoint over its base → Head. Parts that were not trained are the base's own tensors, shared."""
    if kind(path) == "seed":
        block, tensors = read_seed_file(os.path.join(path, SEED_FILE) if os.path.isdir(path) else path, config)
    else:
        info = read_config(path)
        if info.get("fingerprint") != base_fingerprint:
            raise InputError(f"{path}: was trained on base {info.get('base')} (fingerprint {info.get('fingerprint')}), which is "
                             f"not the base given here ({base_fingerprint}); name the right one with --model_name_or_path")
        block, tensors = read_trained(path)
    with torch.device("meta"):
        head = Head(config, block)
    weight = base_head.lm_head.weight
    fit(head, {"lm_head.weight": Stored(tuple(weight.shape), lambda pinned=False: weight)} | tensors, path, dtype, device)
    fill(head)
    if "lm_head.weight" not in tensors:
        head.lm_head = base_head.lm_head
    return head


def write_json(path, value):
    """Whole or not at all, whichever process writes it and whenever it is killed."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.replace(partial, path)


def put_in_place(partial, folder):
    """Rename a finished folder to its name, replacing an older one; at no moment is there a half-written one."""
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description="Write a checkpoint and its base as one whole model, in LLaVA's layout.")
    parser.add_argument("checkpoint", metavar="CKPT", help="trained checkpoint, LoRA adapter, or a base in any layout")
    parser.add_argument("output", metavar="OUT", help="folder to write; must not exist yet")
    parser.add_argument("--model_name_or_path", help="the base, where CKPT does not name it")
    parser.add_argument("--vision_tower", help="CLIP's folder, where neither base nor checkpoint names one that is there")
    args = parser.parse_args()
    if os.path.exists(args.output):
        raise InputError(f"{args.output}: exists already; name a new folder")
    what, base = kind(args.checkpoint), base_of(args.checkpoint, args.model_name_or_path)
    trunk, head, tokenizer, preprocess = load_base(base, tower_of(args.checkpoint, args.vision_tower),
                                                   adapter=args.checkpoint if what == "adapter" else None)
    if what in ("trained", "seed"):
        head = load_trained(args.checkpoint, trunk.config, head, fingerprint(trunk, head))
    save_base(args.output, trunk, head, tokenizer, preprocess=preprocess)
    print(f"{args.output}: {base}" + (f" with {args.checkpoint}" if what != "base" else "") + ", a base of its own")


if __name__ == "__main__":
    run_program(main)
