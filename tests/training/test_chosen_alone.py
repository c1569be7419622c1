"""--loss sft on HA-DPO's files, and new blocks of --block original and --block_intermediate_size.
"""
import json
import math

import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, run_train
from short_runs import logged, trained_tensors

from checkpoints.load import load_base, load_trained
from data import PackedDataset, read_hadpo
from dpo import CHOSEN, Loss, Objective
from support.common import InputError
from training.batches import ResumableSampler, Share
from training.flags import parse_flags

BATCH = 64          # of about 150 rows, so that questions and descriptions are in it


def run(folder, *flags, data):
    run_train("--stage", 1, "--max_steps", 1, "--learning_rate", 1e-2, "--keep_correct",
              "--per_device_train_batch_size", BATCH // 2, "--gradient_accumulation_steps", 2,
              "--output_dir", folder, *flags, *data)
    return logged(folder)[0]


# ---- Supervised training on the chosen answers ---------------------------------------------------


def chosen_nll(world):
    """Mean over the chosen answers' tokens of the first step's rows, read as pairs: nats."""
    base = load_base(world.base)
    examples = read_hadpo(world.desc, world.pairs, world.vg, keep_correct=True)
    dataset = PackedDataset(examples, base.row_format())
    ids, = ResumableSampler(len(dataset), 1, Share(BATCH, BATCH), 42)
    batch, objective = dataset[ids], Objective(base.trunk, base.head, Loss("sft"))
    assert max(ids) >= 144 and len(set(ids)) == BATCH           # a description is among them
    with torch.no_grad():
        logps = objective.logps(base.head, objective.answer_states(batch), batch)
    chosen = batch.target_branch == CHOSEN
    return float(-logps[chosen].mean()), float(-logps[batch.target_branch > 0].mean())


@pytest.mark.parametrize("kept", (False, True))
def test_the_loss_is_the_chosen_answers_nll(world, tmp_path, in_this_process, kept):
    more = ["--cache_features", tmp_path / "features"] if kept else []
    row = run(tmp_path / "run", "--loss", "sft", *more, data=dpo_flags(world))
    nll, of_both = chosen_nll(world)
    assert abs(nll - of_both) > 0.01
    assert largest_difference("loss", row["loss"], nll) < 1e-4
    assert not [name for name in row if name.startswith(("rewards", "logps"))]
    head = load_trained(str(tmp_path / "run"), load_base(world.base))
    assert not head.post_interaction_block.is_identity()


def test_rejected_answers_change_nothing(world, tmp_path, in_this_process):
    """Other rejected answers: not a bit of what is trained differs. With DPO it does."""
    pairs, described = load_json(world.pairs), load_json(world.desc)
    for row in pairs:
        row["reject"] = row["question"]
    for row in described.values():
        row["rejected"] = ["Is there a ball in the image?"]
    paths = {"pope_data_path": tmp_path / "pope.json", "desc_data_path": tmp_path / "desc.json"}
    paths["pope_data_path"].write_text(json.dumps(pairs))
    paths["desc_data_path"].write_text(json.dumps(described))
    other = [*dpo_flags(world)[:4], *(text for name, path in paths.items()
                                      for text in (f"--{name}", path))]
    for loss in ("sft", "dpo"):
        for name, data in (("world", dpo_flags(world)), ("other", other)):
            run(tmp_path / f"{loss}-{name}", "--loss", loss, data=data)
        ours, theirs = (trained_tensors(tmp_path / f"{loss}-{name}") for name in ("world", "other"))
        same = all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        assert same is (loss == "sft")


# ---- New blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ("full", "no_cross_attn", "original"))
def test_a_new_blocks_width(world, tmp_path, in_this_process, block):
    """Of its MLP, and of `align` where it has one; all that remains is as LLaMA has it."""
    run(tmp_path / "run", "--block", block, "--block_intermediate_size", 20,
        data=dpo_flags(world))
    config = load_json(tmp_path / "run" / "config.json")["block"]
    assert config["intermediate_size"] == 20 and config["hidden_size"] == 32
    shapes = {key.removeprefix("post_interaction_block."): tuple(tensor.shape)
              for key, tensor in trained_tensors(tmp_path / "run").items()}
    assert shapes["blocks.0.mlp.fc1.weight"] == (20, 32)
    assert shapes["blocks.0.mlp.fc2.weight"] == (32, 20)
    if block != "no_cross_attn":
        assert (shapes["align.fc1.weight"], shapes["align.fc2.weight"]) == ((20, 24), (32, 20))
    head = load_trained(str(tmp_path / "run"), load_base(world.base))
    assert head.block_config.intermediate_size == 20


def test_the_width_of_a_block_that_is_brought_along(world, tmp_path, in_this_process):
    """It has one, so another cannot be asked for."""
    run(tmp_path / "first", data=dpo_flags(world))
    with pytest.raises(InputError, match="--block_intermediate_size 20: --init .*first brings"):
        parse_flags(["--stage", "1", "--block_intermediate_size", "20", "--init",
                     str(tmp_path / "first"), *dpo_flags(world)])
    with pytest.raises(InputError, match="--block_intermediate_size 20: no block is made"):
        parse_flags(["--tune", "lm_head", "--block_intermediate_size", "20"])


def test_the_original_block(world, tmp_path, capsys, in_this_process):
    """It starts as no identity: policy and reference agree all the same, and differ from the base.
    """
    first = {}
    for block in ("full", "original"):
        for name, more in (("loop", []), ("kept", ["--cache_features", tmp_path / "features"])):
            first[block, name] = run(tmp_path / block / name, "--block", block, *more,
                                     data=dpo_flags(world))
        said = "a random block" if block == "original" else "an identity block"
        assert capsys.readouterr().out.count(f"stage 1 from {said}:") == 2
    for (block, _), row in first.items():
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["rewards/margin"] == 0 and row["grad_norm"] > 0
        assert row["logps/chosen"] == pytest.approx(row["logps/reference_chosen"], abs=1e-4)
        assert row["logps/chosen"] == pytest.approx(first[block, "loop"]["logps/chosen"], abs=1e-3)
    chosen = [first[block, "loop"]["logps/chosen"] for block in ("full", "original")]
    assert abs(chosen[0] - chosen[1]) > 0.1
    config = load_json(tmp_path / "original" / "loop" / "config.json")
    assert config["arguments"]["block"] == "original"
    assert config["block"]["outer_residual"] and not config["block"]["zero_init"]
    # And it is what another run starts from.
    run(tmp_path / "again", "--init", tmp_path / "original" / "loop", "--block", "original",
        data=dpo_flags(world))
    assert load_json(tmp_path / "again" / "config.json")["block"] == config["block"]
    with pytest.raises(InputError, match="--block full: .*brings a block of its own .original"):
        parse_flags(["--stage", "1", "--block", "full", "--init",
                     str(tmp_path / "original" / "loop"), *dpo_flags(world)])
