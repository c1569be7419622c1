"""LLaVA's versions: what a config.json says of one, and what it must not mix.

    config = llava_config(values, "llava-v1.5-7b/config.json", vision)      # LlavaConfig
    values |= version_settings(config)                                      # and back

    v1     a projector of one linear layer, <im_start> and <im_end> around an image, the middle of
           an image cut out
    v1.5   a projector of two layers, images padded to a square
    VoCo   v1.5 with <voco> tokens (voco.py)

Follows haotian-liu/LLaVA (`llava/model/multimodal_projector/builder.py`, `llava/train/train.py`).
Deliberately different: settings that belong to different versions, or to other weights than those
that lie beside them, are refused by their name. The original ignores one of them.
"""
import json
import re

from checkpoints.layouts import BUILT, llama_config, refuse_others, typed
from checkpoints.quantised import refuse_quantised
from checkpoints.voco import added_tokens, num_voco
from data import BOS, EOS
from model import LlavaConfig
from support.common import InputError

MODEL_TYPES = None, "llava", "llava_llama", "llama"     # the last: a LLaMA with LLaVA's LoRA
RATIOS = "pad", "square"        # of image_aspect_ratio: padded to a square, or the middle cut out
PROJECTOR = "model.mm_projector."
START_END = "<im_start>", "<im_end>"


def refuse_other_models(values, path):
    """InputError for a config.json of another model, before anything else of it is looked at."""
    refuse_quantised(values, path)
    if values.get("model_type") not in MODEL_TYPES:
        raise InputError(f"{path}: model_type is {json.dumps(values['model_type'])}, which is not "
                         "built here (docs/real_weights.md says what is, and why); name a LLaVA "
                         "checkpoint")


def llava_config(values, path, vision):
    """LLaVA's flat config.json or Hugging Face's nested one → LlavaConfig.

    `vision`: the tower's CLIPVisionConfig.
    """
    refuse_quantised(values, path)
    # The activation is LLaMA's, so that llama_config checks it.
    built = {name: only for name, only in BUILT.items() if name != "hidden_act"}
    refuse_others(values, built | {"mm_patch_merge_type": "flat"}, path)
    nested = typed(values, "text_config", dict, path)
    of_text = values if nested is None else nested
    text = llama_config(of_text, path)
    # Padding is never looked at, so pad_token_id may be anything.
    refuse_others(of_text, {"bos_token_id": BOS, "eos_token_id": EOS}, path)
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    layers = vision.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise InputError(f"{path}: the tower's selected layer is {layer} and must be one of its "
                         f"{layers}; name the tower that this model was trained with")
    # Hugging Face's conversion loses image_aspect_ratio, which was "pad" in LLaVA-1.5's training.
    ratio = values.get("image_aspect_ratio")
    if ratio is None:
        ratio = "square" if nested is None else "pad"
    if ratio not in RATIOS:
        raise InputError(f"{path}: image_aspect_ratio is {json.dumps(ratio)} and only "
                         f"{' and '.join(RATIOS)} are built here (no pictures in several pieces); "
                         "name a LLaVA-1.5 checkpoint")
    max_length = typed(values, "tokenizer_model_max_length", int, path)
    config = LlavaConfig(
        text, vision, select_layer=layer,
        projector_depth=2 if nested is not None else projector_depth(values, path),
        projector_hidden_size=typed(values, "mm_projector_hidden_size", int, path),
        max_length=max_length or text.max_position_embeddings,
        pad_images=ratio == "pad",
        image_start_end=bool(typed(values, "mm_use_im_start_end", bool, path)),
        num_voco=num_voco(values, path))
    if config.image_start_end:
        refuse_other_start_end(config, values, path)
    return config


def projector_depth(values, path):
    """mm_projector_type → the number of its layers; 0 for `linear`, which is what nothing means."""
    kind = typed(values, "mm_projector_type", str, path) or "linear"
    layers = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if kind != "linear" and not layers:
        raise InputError(f"{path}: mm_projector_type is {json.dumps(kind)} and only linear and "
                         "mlp1x_gelu to mlp99x_gelu are built here; name a LLaVA checkpoint")
    return int(layers[1]) if layers else 0


def refuse_other_start_end(config, values, path):
    """InputError unless <im_start> and <im_end> can be the last two embeddings."""
    if config.num_voco:
        raise InputError(f"{path}: mm_use_im_start_end is true, and num_voco {config.num_voco}; "
                         "they belong to different versions: mend the file")
    last = config.text.vocab_size - 2, config.text.vocab_size - 1
    added = added_tokens(path.removesuffix("config.json") or ".")
    ids = tuple(added.get(name, at) for name, at in zip(START_END, last, strict=True))
    if ids != last:
        raise InputError(f"{path}: mm_use_im_start_end is true, and {' and '.join(START_END)} have "
                         f"the ids {ids}, which must be the last of vocab_size "
                         f"{config.text.vocab_size}; download the checkpoint again")


def refuse_small_vocabulary(config, pieces, path):
    """InputError unless the model has an embedding for every piece of a tokenizer, and for the
    tokens that its version adds."""
    added = ["<voco>"] if config.num_voco else [*START_END] * config.image_start_end
    if pieces + len(added) > config.text.vocab_size:
        beside = f", {' and '.join(added)} beside them" if added else ""
        raise InputError(f"{path}: has {pieces} pieces{beside}, the model only "
                         f"{config.text.vocab_size} embeddings; copy the tokenizer.model that "
                         "belongs to this model")


def refuse_mixed_weights(config, tensors, path):
    """InputError where a setting belongs to other weights than these, {our name: LazyTensor}."""
    names = [key for key in tensors if key.startswith(PROJECTOR) and key.endswith(".weight")]
    depth = 0 if PROJECTOR + "weight" in names else len(names)
    if names and depth != config.projector_depth:
        said, theirs = (f"mlp{n}x_gelu" if n else "linear" for n in (config.projector_depth, depth))
        absent = "" if config.projector_depth else ", as it is where it is absent"
        raise InputError(f'{path}: mm_projector_type is "{said}"{absent}, '
                         f"and the weights are those of {theirs}; copy the config.json that "
                         "belongs to them")


def version_settings(config):
    """What tells a version in LLaVA's config.json. The inverse of `llava_config`."""
    depth = config.projector_depth
    settings = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"],
                "mm_projector_type": f"mlp{depth}x_gelu" if depth else "linear",
                "image_aspect_ratio": "pad" if config.pad_images else "square"}
    if config.image_start_end:
        settings["mm_use_im_start_end"] = True
    if config.num_voco:
        settings["num_voco"] = config.num_voco
    return settings
