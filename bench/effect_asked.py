"""What a model of the experiment in effect.py is asked, and what is counted.

    line = judge("out/effect/seed46", "out/effect/seed46/sft-0.001", validation=False)
    lines = judge_base("out/effect/seed46", validation=False)      # {row: line} of the base's rows

A line holds `numbers` {name: value, in percent unless said otherwise} and `right` {split: how many
of its six questions are answered right, an image a digit}, so that images can be drawn again.

    {split}/accuracy, auc, yes_ratio, …  POPE's, by split
    held_out            accuracy on adversarial questions about HELD_OUT's classes
    well_formed         of the adversarial answers, how many are one of the two possible sentences
    chair_i, chair_s, coverage, words    of descriptions: named objects that are not there, of all
                        named; descriptions with one; objects that are named, of all that are there
                        (CHAIR, arXiv 1809.02156, and its recall); words a description
    nll                 of conversations about unseen images, nats a token: what is forgotten
"""
import os
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints.load import Source, load_one
from data import DESCRIBE, IGNORE, IMAGE, Example, PackedDataset
from dpo import Loss, Objective
from eval_pope import ask, calibration, measure, open_prompts, says_yes
from evals import chair
from evals.objects import Mention
from model import answer
from support.common import device_and_dtype, id_text, read_json
from support.hadpo import read_image_index
from support.questions import question_files, read_pope
from tiny.pictures import NAMES, STREAMS
from tiny.world import Shown, conversation, hallucinated, well_formed
from training.compressed import without_images

MAX_NEW_TOKENS = 40
HELD_OUT = NAMES[-4:]           # the classes of tiny.prepare's --held_out 4


def load(checkpoint):
    """A Llava whose only head is the checkpoint's, on this machine's device, in fp32."""
    device, _ = device_and_dtype(False)
    return load_one(Source([checkpoint]), device, torch.float32)


def questions_of(root, validation):
    """{split: POPE's rows}, the folder of their images, {image: what it shows}."""
    folder = os.path.join(root, "world", "val" if validation else "")
    files = question_files(os.path.join(folder, "pope"))
    truth = read_json(os.path.join(root, "world", "world.json"))
    return ({split: read_pope(path) for split, path in files.items()},
            os.path.join(folder, "coco", "val2014"),
            truth["validation" if validation else "evaluation"])


def asked(model, questions, image_folder, compressed=None):
    """{(image, question): (answer, yes-score)} of the only head. `compressed`: a folder for images
    that are then asked about in a second pass (training/compressed.py).
    """
    pairs = dict.fromkeys((q["image"], q["text"]) for rows in questions.values() for q in rows)
    by_image, dataset = open_prompts(model, list(pairs), image_folder, "hadpo")
    if compressed:
        dataset = without_images(compressed, dataset, model)
    said, = ask(model, (by_image, dataset), MAX_NEW_TOKENS).values()
    return said


def digits(rows, right):
    """How many of an image's questions are right, a digit an image, in the order of their names."""
    of_image = defaultdict(int)
    for q, is_right in zip(rows, right, strict=True):
        of_image[q["image"]] += bool(is_right)
    return "".join(str(of_image[image]) for image in sorted(of_image))


# ---- A checkpoint --------------------------------------------------------------------------------


def judge(root, checkpoint, validation, compressed=None):
    """Everything about one checkpoint, or a base → a line of results.jsonl. `compressed` as of
    `asked`.
    """
    questions, image_folder, truth = questions_of(root, validation)
    model = load(checkpoint)
    said = asked(model, questions, image_folder, compressed)
    numbers, right = {}, {}
    for split, rows in questions.items():
        of_split = measure(rows, said, split)
        numbers |= {f"{split}/{name}": of_split[name] for name in
                    ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc",
                     "best_threshold")}
        right[split] = digits(rows, [said_right(q, said) for q in rows])
    rows = questions["adversarial"]
    good = [well_formed(q["text"], said[q["image"], q["text"]][0]) for q in rows]
    held_out = [said_right(q, said) for q in rows if word_of(q) in HELD_OUT] or [0]
    numbers |= {"well_formed": 100 * np.mean(good), "held_out": 100 * np.mean(held_out)}
    numbers |= describe_all(model, image_folder, truth, compressed)
    numbers["nll"] = forgotten(model, image_folder, truth)
    return {"numbers": {name: round(float(value), 4) for name, value in numbers.items()},
            "right": right}


def said_right(q, said):
    return says_yes(said[q["image"], q["text"]][0]) == (q["label"] == "yes")


def describe_all(model, image_folder, truth, compressed=None):
    """CHAIR's numbers of a description of every image. A class counts once in a description."""
    conversations = [[(f"{IMAGE}\n{DESCRIBE[0]}", None)]]
    examples = [Example(os.path.join(image_folder, name), conversations) for name in truth]
    dataset = PackedDataset(examples, model.row_format())
    if compressed:
        dataset = without_images(compressed, dataset, model)
    answered = dict(answer(model, dataset, MAX_NEW_TOKENS, batch_size=64))
    judged = {}
    for i, (name, facts) in enumerate(truth.items()):
        text = answered[i][0][0][0]
        mentions = [Mention(word, 0, 0) for word in hallucinated(text, [])]
        judged[name] = chair.Judged(text, mentions, set(facts["objects"]))
    numbers = chair.measure(judged)
    return {"chair_i": numbers["chair_i"], "chair_s": numbers["chair_s"],
            "coverage": numbers["recall"], "words": numbers["words"]}


