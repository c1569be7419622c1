"""The tiny world's base depends on the seed and on the tiny sizes alone; a stage 0 that is typed is
a run of its own.

Worlds here are so small that one is made in seconds.
"""
import glob
import json
import os
import shutil
import sys

import pytest
from conftest import dpo_flags, load_json
from short_runs import logged, read_bytes

import train
from checkpoints.load import load_base
from support.common import InputError
from tiny import places, prepare, tower
from training.flags import parse_flags
from training.recipes import tiny_root

SIZES = ["--tiny_sizes", '{"sft": 48, "preference": 16, "validation": 2, "evaluation": 6}',
         "--tiny_tower", '{"images": 32, "epochs": 1}', "--tiny_base_steps", "3"]
LEAKING = ["--weight_decay", "0.1", "--warmup_ratio", "0.5", "--bf16", "--gradient_checkpointing",
           "--logging_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "0.7",
           "--gradient_accumulation_steps", "1",
           "--num_train_epochs", "3", "--sft_weight", "0.3", "--lora_r", "2", "--beta", "0.7",
           "--label_smoothing", "0.1", "--no-keep_correct", "--dataloader_num_workers", "1"]


@pytest.fixture
def main(monkeypatch, in_this_process):
    """train.py as it is typed, but in this process, in an empty folder."""
    def typed(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    return typed


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """The tower's own score, which is only printed, is of 2000 pictures otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "TEST_IMAGES", 200)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, in_this_process):
    """A world, its untrained model and its base, as the main job makes them."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--stage", "0", *SIZES,
                                    "--output_dir", str(root / "base")])
        train.main()
    return root


@pytest.fixture
def world_only(made, tmp_path):
    """The same world and untrained model in a folder of one's own, where no base is yet."""
    for name in ("world", "untrained"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.rmtree(tmp_path / "world" / "hadpo")
    return tmp_path


def weights(folder):
    """{name: bytes} of a whole model."""
    paths = glob.glob(f"{folder}/**/*.safetensors", recursive=True)
    return {os.path.relpath(path, folder): read_bytes(path) for path in paths}


# ---- The base that is made once ------------------------------------------------------------------


def test_flags_do_not_leak_into_the_base(made, world_only, main):
    """The first command decides nothing but the seed and the sizes."""
    main(*LEAKING, *SIZES, "--max_steps", 1, "--output_dir", world_only / "lora")
    assert weights(made / "base") == weights(world_only / "base") != {}
    ours, theirs = (load_json(root / "base" / "config.json")["arguments"]
                    for root in (made, world_only))
    paths = ("output_dir", "model_name_or_path", "data_path", "image_folder", "cache_features",
             "dataloader_num_workers")
    assert {k: v for k, v in ours.items() if k not in paths} == {
        k: v for k, v in theirs.items() if k not in paths}
    assert read_bytes(made / "world/hadpo/pope_data.json") == read_bytes(
        world_only / "world/hadpo/pope_data.json")
    # And the user's own run has the user's flags.
    mine = load_json(world_only / "lora" / "config.json")["arguments"]
    assert (mine["weight_decay"], mine["warmup_ratio"], mine["learning_rate"]) == (0.1, 0.5, 0.7)


def test_a_deepspeed_file_does_not_leak_either(made, world_only, main):
    """The file's batch, clipping and ZeRO stage are the user's."""
    path = world_only / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "gradient_clipping": 0.01,
                                "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    main("--stage", 1, "--deepspeed", path, "--offload", *SIZES, "--max_steps", 1,
         "--output_dir", world_only / "stage1")
    assert weights(made / "base") == weights(world_only / "base")


def test_an_interrupted_base_is_gone_on_with(made, world_only, main, monkeypatch):
    """--resume and --save_steps change nothing about a result, so they count for the base too."""
    class Stopped(Exception):
        pass

    save = train.save

    def stop(deepspeed, run):
        raise Stopped

    flags = ["--stage", 1, *SIZES, "--save_steps", 2, "--max_steps", 1, "--output_dir",
             world_only / "stage1"]
    monkeypatch.setattr(train, "save", stop)
    with pytest.raises(Stopped):
        main(*flags)
    assert os.path.isdir(world_only / "base.run" / "step-2")
    monkeypatch.setattr(train, "save", save)
    main(*flags, "--resume")
    assert weights(made / "base") == weights(world_only / "base")


def test_other_sizes_than_the_worlds_are_refused(made, main):
    """Nothing of another size is taken for what was asked."""
    for flag, value in (("--tiny_sizes", '{"sft": 96}'), ("--tiny_base_steps", "7"),
                        ("--tiny_tower", '{"images": 64}'), ("--tiny_projector", "16")):
        before = sorted(os.listdir(made))
        with pytest.raises(InputError, match=f"{flag}.*--stage 0 {flag}.*/base, and") as error:
            main("--stage", 1, flag, value, "--output_dir", made / "other")
        print(error.value)
        assert sorted(os.listdir(made)) == before


