"""DeepSpeed files of all kinds: what is honoured, and one line for what cannot be.

Files are copied from HF's, LLaVA's and DeepSpeed's own examples; many of the wrong ones stand in
public bug reports.
"""
import copy
import datetime
import importlib.util
import json
import os
import re
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import dpo_flags, load_json, run_train
from programs import ROOT, free_port, shell
from short_runs import zero_file

import train
from support.common import InputError
from training import engine
from training.ds_file import KNOWN, PARALLEL
from training.engine import deepspeed_config
from training.flags import parse_flags

MICRO = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}


def configured(folder, content, *flags):
    """What DeepSpeed gets from a file of this content."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(parse_flags(["--deepspeed", str(path), *flags]), 1, False)


def zero(**settings):
    return MICRO | {"zero_optimization": settings}


# ---- One line for what cannot be -----------------------------------------------------------------


WRONG = {       # what: (the file, what is said beside its name)
    # Names that DeepSpeed refuses, and those that it ignores without a word.
    "offload_optimiser": (zero(stage=2, offload_optimiser={"device": "cpu"}),
                          ["zero_optimization.offload_optimiser", "offload_optimizer?"]),
    "stages": (zero(stages=2), ["zero_optimization.stages", "stage?"]),
    "inside an object": (zero(stage=3, leaf_module={"clases": ["x"]}),
                         ["zero_optimization.leaf_module.clases", "classes?"]),
    "of a monitor": (MICRO | {"csv_monitor": {"enabled": True, "out_path": "x"}},
                     ["csv_monitor.out_path", "output_path?"]),
    "zero_optimisation": (MICRO | {"zero_optimisation": {"stage": 2}},
                          ["zero_optimisation", "zero_optimization?"]),
    "gradient_cliping": (MICRO | {"gradient_cliping": 0.5}, ["gradient_cliping",
                                                            "gradient_clipping?"]),
    "BF16": (MICRO | {"BF16": {"enabled": True}}, ["BF16", "bf16?"]),
    "like nothing": (MICRO | {"my_notes": "tried on Monday"}, ["my_notes", "remove it"]),
    "twice": ('{"gradient_clipping": 1.0, "gradient_clipping": 0.5}',
              ["gradient_clipping", "twice"]),
    # Values of another type.
    "stage as text": (zero(stage="3"), ["zero_optimization.stage", '"3"']),
    "stage as truth": (zero(stage=True), ["zero_optimization.stage", "true"]),
    "no such stage": (zero(stage=4), ["zero_optimization.stage", "4"]),
    "half a stage": (zero(stage=2.5), ["zero_optimization.stage", "2.5"]),
    "a list of stages": (zero(stage=[2]), ["zero_optimization.stage", "[2]"]),
    "size as text": (zero(stage=2, reduce_bucket_size="5e8"),
                     ["zero_optimization.reduce_bucket_size", '"5e8"', "whole number"]),
    "size as truth": (zero(stage=2, reduce_bucket_size=True),
                      ["zero_optimization.reduce_bucket_size", "true", "whole number"]),
    "negative size": (zero(stage=2, reduce_bucket_size=-1),
                      ["zero_optimization.reduce_bucket_size", "-1"]),
    "truth as text": (zero(stage=2, overlap_comm="true"),
                      ["zero_optimization.overlap_comm", '"true"', "true or false"]),
    "truth as number": (zero(stage=2, contiguous_gradients=1),
                        ["zero_optimization.contiguous_gradients", "true or false"]),
    "truth for an object": (zero(stage=2, offload_optimizer=True),
                            ["zero_optimization.offload_optimizer", "true", "an object"]),
    "zero as truth": (MICRO | {"zero_optimization": True}, ["zero_optimization", "true",
                                                            "an object"]),
    "zero as list": (MICRO | {"zero_optimization": [{"stage": 2}]}, ["zero_optimization",
                                                                    "an object"]),
    "zero as null": (MICRO | {"zero_optimization": None}, ["zero_optimization", "null"]),
    "fp16 as truth": (MICRO | {"fp16": True}, ["fp16", "true", "an object"]),
    "monitor as truth": (MICRO | {"tensorboard": True}, ["tensorboard", "true", "an object"]),
    "clipping as text": (MICRO | {"gradient_clipping": "1.0"}, ["gradient_clipping", '"1.0"',
                                                               "a number"]),
    "clipping as truth": (MICRO | {"gradient_clipping": True}, ["gradient_clipping", "true"]),
    "negative clipping": (MICRO | {"gradient_clipping": -1}, ["gradient_clipping", "-1"]),
    "clipping as NaN": ('{"gradient_clipping": NaN}', ["gradient_clipping", "NaN"]),
    "steps_per_print": (MICRO | {"steps_per_print": 0}, ["steps_per_print", "0"]),
    "breakdown": (MICRO | {"wall_clock_breakdown": "false"}, ["wall_clock_breakdown", '"false"',
                                                             "true or false"]),
    "bf16 as text": (MICRO | {"bf16": {"enabled": "true"}}, ["bf16", '"bf16": {"enabled": true}']),
    "a list": ([MICRO], ["list"]),
    "a number": ("3", ["int"]),
    "cut": ('{"zero_optimization": {"stage": 2', ["JSON"]),
    "communication": (MICRO | {"communication_data_type": "fp8"}, ["communication_data_type",
                                                                  "fp8"]),
    "tags": (MICRO | {"checkpoint": {"tag_validation": "maybe"}}, ["MAYBE"]),
    "norm": (zero(stage=3, compute_grad_norm=False), ["zero_optimization", "compute_grad_norm"]),
    # Offloading that nobody asked for.
    "cpu_offload": (zero(stage=2, cpu_offload=True), ["zero_optimization.cpu_offload", "slow",
                                                      "--offload"]),
    "cpu_offload_param": (zero(stage=3, cpu_offload_param=True),
                          ["zero_optimization.cpu_offload_param", "--offload"]),
    "cpu_offload_params": (zero(stage=3, cpu_offload_params=True),
                           ["zero_optimization.cpu_offload_params", "--offload"]),
    "pin": (zero(stage=2, cpu_offload_use_pin_memory=True),
            ["zero_optimization.cpu_offload_use_pin_memory", "--offload"]),
    "cpu_offload as text": (zero(stage=2, cpu_offload="yes"), ["cpu_offload", '"yes"']),
    # What this loop would ignore, and what DeepSpeed has given up.
    "amp": (MICRO | {"amp": {"enabled": True, "opt_level": "O1"}}, ["amp", "--bf16"]),
    "amp, off": (MICRO | {"amp": {"enabled": False}}, ["amp", "remove it"]),
    "elasticity": (MICRO | {"elasticity": {"enabled": False}}, ["lastic"]),
    "mics": (zero(stage=3, mics_shard_size=8), ["mics_shard_size"]),
    "two names": (MICRO | {"bf16": {"enabled": True}, "bfloat16": {"enabled": False}},
                  ["bf16 and bfloat16"]),
    "activations": (MICRO | {"activation_checkpointing": {"partition_activations": True}},
                    ["activation_checkpointing", "--gradient_checkpointing"]),
    "tensor parallel": (MICRO | {"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
    "sequence parallel": (MICRO | {"sequence_parallel_size": 2}, ["sequence_parallel_size"]),
    "curriculum": (MICRO | {"data_efficiency": {"enabled": True}}, ["data_efficiency"]),
    "hybrid": (MICRO | {"hybrid_engine": {"enabled": True}}, ["hybrid_engine"]),
    "quantized": (zero(stage=3, zero_quantized_weights=True),
                  ["zero_optimization.zero_quantized_weights", "C++"]),
    "its own Adam": (MICRO | {"zero_force_ds_cpu_optimizer": True},
                     ["zero_force_ds_cpu_optimizer", "AdamW"]),
    "unmanaged": (MICRO | {"managed_gradient_accumulation": False},
                  ["managed_gradient_accumulation"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_line(tmp_path, what):
    content, said = WRONG[what]
    with pytest.raises(InputError) as error:
        configured(tmp_path, content)
    print(error.value)
    assert str(error.value).startswith(f"{tmp_path}/ds.json: ") and "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


ONLY_AT_THE_START = {       # what DeepSpeed has against a file only when an engine starts
    "norm": (zero(stage=1, compute_grad_norm=False), [], "gradient_clipping=0"),
    "ratio": (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), ["--offload"],
              "DeepSpeedCPUAdam"),
    "legacy": (zero(stage=1, legacy_stage1=True), [], "ZeRO Stage 1"),
    "level": (MICRO | {"log_level": "loud"}, [], "loud"),
}


@pytest.mark.parametrize("what", ONLY_AT_THE_START)
def test_what_deepspeed_says_late_is_said_early(world, tmp_path, monkeypatch, in_this_process,
                                                what):
    monkeypatch.setattr(train, "load_base", lambda *args, **options: pytest.fail("they are read"))
    content, flags, said = ONLY_AT_THE_START[what]
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"ds.json: DeepSpeed does not start.*{said}") as error:
        run_train("--deepspeed", tmp_path / "ds.json", "--output_dir", tmp_path / "out", *flags,
                  *dpo_flags(world))
    print(error.value)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["ds.json"]


def test_a_monitor_that_cannot_write(world, tmp_path, in_this_process):
    (tmp_path / "file").write_text("no folder")
    content = {"train_batch_size": 8,
               "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "file")}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="file/.*cannot be written.*monitor"):
        run_train("--deepspeed", tmp_path / "ds.json", "--output_dir", tmp_path / "out",
                  "--stage", 1, "--max_steps", 1, *dpo_flags(world))


def test_before_the_weights_are_read(world, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(train, "load_base", lambda *args, **options: pytest.fail("they are read"))
    for what in ("offload_optimiser", "cpu_offload", "clipping as text"):
        (tmp_path / "ds.json").write_text(json.dumps(WRONG[what][0]))
        with pytest.raises(InputError, match="ds.json"):
            run_train("--deepspeed", tmp_path / "ds.json", "--output_dir", tmp_path / "out",
                      *dpo_flags(world))
    assert os.listdir(tmp_path) == ["ds.json"]


# ---- What is honoured ----------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", (
    ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
    ({"cpu_offload": True, "cpu_offload_use_pin_memory": True},
     {"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    ({"stage": 3, "cpu_offload_param": True},
     {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ({"stage": 3, "cpu_offload_params": True, "cpu_offload": True},
     {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})))
def test_old_names_of_offloading(tmp_path, old, new):
    """With --offload they are the new ones; DeepSpeed refuses some, and both together."""
    config = configured(tmp_path, zero(**{"stage": 2} | old), "--offload")
    assert config["zero_optimization"] == {"stage": old.get("stage", 2)} | new


def test_offloading_that_is_off(tmp_path):
    off = {"cpu_offload": False, "cpu_offload_param": None, "cpu_offload_use_pin_memory": False,
           "offload_optimizer": {"device": "none"}, "offload_param": None}
    config = configured(tmp_path, zero(stage=2, **off))
    assert not any(name.startswith("cpu_") for name in config["zero_optimization"])


@pytest.mark.parametrize("content, enabled", (
    ({"bfloat16": {"enabled": True}}, True), ({"bfloat16": {"enabled": False}}, False),
    ({"bf16": None, "bfloat16": {"enabled": True}}, True), ({"bf16": {}}, None),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, True)))
def test_bfloat16_is_bf16(tmp_path, content, enabled):
    """As DeepSpeed reads it: the old name counts where the new one is absent or null."""
    config = configured(tmp_path, MICRO | content)
    assert config["bf16"].get("enabled") is enabled and "bfloat16" not in config
    assert configured(tmp_path, MICRO | content, "--no-bf16")["bf16"] == {"enabled": False}


def test_bfloat16_trains_in_bf16(world, tmp_path, monkeypatch, in_this_process):
    dtypes = []

    def announced(run, *rest):
        dtypes.append(run.dtype)

    monkeypatch.setattr(train, "announce", announced)
    path = zero_file(tmp_path, 0, bfloat16={"enabled": True})
    run_train("--deepspeed", path, "--stage", 1, "--max_steps", 1, "--output_dir",
              tmp_path / "out", *dpo_flags(world))
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("content, clipping", (
    (MICRO, 1.0), (zero(stage=2), 1.0), (MICRO | {"gradient_clipping": 0}, 0),
    (MICRO | {"gradient_clipping": 0.0}, 0), (MICRO | {"gradient_clipping": 0.3}, 0.3)))
def test_clipping_is_ours_unless_the_file_says_another(tmp_path, content, clipping):
    assert configured(tmp_path, content)["gradient_clipping"] == clipping


def test_clipping_of_a_file_that_says_nothing(world, tmp_path, monkeypatch, in_this_process):
    """What the engine itself clips to, under ZeRO-0 in bf16 (our optimizer) and under ZeRO-1."""
    seen, start = [], train.start_engine

    def noted(*args):
        seen.append(start(*args))
        return seen[-1]

    monkeypatch.setattr(train, "start_engine", noted)
    for name, stage, bf16 in (("ours", 0, True), ("theirs", 1, False)):
        path = zero_file(tmp_path, stage, name, bf16={"enabled": bf16})
        run_train("--deepspeed", path, "--stage", 1, "--max_steps", 1, "--output_dir",
                  tmp_path / name, *dpo_flags(world))
    assert seen[0].optimizer.max_norm == 1.0
    assert seen[1].gradient_clipping() == 1.0 and seen[1].optimizer.clip_grad == 1.0


GOOD = {
    "LLaVA's zero2.json without its auto": {
        "bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 2,
        "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000,
                 "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True,
                              "sub_group_size": 1e9, "reduce_bucket_size": 5e8}},
    "LLaVA's zero3.json without its auto": {
        "train_batch_size": 8, "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
            "reduce_bucket_size": 200000000.0, "stage3_prefetch_bucket_size": 5e7,
            "stage3_param_persistence_threshold": 1e5, "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True}},
    "what HF's documents show": {
        "train_batch_size": 8, "steps_per_print": 2000, "wall_clock_breakdown": False,
        "gradient_clipping": 1, "prescale_gradients": False,
        "zero_optimization": {"stage": 2, "allgather_partitions": True, "reduce_scatter": True,
                              "allgather_bucket_size": 2e8, "round_robin_gradients": True,
                              "ignore_unused_parameters": True}},
    "things that are off": {
        "train_batch_size": 8, "amp_": None, "tensorboard": {"enabled": False},
        "wandb": {"enabled": False, "project": "x", "group": None}, "comet": {"enabled": False},
        "csv_monitor": {"enabled": False}, "flops_profiler": {"enabled": False},
        "activation_checkpointing": {"partition_activations": False,
                                     "number_checkpoints": None, "profile": False},
        "sequence_parallel_size": 1, "dataloader_drop_last": False,
        "data_efficiency": {"enabled": False}, "comms_logger": {"enabled": False}},
}
del GOOD["things that are off"]["amp_"]


@pytest.mark.parametrize("what", GOOD)
def test_copied_files_that_can_be(tmp_path, what):
    """They are taken as they are, and DeepSpeed takes what we make of them."""
    from deepspeed.runtime.config import DeepSpeedConfig
    before = copy.deepcopy(GOOD[what])
    config = configured(tmp_path, GOOD[what])
    assert {name: config[name] for name in before} == before
    assert DeepSpeedConfig(config).zero_config.stage == config["zero_optimization"]["stage"]


def test_the_files_of_the_repository(tmp_path):
    configured(tmp_path, load_json(os.path.join(ROOT, "ds_zero3.json")))


def test_the_names_are_those_that_deepspeed_reads():
    """A dictionary that notes what is asked of it, given to DeepSpeed, asks for all of them."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = set()

    class Noting(dict):
        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

        def __contains__(self, name):
            asked.add(name)
            return super().__contains__(name)

        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

        def keys(self):
            return self                     # `name in config.keys()` asks as well

        def __copy__(self):
            return Noting(self)

    DeepSpeedConfig(Noting(MICRO))
    assert len(asked) > 40
    assert asked | set(PARALLEL) == set(KNOWN) and len(set(KNOWN)) == len(KNOWN)


