"""The two programs as a user types them: train, train on, evaluate what the last line names; and everything mistyped.

The first part is the README's path through the tiny world, in an empty folder and with tiny sizes. The second gives wrong
paths and damaged files: one line that says what is wrong, an exit code, and nothing half-written.
"""
import json
import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pytest
from conftest import ROOT, dpo_flags, load_json, shell, succeeds

TINY = ["--tiny_sizes", '{"sft": 64, "preference": 24, "validation": 2, "evaluation": 6}', "--tiny_tower", '{"images": 64, "epochs": 1}',
        "--tiny_base_steps", 3, "--max_steps", 3]
TRAIN, EVAL = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "eval_pope.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 1 and stage 2 in an empty folder → (folder, what each run printed)."""
    folder = tmp_path_factory.mktemp("user")
    return folder, [succeeds("deepspeed", TRAIN, "--stage", stage, *TINY, cwd=folder) for stage in (1, 2)]


@pytest.fixture(scope="module")
def evaluated(trained):
    """What the last line of training proposes, but for everything in out/; then on two processes. → what each printed"""
    folder, (_, said) = trained
    last = [line for line in said.splitlines() if "eval_pope.py" in line][-1]
    program, script, *rest = shlex.split(last[last.index("python eval_pope.py"):])
    assert (program, script, rest) == ("python", "eval_pope.py", ["out/stage2"])
    beside = [path.removeprefix(f"{folder}/") for path in sorted(glob(f"{folder}/out/*/"))]      # what a shell makes of out/*/
    assert {"out/base/", "out/features/", "out/stage1/", "out/stage2/", "out/world/"} < set(beside)
    command = [EVAL, *beside, "--max_new_tokens", 12]
    return (succeeds("python", *command, "--output_dir", "one", cwd=folder),
            succeeds("torchrun", "--nproc_per_node", 2, *command, "--output_dir", "two", "--batch_size", 2, cwd=folder))


def test_training_in_an_empty_folder(trained):
    folder, (first, second) = trained
    assert sorted(os.listdir(folder / "out" / "stage1")) == ["config.json", "metrics.jsonl", "tokenizer.model", "trained.safetensors",
                                                               "training.svg"]
    for part in ("world", "base", "stage1", "stage2"):
        assert os.path.isdir(folder / "out" / part)
    assert not glob(str(folder / "**" / "*.partial"), recursive=True) and not glob(str(folder / "out" / "*.run"))
    assert "out/base" in first and "out/world" in first                          # made by the first run, which says so,
    assert "out/world" not in second and "stage 0" not in second                 # and found again by the second
    configs = [load_json(folder / "out" / stage / "config.json") for stage in ("stage1", "stage2")]
    assert [c["stage"] for c in configs] == [1, 2] and configs[0]["fingerprint"] == configs[1]["fingerprint"]
    assert "out/stage1" in second                                                # stage 2 started from stage 1's result
    assert all(json.loads(line)["loss"] for line in open(folder / "out" / "stage2" / "metrics.jsonl"))


def test_several_processes_give_the_identical_table(trained, evaluated):
    """Images are split over processes, and put into other batches; not a digit of the tables may change."""
    folder, _ = trained
    tables = [[line for line in said.splitlines() if line.startswith("|")] for said in evaluated]
    assert tables[0] == tables[1] and len(tables[0]) == 3 * (2 + 3)              # three splits; base, stage 2, stage 1
    one, two = load_json(folder / "one" / "metrics.json"), load_json(folder / "two" / "metrics.json")
    assert one == two and set(one["metrics"]) == {"random", "popular", "adversarial"}
    files = sorted(name for name in os.listdir(folder / "one") if name.endswith(".jsonl"))
    assert len(files) == 9 and files == sorted(name for name in os.listdir(folder / "two") if name.endswith(".jsonl"))
    for name in files:
        rows = [[json.loads(line) for line in open(folder / way / name)] for way in ("one", "two")]
        assert [(r["image"], r["question"], r["answer"]) for r in rows[0]] == [(r["image"], r["question"], r["answer"]) for r in rows[1]]


def test_only_checkpoints_are_evaluated(trained, evaluated):
    """Of out/*/ the two checkpoints, in that order behind their base; the others are named in one line."""
    for said in evaluated:
        left_out, = (line for line in said.splitlines() if line.startswith("left out"))
        others = set(os.listdir(trained[0] / "out")) - {"stage1", "stage2"}
        assert {os.path.basename(path) for path in left_out.partition(": ")[2].split(", ")} == others
        assert re.findall(r"^\| (\w+) \|", said, re.MULTILINE) == 3 * ["model", "base", "stage1", "stage2"]


def test_answers_score_as_the_table_says(trained, evaluated):
    """The JSONL files, counted by themselves, give the metrics: what is written is what was judged."""
    folder, _ = trained
    for split, models in load_json(folder / "one" / "metrics.json")["metrics"].items():
        questions = [json.loads(line) for line in open(folder / "out" / "world" / "pope" / f"coco_pope_{split}.json")]
        assert len(questions) == 36 and set(map(len, models.values())) == {11}
        counts = []
        for path in glob(str(folder / "one" / f"*_{split}.jsonl")):
            answers = {(row["image"], row["question"]): row["answer"] for row in map(json.loads, open(path))}
            no = [bool({"No", "not", "no"} & set(answers[q["image"], q["text"]].split(".")[0].replace(",", "").split(" "))) for q in questions]
            counts.append(sum(n == (q["label"] == "no") for n, q in zip(no, questions)))
        assert sorted(counts) == sorted(model["tp"] + model["tn"] for model in models.values())


