"""CHAIR: how many of the objects that a description names are not in the image?

    python -m evals.chair tiny/base                       # the tiny base that comes with the code
    python -m evals.chair out/stage2                      # what train.py has made
    python -m evals.chair CKPT --coco_path COCO --annotations COCO/annotations
    python -m evals.chair CKPT --coco_path COCO --annotations COCO/annotations --images list.txt
    python -m evals.chair --score answers.jsonl --annotations instances_val2014.json
    torchrun --nproc_per_node 2 -m evals.chair CKPT       # images split over processes, same table

Asks the base and every checkpoint to describe the images, and prints a table:

    CHAIR_i   objects named that are not in the image, percent of all objects named
    CHAIR_s   descriptions that name such an object, percent
    recall    objects of the images that their descriptions name, percent
    words     per description
    named     objects named, in all descriptions
    images    described

An object counts as often as a text names it; for recall, once. A lower CHAIR means less only beside
the recall: a model that says little invents little. The numbers move by points with prompt, length
and decoding, so these are printed above the table and written beside it. All descriptions, with the
places of the objects, and `metrics.json` are written to CKPT/chair (tools/report.py shows them),
and such a file is a list of images itself: `--images CKPT/chair/base.jsonl` asks about the same.

Follows CHAIR (arXiv 1809.02156): what COCO's annotators marked is there, and what the captions name
(objects.py). Without a list of images, 500 are drawn, as is usual.
"""
import os
import random
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared

from checkpoints.load import checkpoints_among
from evals.describe import (
    Asking,
    describe,
    existing,
    flags,
    known_as,
    read_images,
    write_metrics,
)
from evals.objects import annotation_files, list_of_words, read_annotations, read_words
from support.command_line import Parser
from support.common import InputError, Number, check_file, read_json, run_program, say
from support.folders import check_can_write
from support.outputs import check_output_folder, write_rows
from support.processes import end_processes, start_processes
from support.questions import find_images
from tiny.pictures import NAMES
from tiny.places import shipped_base, world_beside

COLUMNS = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "words": "words",
           "named": "named", "images": "images"}


# ---- Counting ------------------------------------------------------------------------------------


@dataclass
class Judged:
    """A description, and the objects that it names."""
    text: str
    mentions: list           # objects.py's Mention
    shown: set               # the classes that the image shows

    def wrong(self):
        return [mention for mention in self.mentions if mention.name not in self.shown]


def judge(texts, shown, words):
    """{image: text} → {image: Judged}."""
    return {image: Judged(text, words.mentions(text), shown[image])
            for image, text in texts.items()}


def measure(judged):
    """CHAIR's numbers of {image: Judged}: percent, words per description, and counts."""
    rows = list(judged.values())
    named = sum(len(row.mentions) for row in rows)
    wrong = sum(len(row.wrong()) for row in rows)
    objects = sum(len(row.shown) for row in rows)
    found = sum(len({m.name for m in row.mentions} & row.shown) for row in rows)
    return {"chair_i": 100 * wrong / max(1, named),
            "chair_s": 100 * sum(bool(row.wrong()) for row in rows) / max(1, len(rows)),
            "recall": 100 * found / max(1, objects),
            "words": sum(len(row.text.split()) for row in rows) / max(1, len(rows)),
            "named": named, "images": len(rows)}


