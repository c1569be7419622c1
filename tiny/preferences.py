"""Preference pairs of the tiny world: what a base said, and what it should have said.

    counts = write_preferences("out/world", said)                       # out/world/hadpo
    counts = write_preferences("out/world", said, Pairs(flipped=0.1), "noisy")

HA-DPO (arXiv 2311.16839) has its model's answers corrected by GPT-4, which knows the image from a
person's notes. Here the notes are complete, so the chosen answers are true, unless Pairs says
otherwise. What differs on purpose:

* HA-DPO trains only on questions that its model answered wrong. Our files hold all, and `correct`
  says which answers were right: there, the rejected answer is the opposite sentence.
* The chosen description is *repaired*: the base's own words up to the first object that is not
  there, then what is there and was not named yet. Text near the model's own and a change only where
  it first goes wrong is what AVES-DPO, OPA-DPO and SENTINEL (arXiv 2507.12455) found best at full
  size. A true description in other words teaches the words, too (docs/results.md).
"""
import os
from dataclasses import dataclass

import numpy as np

from checkpoints.weights import load_weights
from data import IMAGE, Example, PackedDataset
from model import answer as answers_to
from support.common import id_text, read_json, write_json
from support.hadpo import read_image_index
from support.outputs import Journal, digest
from tiny.pictures import NAMES, SCENES
from tiny.words import about
from tiny.world import answer, hallucinated, save, sentence

ASKED = 150             # images a second, on two cores
DESCRIBED = {
    "repaired": "the base's own words up to its first wrong object, then what is there",
    "true": "what is there, in the world's words",
    "deleted": "the base's words without the wrong objects",
    "none": "no descriptions at all",
}


@dataclass(frozen=True)
class Pairs:
    """Which pairs are made of a base's answers."""
    described: str = "repaired"    # what the chosen descriptions are, a name of DESCRIBED
    every: int = 1                 # each n-th image is described
    flipped: float = 0.0           # the share of questions whose chosen answer is the wrong one
    images: int = 0                # how many images have pairs; 0 = all
    held_out: int = 0              # so many classes, the last of NAMES, are in no pair


def write_preferences(root, answers, pairs=None, folder=None):
    """Write HA-DPO's two files of the world `root` from what a base said → {what: how many}.

    `answers`: {(image_id, question): sentence} for the questions and the `describe` prompt of each
    image in preference.json. `folder`: where the files go, default the world's own hadpo/.
    """
    notes = read_json(f"{root}/preference.json")
    return write_pairs(notes, answers, pairs or Pairs(), folder or f"{root}/hadpo")


def write_pairs(notes, answers, pairs, folder):
    """The same from notes of preference.json's form."""
    rng, pope, notes_used = np.random.default_rng(len(notes)), [], notes[:pairs.images or None]
    left_out = held_out(pairs)
    for note in notes_used:
        for q in note["questions"]:
            flip = rng.random() < pairs.flipped
            if q["word"] not in left_out:
                said = answers[note["image_id"], q["question"]].strip()
                pope.append(question_pair(note, q, said, flip))
    descriptions = description_pairs(notes_used, answers, pairs)
    save(f"{folder}/desc_data.json", descriptions)
    save(f"{folder}/pope_data.json", pope)
    wrong = sum(not row["correct"] for row in pope)
    return {"questions": len(pope), "wrong": wrong, "descriptions": len(descriptions)}


def as_said(notes, said):
    """The notes as a model tells them: what it said, {(image_id, question): sentence}, stands for
    what is there. Then chosen and rejected differ only in who said them.
    """
    told = []
    for note in notes:
        answers = [said[note["image_id"], q["question"]].strip() for q in note["questions"]]
        labels = ["yes" if text.lower().startswith("yes") else "no" for text in answers]
        description = said[note["image_id"], note["describe"]].strip()
        told.append(note | {
            "questions": [q | {"label": label}
                          for q, label in zip(note["questions"], labels, strict=True)],
            "description": description, "objects": hallucinated(description, [])})
    return told


def held_out(pairs):
    """The classes that are in no pair."""
    return set(NAMES[len(NAMES) - pairs.held_out:]) if pairs.held_out else set()


