"""Make preference pairs from what a model itself says about images.

    python -m tools.mine tiny/base --output desc_data.json          # the tiny world needs no more
    python -m tools.mine out/stage2 --output second.json            # a second round
    python -m tools.mine CKPT --images COCO/train2014 --annotations COCO/annotations \\
        --output mined.json                                         # COCO, or a detector's list
    torchrun --nproc_per_node 8 -m tools.mine CKPT …                # images split over processes

CKPT is a base, a trained checkpoint or a LoRA adapter. What is made depends on what is known about
the images:

Sentences (the tiny world). The model describes each image greedily. Where it names an object that
is not there, the pair is what it said, and the same up to the first wrong object and then what is
there (tiny/preferences.py). This is HA-DPO's desc_data.json.

Objects (COCO's annotations, or a list of the same form). The model draws several continuations of
its description, a sentence each. One that names only what is there and one with a wrong object are
a pair. The description goes on behind the right one, so what stands before a pair is right so far.
This is SENTINEL's form: {image: [{"question", "context", "y_win", "y_lose"}]}. train.py takes it as
--preference_data. If an image's draws hold no pair, the image is left out.

Follows SENTINEL (arXiv 2507.12455). Deliberately different: what is there comes from a file, and
not from two detectors that must agree; a step gives one pair at most. An object that annotators
left out counts as wrong here, so name captions_*.json, too.

What is mined is on disk as soon as it is there: the same command goes on after an interruption.
"""
import argparse
import os
import random
from dataclasses import dataclass, field

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import torch

from checkpoints.load import Source, checkpoint_type, load_one, weights_of
from data import DESCRIBE, EOS
from evals.chair import choose_images
from evals.objects import annotation_files, read_annotations, read_words
from evals.sampling import Conversation, Sampling, next_token
from support.command_line import Parser, first_process
from support.common import (
    InputError,
    Number,
    device_and_dtype,
    progress,
    read_json,
    run_program,
    say,
    write_json,
)
from support.images import check_images
from support.outputs import Journal, check_output_file, digest, gathered
from support.processes import end_processes, place, start_processes
from tiny.places import world_beside
from tiny.preferences import Pairs, ask_base, by_question, description_pairs

IMAGES = 5000           # are drawn where the user names no number


# ---- Sentences -----------------------------------------------------------------------------------


@dataclass
class Sentence:
    """A continuation of a description."""
    ids: list
    text: str
    ended: bool = False         # the description ends behind it


@torch.inference_mode()
def continuations(conversation, count, ends, sampling, generator):
    """Draw `count` next sentences of what was said, each up to a character in `ends` → [Sentence].

    Each is a branch of the conversation's row, and all read a token each per step. The conversation
    stays as it was. What `max_new_tokens` cuts off is left out, and so is an empty sentence.
    """
    start, tokenizer = len(conversation.ids), conversation.tokenizer
    limit = min(sampling.max_new_tokens, conversation.trunk.config.max_length - start)
    drawn, going = [[] for _ in range(count)], list(range(count))
    logits = conversation.read_on().expand(count, -1)                           # (count, vocab)
    for length in range(1, limit + 1):
        said = torch.tensor([conversation.ids + drawn[n] for n in going], device=logits.device)
        for n, token in zip(going, next_token(logits, said, sampling, generator), strict=True):
            drawn[n].append(int(token))
        going = [n for n in going if not is_whole(drawn[n], tokenizer, ends)]
        if not going or length == limit:
            break
        newest, branch = [drawn[n][-1] for n in going], [n + 1 for n in going]
        position = [start + length - 1] * len(going)
        logits = conversation.read(newest, position, branch, wanted=len(going))  # (going, vocab)
    conversation.forget(start)
    whole = [Sentence([token for token in ids if token != EOS], tokenizer.decode(ids).strip(),
                      ids[-1] == EOS)
             for n, ids in enumerate(drawn) if n not in going]
    return [sentence for sentence in whole if sentence.text]


def is_whole(ids, tokenizer, ends):
    return ids[-1] == EOS or tokenizer.decode(ids).rstrip().endswith(tuple(ends))


def sort_out(sentences, context, shown, words):
    """Which sentences name only what is there, which something else, which nothing → three lists.

    Right ones that name something new, which `context` does not, come first.
    """
    before = {mention.name for mention in words.mentions(context)}
    right, wrong, other = [], [], []
    for sentence in sentences:
        named = {mention.name for mention in words.mentions(sentence.text)}
        kind = wrong if named - shown else right if named else other
        kind.append((bool(named <= before), sentence))
    return [[sentence for _, sentence in sorted(kind, key=lambda pair: pair[0])]
            for kind in (right, wrong, other)]