def table(metrics):
    """{model: numbers} → Markdown."""
    lines = [f"| model | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in metrics.items():
        cells = [f"{row[c]}" if isinstance(row[c], int) else f"{row[c]:.2f}" for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- The truth -----------------------------------------------------------------------------------


def truth_of(args, world, folder):
    """What the images show → {image: set of classes}, and the Words to find them in texts.

    COCO's annotations where they are named; else the tiny world's, whose classes are words.
    """
    if args.annotations:
        words = read_words(*([args.synonyms] if args.synonyms else []))
        files = annotation_files(args.annotations, folder)
        say(f"what the images show: {', '.join(files)}")
        return read_annotations(files, words), words
    if args.synonyms:
        raise InputError(f"--synonyms {args.synonyms}: is for COCO's annotations, and none are "
                         "named; name them with --annotations")
    path = os.path.join(world, "world.json")
    if args.coco_path and not os.path.isfile(path):
        raise InputError(f"--coco_path {args.coco_path}: what these images show is not known; name "
                         "COCO's annotations with --annotations")
    value = read_json(path, dict)
    try:
        shown = {image: set(facts["objects"]) for split in ("validation", "evaluation")
                 for image, facts in value[split].items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: does not tell what the images show ({e!r}); remove {world}, and "
                         "it is drawn again") from e
    return shown, list_of_words(NAMES)


def choose_images(args, shown, folder):
    """The images to describe: those of a list, or so many drawn of those that are there."""
    if args.images:
        return read_images(args.images, known_as(shown))
    there = [image for image in sorted(shown) if os.path.isfile(os.path.join(folder, image))]
    if not there:
        raise InputError(f"{folder}: holds none of the {len(shown):,} images whose truth is known; "
                         "name the right folder, or their annotations with --annotations")
    if len(there) <= args.num_images:
        return there
    return sorted(random.Random(args.seed).sample(there, args.num_images))


# ---- One evaluation ------------------------------------------------------------------------------


def evaluate(args):
    """Describe, judge, print the table, write the files. On rank 0 → {model: {image: Judged}}."""
    if not args.checkpoints and not args.score:
        raise InputError("name a checkpoint to ask, or texts that exist: --score answers.jsonl")
    if args.checkpoints and args.score:
        raise InputError(f"--score {args.score[0]}: no model is asked; leave {args.checkpoints[0]} "
                         "out")
    for path in args.score or ():
        check_file(path)
    if args.checkpoints:
        start_processes()
        args.checkpoints = checkpoints_among(args.checkpoints)
        world, beside = world_beside(args.checkpoints[0])
    else:
        world = None if args.annotations else world_beside(shipped_base())[0]
    if args.score:
        folder, output = args.image_folder or args.coco_path or "val2014", args.output_dir
        if output:
            check_output_folder(output, "--output_dir")
        shown, words = truth_of(args, world, folder)
        known = known_as(shown)
        wanted = read_images(args.images, known) if args.images else None
        said = existing(args.score, known, wanted)
    else:
        folder = find_images(args.image_folder, args.coco_path, world)
        output = args.output_dir or os.path.join(beside, "chair")
        shown, words = truth_of(args, world, folder)
        said = describe(args, choose_images(args, shown, folder), folder, output)
    if said is None:
        return None

    judged = {name: judge(texts, shown, words) for name, texts in said.texts.items()}
    metrics = {name: measure(rows) for name, rows in judged.items()}
    print(f"\n{said.told}\n\n{table(metrics)}")
    if output:
        write(output, judged, said, metrics)
    if said.journal:
        said.journal.remove()
    return judged


def write(folder, judged, said, metrics):
    """A JSONL file per model, and metrics.json."""
    check_can_write(folder)
    for name, rows in judged.items():
        write_rows(os.path.join(folder, f"{name}.jsonl"),
                   [{"image": image, "answer": row.text, "shown": sorted(row.shown),
                     "objects": [{"name": m.name, "start": m.start, "end": m.end,
                                  "there": m.name in row.shown} for m in row.mentions]}
                    for image, row in rows.items()])
    write_metrics(folder, said, {"metrics": metrics})
    print(f"\ndescriptions and metrics.json: {folder}")


def parser():
    parser = Parser(__doc__)
    flags(parser, Asking())
    add = parser.add_argument
    add("--coco_path", help="folder that holds val2014; default: the tiny world beside CKPT")
    add("--image_folder", help="in place of --coco_path: the folder that holds the images")
    add("--annotations", nargs="+", metavar="JSON",
        help="COCO's instances_*.json, and captions_*.json, or their folder (name CKPT first)")
    add("--synonyms", help="classes and their synonyms; default: our list of COCO's 80 classes")
    add("--images", metavar="LIST", help="the images to describe: names or numbers, one a line, or "
        "rows with `image`, as POPE's questions and our answers")
    add("--num_images", type=Number("--num_images", int, above=0), default=500,
        help="so many are drawn where no list is named")
    add("--seed", type=Number("--seed", int, low=0), default=0, help="for which are drawn")
    add("--output_dir", help="for texts and numbers; default: CKPT/chair of the first checkpoint; "
        "out/chair for tiny/base")
    return parser


def main():
    evaluate(parser().parse_args())
    end_processes()


if __name__ == "__main__":
    run_program(main)
