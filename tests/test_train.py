"""Real runs of train.py on the session's tiny world: one process and several, stage by stage.

What they log, what they save, and what stays as it was. The pieces that a run is made of have tests
of their own in tests/training/.
"""
import csv
import math
import os
from glob import glob

import numpy as np
import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, run_train
from safetensors.torch import save_file
from short_runs import (
    STEPS,
    five_steps,
    llava_flags,
    logged,
    losses_of,
    read_bytes,
    trained_tensors,
    zero_file,
)

import train
from checkpoints.load import fingerprint, load_base, load_trained
from data import PackedDataset, read_hadpo
from dpo import Loss, Objective
from model import STAGES, Head
from support.tensors import read_file
from training.batches import ResumableSampler, Share
from training.engine import cosine

LOGGED = {"step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margin",
          "rewards/accuracy", "logps/chosen", "logps/rejected", "logps/reference_chosen",
          "logps/reference_rejected", "learning_rate", "grad_norm", "pairs_per_second"}


# ---- One process and two -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world, two, tmp_path_factory, in_this_process):
    """The same five steps twice → folder.

    One process under ZeRO-0; two under ZeRO-3 with gradient accumulation.
    """
    folder = tmp_path_factory.mktemp("runs")
    paths = glob(f"{world.base}/**/*.*", recursive=True)
    before = {path: read_bytes(path) for path in paths}
    monitor = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "monitor"}
    run_train(*five_steps(world, folder, "one", 0, "--per_device_train_batch_size", 8,
                          csv_monitor=monitor))
    print(two(*five_steps(world, folder, "two", 3, "--per_device_train_batch_size", 2)))
    # A run writes nothing into its base.
    assert before == {path: read_bytes(path) for path in paths}
    return folder