@torch.inference_mode()
def forgotten(model, image_folder, truth):
    """Mean negative log-likelihood of conversations like those that the base was trained on."""
    rng, examples = np.random.default_rng([len(truth), STREAMS.index("words")]), []
    for name, facts in truth.items():
        objects = [NAMES.index(word) for word in facts["objects"]]
        talk = conversation(rng, Shown(name, facts["scene"], objects))["conversations"]
        turns = [(q["value"], a["value"]) for q, a in zip(talk[::2], talk[1::2], strict=True)]
        examples.append(Example(os.path.join(image_folder, name), [turns]))
    dataset, head = PackedDataset(examples, model.row_format()), next(iter(model.heads.values()))
    objective, device = Objective(model.trunk, head, Loss("sft")), head.lm_head.weight.device
    total, count = 0.0, 0
    for start in range(0, len(examples), 64):
        batch = dataset[range(start, min(start + 64, len(examples)))].to(device)
        total -= float(objective.logps(head, objective.answer_states(batch), batch).sum())
        count += int((batch.target != IGNORE).sum())
    return total / count


# ---- The base, and what could be had without training --------------------------------------------


def judge_base(root, validation):
    """The base; with a threshold, one or one a class, fitted on validation images; and a linear
    probe on the tower's features, which tells what could be seen at all.
    """
    base = os.path.join(root, "base")
    lines = {"base": judge(root, base, validation)}
    if validation:
        return lines
    model = load(base)
    fitted, fit_folder, _ = questions_of(root, True)
    tested, test_folder, _ = questions_of(root, False)
    scores = [{key: score for key, (_, score) in asked(model, *where).items()}
              for where in ((fitted, fit_folder), (tested, test_folder))]
    lines["threshold"] = with_threshold(fitted, tested, scores, lambda q: "all")
    lines["class_threshold"] = with_threshold(fitted, tested, scores, word_of)
    seen = probe(model, root, (fit_folder, test_folder))
    scores = [{(q["image"], q["text"]): of_set[q["image"]][NAMES.index(word_of(q))]
               for rows in questions.values() for q in rows}
              for questions, of_set in zip((fitted, tested), seen, strict=True)]
    lines["probe"] = with_threshold(fitted, tested, scores, lambda q: "all")
    return lines


def word_of(q):
    """The class that a question asks about."""
    return q["text"].split()[3]


def with_threshold(fitted, tested, scores, group):
    """A line of what thresholds on yes-scores reach, one a split and a group of questions: fitted
    on one set, tested on the other.
    """
    numbers, right = {}, {}
    for split, rows in tested.items():
        of_group = defaultdict(list)
        for q in fitted[split]:
            of_group[group(q)].append((scores[0][q["image"], q["text"]], q["label"] == "yes"))
        limits = {name: best_threshold(*zip(*pairs, strict=True))
                  for name, pairs in of_group.items()}
        yes = [scores[1][q["image"], q["text"]] > limits.get(group(q), 0) for q in rows]
        right[split] = digits(rows, [said == (q["label"] == "yes")
                                     for said, q in zip(yes, rows, strict=True)])
        numbers[f"{split}/accuracy"] = 100 * sum(map(int, right[split])) / len(rows)
        numbers[f"{split}/yes_ratio"] = 100 * np.mean(yes)
        numbers[f"{split}/auc"] = calibration(rows, scores[1])["auc"]
    return {"numbers": {name: round(float(value), 4) for name, value in numbers.items()},
            "right": right}


def best_threshold(scores, labels):
    """The threshold with the most right answers; in the middle between two different scores."""
    order = np.argsort(scores)
    x, label = np.array(scores)[order], np.array(labels)[order]
    edges = np.concatenate(([x[0] - 1], (x[1:] + x[:-1]) / 2, [x[-1] + 1]))
    right = np.concatenate(([0], np.cumsum(~label))) + label.sum() - np.concatenate(
        ([0], np.cumsum(label)))
    possible = np.concatenate(([True], np.diff(x) > 0, [True]))
    return edges[np.where(possible, right, -1).argmax()]


def probe(model, root, folders, steps=600):
    """What one linear layer reads off the tower's features → [{image: logits of the classes}].

    It is trained on the preference images with everything that they show. Over the patches it takes
    something between mean and maximum, as an object fills few of them.
    """
    device = next(model.trunk.parameters()).device

    @torch.inference_mode()
    def features(paths):
        parts = [torch.stack([model.preprocess(path) for path in paths[start:start + 256]])
                 for start in range(0, len(paths), 256)]
        return torch.cat([model.trunk.vision_tower(part.to(device)) for part in parts]).clone()

    notes = read_json(os.path.join(root, "world", "preference.json"))
    index = read_image_index(os.path.join(root, "world", "VG"))
    shown = features([index[id_text(note["image_id"])] for note in notes])            # (N, P, C)
    there = torch.tensor([[word in note["objects"] for word in NAMES] for note in notes],
                         device=device).float()
    mean, std = shown.mean((0, 1)), shown.std((0, 1))
    torch.manual_seed(0)
    layer = torch.nn.Linear(shown.shape[-1], len(NAMES), device=device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(steps):
        some = torch.randint(len(shown), (512,), device=device)
        logits = layer((shown[some] - mean) / std).logsumexp(1)                     # (512, classes)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, there[some]).backward()
        optimizer.step()
    result = []
    for folder in folders:
        names = sorted(os.listdir(folder))
        with torch.no_grad():
            x = features([os.path.join(folder, name) for name in names])
            logits = layer((x - mean) / std).logsumexp(1)
        result.append(dict(zip(names, logits.cpu().numpy(), strict=True)))
    return result
