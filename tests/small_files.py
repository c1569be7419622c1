"""Small files in HA-DPO's, LLaVA's and POPE's form, whole and damaged, and made-up pictures.

    paths = write_files(tmp_path, pairs=changed(PAIRS, 0, "chosen", value=None))
    assert_names_the_fault(lambda: read_hadpo(...), "pairs.json", "row 0.*chosen")
"""
import copy
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from support.common import InputError

# ---- Files of readers ----------------------------------------------------------------------------

PAIRS = [{"image_id": i, "question": f"Is there a q{i}?", "answer": "no", "chosen": f"No {i}.",
          "reject": f"Yes {i}.", "correct": i % 2 == 0}
         for i in (1, 2, 3)]
DESCRIPTIONS = {str(i): {"chosen": [f"c{i}{n}" for n in range(3)],
                         "rejected": [f"r{i}{n}" for n in range(2)]}
                for i in (3, 1)}
INDEX = [{"image_id": i, "url": f"https://x.org/a/VG_100K{'_2' * (i % 2)}/{i}.jpg"}
         for i in (1, 2, 3)]
TALK = [{"id": "0", "image": "1.jpg",
         "conversations": [{"from": "human", "value": "What?\n<image>"},
                           {"from": "gpt", "value": "A cat."},
                           {"from": "human", "value": "And?"},
                           {"from": "gpt", "value": "A dog."}]},
        {"id": "1",
         "conversations": [{"from": "gpt", "value": "dropped"},
                           {"from": "human", "value": "Hi."},
                           {"from": "gpt", "value": "Hello."}]}]
QUESTIONS = [{"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a car?", "label": "yes"}]


def write_files(folder, **changes):
    """The files of all readers in `folder`, with some replaced → {name: path}.

    A str or bytes is written as it stands, everything else as JSON.
    """
    os.makedirs(folder / "VG", exist_ok=True)
    contents = {"desc": DESCRIPTIONS, "pairs": PAIRS, "index": INDEX, "talk": TALK,
                "coco_pope_random": QUESTIONS, **changes}
    paths = {name: str(folder / f"{name}.json") for name in contents}
    paths["index"] = str(folder / "VG" / "image_data.json")
    for name, content in contents.items():
        if name == "coco_pope_random" and isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        with open(paths[name], "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    return paths | {"vg": str(folder / "VG"), "folder": str(folder)}


def changed(content, *path, value):
    """A copy of a JSON value with one thing replaced in it; value None removes it."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    return content


def assert_names_the_fault(read, path, place):
    """`read()` must raise one line that names the file at `path` and matches `place`."""
    with pytest.raises(InputError) as error:
        read()
    message = str(error.value)
    print(message)
    assert os.path.basename(path) in message
    assert re.search(place, message) and "\n" not in message


# ---- Pictures ------------------------------------------------------------------------------------


def photo(width, height, seed=0):
    """Smooth colours with some noise: what a resampling filter has something to do with."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth * .9 + rng.integers(0, 25, (height, width, 3))
    return Image.fromarray(noisy.astype(np.uint8))
