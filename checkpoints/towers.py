"""CLIP's vision tower: inside a base, in a folder of its own, or from open_clip.

    tower = find_tower("llava-v1.5-7b", config, inside, "clip-vit-large-patch14-336")   # for a base
    tower = read_tower("open_clip:ViT-L-14-336/openai")                                 # by name
    preprocess = image_processor(tower.preprocessor, llava_config, tower.source)

Follows huggingface/transformers: its config.json and preprocessor_config.json.
"""
import os
from dataclasses import dataclass

from checkpoints.hub import folder_of
from checkpoints.layouts import pick, read_tensors, refuse_others, refuse_uneven, typed
from checkpoints.openclip import read_open_clip
from clip_vit import ACTIVATIONS, TOWER, CLIPVisionConfig
from support.anyres import tile_grid
from support.common import InputError, read_json
from support.preprocessing import CLIP_MEAN, CLIP_STD, ImageProcessor

# What a config.json means when it leaves a setting out: transformers' defaults, not ViT-L/14-336.
CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
# The only value of a setting that our ImageProcessor builds. PIL's number of bicubic is 3.
BUILT = {"resample": 3, "do_resize": True, "do_center_crop": True, "do_rescale": True,
         "do_normalize": True}


@dataclass
class Tower:
    """A tower that nothing was read of yet, apart from its settings."""
    config: CLIPVisionConfig
    tensors: dict               # {our name: LazyTensor}
    preprocessor: dict          # as in preprocessor_config.json; {} without one
    source: str                 # where the tensors are, for messages


def find_tower(folder, values, inside, name):
    """The tower of a base → Tower.

    `values`: the base's config.json. `inside`: the tensors of a tower that the base itself holds;
    it was trained with them, so they are used if there are any. `name`: the tower that the user
    names, or None. InputError if no tower is found.
    """
    path = os.path.join(folder, "config.json")
    if typed(values, "vision_config", dict, path):                  # Hugging Face's LLaVA
        config = clip_config(values["vision_config"], path)
        return Tower(config, inside, read_preprocessor(folder), folder)

    # LLaVA's config.json names a folder, which may lie inside the base.
    named_by_user = bool(name)
    name = name or typed(values, "mm_vision_tower", str, path)
    folders = (name, os.path.join(folder, name)) if name else ()
    found = next((place for place in folders if os.path.isdir(place)), None)
    if inside and found is None and not named_by_user:
        return Tower(clip_config_of(inside, folder), inside, read_preprocessor(folder), folder)
    if name is None:
        raise InputError(f"{path}: names no mm_vision_tower; name CLIP's folder with "
                         "--vision_tower")
    try:
        name = folder_of(name)
    except InputError as e:
        raise InputError(f"vision tower {e}, with --vision_tower") from e
    found = found or (name if os.path.isdir(name) else None)
    if found is None and not name.startswith("open_clip:"):
        raise InputError(f"vision tower {name}: no such folder; name CLIP's folder (config.json "
                         "and weights) with --vision_tower")
    tower = read_tower(found or name)
    if inside:
        tower.tensors, tower.source = inside, folder
    return tower


def read_tower(name):
    """CLIP's folder, or open_clip:MODEL/TAG-OR-FILE → Tower."""
    if name.startswith("open_clip:"):
        return Tower(*read_open_clip(name), name)
    path = os.path.join(name, "config.json")
    values = read_json(path, dict)
    tensors = {key: lazy for key, lazy in read_tensors(name).items() if key.startswith(TOWER)}
    if not tensors:
        raise InputError(f"{name}: holds no CLIP vision tower (vision_model.*); name CLIP's folder "
                         "with --vision_tower")
    config = clip_config(typed(values, "vision_config", dict, path) or values, path)
    return Tower(config, tensors, read_preprocessor(name), name)


def clip_config(values, path):
    """The values of a tower's config.json → CLIPVisionConfig."""
    config = pick(CLIPVisionConfig, values, CLIP_DEFAULTS, path)
    refuse_uneven(vars(config), "hidden_size", "num_attention_heads", path)
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act of the vision tower is {config.hidden_act!r} and "
                         f"must be one of {', '.join(ACTIVATIONS)}; name a CLIP tower")
    return config


def clip_config_of(tensors, source):
    """The sizes of a tower without config.json → CLIPVisionConfig.

    Heads are 64 wide in all of OpenAI's CLIP ViTs.
    """
    shape = {key.removeprefix(TOWER): lazy.shape for key, lazy in tensors.items()}
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight")
    for name, dimensions in zip(names, (4, 2, 2), strict=True):
        if len(shape.get(name, ())) != dimensions:
            raise InputError(f"{source}: its vision tower has no {name} of {dimensions} "
                             "dimensions; is it whole? Download it again")
    hidden, _, patch, _ = shape[names[0]]
    layers = 1 + max(int(key.split(".")[2]) for key in shape if key.startswith("encoder.layers."))
    positions = shape[names[1]][0]                                  # one class token, the patches
    side = round((positions - 1) ** 0.5)
    inner = shape[names[2]][0]
    return CLIPVisionConfig(hidden, inner, layers, max(1, hidden // 64), side * patch, patch)


# ---- Image preprocessing -------------------------------------------------------------------------


def read_preprocessor(folder):
    """The settings of a folder's image processor, or {} if it has none."""
    path = os.path.join(folder, "preprocessor_config.json")
    if os.path.isfile(path):
        return read_json(path, dict)
    path = os.path.join(folder, "processor_config.json")            # transformers 5
    if os.path.isfile(path):
        return typed(read_json(path, dict), "image_processor", dict, path) or {}
    return {}


def image_processor(values, config, path):
    """The settings of a preprocessor_config.json (or {}) → ImageProcessor.

    `config`: the LlavaConfig. InputError if a setting asks for another preprocessing than ours.
    """
    image_size = config.vision.image_size
    for name in ("size", "crop_size"):      # {"shortest_edge": n}, {"height": n, "width": n} or n
        size = values.get(name) or image_size
        for edge in size.values() if isinstance(size, dict) else [size]:
            refuse_others({name: edge}, {name: image_size}, path)
    refuse_others(values, BUILT, path)
    colours = [tuple(values.get(name) or default) if are_colours(values.get(name)) else None
               for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))]
    if None in colours or not all(colours[1]):
        raise InputError(f"{path}: image_mean is {values.get('image_mean')} and image_std "
                         f"{values.get('image_std')}; both should be three numbers, and no "
                         "image_std 0: copy preprocessor_config.json again")
    grid = tile_grid(config.pinpoints, config.vision)
    return ImageProcessor(image_size, *colours, config.pad_images, grid)


def are_colours(value):
    """Whether a setting is absent, or three numbers."""
    return not value or (isinstance(value, list | tuple) and len(value) == 3
                         and all(type(number) in (int, float) for number in value))
