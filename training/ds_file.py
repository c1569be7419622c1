"""The user's DeepSpeed file: compared with what DeepSpeed knows, and with what this loop does.

    config = read_ds_file("ds_zero3.json", offload=False)

DeepSpeed ignores a name that it does not know, reads some settings under two names, and ends with a
traceback over others, long after the weights were read. Here each of these is an InputError of one
line, before: it names the file, the setting, its value and the cure. What is read under an old name
stands under the new one afterwards. DeepSpeed's own checks are its pydantic models
(deepspeed.runtime.zero.config and others of version 0.19), and these are asked too.
"""
import copy
import difflib
import enum
import importlib
import json
import math
import os
import types
import typing

from support.command_line import first_process
from support.common import InputError, import_fault, read_json

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LARGEST_BATCH = 10 ** 6         # rows; all divisors of a batch are tried
# Everything that DeepSpeed reads, and what the values are.
WHOLE = ("steps_per_print", "vocabulary_size")
NUMBERS = ("gradient_clipping", "gradient_predivide_factor")
FLAGS = ("prescale_gradients", "disable_allgather", "dump_state", "disable_python_gc",
         "wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer",
         "zero_force_ds_cpu_optimizer", "dataloader_drop_last",
         "use_data_before_expert_parallelism", "managed_gradient_accumulation")
TEXTS = ("communication_data_type", "seq_parallel_communication_data_type",
         "gradient_allreduce_op", "log_level")
OBJECTS = ("zero_optimization", "bf16", "bfloat16", "fp16", "tensorboard", "wandb", "csv_monitor",
           "comet", "comms_logger", "flops_profiler", "timers", "checkpoint", "aio",
           "datastates_ckpt", "optimizer", "scheduler", "data_types", "torch_autocast",
           "activation_checkpointing", "data_efficiency", "hybrid_engine", "tensor_parallel",
           "expert_parallel", "pipeline", "weight_quantization", "compile", "autotuning")
# What DeepSpeed has given up; it says so itself.
REMOVED = ("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
           "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
           "sparse_attention", "sparse_gradients")
PARALLEL = ("sequence_parallel_size", "data_parallel_size")
KNOWN = (*SIZES, *WHOLE, *NUMBERS, *FLAGS, *TEXTS, *OBJECTS, *REMOVED, *PARALLEL)

# Objects that DeepSpeed has a model of.
MODELS = {"zero_optimization": "runtime.zero.config.DeepSpeedZeroConfig",
          "fp16": "runtime.precision_config.DeepSpeedFP16Config",
          "tensorboard": "monitor.config.TensorBoardConfig",
          "wandb": "monitor.config.WandbConfig", "csv_monitor": "monitor.config.CSVConfig",
          "comet": "monitor.config.CometConfig", "comms_logger": "comm.config.CommsLoggerConfig"}
# A monitor: the module that it needs, and what pip calls that.
MONITORS = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"),
            "comet": ("comet_ml", '"comet_ml>=3.41.0"'), "csv_monitor": ("csv", None)}
# Settings without effect on this loop, or that would break it, and what to do instead.
UNUSED = {"activation_checkpointing": "say --gradient_checkpointing instead",
          "amp": "say --bf16 instead",
          "dataloader_drop_last": "every batch is full here, and no example is dropped",
          "zero_force_ds_cpu_optimizer": "the optimizer is torch's own AdamW"}
UNUSED |= dict.fromkeys((*PARALLEL, "data_efficiency", "hybrid_engine", "tensor_parallel",
                         "expert_parallel", "pipeline", "weight_quantization", "compile",
                         "autotuning", "use_data_before_expert_parallelism", "datastates_ckpt"),
                        "it is not built here")
# Of zero_optimization: what needs C++ code of DeepSpeed's, none of which is compiled.
COMPILED = ("zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients")
# Old names of offloading. DeepSpeed's documents spell the second one in two ways.
OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param",
               "cpu_offload_params": "offload_param",
               "cpu_offload_use_pin_memory": "offload_optimizer"}


def read_ds_file(path, offload):
    """A DeepSpeed configuration file → dict, checked. `offload`: whether --offload was typed."""
    config = read_json(path, dict)
    refuse_twice(path)
    file = DeepSpeedFile(path)
    auto = find_auto(config)
    file.refuse(auto, f'{auto} is "auto", which only the HF Trainer understands; write a value or '
                      "remove it")
    file.check_names(config)
    file.check_values(config)
    file.check_precision(config)
    file.refuse_unused(config)
    move_old_names(file, config, offload)
    for name, model in MODELS.items():
        if name in config:
            file.check_object(config[name], imported(f"deepspeed.{model}"), name)
    file.refuse_offloading(config, offload)
    file.ask_deepspeed(config)
    file.check_monitors(config)
    return config