def description_pairs(notes, answers, pairs):
    """The rows of desc_data.json: of the images where what was said names a wrong object."""
    descriptions, left_out = {}, held_out(pairs)
    for note in notes:
        image_id = note["image_id"]
        said = answers[image_id, note["describe"]].strip() if "describe" in note else ""
        chosen = chosen_description(note, said, pairs)
        named = {*hallucinated(said, []), *note["objects"]}
        if chosen and hallucinated(said, note["objects"]) and not named & left_out:
            descriptions[str(image_id)] = {"chosen": [chosen], "rejected": [said]}
    return descriptions


def question_pair(note, q, said, flip):
    """A row of pope_data.json. `flip`: chosen and rejected change places."""
    there = q["label"] == "yes"
    correct = said.lower().startswith(q["label"])
    rejected = said if said and not correct else answer(q["word"], not there)
    row = {"image_id": note["image_id"], "question": q["question"], "answer": q["label"],
           "chosen": answer(q["word"], there), "correct": correct, "reject": rejected}
    if flip:
        other = answer(q["word"], not there)
        row |= {"answer": "no" if there else "yes", "chosen": other, "correct": not correct,
                "reject": answer(q["word"], there)}
    return row


def chosen_description(note, said, pairs):
    """What should have been said instead of `said`; "" where there is to be no pair."""
    if pairs.described == "none" or note["image_id"] % pairs.every:
        return ""
    if pairs.described == "true":
        return note["description"]
    named, there = hallucinated(said, []), note["objects"]
    wrong = [n for n, word in enumerate(named) if word not in there]
    if pairs.described == "deleted":
        kept, rest = [word for word in named if word in there], []
    else:
        kept = named[:wrong[0]] if wrong else named
        rest = [word for word in there if word not in kept]
    scene = next((word for word in said.split() if word in SCENES), note["scene"])
    words = [*kept, *rest]
    return sentence(scene, words) if words else ""


# ---- What the base says --------------------------------------------------------------------------


def answers_of(model, world, notes, folder, trained=None):
    """What a base says to the questions of preference.json's notes → {(image_id, question): text}.

    It is kept in folder/said.json and read from there. A journal in `world` keeps the answers until
    all are there. `trained`: {file: digest} of what was trained on the base, if it is not the base.
    """
    asked = [[*(q["question"] for q in note["questions"]), note["describe"]] for note in notes]
    asker = {"base": model.fingerprint, "questions": digest(asked)}
    asker, path = asker | ({"trained": trained} if trained else {}), f"{folder}/said.json"
    kept = read_json(path, dict) if os.path.isfile(path) else {}
    texts = kept.get("answers") if kept.get("of") == asker else None
    if texts is None:
        texts = ask_base(model, world, notes, asked, asker)
        os.makedirs(folder, exist_ok=True)
        write_json(path, {"of": asker, "answers": texts})
    return by_question(notes, asked, texts)


def by_question(notes, asked, texts):
    """[questions of each image], [texts of each image] → {(image_id, question): text}."""
    return {(note["image_id"], question): text
            for note, questions, answers in zip(notes, asked, texts, strict=True)
            for question, text in zip(questions, answers, strict=True)}


def ask_base(model, world, notes, asked, asker):
    """The base's greedy answers to [questions of each image], [texts of each image]."""
    load_weights(model.trunk)
    images = read_image_index(os.path.join(world, "VG"))
    examples = [Example(images[id_text(note["image_id"])],
                        [[(f"{IMAGE}\n{question}", None)] for question in questions])
                for note, questions in zip(notes, asked, strict=True)]
    dataset, journal = PackedDataset(examples, model.row_format()), Journal(world, asker)
    texts = {row["image"]: row["answers"] for row in journal.read()}
    rest = [i for i in range(len(notes)) if i not in texts]
    print(f"asking the model about {len(rest):,} images: its mistakes become preference pairs "
          f"(once, {about(len(rest) / ASKED)} on two cores)", flush=True)
    with journal.kept_on_interrupt(len(notes), "images"):
        for i, [(answers, _)] in answers_to(model, dataset, 40, 64, rest):      # of the only head
            texts[i] = answers
            journal.add({"image": i, "answers": answers})
    journal.remove()
    return [texts[i] for i in range(len(notes))]


def say_mined(counts):
    mined = ", ".join(f"{n:,} {what}" for what, n in counts.items())
    print(f"preference data mined from the base's own answers: {mined}", flush=True)
