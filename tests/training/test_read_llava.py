"""What LLaVA's conversations become, and which line names a fault in them."""
import json
import os

import pytest
from small_files import TALK, assert_names_the_fault, changed, write_files

from support.images import check_images
from training.conversations import image_paths, read_llava


def test_llava_conversations(tmp_path):
    first, second = read_llava(write_files(tmp_path)["talk"], "images")
    assert first.image == os.path.join("images", "1.jpg")
    # <image> is moved to the front.
    assert first.conversations == [[("<image>\nWhat?", "A cat."), ("And?", "A dog.")]]
    # A leading gpt turn is skipped.
    assert second.image is None and second.conversations == [[("Hi.", "Hello.")]]


def test_conversations_of_the_tiny_world(world):
    talks = read_llava(world.llava, world.images)
    check_images(image_paths(talks))
    assert len(talks) == 96 and all(len(e.conversations[0]) == 6 for e in talks)


def said(row, turn, key, value):
    """TALK with something else in one turn."""
    return changed(TALK, row, "conversations", turn, key, value=value)


BAD = {  # what is wrong: (the file, what the message says besides the file's name)
    "conversations cut": (json.dumps(TALK)[:100], "row 0.*does not end.*cut short"),
    "not UTF-8 text": (b'[{"id": "\xff\xfe"}]', "JSON"),
    "turns do not alternate": (said(0, 2, "from", "gpt"), "row 0.*alternate"),
    "turn is a text": (changed(TALK, 1, "conversations", value=["Hi.", "Hello."]), "row 1"),
    "nothing is answered": (said(0, 3, "value", ""), "row 0.*empty"),
    "value is a number": (said(0, 1, "value", 4), "row 0.*value"),
    "no conversations": (changed(TALK, 1, "conversations", value=None), "row 1.*conversations"),
    "image is a number": (changed(TALK, 0, "image", value=4), "row 0.*image"),
    "image without <image>": (changed(TALK, 1, "image", value="2.jpg"), "row 1.*<image>"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path, what):
    content, place = BAD[what]
    path = write_files(tmp_path, talk=content)["talk"]
    assert_names_the_fault(lambda: read_llava(path, "images"), path, place)
