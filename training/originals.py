"""The flags of the original programs, understood by ours.

    argv = train_arguments(["--lora_enable", "True", "--version", "v1", …])     # ["--tune", "lora"]
    argv = pope_arguments(["--model-path", "out/lora", "--set", "adv"])     # of eval_pope.py
    argv = merge_arguments(["--tune_stage", "1", …])                        # of tools.merge

Known are HA-DPO's train_dpo.py and pope_eval.py, LLaVA's train.py, and the training notes'
train_dpo_post.py and replace_bin.py. A flag of ours with the same meaning is not listed: it passes.
The others are in TABLE, which docs/training.md shows. A value that would make another result is
refused with the reason. The originals' defaults are not taken over: what a command leaves out is as
train.py says.
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass

from checkpoints.layouts import TRAINED_FILE
from checkpoints.load import is_trained, read_config
from support.command_line import first_process
from support.common import InputError
from support.tensors import read_file

TRANSLATED, ALWAYS, NO_EFFECT = "translated", "always so", "no effect"
TRUTHS = dict.fromkeys(("true", "yes", "t", "y", "1"), True)
TRUTHS |= dict.fromkeys(("false", "no", "f", "n", "0"), False)


@dataclass(frozen=True)
class Original:
    """A flag of the originals. `here` is what it is here or, of a value besides `only`, why not."""
    flag: str
    kind: str
    here: str
    only: tuple = ()            # the values that are taken; () = all


TABLE = (
    # What is trained
    Original("--lora_enable", TRANSLATED, "True is --tune lora, False no LoRA"),
    Original("--freeze_backbone", TRANSLATED, "True: only what --tune_… or LoRA name is trained"),
    Original("--tune_post_decoder", TRANSLATED, "True is --tune post_decoder"),
    Original("--tune_lm_head", TRANSLATED, "True is --tune lm_head"),
    Original("--tune_llm_head", TRANSLATED, "True is --tune lm_head"),
    Original("--tune_mm_mlp_adapter", TRANSLATED, "True is --tune projector"),
    Original("--freeze_mm_mlp_adapter", TRANSLATED, "True leaves projector out of --tune"),
    Original("--mm_projector_lr", TRANSLATED, "0 leaves projector out of --tune"),
    Original("--pretrain_mm_mlp_adapter", TRANSLATED,
             "the base's own mm_projector.bin, or refused"),
    Original("--warmup_steps", TRANSLATED, "0 is --warmup_ratio 0; say --warmup_ratio for others",
             ("0",)),
    Original("--save_strategy", TRANSLATED, "no leaves --save_steps out; states are saved by steps",
             ("steps", "no")),
    # What cannot be otherwise
    Original("--version", ALWAYS, "another template is not built", ("v1",)),
    Original("--mm_projector_type", ALWAYS, "another projector is not built", ("mlp2x_gelu",)),
    Original("--mm_vision_select_layer", ALWAYS, "the base's config.json says it"),
    Original("--mm_vision_select_feature", ALWAYS, "only patches are read", ("patch",)),
    Original("--mm_use_im_start_end", ALWAYS, "no tokens stand around the image", ("False",)),
    Original("--mm_use_im_patch_token", ALWAYS, "the vocabulary never grows", ("False",)),
    Original("--image_aspect_ratio", ALWAYS, "the base's config.json says it"),
    Original("--is_multimodal", ALWAYS, "images are always seen", ("True",)),
    Original("--lora_bias", ALWAYS, "LoRA trains no biases", ("none",)),
    Original("--lora_weight_path", ALWAYS, "LoRA starts anew; merge the old one first, with "
             "python -m tools.merge", ("",)),
    Original("--lr_scheduler_type", ALWAYS, "another schedule is not built", ("cosine",)),
    Original("--optim", ALWAYS, "another optimizer is not built",
             ("adamw_torch", "adamw_torch_fused")),
    Original("--optimizer_type", ALWAYS, "another optimizer is not built",
             ("adamw_torch", "adamw_torch_fused")),
    Original("--max_grad_norm", ALWAYS, "say gradient_clipping in the DeepSpeed file", ("1.0",)),
    Original("--fp16", ALWAYS, "fp16 is not built; say --bf16", ("False",)),
    Original("--double_quant", ALWAYS, "the scales of 4 bits are quantised too", ("True",)),
    Original("--quant_type", ALWAYS, "4 bits are NF4", ("nf4",)),
    Original("--fsdp", ALWAYS, "say --deepspeed ds_zero3.json", ("",)),
    Original("--lazy_preprocess", ALWAYS, "rows are always read one by one"),
    # What changes no result
    Original("--group_by_modality_length", NO_EFFECT, "a batch is sorted in itself"),
    Original("--model_max_length", NO_EFFECT, "the base's config.json says it"),
    Original("--max_length", NO_EFFECT, "the base's config.json says it"),
    Original("--max_prompt_length", NO_EFFECT, "a prompt is never cut"),
    Original("--evaluation_strategy", NO_EFFECT, "eval_pope.py evaluates afterwards"),
    Original("--eval_strategy", NO_EFFECT, "eval_pope.py evaluates afterwards"),
    Original("--eval_steps", NO_EFFECT, "eval_pope.py evaluates afterwards"),
    Original("--per_device_eval_batch_size", NO_EFFECT, "eval_pope.py evaluates afterwards"),
    Original("--save_total_limit", NO_EFFECT, "only the last state is kept"),
    Original("--tf32", NO_EFFECT, "torch decides"),
    Original("--cache_dir", NO_EFFECT, "HF_HOME names the cache"),
    Original("--remove_unused_columns", NO_EFFECT, "there is no HF Trainer"),
    Original("--ddp_find_unused_parameters", NO_EFFECT, "there is no HF Trainer"),
    Original("--ignore_bias_buffers", NO_EFFECT, "there is no HF Trainer"),
    Original("--log_freq", NO_EFFECT, "say --logging_steps"),
    Original("--mpt_attn_impl", NO_EFFECT, "there is no MPT"),
)
KNOWN = {row.flag: row for row in TABLE}
# Flags of ours that the originals spell with a truth, and numbers that mean "not given" there.
SWITCHES = {"--bf16": ("--bf16", "--no-bf16"),
            "--gradient_checkpointing": ("--gradient_checkpointing", None)}
NOT_GIVEN = {"--max_steps": "-1", "--save_steps": "-1"}
TUNES = {"--tune_post_decoder": "post_decoder", "--tune_lm_head": "lm_head",
         "--tune_llm_head": "lm_head", "--tune_mm_mlp_adapter": "projector"}


# ---- train.py ------------------------------------------------------------------------------------


def train_arguments(argv):
    """A command line of an original → the same of train.py. What was translated is said in a line.

    InputError for what would not be the same.
    """
    typed, rest = taken(argv)
    for flag, value in typed.items():
        row = KNOWN[flag]
        if row.only and not any(same(value, only) for only in row.only):
            takes = " or ".join(only or '""' for only in row.only)
            raise InputError(f"{flag} {value}: {row.here}; only {takes} is taken here")
    ours = trained_groups(typed, rest)
    refuse_other_settings(typed, value_of(rest, "--model_name_or_path"))
    if typed and value_of(rest, "--data_path") and not value_of(rest, "--loss"):
        ours += ["--loss", "sft"]
    if "--warmup_steps" in typed and not value_of(rest, "--warmup_ratio"):
        ours += ["--warmup_ratio", "0"]
    for flag, value in NOT_GIVEN.items() if typed else ():
        rest = without(rest, flag) if same(value_of(rest, flag), value) else rest
    if typed.get("--save_strategy") == "no":
        rest = without(rest, "--save_steps")
    if typed.get("--lora_enable") and not is_true(typed, "--lora_enable"):
        rest = without(rest, "--lora_r", "--lora_alpha", "--lora_dropout")
    if typed and first_process():
        print(told(typed, ours), flush=True)
    return ours + rest


def taken(argv):
    """{flag of TABLE: its value}, and the other words, with switches in our way."""
    typed, rest, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        follows = not equals and bool(words) and not words[0].startswith("--")
        behind = value if equals else words[0] if follows else None
        if flag in KNOWN:
            typed[flag] = "True" if behind is None else behind      # as HfArgumentParser does
        elif flag in SWITCHES and behind is not None and behind.lower() in TRUTHS:
            switch = SWITCHES[flag][0 if TRUTHS[behind.lower()] else 1]
            rest += [switch] if switch else []
        else:
            rest.append(word)
            continue
        if follows:
            words.pop(0)
    return typed, rest


def trained_groups(typed, rest):
    """--tune as the originals' flags say it together; [] where they say nothing of it."""
    def refuse(when, text):
        if when:
            raise InputError(text)

    lora, backbone = is_true(typed, "--lora_enable"), typed.get("--freeze_backbone")
    picked = list(dict.fromkeys(group for flag, group in TUNES.items() if is_true(typed, flag)))
    ours = next((flag for flag in ("--stage", "--tune") if value_of(rest, flag)), None)
    if ours:
        twice = "--lora_enable" if lora else next((f for f in TUNES if is_true(typed, f)), None)
        refuse(twice, f"{twice} True: {ours} says already what is trained; leave one of them out")
        return []
    rate, general = typed.get("--mm_projector_lr"), value_of(rest, "--learning_rate")
    fixed = is_true(typed, "--freeze_mm_mlp_adapter") or same(rate, "0")
    if lora:
        refuse(not fixed or "projector" in picked,
               "--lora_enable True: there the projector is trained beside LoRA, which is not built "
               "here; --mm_projector_lr 0 leaves it as it is, as in HA-DPO")
        picked = ["lora", *picked]
    elif picked and picked != ["projector"]:
        refuse(not same(backbone, "True"),
               f"--freeze_backbone {backbone or 'False'}: there LLaMA would be trained beside "
               f"{', '.join(picked)}; say --freeze_backbone True, or name all groups with --tune")
    elif not picked:
        refuse(same(backbone, "True"), "--freeze_backbone True: nothing is left to train; add "
               "--lora_enable True, --tune_post_decoder True or --tune_lm_head True")
        refuse(same(backbone, "False"), "--freeze_backbone False without LoRA: trains all of "
               "LLaMA; if you mean that, say --tune projector,llama,lm_head")
        if "--version" not in typed:        # not a whole command of theirs, so ours counts
            return []
        picked = ["llama", "lm_head"] if fixed else ["projector", "llama", "lm_head"]
    refuse(rate and "projector" in picked and not same(rate, general),
           f"--mm_projector_lr {rate}: one learning rate counts for all that is trained; say the "
           "same as --learning_rate, or leave it out")
    return ["--tune", ",".join(picked)]


