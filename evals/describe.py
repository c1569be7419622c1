"""Descriptions of images by a base and its checkpoints: asked for, or read from a file.

    flags(parser, Asking())                     # the flags of a program that asks for descriptions
    said = describe(args, images, folder, output)     # Descriptions, None but on rank 0
    said.texts["base"]["a.jpg"]                       # what the base says of a.jpg
    texts = read_texts("answers.jsonl", known_as(images))             # {image: text}

All models are asked in one pass over the images (eval_pope.py's `ask`), and what was said is on
disk as soon as it is there: after an interruption the same command asks only the rest. With
`--num_beams` above 1 each image is answered by a beam search (sampling.py), one after the other.
"""
import argparse
import os
import re
from dataclasses import dataclass

import torch

from checkpoints.load import Source, load_all, trained_folders
from checkpoints.quantised import BITS, BITS_HELP
from data import DESCRIBE, IMAGE, Example, PackedDataset
from eval_pope import Protocol, ask, identity
from evals.sampling import Conversation, Sampling
from model import answer
from support.common import (
    InputError,
    Number,
    check_text,
    device_and_dtype,
    field,
    id_text,
    progress,
    read_json,
    say,
)
from support.images import check_images
from support.outputs import Journal, check_output_folder, write_value
from support.questions import read_list
from support.templates import SYSTEM, SYSTEM_HADPO_EVAL
from training.compressed import COMPRESSED_HELP, without_images
from training.guards import long_rows

SYSTEMS = {"llava": SYSTEM, "hadpo": SYSTEM_HADPO_EVAL}


@dataclass(frozen=True)
class Asking:
    """How descriptions are asked for. The field's names are those of the flags."""
    prompt: str = DESCRIBE[0]
    system_prompt: str = "llava"        # a name in SYSTEMS
    num_beams: int = 1
    max_new_tokens: int = 512

    def told(self):
        """One line about it, to be printed with every number that rests on it."""
        how = f"{self.num_beams} beams" if self.num_beams > 1 else "greedy"
        return (f"prompt {self.prompt!r}, system prompt {self.system_prompt}, {how}, at most "
                f"{self.max_new_tokens} new tokens")


@dataclass
class Descriptions:
    """What was said, by whom, and how it was asked for."""
    texts: dict                 # {model: {image: text}}
    told: str                   # how it was asked for, in a line
    checkpoints: dict           # {model: folder}; the base is not among them
    journal: Journal = None     # to be removed when nothing more is made of the texts