def test_zero3_on_two_processes_follows_zero0_on_one(runs):
    one, two = logged(runs / "one"), logged(runs / "two")
    steps = [row["step"] for row in one]
    assert steps == [row["step"] for row in two] == list(range(1, STEPS + 1))
    first = one[0]["loss"]
    assert largest_difference("first loss against ln 2", first, math.log(2)) < 1e-6
    losses = [[row["loss"] for row in rows] for rows in (one, two)]
    print("losses", losses)
    assert abs(losses[0][-1] - losses[0][0]) > 0.01                        # they went somewhere
    assert largest_difference("losses", *losses) < 1e-5
    for name in LOGGED - {"step", "pairs_per_second"}:
        ours, theirs = ([row[name] for row in rows] for rows in (two, one))
        assert largest_difference(name, ours, theirs) < 2e-3 * max(1, np.abs(theirs).max())
    ours, theirs = (trained_tensors(runs / name) for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert max(largest_difference(key, t, theirs[key]) for key, t in ours.items()) < 1e-2


def test_every_metric_is_logged(runs):
    for name in ("one", "two"):
        rows = logged(runs / name)
        for row in rows:
            assert LOGGED <= row.keys() and all(math.isfinite(value) for value in row.values())
            assert row["grad_norm"] > 0 and row["pairs_per_second"] > 0
            margin = row["rewards/chosen"] - row["rewards/rejected"]
            assert largest_difference("margin", row["rewards/margin"], margin) < 1e-5
        rates = [row["learning_rate"] for row in rows]
        expected = [1e-2 * cosine(step, STEPS, 0) for step in range(STEPS)]
        assert largest_difference("learning rates", rates, expected) < 1e-9


def read_csv(path):
    with open(path) as file:
        return list(csv.reader(file))


def test_deepspeeds_own_monitor_writes(runs):
    files = glob(str(runs / "csv" / "**" / "*.csv"), recursive=True)
    loss, = (read_csv(path) for path in files if path.endswith("_loss.csv"))
    written = [float(row[1]) for row in loss[1:]]
    expected = losses_of(runs / "one")
    assert largest_difference("CSV against metrics.jsonl", written, expected) < 1e-5
    assert len(files) >= len(LOGGED) - 1


def test_checkpoint_holds_exactly_what_was_trained(world, runs):
    base = load_base(world.base)
    full = Head(base.config, base.config.block_config())
    expected = {name: p.shape for name, p in full.named_parameters()}
    for name in ("one", "two"):
        assert sorted(os.listdir(runs / name)) == ["README.md", "config.json", "metrics.jsonl",
                                                   "tokenizer.model", "trained.safetensors",
                                                   "training.svg"]
        tensors = trained_tensors(runs / name)
        assert {key: t.shape for key, t in tensors.items()} == expected
        # Pitfalls 14 and 15: nothing is empty.
        assert all(t.any() and t.isfinite().all() for t in tensors.values())
        said = load_json(runs / name / "config.json")["fingerprint"]
        assert said == fingerprint(base.trunk, base.head) == base.fingerprint
        head = load_trained(str(runs / name), base)
        assert all(torch.equal(t, tensors[key]) for key, t in head.state_dict().items())
    assert not glob(str(runs / "*.partial")) and not glob(str(runs / "*.run"))


# ---- What a run changes --------------------------------------------------------------------------


CHANGED = {0: ("model.", "lm_head."), 1: (), 2: ("lm_head.",)}                   # of the base
SAVED = {1: {"post_interaction_block"}, 2: {"post_interaction_block", "lm_head"}}


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_tensors_are_bit_identical_after_training(world, tmp_path, monkeypatch,
                                                         in_this_process, stage):
    """The modules of real runs, after their last step, against the base loaded again."""
    bases, heads, initial_head = [], [], train.initial_head

    def noted_base(*args, **options):
        bases.append(load_base(*args, **options))
        return bases[-1]

    def noted_head(*args):
        heads.append(initial_head(*args))
        return heads[-1]

    monkeypatch.setattr(train, "load_base", noted_base)
    monkeypatch.setattr(train, "initial_head", noted_head)
    data = dpo_flags(world) if stage else llava_flags(world)
    run_train("--stage", stage, "--init", "identity", "--output_dir", tmp_path / "run",
              "--max_steps", 2, "--learning_rate", 1e-2, "--per_device_train_batch_size", 8,
              "--gradient_accumulation_steps", 2, "--keep_correct", *data)
    base, fresh, head = bases[0], load_base(world.base), heads[-1][0]
    # A run trains a copy of the head: the next one starts anew.
    assert torch.equal(base.head.lm_head.weight, fresh.head.lm_head.weight)
    after = base.trunk.state_dict() | {"lm_head.weight": head.lm_head.weight}
    before = fresh.trunk.state_dict() | fresh.head.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed == {key for key in before if key.startswith(CHANGED[stage])}
    base.head.lm_head = head.lm_head
    unchanged = fingerprint(base.trunk, base.head) == fingerprint(fresh.trunk, fresh.head)
    assert unchanged is (stage == 1)
    if stage:
        names = read_file(str(tmp_path / "run" / "trained.safetensors"))
        assert {name.split(".")[0] for name in names} == SAVED[stage]
    else:
        saved = load_base(str(tmp_path / "run"))
        saved = saved.trunk.state_dict() | saved.head.state_dict()
        assert all(torch.equal(t, after[key]) for key, t in saved.items())


def test_sft_of_a_global_batch_is_one_mean(world, two, tmp_path, in_this_process):
    """However it is cut: one micro batch, eight of one row, or two processes. Rows differ in
    length, so a mean of means would not be."""
    def cut(name, micro, accumulation):
        return ["--tune", "projector,llama,lm_head", "--learning_rate", 1e-2, "--max_steps", 4,
                *llava_flags(world), "--output_dir", tmp_path / name,
                "--per_device_train_batch_size", micro,
                "--gradient_accumulation_steps", accumulation]

    run_train(*cut("whole", 8, 1))
    run_train(*cut("singles", 1, 8))
    two(*cut("two", 2, 2))
    losses = {name: losses_of(tmp_path / name) for name in ("whole", "singles", "two")}
    print(losses)
    for name in ("singles", "two"):
        assert largest_difference(name, losses[name], losses["whole"]) < 1e-4
    whole, singles = (trained_tensors(tmp_path / name, "model.safetensors")
                      for name in ("whole", "singles"))
    assert max(largest_difference(key, t, singles[key]) for key, t in whole.items()) < 1e-2


def test_sft_of_the_block(world, tmp_path, in_this_process):
    """The notes' "Llava" rows: conversations instead of pairs, from kept features as with the
    frozen trunk in the loop."""
    flags = ["--tune", "post_decoder", "--learning_rate", 1e-2, "--max_steps", 4,
             "--per_device_train_batch_size", 8, *llava_flags(world)]
    run_train(*flags, "--output_dir", tmp_path / "loop")
    run_train(*flags, "--output_dir", tmp_path / "kept", "--cache_features", tmp_path / "features")
    losses = [losses_of(tmp_path / name) for name in ("loop", "kept")]
    assert largest_difference("losses", *losses) < 1e-4 and losses[0][0] != losses[0][3]
    base = load_base(world.base)
    head = load_trained(str(tmp_path / "kept"), base)
    assert head.lm_head is base.head.lm_head and not head.post_interaction_block.is_identity()


def test_dpo_of_the_whole_trunk(world, two, tmp_path, in_this_process):
    """The reference is the base as it was, at every step and in the second epoch; what is saved is
    a base of its own."""
    flags = ["--tune", "projector,llama", "--learning_rate", 3e-3, "--max_steps", 7,
             "--num_train_epochs", 3, *dpo_flags(world)]
    run_train(*flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 32,
              "--gradient_accumulation_steps", 1)
    config = zero_file(tmp_path, 3, train_batch_size=32)
    two(*flags, "--output_dir", tmp_path / "two", "--deepspeed", config,
        "--per_device_train_batch_size", 8)
    one = logged(tmp_path / "one")
    assert one[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and one[0]["rewards/margin"] == 0
    losses = [losses_of(tmp_path / name) for name in ("one", "two")]
    assert largest_difference("losses", *losses) < 1e-3
    base = load_base(world.base)
    dataset = PackedDataset(read_hadpo(world.desc, world.pairs, world.vg), base.row_format())
    assert len(dataset) < 7 * 32                                           # into the second epoch
    objective = Objective(base.trunk.requires_grad_(True), base.head, Loss("dpo")).eval()
    sampler = ResumableSampler(len(dataset), 7, Share(32, 32), 42)
    for row, ids in zip(one, sampler, strict=True):
        expected = objective.policy_logps(dataset[ids]).mean(0).tolist()       # chosen, rejected
        said = [row["logps/reference_chosen"], row["logps/reference_rejected"]]
        assert largest_difference("reference", said, expected) < 1e-4
    assert abs(one[-1]["rewards/margin"]) > 0.01
    before, after = base.trunk.state_dict(), load_base(str(tmp_path / "one")).trunk.state_dict()
    changed = {key for key, t in after.items() if not torch.equal(t, before[key])}
    assert changed == {key for key in before if key.startswith("model.")}
    assert not os.path.exists(tmp_path / "one.run")


def test_what_init_brought_along_is_kept(world, runs, tmp_path, in_this_process):
    """Stage 1 from a stage-2 checkpoint trains the block alone; the lm_head that came with it must
    not be lost."""
    flags = five_steps(world, tmp_path, "again", 0, "--per_device_train_batch_size", 8,
                       "--init", runs / "one")
    run_train(*flags, "--stage", 1)
    before, after = trained_tensors(runs / "one"), trained_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert any(not torch.equal(before[key], after[key]) for key in before)


# ---- Sweeps --------------------------------------------------------------------------------------


def test_a_run_of_a_sweep_is_the_run_alone(world, tmp_path, monkeypatch, in_this_process):
    """Three variants that read different features, two rates: one load of the base, a folder each,
    and not a bit of difference."""
    loads = []

    def counted(*args, **options):
        loads.append(1)
        return load_base(*args, **options)

    def run(*flags):
        run_train("--stage", 2, "--init", "identity", "--max_steps", 3,
                  "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2,
                  "--keep_correct", *flags, *dpo_flags(world))

    def saved(name):
        return read_bytes(f"{tmp_path}/{name}/trained.safetensors")

    monkeypatch.setattr(train, "load_base", counted)
    variants, rates = ("align_after_align", "self_attn", "head"), ("0.01", "0.003")
    run("--output_dir", tmp_path / "sweep", "--block", ",".join(variants),
        "--learning_rate", "1e-2", "3e-3")
    names = [f"sweep-{block}-{rate}" for block in variants for rate in rates]
    assert len(loads) == 1 and sorted(os.listdir(tmp_path)) == sorted(["features", *names])
    # The projector's, whole rows, the tower's.
    assert len(os.listdir(tmp_path / "features")) == 3
    for block, rate in (("align_after_align", "0.003"), ("self_attn", "0.01"), ("head", "0.003")):
        run("--output_dir", tmp_path / "alone", "--block", block, "--learning_rate", rate,
            "--cache_features", tmp_path / "f")
        assert saved("alone") == saved(f"sweep-{block}-{rate}")
    assert len({saved(name) for name in names}) == 6


def test_a_sweep_over_the_trunk_starts_every_run_from_the_base(world, tmp_path, in_this_process):
    def run(name, *rates):
        run_train("--stage", 0, "--max_steps", 2, "--per_device_train_batch_size", 8,
                  *llava_flags(world), "--gradient_accumulation_steps", 1,
                  "--output_dir", tmp_path / name, "--learning_rate", *rates)

    run("sweep", 1e-2, 1e-3)
    run("alone", 1e-3)
    first, second, alone = (read_bytes(f"{tmp_path}/{name}/model.safetensors")
                            for name in ("sweep-0.01", "sweep-0.001", "alone"))
    assert second == alone != first


# ---- Saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ("a key is lost", "zeros", "one number"))
@pytest.mark.parametrize("stage", (0, 2))
def test_a_save_that_went_wrong_is_found(world, tmp_path, monkeypatch, in_this_process, stage,
                                         damage):
    """The written file is opened again, whether it is what was trained or a whole model; what was
    there before stays."""
    def damaged(tensors, path, metadata):
        name = max(tensors, key=lambda k: tensors[k].numel())
        wrong = {k: t for k, t in tensors.items() if k != name}
        if damage != "a key is lost":
            whole = tensors[name]
            wrong[name] = torch.zeros_like(whole) if damage == "zeros" else whole.clone()
            wrong[name].view(-1)[7] += 1
        save_file(wrong, path, metadata)

    monkeypatch.setattr("support.tensors.save_file", damaged)
    flags = ["--keep_correct", "--init", "identity", *dpo_flags(world)]
    with pytest.raises(RuntimeError, match="safetensors: what was written is not"):
        run_train("--stage", stage, "--max_steps", 1, "--output_dir", tmp_path / "run",
                  *(flags if stage else llava_flags(world)))
    assert not os.path.exists(tmp_path / "run")
