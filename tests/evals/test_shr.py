"""evals/shr.py and evals/regions.py: sentences and verdicts by hand, HA-DPO's and Visual Genome's
files, the tiny world's own judge, and a whole evaluation with a server, interrupted.
"""
import json
import os
import re

import pytest
from beside import checkpoints_beside
from conftest import load_json
from PIL import Image
from programs import free_port, succeeds
from small_files import assert_names_the_fault
from stand_in import Misbehaviour, StandIn

from evals import judge as judging
from evals import regions, shr
from evals.regions import prompt_of, read_known
from support.common import InputError

# ---- By hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, sentences", [
    ("A dog. A cat.", ["A dog", "A cat"]),
    ("A dog runs. A dog runs. A dog. Two dogs", ["A dog runs", "Two dogs"]),
    ("A dog. A dog runs.", ["A dog", "A dog runs"]),        # only what an earlier one contains
    (" . .\n. ", []), ("", []), ("no stop", ["no stop"])])
def test_sentences(text, sentences):
    assert shr.sentences_of(text) == sentences


@pytest.mark.parametrize("reply, verdicts", [
    ("1. hallucination: no dog\n2. correct: yes\n3. cannot judge: a mood", "hcj"),
    ("Judgement:\n\n**2.** Correct\n1) HALLUCINATION, as\n 3: Cannot judge.\nThat is all.", "hcj"),
    ("1. correct\n2. correct", None), ("1. correct\n2. correct\n3. correct\n4. correct", None),
    ("1. correct\n1. hallucination\n2. correct\n3. correct", None),
    ("1. correct\n2. maybe\n3. correct", None), ("", None),
    ("1. it is correct\n2. not a hallucination\n3. correctness", None)])
def test_verdicts(reply, verdicts):
    letters = {"h": "hallucination", "c": "correct", "j": "cannot judge"}
    assert shr.verdicts_of(reply, 3) == (verdicts and [letters[v] for v in verdicts])


def test_an_empty_description_has_no_sentence_to_judge():
    assert shr.verdicts_of("", 0) == []


def test_the_ratio_is_pooled():
    h, c, j = shr.VERDICTS
    judged = {"a": shr.Judgement(["x", "y", "z"], [h, h, j]), "b": shr.Judgement(["x"], [c]),
              "c": shr.Judgement(["x", "y"], None, "1. correct")}
    assert shr.measure(judged) == {"shr": 50.0, "hallucination": 2, "correct": 1, "cannot_judge": 1,
                                   "sentences_per_image": 2.0, "images": 3, "unfit": 1}


def test_truth_is_the_judge():
    truth = {name: {"scene": "park", "objects": ["dog", "kite"]} for name in "abcd"}
    texts = {"a": "The image shows a park with a dog. There is a cup.", "b": "A street with a dog.",
             "c": "It is nice. A dog.", "d": ""}
    judged = shr.by_truth(texts, truth)
    assert [one.verdicts for one in judged.values()] == [
        ["correct", "hallucination"], ["hallucination"], ["cannot judge", "correct"], []]


# ---- Files ---------------------------------------------------------------------------------------


def write(path, value, lines=False):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value))


def write_files(folder, **changes):
    """Visual Genome with three images, and HA-DPO's list of two of them."""
    index = [{"image_id": i, "url": f"https://x.org/a/VG_100K/{i}.jpg", "width": 200, "height": 100}
             for i in (1, 2, 30)]
    regions = [{"id": i, "regions": [
        {"image_id": i, "region_id": 1, "x": 20, "y": 10, "width": 61, "height": 50,
         "phrase": f"dog {i} "},
        {"image_id": i, "region_id": 2, "x": 0, "y": 0, "width": 200, "height": 100,
         "phrase": "{all}"}]} for i in (1, 2, 30)]
    values = {"index": index, "regions": regions, "list": [{"image_id": 30}, {"image_id": "2"}],
              "part1": [{"30": ["It rains.", "It is day."]}], "part2": [{"7": ["Unused."]}]}
    values |= changes
    for i in (1, 2, 30):
        os.makedirs(folder / "VG" / "VG_100K", exist_ok=True)
        Image.new("RGB", (48, 48), (i, 0, 99)).save(folder / "VG" / "VG_100K" / f"{i}.jpg")
    write(folder / "VG" / "image_data.json", values["index"])
    write(folder / "VG" / "region_descriptions.json", values["regions"])
    write(folder / "SHR" / "val_images_final.json", values["list"])
    for part in "part1", "part2":
        write(folder / "SHR" / f"shr_factual_{part}.jsonl", values[part], lines=True)
    return str(folder / "VG"), str(folder / "SHR")


