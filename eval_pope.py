"""POPE: does the model see objects that are not there?

    python eval_pope.py tiny/base                         # the tiny base that comes with the code
    python eval_pope.py out/stage2                        # what train.py has made
    python eval_pope.py out/stage1 out/stage2             # checkpoints of one base: one trunk pass
    python eval_pope.py out/*/                            # a sweep, and whatever lies beside it
    python eval_pope.py CKPT --coco_path COCO --pope_path POPE/output/coco --protocol llava
    python eval_pope.py CKPT --image_folder GQA/images --pope_path gqa_pope_seem_*.json
    python eval_pope.py out/voco2 --compressed out/compressed     # VoCo-LLaMA: see images only once
    torchrun --nproc_per_node 2 eval_pope.py out/stage2   # images split over processes, same table

All questions about an image stand in one packed row behind one prefix, and their greedy answers
are decoded together. Prints a table with the base and every checkpoint, and writes the answers
(JSONL in the form that POPE's scorer reads) and `metrics.json` into CKPT/pope. `python -m
tools.report` makes a page to look at of the same evaluation; `python -m evals.score` scores
answers that exist already. Answers are on disk as soon as they are there; after an interruption the
same command asks only what is missing.

Follows POPE (arXiv 2305.10355) in its question files and counting rule, and one of two published
protocols, which are never mixed. `hadpo`: the bare question behind HA-DPO's evaluation prompt.
`llava`: LLaVA-1.5's prompt with "Answer the question using a single word or phrase." Deliberately
different: answers and labels are joined by (image, question), never zipped. Two columns are ours:
AUC of log p(Yes) - log p(No) at the first answer token, and the accuracy that the best single
threshold on it would give, chosen afterwards on these very questions: what mere calibration could
reach.
"""
import argparse
import os
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import numpy as np

from checkpoints.card import add_pope
from checkpoints.load import (
    Source,
    checkpoint_type,
    checkpoints_among,
    load_all,
    trained_folders,
    weights_of,
)
from checkpoints.quantised import BITS, BITS_HELP
from data import IMAGE, Example, PackedDataset
from model import Llava, answer
from support.calibration import calibration
from support.command_line import Parser
from support.common import InputError, Number, device_and_dtype, file_digest, run_program, say
from support.folders import check_can_write
from support.images import check_images
from support.outputs import (
    Journal,
    check_output_folder,
    digest,
    gathered,
    write_rows,
    write_value,
)
from support.processes import end_processes, place, start_processes
from support.questions import find_images, question_files, read_pope, split_name
from support.templates import SYSTEM, SYSTEM_HADPO_EVAL
from tiny.places import world_beside
from training.compressed import COMPRESSED_HELP, without_images
from training.guards import long_rows
from training.originals import pope_arguments


@dataclass(frozen=True)
class Protocol:
    system: str
    suffix: str              # behind every question
    max_new_tokens: int


PROTOCOLS = {
    "hadpo": Protocol(SYSTEM_HADPO_EVAL, "", 512),
    "llava": Protocol(SYSTEM, "\nAnswer the question using a single word or phrase.", 128)}
COLUMNS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1",
           "yes_ratio": "yes ratio", "tp": "TP", "fp": "FP", "tn": "TN", "fn": "FN", "auc": "AUC",
           "best_threshold": "best threshold"}
LEANS = 10       # points between yes-ratio and the labels' from which a model leans to one answer


# ---- Questions -----------------------------------------------------------------------------------


def open_prompts(model, questions, image_folder, protocol):
    """[(image, question), ...] → {image: questions}, PackedDataset: a row per image, a branch
    each.
    """
    protocol, by_image = PROTOCOLS[protocol], {}
    for image, text in questions:
        by_image.setdefault(image, []).append(text)
    examples = []
    for image, texts in by_image.items():
        conversations = [[(f"{IMAGE}\n{text}{protocol.suffix}", None)] for text in texts]
        examples.append(Example(os.path.join(image_folder, image), conversations))
    return by_image, PackedDataset(examples, model.row_format(protocol.system))


# ---- Answers -------------------------------------------------------------------------------------


def identity(model, checkpoints, prompts, protocol, max_new_tokens):
    """What is asked of whom. Answers that were kept are taken up only if all of it agrees."""
    by_image, dataset = prompts
    trained = {path: weights_of(path) for path in checkpoints if checkpoint_type(path) != "base"}
    seen = [asdict(model.config), asdict(model.preprocess), file_digest(model.tokenizer.path)]
    sizes = [os.path.getsize(example.image) for example in dataset.examples]
    return {"base": model.fingerprint, "settings": digest(seen), "models": list(model.heads),
            "trained": digest(list(trained.values())), "protocol": asdict(protocol),
            "max_new_tokens": max_new_tokens, "dtype": str(next(model.trunk.parameters()).dtype),
            "questions": digest([list(by_image.items()), sizes])}


