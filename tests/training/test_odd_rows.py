"""Rows of LLaVA's mixes that are not about one image: what is the row's own, and what is refused.

The oracle is again `json.loads`: a row's image is what it finds under the row's own "image".
"""
import json
import os
import random

import pytest
from conftest import row_format, small_config
from small_files import assert_names_the_fault

from data import IMAGE_ID, PackedDataset
from support.images import check_images
from training import conversations
from training.conversations import image_paths, index_rows, read_llava

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
SAID = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
URL = "http://x.org/0.png"
ABOUT = {"id": "0", "image": "1.jpg", "conversations": ASKED}

ROWS = {  # what stands elsewhere in the row: the row
    "an object before, none of its own": {"meta": {"image": URL}, "conversations": SAID},
    "an object behind, none of its own": {"id": 1, "conversations": SAID, "meta": {"image": URL}},
    "an object before": {"meta": {"image": URL}, **ABOUT},
    "an object between": {"id": 1, "meta": {"image": URL}, "image": "1.jpg",
                          "conversations": ASKED},
    "an object behind": {**ABOUT, "meta": {"image": URL}},
    "objects in lists": {"meta": [[{"image": URL}]], **ABOUT, "more": [{"a": {"image": URL}}]},
    "in a list of turns": {"conversations": [turn | {"image": URL} for turn in SAID]},
    "its own behind the turns": {"conversations": ASKED, "image": "1.jpg"},
    "none, null": {"meta": {"image": URL}, "image": None, "conversations": SAID},
    "none, empty": {"image": "", "conversations": SAID, "meta": {"image": URL}},
    "in a text": {"id": 'say "image": "no.jpg"', "conversations": [
        {"from": "human", "value": '{"image": "no.jpg"}'}, SAID[1]]},
    "in a name": {'the "image': "no.jpg", "conversations": SAID},
    "a value": {"type": "image", "x": "no.jpg", "conversations": SAID},
    "a value before its own": {"type": "image", **ABOUT},
    "an id as a number, and an id inside": {"meta": {"id": "7"}, **ABOUT, "id": 7},
    "conversations inside": {"meta": {"conversations": ASKED, "id": 3}, "conversations": SAID},
    "braces in the id": {**ABOUT, "id": '{"'},
    "not ASCII": {"meta": {"image": URL}, **ABOUT, "image": "猫 é.jpg"},
    "no video": {"video": None, "videos": [], "images": None, **ABOUT},
    "a video inside": {"meta": {"video": "v.mp4", "images": [URL]}, **ABOUT},
}


def write(path, *rows, **options):
    path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("options", ({}, {"indent": 1}, {"ensure_ascii": False},
                                     {"separators": (",", ":")}), ids=str)
def test_only_the_rows_own_image(tmp_path, what, options):
    row = ROWS[what]
    examples = read_llava(write(tmp_path / "talk.json", ABOUT, row, ABOUT, **options), "images")
    own = row.get("image")
    names = ["1.jpg"] + [own] * (own not in (None, "", "1.jpg"))
    assert image_paths(examples) == [os.path.join("images", name) for name in names]
    assert examples.sizes()[1].tolist() == [True, bool(own), True]
    assert examples[1].image == (os.path.join("images", own) if own else None)
    said = json.loads(json.dumps(row))["conversations"]
    assert examples[1].conversations == [[tuple(turn["value"] for turn in said)]]


def test_images_of_other_objects_are_not_looked_for(tmp_path, world):
    """As before a run: only what the rows themselves name must be there."""
    with open(world.llava, encoding="utf-8") as file:
        rows = json.load(file)
    for row in rows[::2]:
        row["metadata"] = {"image": "gone.png"}
    rows += [{"metadata": {"image": "gone.png"}, "conversations": SAID}]
    examples = read_llava(write(tmp_path / "talk.json", *rows), world.images)
    check_images(image_paths(examples))
    lengths = PackedDataset(examples, row_format(small_config(), None)).lengths()
    assert (lengths > 0).tolist() == ["image" in row for row in rows]


