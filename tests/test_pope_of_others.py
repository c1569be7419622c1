"""POPE's questions about other data sets: other names of files, other forms, other folders.

The right value of every form is the rows of the plain one.
"""
import argparse
import json
import os
import shutil
import sys

import pytest
from conftest import load_json
from small_files import assert_names_the_fault

import eval_pope
from eval_pope import read_pope
from evals.score import score_file
from support.common import InputError
from support.questions import SPLITS
from tools import report

ROWS = [{"question_id": n + 1, "image": f"COCO_{n // 2}.jpg", "text": f"Is there a {word} here?",
         "label": "no" if n % 2 else "yes"} for n, word in enumerate(("dog", "cat", "car", "kite"))]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def renamed(rows, old, new):
    return [{new if name == old else name: value for name, value in row.items()} for row in rows]


FORMS = {  # the same questions: what the file holds
    "a row per line": lines(ROWS),
    "no newline at the end": lines(ROWS).rstrip(),
    "empty lines, Windows' line ends": lines(ROWS).replace("\n", "\r\n\r\n"),
    "BOM": "\ufeff" + lines(ROWS),
    "one indented list": json.dumps(ROWS, indent=4),
    "one list in a line": json.dumps(ROWS),
    "one list behind a BOM": "\ufeff\n" + json.dumps(ROWS, indent=1),
    "one list, other line ends": json.dumps(ROWS, indent=2).replace("\n", "\r\n"),
    "labels in capitals": lines([row | {"label": row["label"].title()} for row in ROWS]),
    "labels in capitals, with spaces": lines([row | {"label": f" {row['label'].upper()}\n"}
                                              for row in ROWS]),
    "the field is called question": json.dumps(renamed(ROWS, "text", "question"), indent=4),
    "question, and text is null": lines([row | {"text": None, "question": row["text"]}
                                         for row in ROWS]),
}
GQA = "gqa_pope_seem"


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


def known(rows):
    return [{name: row[name] for name in ROWS[0]} for row in rows]


# ---- Forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    write(tmp_path / "coco_pope_random.json", FORMS[form])
    assert known(read_pope(str(tmp_path), "random")) == ROWS


def test_ids_as_text_are_kept_and_meet_numbers(tmp_path):
    """The answers' ids are numbers, the questions' ids are text; both are the same question."""
    asked = [row | {"question_id": str(row["question_id"])} for row in ROWS]
    path = write(tmp_path / "coco_pope_random.json", json.dumps(asked, indent=4))
    assert read_pope(str(tmp_path), "random") == asked
    said = [{"question_id": row["question_id"], "question": row["text"], "answer": "Yes"}
            for row in ROWS]
    assert scored(write(tmp_path / "a.jsonl", lines(said)), [path])["random"]["tp"] == 2


