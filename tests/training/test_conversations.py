"""Conversations that stay on disk.

The oracle of the index is `json.load`: whatever it finds in a file, the indexed rows must be the
same, however the file is written and wherever the pieces that it is read in happen to end.
"""
import json
import os
import random
import re

import pytest

from data import PackedDataset, RowFormat
from support.common import InputError
from training import conversations
from training.conversations import image_paths, index_rows, read_llava

NASTY = ('"', '\\', '\\\\', '\\"', '{', '}', '[', ']', '{"', '"}', ',', '\n', '\t', "/", "\u2028",
         "é", "漢", "🙂", "\x00", " ", "a", '"image": "no.jpg"')


def random_rows(seed, count):
    """Rows as LLaVA's, with texts that look like JSON, some without an image, with other keys
    before and behind."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(NASTY, k=rng.randrange(1, 30)))

    rows = []
    for n in range(count):
        image = rng.choice((None, None, f"{n % 5}.jpg", f'a "{n % 3}" \\ {{é🙂.jpg'))
        turns = [{"from": who, "value": text() + "."}
                 for _ in range(rng.randint(1, 3)) for who in ("human", "gpt")]
        turns[0]["value"] = ("<image>\n" if image else "") + "What? " + turns[0]["value"]
        more = rng.choice(({}, [], {"a": [{"b": "}"}]}, None, -1.5e3, "\\"))
        row = {"id": text(), "image": image, "conversations": turns, "more": more}
        if rng.random() < .3:
            row = dict(reversed(row.items()))
        if image is None and rng.random() < .7:
            del row["image"]
        rows.append(row)
    return rows


def with_tabs(rows):
    text = json.dumps(rows, indent="\t", ensure_ascii=False)
    return "\r\n " + text.replace("/", "\\/") + "\n\n"


FORMS = {
    "dense list": lambda rows: json.dumps(rows, separators=(",", ":")),
    "list": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented list": lambda rows: json.dumps(rows, indent=2),
    "tabs": with_tabs,
    "a row a line": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "blank lines": lambda rows: "\n\n" + "".join(json.dumps(row) + "\r\n\n" for row in rows),
}


@pytest.mark.parametrize("chunk", (1, 2, 7, 64, 1000, None))
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_that_json_finds(tmp_path, monkeypatch, form, chunk):
    """However the pieces end: in a text, behind a backslash, inside of a letter, between two rows.
    """
    if chunk:
        monkeypatch.setattr(conversations, "CHUNK", chunk)
    rows, path = random_rows(len(form), 60), tmp_path / "talk.json"
    path.write_text(FORMS[form](rows), encoding="utf-8")
    spans, has_image, _ = index_rows(str(path))
    content = path.read_bytes()
    assert [json.loads(content[begin:end]) for begin, end in spans] == rows
    assert has_image.tolist() == [bool(row.get("image")) for row in rows]
    examples = read_llava(str(path), "images")
    named = [os.path.join("images", row["image"]) for row in rows if row.get("image")]
    expected = list(dict.fromkeys(named))
    assert image_paths(examples) == expected
    assert expected == list(dict.fromkeys(e.image for e in examples if e.image))
    assert len(examples) == 60 and examples[-1] == examples[59] == list(examples)[59]
    with pytest.raises(IndexError):
        examples[60]


def test_many_random_files(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    for seed in range(100):
        rng = random.Random(seed)
        monkeypatch.setattr(conversations, "CHUNK", rng.randint(1, 300))
        rows = random_rows(seed, rng.randint(1, 12))
        path.write_text(rng.choice(list(FORMS.values()))(rows), encoding="utf-8")
        content = path.read_bytes()
        assert [json.loads(content[begin:end]) for begin, end in index_rows(str(path))[0]] == rows


def test_empty_list_holds_no_rows(tmp_path):
    (tmp_path / "talk.json").write_text(" [ ]\n")
    examples = read_llava(str(tmp_path / "talk.json"), "images")
    assert len(examples) == 0 and not examples and image_paths(examples) == []
    assert PackedDataset(examples, RowFormat(None, None, 9, 256)).lengths().shape == (0,)


# ---- Files that are no conversations -------------------------------------------------------------


def said(n):
    return [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]


GOOD = json.dumps([{"id": "{", "conversations": said(n)} for n in range(5)])
ROW = GOOD[1:-1].split(', {"id"')[0]
BROKEN = {  # name: (content, what the message says)
    "cut in a row": (GOOD[:-30], "row 4.*does not end.*cut short"),
    "cut behind a comma": (f"[{ROW},\n{ROW},", "row 2.*without a ].*cut short"),
    "cut in front of the bracket": (GOOD[:-1], "row 5.*without a ].*cut short"),
    "cut line": (f"{ROW}\n{ROW}\n{ROW[:40]}", "row 2.*does not end"),
    "nothing": ("", "is empty"),
    "white space": (" \n ", "is empty"),
    "a number among rows": (f"[{ROW}, 5, {ROW}]", "row 1.*'5,{"),
    "a text among rows": (f'[{ROW}, "{{}}", {ROW}]', "row 1.*here stands"),
    "no comma": (f"[{ROW} {ROW}]", "row 1.*one comma"),
    "two commas": (f"[{ROW},, {ROW}]", "row 1.*one comma"),
    "a list of lists": (f"[[{ROW}]]", r"row 0.*here stands"),
    "too many braces": (f"[{ROW}}}, {ROW}]", "row 1.*here stands '}"),
    "something behind": (f"[{ROW}] x", "here stands 'x'"),
    "a web page": ("<!DOCTYPE html><html lang=\"en\">", "row 0.*here stands '<!DOC"),
    "a number": ("5", "row 0.*'5'"),
    "a quote too few": (GOOD.replace('"q1"', '"q1'), "row 1.*does not end"),
    "an object of rows": (f'{{"rows": [{ROW}]}}', "row 0.*conversations"),
    "broken inside": (GOOD.replace('"q2"}', '"q2",}'), "row 2.*not readable as JSON.*column"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(tmp_path, monkeypatch, what):
    content, place = BROKEN[what]
    path = tmp_path / "talk.json"
    path.write_text(content)
    messages = set()
    for chunk in (1, 50, 2 ** 19):
        monkeypatch.setattr(conversations, "CHUNK", chunk)
        with pytest.raises(InputError) as error:
            read_llava(str(path), "images")
        messages.add(str(error.value))
    message, = messages                                          # the same wherever pieces end
    print(message)
    assert message.startswith(str(path)) and re.search(place, message) and "\n" not in message


def test_a_row_without_end_is_given_up(tmp_path, monkeypatch):
    """One quote too few turns gigabytes into one row: they are not read."""
    monkeypatch.setattr(conversations, "LONGEST_ROW", 2000)
    monkeypatch.setattr(conversations, "CHUNK", 100)
    path = tmp_path / "talk.json"
    rows = [ROW] * 4 + [ROW.replace('"q0"', '"q0')] + [ROW] * 1000
    path.write_text("[" + ",".join(rows) + "]")
    with pytest.raises(InputError, match="row 4.*does not end"):
        read_llava(str(path), "images")


def test_rows_are_read_when_asked_for(tmp_path, monkeypatch):
    """Of a long file some rows are tried at the start, from the first to the last; another one
    speaks up when its turn comes."""
    monkeypatch.setattr(conversations, "ROWS_READ_FIRST", 3)
    path = tmp_path / "talk.json"
    bad = ROW.replace("human", "nobody")
    path.write_text("[" + ",".join([ROW, bad, ROW, ROW, ROW]) + "]")
    examples = read_llava(str(path), "images")
    assert examples[0] == examples[4]
    with pytest.raises(InputError, match="row 1: turns must alternate"):
        examples[1]
    path.write_text("[" + ",".join([ROW] * 4 + [bad]) + "]")
    with pytest.raises(InputError, match="row 4: turns must alternate"):
        read_llava(str(path), "images")
