"""The two programs as a user types them: train, train on, evaluate; and everything mistyped.

The first part is the README's path through the tiny world, in an empty folder and with tiny sizes;
it evaluates what the last line of training names. The second gives wrong paths and damaged files:
one line that says what is wrong, an exit code, and nothing half-written.
"""
import json
import os
import re
import shlex
import shutil
from glob import glob

import pytest
from conftest import dpo_flags, load_json
from programs import ROOT, shell, succeeds

TINY = ["--tiny_sizes", '{"sft": 64, "preference": 24, "validation": 2, "evaluation": 6}',
        "--tiny_tower", '{"images": 64, "epochs": 1}', "--tiny_base_steps", 3, "--max_steps", 3]
TRAIN, EVAL = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "eval_pope.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 1 and stage 2 in an empty folder: one process, and two of DeepSpeed's launcher
    → (folder, what each run printed).
    """
    folder = tmp_path_factory.mktemp("user")
    one = succeeds("python", TRAIN, "--stage", 1, *TINY, cwd=folder)
    two = succeeds("deepspeed", "--num_gpus", 2, TRAIN, "--stage", 2, "--init", "out/stage1", *TINY,
                   cwd=folder, fresh=True)
    return folder, (one, two)


@pytest.fixture(scope="module")
def evaluated(trained):
    """What the last line of training proposes, but for everything in out/; then on two processes.

    → what each printed
    """
    folder, (_, said) = trained
    last = [line for line in said.splitlines() if "eval_pope.py" in line][-1]
    program, script, *rest = shlex.split(last[last.index("python eval_pope.py"):])
    assert (program, script, rest) == ("python", "eval_pope.py", ["out/stage2"])
    # What a shell makes of out/*/
    beside = [path.removeprefix(f"{folder}/") for path in sorted(glob(f"{folder}/out/*/"))]
    assert {"out/base/", "out/features/", "out/stage1/", "out/stage2/", "out/world/"} < set(beside)
    command = [EVAL, *beside, "--max_new_tokens", 12]
    two = ["torchrun", "--nproc_per_node", 2, *command, "--output_dir", "two", "--batch_size", 2]
    return (succeeds("python", *command, "--output_dir", "one", cwd=folder, fresh=True),
            succeeds(*two, cwd=folder))


def read_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_training_in_an_empty_folder(trained):
    folder, (first, second) = trained
    assert sorted(os.listdir(folder / "out" / "stage1")) == [
        "README.md", "config.json", "metrics.jsonl", "tokenizer.model", "trained.safetensors",
        "training.svg"]
    for part in ("world", "base", "stage1", "stage2"):
        assert os.path.isdir(folder / "out" / part)
    assert not glob(str(folder / "**" / "*.partial"), recursive=True)
    assert not glob(str(folder / "out" / "*.run"))
    # World and base are made by the first run, which says so, and found again by the second.
    assert "out/untrained" in first and "out/world" in first
    assert "out/world" not in second and "stage 0" not in second
    configs = [load_json(folder / "out" / stage / "config.json") for stage in ("stage1", "stage2")]
    assert [c["stage"] for c in configs] == [1, 2]
    assert configs[0]["fingerprint"] == configs[1]["fingerprint"]
    assert "out/stage1" in second                           # stage 2 started from stage 1's result
    assert all(row["loss"] for row in read_lines(folder / "out" / "stage2" / "metrics.jsonl"))


def test_several_processes_give_the_identical_table(trained, evaluated):
    """Images are split over processes, and put into other batches; not a digit of the tables may
    change.
    """
    one, two = (trained[0] / name for name in ("one", "two"))
    tables = [[line for line in said.splitlines() if line.startswith("|")] for said in evaluated]
    # Three splits; base, stage 2, stage 1.
    assert tables[0] == tables[1] and len(tables[0]) == 3 * (2 + 3)
    metrics = load_json(one / "metrics.json")
    assert metrics == load_json(two / "metrics.json")
    assert set(metrics["metrics"]) == {"random", "popular", "adversarial"}
    files, of_two = (sorted(path.name for path in folder.glob("*.jsonl")) for folder in (one, two))
    assert len(files) == 9 and files == of_two
    for name in files:
        ours, theirs = ([(row["image"], row["question"], row["answer"])
                         for row in read_lines(folder / name)] for folder in (one, two))
        assert ours == theirs


def test_only_checkpoints_are_evaluated(trained, evaluated):
    """Of out/*/ the two checkpoints, in that order behind their base; the others are named in one
    line.
    """
    for said in evaluated:
        line, = (line for line in said.splitlines() if line.startswith("left out"))
        left_out = {os.path.basename(path) for path in line.partition(": ")[2].split(", ")}
        assert left_out == set(os.listdir(trained[0] / "out")) - {"stage1", "stage2"}
        rows = re.findall(r"^\| (\w+) \|", said, re.MULTILINE)
        assert rows == 3 * ["model", "base", "stage1", "stage2"]


def test_answers_score_as_the_table_says(trained, evaluated):
    """The JSONL files, counted by themselves, give the metrics: what is written was judged."""
    folder, _ = trained
    for split, models in load_json(folder / "one" / "metrics.json")["metrics"].items():
        questions = read_lines(folder / "out" / "world" / "pope" / f"coco_pope_{split}.json")
        assert len(questions) == 36 and set(map(len, models.values())) == {11}
        counts = []
        for path in glob(str(folder / "one" / f"*_{split}.jsonl")):
            answers = {(row["image"], row["question"]): row["answer"] for row in read_lines(path)}
            right = 0
            for q in questions:
                first = answers[q["image"], q["text"]].split(".")[0].replace(",", "").split(" ")
                right += bool({"No", "not", "no"} & set(first)) == (q["label"] == "no")
            counts.append(right)
        assert sorted(counts) == sorted(model["tp"] + model["tn"] for model in models.values())


# ---- Mistyped and damaged ------------------------------------------------------------------------


def cut(path, target, share=0.5):
    """The beginning of a file, as a broken download leaves it."""
    with open(path, "rb") as source, open(target, "wb") as out:
        content = source.read()
        out.write(content[:int(share * len(content))])


@pytest.fixture(scope="module")
def bad(world, trained, tmp_path_factory):
    """A folder of damaged copies of the world's files; its `stage1` belongs to another base."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("cut_base", "no_tower", "no_tokenizer"):
        shutil.copytree(world.base, folder / name)
    cut(f"{world.base}/model.safetensors", folder / "cut_base" / "model.safetensors")
    shutil.rmtree(folder / "no_tower" / "vision_tower")
    os.remove(folder / "no_tokenizer" / "tokenizer.model")
    shutil.copytree(trained[0] / "out" / "stage1", folder / "stage1")
    cut(world.pairs, folder / "pairs.json")
    os.makedirs(folder / "VG")
    # The index is there, the images are not.
    shutil.copy(f"{world.vg}/image_data.json", folder / "VG")
    os.makedirs(folder / "coco" / "val2014")
    os.makedirs(folder / "pope")
    questions = "coco_pope_random.json"
    cut(f"{world.pope}/{questions}", folder / "pope" / questions, 0.99)
    (folder / "auto.json").write_text('{"train_batch_size": "auto"}')
    (folder / "odd.json").write_text('{"train_batch_size": 7}')
    return folder


def train(**changes):
    return "train", changes


def ask(checkpoint=None, **changes):
    return "ask", {"checkpoint": checkpoint} | changes


MISTAKES = {  # what: (program and flags that differ from right ones, what the error line says)
    # BAD/ is the folder above.
    "no such base": (train(model_name_or_path="nowhere/llava"), "nowhere/llava.*no such folder"),
    "no such tower": (train(vision_tower="nowhere/clip"), "nowhere/clip.*no such folder"),
    "tower not there": (train(model_name_or_path="BAD/no_tower"), "vision_tower.*--vision_tower"),
    "weights cut": (train(model_name_or_path="BAD/cut_base"), "cut_base/model.safetensors"),
    "no tokenizer": (train(model_name_or_path="BAD/no_tokenizer"), "no_tokenizer/tokenizer.model"),
    "no --vg_path": (train(vg_path=None), "--vg_path is missing"),
    "no such --vg_path": (train(vg_path="nowhere/VG"), "nowhere/VG.*no such"),
    "no such data": (train(desc_data_path="nowhere/desc.json"), "nowhere/desc.json.*no such"),
    "data cut": (train(pope_data_path="BAD/pairs.json"), "pairs.json.*JSON.*line"),
    "images absent": (train(vg_path="BAD/VG"), "24 images missing.*1.jpg.*and 14 more"),
    "no such --init": (train(init="nowhere/stage1"), "nowhere/stage1"),
    "--init is a base": (train(init="BAD/cut_base"), "cut_base.*no trained checkpoint"),
    "no such DeepSpeed file": (train(deepspeed="nowhere.json"), "nowhere.json.*no such file"),
    "auto": (train(deepspeed="BAD/auto.json"), "auto.json.*train_batch_size"),
    "batch does not come out": (train(deepspeed="BAD/odd.json", per_device_train_batch_size="4"),
                                "global batch 7 ≠ 4 per device"),
    "no such checkpoint": (ask("nowhere/stage2"), "nowhere/stage2.*no such folder"),
    "no checkpoint": (ask("BAD/VG"), "VG: no checkpoint, no base"),
    "a folder of checkpoints": (ask("BAD"), "no checkpoint, no base.*; is .*/.* meant"),
    "a file that is no model": (ask("BAD/pairs.json"), "pairs.json: is no model; name the folder"),
    "a file of a checkpoint": (ask("BAD/stage1/config.json"), "one file of a model; name its fol"),
    "no such questions": (ask(pope_path="nowhere/pope"), "nowhere/pope.*no such folder"),
    "questions cut": (ask(pope_path="BAD/pope", set="random"), "pope/coco_pope_random.json.*JSON"),
    "no val2014": (ask(coco_path="nowhere/coco"), "nowhere/coco/val2014.*no such folder"),
    "evaluation images absent": (ask(coco_path="BAD/coco"), "12 images missing"),
    "checkpoint of another base": (ask("BAD/stage1", model_name_or_path="WORLD"),
                                   "stage1.*fingerprint"),
}


