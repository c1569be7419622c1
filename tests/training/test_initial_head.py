"""Which block a run trains: what --block, --init and the base say together, and what is recorded.
"""
import argparse
import json
import os
import shutil

import pytest
import torch
from conftest import dpo_flags, load_json, run_train, shake
from short_runs import trained_tensors

from checkpoints.load import load_base, load_trained
from checkpoints.save import save_base, save_trained
from model import Head
from post_decoder import ORIGINAL, VARIANTS
from support.common import InputError
from training import features
from training.flags import parse_flags


@pytest.fixture(scope="module")
def brought(world, tmp_path_factory):
    """Checkpoints, a base and the notes' files that bring a block along, and two without one."""
    folder = tmp_path_factory.mktemp("brought")
    base = load_base(world.base)

    def save(name, variant):
        head = Head(base.config, base.config.block_config(**VARIANTS[variant]))
        shake(head)
        info = {"base": world.base, "fingerprint": base.fingerprint,
                "block": vars(head.block_config)}
        save_trained(str(folder / name), dict(head.named_parameters()), info, base.tokenizer)
        return head

    save("self_attn", "self_attn")
    head = save("stage1", "no_cross_attn")
    lm_head = {"lm_head.weight": head.lm_head.weight}
    info = {"base": world.base, "fingerprint": base.fingerprint, "block": None}
    save_trained(str(folder / "lm_head"), lm_head, info, base.tokenizer)
    own = Head(base.config, base.config.block_config(**ORIGINAL))
    for name, of_notes in (("notes", own), ("notes_no_cross_attn", head)):
        os.makedirs(folder / name)
        torch.save(of_notes.state_dict(), folder / name / "non_lora_trainables.bin")
    os.makedirs(folder / "notes_lm_head")
    torch.save(lm_head, folder / "notes_lm_head" / "non_lora_trainables.bin")
    base.heads = {"whole": head}
    save_base(str(folder / "whole"), base)
    return folder


def run(world, folder, *flags, base=None):
    """One step → what config.json says, the tensors that were saved."""
    named = dpo_flags(world) if base is None else ["--model_name_or_path", base,
                                                   *dpo_flags(world)[2:]]
    run_train(*flags, "--max_steps", 1, "--learning_rate", 1e-2, "--keep_correct",
              "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
              "--output_dir", folder, *named)
    return load_json(f"{folder}/config.json"), trained_tensors(folder)


def variant_in(config):
    """What a config.json's BlockConfig is called."""
    default = {"attention": "cross", "align": "mlp", "image_source": "clip",
               "outer_residual": False, "zero_init": True}
    said = {part: config["block"][part] for part in default}
    named = VARIANTS | {"original": ORIGINAL}
    return next(name for name, changes in named.items() if default | changes == said)


# ---- Conflicts -----------------------------------------------------------------------------------


