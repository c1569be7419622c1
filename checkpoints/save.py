"""From modules to files: a whole model in LLaVA's layout, or only what was trained.

    save_base("whole", model)                                       # a base again
    save_trained("out/stage2", {name: tensor}, info, tokenizer)     # `info`: for its config.json

A folder appears under its name only when it is whole, and the one before is kept
(support/folders.py). Each file of tensors is read again and compared with what was to be written.
"""
import os
import shutil
from dataclasses import asdict

from checkpoints.card import refuse_other_readme, write_card
from checkpoints.hub import is_name
from checkpoints.layouts import OURS, TRAINED_FILE
from checkpoints.quantised import QUANTISATION, whole_tensors
from checkpoints.versions import version_settings
from llama import LINEARS
from support.common import InputError, read_json, say, write_json
from support.folders import check_output, old_name, replace_folder
from support.tensors import write_tensors

# What may lie in a folder that another one takes the place of; the last three are results.
OWN_FILES = {name: None for name in (
    "config.json", TRAINED_FILE, "adapter_config.json", "adapter_model.safetensors",
    "tokenizer.model", "metrics.jsonl", "training.svg", "model.safetensors", "README.md",
    "*.partial")}
OWN_FILES["vision_tower"] = {name: None for name in (
    "config.json", "preprocessor_config.json", "model.safetensors")}
OWN_FILES |= {"pope": "*", "chair": "*", "shr": "*"}


def check_output_folder(folder, resume=False):
    """Before training: InputError where a checkpoint cannot be written, or replaces another's.

    With `resume` the checkpoint that is there may be this very run's, and then it stays.
    """
    check_output(folder, OWN_FILES)
    refuse_other_readme(folder)
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return
    values = read_json(path, dict)
    if OURS not in (values.get("model_type"), values.get("written_by")):
        raise InputError(f"{folder}: holds a model that was not trained here; name another folder")
    unless = "unless it is this very run's, " if resume else ""
    say(f"{folder}: a checkpoint is there already; {unless}it will be {old_name(folder)} when this "
        "run is done")


def save_base(folder, model, tensors=None, arguments=None, identity=None):
    """Write a Llava with one head in LLaVA's layout, the tower in `vision_tower/`.

    `tensors` {public name: tensor} are written instead of the modules' own, which ZeRO-3 divides
    among the processes. LLaVA's config.json knows no post-interaction block, no `arguments` and no
    `identity` of a run (identity.py): they stand there as more entries.
    """
    head, config = model.head, model.config
    tensors = tensors or whole_tensors(model)
    tower, rest = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("vision_tower."):
            tower[name.removeprefix("vision_tower.")] = tensor
        else:
            rest[name] = tensor
    values = {"written_by": OURS, **asdict(config.text), "mm_vision_tower": "vision_tower",
              "mm_hidden_size": config.vision.hidden_size, **version_settings(config),
              "mm_projector_hidden_size": config.projector_hidden_size,
              "mm_vision_select_layer": config.select_layer, "mm_vision_select_feature": "patch",
              "tokenizer_model_max_length": config.max_length}
    if config.bits < 16:
        values["quantization_config"] = QUANTISATION
    if head.block_config:
        values["post_interaction_block"] = asdict(head.block_config)
    if arguments:
        values["arguments"] = arguments
    if identity:
        values["identity"] = identity

    def fill(partial):
        in_tower = os.path.join(partial, "vision_tower")
        os.makedirs(in_tower)
        write_json(os.path.join(partial, "config.json"), values)
        vision = {"model_type": "clip_vision_model", **asdict(config.vision)}
        write_json(os.path.join(in_tower, "config.json"), vision)
        if model.preprocess:
            write_json(os.path.join(in_tower, "preprocessor_config.json"),
                       preprocessor_config(model.preprocess))
        write_tensors(os.path.join(partial, "model.safetensors"), rest)
        write_tensors(os.path.join(in_tower, "model.safetensors"), tower)
        shutil.copyfile(model.tokenizer.path, os.path.join(partial, "tokenizer.model"))
        if arguments:
            write_card(partial, os.path.basename(folder), values)

    replace_folder(folder, fill, OWN_FILES)


def preprocessor_config(preprocess):
    """An ImageProcessor in transformers' words; 3 is PIL's number of bicubic."""
    size = preprocess.size
    return {"image_mean": preprocess.mean, "image_std": preprocess.std,
            "image_processor_type": "CLIPImageProcessor", "do_resize": True,
            "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": size, "width": size}, "do_normalize": True}


def adapter_config(info):
    """peft's adapter_config.json. `info`: the trained checkpoint's config.json.

    `target_modules` is a pattern of LLaMA's layers, because CLIP's linears have the same names.
    """
    arguments = info["arguments"]
    base = {"base_model_name_or_path": info["base"]}
    if info["base"] and is_name(info["base"]):          # of the hub: OWNER/NAME@REVISION
        base["base_model_name_or_path"], _, base["revision"] = info["base"].partition("@")
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", **base,
            "inference_mode": True,
            "r": arguments["lora_r"], "lora_alpha": arguments["lora_alpha"],
            "lora_dropout": arguments["lora_dropout"], "bias": "none",
            "fan_in_fan_out": False, "modules_to_save": None,
            "target_modules": rf"model\.layers\.\d+\.\w+\.({'|'.join(LINEARS)})"}


def save_trained(folder, tensors, info, tokenizer):
    """Write a trained checkpoint.

    `tensors`: {public name: tensor}. `info`: what config.json says of it: its base, that base's
    fingerprint, the block's configuration, the run's arguments. RuntimeError without any tensors.
    """
    if not tensors:
        raise RuntimeError(f"{folder}: nothing was trained")
    lora, head = {}, {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            lora["base_model.model." + name] = tensor       # peft's name
        else:
            head[name] = tensor

    def fill(partial):
        if head:
            write_tensors(os.path.join(partial, TRAINED_FILE), head)
        if lora:
            write_tensors(os.path.join(partial, "adapter_model.safetensors"), lora)
            write_json(os.path.join(partial, "adapter_config.json"), adapter_config(info))
        write_json(os.path.join(partial, "config.json"), {"model_type": OURS, **info})
        shutil.copyfile(tokenizer.path, os.path.join(partial, "tokenizer.model"))
        if info.get("arguments"):
            write_card(partial, os.path.basename(folder), info)

    replace_folder(folder, fill, OWN_FILES)
