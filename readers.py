"""From files to examples: HA-DPO's preference data, LLaVA's conversations, POPE's questions.

    JSON → Example (image, conversations), which data.py makes into tokens, rows and batches

HA-DPO's `desc_data.json`/`pope_data.json` come with Visual Genome's images, LLaVA's conversation JSON with a folder of
its own, POPE's question files with COCO's. Whatever is wrong with a file is an InputError that names file and row.

Follows haotian-liu/LLaVA (arXiv 2310.03744), opendatalab/HA-DPO (arXiv 2311.16839) and RUCAIBox/POPE (arXiv 2305.10355).
Deliberately different: LLaVA's file, which can be larger than memory, is not loaded. `read_llava` goes through it once to
find where its rows begin and end; a row is read and parsed when somebody asks for it.
"""
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

IMAGE = "<image>"        # LLaVA's mark of the image's place in a text

DESCRIBE = ("Describe this image in detail.",           # HA-DPO's four description prompts, in its order
            "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


class InputError(Exception):
    """Something the user can cure. The message names the file, the value and the cure; the programs print only it."""


def run_program(main):
    """Run a command-line program; what the user can cure ends it with one line and exit code 1; Ctrl-C with 130."""
    try:
        main()
    except InputError as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)           # where rank 0 says the same, the launcher ends us before we do
        # From a DataLoader worker it arrives behind a traceback of many lines.
        print(f"error: {str(e).rpartition('InputError: ')[2].strip()}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def progress(*args, **kwargs):
    """A tqdm bar that rank 0 shows when it is needed for more than three seconds."""
    return tqdm(*args, leave=False, delay=3, disable=int(os.environ.get("RANK", 0)) > 0, **kwargs)


@dataclass
class Example:
    """One row to be: an image (or None) and conversations that share a beginning, each [(question, answer), ...]."""
    image: str
    conversations: list


def check_file(path):
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; check the path (nothing is downloaded)")


def read_json(path, kind=object, lines=False):
    """A JSON file that holds a `kind`, or one JSON value per line. Errors name the file and the place."""
    check_file(path)
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
        if not chosen.strip() or not rejected.strip():
            raise InputError(f"{path}, row {number}: an answer about image {image_id} is empty; mend or remove the row")
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


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA's conversations: rows that stay on disk

CHUNK = 2 ** 19             # bytes looked at together; they and their masks stay in the processor's cache
LONGEST_ROW = 2 ** 26       # bytes; what does not end by then is no row
ROWS_READ_FIRST = 10_000    # read_llava parses so many, which takes less than a second
QUOTE, BACKSLASH, OPEN, CLOSE = b'"\\{}'
IMAGE_NAME = re.compile(rb'"image"\s*:\s*"(?!")([^"\\]*(?:\\.[^"\\]*)*)"')


def read_llava(data_path, image_folder):
    """LLaVA's conversation JSON → ConversationFile, a sequence of Example with one conversation each.

    Rows are read once at the start, all of them or, of a long file, some from everywhere in it: what is wrong is mostly
    wrong everywhere. An error in any other is raised when it is read.
    """
    examples = ConversationFile(data_path, image_folder)
    for i in np.linspace(0, len(examples) - 1, min(len(examples), ROWS_READ_FIRST)).astype(int):
        examples[i]
    return examples


class ConversationFile(Sequence):
    """LLaVA's rows as a sequence of Example, read from the file one by one; memory holds some 20 bytes of each.

    No file stays open, so DataLoader workers can be forked from its process or get it pickled.
    """

    def __init__(self, path, image_folder):
        self.path, self.image_folder = path, image_folder
        self.spans, self.has_image, self.image_names = index_rows(path)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        begin, end = self.spans[i].tolist()
        number = i % len(self)
        with open(self.path, "rb", buffering=0) as file:
            text = os.pread(file.fileno(), end - begin, begin)
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise InputError(f"{self.path}, row {number}: not readable as JSON ({e}); mend or remove the row")
        return conversation(row, self.path, number, self.image_folder)


def conversation(row, path, number, image_folder):
    """One of LLaVA's rows → Example. The image is moved to its turn's beginning."""
    said = field(row, "conversations", list, path, number)
    who = [field(turn, "from", str, path, number) for turn in said]
    if who[:1] == ["gpt"]:
        said, who = said[1:], who[1:]               # as the original does
    if not said or who != ["human", "gpt"] * (len(who) // 2):
        raise InputError(f"{path}, row {number}: turns must alternate human, gpt; mend or remove the row")
    texts = [field(turn, "value", str, path, number) for turn in said]
    if not all(text.strip() for text in texts[1::2]):
        raise InputError(f"{path}, row {number}: a turn of gpt is empty, so nothing of it can be learnt; mend or remove the row")
    texts = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text for text in texts]
    image = os.path.join(image_folder, field(row, "image", str, path, number)) if row.get("image") else None
    marked = sum(IMAGE in text for text in texts)
    if marked != (image is not None):
        raise InputError(f"{path}, row {number}: has {'an image' if image else 'no image'} but {IMAGE} stands in {marked} of its "
                         "turns; mend or remove the row")
    return Example(image, [list(zip(texts[::2], texts[1::2]))])


def image_paths(examples):
    """Distinct images of examples; those of a ConversationFile without reading its rows."""
    if not isinstance(examples, ConversationFile):
        return list(dict.fromkeys(e.image for e in examples if e.image))
    names = json.loads(b'["%b"]' % examples.image_names) if examples.image_names else []
    return [os.path.join(examples.image_folder, name) for name in names]


def row_lengths(examples, num_patches):
    """About how many tokens each row has, (n,); negative without an image, the sign that LLaVA groups modalities by.

    Four characters (or bytes of a file) a token: exact enough to put rows of a size together, and nothing is tokenised.
    """
    if isinstance(examples, ConversationFile):
        size, has_image = examples.spans[:, 1] - examples.spans[:, 0], examples.has_image
    else:
        size = np.array([sum(len(q) + len(a or "") for turns in e.conversations for q, a in turns) for e in examples])
        has_image = np.array([e.image is not None for e in examples])
    return np.where(has_image, size // 4 + num_patches, -1 - size // 4)


def index_rows(path):
    """Go once through a file of JSON objects, a list of them (indented or not) or one per line.

    Returns where each begins and ends, (n, 2); whether it names an image, (n,); and the distinct names as they stand in
    the file, `","` between them. What is outside the objects is checked here, what is inside when a row is read.
    """
    check_file(path)
    spans, has_image, names, outside, rest, position = [np.zeros((0, 2), np.int64)], bytearray(), {}, bytearray(), b"", 0
    with open(path, "rb") as file, progress("indexing rows", total=os.path.getsize(path), unit="B", unit_scale=True) as bar:
        while len(rest) < LONGEST_ROW and (more := file.read(max(CHUNK, len(rest)))):
            text = rest + more
            found = whole_objects(text)                                                     # (rows in this chunk, 2)
            spans.append(position + found)
            begins, ends = found.T.tolist()
            images = [IMAGE_NAME.search(text, begin, end) for begin, end in zip(begins, ends)]
            has_image += bytes(map(bool, images))
            names.update((image[1], None) for image in images if image)
            outside += b"".join([text[a:b + 1] for a, b in zip([0, *ends], begins)])        # and the first byte of each row
            behind = ends[-1] if ends else 0
            rest, position = text[behind:], position + behind
            bar.update(len(more))
    check_outside(path, bytes(outside) + rest, len(has_image))
    return np.concatenate(spans), np.frombuffer(has_image, bool), b'","'.join(names)


def check_outside(path, outside, rows):
    """Besides white space, a list's brackets and commas may stand outside of its rows (here a `{` each), or nothing at all."""
    outside = outside.translate(None, b" \t\r\n")
    if not outside:
        raise InputError(f"{path}: is empty; was the download cut short?")
    expected = b"[" + b",".join([b"{"] * rows) + b"]" if outside.startswith(b"[") else b"{" * rows
    if outside != expected:
        same = len(os.path.commonprefix((outside, expected)))
        wrong, number = outside[same:].removeprefix(b","), outside[:same].count(b"{")
        if not wrong:
            what = "ends without a ]"
        elif wrong.startswith(b"{"):
            what = "begins and does not end" if number == rows else "needs one comma in front of it"
        else:
            what = f"here stands {wrong[:20].decode(errors='replace')!r}"
        raise InputError(f"{path}, row {number}: not readable as JSON objects ({what}); is it the right file, was the download cut "
                         "short?")


def whole_objects(text):
    """Bytes that begin outside of any JSON object → first byte and end of each outermost one that is complete, (n, 2)."""
    codes = np.frombuffer(text, np.uint8)
    at = np.flatnonzero((codes == QUOTE) | (codes == OPEN) | (codes == CLOSE))
    kind = codes[at]
    quote = (kind == QUOTE) & ~is_escaped(codes, at)
    in_text = np.logical_xor.accumulate(quote)                  # behind an odd number of quotes
    brace = np.flatnonzero((kind != QUOTE) & ~in_text)
    at, opens = at[brace], kind[brace] == OPEN
    depth = np.cumsum(np.where(opens, 1, -1))
    begin, end = at[opens & (depth == 1)], at[~opens & (depth == 0)] + 1
    return np.stack((begin[:len(end)], end), 1)


def is_escaped(codes, at):
    """Which of the bytes `at` stand behind an odd number of backslashes, (len(at),)."""
    odd = codes[at - 1] == BACKSLASH
    more, back = np.flatnonzero(odd), 2
    while len(more):
        more = more[codes[at[more] - back] == BACKSLASH]
        odd[more] ^= True
        back += 1
    return odd