CONFLICTS = {       # flags, where FOLDER has what is brought; what is said
    "--init": (["--stage", "2", "--init", "FOLDER/self_attn", "--block", "full"],
               ("--block full", "--init FOLDER/self_attn", "self_attn", "--init identity")),
    "--init, no block wanted": (["--stage", "2", "--init", "FOLDER/self_attn", "--block", "head"],
                                ("--block head", "self_attn", "--init identity")),
    "the base": (["--stage", "1", "--block", "full", "--model_name_or_path", "FOLDER/whole"],
                 ("--block full", "the base FOLDER/whole", "no_cross_attn", "another base")),
    "the base, LoRA": (["--lora_r", "4", "--block", "self_attn", "--model_name_or_path",
                        "FOLDER/whole"], ("--block self_attn", "the base FOLDER/whole")),
    "a sweep": (["--stage", "2", "--block", "full,self_attn", "--init", "FOLDER/self_attn"],
                ("--block names 2", "--init FOLDER/self_attn", "--init identity")),
    "a sweep on a base": (["--stage", "1", "--block", "full,self_attn", "--model_name_or_path",
                           "FOLDER/whole"], ("--block names 2", "the base FOLDER/whole")),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_two_blocks_are_one_too_many(world, brought, what):
    """Both are named, before anything is read, and what to do."""
    flags, said = CONFLICTS[what]
    flags = [flag.replace("FOLDER", str(brought)) for flag in [*dpo_flags(world), *flags]]
    with pytest.raises(InputError) as error:
        parse_flags(flags)
    print(error.value)
    for part in said:
        assert part.replace("FOLDER", str(brought)) in str(error.value)


@pytest.mark.parametrize("cached", (True, False))
def test_the_notes_file_is_asked_too(world, brought, tmp_path, monkeypatch, in_this_process,
                                     cached):
    """Its block follows from its tensors, so it is known only where the base is; but before the
    trunk is read."""
    monkeypatch.setattr(features, "load_weights", lambda trunk: pytest.fail("the trunk is read"))
    more = ["--cache_features", tmp_path / "features"] if cached else []
    for block in ("full", "head"):
        said = f"--block {block}: --init .*notes brings a block of its own .original"
        with pytest.raises(InputError, match=said) as error:
            run(world, tmp_path / "out", "--stage", 2, "--init", brought / "notes", "--block",
                block, *more)
        print(error.value)
    assert not os.path.exists(tmp_path / "out.run") and not os.path.exists(tmp_path / "out")


# ---- No conflict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("init, typed", (("self_attn", "self_attn"), ("self_attn", None),
                                         ("notes", "original"), ("notes", None)))
def test_the_same_block_may_be_named(world, brought, tmp_path, in_this_process, init, typed):
    flags = ["--block", typed] if typed else []
    config, tensors = run(world, tmp_path / "out", "--stage", 2, "--init", brought / init, *flags)
    variant = "self_attn" if init == "self_attn" else "original"
    assert variant_in(config) == variant
    assert config["arguments"].get("block", variant) == variant
    if typed or init == "self_attn":
        assert config["arguments"]["block"] == variant
    assert ("blocks.0.self_attn.q_proj.weight" in str(list(tensors))) is (init == "self_attn")


def test_an_ablation_of_the_notes_has_no_name(world, brought, tmp_path, in_this_process):
    """It has the outer residual, which no block that --block can make has but the original."""
    flags = ["--stage", 2, "--init", brought / "notes_no_cross_attn"]
    with pytest.raises(InputError, match="--block no_cross_attn: .*none of the names of --block"):
        run(world, tmp_path / "typed", *flags, "--block", "no_cross_attn")
    config, _ = run(world, tmp_path / "silent", *flags)
    assert (config["block"]["attention"], config["block"]["outer_residual"]) == ("none", True)
    assert "block" not in config["arguments"]


def test_the_bases_own_block(world, brought, tmp_path, in_this_process):
    """It is trained, and recorded under its name, typed or not."""
    base = brought / "whole"
    before = trained_tensors(base, "model.safetensors")
    for name, flags in (("silent", []), ("typed", ["--block", "no_cross_attn"])):
        config, tensors = run(world, tmp_path / name, "--stage", 1, *flags, base=base)
        assert config["arguments"]["block"] == variant_in(config) == "no_cross_attn"
        key = "post_interaction_block.blocks.0.mlp.fc2.weight"
        assert tensors[key].shape == before[key].shape
        assert 0 < (tensors[key] - before[key]).abs().max() < 0.1               # it started there


def test_a_block_that_is_not_trained_is_recorded_all_the_same(world, brought, tmp_path,
                                                              in_this_process):
    """--tune lm_head over a checkpoint with a block: the block stays, and config.json says so."""
    before = trained_tensors(brought / "self_attn")
    config, tensors = run(world, tmp_path / "out", "--tune", "lm_head", "--init",
                          brought / "self_attn")
    assert config["arguments"]["block"] == variant_in(config) == "self_attn"
    for key, tensor in tensors.items():
        assert torch.equal(tensor, before[key]) is (key != "lm_head.weight"), key


# ---- Nothing was brought -------------------------------------------------------------------------