def flags(parser, usual):
    """Add the flags of a program that asks for descriptions. `usual`: Asking, their defaults."""
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT",
        help="trained checkpoints of one base, or a base; other folders are left out")
    add("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    add("--vision_tower", help="CLIP's folder, where base or checkpoint name another")
    add("--prompt", metavar="TEXT", default=usual.prompt, help="what is asked")
    add("--system_prompt", choices=SYSTEMS, default=usual.system_prompt,
        help="LLaVA's, or the one that HA-DPO evaluates with")
    add("--num_beams", type=Number("--num_beams", int, above=0), default=usual.num_beams,
        help="beams of the search; 1 is greedy decoding")
    add("--max_new_tokens", type=Number("--max_new_tokens", int, above=0),
        default=usual.max_new_tokens, help="a description's length at most")
    add("--batch_size", type=Number("--batch_size", int, above=0),
        help="images at once, where it is greedy; default: what fits")
    add("--compressed", metavar="FOLDER", help=COMPRESSED_HELP)
    add("--bits", type=int, choices=BITS, help=BITS_HELP)
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16, or fp32; default: bf16 on a GPU, fp32 on a CPU")
    add("--score", nargs="+", metavar="FILE", help="texts that exist already: no model is loaded")


def describe(args, images, folder, output):
    """Ask base and checkpoints for descriptions of `images` (names in `folder`) → Descriptions.

    None but on rank 0. `args`: what `flags` declares. What is being said is kept in `output`.
    """
    check_output_folder(output, "--output_dir")
    if args.compressed:
        check_output_folder(args.compressed, "--compressed")
    if args.compressed and args.num_beams > 1:
        raise InputError(f"--compressed {args.compressed}: a beam search (--num_beams "
                         f"{args.num_beams}) asks with the image; leave one of them out")
    check_images([os.path.join(folder, image) for image in images])
    rank = int(os.environ.get("RANK", 0))
    device, dtype = device_and_dtype(args.bf16)
    source = Source(args.checkpoints, args.model_name_or_path, args.vision_tower, args.bits)
    model = load_all(source, device, dtype)
    limit = min(args.max_new_tokens, model.config.text.max_position_embeddings)
    asking = Asking(args.prompt, args.system_prompt, args.num_beams, limit)
    models = f"{len(model.heads)} model{'s' * (len(model.heads) > 1)}"
    say(f"{len(images)} images, {models}, {asking.told()}")

    # A row per image, with one branch. The journal keeps the texts from the moment they are there.
    conversations = [[(f"{IMAGE}\n{asking.prompt}", None)]]
    examples = [Example(os.path.join(folder, image), conversations) for image in images]
    dataset = PackedDataset(examples, model.row_format(SYSTEMS[asking.system_prompt]))
    long_rows(dataset)
    if args.compressed:
        dataset = without_images(args.compressed, dataset, model)
    prompts = {image: [asking.prompt] for image in images}, dataset
    protocol = Protocol(SYSTEMS[asking.system_prompt], "", limit)
    asked = identity(model, args.checkpoints, prompts, protocol, limit)
    journal = Journal(output, asked | {"num_beams": asking.num_beams}, rank)
    decode = answer if asking.num_beams == 1 else with_beams(asking.num_beams)
    with journal.kept_on_interrupt(len(images), "images"):
        answers = ask(model, prompts, limit, args.batch_size, journal, decode)
    if rank:
        return None
    texts = {name: {image: text.strip() for (image, _), (text, _) in said.items()}
             for name, said in answers.items()}
    folders = trained_folders(texts, args.checkpoints)
    return Descriptions(texts, asking.told(), folders, journal)


def with_beams(num_beams):
    """What answers by beam search, in the form of model.py's `answer`; it has no first logits."""
    def search(model, dataset, max_new_tokens, batch_size, indices, words):
        sampling = Sampling(num_beams=num_beams, max_new_tokens=max_new_tokens)
        system = dataset.format.template.system
        for i in progress(indices, "asking", unit="image"):
            example, said = dataset.examples[i], []
            question = example.conversations[0][0][0].removeprefix(f"{IMAGE}\n")
            for head in model.heads.values():
                conversation = Conversation(model, head, example.image, system)
                ids = list(conversation.answer(question, sampling))
                said.append(([model.tokenizer.decode(ids)], torch.zeros(1, len(words))))
            yield i, said

    return search


# ---- Lists of images, and texts that exist -------------------------------------------------------


def known_as(images):
    """What an image may be called in a file → {name, name without folder, or number: image}."""
    known = {}
    for image in images:
        stem = os.path.splitext(os.path.basename(image))[0]
        number = re.search(r"\d+$", stem)
        if number:
            known[id_text(number[0])] = image
    return known | {os.path.basename(image): image for image in images} | {i: i for i in images}


def find(name, known, place):
    """The image that a file means by a name or a number. InputError if there is none."""
    found = known.get(name) or known.get(id_text(name))
    if found is None:
        raise InputError(f"{place}: image {name!r} is none of the {len(set(known.values())):,} "
                         "images whose truth is known; mend or remove it")
    return found


def read_images(path, known):
    """A list of images, without repeats.

    The file holds a name or a number a line, or JSON rows with one under `image` or `image_id`, as
    POPE's questions and our answers do.
    """
    check_text(path)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    if text.lstrip()[:1] in ("[", "{"):
        names = [image_of(row, path, n) for n, row in enumerate(read_list(path))]
    else:
        names = text.split()
    if not names:
        raise InputError(f"{path}: names no image")
    return list(dict.fromkeys(find(name, known, f"{path}, row {n}")
                              for n, name in enumerate(names)))


def image_of(row, path, n):
    """The name or number of the image that a row is about."""
    if isinstance(row, (str, int)):
        return row
    key = "image" if isinstance(row, dict) and row.get("image") is not None else "image_id"
    return field(row, key, (str, int), path, n)


def read_texts(path, known):
    """Texts that exist already → {image: text}.

    The file holds rows with `image` or `image_id`, and `answer`, `caption` or `text`; or one JSON
    object {image: text}, HA-DPO's form.
    """
    rows = whole_object(path) or read_list(path)
    texts = {}
    for n, row in enumerate(rows):
        image = find(image_of(row, path, n), known, f"{path}, row {n}")
        key = next((key for key in ("caption", "text") if key in row), "answer")
        text = field(row, key, str, path, n)
        if texts.setdefault(image, text) != text:
            raise InputError(f"{path}, row {n}: {image} was described otherwise in a row before; "
                             "remove one of them")
    return texts


def whole_object(path):
    """The rows of a file that is one object {image: text}; None of any other file."""
    check_text(path)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if not file.read(200).lstrip().startswith("{"):
            return None
    try:
        value = read_json(path)
    except InputError:
        return None                                 # an object a line
    if not isinstance(value, dict) or "image" in value or "image_id" in value:
        return None
    return [{"image_id": image, "answer": text} for image, text in value.items()]


def existing(paths, known, images=None):
    """The texts of files → Descriptions of `images`, default all that the files describe."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    texts = {name: read_texts(path, known) for name, path in zip(names, paths, strict=True)}
    first = texts[names[0]].keys()
    for name, path in zip(names, paths, strict=True):
        if texts[name].keys() != first:
            odd = sorted(texts[name].keys() ^ first)
            raise InputError(f"{path}: {len(odd)} images are described here or in {paths[0]}, but "
                             f"not in both, e.g. {odd[0]}; side by side stand only texts about the "
                             "same images")
    lost = [image for image in images or () if image not in first]
    if lost:
        raise InputError(f"{paths[0]}: {len(lost)} of {len(images)} images are not described, e.g. "
                         f"{lost[0]}; shorten the list of images, or describe them")
    if images:
        texts = {name: {image: said[image] for image in images} for name, said in texts.items()}
    return Descriptions(texts, f"texts of {', '.join(paths)}", {})


# ---- What is written -----------------------------------------------------------------------------


def write_metrics(folder, said, values):
    """metrics.json of a judgement: how it was asked, of whom, and the numbers."""
    values = {"asked": said.told, "checkpoints": said.checkpoints, **values}
    write_value(os.path.join(folder, "metrics.json"), values)
