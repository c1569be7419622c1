"""From files to modules: bases, trained checkpoints and adapters.

    base = load_base("llava-v1.5-7b", vision_tower="clip-vit-large-patch14-336")
    head = load_trained("out/stage2", base)                   # a head with what was trained
    model = load_all(Source(["out/stage1", "out/stage2"]), device, dtype)    # a head for each

A base is a whole model, in LLaVA's layout or Hugging Face's (layouts.py). A trained checkpoint is a
folder with `config.json` (what it is, its base and what identifies that: identity.py),
`trained.safetensors` (only what was trained) and `tokenizer.model`, or the training notes'
`non_lora_trainables.bin`. A LoRA adapter, ours or peft's, changes the base into another base
(adapters.py). What a folder is follows from what it holds. Every path may also be a name on the
Hugging Face hub (hub.py).

Modules are filled tensor by tensor (weights.py), and names and shapes are compared before anything
is read. A trunk whose outputs are kept (training/features.py) stays in its files:
`load_base(..., read_trunk=False)`, and `load_weights(trunk)` if it is needed later.
"""
import glob
import os
from dataclasses import dataclass, replace

import torch

from checkpoints import versions
from checkpoints.adapters import read_adapter, with_tied_head
from checkpoints.hub import CONFIGS, folder_of, is_name, pinned
from checkpoints.identity import fingerprint, refuse_other_base
from checkpoints.layouts import (
    OURS,
    SEED_FILE,
    TRAINED_FILE,
    block_config_of,
    our_names,
    read_seed_file,
    read_tensors,
    refuse_made_up,
    typed,
    weight_files,
)
from checkpoints.quantised import in_bits
from checkpoints.towers import Tower, find_tower, image_processor
from checkpoints.weights import attach_weights, load_weights
from clip_vit import TOWER
from data import Tokenizer
from model import Head, Llava, LlavaConfig, Trunk
from post_decoder import BlockConfig
from support.command_line import first_process
from support.common import InputError, check_file, file_digest, read_json
from support.folders import names_of
from support.tensors import LazyTensor, read_file, refuse_gguf

# ---- Bases ---------------------------------------------------------------------------------------


def holds_model(path):
    """False for a folder that holds no model. `checkpoint_type` judges all other paths."""
    names = ("config.json", "adapter_config.json", SEED_FILE)
    return not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, n)) for n in names)


def checkpoint_type(path):
    """What a path holds: "base", "trained" (ours), "adapter" (LoRA) or "seed" (the notes' file)."""
    path = folder_of(path)
    if os.path.isfile(path):
        if path.endswith(".gguf"):
            refuse_gguf(path)
        return "seed"
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        return "adapter"
    if os.path.isfile(os.path.join(path, SEED_FILE)) and not weight_files(path):
        return "seed"
    return "trained" if read_config(path).get("model_type") == OURS else "base"


