"""train.py's flags: what is refused before anything is made or loaded, and what is filled in."""
import pytest
from conftest import dpo_flags

from checkpoints.load import load_base
from checkpoints.save import save_trained
from support.common import InputError
from training.flags import parse_flags


def test_flags_that_cannot_be(world, tmp_path):
    """Numbers that mean nothing, files without the model that they are for, no base at all."""
    base, trained = load_base(world.base), str(tmp_path / "one")
    save_trained(trained, {"lm_head.weight": base.head.lm_head.weight}, {}, base.tokenizer)
    files = dpo_flags(world)[2:]
    for flags, said in (
            (["--max_steps", "-1"], "--max_steps -1: must be above 0"),
            (["--num_train_epochs", "0"], "--num_train_epochs 0"),
            (["--learning_rate", "1e-6", "0"], "--learning_rate 0"),
            (["--logging_steps", "0"], "--logging_steps 0"),
            (["--save_steps", "-5"], "--save_steps -5"),
            (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
            (["--vg_path", world.vg],
             "--vg_path is given and --model_name_or_path is not.*tiny world"),
            ([*files, "--model_name_or_path", "liuhaotian/llava-v1.5-7b"],
             "llava-v1.5-7b: no such folder"),
            ([*files, "--model_name_or_path", trained], "one: is no whole model.*--init")):
        with pytest.raises(InputError, match=said):
            parse_flags(flags)


def test_sweeps_that_cannot_be(world):
    with pytest.raises(SystemExit):
        parse_flags(["--block", "full,nonsense"])
    for flags, said in ((["--stage", "1", "--block", "full,head"], "head"),
                        (["--block", "full,self_attn", "--init", f"{world.base}/none"], "none")):
        with pytest.raises(InputError, match=said):
            parse_flags(flags)


def test_combinations_that_cannot_be(world):
    for flags, said in (("--stage 1 --lora_r 8", "--stage 1"),
                        ("--stage 2 --tune lora", "--stage 2"),
                        ("--tune lora,llama", "beside lora"),
                        ("--tune post_decoder --lora_r 8", "does not name lora"),
                        ("--tune lm_head --block full", "add post_decoder"),
                        ("--tune post_decoder --block head", "nothing to train"),
                        ("--loss ipo --label_smoothing 0.1", "--label_smoothing")):
        with pytest.raises(InputError, match=said):
            parse_flags(flags.split())
    args = parse_flags(["--lora_r", "8"])
    assert (args.tune, args.block, args.loss) == (("lora",), ["head"], "dpo")
    assert (args.lora_alpha, args.lora_dropout) == (256, 0.05)
    assert parse_flags(["--lora_r", "8", *dpo_flags(world)]).learning_rate == [2e-6]
    assert parse_flags(["--lora_r", "8", "--block", "full"]).tune == ("post_decoder", "lora")
    assert parse_flags(["--tune", "lora"]).lora_r == 128
