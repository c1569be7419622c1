"""LoRA adapters, ours and peft's: they change a base into another base.

    adapter = read_adapter("llava-v1.5-7b-lora")         # only settings and headers are read
    tensors = adapter.merged(tensors)                    # {our name: LazyTensor}
    block_config, beside = adapter.read_beside(config)   # what was trained beside it

Follows huggingface/peft's merge, and haotian-liu/LLaVA's `load_pretrained_model`: the `config.json`
of its LoRA folders counts, not the base's. An adapter that starts from changed weights of the base
(PiSSA, OLoRA, ...) is refused, because it does not say how they were changed.
"""
import json
import os
import re
from dataclasses import dataclass
from functools import partial

from checkpoints.layouts import (
    OURS,
    SEED_FILE,
    TRAINED_FILE,
    block_config_of,
    our_names,
    read_seed_file,
    refuse_others,
    typed,
)
from support.common import InputError, read_json
from support.tensors import LazyTensor, read_file

# peft's settings that ask for another product than W + alpha / r · B A, as long as they are set.
BEYOND_LORA = (
    "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out", "lora_bias",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
# Values of init_lora_weights that leave the base as it is; None stands for peft's default.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Entries of a config.json that say how a LLaVA sees images.
SEES_IMAGES = ("mm_vision_tower", "mm_projector_type", "image_aspect_ratio", "text_config")
A, B = ".lora_A.weight", ".lora_B.weight"
PROJECTOR = "model.mm_projector."


@dataclass
class Adapter:
    """A LoRA adapter, of which only settings and headers were read."""
    folder: str
    file: str                   # of its weights
    rank: int
    scale: float                # alpha / rank
    tensors: dict               # {our name: LazyTensor}: lora_A, lora_B, and whole tensors
    whole: list                 # names of modules that it replaces, peft's modules_to_save
    info: dict                  # config.json beside it; {} without one

    @property
    def is_ours(self):
        return self.info.get("model_type") == OURS

    def settings(self, values, path):
        """The config.json that counts, and its path: LLaVA's beside the adapter, else the base's.

        `values`, `path`: the base's. A tower that the base brings along is still found.
        """
        if self.is_ours or not any(self.info.get(name) for name in SEES_IMAGES):
            return values, path
        path = os.path.join(self.folder, "config.json")
        # These say how QLoRA read the base, and it is read anew.
        counted = {name: value for name, value in self.info.items()
                   if name != "quantization_config"}
        tower = typed(counted, "mm_vision_tower", str, path)
        inside = os.path.join(self.folder, tower or "")
        if tower and os.path.isdir(inside):
            counted["mm_vision_tower"] = os.path.abspath(inside)
        elif values.get("mm_vision_tower") and not os.path.isdir(tower or ""):
            counted["mm_vision_tower"] = values["mm_vision_tower"]
        if values.get("vision_config"):
            counted.setdefault("vision_config", values["vision_config"])
        return counted, path

    def merged(self, tensors, dtype=None, tied=False):
        """A base's {our name: LazyTensor} → the same of base and adapter: W + alpha / r · B A.

        This is computed in fp32 and rounded once, to `dtype`, or to W's own if that is None. Whole
        tensors of the adapter (peft's modules_to_save, saved embeddings) replace the base's.
        `tied`: the base's lm_head is its embeddings, where there is none of its own.
        """
        lora, whole = {}, {}
        for key, lazy in self.tensors.items():
            (lora if key.endswith((A, B)) else whole)[key] = lazy
        self.refuse_foreign(whole, tensors)
        tensors = tensors | whole
        if tied:
            tensors = with_tied_head(tensors)
        targets = {key.removesuffix(A).removesuffix(B) for key in lora}
        foreign = [target for target in targets if target + ".weight" not in tensors]
        if foreign:
            raise InputError(f"{self.file}: {min(foreign)} ({len(foreign)} such keys) is no LoRA "
                             "of a tensor of this base; name the adapter's own base")

        def read_merged(whole, a, b, pinned=False):
            weight = whole.read(pinned)
            change = self.scale * (b.read().float() @ a.read().float())
            return (weight.float() + change).to(dtype or weight.dtype)

        merged = dict(tensors)
        for target in targets:
            weight, a, b = tensors[target + ".weight"], lora.get(target + A), lora.get(target + B)
            shapes = [lazy and lazy.shape for lazy in (a, b)]
            if shapes != [(self.rank, *weight.shape[1:]), (*weight.shape[:1], self.rank)]:
                raise InputError(
                    f"{self.file}: lora_A and lora_B of {target} have shapes {shapes[0]} and "
                    f"{shapes[1]}, which is no change of rank {self.rank} to {weight.shape}; name "
                    "the adapter's own base, or save it again")
            read = partial(read_merged, weight, a, b)
            merged[target + ".weight"] = LazyTensor(weight.shape, read)
        return merged

    def refuse_foreign(self, whole, tensors):
        """InputError for a whole tensor that does not belong to this base: what it is."""
        for key in whole:
            if ".lora_" in key:
                raise InputError(f"{self.file}: {key} is LoRA of another kind than lora_A and "
                                 "lora_B of linears (of embeddings, of DoRA), which is not built "
                                 "here; merge it with peft and name the result")
        # A base may get a projector by its adapter, and an lm_head where it is tied.
        foreign = [key for key in whole if key not in tensors and key != "lm_head.weight"
                   and not key.startswith(PROJECTOR)]
        if foreign:
            raise InputError(f"{self.file}: {min(foreign)} ({len(foreign)} such keys) is no LoRA "
                             "of a tensor of this base; name the adapter's own base")
        for key, lazy in whole.items():
            shape = tensors[key].shape if key in tensors else lazy.shape
            if lazy.shape == shape:
                continue
            if key in ("model.embed_tokens.weight", "lm_head.weight"):
                raise InputError(
                    f"{self.file}: {key} is of a vocabulary of {lazy.shape[0]} tokens, and this "
                    f"base has {shape[0]}; name the base that these tokens were added to, with "
                    "its own tokenizer.model")
            raise InputError(f"{self.file}: {key} is a whole tensor of shape {lazy.shape}, and "
                             f"this base's is {shape}; name the adapter's own base")

    def refuse_lost(self, tensors, beside):
        """InputError for a module of the base that the adapter replaces and does not hold."""
        there = {part for key in self.tensors.keys() | beside.keys() for part in key.split(".")}
        for name in self.whole:
            part = name.split(".")[-1].replace("multi_modal_projector", "mm_projector")
            if part not in there and any(part in key.split(".") for key in tensors):
                raise InputError(f"{self.file}: modules_to_save in adapter_config.json names "
                                 f"{name}, of which the file holds nothing, so its saving went "
                                 "wrong; save it again")

    def read_beside(self, config):
        """What was trained beside the adapter → BlockConfig or None, {our name: LazyTensor}.

        `config`: the LlavaConfig.
        """
        seed_file = os.path.join(self.folder, SEED_FILE)
        if os.path.isfile(seed_file):
            return read_seed_file(seed_file, config)
        path = os.path.join(self.folder, TRAINED_FILE)
        if not os.path.isfile(path):
            return None, {}
        block = block_config_of(self.info.get("block"), os.path.join(self.folder, "config.json"))
        return block, read_file(path)


def read_adapter(folder):
    """An adapter's folder → Adapter. InputError names what peft can do beyond plain LoRA."""
    path = os.path.join(folder, "adapter_config.json")
    values = read_json(path, dict)
    rank, alpha = (typed(values, name, kind, path) for name, kind in (("r", int),
                                                                      ("lora_alpha", float)))
    if rank is None or alpha is None:
        raise InputError(f"{path}: r or lora_alpha is missing; copy the file again")
    refuse_others(values, {"peft_type": "LORA", "bias": "none"}, path)
    start = values.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {json.dumps(start)}, which changed the base's weights "
            "before the training, and the file does not tell how; save it converted to plain LoRA "
            "(path_initial_model_for_weight_conversion of peft's save_pretrained), or merge it "
            "with peft and name the result")
    for name in BEYOND_LORA:
        if values.get(name):
            raise InputError(f"{path}: {name} is {json.dumps(values[name])}, which is not built "
                             "here; merge the adapter with peft and name the result")
    paths = [os.path.join(folder, f"adapter_model.{suffix}") for suffix in ("safetensors", "bin")]
    file = next((path for path in paths if os.path.exists(path)), None)
    if file is None:
        raise InputError(f"{folder}: holds neither adapter_model.safetensors nor "
                         "adapter_model.bin; copy them there")
    # original_module is peft's copy of what modules_to_save replace.
    tensors = {plain_name(key): lazy for key, lazy in read_file(file).items()
               if ".original_module." not in key}
    beside = os.path.join(folder, "config.json")
    info = read_json(beside, dict) if os.path.isfile(beside) else {}
    if not any(key.endswith((A, B)) for key in tensors):
        raise InputError(f"{file}: holds no LoRA weights, so its saving went wrong; save it again")
    whole = values.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise InputError(f"{path}: modules_to_save is {json.dumps(whole)} and should be a list of "
                         "names; copy the file again")
    return Adapter(folder, file, rank, alpha / rank, our_names(tensors), whole, info)


def plain_name(key):
    """A key of a file that holds peft's own modules too, as peft's save_pretrained calls it."""
    key = re.sub(r"\.modules_to_save\.(default\.)?", ".", key)
    key = re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", key)
    return key.replace(".base_layer.", ".")


def with_tied_head(tensors):
    """A base's tensors, with its embeddings for lm_head where it has none of its own."""
    if "lm_head.weight" in tensors or "model.embed_tokens.weight" not in tensors:
        return tensors
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
