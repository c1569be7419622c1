"""POPE: does the model see objects that are not there?

    python eval_pope.py out/stage2                                        # the tiny world beside the checkpoint
    python eval_pope.py out/stage1 out/stage2                             # several checkpoints of one base: one trunk pass
    python eval_pope.py out/*/                                            # a sweep, and whatever lies beside it
    python eval_pope.py CKPT --coco_path COCO --pope_path POPE/output/coco [--set random] [--protocol llava]
    python eval_pope.py out/stage2 --report report.html                   # and a page to look at answers and attention (report.py)
    torchrun --nproc_per_node 2 eval_pope.py out/stage2                   # images split over processes, the same table
    python eval_pope.py --score ANSWERS.jsonl --pope_path POPE/output/coco [--question_file llava_pope_test.jsonl]  # no model

All questions about an image stand in one packed row behind one prefix, and their greedy answers are decoded together.
Prints a table with the base and every checkpoint, and writes the answers (JSONL in the form that POPE's scorer reads)
and `metrics.json` into CKPT/pope.

Follows POPE (arXiv 2305.10355) in its question files and counting rule, and one of two published protocols, never mixed:
`hadpo`: the bare question behind HA-DPO's evaluation prompt, 512 new tokens; `llava`: LLaVA-1.5's prompt with "Answer the
question using a single word or phrase.", 128 new tokens. Deliberately different: answers and labels are joined by (image,
question), never zipped. Two columns are ours: AUC of log p(Yes) - log p(No) at the first answer token, and the accuracy
that the best single threshold on it would give, chosen afterwards: what mere calibration could reach.
"""
import argparse
import json
import os
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import numpy as np
import torch
import torch.distributed as dist

from checkpoint import base_of, fingerprint, holds_model, is_trained, kind, load_base, load_trained, tower_of, write_json
from data import SYSTEM, SYSTEM_HADPO_EVAL, PackedDataset, check_images
from model import answer, device_and_dtype
from plots import LEANS, leans
from readers import IMAGE, Example, InputError, field, read_pope, read_rows, run_program

SPLITS = {"random": "random", "popular": "popular", "adv": "adversarial"}      # --set → POPE's name
PROTOCOLS = {"hadpo": (SYSTEM_HADPO_EVAL, "", 512),                             # system sentence, suffix, new tokens
             "llava": (SYSTEM, "\nAnswer the question using a single word or phrase.", 128)}
COLUMNS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio", "tp": "TP",
           "fp": "FP", "tn": "TN", "fn": "FN", "auc": "AUC", "best_threshold": "best threshold"}


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def says_yes(text):
    """POPE's rule: the text up to the first full stop, commas removed; "No", "not" or "no" among its words means no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(questions, answers, split="questions"):
    """POPE's numbers in percent (counts as they are). `answers`: {(image, question): text}; every question needs one."""
    missing = [q for q in questions if (q["image"], q["text"]) not in answers]
    if missing:
        raise InputError(f"{split}: {len(missing)} of {len(questions)} questions have no answer, e.g. {missing[0]['image']} "
                         f"{missing[0]['text']!r}; the answers belong to another question file or are incomplete")
    said = np.array([says_yes(answers[q["image"], q["text"]]) for q in questions])
    label = np.array([q["label"] == "yes" for q in questions])
    tp, fp, tn, fn = (int(n) for n in ((said & label).sum(), (said & ~label).sum(), (~said & ~label).sum(), (~said & label).sum()))
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    return {"accuracy": 100 * (tp + tn) / len(label), "precision": 100 * precision, "recall": 100 * recall,
            "f1": 100 * 2 * precision * recall / max(1e-12, precision + recall), "yes_ratio": 100 * (tp + fp) / len(label),
            "tp": tp, "fp": fp, "tn": tn, "fn": fn}


def calibration(questions, yes_scores):
    """AUC of the yes-scores, and the accuracy of the threshold that is best on these very questions, in percent."""
    x = np.array([yes_scores[q["image"], q["text"]] for q in questions])
    label = np.array([q["label"] == "yes" for q in questions])
    order = np.argsort(x, kind="stable")
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]                        # ties share their mean rank
    positive, negative = label.sum(), (~label).sum()
    auc = (rank[label].sum() - positive * (positive + 1) / 2) / max(1, positive * negative)
    # Threshold behind the k smallest: those said no, the others yes. Only between different scores.
    right = np.concatenate(([0], np.cumsum(~label[order]))) + positive - np.concatenate(([0], np.cumsum(label[order])))
    real = np.concatenate(([True], np.diff(x[order]) > 0, [True]))
    return {"auc": 100 * float(auc), "best_threshold": 100 * float(right[real].max()) / len(label)}