class DeepSpeedFile:
    """The checks of one file, whose path stands in front of every message."""

    def __init__(self, path):
        self.path = path

    def refuse(self, when, text):
        if when:
            raise InputError(f"{self.path}: {text}")

    def refuse_name(self, name, known, within=""):
        """InputError for a name that DeepSpeed does not know, with the nearest that it knows."""
        near = difflib.get_close_matches(name.lower(), known, 1)
        cure = f"did you mean {near[0]}?" if near else "remove it"
        self.refuse(True, f"{within}{name}: DeepSpeed knows no such setting; {cure}")

    def refuse_value(self, place, value, expected):
        self.refuse(True, f"{place} must be {expected} and is {shown(value)}; write one or remove "
                          "it")

    # ---- Names and kinds of values ---------------------------------------------------------------

    def check_names(self, config):
        for name in config:
            if name not in KNOWN:
                self.refuse_name(name, KNOWN)

    def check_values(self, config):
        for name, value in config.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            whole = isinstance(value, int) and number
            if name in (*SIZES, *WHOLE) and not (whole and value > 0):
                self.refuse_value(name, value, "a whole number above 0")
            if name in SIZES and value > LARGEST_BATCH:
                self.refuse_value(name, value, f"at most {LARGEST_BATCH:,}")
            if name == "gradient_clipping" and not (number and 0 <= value < math.inf):
                self.refuse_value(name, value, "a number, 0 (off) or more")
            if name == "gradient_predivide_factor" and not (number and 0 < value < math.inf):
                self.refuse_value(name, value, "a number above 0")
            if name in FLAGS and not isinstance(value, bool):
                self.refuse_value(name, value, "true or false")
            if name in TEXTS and not isinstance(value, str):
                self.refuse_value(name, value, "a text")
            precision = name in ("bf16", "bfloat16")            # these have a message of their own
            if name in OBJECTS and not isinstance(value, dict) and not precision:
                example = ', for example {"stage": 3},' if name == "zero_optimization" else ""
                self.refuse_value(name, value, f"an object{example}")

    def check_object(self, values, model, place):
        """`values` against a pydantic model of DeepSpeed's: names, kinds, then its own rules."""
        fields = {}
        for name, field in model.model_fields.items():
            fields[name] = fields[field.alias or name] = field.annotation
        for name, value in values.items():
            if name not in fields:
                self.refuse_name(name, fields, f"{place}.")
            kinds = kinds_of(fields[name])
            if not any(fits(value, kind) for kind in kinds):
                words = " or ".join(dict.fromkeys(word_for(kind) for kind in kinds))
                self.refuse_value(f"{place}.{name}", value, words)
            for kind in kinds:
                if isinstance(value, dict) and is_model(kind):
                    self.check_object(value, kind, f"{place}.{name}")
        try:
            model(**values)
        except ValueError as e:                             # pydantic's ValidationError
            first = e.errors()[0]
            name = ".".join([place, *map(str, first["loc"])])
            value = f" is {shown(first['input'])}" if first["loc"] else ""
            self.refuse(True, f"{name}{value}: {first['msg']}")
        except AssertionError as e:
            self.refuse(True, f"{place}: {e}")

    def ask_deepspeed(self, config):
        """What DeepSpeed itself would say of the whole file. The batch sizes are checked later."""
        from deepspeed.runtime.config import DeepSpeedConfig
        rest = {name: value for name, value in config.items() if name not in SIZES}
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        try:
            DeepSpeedConfig(copy.deepcopy(rest | sizes))         # it fills in what is missing
        except Exception as e:      # its checks raise whatever came to hand
            reason = str(e).strip().partition("\n")[0]
            self.refuse(True, f"DeepSpeed refuses it: {reason or type(e).__name__}; change or "
                              "remove that setting")

    # ---- What this loop does not do --------------------------------------------------------------

    def check_precision(self, config):
        """bf16 or fp32, with masters in fp32. `bfloat16` is an old name of bf16."""
        for name in ("bf16", "bfloat16"):
            if config.get(name, 0) is None:         # as if it was not there, also for DeepSpeed
                del config[name]
        self.refuse("bf16" in config and config.get("bfloat16", config["bf16"]) != config["bf16"],
                    "bf16 and bfloat16 are two names of one setting and differ; remove bfloat16")
        wrong = [name for name in ("torch_autocast", "data_types") if name in config]
        for name in ("bf16", "bfloat16"):
            values = config.get(name, {})
            plain = isinstance(values, dict) and not set(values) - {"enabled"}
            if not plain or not isinstance(values.get("enabled", False), bool):
                wrong.append(name)
        self.refuse(wrong, f"{', '.join(wrong)}: weights and gradients are bf16 or fp32 here, and "
                           'masters fp32; write "bf16": {"enabled": true} or remove it')
        self.refuse((config.get("fp16") or {}).get("enabled"),
                    "fp16, which needs its loss scaled, is not built here; say --bf16 instead")
        if "bfloat16" in config:
            config["bf16"] = config.pop("bfloat16")

    def refuse_unused(self, config):
        """Settings of copied files that this loop would ignore."""
        self.refuse("optimizer" in config or "scheduler" in config,
                    "optimizer and scheduler are not read from the file; remove them and say "
                    "--learning_rate, --weight_decay, --warmup_ratio")
        for name, cure in UNUSED.items():
            self.refuse(name in config and (name in REMOVED or asks(config[name])),
                        f"{name}: {cure}; remove it")
        self.refuse(not config.get("managed_gradient_accumulation", True),
                    "managed_gradient_accumulation is false: the loop counts on DeepSpeed to "
                    "accumulate gradients; remove it")
        for name in COMPILED:
            self.refuse(asks(config.get("zero_optimization", {}).get(name)),
                        f"zero_optimization.{name}: needs C++ code of DeepSpeed's, which is not "
                        "compiled here; remove it")

    def refuse_offloading(self, config, offload):
        """Offloading unasked, and to another place than the CPU."""
        zero = config.get("zero_optimization", {})
        devices = {name: (zero.get(name) or {}).get("device", "none")
                   for name in ("offload_optimizer", "offload_param")}
        offloaded = [name for name, device in devices.items() if device != "none"]
        self.refuse(offloaded and not offload,
                    f"{', '.join(offloaded)}: slow, and done only where asked for; remove it or "
                    "say --offload")
        self.refuse("nvme" in devices.values(),
                    'offloading to "nvme" needs C++ code of DeepSpeed\'s, which is not compiled '
                    'here; write "device": "cpu"')

    def check_monitors(self, config):
        """InputError for a monitor whose package is missing. Rank 0 alone opens monitors."""
        for name, (module, package) in MONITORS.items():
            if not config.get(name, {}).get("enabled") or not first_process():
                continue
            reason = import_fault(module)
            self.refuse(reason, f"{name} is enabled and cannot be imported ({reason}): pip "
                                f'install {package}, or write "enabled": false')


