"""From examples to batches: tokenizer, conversations, packed rows, images, sampler.

    Example (readers.py) → token ids and labels → Row (prefix + branches) → Batch (padded tensors)

Text follows LLaVA's `v1` template; image preprocessing is LLaVA's `pad` followed by CLIP's. Images are opened by
content, never by their extension, and EXIF rotation is ignored, because the original does so too and the published
numbers were made that way.

Follows haotian-liu/LLaVA (arXiv 2310.03744) and opendatalab/HA-DPO (arXiv 2311.16839). Deliberately different: text
never turns into control tokens (`</s>` typed by somebody stays text), the image's place is expanded to its patches here
and not in the model, and the shared part of chosen and rejected stands in a row once.
"""
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor

from clip_vit import CLIP_MEAN, CLIP_STD
from llama import PAD_BRANCH
from readers import IMAGE, InputError, progress, row_lengths

PAD, BOS, EOS = 0, 1, 2
IMAGE_ID, IGNORE = -200, -100                            # LLaVA's numbers
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
SYSTEM_HADPO_EVAL = SYSTEM.replace("user", "human")     # HA-DPO trains with `v1` but asks POPE with `llava_v1`


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """LLaMA's SentencePiece model. `encode` gives no control tokens; text that looks like one is encoded as text."""

    def __init__(self, path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; copy LLaMA's tokenizer.model (SentencePiece; any Vicuna or LLaVA-1.5 folder "
                             "has it) there")
        self.path = path
        try:
            self.model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: not a SentencePiece model ({str(e).splitlines()[0]}); copy tokenizer.model again")
        ids = self.model.unk_id(), self.model.bos_id(), self.model.eos_id()
        if ids != (PAD, BOS, EOS):
            raise InputError(f"{path}: unk, bos, eos are {ids} and must be {(PAD, BOS, EOS)}; this is not LLaMA's tokenizer")

    def __reduce__(self):
        return Tokenizer, (self.path,)              # pickled, it is its path

    def __len__(self):
        return self.model.vocab_size()

    def encode(self, text, continues=False):
        """Ids of a text. `continues`: it stands right behind a control token, so its first piece loses the space mark."""
        ids = self.model.encode(text)
        if continues and ids:
            bare = self.model.id_to_piece(ids[0]).removeprefix("\u2581")
            ids[:1] = [self.model.piece_to_id(bare)] if bare else []
        return ids

    def decode(self, ids):
        # Hugging Face's LLaVA has more embeddings than the tokenizer has pieces; such an id has no text.
        return self.model.decode([int(i) for i in ids if i not in (PAD, BOS, EOS) and i < len(self)])


def encode_conversation(tokenizer, turns, system=SYSTEM):
    """[(question, answer), ...] → ids, labels: lists of the same length, LLaVA's `v1` template.

    Labels are the ids of answers and their `</s>`, IGNORE elsewhere. A last answer of None leaves the prompt open. Each
    piece of text around `<image>` is tokenised alone, with its own leading space mark; one BOS stands in front.
    """
    ids, text, continues, labels = [BOS], system + " ", False, [IGNORE]
    for question, answer in turns:
        text += f"USER: {question} ASSISTANT:"
        for n, chunk in enumerate(text.split(IMAGE)):
            ids += ([IMAGE_ID] if n else []) + tokenizer.encode(chunk, continues)
            continues = False
        labels += [IGNORE] * (len(ids) - len(labels))
        if answer is not None:
            if not answer.strip():
                raise InputError(f"the answer to {question!r} is empty, so nothing of it can be learnt; remove it")
            ids += tokenizer.encode(answer) + [EOS]
            labels += ids[len(labels):]
        text, continues = "", True
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows


@dataclass
class Row:
    """A shared prefix and its branches (llama.py). Lists of T tokens, A answer tokens, N branches."""
    input_ids: list       # T; the image is IMAGE_ID once per patch
    position: list        # T
    branch: list          # T; 0 = prefix
    source: list          # A; index of the token whose hidden state predicts `target`
    target: list          # A
    target_branch: list   # A; 1..N
    ends: list            # N; index of each branch's last token
    image: str = None     # path
    cut: int = 0          # answer tokens lost to max_length


def pack(sequences, num_patches, max_length, image=None):
    """[(ids, labels), ...] that begin alike → Row. The prefix is what all of them share, up to the first supervised token.

    Prompts are never cut: one that does not fit raises InputError. An answer that does not fit is cut at its end.
    """
    sequences = [expand(ids, labels, num_patches, image) for ids, labels in sequences]
    prompts = [next((t for t, label in enumerate(labels) if label != IGNORE), len(ids)) for ids, labels in sequences]
    first, limit = sequences[0][0], min(min(len(ids) - 1, prompt) for (ids, _), prompt in zip(sequences, prompts))
    prefix = next((t for t in range(limit) if any(ids[t] != first[t] for ids, _ in sequences)), limit)
    row = Row(first[:prefix], list(range(prefix)), [0] * prefix, [], [], [], [], image)
    for number, ((ids, labels), prompt) in enumerate(zip(sequences, prompts), start=1):
        if prompt + (prompt < len(ids)) > max_length or IMAGE_ID in ids[max_length:]:
            raise InputError(f"a prompt of {prompt} tokens does not fit into {max_length} (image {image}); prompts are never cut: "
                             "shorten the question or name a model with a longer context")
        row.cut += max(0, len(ids) - max_length)
        start, end = len(row.input_ids) - prefix, min(len(ids), max_length)      # token t of the sequence stands at start + t
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


