"""Where a run writes: what is not ours is refused before training, and nothing is lost."""
import os
import shutil

import pytest
from conftest import dpo_flags, load_json, run_train

import train
from support.common import InputError

pytestmark = pytest.mark.usefixtures("in_this_process")


def flags(world, output, *more):
    return [*dpo_flags(world), "--stage", 1, "--init", "identity", "--max_steps", 2,
            "--output_dir", output, *more]


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *_, **__: pytest.fail("the weights were read"))


def refused(world, output, said, *more):
    with pytest.raises(InputError, match=said):
        run_train(*flags(world, output, *more))


def test_somebody_elses_folder_is_refused_before_training(world, tmp_path, untrained):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "thesis.txt").write_text("mine")
    refused(world, tmp_path / "runs", "runs: holds thesis.txt, which is not ours")
    (tmp_path / "file").write_text("mine")
    refused(world, tmp_path / "file", "file: is a file")
    refused(world, tmp_path / "file" / "run", "cannot be written")
    refused(world, "/proc/run", "cannot be written")
    refused(world, world.base, "is also --model_name_or_path")
    foreign = tmp_path / "model"
    shutil.copytree(world.base, foreign)
    values = load_json(foreign / "config.json")
    values.pop("written_by")
    (foreign / "config.json").write_text(str(values).replace("'", '"').replace("None", "null")
                                         .replace("True", "true").replace("False", "false"))
    refused(world, foreign, "a model that was not trained here")
    assert (tmp_path / "runs" / "thesis.txt").read_text() == "mine"
    assert (foreign / "model.safetensors").exists()


def test_the_current_folder_is_refused(world, tmp_path, untrained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(world, ".", "the folder that you are in")


def test_a_sweep_is_refused_for_any_of_its_folders(world, tmp_path, untrained):
    (tmp_path / "runs-0.002").mkdir()
    (tmp_path / "runs-0.002" / "thesis.txt").write_text("mine")
    refused(world, tmp_path / "runs", "runs-0.002: holds thesis.txt", "--learning_rate", 1e-3, 2e-3)


def test_a_runs_folder_of_somebody_else_is_refused(world, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("mine")
    refused(world, tmp_path / "out", "out.run: holds thesis.txt")
    assert (tmp_path / "out.run" / "thesis.txt").read_text() == "mine"


def test_a_second_run_keeps_the_first(world, tmp_path, capsys):
    """With its answers, under a name that is said before training."""
    output = tmp_path / "stage1"
    run_train(*flags(world, output))
    (output / "pope").mkdir()
    (output / "pope" / "metrics.json").write_text("{}")
    capsys.readouterr()
    run_train(*flags(world, output, "--learning_rate", 1e-2))
    said = capsys.readouterr().out
    assert f"{output}: a checkpoint is there already; it will be {output}-old1 when" in said
    old, new = (load_json(folder / "config.json")["arguments"]["learning_rate"]
                for folder in (tmp_path / "stage1-old1", output))
    assert (tmp_path / "stage1-old1" / "pope" / "metrics.json").read_text() == "{}"
    assert old != new == 1e-2 and not (output / "pope").exists()
    assert sorted(os.listdir(tmp_path)) == ["stage1", "stage1-old1"]


def test_a_symlink_stays_one(world, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "link")
    run_train(*flags(world, tmp_path / "link"))
    assert os.path.islink(tmp_path / "link") and (tmp_path / "disk" / "config.json").exists()