def read_config(folder):
    folder = folder_of(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; check the path (a name on the Hugging Face "
                         "hub is OWNER/NAME)")
    return read_json(os.path.join(folder, "config.json"), dict)


@dataclass
class BaseFiles:
    """A base of which only settings and headers were read."""
    folder: str
    path: str                   # of the config.json that counts
    config: LlavaConfig
    block_config: BlockConfig
    tensors: dict               # {our name: LazyTensor}, the tower's among them
    tower: Tower
    tied: bool                  # lm_head is the embeddings, where it has no tensor of its own

    def with_adapter(self, adapter, dtype):
        """The base that an Adapter makes of this one. InputError if it belongs to another."""
        if adapter.is_ours:
            plain = self.model(dtype, "cpu")
            plain.fingerprint = fingerprint(plain.trunk, plain.head, plain.preprocess)
            refuse_other_base(adapter.folder, adapter.info, plain)
        tensors = adapter.merged(self.tensors, dtype, self.tied)
        block_config, beside = adapter.read_beside(self.config)
        adapter.refuse_lost(self.tensors, beside)
        return replace(self, tensors=tensors | beside,
                       block_config=block_config or self.block_config)

    def model(self, dtype, device):
        """Modules on the meta device that know where their values are → Llava."""
        config, tower, folder = self.config, self.tower, self.folder
        path = os.path.join(folder, "tokenizer.model")
        if os.path.exists(path):
            check_file(path)
        tokenizer = Tokenizer(path)
        versions.refuse_small_vocabulary(config, len(tokenizer), path)
        versions.refuse_mixed_weights(config, self.tensors, self.path)
        preprocess = image_processor(tower.preprocessor, config, tower.source)
        layers = {"num_hidden_layers": config.text.num_hidden_layers,
                  "num_hidden_layers of the vision tower": config.vision.num_hidden_layers,
                  "depth of the block": self.block_config.depth if self.block_config else 0}
        refuse_made_up(layers, self.tensors, os.path.join(folder, "config.json"))
        with torch.device("meta"):
            trunk, head = Trunk(config), Head(config, self.block_config)

        # Each tensor goes to its module. Names and shapes are compared before weights are read.
        of_head, of_tower, of_llama = {}, {}, {}
        tensors = with_tied_head(self.tensors) if self.tied else self.tensors
        for key, lazy in tensors.items():
            if key.startswith(("lm_head.", "post_interaction_block.")):
                of_head[key] = lazy
            elif not key.startswith(TOWER):
                of_llama[key.removeprefix("model.")] = lazy
            elif not trunk.vision_tower.unused_key(key):
                of_tower[key.removeprefix("vision_tower.")] = lazy
        attach_weights(head, of_head, folder, dtype, device)
        attach_weights(trunk.vision_tower, of_tower, tower.source, dtype, device)
        attach_weights(trunk.model, of_llama, folder, dtype, device)
        return in_bits(Llava(trunk, {"base": head}, tokenizer, preprocess, fingerprint=""))


def read_base(folder, vision_tower=None, adapter=None):
    """A base's folder → BaseFiles. `adapter`: an Adapter whose config.json may count instead."""
    folder = folder_of(folder)
    path = os.path.join(folder, "config.json")
    values = read_config(folder)
    versions.refuse_other_models(values, path)
    tensors = read_tensors(folder)
    projector = os.path.join(folder, "mm_projector.bin")
    has_projector = any(key.startswith("model.mm_projector.") for key in tensors)
    if os.path.exists(projector) and not has_projector:
        tensors |= our_names(read_file(projector))
    if adapter:
        values, path = adapter.settings(values, path)

    inside = {key: lazy for key, lazy in tensors.items() if key.startswith(TOWER)}
    tower = find_tower(folder, values, inside, vision_tower)
    config = versions.llava_config(values, path, tower.config)
    block_config = block_config_of(values.get("post_interaction_block"), path)
    text = values.get("text_config") or {}
    tied = bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return BaseFiles(folder, path, config, block_config, tensors | tower.tensors, tower, tied)


def load_base(folder, vision_tower=None, dtype=None, device="cpu", adapter=None, read_trunk=True):
    """A base, with a LoRA adapter if one is named → Llava, everything frozen.

    dtype None keeps that of the files. With read_trunk=False the trunk stays on the meta device
    until `load_weights` reads it. Most mistakes are an InputError before any weights are read.
    """
    adapter = read_adapter(folder_of(adapter)) if adapter else None
    files = read_base(folder, vision_tower, adapter)
    if adapter:
        files = files.with_adapter(adapter, dtype)
    model = files.model(dtype, device)
    load_weights(model.head)
    if read_trunk and model.config.bits == 16:
        load_weights(model.trunk)
    model.fingerprint = fingerprint(model.trunk, model.head, model.preprocess)
    if read_trunk:                      # what is held in few bits is recognised by its file alone
        load_weights(model.trunk)
    return model


# ---- Trained checkpoints -------------------------------------------------------------------------


def is_trained(path):
    """Whether a path holds what was trained on top of a base."""
    return checkpoint_type(path) in ("trained", "seed")


def base_of(path, named=None):
    """The base that a checkpoint belongs to: as the user names it, else as the checkpoint does."""
    what = checkpoint_type(path)
    if what == "base":
        return path
    if named:
        return named
    base, reason = None, ""
    if what == "trained":
        base = typed(read_config(path), "base", str, os.path.join(path, "config.json"))
    elif what == "adapter":
        file = os.path.join(folder_of(path), "adapter_config.json")
        values = read_json(file, dict)
        base = typed(values, "base_model_name_or_path", str, file)
        if base and is_name(base):
            base += f"@{values['revision']}" if values.get("revision") else ""
        elif base and not os.path.isdir(base):
            base, reason = None, f" ({base} is no folder here)"
    if not base:
        raise InputError(f"{path}: does not say which base it belongs to{reason}; name it with "
                         "--model_name_or_path")
    return base


def tower_of(path, named=None):
    """The tower that the user or a checkpoint of ours names, or None: then the base has one."""
    config = os.path.join(folder_of(path), "config.json")
    if named or not os.path.isfile(config):
        return named
    values = read_json(config, dict)
    return typed(values, "vision_tower", str, config) if values.get("model_type") == OURS else None


def load_trained(path, base, dtype=None, device="cpu"):
    """A trained checkpoint on top of its base (a Llava) → Head.

    If lm_head was not trained, the head uses the base's own tensor, without a copy.
    """
    path = folder_of(path)
    if checkpoint_type(path) == "seed":
        file = os.path.join(path, SEED_FILE) if os.path.isdir(path) else path
        block_config, tensors = read_seed_file(file, base.config)
    else:
        info = read_config(path)
        refuse_other_base(path, info, base)
        block_config = block_config_of(info.get("block"), os.path.join(path, "config.json"))
        tensors = read_file(os.path.join(path, TRAINED_FILE))
        depth = block_config.depth if block_config else 0
        refuse_made_up({"depth of the block": depth}, tensors, os.path.join(path, "config.json"))
    with torch.device("meta"):
        head = Head(base.config, block_config)
    lm_head = base.head.lm_head
    own = LazyTensor(tuple(lm_head.weight.shape), lambda pinned=False: lm_head.weight)
    attach_weights(head, {"lm_head.weight": own} | tensors, path, dtype, device)
    load_weights(head)
    if "lm_head.weight" not in tensors:
        head.lm_head = lm_head
    return head


def weights_of(path):
    """{name: digest} of the files that make a trained checkpoint or an adapter what it is."""
    path = folder_of(path)
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(path, name) for name in os.listdir(path)
                 if name.endswith((".safetensors", ".bin")) or name in CONFIGS]
    return {os.path.basename(path): file_digest(path) for path in paths}