# ---- The world around it -------------------------------------------------------------------------


MONITORS = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb",
            "comet": 'pip install "comet_ml>=3.41.0"'}


@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_that_is_not_installed(tmp_path, monkeypatch, name):
    module = {"comet": "comet_ml"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)                      # as if it were not there
    monkeypatch.setenv("RANK", "0")
    content = MICRO | {name: {"enabled": True}}
    with pytest.raises(InputError, match=f"ds.json: {name} is enabled") as error:
        configured(tmp_path, content)
    print(error.value)
    assert MONITORS[name] in str(error.value)
    configured(tmp_path, MICRO | {name: {"enabled": False}})
    configured(tmp_path, MICRO | {name: {}})
    monkeypatch.setenv("RANK", "1")                                     # only rank 0 opens it
    configured(tmp_path, content)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, module, json)                      # it is there
    configured(tmp_path, content)


def test_two_processes_hear_of_a_missing_monitor(world, tmp_path, two):
    """Only rank 0 looks for it, and both end with its line, none in a barrier or a traceback."""
    path = zero_file(tmp_path, 0, wandb={"enabled": True})
    two.begin("--deepspeed", path, "--stage", 1, "--output_dir", tmp_path / "out",
              *dpo_flags(world))
    for code, said in two.end():
        assert code == 1 and "Traceback" not in said
        assert f"error: {path}: wandb is enabled" in said and "pip install wandb" in said
    assert not os.path.exists(tmp_path / "out.run")