def pairs_of(draw, shown, words, most):
    """The pairs of one image → [{"context", "y_win", "y_lose"}].

    `draw(before)`: several next sentences behind the Sentences `before`, none when the description
    is over. `most`: so many sentences at most.
    """
    before, rows = [], []
    while len(before) < most:
        sentences = draw(before)
        context = " ".join(sentence.text for sentence in before)
        right, wrong, other = sort_out(sentences, context, shown, words)
        if right and wrong:
            rows.append({"context": context, "y_win": right[0].text, "y_lose": wrong[0].text})
        further = [sentence for sentence in right + other if not sentence.ended]
        if not further:
            break
        before.append(further[0])
    return rows


# ---- Where objects are known ---------------------------------------------------------------------


@dataclass
class Drawing:
    """How sentences are drawn. The field's names are those of the flags."""
    samples: int = 5
    temperature: float = 0.7
    top_p: float = 1.0
    max_sentences: int = 8
    max_new_tokens: int = 80
    ends: str = ".!?"
    prompt: str = None              # None: one of HA-DPO's four
    seed: int = 0
    sampling: Sampling = field(init=False, repr=False)

    def __post_init__(self):
        self.sampling = Sampling(self.temperature, self.top_p, max_new_tokens=self.max_new_tokens)

    def told(self):
        return {name: value for name, value in vars(self).items() if name != "sampling"}


def mine_image(model, path, shown, words, drawing):
    """The pairs about one image. They do not depend on which images came before."""
    own = random.Random(f"{drawing.seed} {os.path.basename(path)}")
    question = drawing.prompt or own.choice(DESCRIBE)
    conversation = Conversation(model, model.head, path)
    conversation.ids += conversation.turn(question)
    asked = len(conversation.ids)
    generator = torch.Generator(conversation.seen.position.device)
    generator.manual_seed(own.getrandbits(32))

    def draw(before):
        so_far = [token for sentence in before for token in sentence.ids]
        conversation.ids += so_far[len(conversation.ids) - asked:]
        sentences = continuations(conversation, drawing.samples, drawing.ends, drawing.sampling,
                                  generator)
        # Most draws say nothing more: the description is over.
        return sentences if 2 * len(sentences) > drawing.samples else []

    return [{"question": question} | row
            for row in pairs_of(draw, shown, words, drawing.max_sentences)]


def mine_objects(args):
    """Pairs of SENTINEL's form; {image: [row, ...]} on rank 0."""
    folder = args.images if args.images and os.path.isdir(args.images) else args.image_folder
    if not folder:
        raise InputError("--images is missing: name the folder of the images that --annotations "
                         "tell about")
    args.images = None if folder == args.images else args.images
    words = read_words(*([args.synonyms] if args.synonyms else []))
    files = annotation_files(args.annotations, folder)
    say(f"what the images show: {', '.join(files)}")
    shown, drawing = read_annotations(files, words), drawing_of(args)
    args.num_images = args.num_images or IMAGES
    images = choose_images(args, shown, folder)
    check_images([os.path.join(folder, image) for image in images])
    start_processes()
    model, name = load(args)

    # Each process mines its share. The journal keeps the pairs of an image from when it is done.
    rank, world_size = place()
    truth = [[image, sorted(shown[image])] for image in images]
    asked = who(model, args) | {"drawing": drawing.told(), "truth": digest(truth)}
    journal = Journal(os.path.dirname(args.output) or ".", asked, rank)
    known = {row["image"]: row["pairs"] for rows in gathered(journal.read()) for row in rows}
    if known:
        say(f"going on: {len(known)} of {len(images)} images are there already")
    say(f"{len(images)} images, described by {name}: {drawing.samples} draws a sentence, "
        f"temperature {drawing.temperature:g}, at most {drawing.max_sentences} sentences")
    rest = [image for image in images if image not in known][rank::world_size]
    with journal.kept_on_interrupt(len(images), "images"):
        for image in progress(rest, "mining", unit="image"):
            path = os.path.join(folder, image)
            known[image] = mine_image(model, path, shown[image], words, drawing)
            journal.add({"image": image, "pairs": known[image]})
    known = {image: rows for share in gathered(known) for image, rows in share.items()}
    return {image: known[image] for image in images if known[image]}, len(images), journal


def drawing_of(args):
    drawing = Drawing(*(getattr(args, name) for name in Drawing.__match_args__))
    if drawing.temperature == 0 or drawing.samples < 2:
        raise InputError(f"--temperature {drawing.temperature:g}, --samples {drawing.samples}: "
                         "then all draws say the same; a temperature above 0 and two samples are "
                         "needed")
    if not drawing.ends:
        raise InputError("--ends '': names no character that ends a sentence")
    return drawing


