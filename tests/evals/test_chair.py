"""evals/chair.py and evals/describe.py: CHAIR by hand, the program in the tiny world and on files
in COCO's form, and what an interruption leaves.
"""
import json
import os
import re

import pytest
from beside import checkpoints_beside
from conftest import load_json
from PIL import Image
from programs import TwoProcesses, shell, succeeds

from checkpoints.load import load_base
from checkpoints.save import save_trained
from data import DESCRIBE
from evals import chair, describe
from evals.objects import read_words
from evals.sampling import Conversation, Sampling
from support.common import InputError

CHAIR = "python", "-m", "evals.chair"


# ---- By hand -------------------------------------------------------------------------------------


def test_numbers_by_hand():
    texts = {"a": "A dog and a dog with a cat.",            # 3 named, 2 wrong, 1 of 2 found
             "b": "A man.",                                 # 1 named, 0 wrong, 1 of 1 found
             "c": "Nothing is here.",                       # 0 named, 0 of 1 found
             "d": "A hot dog, people and a person."}        # 3 named, 1 wrong, 1 of 1 found
    shown = {"a": {"cat", "bed"}, "b": {"person"}, "c": {"kite"}, "d": {"person"}, "e": {"cup"}}
    numbers = chair.measure(chair.judge(texts, shown, read_words()))
    assert numbers == {"chair_i": pytest.approx(100 * 3 / 7), "chair_s": 50.0, "recall": 60.0,
                       "words": (8 + 2 + 3 + 7) / 4, "named": 7, "images": 4}
    assert chair.measure(chair.judge({"a": ""}, {"a": set()}, read_words()))["chair_i"] == 0


def test_table():
    row = {"chair_i": 12.346, "chair_s": 50.0, "recall": 60.0, "words": 4.5, "named": 7,
           "images": 4}
    last = chair.table({"base": row}).splitlines()[2]
    assert last == "| base | 12.35 | 50.00 | 60.00 | 4.50 | 7 | 4 |"


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    return checkpoints_beside(world, tmp_path_factory.mktemp("beside"))


# ---- The tiny world ------------------------------------------------------------------------------


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_program_in_the_tiny_world(root, world):
    said = succeeds(*CHAIR, root / "stage1", "--max_new_tokens", 12)
    assert f"prompt '{DESCRIBE[0]}', system prompt llava, greedy, at most 12 new tokens" in said
    assert re.search(r"\| base \|.*\| 12 \|\n\| stage1 \|.*\| 12 \|", said)
    folder = root / "stage1" / "chair"
    assert sorted(os.listdir(folder)) == ["base.jsonl", "metrics.json", "stage1.jsonl"]
    told = load_json(folder / "metrics.json")
    assert list(told["metrics"]) == ["base", "stage1"] and "greedy" in told["asked"]
    assert told["checkpoints"] == {"stage1": str(root / "stage1")}
    truth = load_json(f"{world.folder}/world.json")["evaluation"]
    rows = rows_of(folder / "stage1.jsonl")
    assert {row["image"]: row["shown"] for row in rows} == {
        image: sorted(facts["objects"]) for image, facts in truth.items()}

    # The same texts, scored without a model, give the same numbers.
    again = succeeds(*CHAIR, "--score", folder / "base.jsonl", folder / "stage1.jsonl",
                     "--coco_path", world.coco, "--annotations",
                     as_coco(root, truth), "--synonyms", one_a_line(root, world))
    assert again.splitlines()[-2:] == [line for line in said.splitlines() if "| 12 |" in line]


def as_coco(root, truth):
    """The tiny world's truth in COCO's form."""
    classes = sorted({name for facts in truth.values() for name in facts["objects"]})
    values = {"images": [{"id": n, "file_name": image} for n, image in enumerate(truth)],
              "categories": [{"id": n, "name": name} for n, name in enumerate(classes)],
              "annotations": [{"image_id": n, "category_id": classes.index(name)}
                              for n, facts in enumerate(truth.values())
                              for name in facts["objects"]]}
    path = root / "instances_val2014.json"
    path.write_text(json.dumps(values))
    return path


def one_a_line(root, world):
    path = root / "synonyms.txt"
    path.write_text("\n".join(load_json(f"{world.folder}/world.json")["classes"]))
    return path


def asked(root, *flags):
    """What the program says of the base, in this process → {model: {image: Judged}}."""
    parser = chair.parser()
    return chair.evaluate(parser.parse_args([str(flag) for flag in (root / "base", *flags)]))


