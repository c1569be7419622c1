"""The original programs' commands, word for word, and their flags one by one.

The commands are HA-DPO's, LLaVA's and the training notes'; the paths are stand-ins.
"""
import os
import re
import shlex

import pytest
import torch
from conftest import dpo_flags, load_json
from programs import ROOT, shell, succeeds

import train
from checkpoints.load import load_base
from support.common import InputError
from support.tensors import read_file
from training.flags import parse_flags
from training.originals import (
    ALWAYS,
    KNOWN,
    TABLE,
    merge_arguments,
    pope_arguments,
    train_arguments,
)

# What all of the original training commands end with.
SAME = """--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True
    --bf16 True --output_dir OUT --num_train_epochs 1 --per_device_train_batch_size 1
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 16 --evaluation_strategy "no"
    --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-6
    --weight_decay 0. --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True"""
PAIRS = """--model_name_or_path BASE --version v1 --vg_path VG --desc_data_path DESC
    --pope_data_path PAIRS --warmup_steps 0 --beta 0.1"""
TALK = "--model_name_or_path BASE --version v1 --data_path TALK --image_folder IMAGES"
COMMANDS = {        # whose: (the command, what is trained, with which loss)
    "HA-DPO": (f"--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 0 {PAIRS} "
               f"{SAME} --report_to wandb --run_name llava-v1.5", ("lora",), "dpo"),
    "the notes, stage 1": (f"--lora_enable False {PAIRS} --freeze_backbone True "
                           "--tune_mm_mlp_adapter False --tune_post_decoder True "
                           f"--tune_lm_head False {SAME}", ("post_decoder",), "dpo"),
    "the notes, stage 2": (f"--lora_enable False {PAIRS} --freeze_backbone True "
                           "--tune_mm_mlp_adapter False --tune_post_decoder True "
                           f"--tune_lm_head True {SAME}", ("post_decoder", "lm_head"), "dpo"),
    "the notes, head": (f"--lora_enable False {PAIRS} --freeze_backbone True "
                        f"--tune_mm_mlp_adapter False --tune_lm_head True {SAME}",
                        ("lm_head",), "dpo"),
    "the notes, LLaVA's data": (f"{TALK} --freeze_backbone True --tune_post_decoder True "
                                "--freeze_mm_mlp_adapter True --tune_mm_mlp_adapter False "
                                f"--tune_llm_head False --warmup_ratio 0.03 {SAME}",
                                ("post_decoder",), "sft"),
    "LLaVA's finetune.sh": (f"{TALK} --warmup_ratio 0.03 {SAME}",
                            ("projector", "llama", "lm_head"), "sft"),
    "LLaVA's projector": (f"{TALK} --tune_mm_mlp_adapter True --warmup_ratio 0.03 {SAME}",
                          ("projector",), "sft"),
}


def words(command, world, output="out/original"):
    named = {"BASE": world.base, "VG": world.vg, "DESC": world.desc, "PAIRS": world.pairs,
             "TALK": world.llava, "IMAGES": world.images, "OUT": str(output)}
    return [named.get(word, word) for word in shlex.split(command)]