# ---------------------------------------------------------------------------------------------------------------------
# Mistyped and damaged


def cut(path, target, share=0.5):
    """The beginning of a file, as a broken download leaves it."""
    with open(path, "rb") as source, open(target, "wb") as out:
        content = source.read()
        out.write(content[:int(share * len(content))])


@pytest.fixture(scope="module")
def bad(world, trained, tmp_path_factory):
    """A folder of damaged copies of the world's files; `stage1` there was trained on another base."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("cut_base", "no_tower", "no_tokenizer"):
        shutil.copytree(world.base, folder / name)
    cut(f"{world.base}/model.safetensors", folder / "cut_base" / "model.safetensors")
    shutil.rmtree(folder / "no_tower" / "vision_tower")
    os.remove(folder / "no_tokenizer" / "tokenizer.model")
    shutil.copytree(trained[0] / "out" / "stage1", folder / "stage1")
    cut(world.pairs, folder / "pairs.json")
    os.makedirs(folder / "VG")
    shutil.copy(f"{world.vg}/image_data.json", folder / "VG")                    # the index is there, the images are not
    os.makedirs(folder / "coco" / "val2014")
    os.makedirs(folder / "pope")
    cut(f"{world.pope}/coco_pope_random.json", folder / "pope" / "coco_pope_random.json", 0.99)
    (folder / "auto.json").write_text('{"train_batch_size": "auto"}')
    (folder / "odd.json").write_text('{"train_batch_size": 7}')
    return folder


def train(**changes):
    return "train", changes


def ask(checkpoint=None, **changes):
    return "ask", {"checkpoint": checkpoint} | changes


MISTAKES = {  # what: (program and the flags that differ from right ones; BAD/ is the folder above), what the error line says
    "no such base": (train(model_name_or_path="nowhere/llava"), "nowhere/llava.*no such folder"),
    "no such tower": (train(vision_tower="nowhere/clip"), "nowhere/clip.*no such folder"),
    "tower not there": (train(model_name_or_path="BAD/no_tower"), "vision_tower.*--vision_tower"),
    "weights cut": (train(model_name_or_path="BAD/cut_base"), "cut_base/model.safetensors"),
    "no tokenizer": (train(model_name_or_path="BAD/no_tokenizer"), "no_tokenizer/tokenizer.model"),
    "no --vg_path": (train(vg_path=None), "--vg_path is missing"),
    "no such --vg_path": (train(vg_path="nowhere/VG"), "nowhere/VG.*no such"),
    "no such data": (train(desc_data_path="nowhere/desc.json"), "nowhere/desc.json.*no such"),
    "data cut": (train(pope_data_path="BAD/pairs.json"), "pairs.json.*JSON.*line"),
    "images absent": (train(vg_path="BAD/VG"), "24 images missing.*1.jpg.*…"),
    "no such --init": (train(init="nowhere/stage1"), "nowhere/stage1"),
    "--init is a base": (train(init="BAD/cut_base"), "cut_base.*no trained checkpoint"),
    "no such DeepSpeed file": (train(deepspeed="nowhere.json"), "nowhere.json.*no such file"),
    "auto": (train(deepspeed="BAD/auto.json"), "auto.json.*train_batch_size"),
    "batch does not come out": (train(deepspeed="BAD/odd.json", per_device_train_batch_size="4"), "global batch 7 ≠ 4 per device"),
    "no such checkpoint": (ask("nowhere/stage2"), "nowhere/stage2.*no such folder"),
    "no checkpoint": (ask("BAD/VG"), "VG: no checkpoint, no base"),
    "no such questions": (ask(pope_path="nowhere/pope"), "nowhere/pope.*coco_pope_random.json"),
    "questions cut": (ask(pope_path="BAD/pope", set="random"), "pope/coco_pope_random.json.*JSON"),
    "no val2014": (ask(coco_path="nowhere/coco"), "nowhere/coco/val2014.*no such folder"),
    "evaluation images absent": (ask(coco_path="BAD/coco"), "12 images missing"),
    "checkpoint of another base": (ask("BAD/stage1", model_name_or_path="WORLD"), "stage1.*fingerprint"),
}


@pytest.fixture(scope="module")
def answered(world, bad, tmp_path_factory):
    """All of them, two at a time, each in an empty folder → {what: (finished process, folder)}"""
    right = dpo_flags(world)
    right = {"train": dict(zip([flag.removeprefix("--") for flag in right[::2]], right[1::2])) | {"stage": 1},
             "ask": {"pope_path": world.pope, "coco_path": world.coco}}

    def run(what):
        (kind, changes), _ = MISTAKES[what]
        flags = right[kind] | {k: v and v.replace("BAD", str(bad)).replace("WORLD", world.base) for k, v in changes.items()}
        checkpoint = [flags.pop("checkpoint") or world.base] if kind == "ask" else []
        cwd = tmp_path_factory.mktemp("mistake")
        typed = [x for name, value in flags.items() if value is not None for x in (f"--{name}", value)]
        return what, (shell("python", TRAIN if kind == "train" else EVAL, *checkpoint, *typed, "--output_dir", "result", cwd=cwd), cwd)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, MISTAKES))


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(answered, what):
    done, cwd = answered[what]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print(lines[-1])
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr and sum("error:" in line for line in lines) == 1
    assert lines[-1].startswith("error: ") and re.search(MISTAKES[what][1], lines[-1])
    assert os.listdir(cwd) == []                                                 # no folder, no .partial, nothing


def test_wrong_flags_are_argparses():
    for script in (TRAIN, EVAL):
        done = shell("python", script, "--no_such_flag")
        assert done.returncode == 2 and "usage" in done.stderr and "Traceback" not in done.stderr