def expand(ids, labels, num_patches, image):
    """Ids and labels with the image's mark repeated once per patch."""
    marks = ids.count(IMAGE_ID)
    if marks != (image is not None):
        raise InputError(f"{IMAGE} stands {marks} times in a text with {'one image (' + image + ')' if image else 'no image'}; it is "
                         "the mark of the image's place and cannot be part of a question")
    if not marks:
        return ids, labels
    at = ids.index(IMAGE_ID)
    return (ids[:at] + [IMAGE_ID] * num_patches + ids[at + 1:], labels[:at] + [IGNORE] * num_patches + labels[at + 1:])


@dataclass
class Batch:
    """Rows as padded tensors. Padding: branch -1, target IGNORE, target_branch 0, ends -1. N distinct images."""
    input_ids: torch.Tensor = None        # (B, T)
    position: torch.Tensor = None         # (B, T)
    branch: torch.Tensor = None           # (B, T)
    source: torch.Tensor = None           # (B, A)
    target: torch.Tensor = None           # (B, A)
    target_branch: torch.Tensor = None    # (B, A)
    ends: torch.Tensor = None             # (B, number of branches)
    image_index: torch.Tensor = None      # (B,) which image a row has; -1 = none
    pixel_values: torch.Tensor = None     # (N, 3, S, S)
    hidden: torch.Tensor = None           # instead of input_ids and pixel_values, what a frozen trunk makes of
    features: torch.Tensor = None         # them (features.py): (B, A, hidden) and (N, P, C)

    def pin_memory(self):
        """In memory that a GPU can fetch by itself; DataLoader calls this."""
        return Batch(**{f.name: None if (x := getattr(self, f.name)) is None else x.pin_memory() for f in fields(self)})

    def to(self, device, dtype=None):
        """On a device; floating point tensors also in `dtype`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: None if x is None else x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
                        for name, x in moved.items()})


PADDING = {"input_ids": PAD, "position": 0, "branch": PAD_BRANCH, "source": 0, "target": IGNORE, "target_branch": 0, "ends": -1}


def pad(rows, value, multiple=1):
    """Lists of different lengths → (B, longest) int64, filled with `value` on the right; up to a multiple in width."""
    out = np.full((len(rows), -(-max(map(len, rows)) // multiple) * multiple), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return torch.from_numpy(out)


def collate(rows, preprocess, always_image=False):
    """Rows → Batch; every distinct image is opened and preprocessed once.

    `always_image`: where no row has an image, the batch has one that no row looks at, all zeros. Under ZeRO-3 all processes
    gather the tower's weights together, so each of them must run the tower in every step.
    """
    images = list(dict.fromkeys(row.image for row in rows if row.image))
    # 8: attention with a mask is far slower at other widths.
    tensors = {name: pad([getattr(row, name) for row in rows], value, 8 if name in ("input_ids", "position", "branch") else 1)
               for name, value in PADDING.items()}
    index = torch.tensor([images.index(row.image) if row.image else -1 for row in rows])
    with ThreadPoolExecutor(4) as pool:                     # PIL lets go of Python's lock while it decodes
        pixels = torch.stack(list(pool.map(preprocess, images))) if images else None
    if always_image and pixels is None:
        pixels = torch.zeros(1, 3, preprocess.size, preprocess.size)
    return Batch(**tensors, image_index=index, pixel_values=pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Images

UNREADABLE = OSError, SyntaxError, ValueError, Image.DecompressionBombError     # what PIL raises for bad files
IMAGES_OPENED = 20_000      # check_images opens so many, a matter of seconds


@dataclass
class ImageProcessor:
    """CLIP's preprocessing of one image, behind LLaVA's padding. Path (or PIL image) → (3, size, size) fp32."""
    size: int = 336
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    pad: bool = True        # LLaVA's image_aspect_ratio "pad"; else the middle is cut out

    def __call__(self, image):
        if not isinstance(image, Image.Image):
            try:
                with Image.open(image) as file:
                    image = file.convert("RGB")
            except UNREADABLE as e:
                raise InputError(f"{image}: not readable as an image ({e}); download it again")
        if self.pad and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        short = min(image.size)
        if short != self.size:
            image = image.resize([int(self.size * edge / short) for edge in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)                                # (S, S, 3)
        return torch.from_numpy((pixels - np.float32(self.mean)) / np.float32(self.std)).permute(2, 0, 1)


def check_images(paths):
    """Raises InputError with the count and the first ten images that are absent, not images, or cut short."""
    def broken(path):
        try:
            with Image.open(path) as file:
                file.draft("RGB", (1, 1))       # JPEG: decode at an eighth of the size
                file.load()
        except UNREADABLE:
            return path

    def absent(path):
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return None if name in listings[folder] else path

    paths, listings = list(dict.fromkeys(paths)), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # To open one takes milliseconds, so that of very many we only see that they are there, and that in whole folders.
        results = pool.map(broken, paths) if len(paths) <= IMAGES_OPENED else map(absent, paths)
        bad = [path for path in progress(results, "checking images", len(paths), unit="image") if path]
    if bad:
        raise InputError(f"{len(bad)} image{'s' * (len(bad) > 1)} missing or unreadable: {', '.join(bad[:10])}"
                         f"{' …' if len(bad) > 10 else ''}; check the path, or download again")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


class PackedDataset(torch.utils.data.Dataset):
    """Examples, made into rows when asked for: `dataset[[3, 7]]` is the Batch of examples 3 and 7."""

    def __init__(self, examples, tokenizer, preprocess, num_patches, max_length, system=SYSTEM, always_image=False):
        self.examples, self.tokenizer, self.preprocess, self.system = examples, tokenizer, preprocess, system
        self.num_patches, self.max_length, self.always_image = num_patches, max_length, always_image

    def __len__(self):
        return len(self.examples)

    def row(self, i):
        example = self.examples[i]
        try:
            sequences = [encode_conversation(self.tokenizer, c, self.system) for c in example.conversations]
            return pack(sequences, self.num_patches, self.max_length, example.image)
        except InputError as e:
            raise InputError(f"example {i} of the data: {e}")

    def lengths(self):
        """About how many tokens each row has, negative without an image, (n,)."""
        return row_lengths(self.examples, self.num_patches)

    def cut_rows(self):
        """How many rows lose the end of an answer to `max_length`; InputError where a prompt does not fit. Before long work
        begins: the longest rows are made, until a hundred of them have fitted one after the other."""
        cut, fitted = 0, 0
        for i in progress(np.argsort(-np.abs(self.lengths()), kind="stable").tolist(), "longest rows", unit="row"):
            whole = self.row(i).cut == 0
            cut, fitted = cut + (not whole), fitted + 1 if whole else 0
            if fitted == 100:
                break
        return cut

    def __getitem__(self, indices):
        return collate([self.row(i) for i in indices], self.preprocess, self.always_image)


def batches_ahead(dataset, batches, num_workers):
    """The dataset's Batches of lists of indices, in order; worker processes prepare them while the caller computes."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=batches, num_workers=num_workers, collate_fn=as_is,
                                       worker_init_fn=leave_signals_alone, pin_memory=torch.cuda.is_available(),
                                       prefetch_factor=4 if num_workers else None)