def measure(questions, said, split):
    """All columns of a split. `said`: {(image, question): (answer, yes-score)}; where a yes-score is None, AUC is absent."""
    numbers = score(questions, {key: text for key, (text, _) in said.items()}, split)
    yes_scores = {key: yes_score for key, (_, yes_score) in said.items()}
    return numbers if None in yes_scores.values() else numbers | calibration(questions, yes_scores)


def table(metrics, yes_ratios):
    """{split: {model: numbers}} → Markdown, a table per split; a yes-ratio 10 points off the labels' is flagged."""
    lines = []
    for split, models in metrics.items():
        columns = [c for c in COLUMNS if all(c in row for row in models.values())]
        lines += [f"\n{split} (labels: {yes_ratios[split]:.1f} % yes)", "",
                  f"| model | {' | '.join(COLUMNS[c] for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
        for model, row in models.items():
            cells = [f"{row[c]}" if isinstance(row[c], int) else f"{row[c]:.2f}" for c in columns]
            if leans(row):
                cells[4] += " (!)"
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    if any("(!)" in line for line in lines):
        lines.append(f"\n(!) the yes-ratio is more than {LEANS} points away from the labels': the model leans to one answer")
    return "\n".join(lines)


def labels_yes(questions):
    return {split: 100 * np.mean([q["label"] == "yes" for q in rows]) for split, rows in questions.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers from a file


def by_id(rows):
    """{(question id, question): row}. What stands for two rows identifies neither and is left out."""
    names = [(str(row.get("question_id")), row["text"]) for row in rows]
    count = Counter(names)
    return {name: row for name, row in zip(names, rows) if count[name] == 1}


def identify(names, lists, path):
    """What answers without an image call their questions, found in lists of questions → {list: {(id, question): row}}.

    Ids may begin anew in every list. So a list counts only if it has all of them, each with the very question answered.
    """
    known = {where: by_id(rows) for where, rows in lists.items()}
    fits = {where: {name: rows[name] for name in names} for where, rows in known.items() if rows.keys() >= set(names)}
    if len({tuple(row["image"] for row in fit.values()) for fit in fits.values()}) != 1:
        counts = ", ".join(f"{len(rows.keys() & set(names)):,} in {where}" for where, rows in known.items())
        lost = [f" (row {n} in none)" for n, name in enumerate(names) if not any(name in rows for rows in known.values())]
        raise InputError(f"{path}: of {len(set(names)):,} questions without an image, id and text match {counts}"
                         f"{''.join(lost[:1])}; one must have all: score each split's file alone, with the files and --set asked")
    return fits


def read_answers(path, questions, question_file):
    """Answers in our, HA-DPO's or LLaVA's form → {split: {(image, question): (answer, yes-score or None)}}."""
    rows = read_rows(path)
    first = rows[0] if isinstance(rows[0], dict) else {}
    mark = "image" if first.get("image") else "question_id"
    question, answer = ("prompt", "text") if "prompt" in first else ("question", "answer")
    names = [(str(field(row, mark, (int, str), path, n)), field(row, question, str, path, n)) for n, row in enumerate(rows)]
    said = [(field(row, answer, str, path, n), field(row, "yes_score", (float, int, type(None)), path, n))
            for n, row in enumerate(rows)]
    if mark == "image":
        keys = {split: {name: name for name in names} for split in questions}
    elif question == "question":                            # HA-DPO's original: ids begin anew in every split's file
        keys = {split: {name: (row["image"], row["text"]) for name, row in fit.items()}
                for split, fit in identify(names, questions, path).items()}
    elif question_file:                                     # LLaVA: one file for all splits; a split has only its own answers
        asked = {question_file: read_rows(question_file, "image", "text", "category")}
        fit, suffix = identify(names, asked, path)[question_file], PROTOCOLS["llava"][1]
        keys = {split: {name: (row["image"], row["text"].removesuffix(suffix)) for name, row in fit.items()
                        if row["category"] == split} for split in questions}
    else:
        raise InputError(f"{path}: LLaVA's answers name neither image nor split; --question_file names the file that was asked")
    answers = {split: {} for split in questions}
    for split in keys:
        for n, (name, (text, yes_score)) in enumerate(zip(names, said)):
            key = keys[split].get(name)
            if key and answers[split].setdefault(key, (text, yes_score))[0] != text:
                raise InputError(f"{path}, row {n}: {key[1]!r} about {key[0]} was answered otherwise in a row before; remove one "
                                 "of them, or score each run's and split's file alone")
    return answers


def score_file(args):
    """Scores the splits that a file answers completely and says what the others lack. → {split: {file: numbers}}"""
    questions = {SPLITS[s]: read_pope(args.pope_path, SPLITS[s]) for s in args.set}
    answers = read_answers(args.score, questions, args.question_file)
    asked = {split: {(q["image"], q["text"]) for q in rows} for split, rows in questions.items()}
    metrics = {}
    for split, said in answers.items():
        found, total = len(asked[split] & said.keys()), len(asked[split])
        if found == total:
            metrics[split] = {os.path.basename(args.score): measure(questions[split], said, split)}
        else:
            incomplete = f"incomplete, {found:,} of {total:,} questions answered, not scored"
            print(f"{split}: {incomplete if found else 'no answers'}")
    strange = set().union(*answers.values()).difference(*asked.values())
    if strange:
        print(f"{len(strange):,} answers are to questions of none of these label files: another version, or another --set?")
    if not metrics:
        raise InputError(f"{args.score}: answers no split of {args.pope_path} completely; its counts stand above")
    print(table(metrics, labels_yes(questions)))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def checkpoints_among(paths):
    """Those of the paths that are evaluated, in their order: what was trained, or a base where nothing else is named.

    A base needs no naming, and a glob brings folders that are no model; they are left out, and that is said in one line.
    """
    paths = list(dict.fromkeys(path.rstrip("/") for path in paths))
    kinds = {path: kind(path) if holds_model(path) else None for path in paths}
    chosen = [path for path in paths if kinds[path] not in ("base", None)] or [path for path in paths if kinds[path]]
    left_out = ", ".join(path for path in paths if path not in chosen)
    if not chosen:
        raise InputError(f"{left_out}: no checkpoint, no base (there is no config.json); name folders that train.py has written")
    if left_out and int(os.environ.get("RANK", 0)) == 0:
        print(f"left out, because nothing was trained there on top of a base: {left_out}", flush=True)
    return chosen


def load_all(args, device, dtype):
    """Base and checkpoints → trunk, {name: head}, tokenizer, preprocess. All checkpoints must belong to one base."""
    adapter = next((c for c in args.checkpoints if kind(c) == "adapter"), None)
    if adapter and len(args.checkpoints) > 1:
        raise InputError(f"{adapter}: a LoRA adapter changes the base itself, so nothing can be evaluated beside it; name it alone")
    trained = [c for c in args.checkpoints if is_trained(c)]
    bases = {base_of(c, args.model_name_or_path) for c in args.checkpoints}
    if len(bases) > 1:
        raise InputError(f"the checkpoints belong to different bases ({', '.join(sorted(bases))}); evaluate them one base at a time")
    base, = bases
    tower = next(filter(None, (tower_of(c, args.vision_tower) for c in args.checkpoints)), None)
    trunk, base_head, tokenizer, preprocess = load_base(base, tower, dtype, device, adapter)
    mark = fingerprint(trunk, base_head)
    names = [os.path.basename(c.rstrip("/")) for c in trained]
    names = names if len(set(names)) == len(names) else [c.rstrip("/").replace("/", "-").lstrip(".-") for c in trained]
    heads = {"adapter" if adapter else "base": base_head}
    heads |= {name: load_trained(c, trunk.config, base_head, mark, dtype, device) for name, c in zip(names, trained)}
    return trunk, heads, tokenizer, preprocess


def open_prompts(config, tokenizer, preprocess, questions, image_folder, protocol):
    """[(image, question), ...] → {image: questions}, PackedDataset with a row per image and a branch per question."""
    system, suffix, _ = PROTOCOLS[protocol]
    by_image = {}
    for image, text in questions:
        by_image.setdefault(image, []).append(text)
    examples = [Example(os.path.join(image_folder, image), [[(f"{IMAGE}\n{text}{suffix}", None)] for text in texts])
                for image, texts in by_image.items()]
    return by_image, PackedDataset(examples, tokenizer, preprocess, config.vision.num_patches, config.max_length, system)


def ask(trunk, heads, tokenizer, preprocess, questions, image_folder, protocol, max_new_tokens, batch_size):
    """{(image, question)} → per head {(image, question): (answer, yes-score)}; this process's share of the images, gathered."""
    by_image, dataset = open_prompts(trunk.config, tokenizer, preprocess, questions, image_folder, protocol)
    images, limit = list(by_image), min(max_new_tokens or PROTOCOLS[protocol][2], trunk.config.text.max_position_embeddings)
    check_images([e.image for e in dataset.examples])
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(images), world_size)
    words = [tokenizer.encode(word)[0] for word in ("Yes", "No")]
    answered = answer(trunk, list(heads.values()), dataset, limit, batch_size, mine, None if rank else "asking", words)
    share = [{(images[i], text): (said, score) for i, (texts, logits) in result.items()
              for text, said, score in zip(by_image[images[i]], texts, (logits[:, 0] - logits[:, 1]).tolist())}
             for result in answered]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, share)
        share = [dict(pair for s in shares for pair in s[n].items()) for n in range(len(heads))]
    return dict(zip(heads, share))