OTHER = {  # what is wrong: (what the file holds, what is said of it)
    "one object": (json.dumps({"questions": ROWS}, indent=2), "is one JSON dict .*'questions'"),
    "columns": (json.dumps({"image": {"0": "a.jpg"}, "text": {}}, indent=2), "one JSON dict"),
    "a list of texts": (json.dumps(["Is there a dog?"], indent=2), "row 0: 'image' should be str"),
    "an empty list": ("[]", "holds an empty list"),
    "label": (json.dumps([ROWS[0], ROWS[1] | {"label": "Maybe"}], indent=4),
              "row 1: label 'Maybe' is neither yes nor no"),
    "label is no text": (lines([ROWS[0] | {"label": True}]), "row 0: 'label' should be str .*True"),
    "no question": (json.dumps(renamed(ROWS, "text", "query"), indent=4), "row 0: 'text' should"),
    "image is a number": (lines([ROWS[0] | {"image": 2405722}]), "row 0: 'image' .*2405722"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_form_is_not_called_a_cut_download(tmp_path, what):
    content, said = OTHER[what]
    path = write(tmp_path / "coco_pope_random.json", content)
    assert_names_the_fault(lambda: read_pope(str(tmp_path), "random"), path, said)
    with pytest.raises(InputError) as error:
        read_pope(str(tmp_path), "random")
    assert "cut short" not in str(error.value)


@pytest.mark.parametrize("encoding", ("utf-16", "utf-16-le", "utf-16-be"))
def test_utf_16_is_named(tmp_path, encoding):
    text = ("" if encoding == "utf-16" else "\ufeff") + lines(ROWS)
    path = write(tmp_path / "coco_pope_random.json", text, encoding)
    assert_names_the_fault(lambda: read_pope(str(tmp_path), "random"), path, "is UTF-16; save it")


@pytest.mark.parametrize("content", (lines(ROWS)[:-9], json.dumps(ROWS, indent=4)[:-9], ""))
def test_a_cut_file_is_still_called_so(tmp_path, content):
    path = write(tmp_path / "coco_pope_random.json", content)
    said = "cut short"
    assert_names_the_fault(lambda: read_pope(str(tmp_path), "random"), path, said)


# ---- Which files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ("coco_pope", GQA, "aokvqa_pope_seem", "my_GQA_POPE"))
def test_any_prefix_in_a_folder(tmp_path, prefix):
    for split in SPLITS.values():
        write(tmp_path / f"{prefix}_{split}.json", lines([ROWS[0] | {"text": split}]))
    write(tmp_path / "llava_pope_test.jsonl", "no question file")
    write(tmp_path / "coco_ground_truth_objects.json", "{}")
    assert {split: read_pope(str(tmp_path), split)[0]["text"] for split in SPLITS.values()} == {
        split: split for split in SPLITS.values()}


def test_several_data_sets_in_one_folder(tmp_path):
    for name in ("coco_pope_random.json", f"{GQA}_random.json"):
        write(tmp_path / name, lines(ROWS))
    with pytest.raises(InputError) as error:
        read_pope(str(tmp_path), "random")
    message = str(error.value)
    assert str(tmp_path) in message and "several data sets" in message and "\n" not in message
    assert "coco_pope_random.json, gqa_pope_seem_random.json" in message
    assert f"--pope_path {tmp_path}/coco_pope_random.json" in message           # the cure


def test_splits_of_different_data_sets_are_not_mixed(monkeypatch, tmp_path):
    for name in ("coco_pope_random.json", f"{GQA}_popular.json", "coco_pope_adversarial.json"):
        write(tmp_path / name, lines(ROWS))
    answers = write(tmp_path / "a.jsonl", lines([{"image": row["image"], "question": row["text"],
                                                  "answer": "no"} for row in ROWS]))
    with pytest.raises(InputError, match="several data sets .*gqa_pope_seem_popular.json"):
        scored(answers, str(tmp_path))
    assert scored(answers, str(tmp_path), ["random", "adv"]).keys() == {"random", "adversarial"}


# ---- Scores of answers that exist ----------------------------------------------------------------


def scored(answers, pope, splits=None):
    """score_file's numbers of every split."""
    metrics = score_file(argparse.Namespace(answers=answers, pope_path=pope, question_file=None,
                                            set=splits))
    return {split: rows[os.path.basename(answers)] for split, rows in metrics.items()}


def said_yes(path):
    rows = [{"image": row["image"], "question": row["text"], "answer": "Yes"} for row in ROWS]
    return write(path, json.dumps(rows, indent=4))


NAMED = {  # files named: the splits that they are
    (f"{GQA}_random.json",): ["random"],
    ("gqa/random.json", "gqa/popular.json"): ["random", "popular"],
    ("pope_adv.json",): ["adversarial"],
    ("aokvqa.json",): ["aokvqa"],
    ("notrandom.json",): ["notrandom"],
    ("coco_pope_random.json", f"{GQA}_random.json"): ["coco_pope_random", f"{GQA}_random"],
}


@pytest.mark.parametrize("names", NAMED)
def test_files_are_named(tmp_path, names):
    """The split follows from a file's name; where it does not, the name is the split. Answers may
    be one indented list, too.
    """
    paths = [write(tmp_path / name, json.dumps(ROWS, indent=4)) for name in names]
    ours = scored(said_yes(tmp_path / "a.json"), paths)
    assert list(ours) == NAMED[names]
    assert all((numbers["tp"], numbers["fp"]) == (2, 2) for numbers in ours.values())


def test_set_chooses_among_named_files(tmp_path):
    paths = [write(tmp_path / f"{GQA}_{split}.json", lines(ROWS)) for split in SPLITS.values()]
    answers = said_yes(tmp_path / "a.json")
    assert list(scored(answers, paths, ["adv", "random"])) == ["random", "adversarial"]
    with pytest.raises(InputError, match="--set popular leaves none of the named files"):
        scored(answers, paths[:1], ["popular"])
    odd = write(tmp_path / "aokvqa.json", lines(ROWS))
    with pytest.raises(InputError, match="aokvqa.json: its name ends with none of .*leave --set"):
        scored(answers, [*paths, odd], ["random"])


def test_named_files_that_cannot_be_told_apart(tmp_path):
    answers = said_yes(tmp_path / "a.json")
    same = [write(tmp_path / folder / "random.json", lines(ROWS)) for folder in ("coco", "gqa")]
    with pytest.raises(InputError, match="coco/random.json.*gqa/random.json.*same name"):
        scored(answers, same)
    with pytest.raises(InputError, match="is a folder; --pope_path names one folder, or files"):
        scored(answers, [str(tmp_path / "coco"), same[1]])
    with pytest.raises(InputError, match="gqa_pope.json: no such file"):
        scored(answers, [str(tmp_path / "gqa_pope.json")])
    with pytest.raises(InputError, match="nowhere: no such folder; .*or its files"):
        scored(answers, [str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no coco_pope_random.json.*or its files"):
        scored(answers, [str(tmp_path / "empty")])


# ---- Asked ---------------------------------------------------------------------------------------


def evaluated(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", *map(str, words), "--max_new_tokens", "4"])
    main()


@pytest.fixture
def gqa(world, tmp_path):
    """The world's questions in GQA's names and form, and its pictures in a folder of their own."""
    for split in SPLITS.values():
        rows = read_pope(world.pope, split)
        rows = [row | {"question_id": str(row["question_id"]), "label": row["label"].title(),
                       "image": row["image"].replace("COCO_val2014", "gqa")} for row in rows]
        write(tmp_path / "questions" / f"{GQA}_{split}.json",
              "\ufeff" + json.dumps(renamed(rows, "text", "question"), indent=4))
    (tmp_path / "pictures").mkdir()
    for name in os.listdir(f"{world.coco}/val2014"):
        shutil.copy(f"{world.coco}/val2014/{name}",
                    tmp_path / "pictures" / name.replace("COCO_val2014", "gqa"))
    return tmp_path


def test_gqa_is_asked(world, gqa, monkeypatch):
    """From its folder and from its files; the numbers are those of the same questions in POPE's own
    names and form.
    """
    evaluated(monkeypatch, eval_pope.main, world.base, "--coco_path", world.coco,
              "--pope_path", world.pope, "--output_dir", gqa / "coco")
    expected = load_json(gqa / "coco" / "metrics.json")["metrics"]
    pictures = ["--image_folder", gqa / "pictures"]
    evaluated(monkeypatch, eval_pope.main, world.base, *pictures, "--pope_path", gqa / "questions",
              "--output_dir", gqa / "folder")
    assert load_json(gqa / "folder" / "metrics.json")["metrics"] == expected
    files = [gqa / "questions" / f"{GQA}_{split}.json" for split in ("popular", "random")]
    evaluated(monkeypatch, eval_pope.main, world.base, *pictures, "--pope_path", *files,
              "--output_dir", gqa / "files")
    assert load_json(gqa / "files" / "metrics.json")["metrics"] == {
        split: expected[split] for split in ("popular", "random")}


def test_the_image_folder_is_named_once(world, gqa, monkeypatch):
    words = [world.base, "--pope_path", gqa / "questions", "--output_dir", gqa / "out"]
    with pytest.raises(InputError, match="--image_folder .*leave --coco_path out"):
        evaluated(monkeypatch, eval_pope.main, *words, "--image_folder", gqa / "pictures",
                  "--coco_path", world.coco)
    with pytest.raises(InputError, match="nowhere: no such folder; .*--image_folder"):
        evaluated(monkeypatch, eval_pope.main, *words, "--image_folder", gqa / "nowhere")


# ---- Images outside of the folder ----------------------------------------------------------------


@pytest.mark.parametrize("name", ("SECRET", "../secret.jpg", "sub/../../secret.jpg", "..",
                                  "..\\secret.jpg", "C:\\secret.jpg", ""))
def test_no_image_outside_of_the_folder(world, tmp_path, monkeypatch, name):
    """Neither asked nor shown on a page: the file, the row and the name are said."""
    secret = tmp_path / "secret.jpg"
    pictures = f"{world.coco}/val2014"
    first = read_pope(world.pope, "random")[0]
    shutil.copy(f"{pictures}/{first['image']}", secret)
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "sub").mkdir()
    name = str(secret) if name == "SECRET" else name
    path = write(tmp_path / "pope" / "coco_pope_random.json",
                 lines([first, first | {"image": name}]))
    page = tmp_path / "page.html"
    monkeypatch.setattr("tools.report.write_report", lambda *_: pytest.fail("was asked"))
    with pytest.raises(InputError) as error:
        evaluated(monkeypatch, report.main, world.base, "--coco_path", world.coco, "--pope_path",
                  tmp_path / "pope", "--set", "random", "--output", page, "--output_dir",
                  tmp_path / "out")
    message = str(error.value)
    assert message.startswith(f"{path}, row 1: image {name!r} does not lie below")
    assert not page.exists() and "\n" not in message


def test_images_in_folders_below_are_seen(tmp_path):
    row = ROWS[0] | {"image": "val2014/..a/b..jpg"}
    write(tmp_path / "coco_pope_random.json", lines([row]))
    assert read_pope(str(tmp_path), "random") == [row]
