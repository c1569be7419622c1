"""--report_to and --run_name: where the numbers go, and one line for what cannot report."""
import csv
import os
import sys
import types
from types import SimpleNamespace

import pytest
from conftest import dpo_flags, run_train
from short_runs import logged

from support.common import InputError
from training.engine import deepspeed_config
from training.flags import parse_flags
from training.resume import INCIDENTAL

LOGIN = "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "NETRC"


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    for name in LOGIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that only remembers what it was asked for."""
    module = types.ModuleType("wandb")
    module.runs, module.run, module.fails = [], None, None

    def init(**values):
        if module.fails:
            raise module.fails
        module.run = SimpleNamespace(name=None, values=values, logged=[], finished=False)
        module.runs.append(module.run)

    def log(data, step=None, commit=None):
        module.run.logged.append((step, data))

    def finish():
        module.run.finished, module.run = True, None

    module.init, module.log, module.finish = init, log, finish
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run(world, folder, *flags):
    return run_train("--stage", 1, "--max_steps", 2, "--keep_correct", "--output_dir", folder,
                     *dpo_flags(world), *flags)


def configured(*flags):
    return deepspeed_config(parse_flags(list(flags)), 1, False)


def test_csv_holds_what_metrics_hold(world, tmp_path, in_this_process):
    """A sweep: a folder for each run, named after --run_name."""
    run(world, tmp_path / "out", "--report_to", "csv", "--run_name", "first", "--learning_rate",
        "1e-3", "2e-3")
    assert sorted(os.listdir(tmp_path / "runs")) == ["first-0.001", "first-0.002"]
    for rate in "0.001", "0.002":
        rows = logged(tmp_path / f"out-{rate}")
        for name in "loss", "rewards/margin", "learning_rate":
            path = tmp_path / "runs" / f"first-{rate}" / f"train_{name.replace('/', '_')}.csv"
            with open(path) as file:
                written = [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]
            assert written == [(row["step"], pytest.approx(row[name])) for row in rows]


def test_the_output_folder_names_a_run(world, tmp_path, in_this_process):
    run(world, tmp_path / "plain", "--report_to", "csv")
    assert os.listdir(tmp_path / "runs") == ["plain"]


def test_wandb(world, tmp_path, wandb, monkeypatch, in_this_process):
    """Each run of a sweep is a run of W&B's: named, logged and finished."""
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_PROJECT", "ha-dpo")
    run(world, tmp_path / "out", "--report_to", "wandb", "--run_name", "llava-v1.5",
        "--learning_rate", "1e-3", "2e-3")
    assert [one.name for one in wandb.runs] == ["llava-v1.5-0.001", "llava-v1.5-0.002"]
    assert all(one.finished and one.values["project"] == "ha-dpo" for one in wandb.runs)
    losses = [(step, data["train/loss"]) for step, data in wandb.runs[0].logged
              if "train/loss" in data]
    assert losses == [(row["step"], row["loss"]) for row in logged(tmp_path / "out-0.001")]


def test_wandb_without_a_login_is_one_line(world, tmp_path, wandb, monkeypatch):
    """Before weights are read; every way to be logged in, or to need no login, passes."""
    with pytest.raises(InputError, match="nobody is logged in to api.wandb.ai; wandb login, or"):
        configured("--report_to", "wandb")
    for name, value in (("WANDB_API_KEY", "x"), ("WANDB_MODE", "offline"),
                        ("WANDB_MODE", "disabled")):
        monkeypatch.setenv(name, value)
        assert configured("--report_to", "wandb")["wandb"]["enabled"]
        monkeypatch.delenv(name)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert configured("--report_to", "wandb")["wandb"]["project"] == "nanohadpo"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(InputError, match="logged in to wandb.example.org"):
        configured("--report_to", "wandb")
    monkeypatch.setenv("RANK", "1")                         # rank 0 alone reports
    assert configured("--report_to", "wandb")


def test_wandb_that_does_not_start_is_one_line(world, tmp_path, wandb, monkeypatch,
                                               in_this_process):
    class UsageError(Exception):
        __module__ = "wandb.errors"

    monkeypatch.setenv("WANDB_API_KEY", "wrong")
    wandb.fails = UsageError("api_key not configured (no-tty)\ncall wandb.login")
    with pytest.raises(InputError, match=r"wandb does not start \(api_key not .*\); wandb login"):
        run(world, tmp_path / "out", "--report_to", "wandb")


def test_what_is_not_installed(monkeypatch):
    for name in "tensorboard", "wandb":
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=f"--report_to {name}: .*pip install {name}"):
            configured("--report_to", name)
    with pytest.raises(InputError, match="none stands alone"):
        configured("--report_to", "none", "csv")
    with pytest.raises(SystemExit):
        parse_flags(["--report_to", "comet"])


def test_none_turns_the_files_off(world, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8, "csv_monitor": {"enabled": true, "output_path": "x"}}')
    assert "csv_monitor" in configured("--deepspeed", str(path))
    assert "csv_monitor" not in configured("--deepspeed", str(path), "--report_to", "none")


def test_reports_change_no_result():
    """A run goes on with other reports, and the tiny world's base may be reported."""
    assert {"report_to", "run_name"} < set(INCIDENTAL)
    assert parse_flags(["--stage", "0", "--report_to", "csv"]).output_dir == "out/base"