# ---- Where sentences are known -------------------------------------------------------------------


def mine_sentences(args):
    """HA-DPO's desc_data.json of the tiny world beside a checkpoint."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("torchrun: the tiny world is mined by one process; start python")
    world, _ = world_beside(args.checkpoint)
    path = os.path.join(world, "preference.json")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, so nothing is known about images; name them with "
                         "--images and what they show with --annotations")
    notes = read_json(path, list)[:args.num_images]
    asked = [[note["describe"]] for note in notes]
    args.bf16 = bool(args.bf16)             # as the pairs of a run without files are made
    model, name = load(args)
    say(f"{len(notes)} images, described by {name}: greedy")
    texts = ask_base(model, world, notes, asked, who(model, args) | {"questions": digest(asked)})
    said = by_question(notes, asked, texts)
    return description_pairs(notes, said, Pairs()), len(notes), None


# ---- The program ---------------------------------------------------------------------------------


def load(args):
    """A Llava whose only head is the one that is asked, and that head's name."""
    device, dtype = device_and_dtype(args.bf16)
    source = Source([args.checkpoint], args.model_name_or_path, args.vision_tower)
    model = load_one(source, device, dtype)
    return model, next(iter(model.heads))


def who(model, args):
    """Who is asked, as a journal knows it again."""
    is_base = checkpoint_type(args.checkpoint) == "base"
    return {"base": model.fingerprint, "trained": {} if is_base else weights_of(args.checkpoint),
            "dtype": str(next(model.trunk.parameters()).dtype)}


def parser():
    parser = Parser(__doc__)
    add, usual = parser.add_argument, Drawing()
    add("checkpoint", metavar="CKPT", help="a base, a trained checkpoint or a LoRA adapter")
    add("--output", required=True, metavar="JSON", help="the file of pairs; must not exist yet")
    add("--images", help="the folder of the images; or a list of some of those in --image_folder")
    add("--image_folder", help="where the images of the list lie")
    add("--annotations", nargs="+", metavar="JSON",
        help="COCO's instances_*.json, and captions_*.json, or their folder; default: what the "
        "tiny world beside CKPT knows")
    add("--synonyms", help="classes and their synonyms; default: our list of COCO's 80 classes")
    add("--num_images", type=Number("--num_images", int, above=0),
        help=f"so many images; default: {IMAGES:,}, in the tiny world all")
    add("--samples", type=Number("--samples", int, above=0), default=usual.samples,
        help="draws for each sentence")
    add("--temperature", type=Number("--temperature", float), default=usual.temperature,
        help="of the draws")
    add("--top_p", type=Number("--top_p", float), default=usual.top_p,
        help="draw among the likeliest, as many as have this probability")
    add("--max_sentences", type=Number("--max_sentences", int, above=0),
        default=usual.max_sentences, help="of a description")
    add("--max_new_tokens", type=Number("--max_new_tokens", int, above=0),
        default=usual.max_new_tokens, help="of a sentence")
    add("--ends", metavar="TEXT", default=usual.ends, help="characters that end a sentence")
    add("--prompt", metavar="TEXT", help="what is asked; default: one of HA-DPO's four prompts")
    add("--seed", type=Number("--seed", int, low=0), default=usual.seed, help="of all draws")
    add("--model_name_or_path", help="the base, where it is not the one that CKPT names")
    add("--vision_tower", help="CLIP's folder, where base or CKPT name another")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16, or fp32; default: bf16 on a GPU, fp32 on a CPU")
    return parser


def main():
    args = parser().parse_args()
    if os.path.lexists(args.output):
        raise InputError(f"--output {args.output}: exists already; name a new file")
    check_output_file(args.output, "--output")
    if not args.annotations and (args.images or args.image_folder or args.synonyms):
        raise InputError("--annotations is missing: what these images show is not known")
    mined, described, journal = (mine_objects if args.annotations else mine_sentences)(args)
    if first_process():
        if not mined:
            raise InputError(f"{args.checkpoint}: no pair in the descriptions of {described:,} "
                             "images; name more images, or raise --temperature or --samples")
        write_json(args.output, mined)
        if journal:
            journal.remove()
        pairs = sum(len(rows) if journal else 1 for rows in mined.values())
        print(f"{pairs:,} pairs about {len(mined):,} of {described:,} images: {args.output}")
    end_processes()


if __name__ == "__main__":
    run_program(main)
