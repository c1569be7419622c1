"""Numbers that cannot be, in every program; too many processes; what is printed to be typed."""
import argparse
import os
import shlex
import sys

import pytest
import torch
from conftest import dpo_flags
from programs import ROOT, succeeds

import eval_pope
import tools.chat
import tools.explain
import tools.report
from support import common
from support.common import InputError
from tiny.prepare import check_sizes
from training.flags import declare_flags, parse_flags

# ---- Numbers -------------------------------------------------------------------------------------


OF_TRAIN = {        # flag: values that it refuses
    "--seed": ("-1", "1.5", "many", str(2 ** 64)),
    "--beta": ("0", "-0.1", "nan", "inf"),
    "--label_smoothing": ("-0.1", "0.5", "nan"),
    "--sft_weight": ("-1", "nan", "inf"),
    "--lora_r": ("0", "-8", "4.5"),
    "--lora_alpha": ("0", "-1", "nan"),
    "--lora_dropout": ("1.5", "1", "-0.1", "nan"),
    "--learning_rate": ("0", "-1e-6", "nan", "inf"),
    "--num_train_epochs": ("0", "nan", "inf"),
    "--max_steps": ("0", "-1", "2.5"),
    "--per_device_train_batch_size": ("0", "-4"),
    "--gradient_accumulation_steps": ("0", "-1"),
    "--warmup_ratio": ("3", "-0.5", "nan"),
    "--weight_decay": ("-1", "nan", "inf"),
    "--save_steps": ("0", "-5"),
    "--logging_steps": ("0", "-5"),
    "--dataloader_num_workers": ("-1", "0.5"),
    "--tiny_base_steps": ("0", "-1"),
}


@pytest.mark.parametrize("flag, value", [(flag, v) for flag, values in OF_TRAIN.items()
                                         for v in values])
def test_numbers_of_train(flag, value):
    """One line with the flag, the value as it was typed, and the range."""
    lora = ["--lora_r", "4"] if flag in ("--lora_alpha", "--lora_dropout") else []
    with pytest.raises(InputError) as error:
        parse_flags([*lora, f"{flag}={value}"])
    print(error.value)
    assert f"{flag} {value}: must be " in str(error.value) and "\n" not in str(error.value)


def test_numbers_at_the_ends_of_their_ranges():
    args = parse_flags(["--seed", "0", "--warmup_ratio", "1", "--weight_decay", "0",
                        "--lora_r", "1", "--lora_dropout", "0", "--dataloader_num_workers", "0",
                        "--learning_rate", "1e-6", "5", "--sft_weight", "0"])
    assert (args.seed, args.warmup_ratio, args.weight_decay, args.lora_dropout) == (0, 1, 0, 0)
    assert args.learning_rate == [1e-6, 5] and args.dataloader_num_workers == 0
    assert parse_flags(["--label_smoothing", "0.49", "--seed", str(2 ** 63 - 1)]).seed == 2**63 - 1


OTHERS = [          # program, its command line, what must be said
    (eval_pope, "CKPT --max_new_tokens 0", "--max_new_tokens 0: must be "),
    (eval_pope, "CKPT --max_new_tokens -1", "--max_new_tokens -1: must be "),
    (eval_pope, "CKPT --batch_size 0", "--batch_size 0: must be "),
    (eval_pope, "CKPT --batch_size many", "--batch_size many: must be "),
    (tools.report, "CKPT --output page.html --max_new_tokens 0", "--max_new_tokens 0: must be "),
    (tools.report, "CKPT --output page.html --batch_size -2", "--batch_size -2: must be "),
    (tools.chat, "CKPT --max_new_tokens 0", "--max_new_tokens 0: must be "),
    (tools.chat, "CKPT --num_beams 0", "--num_beams 0: must be "),
    (tools.chat, "CKPT --temperature nan", "--temperature nan: must be "),
    (tools.chat, "CKPT --repetition_penalty inf", "--repetition_penalty inf: must be "),
    (tools.chat, "CKPT --seed -1", "--seed -1: must be "),
    (tools.explain, "--pair -1", "--pair -1: must be "),
    (tools.explain, "--pair one", "--pair one: must be "),
]


@pytest.mark.parametrize("program, typed, said", OTHERS)
def test_numbers_of_the_other_programs(tmp_path, monkeypatch, program, typed, said):
    """Before anything is read: the checkpoint that is named is not even there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program.__name__, *typed.split()])
    with pytest.raises(InputError) as error:
        program.main()
    print(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("parser", (declare_flags(), eval_pope.flags(eval_pope.__doc__),
                                    tools.chat.flags()),
                         ids=("train", "eval_pope", "chat"))
def test_every_number_has_a_range(parser):
    """A flag that is added later must say which numbers it takes."""
    bare = [action.dest for action in parser._actions
            if action.type in (int, float) and not action.choices
            and action.help is not argparse.SUPPRESS]
    assert bare == []


@pytest.mark.parametrize("flag, value", (("--tiny_sizes", '{"sft": -1}'),
                                         ("--tiny_sizes", '{"stf": 8}'), ("--tiny_sizes", "[8]"),
                                         ("--tiny_sizes", "{8"), ("--tiny_tower", '{"epochs": 0}'),
                                         ("--tiny_tower", '{"images": "all"}')))
def test_sizes_of_the_tiny_world(flag, value):
    with pytest.raises(InputError) as error:
        check_sizes(parse_flags([flag, value]))
    print(error.value)
    assert flag in str(error.value) and "\n" not in str(error.value)


# ---- Processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", (("LOCAL_WORLD_SIZE",), ("LOCAL_SIZE",), ()))
@pytest.mark.parametrize("rank", (0, 3))
def test_more_processes_than_gpus(monkeypatch, names, rank):
    """torchrun and DeepSpeed's launcher tell how many processes there are under other names."""
    def fails(*args, device):
        if device in ("cuda:0", "cuda:1"):
            return torch.zeros(1)
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "ones", fails)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if not names and not rank:
        assert common.can_use_gpu()                 # one process of which we know nothing else
        return
    with pytest.raises(InputError) as error:
        common.can_use_gpu()
    print(error.value)
    assert "4 processes and 2 GPUs: start 2 (deepspeed --num_gpus 2" in str(error.value)
    assert "torch that is built" not in str(error.value)


# ---- What is printed to be typed -----------------------------------------------------------------


def test_the_last_line_can_be_typed(world, tmp_path):
    """Paths with spaces and quotes are one word each."""
    name = "my run, 'final'"
    said = succeeds("python", os.path.join(ROOT, "train.py"), "--stage", 1, "--max_steps", 1,
                    "--keep_correct", "--learning_rate", "1e-3", "2e-3", "--output_dir", name,
                    *dpo_flags(world), cwd=tmp_path)
    line, = (line for line in said.splitlines() if line.startswith("done; "))
    typed = shlex.split(line.partition(": ")[2].partition(" --coco_path")[0])
    assert typed == ["python", "eval_pope.py", f"{name}-0.001", f"{name}-0.002"]
    assert all(os.path.isdir(tmp_path / folder) for folder in typed[2:])