# ---- Values --------------------------------------------------------------------------------------


def refuse_twice(path):
    """InputError for a name that stands twice in one object: json would keep the last one."""
    def once(pairs):
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"{path}: {twice[0]} stands there twice; remove one of them")
        return dict(pairs)

    with open(path, encoding="utf-8-sig") as file:
        json.load(file, object_pairs_hook=once)


def find_auto(value, path=""):
    """Where in a configuration an "auto" stands, or None."""
    if not isinstance(value, (dict, list)):
        return path if value == "auto" else None
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found = find_auto(inner, f"{path}.{key}" if path else str(key))
        if found:
            return found
    return None


def move_old_names(file, config, offload):
    """Offloading under its old names: refused without --offload, else under the new ones."""
    zero = config.get("zero_optimization", {})
    for old, new in OLD_OFFLOAD.items():
        if old not in zero:
            continue
        value, place = zero.pop(old), f"zero_optimization.{old}"
        if value is not None and not isinstance(value, bool):
            file.refuse_value(place, value, "true or false")
        file.refuse(value and not offload, f"{place}: slow, and done only where asked for; remove "
                                           "it or say --offload")
        file.refuse(value and not isinstance(zero.get(new, {}), dict),
                    f"{place} and {new}: two names of one setting; remove {place}")
        if value:
            setting = {"pin_memory": True} if old.endswith("pin_memory") else {"device": "cpu"}
            zero[new] = zero.get(new, {}) | setting


def asks(value):
    """Whether a setting asks for anything: "enabled", else anything but false, null, 0 or 1."""
    if isinstance(value, dict):
        return asks(value["enabled"]) if "enabled" in value else any(map(asks, value.values()))
    return value is True or bool(value) and value != 1


def shown(value):
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def imported(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def kinds_of(annotation):
    """The types that an annotation allows: (int,), (bool, NoneType), …"""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (typing.get_origin(annotation) or annotation,)


def is_model(kind):
    """Whether a type is one of DeepSpeed's pydantic models."""
    return hasattr(kind, "model_fields")


def is_a(kind, parent):
    return isinstance(kind, type) and issubclass(kind, parent)


def fits(value, kind):
    """Whether a JSON value is one of a type. No text is a number, as it would be for pydantic."""
    if is_model(kind):
        return isinstance(value, dict)
    if kind is bool or value is None or isinstance(value, bool):
        return type(value) is kind
    if is_a(kind, int):                                                 # also 2e8
        return isinstance(value, (int, float)) and value == value // 1
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if is_a(kind, str) or is_a(kind, os.PathLike):
        return isinstance(value, str)
    return not isinstance(kind, type) or isinstance(value, kind)


def word_for(kind):
    words = {bool: "true or false", types.NoneType: "null", float: "a number", list: "a list",
             dict: "an object"}
    if is_a(kind, enum.Enum):
        return "one of " + ", ".join(dict.fromkeys(shown(member.value) for member in kind))
    if is_model(kind):
        return "an object"
    return words.get(kind, "a whole number" if is_a(kind, int) else "a text")
