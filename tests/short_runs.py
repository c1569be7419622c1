"""Short runs of train.py on the session's tiny world: modules, rows, flags, and what a run leaves.

    run_train(*five_steps(world, tmp_path, "run", 3, "--per_device_train_batch_size", 8))
    losses = [row["loss"] for row in logged(tmp_path / "run")]

KINDS are the ways to train that are interrupted and spoilt (test_resume.py, test_guards.py).
"""
import json
import os
from glob import glob

from conftest import dpo_flags, row_format, shake

from checkpoints.load import load_base
from data import PackedDataset
from model import Head
from post_decoder import VARIANTS
from support.tensors import read_file
from training.conversations import read_llava

# Rows of the preference data: question pairs, and (from 144 on) a description.
SOME = [5, 17, 2, 40, 41, 90, 146]
STEPS, GLOBAL_BATCH = 5, 8            # of `five_steps`
INTERRUPTED_STEPS = 8                 # of `flags_of`
KINDS = {  # what is trained → flags
    "kept features": ["--stage", 2, "--init", "identity", "--cache_features", "FEATURES"],
    "LoRA with dropout": ["--lora_r", 4, "--lora_dropout", 0.3, "--gradient_checkpointing"],
    "the trunk by DPO": ["--tune", "projector,llama"],
    "ZeRO-1": ["--stage", 1, "--deepspeed", "ZERO1"],
    "ZeRO-2, offload": ["--stage", 1, "--deepspeed", "ZERO2", "--offload"],
    "ZeRO-0, bf16": ["--stage", 2, "--init", "identity", "--bf16"],
    "ZeRO-3, bf16, LoRA": ["--lora_r", 4, "--deepspeed", "ZERO3"],
}


# ---- Modules and rows ----------------------------------------------------------------------------


def base_and_head(world, variant="full", zero_init=True):
    """The session's base (a Llava), and a head with a block whose `lm_head` is the base's own."""
    base = load_base(world.base)
    block_config = None
    if variant:
        block_config = base.config.block_config(**VARIANTS[variant], zero_init=zero_init)
    head = Head(base.config, block_config)
    if not zero_init:
        shake(head)
    head.lm_head = base.head.lm_head
    return base, head


def conversation_rows(world, base):
    """The session world's conversations as a dataset."""
    examples = read_llava(world.llava, world.images)
    return PackedDataset(examples, row_format(base.config, base.tokenizer))


# ---- Flags ---------------------------------------------------------------------------------------


def zero_file(folder, stage, name=None, **more):
    """A DeepSpeed configuration with a global batch of eight → its path."""
    path = f"{folder}/{name or f'zero{stage}'}.json"
    config = {"train_batch_size": GLOBAL_BATCH, "zero_optimization": {"stage": stage}, **more}
    with open(path, "w") as file:
        json.dump(config, file)
    return path


def five_steps(world, folder, name, zero_stage, *flags, **more):
    """Flags of a stage-2 run of five steps with a DeepSpeed file of its own."""
    return ["--stage", 2, "--deepspeed", zero_file(folder, zero_stage, name, **more),
            "--output_dir", folder / name, "--max_steps", STEPS, "--learning_rate", 1e-2,
            "--keep_correct", *flags, *dpo_flags(world)]


def llava_flags(world):
    return ["--loss", "sft", "--data_path", world.llava, "--image_folder", world.images,
            "--model_name_or_path", world.base]


def flags_of(world, kind, output_dir, *more):
    """Flags of a run of eight steps. Features and DeepSpeed files lie beside its folder."""
    folder = os.path.dirname(output_dir)
    named = {"FEATURES": f"{folder}/features", "ZERO1": zero_file(folder, 1),
             "ZERO2": zero_file(folder, 2), "ZERO3": zero_file(folder, 3, bf16={"enabled": True})}
    flags = [*KINDS[kind], "--max_steps", INTERRUPTED_STEPS, "--learning_rate", "1e-2",
             "--per_device_train_batch_size", 4, "--keep_correct", "--output_dir", output_dir,
             *dpo_flags(world)]
    if "--deepspeed" not in flags:
        flags += ["--gradient_accumulation_steps", 2]
    return [str(named.get(flag, flag)) for flag in [*flags, *more]]


# ---- What a run leaves ---------------------------------------------------------------------------


def logged(folder):
    """metrics.jsonl → [{metric: value}], a row a step."""
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def losses_of(folder):
    return [row["loss"] for row in logged(folder)]


def steps_logged(folder):
    return [row["step"] for row in logged(folder)]


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def result(folder):
    """{name: bytes} of the tensors that a run left."""
    return {os.path.basename(path): read_bytes(path) for path in glob(f"{folder}/*.safetensors")}


def trained_tensors(folder, name="trained.safetensors"):
    """{public name: tensor} of one file that a run left."""
    return {key: lazy.read() for key, lazy in read_file(f"{folder}/{name}").items()}