def test_two_processes_say_the_same(root, tmp_path):
    flags = root / "stage1", "--max_new_tokens", 6, "--output_dir"
    one = succeeds(*CHAIR, *flags, tmp_path / "one")
    two = TwoProcesses("-m")("evals.chair", *flags, tmp_path / "two")
    tables = [[line for line in said.splitlines() if line.startswith("|")] for said in (one, two)]
    assert tables[0] == tables[1] and len(tables[0]) == 4
    for name in "base.jsonl", "stage1.jsonl":
        assert rows_of(tmp_path / "one" / name) == rows_of(tmp_path / "two" / name)


def test_results_stay_beside_what_they_are_about(root, world, tmp_path):
    base, folder = load_base(world.base), str(tmp_path / "again")
    weights = {"lm_head.weight": base.head.lm_head.weight}
    info = {"base": world.base, "fingerprint": base.fingerprint}
    for _ in range(2):
        save_trained(folder, weights, info, base.tokenizer)
        for name in "chair", "shr":
            os.makedirs(os.path.join(folder, name), exist_ok=True)
            with open(os.path.join(folder, name, "base.jsonl"), "a") as file:
                file.write("a line\n")
    for place in (folder, f"{folder}-old1"):
        assert os.path.getsize(os.path.join(place, "shr", "base.jsonl")) == 7


def test_texts_are_those_of_a_conversation(root, world, monkeypatch):
    """Greedy and with beams, each image as if it were asked alone."""
    model, system = load_base(world.base), "Is there a dog in the image?"
    monkeypatch.setitem(describe.SYSTEMS, "hadpo", system)
    begun = []                          # system prompts of the beam searches

    def begin(*args):
        begun.append(args[3])
        return Conversation(*args)

    monkeypatch.setattr(describe, "Conversation", begin)
    for beams in (1, 3):
        judged = asked(root, "--num_beams", beams, "--max_new_tokens", 8, "--output_dir",
                       root / f"beams{beams}", "--prompt", DESCRIBE[1], "--system_prompt",
                       "hadpo")
        for image, row in judged["base"].items():
            path = f"{world.coco}/val2014/{image}"
            ids = Conversation(model, model.head, path, system).answer(
                DESCRIBE[1], Sampling(num_beams=beams, max_new_tokens=8))
            assert row.text == model.tokenizer.decode(list(ids)).strip()
    assert begun == 12 * [system]


def test_validation_images(root, world):
    truth = load_json(f"{world.folder}/world.json")["validation"]
    judged = asked(root, "--coco_path", f"{world.folder}/val/coco", "--max_new_tokens", 2,
                   "--output_dir", root / "validation")
    assert list(judged["base"]) == sorted(truth)


def test_lists_of_images(root, world, tmp_path):
    names = sorted(load_json(f"{world.folder}/world.json")["evaluation"])
    few = "--max_new_tokens", 2, "--output_dir", tmp_path / "out"
    drawn = [list(asked(root, "--num_images", 5, "--seed", seed, *few)["base"])
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    path = tmp_path / "list"
    numbers = [str(int(re.search(r"(\d+)\.jpg", name)[1])) for name in names]
    for text in (f"{names[3]}\n{names[1]}\n{names[3]}\n", f"{numbers[3]} {numbers[1]}",
                 json.dumps([{"image_id": int(numbers[3])}, {"image": names[1]}]),
                 f'{{"image": "{names[3]}"}}\n{{"image": "{names[1]}"}}\n'):
        path.write_text(text)
        assert list(asked(root, "--images", path, *few)["base"]) == [names[3], names[1]]
    path.write_text(f"{names[0]}\nno.jpg\n")
    with pytest.raises(InputError, match=r"list, row 1: image 'no.jpg' is none of the 20 images"):
        asked(root, "--images", path, *few)


def test_an_interruption_keeps_what_is_there(root, tmp_path, monkeypatch, capsys):
    whole = asked(root, "--max_new_tokens", 6, "--output_dir", tmp_path / "whole")
    real, count = describe.answer, []

    def short(*args):
        """Ctrl-C after three images."""
        for n, answered in enumerate(real(*args)):
            if n == 3:
                raise KeyboardInterrupt
            yield answered

    monkeypatch.setattr(describe, "answer", short)
    with pytest.raises(SystemExit) as ended:
        asked(root, "--max_new_tokens", 6, "--output_dir", tmp_path / "cut")
    assert ended.value.code == 130 and "3 of 12 images are kept" in capsys.readouterr().err

    def counting(*args):
        for answered in real(*args):
            count.append(answered[0])
            yield answered

    monkeypatch.setattr(describe, "answer", counting)
    assert asked(root, "--max_new_tokens", 6, "--output_dir", tmp_path / "cut") == whole
    assert len(count) == 9 and sorted(os.listdir(tmp_path / "cut")) == ["base.jsonl",
                                                                        "metrics.json"]
    # Kept texts of another prompt are not taken up.
    monkeypatch.setattr(describe, "answer", short)
    with pytest.raises(SystemExit):
        asked(root, "--max_new_tokens", 6, "--output_dir", tmp_path / "cut")
    monkeypatch.setattr(describe, "answer", counting)
    asked(root, "--max_new_tokens", 6, "--output_dir", tmp_path / "cut", "--prompt", "What?")
    assert len(count) == 9 + 12


# ---- COCO's files, and texts that exist ----------------------------------------------------------


@pytest.fixture
def coco(tmp_path, world):
    """Three images in COCO's layout."""
    folder = tmp_path / "coco"
    os.makedirs(folder / "val2014")
    os.makedirs(folder / "annotations")
    names = [f"COCO_val2014_00000000000{n}.jpg" for n in (1, 2, 3)]
    for name in names:
        Image.new("RGB", (48, 48)).save(folder / "val2014" / name)
    instances = {"images": [{"id": n, "file_name": name} for n, name in enumerate(names, 1)],
                 "categories": [{"id": 18, "name": "dog"}, {"id": 52, "name": "banana"}],
                 "annotations": [{"image_id": 1, "category_id": 18}]}
    captions = {"annotations": [{"image_id": 2, "caption": "bananas"}]}
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(captions))
    return folder