def test_what_the_judge_is_told(tmp_path):
    known = read_known(*write_files(tmp_path))
    assert known.images == {"VG_100K/30.jpg": "30", "VG_100K/2.jpg": "2"}
    told = prompt_of(known, "VG_100K/30.jpg", ["A dog", "It is {odd}"])
    assert "\n[0.10, 0.10, 0.41, 0.60]: dog 30\n[0.00, 0.00, 1.00, 1.00]: {all}\n" in told
    assert "\nIt rains.\nIt is day.\n" in told and "\n1. A dog.\n2. It is {odd}.\n" in told
    other = prompt_of(known, "VG_100K/2.jpg", ["A dog"])
    assert "dog 2" in other and "dog 30" not in other and "It rains" not in other


@pytest.mark.parametrize("changes, file, fault", [
    ({"list": [{"image_id": 5}]}, "val_images_final.json", "row 0: image_id 5 is not in"),
    ({"list": [{"id": 5}]}, "val_images_final.json", "row 0: 'image_id'"),
    ({"part2": [["a"]]}, "shr_factual_part2.jsonl", "row 0: should be"),
    ({"regions": []}, "region_descriptions.json", "no region of 2 images, e.g. 2"),
    ({"regions": [{"regions": [{"image_id": 2, "x": "a"}]}]}, "region_descriptions.json", "'x'"),
    ({"index": [{"image_id": i, "url": f"a/VG_100K/{i}.jpg"} for i in (2, 30)]},
     "image_data.json", "'width'")])
def test_damaged_files(tmp_path, changes, file, fault):
    paths = write_files(tmp_path, **changes)
    assert_names_the_fault(lambda: read_known(*paths), file, fault)


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_of_a_large_file(tmp_path, monkeypatch, indent):
    """Rows that no chunk holds as a whole, and a file that was cut at any place."""
    rows = [{"regions": [{"phrase": 'a "{[quoted]}" \\ ü' * n}], "n": n} for n in range(40)]
    path, text = tmp_path / "regions.json", json.dumps(rows, indent=indent)
    monkeypatch.setattr(regions, "CHUNK", 64)
    path.write_text(text)
    assert list(regions.rows_of(str(path))) == rows
    for length in range(1, len(text) - 1, 97):
        path.write_text(text[:length])
        with pytest.raises(InputError, match="cut short"):
            list(regions.rows_of(str(path)))


# ---- Whole evaluations ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    return checkpoints_beside(world, tmp_path_factory.mktemp("beside"))


def test_the_tiny_world(root, world):
    said = succeeds("python", "-m", "evals.shr", root / "stage1", "--judge", "truth",
                    "--max_new_tokens", 5, "--num_beams", 2, "--num_images", 7)
    assert "system prompt hadpo, 2 beams, at most 5 new tokens; judge truth" in said
    folder = root / "stage1" / "shr"
    assert sorted(os.listdir(folder)) == ["base.jsonl", "metrics.json", "stage1.jsonl"]
    metrics = load_json(folder / "metrics.json")["metrics"]
    assert [row["images"] for row in metrics.values()] == [7, 7]
    assert re.search(r"\| stage1 \| \d+\.\d\d \|", said)


@pytest.fixture
def files(root, tmp_path, monkeypatch):
    """Typed flags of an evaluation of the base on two images, by a quick judge that is to come."""
    monkeypatch.setattr(judging, "Judge", lambda *args, **values: quick_judge(*args, **values))
    vg, folder = write_files(tmp_path)
    return [str(root / "base"), str(root / "stage1"), "--vg_path", vg, "--shr_path", folder,
            "--max_new_tokens", "12", "--num_beams", "1", "--output_dir", str(tmp_path / "out"),
            "--judge_model", "m"]


REAL_JUDGE = judging.Judge