@pytest.mark.parametrize("init", ("lm_head", "notes_lm_head"))
@pytest.mark.parametrize("typed, variant", ((None, "full"), ("align_linear", "align_linear")))
def test_a_block_is_made_where_it_is_tuned(world, brought, tmp_path, capsys, in_this_process,
                                           init, typed, variant):
    """Stage 2 from a checkpoint that holds only an lm_head trains a block, as it says."""
    flags = ["--block", typed] if typed else []
    config, tensors = run(world, tmp_path / "out", "--stage", 2, "--init", brought / init, *flags)
    assert config["arguments"]["block"] == variant_in(config) == variant
    blocks = {key: tensor for key, tensor in tensors.items() if key.startswith("post_")}
    assert blocks and all(tensor.isfinite().all() for tensor in blocks.values())
    assert "an identity block" in capsys.readouterr().out
    # The first step moves what is zero in an identity block, and lm_head from where it was.
    assert blocks["post_interaction_block.blocks.0.mlp.fc2.weight"].any()
    before = trained_tensors(brought / "lm_head")["lm_head.weight"]
    assert 0 < (tensors["lm_head.weight"] - before).abs().max() < 0.1
    base = load_base(world.base)
    assert load_trained(str(tmp_path / "out"), base).block_config is not None


def test_a_block_is_made_from_kept_features(world, brought, tmp_path, in_this_process):
    """The features that are kept are those of the block that is made, and losses are equal."""
    flags = ["--stage", 2, "--init", brought / "lm_head", "--block", "align_after_align"]
    _, loop = run(world, tmp_path / "loop", *flags)
    _, kept = run(world, tmp_path / "kept", *flags, "--cache_features", tmp_path / "features")
    assert any(key.startswith("post_interaction_block.") for key in loop)
    for key in loop:
        assert (loop[key] - kept[key]).abs().max() < 1e-3, key


def test_no_block_where_none_is_wanted(world, brought, tmp_path, in_this_process):
    config, tensors = run(world, tmp_path / "out", "--stage", 2, "--init", brought / "lm_head",
                          "--block", "head")
    assert config["block"] is None and config["arguments"]["block"] == "head"
    assert list(tensors) == ["lm_head.weight"]


def test_blocks_are_swept_over_an_lm_head(world, brought, tmp_path, in_this_process):
    """Where --init brings no block, several can be tried on top of it."""
    flags = ["--stage", 2, "--init", brought / "lm_head", "--block", "full,no_cross_attn"]
    args = parse_flags([*map(str, flags), *dpo_flags(world)])
    assert args.block == ["full", "no_cross_attn"]
    run_train(*flags, "--max_steps", 1, "--keep_correct", "--per_device_train_batch_size", 8,
              "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "out",
              *dpo_flags(world))
    for variant in ("full", "no_cross_attn"):
        assert variant_in(load_json(tmp_path / f"out-{variant}" / "config.json")) == variant


def test_what_is_no_block_at_all(world, brought, tmp_path):
    """A config.json whose block is damaged is named, and nothing is traced back."""
    for n, damaged in enumerate((5, {"attention": "cross", "depht": 1}, ["full"])):
        folder = tmp_path / str(n)
        shutil.copytree(brought / "self_attn", folder)
        config = load_json(folder / "config.json") | {"block": damaged}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"{folder}/config.json.*block"):
            parse_flags(["--stage", "2", "--init", str(folder), *dpo_flags(world)])


def test_the_defaults_are_as_they_were(world):
    for flags, block in (([], ["full"]), (["--stage", "1"], ["full"]), (["--stage", "0"], ["head"]),
                         (["--lora_r", "8"], ["head"]), (["--tune", "lm_head"], ["head"]),
                         (["--lora_r", "8", "--block", "full"], ["full"]),
                         (["--stage", "2", "--block", "head,full"], ["head", "full"])):
        args = parse_flags(flags)
        assert isinstance(args, argparse.Namespace) and args.block == block


def test_nothing_to_train_is_refused(world, brought):
    """Also over the notes' file, of which nobody knows yet what it brings."""
    for init in ("identity", "lm_head", "notes_lm_head"):
        named = init if init == "identity" else str(brought / init)
        with pytest.raises(InputError, match="--block head leaves nothing to train"):
            parse_flags(["--stage", "1", "--block", "head", "--init", named, *dpo_flags(world)])
