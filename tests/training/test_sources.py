"""training/sources.py: which files' data a run takes, and which flags do not belong together."""
import os

import pytest
from conftest import dpo_flags
from short_runs import llava_flags

from support.common import InputError
from training.flags import parse_flags


def of_world(world, *names):
    """Flags of some of the session world's files."""
    paths = {"--model_name_or_path": world.base, "--vg_path": world.vg,
             "--desc_data_path": world.desc, "--pope_data_path": world.pairs,
             "--data_path": world.llava, "--image_folder": world.images,
             "--preference_data": world.pairs}              # any file that is there
    return [text for name in names for text in (f"--{name}", paths[f"--{name}"])]


MODEL, PAIRS = "model_name_or_path", ("vg_path", "desc_data_path", "pope_data_path")
REFUSED = {     # other flags, names of files; what is said
    "HA-DPO's files and conversations": (
        "--stage 1 --loss sft", (MODEL, *PAIRS, "data_path"),
        "--vg_path and --data_path are two kinds of data"),
    "HA-DPO's files and other pairs": (
        "--stage 1", (MODEL, *PAIRS, "preference_data"),
        "--vg_path and --preference_data are two kinds of data"),
    "one of HA-DPO's files and conversations": (
        "--stage 1 --loss sft", (MODEL, "pope_data_path", "data_path"),
        "--pope_data_path and --data_path are two kinds of data"),
    "pairs and conversations in the tiny world": (
        "--stage 1 --loss sft", ("desc_data_path", "pope_data_path", "data_path"),
        "--desc_data_path and --data_path are two kinds of data"),
    "conversations for dpo": (
        "--stage 1", (MODEL, "data_path"),
        "--data_path .*train.json: conversations have no rejected answers, which --loss dpo"),
    "conversations for ipo": (
        "--stage 1 --loss ipo", ("data_path",), "no rejected answers, which --loss ipo needs"),
    "other pairs for sft": (
        "--stage 1 --loss sft", (MODEL, "preference_data"),
        "--preference_data: is the data of --loss dpo, ipo and hinge"),
    "no data, dpo": (
        "--stage 1", (MODEL,),
        "--vg_path is missing: --loss dpo needs --vg_path, --desc_data_path, --pope_data_path; "
        "docs/real_weights.md tells where they come from$"),
    "no data, sft": (
        "--stage 1 --loss sft", (MODEL,), "--vg_path is missing: --loss sft needs --vg_path, "
        "--desc_data_path, --pope_data_path; or --data_path alone"),
    "no descriptions": (
        "--stage 1", (MODEL, "vg_path", "pope_data_path"), "--desc_data_path is missing"),
    "no descriptions, sft": (
        "--stage 1 --loss sft", (MODEL, "vg_path", "pope_data_path"),
        "--desc_data_path is missing"),
    "images in the tiny world": (
        "--stage 1", PAIRS, "--vg_path is given and --model_name_or_path is not"),
    "other pairs in the tiny world": (
        "--stage 1", ("preference_data",),
        "--preference_data is given and --model_name_or_path is not"),
    "stage 0 of the tiny world, conversations": (
        "--stage 0", ("data_path",), "--data_path: stage 0 of the tiny world"),
    "stage 0 of the tiny world, pairs": (
        "--stage 0", ("desc_data_path", "pope_data_path"),
        "--desc_data_path: stage 0 of the tiny world"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_belong_together(world, tmp_path, what):
    flags, names, said = REFUSED[what]
    with pytest.raises(InputError, match=said) as error:
        parse_flags([*flags.split(), *of_world(world, *names), "--output_dir", str(tmp_path / "r")])
    print(error.value)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("loss, name", [*(("dpo", name) for name in (*PAIRS, "preference_data")),
                                        *(("sft", name) for name in (*PAIRS, "data_path"))])
def test_missing_files(world, tmp_path, loss, name):
    """The flag and the path are named before anything is read."""
    kind = PAIRS if name in PAIRS else (name,)
    flags = of_world(world, MODEL, *kind)
    flags[flags.index(f"--{name}") + 1] = str(tmp_path / "none.json")
    with pytest.raises(InputError, match=f"--{name} {tmp_path}/none.json: no such file"):
        parse_flags(["--stage", "1", "--loss", loss, *flags])


def test_what_belongs_together(world):
    """Each loss with each of its kinds of data, and the tiny world with none and with its own."""
    tiny = of_world(world, "desc_data_path", "pope_data_path")
    for flags in (dpo_flags(world), [*dpo_flags(world), "--loss", "sft"], llava_flags(world),
                  of_world(world, MODEL, "preference_data"), [], ["--loss", "sft"], tiny, tiny[:2],
                  [*tiny, "--loss", "sft"],
                  ["--loss", "sft", *of_world(world, "data_path", "image_folder")]):
        assert parse_flags(["--stage", "1", *flags]).stage == 1
    args = parse_flags(["--stage", "0", *llava_flags(world)])          # of a base of one's own
    assert args.data_path == world.llava