def quick_judge(*args, **values):
    return REAL_JUDGE(*args, **{**values, "pause": 0.0, "at_once": 1, "tries": 2})


def evaluate(*typed):
    return shr.evaluate(shr.parser().parse_args([str(flag) for flag in typed]))


def numbered(prompt):
    """How many sentences a prompt asks about."""
    return len(re.findall(r"^\d+\. ", prompt.split("These are the sentences to check:")[1].split(
        "\nSay of each")[0], re.M))


def all_correct(prompt, n):
    return "\n".join(f"{k}. correct: yes" for k in range(1, numbered(prompt) + 1))


def test_a_server_judges(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def reply(prompt, n):
        """Of image 2 everything is wrong; of image 30 the reply does not fit."""
        if "dog 2\n" in prompt:
            return all_correct(prompt, n).replace("correct", "hallucination")
        return "1. correct\n1. correct"

    with StandIn(reply) as server:
        judged = evaluate(*files, "--judge_url", server.url)
        assert set(server.keys) == {"Bearer secret"} and len(server.asked) == 4
    said = capsys.readouterr().out
    assert "the judge's lines do not fit the sentences of 1 images" in said and "30.jpg" in said
    assert set(judged) == {"base", "stage1"}
    metrics = load_json(tmp_path / "out" / "metrics.json")
    assert metrics["judge"] == "judge m"
    assert {row["shr"] for row in metrics["metrics"].values()} == {100.0}
    assert {row["unfit"] for row in metrics["metrics"].values()} == {1}
    rows = [json.loads(line) for line in open(tmp_path / "out" / "base.jsonl")]
    assert [row["image"] for row in rows] == ["VG_100K/30.jpg", "VG_100K/2.jpg"]
    assert rows[0]["reply"] == "1. correct\n1. correct" and rows[0]["verdicts"] is None
    assert set(rows[1]["verdicts"]) == {"hallucination"}
    assert not [name for name in os.listdir(tmp_path / "out") if "unfinished" in name]


def test_what_was_judged_is_kept(files, tmp_path, capsys):
    """A server that ends, none at all, then one that answers: each description is judged once."""
    def dying(prompt, n):
        return all_correct(prompt, n) if len(server.asked) == 1 else Misbehaviour(401, "key")

    with StandIn(dying) as server:
        with pytest.raises(InputError, match="HTTP 401"):
            evaluate(*files, "--judge_url", server.url)
        first = server.asked[0]
    judged = evaluate(*files, "--judge_url", f"http://127.0.0.1:{free_port()}/v1")
    said = capsys.readouterr().out
    assert "3 of 4 descriptions are left to judge" in said
    assert said.count("did not answer about") == 2 and "the same command asks again" in said
    assert sum(one.verdicts is not None for rows in judged.values() for one in rows.values()) == 1
    with StandIn(all_correct) as server:
        judged = evaluate(*files, "--judge_url", server.url)
        assert len(server.asked) == 3 and first not in server.asked
    assert all(set(one.verdicts) == {"correct"} for rows in judged.values()
               for one in rows.values())
    assert not [name for name in os.listdir(tmp_path / "out") if "unfinished" in name]
    with StandIn(all_correct) as server:
        evaluate(*files, "--judge_url", server.url)
        assert len(server.asked) == 4                       # it was finished: a new evaluation


def test_texts_that_exist(files, tmp_path):
    path = tmp_path / "responses.json"
    path.write_text(json.dumps({"30": "A dog. A dog. It rains.", "2": "A cat."}))
    flags = ["--score", path, *files[2:]]
    with StandIn(all_correct) as server:
        judged = evaluate(*flags, "--judge_url", server.url)
        assert sorted(map(numbered, server.asked)) == [1, 2]
    assert shr.measure(judged["responses"])["correct"] == 3


@pytest.mark.parametrize("flags, fault", [
    ([], "name checkpoints"), (["BASE"], "--judge_url"),
    (["BASE", "--judge_url", "localhost:8000", "--judge_model", "m"], "must begin with http"),
    (["BASE", "--judge_url", "http://localhost:1/v1", "--judge_model", "m"], "--vg_path")])
def test_mistakes(root, flags, fault):
    with pytest.raises(InputError, match=fault):
        evaluate(*(root / "base" if flag == "BASE" else flag for flag in flags))
