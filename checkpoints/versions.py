"""LLaVA's versions: what a config.json says of one, and what it must not mix.

    config = llava_config(values, "llava-v1.5-7b/config.json", vision)      # LlavaConfig
    values |= version_settings(config)                                      # and back

    v1     a projector of one linear layer, <im_start> and <im_end> around an image, the middle of
           an image cut out
    v1.5   a projector of two layers, images padded to a square
    v1.6   images of any resolution in tiles (support/anyres.py), a parameter for the end of a row
           of patches, Vicuna or Mistral
    VoCo   v1.5 with <voco> tokens (voco.py)

Follows haotian-liu/LLaVA (`llava/model/multimodal_projector/builder.py`, `llava/train/train.py`,
`llava/model/llava_arch.py`) and Hugging Face's layout of v1.6, `LlavaNextConfig`.
Deliberately different: settings that belong to different versions, or to other weights than those
that lie beside them, are refused by their name. The original ignores one of them.
"""
import json
import math
import re

from checkpoints.layouts import BUILT, MISTRALS, llama_config, refuse_others, typed
from checkpoints.quantised import refuse_quantised
from checkpoints.voco import added_tokens, num_voco
from data import BOS, EOS
from model import LlavaConfig
from support.anyres import tile_grid
from support.common import InputError

# The last are an LLM alone, which LLaVA's LoRA makes a LLaVA.
MODEL_TYPES = None, "llava", "llava_llama", "llava_mistral", "llava_next", "llama", "mistral"
# Of image_aspect_ratio: padded to a square, the middle cut out, or tiles.
RATIOS = "pad", "square", "anyres"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]      # of LlavaNextConfig
MOST_TILES = 100
NEWLINE = "model.image_newline"
# bos and eos of every LLaMA that transformers wrote before 4.28; tokenizer.model counts there, too.
EARLY_IDS = 0, 1
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
    refuse_others(values, built, path)
    nested = typed(values, "text_config", dict, path)
    of_text = values if nested is None else nested
    if nested is not None:
        refuse_other_models(nested, path)
    text = llama_config(of_text, path)
    # Padding is never looked at, so pad_token_id may be anything.
    if (of_text.get("bos_token_id"), of_text.get("eos_token_id")) != EARLY_IDS:
        refuse_others(of_text, {"bos_token_id": BOS, "eos_token_id": EOS}, path)
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    layers = vision.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise InputError(f"{path}: the tower's selected layer is {layer} and must be one of its "
                         f"{layers}; name the tower that this model was trained with")
    ratio = aspect_ratio(values, path)
    is_mistral = of_text.get("model_type") in MISTRALS
    max_length = typed(values, "tokenizer_model_max_length", int, path)
    config = LlavaConfig(
        text, vision, select_layer=layer,
        projector_depth=2 if nested is not None else projector_depth(values, path),
        projector_hidden_size=typed(values, "mm_projector_hidden_size", int, path),
        max_length=max_length or text.max_position_embeddings,
        pad_images=ratio == "pad",
        pinpoints=pinpoints_of(values, path, vision.image_size) if ratio == "anyres" else None,
        template="mistral" if is_mistral else "v1",
        image_start_end=bool(typed(values, "mm_use_im_start_end", bool, path)),
        num_voco=num_voco(values, path))
    if config.image_start_end:
        refuse_other_start_end(config, path)
    if config.pinpoints:
        refuse_other_tiles(config, path)
    window = of_text.get("sliding_window", 4096) if is_mistral else None
    if is_mistral and ratio != "anyres":
        raise InputError(f"{path}: image_aspect_ratio is {json.dumps(ratio)}, and with Mistral "
                         "only anyres is built here, as in LLaVA-1.6; name such a checkpoint")
    if window and window < config.max_length:
        raise InputError(f"{path}: sliding_window is {window} and rows have up to "
                         f"{config.max_length} tokens (tokenizer_model_max_length); only null is "
                         "built here: name a checkpoint of Mistral-7B-Instruct-v0.2")
    return config