def test_a_port_in_use(world, tmp_path):
    """Another training holds it: one line, and how to take another port."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = shell("python", os.path.join(ROOT, "train.py"), "--output_dir", tmp_path / "out",
                     *dpo_flags(world), cwd=tmp_path, MASTER_PORT=port)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print(done.stderr[-3000:])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(f"error: port {port} .*in use.*deepspeed --master_port N", lines[-1])
    assert os.listdir(tmp_path) == []


def test_a_process_that_never_comes(monkeypatch):
    """One line, long before the twelve hours of a barrier."""
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(engine, "LONGEST_START", datetime.timedelta(seconds=2))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", free_port()), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="do not find each other at 127.0.0.1.*all are started"):
        engine.start_deepspeed()
    assert engine.LONGEST_WAIT >= datetime.timedelta(hours=6)


def test_a_barrier_outlasts_the_writing_of_a_model(in_this_process):
    """The group's own timeout, which torch counts from for every barrier of the run."""
    _, device = engine.start_deepspeed()
    options = dist.group.WORLD._get_backend(device).options
    assert options._timeout >= datetime.timedelta(hours=6)


def test_a_file_as_users_meet_it(world, tmp_path):
    """The whole program: one line, the exit code, nothing left behind."""
    assert importlib.util.find_spec("wandb") is None                    # or name another here
    files = {"cpu.json": WRONG["cpu_offload"][0], "text.json": WRONG["stage as text"][0],
             "wandb.json": MICRO | {"wandb": {"enabled": True, "project": "x"}}}
    said = {"cpu.json": "--offload", "text.json": "stage must be", "wandb.json": "pip install"}
    for name, content in files.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        done = shell("python", os.path.join(ROOT, "train.py"), "--deepspeed", name,
                     "--output_dir", "out", *dpo_flags(world), cwd=folder)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and len(lines) == 1 and "Traceback" not in done.stderr
        assert lines[0].startswith(f"error: {name}: ") and said[name] in lines[0]
        assert os.listdir(folder) == [name]
