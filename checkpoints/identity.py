"""What a run or a checkpoint is made from: one identity, which everything compares.

    model.fingerprint = fingerprint(trunk, head, preprocess)    # a base: its weights and settings
    run.identity = identity_of(model, head, examples)           # the base, the first head, the data
    differences(before, run.identity)           # ["rope_theta of the base was 10000.0 and is 5e5"]
    refuse_other_base("out/stage2", info, model)                # InputError that names what differs

A trained checkpoint and an adapter keep the identity of their run in config.json, `--resume` in
run.json (training/resume.py). Kept features are named by parts of it (training/features.py).
"""
import hashlib
import json
import os
from dataclasses import asdict

import torch

from checkpoints.layouts import typed
from data import ImageProcessor
from support.anyres import tile_grid
from support.common import InputError, file_digest

# These only limit how long a row may be, so a checkpoint fits a base with another value.
LENGTHS = ("max_position_embeddings", "max_length")
# These are newer than some fingerprints, and count only where they are not this.
NEWER = {"num_voco": 0, "projector_depth": 2, "template": "v1", "image_start_end": False,
         "pinpoints": None, "preprocess.grid": None}


# ---- A base --------------------------------------------------------------------------------------


def settings_of(config, block_config=None, preprocess=None):
    """Every setting of a base that changes its numbers → {name: JSON value}.

    `config`: LlavaConfig. `block_config`: of the base's own block. `preprocess`: None means CLIP's.
    """
    preprocess = preprocess or ImageProcessor(config.vision.image_size, pad=config.pad_images,
                                              grid=tile_grid(config.pinpoints, config.vision))
    named = {"vision": config.vision, "preprocess": preprocess}
    if block_config:
        named["block"] = block_config
    settings = asdict(config.text) | {
        name: value for name, value in vars(config).items()
        if name not in ("text", "vision", "bits")}
    for part, values in named.items():
        settings |= {f"{part}.{name}": value for name, value in asdict(values).items()}
    settings = {name: value for name, value in settings.items()
                if name not in LENGTHS and (name not in NEWER or value != NEWER[name])}
    return json.loads(json.dumps(settings))                 # as a file gives them back


def fingerprint(trunk, head, preprocess=None):
    """Which base this is, the same in bf16 and in fp32: "WEIGHTS-SETTINGS", 16 and 8 hex digits.

    WEIGHTS follow from names, shapes and 64 values of every tensor. If a tensor is still in its
    file, only these values are read.
    """
    digest = hashlib.sha256()
    block = [head.post_interaction_block] if head.block_config else []
    for module in (trunk, head.lm_head, *block):
        for key, parameter in sorted(module.state_dict(keep_vars=True).items()):
            # Whole numbers, not torch.linspace: fp32 cannot count past 2^24.
            at = torch.arange(64) * (parameter.numel() - 1) // 63
            if parameter.is_meta:
                sample = parameter.in_file[0].values_at(at)
            else:
                sample = parameter.detach().flatten()[at.to(parameter.device)].cpu()
            values = sample.to(torch.bfloat16).float().numpy().tobytes()
            digest.update(f"{key}{tuple(parameter.shape)}".encode() + values)
    config = getattr(trunk, "config", None)                 # a bare module has no settings
    settings = config and settings_of(config, head.block_config, preprocess)
    text = json.dumps(settings, sort_keys=True)
    return f"{digest.hexdigest()[:16]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def base_of_model(model):
    """The identity of a Llava's base."""
    settings = settings_of(model.config, model.head.block_config, model.preprocess)
    return {"base": model.fingerprint, "settings": settings}


# ---- A run ---------------------------------------------------------------------------------------


def data_digest(examples, tokenizer):
    """A digest of the rows and of the tokenizer that reads them. Images count by their paths.

    `examples`: a list of Example, or a sequence that stays on disk and has `paths` and an
    `image_folder`.
    """
    digest = hashlib.sha256(file_digest(tokenizer.path).encode())
    if isinstance(examples, list):
        for example in examples:
            digest.update(f"{example.image}{example.conversations}".encode())
    else:
        files = "".join(map(file_digest, examples.paths))
        digest.update(f"{files}{examples.image_folder}".encode())
    return digest.hexdigest()


def head_digest(head):
    """A digest of all values of a head."""
    digest = hashlib.sha256()
    for key, tensor in sorted(head.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def identity_of(model, head, examples):
    """What a run is made from → {name: JSON value}. `head`: the one that it starts from."""
    return base_of_model(model) | {"initial head": head_digest(head), "bits": model.config.bits,
                                   "data": data_digest(examples, model.tokenizer)}


# ---- Comparing -----------------------------------------------------------------------------------


def told_identity(values, path):
    """The identity that a file's `values` tell of; {} without one. InputError if it is none."""
    identity = typed(values, "identity", dict, path) or {}
    kinds = {"base": str, "settings": dict, "initial head": str, "data": str, "bits": int}
    for name, kind in kinds.items():
        typed(identity, name, kind, path)
    return identity


def differences(before, now):
    """What is another in two identities, in words. Only what `now` has is compared."""
    found, base, settings = [], before.get("base") or "", now["settings"]
    if base.partition("-")[0] != now["base"].partition("-")[0]:
        found.append("the base's weights are others")
    # A setting that only one of them tells of is newer than the other.
    told = before.get("settings") or {}
    found += [f"{name} of the base was {told[name]} and is {settings[name]}"
              for name in settings if name in told and told[name] != settings[name]]
    # A fingerprint of an earlier version has no second half.
    if not told and "-" in base and base != now["base"] and not found:
        found.append("the base's settings are others")
    if before.get("bits", 16) != now.get("bits", before.get("bits", 16)):
        found.append(f"LLaMA's linears were held in {before.get('bits', 16)} bits and are in "
                     f"{now['bits']}")
    words = {"initial head": "the head that it starts from is another",
             "data": "the data are others"}
    for name, text in words.items():
        if name in now and before.get(name) != now[name]:
            found.append(text if before.get(name) else f"nothing is noted of its {name}")
    return found


def refuse_other_base(path, info, model):
    """InputError if a checkpoint or an adapter was not trained on this base.

    `info`: its config.json. `model`: the base, a Llava.
    """
    file = os.path.join(path, "config.json")
    told = told_identity(info, file) | {"base": typed(info, "fingerprint", str, file)}
    changed = differences(told, base_of_model(model))
    tokenizer = os.path.join(path, "tokenizer.model")
    if os.path.isfile(tokenizer) and file_digest(tokenizer) != file_digest(model.tokenizer.path):
        changed.append("tokenizer.model is another")
    if changed:
        raise InputError(f"{path}: was trained on base {info.get('base')} (fingerprint "
                         f"{told['base']}), which is not the base given here "
                         f"({model.fingerprint}): {'; '.join(changed)}; name the right one with "
                         "--model_name_or_path")
