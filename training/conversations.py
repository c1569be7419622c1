"""LLaVA's conversations: rows that stay on disk.

    examples = read_llava("llava_v1_5_mix665k.json", "images")      # a sequence of Example
    examples[123456]                                                # is read and parsed now

LLaVA's file can be larger than memory, so it is not loaded. `read_llava` goes through it once to
find where its rows begin and end. Whatever is wrong with it is an InputError that names file and
row.

Follows haotian-liu/LLaVA (arXiv 2310.03744).
"""
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from data import IMAGE, Example
from support.common import InputError, check_text, field, parse_json, progress
from support.images import below

CHUNK = 2 ** 19       # bytes looked at together; they and their masks stay in the processor's cache
LONGEST_ROW = 2 ** 26       # bytes; what does not end by then is no row
ROWS_READ_FIRST = 10_000    # read_llava parses so many, which takes less than a second
QUOTE, BACKSLASH, OPEN, CLOSE = b'"\\{}'
IMAGE_NAME = re.compile(rb'"image"\s*:\s*"(?!")([^"\\]*(?:\\.[^"\\]*)*)"')
OTHER_MEDIA = "images", "video", "videos"               # keys of LLaVA's later mixes


def read_llava(data_path, image_folder):
    """LLaVA's conversation JSON → ConversationFile, a sequence of Example with one conversation
    each.

    Rows are read once at the start, all of them or, of a long file, some from everywhere in it:
    what is wrong is mostly wrong everywhere. An error in any other is raised when it is read.
    """
    examples = ConversationFile(data_path, image_folder)
    for i in np.linspace(0, len(examples) - 1, min(len(examples), ROWS_READ_FIRST)).astype(int):
        examples[i]
    return examples


class ConversationFile(Sequence):
    """LLaVA's rows as a sequence of Example, read from the file one by one; memory holds some 20
    bytes of each.

    No file stays open, so DataLoader workers can be forked from its process or get it pickled.
    """

    def __init__(self, path, image_folder):
        self.path, self.paths, self.image_folder = path, [path], image_folder
        self.spans, self.has_image, self.image_names = index_rows(path)

    def __len__(self):
        return len(self.spans)

    def sizes(self):
        """Bytes of each row and whether it names an image, (n,) and (n,)."""
        return self.spans[:, 1] - self.spans[:, 0], self.has_image

    def image_paths(self):
        """Distinct images, without reading the rows."""
        try:
            names = parse_json(b'["%b"]' % self.image_names) if self.image_names else []
            return [below(self.image_folder, name, self.path) for name in dict.fromkeys(names)]
        except (InputError, ValueError):
            for _ in self:                      # the row that has this name says so itself
                pass
            raise

    def __getitem__(self, i):
        begin, end = self.spans[i].tolist()
        number = i % len(self)
        with open(self.path, "rb", buffering=0) as file:
            text = os.pread(file.fileno(), end - begin, begin)
        row = parse_row(text, self.path, number)
        return conversation(row, self.path, number, self.image_folder)


def image_paths(examples):
    """Distinct images of a list of Example, or of rows that stay on disk."""
    if isinstance(examples, list):
        return list(dict.fromkeys(e.image for e in examples if e.image))
    return examples.image_paths()


