"""Encodings of the files that users bring: a BOM is no content, UTF-16 and other bytes are named.

Half a character, which JSON can say and UTF-8 cannot, is read as U+FFFD.
"""
import json
import shutil

import pytest
from conftest import row_format, small_config
from small_files import (
    DESCRIPTIONS,
    INDEX,
    PAIRS,
    QUESTIONS,
    TALK,
    assert_names_the_fault,
    changed,
    write_files,
)

from checkpoints.load import load_base
from data import IMAGE_ID, PackedDataset, read_hadpo
from evals.score import read_answers
from support.common import parse_json
from support.questions import read_pope
from training.conversations import image_paths, read_llava
from training.ds_file import read_ds_file

ANSWERS = [{"image": "COCO_1.jpg", "question": QUESTIONS[0]["text"], "answer": "Yes"}]
CONTENTS = {"pairs": PAIRS, "desc": DESCRIPTIONS, "index": INDEX, "talk": TALK,
            "coco_pope_random": QUESTIONS, "answers": ANSWERS}


def read_all(name, paths):
    """What a program reads of these files, among them the one called `name`."""
    if name == "talk":
        examples = read_llava(paths["talk"], "images")
        return list(examples), image_paths(examples)
    if name == "coco_pope_random":
        return read_pope(paths[name])
    if name == "answers":
        return read_answers(paths[name], {"random": QUESTIONS}, None)
    return read_hadpo(paths["desc"], paths["pairs"], paths["vg"], keep_correct=True)


def written(folder, name, encode):
    """All files, that called `name` encoded by a function."""
    return write_files(folder, **{name: encode(json.dumps(CONTENTS[name]))})


@pytest.mark.parametrize("name", CONTENTS)
def test_a_bom_is_no_content(tmp_path, name):
    plain = read_all(name, written(tmp_path, name, str.encode))
    assert read_all(name, written(tmp_path, name, lambda text: text.encode("utf-8-sig"))) == plain


@pytest.mark.parametrize("encoding", ("utf-16", "utf-16-le", "utf-16-be", "utf-32"))
@pytest.mark.parametrize("name", CONTENTS)
def test_utf_16_is_named(tmp_path, name, encoding):
    paths = written(tmp_path, name, lambda text: text.encode(encoding))
    assert_names_the_fault(lambda: read_all(name, paths), paths[name],
                           "is UTF-16; save it as UTF-8$")


@pytest.mark.parametrize("name", CONTENTS)
def test_other_bytes_are_no_cut_download(tmp_path, name):
    paths = written(tmp_path, name, lambda text: text.replace('"', '"é', 1).encode("latin-1"))
    assert_names_the_fault(lambda: read_all(name, paths), paths[name],
                           "not readable as JSON.*utf-8.*(save it as UTF-8|mend or remove)")


@pytest.mark.parametrize("how", ("utf-8-sig", "utf-16"))
def test_config_and_deepspeed_files(tmp_path, world, how):
    folder, path = tmp_path / "base", tmp_path / "ds.json"
    shutil.copytree(world.base, folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding=how)
    path.write_text('{"train_batch_size": 8}', encoding=how)
    if how == "utf-8-sig":
        assert load_base(str(folder)).fingerprint == load_base(world.base).fingerprint
        assert read_ds_file(str(path), False)["train_batch_size"] == 8
    else:
        assert_names_the_fault(lambda: load_base(str(folder)), "config.json", "is UTF-16; save")
        assert_names_the_fault(lambda: read_ds_file(str(path), False), "ds.json", "is UTF-16; save")


# ---- Half a character ----------------------------------------------------------------------------

HALVES = {  # a JSON text: what it is read as
    r'"\ud83d"': "\ufffd", r'"\uDC36"': "\ufffd", r'"a\ud83d\ud83d\udc36"': "a\ufffd🐶",
    r'"\ud83d\udc36"': "🐶", r'"\udc36\ud83d"': "\ufffd\ufffd", r'"\\ud83d"': "\\ud83d",
    r'{"\ud83d": ["\ud83d", {"a": "b\uD83D"}, 1, null]}':
        {"\ufffd": ["\ufffd", {"a": "b\ufffd"}, 1, None]},
}


@pytest.mark.parametrize("text", HALVES)
def test_half_a_character(text):
    assert parse_json(text) == parse_json(text.encode()) == HALVES[text]


HALVED = {"pairs": changed(PAIRS, 0, "question", value="Is it \ud83d?"),
          "desc": changed(DESCRIPTIONS, "3", "chosen", value=["A \ud83d."]),
          "talk": changed(TALK, 0, "conversations", 1, "value", value="A \ud83d.")}


@pytest.mark.parametrize("name", HALVED)
def test_rows_with_half_a_character_are_learnt(tmp_path, byte_tokenizer, name):
    examples = read_all(name, write_files(tmp_path, **{name: HALVED[name]}))
    examples = examples[0] if name == "talk" else examples
    dataset = PackedDataset(examples, row_format(small_config(), byte_tokenizer, max_length=999))
    ids = [[i for i in dataset.row(n).input_ids if i != IMAGE_ID] for n in range(len(examples))]
    decoded = [byte_tokenizer.decode(row) for row in ids]
    assert sum("\ufffd" in text for text in decoded) == {"pairs": 1, "desc": 2, "talk": 1}[name]


def test_answers_that_were_cut_meet_their_questions(tmp_path):
    """The question of a file with half a character, and what we or others wrote of it before."""
    question = "Is there a \ud83d?"
    paths = write_files(tmp_path, coco_pope_random=[QUESTIONS[0] | {"text": question}],
                        answers=[ANSWERS[0] | {"question": question, "answer": "Yes \ud83d"}])
    rows = read_pope(paths["coco_pope_random"])
    answers = read_answers(paths["answers"], {"random": rows}, None)["random"]
    assert answers == {("COCO_1.jpg", "Is there a \ufffd?"): ("Yes \ufffd", None)}
    assert answers.keys() == {(row["image"], row["text"]) for row in rows}
