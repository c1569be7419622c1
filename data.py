"""What a row is: from files to examples, token ids, packed rows and batches.

    JSON → Example → ids and labels → Row (a shared prefix and its branches) → Batch (tensors)

    examples = read_hadpo("desc_data.json", "pope_data.json", "VG")     # chosen and rejected
    batch = PackedDataset(examples, model.row_format())[[3, 7]]         # the Batch of two pairs

Text follows LLaVA's templates (support/templates.py); image preprocessing is LLaVA's `pad` followed
by CLIP's.

Follows haotian-liu/LLaVA (arXiv 2310.03744) and opendatalab/HA-DPO (arXiv 2311.16839). Deliberately
different: text never turns into control tokens, the image's place is expanded to its patches here
and not in the model, and what chosen and rejected share stands in a row once.
"""
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from llama import BEFORE_VOCO, PAD_BRANCH, VOCO
from support.anyres import TileGrid, numbered_tiles
from support.common import InputError, field, id_text
from support.hadpo import read_hadpo_json, read_image_index
from support.images import image_size
from support.preprocessing import ImageProcessor
from support.templates import V1, Template
from support.tokenizer import BOS, EOS, PAD, Tokenizer

IMAGE = "<image>"                         # LLaVA's mark of the image's place in a text
IMAGE_ID, VOCO_ID, IGNORE = -200, -300, -100                # the first and the last are LLaVA's
DESCRIBE = ("Describe this image in detail.",           # HA-DPO's four prompts, in its order
            "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


# ---- Examples: HA-DPO's files --------------------------------------------------------------------

@dataclass
class Example:
    """One row to be."""
    image: str                # path, or None
    conversations: list       # that begin alike, each [(question, answer), ...]; None: not answered
    given: int = 0            # so many of their first answers are not learnt: they are prompt
    context: str = None       # so the last answers begin, which is prompt, too; they have no `</s>`

    def characters(self):
        return sum(len(q) + len(a or "") for turns in self.conversations for q, a in turns)


def read_hadpo(desc_data_path, pope_data_path, vg_path, keep_correct=False, seed=42):
    """HA-DPO's preference data → [Example], conversations = [chosen, rejected].

    Order and sampling are the original's: POPE rows first, then the descriptions twice.
    `keep_correct` keeps the POPE rows that the base answered right, which the original skips.
    """
    images = read_image_index(vg_path)

    def pair(image_id, place, question, answers):
        if id_text(image_id) not in images:
            raise InputError(f"{place}: image_id {image_id} is not in {vg_path}/image_data.json; "
                             "do both belong to the same data?")
        if not all(answer.strip() for answer in answers):
            raise InputError(f"{place}: an answer about image {image_id} is empty; remove the row")
        return Example(images[id_text(image_id)], [[(f"{IMAGE}\n{question}", a)] for a in answers])

    yes_no = []
    for n, row in enumerate(read_hadpo_json(pope_data_path, list)):
        if not field(row, "correct", bool, pope_data_path, n) or keep_correct:
            question, *answers = (field(row, name, str, pope_data_path, n)
                                  for name in ("question", "chosen", "reject"))
            image_id = field(row, "image_id", (int, str), pope_data_path, n)
            yes_no.append(pair(image_id, f"{pope_data_path}, row {n}", question, answers))
    descriptions, rng = [], random.Random(seed)
    for n, (image_id, row) in enumerate(read_hadpo_json(desc_data_path, dict).items()):
        texts = [field(row, name, list, desc_data_path, n) for name in ("chosen", "rejected")]
        if not all(texts) or not all(isinstance(text, str) for text in texts[0] + texts[1]):
            raise InputError(f"{desc_data_path}, row {n}: image {image_id} needs texts under "
                             "chosen and rejected; mend or remove the row")
        answers = [rng.choice(choices) for choices in texts]
        place = f"{desc_data_path}, row {n}"
        descriptions.append(pair(image_id, place, rng.choice(DESCRIBE), answers))
    return yes_no + 2 * descriptions


# ---- Text ----------------------------------------------------------------------------------------

def encode_conversation(tokenizer, turns, template=V1, has_image=True, given=0, context=None):
    """[(question, answer), ...] → ids, labels: lists of the same length.

    Labels are the ids of answers (not of the first `given`, nor of the last one's `context`) and
    `</s>`, IGNORE elsewhere. Each text around `<image>`, which is text itself where no image is,
    has its own leading space mark.
    """
    text = f"{template.system} " if template.system else ""
    image = [*template.around_image[:1], IMAGE_ID, *template.around_image[1:]]
    ids, continues, labels = [BOS], False, [IGNORE]
    for number, (question, answer) in enumerate(turns):
        text += template.question.format(question)
        for n, chunk in enumerate(text.split(IMAGE) if has_image else [text]):
            ids += (image if n else []) + tokenizer.encode(chunk, continues)
            continues = False
        labels += [IGNORE] * (len(ids) - len(labels))
        if answer is not None:
            if not answer.strip():
                raise InputError(f"the answer to {question!r} is empty; remove the row")
            is_part = context is not None and number == len(turns) - 1
            said = tokenizer.encode(answer if is_part else answer + template.closing)
            begun = tokenizer.encode(context) if is_part else []
            ids += said if is_part else said + [EOS]
            labels += [IGNORE] * len(os.path.commonprefix((said, begun)))
            labels += ids[len(labels):] if number >= given else []
        text, continues = "", True
    return ids, labels


def encode_compressed(row_format, turns, given=0, context=None):
    """The same for VoCo-LLaMA (arXiv 2406.12275): bos, image, the <voco> tokens that compress it,
    and then the conversation, whose text has no image. Newlines stand where its authors' do.
    """
    tokenizer, newline = row_format.tokenizer, row_format.tokenizer.encode("\n")
    turns = [(question.replace(f"{IMAGE}\n", "").replace(IMAGE, ""), answer)
             for question, answer in turns]
    ids, labels = encode_conversation(tokenizer, turns, row_format.template, False, given, context)
    image = [BOS, IMAGE_ID, *newline, *[VOCO_ID] * row_format.num_voco, *newline]
    return image + ids[1:], [IGNORE] * len(image) + labels[1:]


# ---- Packed rows ---------------------------------------------------------------------------------

@dataclass
class Row:
    """A shared prefix and N branches (llama.py), as lists of T tokens and A answer tokens."""
    input_ids: list       # T; the image is IMAGE_ID once per patch
    position: list        # T
    branch: list          # T; 0 = prefix, or see `prefix_branches`
    source: list          # A; index of the token whose hidden state predicts `target`
    target: list          # A
    target_branch: list   # A; 1..N
    ends: list            # N; index of each branch's last token
    image: str = None     # path
    cut: int = 0          # answer tokens lost to max_length
    tiles: int = 1        # of the image
    patches: np.ndarray = None      # any resolution: which patch of its tiles each image token is


def pack(sequences, num_patches, max_length, image=None):
    """[(ids, labels), ...] that begin alike → Row.

    The prefix is what all of them share, up to the first supervised token. A prompt that does not
    fit raises InputError; an answer that does not fit is cut at its end.
    """
    sequences = [expand(ids, labels, num_patches, image) for ids, labels in sequences]
    prompts = [next((t for t, label in enumerate(labels) if label != IGNORE), len(ids))
               for ids, labels in sequences]
    first, limit = sequences[0][0], min(*prompts, *(len(ids) - 1 for ids, _ in sequences))
    differ = (t for t in range(limit) if any(ids[t] != first[t] for ids, _ in sequences))
    prefix = next(differ, limit)
    row = Row(first[:prefix], list(range(prefix)), prefix_branches(first[:prefix]), [], [], [], [],
              image)
    for number, ((ids, labels), prompt) in enumerate(zip(sequences, prompts, strict=True), start=1):
        if prompt + (prompt < len(ids)) > max_length or IMAGE_ID in ids[max_length:]:
            raise InputError(f"a prompt of {prompt} tokens does not fit into {max_length} (image "
                             f"{image}); prompts are never cut: shorten the question or name a "
                             "model with a longer context")
        row.cut += max(0, len(ids) - max_length)
        # Token t of the sequence stands at start + t of the row.
        start, end = len(row.input_ids) - prefix, min(len(ids), max_length)
        row.input_ids += ids[prefix:end]
        row.position += range(prefix, end)
        row.branch += [number] * (end - prefix)
        for t in range(prefix, end):
            if labels[t] != IGNORE:
                row.source.append(start + t - 1 if t > prefix else prefix - 1)
                row.target.append(labels[t])
                row.target_branch.append(number)
        row.ends.append(len(row.input_ids) - 1)
    return row


def prefix_branches(ids):
    """The branch of each token of a prefix: 0, unless <voco> tokens hide what is in front of them.
    """
    compressed = ids.count(VOCO_ID)
    first = ids.index(VOCO_ID) if compressed else 0
    return ([BEFORE_VOCO] * first + [VOCO] * compressed + [0] * (len(ids) - first - compressed))


def expand(ids, labels, num_patches, image):
    """Ids and labels with the image's mark repeated once per patch."""
    marks = ids.count(IMAGE_ID)
    if marks != (image is not None):
        having = f"one image ({image})" if image else "no image"
        raise InputError(f"{IMAGE} stands {marks} times in a text with {having}; it is the mark of "
                         "the image's place and cannot be part of a question")
    if not marks:
        return ids, labels
    at = ids.index(IMAGE_ID)
    return (ids[:at] + [IMAGE_ID] * num_patches + ids[at + 1:],
            labels[:at] + [IGNORE] * num_patches + labels[at + 1:])


@dataclass
class Batch:
    """Rows as padded tensors. Padding: branch -1, target IGNORE, target_branch 0, ends -1."""
    input_ids: torch.Tensor = None        # (B, T)
    position: torch.Tensor = None         # (B, T)
    branch: torch.Tensor = None           # (B, T)
    source: torch.Tensor = None           # (B, A)
    target: torch.Tensor = None           # (B, A)
    target_branch: torch.Tensor = None    # (B, A)
    ends: torch.Tensor = None             # (B, number of branches)
    image_index: torch.Tensor = None      # (B,) which of the N distinct images a row has; -1 = none
    pixel_values: torch.Tensor = None     # (N, 3, S, S)
    # Any resolution (support/anyres.py): N counts the tiles of all I images.
    tiles: torch.Tensor = None            # (I, M) the numbers of each image's tiles; -1 = none
    patches: torch.Tensor = None          # (image tokens,) which of all N * P patches; -1 = newline
    # Kept features (training/features.py): what a frozen trunk makes of input_ids and pixel_values.
    hidden_states: torch.Tensor = None    # (B, A, hidden)
    image_features: torch.Tensor = None   # (N, P, C)
    # Compressed images (training/compressed.py): keys and values of V <voco> tokens of each row.
    compressed: torch.Tensor = None       # (B, 2, L, H_kv, V, D)

    def row_tiles(self):
        """Which of the N pictures each row looks at, (B, M); -1 = none."""
        if self.tiles is None:
            return self.image_index[:, None]
        nothing = torch.full_like(self.tiles[:1], -1)               # found by image_index -1
        return torch.cat((self.tiles, nothing))[self.image_index]

    def tensors(self):
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def pin_memory(self):
        """In memory that a GPU can fetch by itself; DataLoader calls this."""
        return Batch(**{name: x.pin_memory() for name, x in self.tensors().items()})

    def to(self, device, dtype=None):
        """On a device; floating point tensors also in `dtype`."""
        def moved(x):
            return x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
        return Batch(**{name: moved(x) for name, x in self.tensors().items()})


# Field of a Row: what pads it, and of what number its width is a multiple. Attention with a mask is
# far slower at widths that are no multiple of 8.
PADDING = {"input_ids": (PAD, 8), "position": (0, 8), "branch": (PAD_BRANCH, 8), "source": (0, 1),
           "target": (IGNORE, 1), "target_branch": (0, 1), "ends": (-1, 1)}

def pad(rows, value, multiple=1):
    """Lists → (B, longest, rounded up to a multiple) int64, filled with `value` on the right."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    out = np.full((len(rows), width), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return torch.from_numpy(out)


def collate(rows, preprocess, always_image=False):
    """Rows → Batch, each image opened once. `always_image`: one of zeros, where there is none."""
    images = list(dict.fromkeys(row.image for row in rows if row.image))
    tensors = {name: pad([getattr(row, name) for row in rows], value, multiple)
               for name, (value, multiple) in PADDING.items()}
    index = torch.tensor([images.index(row.image) if row.image else -1 for row in rows])
    with ThreadPoolExecutor(4) as pool:                     # PIL lets go of Python's lock
        pixels = list(pool.map(preprocess, images))
    if images and pixels[0].dim() == 4:
        counts, of_rows = [len(tiles) for tiles in pixels], [row.patches for row in rows]
        patches = preprocess.grid.in_batch(of_rows, index.tolist(), counts)
        tensors |= {"tiles": torch.from_numpy(numbered_tiles(counts)),
                    "patches": torch.from_numpy(patches)}
        pixels = list(torch.cat(pixels))
    if always_image and not images:
        pixels = [torch.zeros(3, preprocess.size, preprocess.size)]
        if preprocess.grid:
            tensors["patches"] = torch.zeros(0, dtype=torch.long)
    pixels = torch.stack(pixels) if pixels else None
    return Batch(**tensors, image_index=index, pixel_values=pixels)


# ---- Datasets ------------------------------------------------------------------------------------

@dataclass
class RowFormat:
    """How a model wants its rows (`Llava.row_format`)."""
    tokenizer: Tokenizer
    preprocess: ImageProcessor
    num_patches: int          # image tokens of a row, at most
    max_length: int           # tokens of a row
    template: Template = V1
    num_voco: int = 0         # <voco> tokens that compress an image; 0: text sees the image itself
    grid: TileGrid = None     # any resolution

    def layout(self, image):
        """Tokens and tiles of an image, and which patch of its tiles each of its tokens is."""
        if not image or not self.grid:
            return self.num_patches, 1, None
        tiles, patches = self.grid.layout(image_size(image))
        return len(patches), tiles, patches


class PackedDataset(torch.utils.data.Dataset):
    """Examples, made into rows when asked for: `dataset[[3, 7]]` is the Batch of two of them."""

    def __init__(self, examples, row_format, always_image=False):
        self.examples, self.format, self.always_image = examples, row_format, always_image

    def __len__(self):
        return len(self.examples)

    def row(self, i):
        example, f = self.examples[i], self.format
        has_image, ends = bool(example.image), (example.given, example.context)
        try:
            if f.num_voco and has_image:
                sequences = [encode_compressed(f, turns, *ends) for turns in example.conversations]
            else:
                sequences = [encode_conversation(f.tokenizer, turns, f.template, has_image, *ends)
                             for turns in example.conversations]
            tokens, tiles, patches = f.layout(example.image)
            row = pack(sequences, tokens, f.max_length, example.image)
            return replace(row, tiles=tiles, patches=patches)
        except InputError as e:
            raise InputError(f"example {i} of the data: {e}") from e

    def lengths(self):
        """About how many tokens each row has, (n,); negative without an image (LLaVA's sign)."""
        if isinstance(self.examples, list):
            size, has_image = np.array([(e.characters(), bool(e.image)) for e in self.examples]).T
        else:                                       # rows that stay on disk
            size, has_image = self.examples.sizes()
        text = size // 4                            # nothing is tokenised: this only sorts rows
        return np.where(has_image, text + self.format.num_patches, -1 - text)

    def __getitem__(self, indices):
        rows = [self.row(i) for i in indices]
        return collate(rows, self.format.preprocess, self.always_image)