def test_cocos_folder(root, coco):
    judged = asked(root, "--coco_path", coco, "--annotations", coco / "annotations",
                   "--max_new_tokens", 2, "--output_dir", coco / "out")
    assert [row.shown for row in judged["base"].values()] == [{"dog"}, {"banana"}, set()]


@pytest.mark.parametrize("text", [
    '{"image_id": 1, "caption": "A dog."}\n{"image_id": 2, "caption": "A dog."}\n',
    '[{"image": "COCO_val2014_000000000001.jpg", "answer": "A dog."},'
    ' {"image": "2", "text": "Dog"}]',
    '{"1": "A dog.", "000000000002": "dogs"}', '{\n "1": "A dog.",\n "2": "puppy"\n}'])
def test_forms_of_texts(coco, text):
    path = coco / "said.json"
    path.write_text(text)
    args = ["--score", str(path), "--annotations", str(coco / "annotations")]
    judged = chair.evaluate(chair.parser().parse_args(args))
    assert [len(row.wrong()) for row in judged["said"].values()] == [0, 1]


@pytest.mark.parametrize("flags, fault", [
    ([], "name a checkpoint"),
    (["BASE", "--score", "SAID"], "--score .*leave .* out"),
    (["--score", "SAID", "--annotations", "COCO/val2014"], "no instances_val2014.json"),
    (["--score", "SAID", "OTHER", "--annotations", "COCO/annotations"], "1 images are described"),
    (["--score", "ODD", "--annotations", "COCO/annotations"], "image '9' is none of the 3"),
    (["--score", "TWICE", "--annotations", "COCO/annotations"], "row 1: .*otherwise"),
    (["--score", "SAID", "--images", "LIST", "--annotations", "COCO/annotations"],
     "1 of 2 images are not described"),
    (["BASE", "--coco_path", "COCO", "--output_dir", "COCO/out"], "none of the 20 images.*--annot"),
    (["BASE", "--synonyms", "SAID"], "--synonyms"),
    (["BASE", "--output_dir", "SAID/x"], "--output_dir.*is a file")])
def test_mistakes(root, coco, flags, fault):
    files = {"SAID": '{"1": "A dog."}', "OTHER": '{"1": "A dog.", "2": "x"}', "ODD": '{"9": "x"}',
             "TWICE": '{"image_id": 1, "text": "a"}\n{"image_id": 1, "text": "b"}', "LIST": "1 3"}
    for name, text in files.items():
        (coco / name).write_text(text)
    places = {"BASE": root / "base", "COCO": coco, **{name: coco / name for name in files}}
    typed = [re.sub("^[A-Z]{2,}", lambda m: str(places[m[0]]), flag) for flag in flags]
    with pytest.raises(InputError, match=fault) as error:
        chair.evaluate(chair.parser().parse_args(typed))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_base_is_refused_in_one_line(root, coco):
    done = shell(*CHAIR, root / "stage1", "--model_name_or_path", coco)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