def test_a_base_alone_tells_the_width_of_its_projector(made, tmp_path, main, monkeypatch):
    """No width was typed for it, so it has the usual one, which may be typed."""
    for name in ("world", "base"):
        os.symlink(made / name, tmp_path / name)
    with pytest.raises(InputError, match="base: was made with --tiny_projector 8;"):
        main("--stage", 1, "--tiny_projector", 16, "--output_dir", tmp_path / "run")
    runs = []
    monkeypatch.setattr(train, "train", runs.append)
    main("--stage", 1, "--tiny_projector", 8, "--output_dir", tmp_path / "run")
    assert [run.model_name_or_path for run in runs] == [str(tmp_path / "base")]


@pytest.mark.parametrize("flags, width", (([], 8), (["--tiny_projector", "24"], 24)))
def test_the_projector_is_as_wide_as_asked(made, tmp_path, flags, width):
    args = parse_flags(["--stage", "0", *SIZES, *flags])
    prepare.make_untrained_base(str(tmp_path / "untrained"), str(made / "world"), "cpu", args)
    base = load_base(str(tmp_path / "untrained"))
    shapes = [tuple(p.shape) for p in base.trunk.model.mm_projector.parameters() if p.dim() == 2]
    assert shapes == [(width, 96), (96, width)]


def test_another_seed_is_refused_before_anything_is_made(world_only, main, monkeypatch):
    monkeypatch.setattr(prepare, "make_untrained_base",
                        lambda *args: pytest.fail("a tower is trained"))
    before = sorted(os.listdir(world_only))
    for stage in (0, 1):
        with pytest.raises(InputError, match="--seed 42, not 7.*out/seed7/base"):
            main("--stage", stage, "--seed", 7, *SIZES, "--output_dir", world_only / "run")
    assert sorted(os.listdir(world_only)) == before


# ---- Stage 0 as it is typed ----------------------------------------------------------------------


def test_stage_0_alone_makes_the_base(made, world_only, main, monkeypatch, capsys):
    """Without flags of its own it is the tiny world's base, which is made once."""
    monkeypatch.chdir(world_only)
    os.makedirs("out")
    for name in ("world", "untrained"):
        os.rename(name, f"out/{name}")
    main("--stage", 0, *SIZES)
    assert weights(made / "base") == weights("out/base")
    assert os.path.isdir("out/world/hadpo") and not os.path.exists("out/stage0")
    assert capsys.readouterr().out.splitlines()[-1].endswith("python eval_pope.py out/base")
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("it is there already"))
    main("--stage", 0, *SIZES)
    assert capsys.readouterr().out.splitlines()[-1].endswith("python eval_pope.py out/base")


def test_stage_0_takes_its_flags_and_its_folder(made, world_only, main, capsys):
    """A base of the user's, where the user wants it; the tiny world's own stays unmade."""
    flags = ["--learning_rate", 1e-2, "--max_steps", 5, "--per_device_train_batch_size", 8,
             "--weight_decay", 0.1, "--warmup_ratio", 0.4, "--logging_steps", 1]
    main("--stage", 0, *SIZES, *flags, "--output_dir", world_only / "mine")
    rows = logged(world_only / "mine")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["learning_rate"] for row in rows[:3]] == [0, 5e-3, 1e-2]     # two of warm-up
    said = load_json(world_only / "mine" / "config.json")
    arguments = said["arguments"]
    assert said["model_type"] == "llava" and arguments["stage"] == 0
    assert (arguments["weight_decay"], arguments["max_steps"]) == (0.1, 5)
    assert not os.path.exists(world_only / "base")
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(f"python eval_pope.py {world_only / 'mine'}")
    assert weights(world_only / "mine") != weights(made / "base")
    assert "5 steps of 32 = 8 × 4 × 1" in out


@pytest.mark.parametrize("flags", (["--max_steps", "2"], ["--bf16"], ["--num_train_epochs", "1"],
                                   ["--gradient_accumulation_steps", "4"]))
def test_each_flag_makes_it_a_run_of_its_own(world_only, main, monkeypatch, flags):
    """Also without --output_dir: out/stage0, not out/base."""
    runs = []
    monkeypatch.chdir(world_only)
    os.makedirs("out")
    for name in ("world", "untrained"):
        os.rename(name, f"out/{name}")
    monkeypatch.setattr(train, "train", runs.append)
    main("--stage", 0, *SIZES, *flags)
    run, = runs
    name = flags[0].removeprefix("--")
    base = parse_flags(["--stage", "0", *SIZES])
    typed = parse_flags(["--stage", "0", *SIZES, *flags])
    assert getattr(run, name) == getattr(typed, name) != getattr(base, name)
    assert run.output_dir == "out/stage0" and run.model_name_or_path == "out/untrained"
    assert run.data_path == "out/world/llava/train.json"
    assert not os.path.exists("out/base") and not os.path.exists("out/world/hadpo")