def ask(model, prompts, max_new_tokens, batch_size=None, journal=None, decode=answer):
    """{head's name: {(image, question): (answer, yes-score)}} for what `open_prompts` returns.

    This process asks about its share of the images; the shares are gathered. What the journal knows
    is not asked again. A yes-score is log p(Yes) - log p(No) at the first answer token.
    `batch_size` is in images; default: what fits. `decode`: what answers; model.answer is greedy.
    """
    by_image, dataset = prompts
    images, words = list(by_image), [model.tokenizer.encode(word)[0] for word in ("Yes", "No")]
    kept = gathered(journal.read() if journal else [])
    known = {row["image"]: row["answers"] for rows in kept for row in rows}
    if known:
        say(f"going on: the answers about {len(known)} of {len(images)} images are there already")
    rest = [i for i, image in enumerate(images) if image not in known]
    rank, world_size = place()
    for i, heads in decode(model, dataset, max_new_tokens, batch_size, rest[rank::world_size],
                           words):
        said = []                                   # for every head [(answer, yes-score), ...]
        for texts, logits in heads:
            yes_scores = (logits[:, 0] - logits[:, 1]).tolist()
            said.append(list(zip(texts, yes_scores, strict=True)))
        known[images[i]] = said
        if journal:
            journal.add({"image": images[i], "answers": said})
    known = {image: said for share in gathered(known) for image, said in share.items()}
    return {name: {(image, question): tuple(pair) for image, questions in by_image.items()
                   for question, pair in zip(questions, known[image][n], strict=True)}
            for n, name in enumerate(model.heads)}


# ---- Scores --------------------------------------------------------------------------------------


def says_yes(text):
    """POPE's rule: up to the first full stop, commas removed; the word No, not or no means no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(questions, answers, split="questions"):
    """POPE's numbers in percent (counts as they are). `answers`: {(image, question): text}, for
    all.
    """
    missing = [q for q in questions if (q["image"], q["text"]) not in answers]
    if missing:
        first = f"{missing[0]['image']} {missing[0]['text']!r}"
        raise InputError(f"{split}: {len(missing)} of {len(questions)} questions have no answer, "
                         f"e.g. {first}; the answers belong to another question file or are "
                         "incomplete")
    said = np.array([says_yes(answers[q["image"], q["text"]]) for q in questions])
    label = np.array([q["label"] == "yes" for q in questions])
    tp, fp = int((said & label).sum()), int((said & ~label).sum())
    tn, fn = int((~said & ~label).sum()), int((~said & label).sum())
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    f1 = 100 * 2 * precision * recall / max(1e-12, precision + recall)
    return {"accuracy": 100 * (tp + tn) / len(label), "precision": 100 * precision,
            "recall": 100 * recall, "f1": f1, "yes_ratio": 100 * (tp + fp) / len(label),
            "tp": tp, "fp": fp, "tn": tn, "fn": fn}


def measure(questions, said, split):
    """All columns of a split. `said`: {(image, question): (answer, yes-score)}; no AUC without
    scores.
    """
    numbers = score(questions, {key: text for key, (text, _) in said.items()}, split)
    yes_scores = {key: yes_score for key, (_, yes_score) in said.items()}
    return numbers if None in yes_scores.values() else numbers | calibration(questions, yes_scores)


def labelled_yes(numbers):
    """The share of labels that are yes, percent, which a row's counts tell."""
    return 100 * (numbers["tp"] + numbers["fn"]) / sum(numbers[n] for n in ("tp", "fp", "tn", "fn"))


def leans(numbers):
    return abs(numbers["yes_ratio"] - labelled_yes(numbers)) > LEANS