def as_is(batch):
    return batch


def leave_signals_alone(worker):
    """Ctrl-C reaches every process of a terminal; who finishes a step first (resume.py) still needs its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def spare_cores():
    """How many worker processes prepare batches by default: with a GPU to wait for them up to 8, else none."""
    return min(8, os.cpu_count() - 1) if torch.cuda.is_available() else 0


class ResumableSampler(torch.utils.data.Sampler):
    """Micro batches of one rank: a permutation per epoch from (seed, epoch), cut into global batches.

    The examples of a global batch depend on neither the number of processes nor the micro batch size. The stream runs
    over the ends of epochs, so no example is dropped and every batch is full. `start` = optimizer steps already done.

    With `lengths` (readers.row_lengths) a global batch is sorted before it is cut: micro batches then hold rows of one
    modality and of similar length, and those that run at the same time on several ranks cost the same. The loss is a mean
    over the global batch, so this changes it by rounding only. (LLaVA's `group_by_modality_length` does it with whole
    batches, each of one modality; here the batches stay random.)
    """

    def __init__(self, num_examples, steps, global_batch, micro_batch, rank, world_size, seed, start=0, lengths=None):
        self.num_examples, self.steps, self.start, self.seed, self.lengths = num_examples, steps, start, seed, lengths
        self.global_batch, self.micro_batch, self.rank, self.world_size = global_batch, micro_batch, rank, world_size
        self.epoch, self.order = None, None

    def __len__(self):
        return (self.steps - self.start) * self.global_batch // (self.micro_batch * self.world_size)

    def examples(self, step):
        """Examples of one optimizer step in the order in which they are cut into micro batches, (global_batch,)."""
        stream, batch = np.arange(step * self.global_batch, (step + 1) * self.global_batch), []
        for epoch in np.unique(stream // self.num_examples):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
            batch.append(self.order[stream[stream // self.num_examples == epoch] % self.num_examples])
        batch = np.concatenate(batch)
        return batch if self.lengths is None else batch[np.argsort(self.lengths[batch], kind="stable")]

    def __iter__(self):
        for step in range(self.start, self.steps):
            micro_batches = self.examples(step).reshape(-1, self.world_size, self.micro_batch)
            yield from micro_batches[:, self.rank].tolist()