def aspect_ratio(values, path):
    """image_aspect_ratio, with its default. InputError where it or what belongs to it is not built.

    Hugging Face's conversion loses it: it was "pad" in LLaVA-1.5's training, "anyres" in 1.6's.
    """
    ratio, default, nested = values.get("image_aspect_ratio"), "square", "text_config" in values
    if nested:
        default = "anyres" if values.get("model_type") == "llava_next" else "pad"
    built = (default,) if default == "anyres" else RATIOS[:2] if nested else RATIOS
    if ratio is None:
        ratio = default
    if ratio not in built:
        raise InputError(f"{path}: image_aspect_ratio is {json.dumps(ratio)} and only "
                         f"{' and '.join(built)} are built here; name a LLaVA-1.5 or 1.6 "
                         "checkpoint")
    merge = values.get("mm_patch_merge_type") or ("spatial_unpad" if nested else "flat")
    if ratio == "anyres" and merge != "spatial_unpad" or ratio != "anyres" and not nested \
            and merge != "flat":
        raise InputError(f"{path}: mm_patch_merge_type is {json.dumps(merge)} and "
                         f"image_aspect_ratio {json.dumps(ratio)}; LLaVA-1.6 has spatial_unpad and "
                         "anyres, other versions have neither: mend the file")
    if ratio != "anyres" and values.get("image_grid_pinpoints"):
        raise InputError(f"{path}: image_grid_pinpoints are there and image_aspect_ratio is "
                         f"{json.dumps(ratio)}; LLaVA-1.6 has both that and anyres: mend the file")
    return ratio


def pinpoints_of(values, path, side):
    """image_grid_pinpoints → ((width, height), ...). Hugging Face's layout has the height first."""
    found, nested = values.get("image_grid_pinpoints"), "text_config" in values
    if found is None and nested:
        found = PINPOINTS
    if isinstance(found, str):                  # as typed on the command line of LLaVA's training
        try:
            found = json.loads(found.replace("(", "[").replace(")", "]"))
        except ValueError:
            found = None
    most = MOST_TILES * side
    sound = isinstance(found, list) and found and all(
        isinstance(pair, list) and len(pair) == 2 and all(
            type(edge) is int and 0 < edge <= most and edge % side == 0 for edge in pair)
        and math.prod(pair) <= most * side for pair in found)
    if not sound:
        raise InputError(f"{path}: image_grid_pinpoints are "
                         f"{json.dumps(values.get('image_grid_pinpoints'))} and must be pairs of "
                         f"multiples of the tower's {side} pixels, up to {MOST_TILES} tiles; copy "
                         "config.json again, or name the tower that the model was trained with")
    return tuple((second, first) if nested else (first, second) for first, second in found)


def refuse_other_tiles(config, path):
    """InputError for what no LLaVA-1.6 has, and for images that fill its whole context."""
    for name, value in (("mm_use_im_start_end", config.image_start_end),
                        ("num_voco", config.num_voco)):
        if value:
            raise InputError(f"{path}: {name} is {json.dumps(value)} and image_aspect_ratio "
                             '"anyres"; they belong to different versions: mend the file')
    tokens = tile_grid(config.pinpoints, config.vision).most_tokens
    if tokens >= config.max_length:
        raise InputError(f"{path}: tokenizer_model_max_length (or max_position_embeddings) is "
                         f"{config.max_length}, and image_grid_pinpoints make up to {tokens:,} "
                         "tokens of an image; LLaVA-1.6 has 4096")


def projector_depth(values, path):
    """mm_projector_type → the number of its layers; 0 for `linear`, which is what nothing means."""
    kind = typed(values, "mm_projector_type", str, path) or "linear"
    layers = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if kind != "linear" and not layers:
        raise InputError(f"{path}: mm_projector_type is {json.dumps(kind)} and only linear and "
                         "mlp1x_gelu to mlp99x_gelu are built here; name a LLaVA checkpoint")
    return int(layers[1]) if layers else 0


def refuse_other_start_end(config, path):
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
    tokens that its version adds.
    """
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
    ratio = "anyres" if config.pinpoints else "pad" if config.pad_images else "square"
    if bool(config.pinpoints) != (NEWLINE in tensors):
        holds = "hold" if NEWLINE in tensors else "do not hold"
        raise InputError(f'{path}: image_aspect_ratio is "{ratio}", and the weights {holds} '
                         "image_newline, which LLaVA-1.6 has; copy the config.json that belongs "
                         "to them")


def version_settings(config):
    """What tells a version in LLaVA's config.json. The inverse of `llava_config`."""
    depth = config.projector_depth
    llm = "Mistral" if config.template == "mistral" else "Llama"
    settings = {"model_type": "llava_mistral" if llm == "Mistral" else "llava",
                "architectures": [f"Llava{llm}ForCausalLM"],
                "mm_projector_type": f"mlp{depth}x_gelu" if depth else "linear",
                "image_aspect_ratio": "pad" if config.pad_images else "square"}
    if config.pinpoints:
        settings |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                     "image_grid_pinpoints": config.pinpoints}
    if llm == "Mistral":
        settings["sliding_window"] = None
    if config.image_start_end:
        settings["mm_use_im_start_end"] = True
    if config.num_voco:
        settings["num_voco"] = config.num_voco
    return settings