def refuse_other_settings(typed, base):
    """InputError for settings of the base that its config.json says otherwise."""
    adapter = typed.get("--pretrain_mm_mlp_adapter")
    if adapter:
        own = os.path.join(base or "", "mm_projector.bin")
        if not base or os.path.realpath(adapter) != os.path.realpath(own):
            raise InputError(f"--pretrain_mm_mlp_adapter {adapter}: a projector is read from the "
                             f"base's folder; copy it to {own}, and leave this flag out")
    layer, ratio = -2, "pad"                        # the tiny world's, and LLaVA-1.5's
    if base and os.path.isdir(base):
        values = read_config(base)
        layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
        ratio = values.get("image_aspect_ratio") or ("pad" if "text_config" in values else "square")
    for flag, own in (("--mm_vision_select_layer", layer), ("--image_aspect_ratio", ratio)):
        if flag in typed and not same(typed[flag], str(own)):
            raise InputError(f"{flag} {typed[flag]}: the base was trained with {own} (its "
                             "config.json says so), which is not changed here; leave it out")


def told(typed, ours):
    """What was made of the flags, in one line."""
    parts, words = [], dict.fromkeys((TRANSLATED, ALWAYS, NO_EFFECT), "")
    for kind in words:
        names = [f"{flag} {value}".strip() for flag, value in typed.items()
                 if KNOWN[flag].kind == kind]
        words[kind] = ", ".join(names)
    if words[TRANSLATED]:
        parts.append(f"{words[TRANSLATED]} → {' '.join(ours) or 'nothing'}")
    if words[ALWAYS]:
        parts.append(f"always so here: {words[ALWAYS]}")
    if words[NO_EFFECT]:
        parts.append(f"without effect here: {words[NO_EFFECT]}")
    return f"original flags: {'; '.join(parts)}"