def parse_row(text, path, number):
    """The bytes of a row → its JSON value."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}, row {number}: not readable as JSON ({e}); mend or remove the "
                         "row") from e


def conversation(row, path, number, image_folder):
    """One of LLaVA's rows → Example. The image is moved to its turn's beginning.

    In a row without an image `<image>` is text, as in the original.
    """
    place, said = f"{path}, row {number}", field(row, "conversations", list, path, number)
    who = [field(turn, "from", str, path, number) for turn in said]
    if who[:1] == ["gpt"]:
        said, who = said[1:], who[1:]               # as the original does
    if not said or who != ["human", "gpt"] * (len(who) // 2):
        raise InputError(f"{place}: turns must alternate human, gpt; mend or remove the row")
    texts = [field(turn, "value", str, path, number) for turn in said]
    if not all(text.strip() for text in texts[1::2]):
        raise InputError(f"{place}: a turn of gpt is empty, so nothing of it can be learnt; mend "
                         "or remove the row")
    image = None
    if row.get("image"):
        image = below(image_folder, field(row, "image", str, path, number), place)
        texts = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text
                 for text in texts]
        marked = sum(IMAGE in text for text in texts)
        if marked != 1:
            raise InputError(f"{place}: has an image but {IMAGE} stands in {marked} of its turns; "
                             "mend or remove the row")
    return Example(image, [list(zip(texts[::2], texts[1::2], strict=True))])


def index_rows(path):
    """Go once through a file of JSON objects, a list of them (indented or not) or one per line.

    Returns where each begins and ends, (n, 2); whether it names an image, (n,); and the distinct
    names as they stand in the file, `","` between them. What is outside the objects is checked
    here, what is inside when a row is read.
    """
    spans, images, names, unfit = [np.zeros((0, 2), np.int64)], bytearray(), {}, {}
    for text, position, found in chunks_of_rows(path):
        spans.append(position + found)
        video = b'"video' in text
        for begin, end in found.tolist():
            name, sure = image_of(text, begin, end)
            if video or not sure:
                row = parse_row(text[begin:end], path, len(images))
                name, fault = image_or_fault(row)
                if fault:
                    unfit.setdefault(fault, []).append(len(images))
            images.append(name is not None)
            if name is not None:
                names[name] = None
    for fault, (first, *others) in unfit.items():
        raise InputError(f"{path}, row {first}{f' and {len(others):,} more' * bool(others)}: "
                         f"{fault}; a row here is a conversation about one image or none: "
                         "remove the others")
    return np.concatenate(spans), np.frombuffer(images, bool), b'","'.join(names)


def chunks_of_rows(path):
    """Go once through a file of JSON objects → (bytes, where they begin in the file, first byte and
    end of each row that is whole in them (n, 2)). What is outside of the rows is checked at the
    end.
    """
    position = check_text(path)
    outside, rest, rows = bytearray(), b"", 0
    bar = progress("indexing rows", total=os.path.getsize(path), unit="B", unit_scale=True)
    with open(path, "rb") as file, bar:
        file.seek(position)
        while len(rest) < LONGEST_ROW and (more := file.read(max(CHUNK, len(rest)))):
            text = rest + more
            found = whole_objects(text)
            yield text, position, found
            # And the first byte of each row
            begins, ends = found.T.tolist()
            between = zip([0, *ends], begins, strict=False)
            outside += b"".join([text[a:b + 1] for a, b in between])
            behind = ends[-1] if ends else 0
            rest, position, rows = text[behind:], position + behind, rows + len(ends)
            bar.update(len(more))
    check_outside(path, bytes(outside) + rest, rows)


def image_of(text, begin, end):
    """The name of a row's own image, as it stands in the file, or None; and whether that is sure.

    It is where no object comes before the name and nothing like it behind. (A quote inside of a
    text has a backslash.) Of other rows only JSON knows which name is their own.
    """
    at = text.find(b'"image', begin, end)
    name = IMAGE_NAME.match(text, at, end) if at >= 0 else None
    behind = name.end() if name else begin
    sure = at < 0 or name and (text[at - 1] != BACKSLASH and text.find(b"{", begin + 1, at) < 0
                               and text.find(b'"image', behind, end) < 0)
    return name and name[1], sure and text.find(b'"conversations"', behind, end) >= 0


def image_or_fault(row):
    """The same of a parsed row; and why it is none about one image or none, in words, or None."""
    image = row.get("image") or None
    other = next((key for key in OTHER_MEDIA if row.get(key)), None)
    if other:
        return None, f"names {other!r}"
    if image and not isinstance(image, str):
        return None, f"'image' is a {type(image).__name__}"
    if "conversations" not in row:
        return None, "has no 'conversations'"
    return image and json.dumps(image)[1:-1].encode(), None


def check_outside(path, outside, rows):
    """Besides white space, a list's brackets and commas may stand outside of its rows (here a `{`
    each), or nothing at all.
    """
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
        raise InputError(f"{path}, row {number}: not readable as JSON objects ({what}); is it the "
                         "right file, was the download cut short?")


def whole_objects(text):
    """Bytes that begin outside of any JSON object → first byte and end of each outermost one that
    is complete, (n, 2).
    """
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