# ---- Several checkpoints -------------------------------------------------------------------------


@dataclass
class Source:
    """Which models a user names on a command line."""
    checkpoints: list
    model_name_or_path: str = None       # the base, where it is not the one that a checkpoint names
    vision_tower: str = None
    bits: int = None                     # of LLaMA's linears; None: as the files are


def checkpoints_among(paths):
    """The paths to evaluate, in their order: what was trained; only if there is none, the bases.

    A glob such as out/* also names the base, which each checkpoint names itself, and folders that
    hold no model. One line says what is left out.
    """
    paths = list(dict.fromkeys(pinned(path.rstrip("/")) for path in paths))
    types = {path: checkpoint_type(path) if holds_model(path) else None for path in paths}
    chosen = [path for path in paths if types[path] not in ("base", None)]
    chosen = chosen or [path for path in paths if types[path]]
    left_out = ", ".join(path for path in paths if path not in chosen)
    if not chosen:
        inside = sorted(os.path.dirname(file) for path in paths
                        for file in glob.glob(os.path.join(glob.escape(path), "*", "config.json")))
        cure = f"is {inside[-1]} meant?" if inside else "name folders that train.py has written"
        raise InputError(f"{left_out}: no checkpoint, no base (there is no config.json); {cure}")
    if left_out and first_process():
        print(f"left out, because nothing was trained there on top of a base: {left_out}",
              flush=True)
    return chosen


def load_all(source, device, dtype):
    """A base and its checkpoints → Llava with a head for each. All must belong to one base."""
    paths = source.checkpoints
    adapter = next((path for path in paths if checkpoint_type(path) == "adapter"), None)
    if adapter and len(paths) > 1:
        raise InputError(f"{adapter}: a LoRA adapter changes the base itself, so nothing can be "
                         "evaluated beside it; name it alone")
    bases = {base_of(path, source.model_name_or_path) for path in paths}
    if len(bases) > 1:
        raise InputError(f"the checkpoints belong to different bases ({', '.join(sorted(bases))}); "
                         "evaluate them one base at a time")
    base, = bases
    towers = [tower_of(path, source.vision_tower) for path in paths]
    tower = next((name for name in towers if name), None)
    model = load_base(base, tower, dtype, device, adapter, read_trunk=not source.bits)
    load_weights(in_bits(model, source.bits).trunk)
    if adapter:
        model.heads = {"adapter": model.head}
    trained = [path.rstrip("/") for path in paths if is_trained(path)]
    for name, path in zip(names_of(trained, list(model.heads)), trained, strict=True):
        model.heads[name] = load_trained(path, model, dtype, device)
    return model


def load_one(source, device, dtype):
    """The last model that a Source names, alone → Llava with one head."""
    model = load_all(source, device, dtype)
    name, head = list(model.heads.items())[-1]
    model.heads = {name: head}
    return model


def load_whole(source):
    """The base and the checkpoint of a Source as one model, in the files' dtype → Llava."""
    path, = source.checkpoints
    what, base = checkpoint_type(path), base_of(path, source.model_name_or_path)
    tower = tower_of(path, source.vision_tower)
    model = load_base(base, tower, adapter=path if what == "adapter" else None,
                      read_trunk=not source.bits)
    load_weights(in_bits(model, source.bits).trunk)
    if what in ("trained", "seed"):
        model.heads = {"trained": load_trained(path, model)}
    return model


def trained_folders(names, paths):
    """{model's name: its path} of what `load_all` has loaded; the base is not among them."""
    trained = [path for path in paths if checkpoint_type(path) != "base"]
    return dict(zip([name for name in names if name != "base"], trained, strict=True))