def evaluate(args):
    args.checkpoints = checkpoints_among(args.checkpoints)
    world = os.path.join(os.path.dirname(args.checkpoints[0]), "world")
    coco, pope = args.coco_path or os.path.join(world, "coco"), args.pope_path or os.path.join(world, "pope")
    questions = {SPLITS[s]: read_pope(pope, SPLITS[s]) for s in args.set}
    image_folder = os.path.join(coco, "val2014")
    if not os.path.isdir(image_folder):
        raise InputError(f"{image_folder}: no such folder; --coco_path names the folder that holds val2014")
    if args.report and (os.path.isdir(args.report) or not os.path.isdir(os.path.dirname(os.path.abspath(args.report)))):
        raise InputError(f"--report {args.report}: is a folder or lies in none; name a file in a folder that exists")
    device, dtype = device_and_dtype(args.bf16)
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")                     # only answers are exchanged
    trunk, heads, tokenizer, preprocess = load_all(args, device, dtype)
    distinct = list(dict.fromkeys((q["image"], q["text"]) for rows in questions.values() for q in rows))
    if rank == 0:
        print(f"{len(distinct)} distinct questions about {len({i for i, _ in distinct})} images, {len(heads)} models, "
              f"protocol {args.protocol}", flush=True)
    said = ask(trunk, heads, tokenizer, preprocess, distinct, image_folder, args.protocol, args.max_new_tokens, args.batch_size)
    if rank:
        return
    metrics = {split: {name: measure(rows, said[name], split) for name in heads} for split, rows in questions.items()}
    print(table(metrics, labels_yes(questions)))
    first = args.checkpoints[0]
    folder = args.output_dir or os.path.join(first if os.path.isdir(first) else os.path.dirname(first), "pope")
    os.makedirs(folder, exist_ok=True)
    for name in heads:
        for split, rows in questions.items():
            path = os.path.join(folder, f"{name}_{split}.jsonl")
            with open(path, "w", encoding="utf-8") as file:
                for q in rows:
                    text, yes_score = said[name][q["image"], q["text"]]
                    file.write(json.dumps({"question_id": q.get("question_id"), "image": q["image"], "question": q["text"],
                                           "answer": text, "yes_score": yes_score}, ensure_ascii=False) + "\n")
    folders = dict(zip([name for name in heads if name != "base"], [c for c in args.checkpoints if kind(c) != "base"]))
    write_json(os.path.join(folder, "metrics.json"), {"protocol": args.protocol, "checkpoints": folders, "metrics": metrics})
    print(f"\nanswers and metrics.json: {folder}")
    if args.report:
        from report import write_report     # which builds on this file
        write_report(args.report, trunk, heads, tokenizer, preprocess, questions, said, metrics, image_folder, args.protocol)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="trained checkpoints of one base, or a base; other folders are "
                        "left out")
    parser.add_argument("--score", metavar="ANSWERS", help="instead of asking: answers in our, HA-DPO's or LLaVA's form")
    parser.add_argument("--question_file", help="LLaVA's llava_pope_test.jsonl, for answers in LLaVA's form")
    parser.add_argument("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    parser.add_argument("--vision_tower", help="CLIP's folder, where it is not the one that base or checkpoint names")
    parser.add_argument("--coco_path", help="folder that holds val2014; default: the tiny world beside CKPT")
    parser.add_argument("--pope_path", help="folder of coco_pope_*.json; default: the tiny world's")
    parser.add_argument("--set", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: all three")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="hadpo")
    parser.add_argument("--max_new_tokens", type=int, help="default: the protocol's")
    parser.add_argument("--batch_size", type=int, help="images at once; default: what fits")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="else fp32; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--report", metavar="HTML", help="also write a page: tables, charts, answers, attention over the images")
    parser.add_argument("--output_dir", help="default: CKPT/pope of the first checkpoint")
    args = parser.parse_args()
    if bool(args.checkpoints) == bool(args.score) or args.score and not args.pope_path:
        parser.error("name the checkpoints to ask; or without any a file of answers with --score, and --pope_path")
    if args.score and args.report:
        parser.error("--report asks the model where it looks, which a file of answers cannot tell; name a checkpoint instead")
    (score_file if args.score else evaluate)(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