def test_stage_0_with_the_recipes_own_numbers_is_the_base(made, world_only, main):
    """Into a folder of the user's, and byte by byte what the tiny world makes for itself."""
    main("--stage", 0, *SIZES, "--output_dir", world_only / "mine")
    assert weights(world_only / "mine") == weights(made / "base")
    assert not os.path.exists(world_only / "base")


def test_stage_0_sweeps(world_only, main):
    main("--stage", 0, *SIZES, "--max_steps", 1, "--learning_rate", 1e-2, 1e-3,
         "--output_dir", world_only / "mine")
    both = [weights(world_only / f"mine-{rate}") for rate in ("0.01", "0.001")]
    assert both[0] and both[1] and both[0].keys() == both[1].keys()


def test_stage_0_needs_its_untrained_model_only_once(made, tmp_path, main):
    """Where a base is there and the untrained model is not, it is made again, the same."""
    for name in ("world", "base"):
        shutil.copytree(made / name, tmp_path / name)
    main("--stage", 0, *SIZES, "--max_steps", 1, "--output_dir", tmp_path / "mine")
    assert weights(tmp_path / "untrained") == weights(made / "untrained")
    assert weights(tmp_path / "base") == weights(made / "base")


# ---- The one place of the tiny world ------------------------------------------------------------


def test_the_world_has_one_place(world_only, made, main, monkeypatch, capsys):
    """out/, whatever the run's folder is called: nothing is made a second time, and the checkpoint
    finds its world.
    """
    monkeypatch.chdir(world_only)
    os.makedirs("out")
    for name in ("world", "untrained"):
        os.rename(name, f"out/{name}")
    shutil.copytree(made / "base", "out/base")
    for folder in ("runs/first", f"{world_only}/elsewhere/deep/second", "third"):
        main("--stage", 1, *SIZES, "--max_steps", 1, "--output_dir", folder)
        assert places.world_beside(folder) == ("out/world", folder)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(f"python eval_pope.py {folder}")
    assert sorted(os.listdir()) == ["elsewhere", "out", "runs", "third"]
    assert os.listdir("runs") == ["first"] and os.listdir("elsewhere/deep") == ["second"]
    assert sorted(os.listdir("out")) == ["base", "features", "untrained", "world"]


def test_a_world_beside_the_output_is_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.makedirs("other/world")
    assert [tiny_root(path) for path in ("other/stage1", "other/base", "runs/base", "runs/a", "a")
            ] == ["other", "other", "runs", "out", "out"]


def test_stage_2_starts_where_init_says(made, main, capsys):
    """A stage 1 beside it changes nothing; if it is named, its length is said."""
    main("--stage", 1, *SIZES, "--max_steps", 1, "--output_dir", made / "stage1")
    capsys.readouterr()
    main("--stage", 2, *SIZES, "--max_steps", 1, "--output_dir", made / "plain")
    assert "stage 2 from an identity block:" in capsys.readouterr().out
    main("--stage", 2, *SIZES, "--max_steps", 1, "--output_dir", made / "on",
         "--init", made / "stage1")
    said = capsys.readouterr().out
    assert f"stage 2 from {made}/stage1 (ended by --max_steps at step 1):" in said
    main("--stage", 2, *SIZES, "--num_train_epochs", 0.1, "--output_dir", made / "on2",
         "--init", made / "stage1")
    main("--stage", 2, *SIZES, "--max_steps", 1, "--output_dir", made / "on3",
         "--init", made / "on2")
    assert f"stage 2 from {made}/on2 (1 steps, 0.1 epochs):" in capsys.readouterr().out


# ---- Folders of the tiny world's own -------------------------------------------------------------


@pytest.mark.parametrize("name", ("world", "untrained", "features", "base"))
@pytest.mark.parametrize("stage", (0, 1))
def test_its_own_folders_are_no_output(made, main, name, stage):
    """A run must not write over what all runs beside it start from."""
    before = weights(made / "base")
    with pytest.raises(InputError, match=f"--output_dir {made / name}.*tiny world") as error:
        main("--stage", stage, "--max_steps", 2, *SIZES, "--output_dir", made / name)
    print(error.value)
    assert weights(made / "base") == before and os.path.isdir(made / "world")


def test_real_models_may_be_written_anywhere(world):
    """Only the tiny world has folders of its own."""
    assert parse_flags(["--output_dir", "out/base", *dpo_flags(world)]).output_dir == "out/base"


def test_voco_starts_from_the_base(made, tmp_path, main):
    """It has learnt to see; the untrained model is not needed."""
    for name in "world", "base":
        shutil.copytree(made / name, tmp_path / name)
    before = weights(tmp_path / "base")
    main("--stage", 0, "--voco", 2, *SIZES, "--max_steps", 1, "--output_dir", tmp_path / "voco")
    config = load_json(tmp_path / "voco" / "config.json")
    assert config["num_voco"] == 2
    assert config["arguments"]["model_name_or_path"] == str(tmp_path / "base")
    assert config["arguments"]["num_train_epochs"] == 2 and weights(tmp_path / "base") == before
    assert sorted(os.listdir(tmp_path)) == ["base", "voco", "world"]