@pytest.fixture(autouse=True)
def padding(world):
    """The session's base pads its images, as LLaVA-1.5 does: else the commands would be refused."""
    assert load_json(f"{world.base}/config.json")["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize("whose", COMMANDS)
def test_the_original_commands(world, whose, capsys):
    """Each trains what the original trains, with its numbers; one line says what was translated."""
    command, tune, loss = COMMANDS[whose]
    args = parse_flags(words(command, world))
    assert set(args.tune) == set(tune) and args.loss == loss
    assert (args.bf16, args.gradient_checkpointing, args.learning_rate) == (True, True, [2e-6])
    assert (args.weight_decay, args.save_steps, args.beta) == (0, 50000, 0.1)
    assert args.warmup_ratio == (0 if loss == "dpo" else 0.03)
    assert "lora" not in tune or (args.lora_r, args.lora_alpha, args.lora_dropout) == (128, 256,
                                                                                       0.05)
    said, = (line for line in capsys.readouterr().out.splitlines() if "original flags" in line)
    for flag in {word for word in words(command, world) if word in KNOWN}:
        assert flag in said


def test_an_original_command_gives_the_same_run(world, tmp_path):
    """HA-DPO's command trains the very tensors that our own flags do."""
    ours = ["--lora_r", 4, "--lora_alpha", 8, "--learning_rate", "1e-3", "--max_steps", 2,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--keep_correct", "--gradient_checkpointing", "--no-bf16",
            "--output_dir", tmp_path / "ours", *dpo_flags(world)]
    theirs = words(f"--lora_enable True --lora_r 4 --lora_alpha 8 --mm_projector_lr 0 {PAIRS} "
                   f"{SAME} --keep_correct --learning_rate 1e-3 --max_steps 2 --bf16 False "
                   "--per_device_train_batch_size 2 --gradient_accumulation_steps 1", world,
                   tmp_path / "theirs")
    for flags in ours, theirs:
        succeeds("python", os.path.join(ROOT, "train.py"), *flags)
    name = "adapter_model.safetensors"
    first, second = (read_file(str(tmp_path / run / name)) for run in ("ours", "theirs"))
    assert first.keys() == second.keys() and len(first) > 10
    assert all(torch.equal(first[key].read(), second[key].read()) for key in first)


REFUSED = (     # what is typed beside HA-DPO's data, what must be said
    ("--mm_projector_type linear", "--mm_projector_type linear: another projector is not built"),
    ("--freeze_backbone False", "--freeze_backbone False without LoRA.*--tune projector,llama"),
    ("--freeze_backbone True", "nothing is left to train"),
    ("--tune_post_decoder True", "--freeze_backbone False: there LLaMA would be trained beside"),
    ("--lora_enable True", "the projector is trained beside LoRA.*--mm_projector_lr 0"),
    ("--lora_enable True --mm_projector_lr 2e-5", "the projector is trained beside LoRA"),
    ("--lora_enable maybe", "--lora_enable maybe: must be True or False"),
    ("--lora_enable True --stage 2", "--stage says already what is trained"),
    ("--tune_mm_mlp_adapter True --mm_projector_lr 2e-5 --learning_rate 1e-3", "one learning rate"),
    ("--pretrain_mm_mlp_adapter elsewhere/mm_projector.bin", "copy it to .*mm_projector.bin"),
    ("--version plain", "--version plain: another template"),
    ("--warmup_steps 100", "say --warmup_ratio"),
    ("--save_strategy epoch", "states are saved by steps"),
    ("--mm_vision_select_layer -1", "the base was trained with -2"),
    ("--image_aspect_ratio square", "the base was trained with pad"),
    ("--mm_use_im_start_end True", "no tokens stand around"),
    ("--lr_scheduler_type linear", "another schedule"),
    ("--optim adafactor", "another optimizer"),
    ("--max_grad_norm 0.5", "gradient_clipping"),
    ("--fp16 True", "say --bf16"),
    ("--lora_weight_path old", "tools.merge"),
    ("--fsdp full_shard", "ds_zero3.json"),
)


@pytest.mark.parametrize("typed, said", REFUSED)
def test_what_would_not_be_the_same_is_refused(world, typed, said):
    with pytest.raises(InputError, match=said) as error:
        parse_flags([*shlex.split(typed), *dpo_flags(world)])
    assert "\n" not in str(error.value)


def test_every_value_that_is_taken(world):
    """All values that the table names, each alone and in the forms that HfArgumentParser reads."""
    for row in TABLE:
        for only in row.only:
            assert train_arguments([row.flag, only]) is not None
            assert train_arguments([f"{row.flag}={only}"]) is not None
    assert train_arguments(["--tf32"]) == []
    assert train_arguments(["--fp16", "false", "--max_grad_norm", "1"]) == []
    assert train_arguments(["--tf32", "True", "--stage", "2"]) == ["--stage", "2"]


def test_our_own_commands_pass_untouched():
    for typed in ("--stage 2 --bf16", "--lora_r 128 --gradient_checkpointing --max_steps 5",
                  "--stage 1 --learning_rate 2e-7 5e-7 --no-bf16", "--tune projector --loss sft"):
        assert train_arguments(typed.split()) == typed.split()
    typed = "--tf32 True --max_steps -1 --stage 2 --save_steps -1"
    assert train_arguments(typed.split()) == ["--stage", "2"]
    assert train_arguments("--bf16 True --stage 2".split()) == ["--bf16", "--stage", "2"]
    assert train_arguments("--bf16=False --gradient_checkpointing False".split()) == ["--no-bf16"]


def test_no_flag_of_ours_is_in_the_table():
    ours = {name for action in train.parse_flags.__globals__["declare_flags"]()._actions
            for name in action.option_strings}
    assert not ours & set(KNOWN) and len(KNOWN) == len(TABLE)


# ---- The page ------------------------------------------------------------------------------------


def row_of_the_page(row):
    """A row of the table as docs/training.md has it."""
    values = " or ".join(f"`{only or chr(34) * 2}`" for only in row.only) or "any"
    return f"| `{row.flag}` | {row.kind} | {values} |"


@pytest.mark.parametrize("page", ("docs/training.md", "docs/zh/training.md"))
def test_the_page_shows_the_table(page):
    """Flag by flag and value by value, nothing more and nothing less; in English the words, too."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        text = file.read()
    kinds = {row.kind for row in TABLE}
    names = {"总是如此": ALWAYS, "翻译": "translated", "没有影响": "no effect", "任意": "any",
             " 或 ": " or "}
    lines = [line for line in text.splitlines() if re.match(r"\| `--\w+` \| [^|`]+ \| ", line)]
    for ours, theirs in names.items() if "zh" in page else ():
        lines = [line.replace(ours, theirs, 3) for line in lines]
    shown = [line for line in lines if line.split(" | ")[1] in kinds]
    assert [line[:len(row_of_the_page(row))] for line, row in zip(shown, TABLE, strict=True)] == [
        row_of_the_page(row) for row in TABLE]
    if "zh" not in page:
        assert [line.split(" | ")[3].removesuffix(" |") for line in shown] == [
            row.here for row in TABLE]


# ---- eval_pope.py and tools.merge ----------------------------------------------------------------


def test_pope_evals_arguments(world, tmp_path):
    typed = ("--coco_path COCO --pope_path POPE --model-path CKPT --model-base BASE --set adv")
    assert pope_arguments(typed.split()) == ("CKPT --coco_path COCO --pope_path POPE "
                                             "--model_name_or_path BASE --set adv").split()
    assert pope_arguments(["out/stage2", "--set=random"]) == ["out/stage2", "--set=random"]
    with pytest.raises(InputError, match="--load-4bit"):
        pope_arguments(["--load-4bit"])
    said = succeeds("python", os.path.join(ROOT, "eval_pope.py"), "--coco_path", world.coco,
                    "--pope_path", world.pope, "--model-path", world.base, "--set", "adv",
                    "--max_new_tokens", 2, "--output_dir", tmp_path)
    assert "adversarial (labels" in said and "random (labels" not in said


def test_replace_bins_arguments(world, tmp_path):
    """The notes' merge after a run: the base stays, and the new folder holds base and head."""
    base, run = str(tmp_path / "base"), tmp_path / "run"
    os.symlink(world.base, base)
    os.makedirs(run)
    head = torch.randn_like(load_base(world.base).head.lm_head.weight)
    torch.save({"lm_head.weight": head}, run / "non_lora_trainables.bin")
    typed = ["--tune_stage", "2", "--path_model_state_dict", f"{base}/pytorch_model-00002.bin",
             "--path_non_lora_state_dict", f"{run}/non_lora_trainables.bin"]
    succeeds("python", "-m", "tools.merge", *typed)
    assert torch.equal(load_base(f"{base}-stage2").head.lm_head.weight, head)
    typed[1] = "1"
    with pytest.raises(InputError, match="--tune_stage 1: .* holds an lm_head; say --tune_stage 2"):
        merge_arguments(typed)
    again = shell("python", "-m", "tools.merge", "--tune_stage", "2", *typed[2:])
    assert again.returncode == 1 and "exists already" in again.stderr
    assert merge_arguments(["out/stage2", "whole"]) == ["out/stage2", "whole"]
