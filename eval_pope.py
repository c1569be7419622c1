"""POPE: does the model see objects that are not there?

    python eval_pope.py out/stage2                                        # the tiny world beside the checkpoint
    python eval_pope.py out/stage1 out/stage2                             # several checkpoints of one base: one trunk pass
    python eval_pope.py CKPT --coco_path COCO --pope_path POPE/output/coco [--set random] [--protocol llava]
    torchrun --nproc_per_node 2 eval_pope.py out/stage2                   # images split over processes, the same table

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
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import numpy as np
import torch
import torch.distributed as dist

from checkpoint import base_of, fingerprint, is_trained, kind, load_base, load_trained, read_config, write_json
from data import (IMAGE, SYSTEM, SYSTEM_HADPO_EVAL, Example, InputError, PackedDataset, check_images, read_pope)
from model import answer

SPLITS = {"random": "random", "popular": "popular", "adv": "adversarial"}      # --set → POPE's name
PROTOCOLS = {"hadpo": (SYSTEM_HADPO_EVAL, "", 512),                             # system sentence, suffix, new tokens
             "llava": (SYSTEM, "\nAnswer the question using a single word or phrase.", 128)}
COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "tp", "fp", "tn", "fn", "auc", "best_threshold")


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


def table(metrics, yes_ratios):
    """{split: {model: numbers}} → Markdown, a table per split; a yes-ratio 10 points off the labels' is flagged."""
    lines = []
    for split, models in metrics.items():
        lines += [f"\n{split} (labels: {yes_ratios[split]:.1f} % yes)", "",
                  "| model | accuracy | precision | recall | F1 | yes ratio | TP | FP | TN | FN | AUC | best threshold |",
                  "|---|---|---|---|---|---|---|---|---|---|---|---|"]
        for model, row in models.items():
            cells = [f"{row[c]}" if isinstance(row[c], int) else f"{row[c]:.2f}" for c in COLUMNS]
            if abs(row["yes_ratio"] - yes_ratios[split]) > 10:
                cells[4] += " (!)"
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    if any("(!)" in line for line in lines):
        lines.append("\n(!) the yes-ratio is more than 10 points away from the labels': the model leans to one answer")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Asking


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
    said = [read_config(c).get("vision_tower") for c in trained if kind(c) == "trained"]
    tower = args.vision_tower or (said[0] if said else None)
    trunk, base_head, tokenizer, preprocess = load_base(base, tower, dtype, device, adapter)
    mark = fingerprint(trunk, base_head)
    names = [os.path.basename(c.rstrip("/")) for c in trained]
    names = names if len(set(names)) == len(names) else [c.rstrip("/").replace("/", "-").lstrip(".-") for c in trained]
    heads = {"adapter" if adapter else "base": base_head} | {name: load_trained(c, trunk.config, base_head, mark, dtype, device) for name, c in zip(names, trained)}
    return trunk, heads, tokenizer, preprocess


def ask(trunk, heads, tokenizer, preprocess, questions, image_folder, protocol, max_new_tokens, batch_size):
    """{(image, question)} → per head {(image, question): (answer, yes-score)}; this process's share of the images, gathered."""
    system, suffix, limit = PROTOCOLS[protocol]
    by_image = {}
    for image, text in questions:
        by_image.setdefault(image, []).append(text)
    images = list(by_image)
    examples = [Example(os.path.join(image_folder, image), [[(f"{IMAGE}\n{text}{suffix}", None)] for text in by_image[image]])
                for image in images]
    check_images([e.image for e in examples])
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = trunk.config
    limit = min(max_new_tokens or limit, config.text.max_position_embeddings)
    dataset = PackedDataset(examples, tokenizer, preprocess, config.vision.num_patches, config.max_length, system)
    mine = range(rank, len(images), world_size)
    answered = answer(trunk, list(heads.values()), dataset, limit, batch_size, mine, None if rank else "asking")
    yes, no = (tokenizer.encode(word)[0] for word in ("Yes", "No"))
    share = [{(images[i], text): (said, float(logits[yes] - logits[no]))
              for i, (texts, first) in result.items() for text, said, logits in zip(by_image[images[i]], texts, first)}
             for result in answered]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, share)
        share = [dict(pair for s in shares for pair in s[n].items()) for n in range(len(heads))]
    return dict(zip(heads, share))


def evaluate(args):
    world = os.path.join(os.path.dirname(args.checkpoints[0].rstrip("/")), "world")
    coco, pope = args.coco_path or os.path.join(world, "coco"), args.pope_path or os.path.join(world, "pope")
    questions = {SPLITS[s]: read_pope(pope, SPLITS[s]) for s in args.set}
    image_folder = os.path.join(coco, "val2014")
    if not os.path.isdir(image_folder):
        raise InputError(f"{image_folder}: no such folder; --coco_path names the folder that holds val2014")
    on_gpu, rank = torch.cuda.is_available(), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    bf16 = on_gpu if args.bf16 is None else args.bf16
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")                     # only answers are exchanged
    trunk, heads, tokenizer, preprocess = load_all(args, device, torch.bfloat16 if bf16 else torch.float32)
    distinct = list(dict.fromkeys((q["image"], q["text"]) for rows in questions.values() for q in rows))
    if rank == 0:
        print(f"{len(distinct)} distinct questions about {len({i for i, _ in distinct})} images, {len(heads)} models, "
              f"protocol {args.protocol}", flush=True)
    said = ask(trunk, heads, tokenizer, preprocess, distinct, image_folder, args.protocol, args.max_new_tokens, args.batch_size)
    if rank:
        return
    metrics = {split: {name: score(rows, {k: text for k, (text, _) in said[name].items()}, split)
                       | calibration(rows, {k: s for k, (_, s) in said[name].items()}) for name in heads}
               for split, rows in questions.items()}
    yes_ratios = {split: 100 * np.mean([q["label"] == "yes" for q in rows]) for split, rows in questions.items()}
    print(table(metrics, yes_ratios))
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
    write_json(os.path.join(folder, "metrics.json"), {"protocol": args.protocol, "metrics": metrics})
    print(f"\nanswers and metrics.json: {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="trained checkpoints of one base, or a base")
    parser.add_argument("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    parser.add_argument("--vision_tower", help="CLIP's folder, where it is not the one that base or checkpoint names")
    parser.add_argument("--coco_path", help="folder that holds val2014; default: the tiny world beside CKPT")
    parser.add_argument("--pope_path", help="folder of coco_pope_*.json; default: the tiny world's")
    parser.add_argument("--set", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: all three")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="hadpo")
    parser.add_argument("--max_new_tokens", type=int, help="default: the protocol's")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once; default 16")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="else fp32; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--output_dir", help="default: CKPT/pope of the first checkpoint")
    evaluate(parser.parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
