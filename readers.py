"""From files to examples: HA-DPO's preference data, LLaVA's conversations, POPE's questions.

    JSON → Example (image, conversations), which data.py makes into tokens, rows and batches

HA-DPO's `desc_data.json`/`pope_data.json` come with Visual Genome's images, LLaVA's conversation JSON with a folder of
its own, POPE's question files with COCO's. Whatever is wrong with a file is an InputError that names file and row.

Follows haotian-liu/LLaVA (arXiv 2310.03744), opendatalab/HA-DPO (arXiv 2311.16839) and RUCAIBox/POPE (arXiv 2305.10355).
"""
import json
import os
import random
from dataclasses import dataclass

from data import IMAGE, InputError

DESCRIBE = ("Describe this image in detail.",           # HA-DPO's four description prompts, in its order
            "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


@dataclass
class Example:
    """One row to be: an image (or None) and conversations that share a beginning, each [(question, answer), ...]."""
    image: str
    conversations: list


def read_json(path, kind=object, lines=False):
    """A JSON file that holds a `kind`, or one JSON value per line. Errors name the file and the place."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; check the path (nothing is downloaded)")
    place = path
    try:
        with open(path, encoding="utf-8") as file:
            value = [] if lines else json.load(file)
            for line in file:                       # json.load has left none
                if line.strip():
                    place = f"{path}, row {len(value)}"
                    value.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{place}: not readable as JSON ({e}); was the download cut short?")
    if not isinstance(value, kind):
        raise InputError(f"{path}: holds a {type(value).__name__} where a {kind.__name__} should be; is it the right file?")
    return value


def field(row, name, kind, path, number):
    """row[name], or InputError with file and row number when it is absent or of another type."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{path}, row {number}: {name!r} should be {expected} and is {value!r}; mend or remove the row")
    return value


def read_image_index(vg_path):
    """Visual Genome's image_data.json → {image_id: path}: the last two parts of each url lie below `vg_path`."""
    path = os.path.join(vg_path, "image_data.json")
    return {field(row, "image_id", (int, str), path, n): os.path.join(vg_path, *field(row, "url", str, path, n).split("/")[-2:])
            for n, row in enumerate(read_json(path, list))}


def read_hadpo(desc_data_path, pope_data_path, vg_path, keep_correct=False, seed=42):
    """HA-DPO's preference data → [Example], conversations = [chosen, rejected].

    Order and sampling are the original's: POPE rows first, then the descriptions twice. `keep_correct` keeps the POPE
    rows that the base model answered right, which the original skips.
    """
    images = read_image_index(vg_path)

    def pair(image_id, path, number, question, chosen, rejected):
        image_id = int(image_id) if str(image_id).isdigit() else image_id
        if image_id not in images:
            raise InputError(f"{path}, row {number}: image_id {image_id} is not in {vg_path}/image_data.json; do both belong to "
                             "the same data?")
        question = f"{IMAGE}\n{question}"
        return Example(images[image_id], [[(question, chosen)], [(question, rejected)]])

    yes_no = []
    for n, row in enumerate(read_json(pope_data_path, list)):
        if not field(row, "correct", bool, pope_data_path, n) or keep_correct:
            texts = (field(row, name, str, pope_data_path, n) for name in ("question", "chosen", "reject"))
            yes_no.append(pair(field(row, "image_id", (int, str), pope_data_path, n), pope_data_path, n, *texts))
    descriptions, rng = [], random.Random(seed)
    for n, (image_id, row) in enumerate(read_json(desc_data_path, dict).items()):
        chosen, rejected = (field(row, name, list, desc_data_path, n) for name in ("chosen", "rejected"))
        if not chosen or not rejected or not all(isinstance(text, str) for text in chosen + rejected):
            raise InputError(f"{desc_data_path}, row {n}: image {image_id} needs texts under chosen and rejected; mend or remove the row")
        chosen, rejected, question = rng.choice(chosen), rng.choice(rejected), rng.choice(DESCRIBE)
        descriptions.append(pair(image_id, desc_data_path, n, question, chosen, rejected))
    return yes_no + 2 * descriptions


def read_llava(data_path, image_folder):
    """LLaVA's conversation JSON → [Example] with one conversation each. The image is moved to its turn's beginning."""
    examples = []
    for n, row in enumerate(read_json(data_path, list)):
        said = field(row, "conversations", list, data_path, n)
        who = [field(turn, "from", str, data_path, n) for turn in said]
        if who[:1] == ["gpt"]:
            said, who = said[1:], who[1:]           # as the original does
        if not said or who != ["human", "gpt"] * (len(who) // 2):
            raise InputError(f"{data_path}, row {n}: turns must alternate human, gpt; mend or remove the row")
        texts = [field(turn, "value", str, data_path, n) for turn in said]
        texts = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text for text in texts]
        image = os.path.join(image_folder, field(row, "image", str, data_path, n)) if row.get("image") else None
        marked = sum(IMAGE in text for text in texts)
        if marked != (image is not None):
            raise InputError(f"{data_path}, row {n}: has {'an image' if image else 'no image'} but {IMAGE} stands in {marked} of its "
                             "turns; mend or remove the row")
        examples.append(Example(image, [list(zip(texts[::2], texts[1::2]))]))
    return examples


def read_rows(path, *names):
    """One JSON object per line, at least one, with a text under each of the names."""
    rows = read_json(path, lines=True)
    if not rows:
        raise InputError(f"{path}: is empty; was the download cut short?")
    for n, row in enumerate(rows):
        for name in names:
            field(row, name, str, path, n)
    return rows


def read_pope(pope_path, split):
    """One of POPE's question files → [{"question_id", "image", "text", "label"}, ...]. Split: random, popular, adversarial."""
    name = f"coco_pope_{split}.json"
    folders = [pope_path, os.path.join(pope_path, "output", "coco"), os.path.join(pope_path, "coco")]
    path = next((os.path.join(f, name) for f in folders if os.path.isfile(os.path.join(f, name))), None)
    if path is None:
        raise InputError(f"{pope_path}: holds no {name} (also not in output/coco); --pope_path names POPE's folder")
    rows = read_rows(path, "image", "text", "label")
    for n, row in enumerate(rows):
        if row["label"] not in ("yes", "no"):
            raise InputError(f"{path}, row {n}: label {row['label']!r} is neither yes nor no")
    return rows