# ---- eval_pope.py and tools.merge ----------------------------------------------------------------


def pope_arguments(argv=None):
    """pope_eval.py's --model-path and --model-base → CKPT and --model_name_or_path."""
    first, rest, words = [], [], list(sys.argv[1:] if argv is None else argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag in ("--load-8bit", "--load-4bit"):
            raise InputError(f"{flag}: quantised weights are not built here; leave it out")
        if flag not in ("--model-path", "--model-base"):
            rest.append(flag + equals + value)
            continue
        if not equals and not words:
            raise InputError(f"{flag}: names no folder")
        value = value if equals else words.pop(0)
        if flag == "--model-path":
            first.append(value)
        else:
            rest += ["--model_name_or_path", value]
    return first + rest


def merge_arguments(argv):
    """replace_bin.py's arguments → CKPT, OUT and the base. The original writes into the base's own
    file; here the whole model gets a new folder beside the base, whose name is printed.
    """
    flags = "--tune_stage", "--path_model_state_dict", "--path_non_lora_state_dict"
    if not any(word.partition("=")[0] in flags for word in argv):
        return argv
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(flags[0], type=int, choices=(1, 2), default=1)
    for flag in flags[1:]:
        parser.add_argument(flag, required=True)
    args, rest = parser.parse_known_args(argv)
    base, trained = os.path.dirname(args.path_model_state_dict), args.path_non_lora_state_dict
    file, folder = trained, os.path.dirname(trained)
    if not os.path.isfile(trained) and os.path.isdir(folder) and is_trained(folder):
        trained, file = folder, os.path.join(folder, TRAINED_FILE)      # a run of ours left that
    with_head = "lm_head.weight" in read_file(file)
    if with_head != (args.tune_stage == 2):
        cure = "2, which also takes it" if with_head else "1, which needs none"
        raise InputError(f"--tune_stage {args.tune_stage}: {file} holds "
                         f"{'an' if with_head else 'no'} lm_head; say --tune_stage {cure}")
    output = f"{base}-stage{args.tune_stage}"
    print(f"{base} stays as it is; the whole model will be {output}", flush=True)
    return [trained, output, "--model_name_or_path", base, *rest]


# ---- Words ---------------------------------------------------------------------------------------


def is_true(typed, flag):
    """InputError for a value that is neither true nor false."""
    value = typed.get(flag, "False")
    if value.lower() not in TRUTHS:
        raise InputError(f"{flag} {value}: must be True or False")
    return TRUTHS[value.lower()]


def same(value, other):
    """Whether two words say the same: "1" and "1.0", "true" and "True"."""
    if value is None or other is None:
        return False
    if other in ("True", "False"):
        return TRUTHS.get(value.lower()) is (other == "True")
    return value == other or number(value) == number(other)         # nan equals nothing


def number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def value_of(words, flag):
    """What stands behind a flag, or None."""
    for n, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else next(iter(words[n + 1:n + 2]), None)
    return None


def without(words, *flags):
    """The words without these flags and what stands behind them."""
    left, n = [], 0
    while n < len(words):
        name, equals, _ = words[n].partition("=")
        if name in flags:
            n += 1 if equals else 2
        else:
            left.append(words[n])
            n += 1
    return left