def table(metrics):
    """{split: {model: numbers}} → Markdown, a table per split; a model that leans is flagged."""
    lines = []
    for split, rows in metrics.items():
        columns = [c for c in COLUMNS if all(c in row for row in rows.values())]
        yes_ratio = labelled_yes(next(iter(rows.values())))
        lines += [f"\n{split} (labels: {yes_ratio:.1f} % yes)", "",
                  f"| model | {' | '.join(COLUMNS[c] for c in columns)} |",
                  "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            cells = [f"{row[c]}" if isinstance(row[c], int) else f"{row[c]:.2f}" for c in columns]
            if leans(row):
                cells[columns.index("yes_ratio")] += " (!)"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if any("(!)" in line for line in lines):
        lines.append(f"\n(!) the yes-ratio is more than {LEANS} points away from the labels': the "
                     "model leans to one answer")
    return "\n".join(lines)


# ---- One evaluation ------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What was asked, by whom it was answered, and how well."""
    model: Llava
    protocol: str
    image_folder: str
    questions: dict          # {split: POPE's rows}
    answers: dict            # {head's name: {(image, question): (answer, yes-score)}}
    metrics: dict            # {split: {head's name: numbers}}
    journal: Journal = None  # to be removed when nothing more is made of the answers


def evaluate(args):
    """Ask base and checkpoints, print the table, write the answers → Evaluation; None but on rank
    0.
    """
    args.checkpoints = checkpoints_among(args.checkpoints)
    first = args.checkpoints[0]
    rank = int(os.environ.get("RANK", 0))
    start_processes()
    world, beside = world_beside(first)
    files = question_files(args.pope_path or os.path.join(world, "pope"), args.set)
    questions = {split: read_pope(path) for split, path in files.items()}
    image_folder = find_images(args.image_folder, args.coco_path, world)
    output = args.output_dir or os.path.join(beside, "pope")
    check_output_folder(output, "--output_dir")
    if args.compressed:
        check_output_folder(args.compressed, "--compressed")
    # Every distinct question is asked once; the splits share many.
    pairs = [(q["image"], q["text"]) for rows in questions.values() for q in rows]
    distinct = list(dict.fromkeys(pairs))
    images = list(dict.fromkeys(image for image, _ in distinct))
    check_images([os.path.join(image_folder, image) for image in images])

    # The model; every process has a whole one.
    device, dtype = device_and_dtype(args.bf16)
    source = Source(args.checkpoints, args.model_name_or_path, args.vision_tower, args.bits)
    model = load_all(source, device, dtype)

    # The answers. The journal keeps them from the moment they are there.
    models = f"{len(model.heads)} model{'s' * (len(model.heads) > 1)}"
    say(f"{len(distinct)} distinct questions about {len(images)} images, {models}, protocol "
        f"{args.protocol}")
    limit = args.max_new_tokens or PROTOCOLS[args.protocol].max_new_tokens
    limit = min(limit, model.config.text.max_position_embeddings)
    prompts = open_prompts(model, distinct, image_folder, args.protocol)
    long_rows(prompts[1])               # refuses a question that does not fit, before any is asked
    if args.compressed:
        prompts = prompts[0], without_images(args.compressed, prompts[1], model)
    asked = identity(model, args.checkpoints, prompts, PROTOCOLS[args.protocol], limit)
    journal = Journal(output, asked, rank)
    with journal.kept_on_interrupt(len(images), "images"):
        answers = ask(model, prompts, limit, args.batch_size, journal)
    if rank:
        return None
    metrics = {split: {name: measure(rows, answers[name], split) for name in model.heads}
               for split, rows in questions.items()}
    print(table(metrics))
    evaluation = Evaluation(model, args.protocol, image_folder, questions, answers, metrics,
                            journal)
    write_answers(output, evaluation, args.checkpoints)
    return evaluation


def write_answers(folder, evaluation, checkpoints):
    """A JSONL file per model and split, and metrics.json."""
    check_can_write(folder)
    for name, answers in evaluation.answers.items():
        for split, rows in evaluation.questions.items():
            said = []
            for q in rows:
                text, yes_score = answers[q["image"], q["text"]]
                said.append({"question_id": q.get("question_id"), "image": q["image"],
                             "question": q["text"], "answer": text, "yes_score": yes_score})
            write_rows(os.path.join(folder, f"{name}_{split}.jsonl"), said)
    folders = trained_folders(evaluation.answers, checkpoints)
    write_value(os.path.join(folder, "metrics.json"),
                {"protocol": evaluation.protocol, "checkpoints": folders,
                 "metrics": evaluation.metrics})
    for path in folders.values():
        add_pope(path, f"Protocol `{evaluation.protocol}`.\n{table(evaluation.metrics)}\n")
    print(f"\nanswers and metrics.json: {folder}")


def flags(doc):
    """The flags of an evaluation; tools/report.py adds its own."""
    parser = Parser(doc)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT",
        help="trained checkpoints of one base, or a base; other folders are left out")
    add("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    add("--vision_tower", help="CLIP's folder, where base or checkpoint name another")
    add("--coco_path", help="folder that holds val2014; default: the tiny world beside CKPT")
    add("--image_folder", help="in place of --coco_path: the folder that holds the images")
    add("--pope_path", nargs="+", help="folder of *pope*_{random,popular,adversarial}.json, or the "
        "question files (name CKPT first); default: the tiny world's")
    add("--set", nargs="+", type=split_name, metavar="{random,popular,adversarial}",
        help="which questions; default: all three, or those of the named files")
    add("--protocol", choices=PROTOCOLS, default="hadpo",
        help="how is asked: HA-DPO's bare question, or LLaVA's for a single word")
    add("--max_new_tokens", type=Number("--max_new_tokens", int, above=0),
        help="an answer's length at most; default: the protocol's, 512 or 128")
    add("--bits", type=int, choices=BITS, help=BITS_HELP)
    add("--batch_size", type=Number("--batch_size", int, above=0),
        help="images at once; default: what fits")
    add("--compressed", metavar="FOLDER", help=COMPRESSED_HELP)
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16, or fp32; default: bf16 on a GPU, fp32 on a CPU")
    add("--output_dir", help="for answers and numbers; default: CKPT/pope of the first checkpoint; "
        "out/pope for tiny/base")
    return parser


def main():
    evaluation = evaluate(flags(__doc__).parse_args(pope_arguments()))
    if evaluation:                      # it is on rank 0 only
        evaluation.journal.remove()
    end_processes()


if __name__ == "__main__":
    run_program(main)
