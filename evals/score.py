"""POPE's numbers of answers that exist already: no model is loaded.

    python -m evals.score out/pope/base_popular.jsonl --pope_path out/world/pope
    python -m evals.score out/stage2/pope/stage2_random.jsonl \\
        --pope_path out/world/pope --set random
    python -m evals.score ANSWERS.jsonl --pope_path gqa_pope_seem_*.json
    python -m evals.score llava-v1.5-7b.jsonl --pope_path POPE/2023 \\
        --question_file llava_pope_test.jsonl

Reads answers in our form (eval_pope.py), HA-DPO's and LLaVA's, one per line or as one list. A split
is scored only where every question of it is answered; of the others it prints how many answers
there are. Answers and questions are joined by image and question, or by id and question where the
file names no image.
"""
import math
import os
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
from eval_pope import PROTOCOLS, measure, table
from support.command_line import Parser
from support.common import InputError, field, run_program
from support.questions import question_files, read_list, read_pope, split_name


def by_id(rows):
    """{(question id, question): row}. A name that two rows share identifies neither: left out."""
    names = [(str(row.get("question_id")), row["text"]) for row in rows]
    count = Counter(names)
    return {name: row for name, row in zip(names, rows, strict=True) if count[name] == 1}


def identify(names, lists, path):
    """Find the questions of answers that name no image → {list: {(id, question): row}}.

    `names` are the answers' (id, question), `lists` {name of a list: rows of questions}. Ids may
    start again in every list. So a list counts only if it has all names, and the lists that count
    must agree about the images. Otherwise it raises InputError with how many each list has.
    """
    known = {where: by_id(rows) for where, rows in lists.items()}
    fits = {where: {name: rows[name] for name in names}
            for where, rows in known.items() if rows.keys() >= set(names)}
    images = {tuple(row["image"] for row in fit.values()) for fit in fits.values()}
    if len(images) == 1:
        return fits
    counts = ", ".join(f"{len(rows.keys() & set(names)):,} in {where}"
                       for where, rows in known.items())
    lost = (n for n, name in enumerate(names)
            if not any(name in rows for rows in known.values()))
    first = next(lost, None)
    example = "" if first is None else f" (row {first} in none)"
    raise InputError(f"{path}: of {len(set(names)):,} questions without an image, id and text "
                     f"match {counts}{example}; one must have all: score each split's file alone, "
                     "with the files and --set asked")


def question_keys(names, questions, question_file, path):
    """What each answer without an image is about → {split: {(id, question): (image, question)}}.

    HA-DPO's ids start again in every split's file. LLaVA asks all splits in one file,
    `question_file`, and a split counts only its own answers.
    """
    keys = {}
    if not question_file:
        for split, fit in identify(names, questions, path).items():
            keys[split] = {name: (row["image"], row["text"]) for name, row in fit.items()}
        return keys
    asked = {question_file: read_list(question_file, "image", "text", "category")}
    fit, suffix = identify(names, asked, path)[question_file], PROTOCOLS["llava"].suffix
    for split in questions:
        keys[split] = {name: (row["image"], row["text"].removesuffix(suffix))
                       for name, row in fit.items() if row["category"] == split}
    return keys


def read_answers(path, questions, question_file):
    """Answers in our, HA-DPO's or LLaVA's form.

    → {split: {(image, question): (answer, yes-score or None)}}. InputError where a row is damaged,
    unknown, or at odds with a row before.
    """
    rows = read_list(path)
    first = rows[0] if isinstance(rows[0], dict) else {}
    has_image, is_llava = bool(first.get("image")), "prompt" in first
    mark = "image" if has_image else "question_id"
    question, answer = ("prompt", "text") if is_llava else ("question", "answer")
    names = [(str(field(row, mark, (int, str), path, n)), field(row, question, str, path, n))
             for n, row in enumerate(rows)]
    said = [(field(row, answer, str, path, n),
             field(row, "yes_score", (float, int, type(None)), path, n))
            for n, row in enumerate(rows)]
    for n, (_, yes_score) in enumerate(said):
        if yes_score is not None and not abs(yes_score) < math.inf:
            raise InputError(f"{path}, row {n}: yes_score is {yes_score} and should be a finite "
                             "number; mend or remove it")
    if has_image:
        keys = {split: {name: name for name in names} for split in questions}
    elif is_llava and not question_file:
        raise InputError(f"{path}: LLaVA's answers name neither image nor split; --question_file "
                         "names the file that was asked")
    else:
        keys = question_keys(names, questions, question_file if is_llava else None, path)

    answers = {split: {} for split in questions}
    for split, key_of in keys.items():
        for n, (name, (text, yes_score)) in enumerate(zip(names, said, strict=True)):
            key = key_of.get(name)
            if key is None:
                continue
            before, _ = answers[split].setdefault(key, (text, yes_score))
            if before != text:
                raise InputError(f"{path}, row {n}: {key[1]!r} about {key[0]} was answered "
                                 "otherwise in a row before; remove one of them, or score each "
                                 "run's and split's file alone")
    return answers


def score_file(args):
    """Scores the splits that a file answers completely → {split: {file: numbers}}.

    Prints the table, and of the other splits how many questions are answered. InputError where no
    split is complete.
    """
    files = question_files(args.pope_path, args.set)
    questions = {split: read_pope(path) for split, path in files.items()}
    answers = read_answers(args.answers, questions, args.question_file)
    asked = {split: {(q["image"], q["text"]) for q in rows} for split, rows in questions.items()}
    metrics = {}
    for split, said in answers.items():
        found, total = len(asked[split] & said.keys()), len(asked[split])
        if found == total:
            name = os.path.basename(args.answers)
            metrics[split] = {name: measure(questions[split], said, split)}
        elif found:
            print(f"{split}: incomplete, {found:,} of {total:,} questions answered, not scored")
        else:
            print(f"{split}: no answers")
    strange = set().union(*answers.values()).difference(*asked.values())
    if strange:
        print(f"{len(strange):,} answers are to questions of none of these label files: another "
              "version, or another --set?")
    if not metrics:
        raise InputError(f"{args.answers}: answers no split of {', '.join(files.values())} "
                         "completely; its counts stand above")
    print(table(metrics))
    return metrics


def main():
    parser = Parser(__doc__)
    parser.add_argument("answers", metavar="ANSWERS",
                        help="answers in our, HA-DPO's or LLaVA's form")
    parser.add_argument("--pope_path", required=True, nargs="+",
                        help="folder of *pope*_{random,popular,adversarial}.json, or the question "
                             "files (name ANSWERS first)")
    parser.add_argument("--question_file", help="LLaVA's llava_pope_test.jsonl, for its answers")
    parser.add_argument("--set", nargs="+", type=split_name, metavar="{random,popular,adversarial}",
                        help="which questions; default: all three, or those of the named files")
    score_file(parser.parse_args())


if __name__ == "__main__":
    run_program(main)