def test_many_random_rows(tmp_path, monkeypatch):
    """Keys in any order, in any depth, in texts, and with a few bytes looked at together."""
    keys = "image", "images", "video", "id", "conversations", 'x "image', "x"

    def value(rng, depth):
        kind = rng.randrange(6 if depth < 3 else 4)
        if kind < 4:
            return rng.choice(("image", '"image": "no.jpg"', "{", 5, None, URL, '\\"', ""))
        if kind == 4:
            return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}

    for seed in range(150):
        rng, rows = random.Random(seed), []
        monkeypatch.setattr(conversations, "CHUNK", rng.randint(1, 400))
        for n in range(rng.randint(1, 9)):
            row = {"a": value(rng, 0), "b": value(rng, 0), "conversations": SAID}
            if rng.random() < .6:
                row["image"] = rng.choice((None, "", f"{n % 3}.jpg", f'{n % 2} "{{\\.jpg'))
            rows.append(dict(rng.sample(list(row.items()), len(row))))
        _, has_image, names = index_rows(write(tmp_path / "talk.json", *rows))
        own = [row.get("image") or None for row in rows]
        assert has_image.tolist() == [name is not None for name in own]
        found = json.loads(b'["%b"]' % names) if names else []
        assert list(dict.fromkeys(found)) == list(dict.fromkeys(name for name in own if name))


# ---- Refused -------------------------------------------------------------------------------------


OTHER = {  # what the row has: (the row, what the message says)
    "a video": ({"video": "v.mp4", "conversations": SAID}, "names 'video'"),
    "a video behind": ({"conversations": SAID, "video": "v.mp4"}, "names 'video'"),
    "videos": ({"videos": ["v.mp4"], "conversations": SAID}, "names 'videos'"),
    "images": ({"images": ["1.jpg"], "conversations": SAID}, "names 'images'"),
    "images beside its own": ({**ABOUT, "images": ["2.jpg"]}, "names 'images'"),
    "a list of images": ({**ABOUT, "image": ["1.jpg", "2.jpg"]}, "'image' is a list"),
    "an object": ({**ABOUT, "image": {"path": "1.jpg"}}, "'image' is a dict"),
    "a number": ({**ABOUT, "image": 7}, "'image' is a int"),
    "no conversations": ({"id": "1", "image": "1.jpg", "caption": "A cat."},
                         "has no 'conversations'"),
    "no conversations, no image": ({"messages": SAID}, "has no 'conversations'"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_rows_are_refused_before_training(tmp_path, monkeypatch, what):
    """Wherever in the file: here all are refused that a long file's few first rows would not show.
    """
    monkeypatch.setattr(conversations, "ROWS_READ_FIRST", 2)
    row, said = OTHER[what]
    path = tmp_path / "talk.json"
    for rows, place in (([ABOUT, row, ABOUT], "row 1"), ([row, row, ABOUT], "row 0 and 1 more"),
                        ([ABOUT, *[row] * 1235, ABOUT], "row 1 and 1,234 more")):
        write(path, *rows)
        assert_names_the_fault(lambda: read_llava(str(path), "images"), path, f"{place}: .*{said}")


def test_damaged_names_are_told_by_their_row(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "ROWS_READ_FIRST", 2)
    good = json.dumps(ABOUT).encode()
    for bad in (b"\xff.jpg", rb"\x.jpg"):
        content = b"[" + b",".join([good, good.replace(b"1.jpg", bad), good]) + b"]"
        (tmp_path / "talk.json").write_bytes(content)
        assert_names_the_fault(
            lambda: image_paths(read_llava(str(tmp_path / "talk.json"), "images")),
            tmp_path / "talk.json", "row 1: not readable as JSON")


# ---- <image> as text -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ("What does <image> mean?", "<image>\nHi.", "<image><image>"))
def test_in_a_row_of_text_the_mark_is_text(tmp_path, byte_tokenizer, value):
    """LLaVA tokenises such rows as they stand, with no image anywhere."""
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "An <image> tag."},
             {"from": "human", "value": f"So {value}"}, {"from": "gpt", "value": "Yes."}]
    examples = read_llava(write(tmp_path / "talk.json", {"conversations": turns}), "images")
    said = [turn["value"] for turn in turns]
    assert examples[0].conversations == [[tuple(said[:2]), tuple(said[2:])]]
    row = PackedDataset(examples, row_format(small_config(), byte_tokenizer, max_length=999)).row(0)
    assert IMAGE_ID not in row.input_ids and row.image is None
    whole = byte_tokenizer.decode(row.input_ids)
    assert f"USER: {value} ASSISTANT:" in whole
    assert whole.count("<image>") == 1 + 2 * value.count("<image>")