@pytest.fixture(scope="module")
def answered(world, bad, tmp_path_factory):
    """All of them, each in an empty folder → {what: (finished process, folder)}"""
    flags = dpo_flags(world)
    names = [flag.removeprefix("--") for flag in flags[::2]]
    right = {"train": dict(zip(names, flags[1::2], strict=True)) | {"stage": 1},
             "ask": {"pope_path": world.pope, "coco_path": world.coco}}

    def run(what):
        (kind, changes), _ = MISTAKES[what]
        changes = {name: value and value.replace("BAD", str(bad)).replace("WORLD", world.base)
                   for name, value in changes.items()}
        flags = right[kind] | changes
        command = [TRAIN] if kind == "train" else [EVAL, flags.pop("checkpoint") or world.base]
        for name, value in flags.items():
            if value is not None:
                command += [f"--{name}", value]
        cwd = tmp_path_factory.mktemp("mistake")
        return what, (shell("python", *command, "--output_dir", "result", cwd=cwd), cwd)

    return dict(map(run, MISTAKES))


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(answered, what):
    done, cwd = answered[what]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print(lines[-1])
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr and sum("error:" in line for line in lines) == 1
    assert lines[-1].startswith("error: ") and re.search(MISTAKES[what][1], lines[-1])
    assert os.listdir(cwd) == []                                  # no folder, no .partial, nothing


def test_wrong_flags_are_one_line():
    for script, flag in ((TRAIN, "--output_dir"), (EVAL, "--output_dir")):
        done = shell("python", script, "--output", "x")
        usage, error, help = done.stderr.splitlines()
        assert done.returncode == 2 and usage.startswith("usage: ") and help.endswith("--help")
        assert error == f"error: --output: no such flag; is {flag} meant?"
    done = shell("python", EVAL)
    assert done.returncode == 2 and "required: CKPT" in done.stderr
