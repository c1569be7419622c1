"""POPE's counting rule, the join of answers and questions, AUC and the best threshold.

`counted` is POPE's published evaluation written again, string by string: it replaces whole answers
by yes and no, then compares the two lists element by element.
"""
import argparse
import glob
import json
import os
import random

import pytest
from conftest import largest_difference
from programs import ROOT
from small_files import QUESTIONS, assert_names_the_fault, changed, write_files

from eval_pope import calibration, read_pope, says_yes, score, table
from support.common import InputError, read_json
from support.questions import SPLITS, split_name

SAYINGS = {  # answer: does POPE's rule read it as yes?
    "Yes": True, "yes": True, "Yes, there is a dog in the image.": True, "No": False, "no": False,
    "No, there is no dog in the image.": False, "No.": False, "no, not at all": False,
    "There is not a dog": False, "": True, " ": True,
    # These exact three words mean no.
    "None": True, "Nothing": True, "Not": True, "NO": True, "nO": True, "NOT": True,
    "I do not know": False, "I cannot see one": True, "I don't know": True, "no-one": True,
    "know": True, "Nobody": True,
    # Only up to the first full stop.
    "Yes. There is no dog.": True, ".No": True, "...": True, "e.g. no": True, "3.5 no": True,
    "No.5": False,
    # Commas vanish, words may merge.
    "N,o": False, "No,": False, ",no,": False, "yes,no": True, "yes, no": False,
    # Spaces alone divide.
    "No!": True, "No?": True, "No\n": True, "yes\nno": True, "\nno": True, "  no  ": False,
    "No\tdog": True, "否": True, "Yes and not": False, "The answer is No": False, "“No”": True,
}


@pytest.mark.parametrize("text", SAYINGS)
def test_odd_answers(text):
    assert says_yes(text) is SAYINGS[text]


def counted(pairs):
    """[(answer, label), ...] → TP, FP, TN, FN, and POPE's numbers as fractions."""
    first = [" " + text.partition(".")[0].replace(",", "") + " " for text, _ in pairs]
    predicted = ["no" if " No " in text or " not " in text or " no " in text else "yes"
                 for text in first]
    labels = [label for _, label in pairs]
    both = list(zip(predicted, labels, strict=True))
    tp, fp = both.count(("yes", "yes")), both.count(("yes", "no"))
    tn, fn = both.count(("no", "no")), both.count(("no", "yes"))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    fractions = dict(accuracy=(tp + tn) / len(pairs), precision=precision, recall=recall,
                     f1=2 * precision * recall / (precision + recall),
                     yes_ratio=predicted.count("yes") / len(pairs))
    return dict(tp=tp, fp=fp, tn=tn, fn=fn), fractions


def made_up_questions(n, seed=0):
    rng = random.Random(seed)
    return [{"image": f"COCO_{i // 6}.jpg", "text": f"Is there a thing{i % 6} in the image?",
             "label": rng.choice(["yes", "no", "no"])}
            for i in range(n)]


def made_up_answer(rng):
    words = ["Yes", "yes", "No", "no", "not", "Not", "NO", "there", "is", "a", "dog", "know",
             "None", "nothing"]
    ends = [" ", " ", " ", ",", ", ", ".", ". ", "\n", "", "  "]
    return "".join(rng.choice(words) + rng.choice(ends) for _ in range(rng.randrange(7)))


POPE = os.environ.get("POPE", os.path.join(ROOT, "..", "shared", "pope"))
SHARED = sorted(glob.glob(os.path.join(POPE, "*", "coco_pope_*.json")))


def last_two_parts(path):
    return "/".join(path.split(os.sep)[-2:]) if path else "made up"


@pytest.mark.parametrize("path", [None, *SHARED], ids=last_two_parts)
def test_counting_rule(path):
    """10,000 made-up answers against the transcription; questions made up, and both published sets
    where they lie here.
    """
    questions = read_json(path, lines=True) if path else made_up_questions(10_000)
    rng, compared, worst = random.Random(1), 0, 0
    while compared < 10_000:
        answers = {(q["image"], q["text"]): made_up_answer(rng) for q in questions}
        ours = score(questions, answers)
        pairs = [(answers[q["image"], q["text"]], q["label"]) for q in questions]
        counts, fractions = counted(pairs)
        assert {name: ours[name] for name in counts} == counts and min(counts.values()) > 50
        percent = [100 * x for x in fractions.values()]
        difference = largest_difference("in percent", [ours[name] for name in fractions], percent)
        worst = max(worst, difference)
        compared += len(questions)
    assert worst < 1e-9


def test_nothing_but_yes_or_no():
    """Divisions by nothing are 0 and no crash."""
    questions = made_up_questions(60)
    labels = [q["label"] for q in questions]
    everything = {(q["image"], q["text"]): "Yes" for q in questions}
    result = score(questions, everything)
    assert [result[name] for name in ("recall", "yes_ratio", "tn", "fn")] == [100, 100, 0, 0]
    nothing = score(questions, dict.fromkeys(everything, "No"))
    assert [nothing[name] for name in ("precision", "recall", "f1", "yes_ratio")] == [0] * 4
    assert nothing["accuracy"] == 100 * labels.count("no") / 60


def test_answers_are_joined_not_zipped():
    """The same answers in another order give the same table; the same answers for other questions
    give none.
    """
    questions, rng = made_up_questions(600), random.Random(2)
    answers = {(q["image"], q["text"]): made_up_answer(rng) for q in questions}
    expected = score(questions, answers)
    shuffled = list(answers.items())
    rng.shuffle(shuffled)
    assert score(questions, dict(shuffled)) == expected
    assert score(rng.sample(questions, len(questions)), answers) == expected
    zipped = dict(zip(answers, [text for _, text in shuffled], strict=True))
    assert score(questions, zipped) != expected                # so the order would have mattered
    for key in shuffled[:7]:
        del answers[key[0]]
    with pytest.raises(InputError, match="adversarial: 7 of 600 questions have no answer"):
        score(questions, answers, "adversarial")


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_best_threshold(seed):
    """Against all pairs and all thresholds, with many ties among the scores."""
    questions, rng = made_up_questions(90, seed), random.Random(seed)
    scores = {(q["image"], q["text"]): rng.randrange(12) + 3 * (q["label"] == "yes")
              for q in questions}
    yes = [scores[q["image"], q["text"]] for q in questions if q["label"] == "yes"]
    no = [scores[q["image"], q["text"]] for q in questions if q["label"] == "no"]
    auc = sum((y > n) + (y == n) / 2 for y in yes for n in no) / (len(yes) * len(no))
    best = max(sum(y > t for y in yes) + sum(n <= t for n in no) for t in range(-1, 16)) / 90
    ours = calibration(questions, scores)
    ours = [ours["auc"], ours["best_threshold"]]
    assert largest_difference("AUC, best threshold", ours, [100 * auc, 100 * best]) < 1e-9


def test_no_threshold_divides_equal_scores():
    """All questions score the same, and those with the label no happen to stand first: nothing can
    tell them apart.
    """
    questions = sorted(made_up_questions(90), key=lambda q: q["label"])
    no = sum(q["label"] == "no" for q in questions)
    equal = {(q["image"], q["text"]): 0.5 for q in questions}
    expected = {"auc": 50, "best_threshold": 100 * max(no, 90 - no) / 90}
    assert calibration(questions, equal) == expected


def test_table_flags_a_model_that_leans():
    row = dict(accuracy=50., precision=50., recall=100., f1=66.67, yes_ratio=100.,
               tp=3, fp=3, tn=0, fn=0, auc=50., best_threshold=50.)
    text = table({"random": {"base": row, "better": row | {"yes_ratio": 52.}}})
    lines = {line.split("|")[1].strip(): line
             for line in text.splitlines() if line.startswith("| ")}
    assert "(labels: 50.0 % yes)" in text
    assert "100.00 (!)" in lines["base"] and "(!)" not in lines["better"]
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {13}


# ---- Question files ------------------------------------------------------------------------------


def test_a_split_has_two_names():
    assert split_name("adv") == split_name("adversarial") == "adv"
    assert split_name("random") == "random"
    with pytest.raises(argparse.ArgumentTypeError, match="'adverse': choose from .*adversarial"):
        split_name("adverse")


@pytest.mark.parametrize("folder", ("", "output/coco", "coco"))
def test_pope_files_are_found(tmp_path, folder):
    os.makedirs(tmp_path / folder, exist_ok=True)
    write_files(tmp_path / folder)
    assert read_pope(str(tmp_path), "random") == QUESTIONS
    with pytest.raises(InputError, match="holds no coco_pope_popular.json"):
        read_pope(str(tmp_path), "popular")


def test_questions_of_the_tiny_world(world):
    assert all(len(read_pope(world.pope, split)) == 12 * 6 for split in SPLITS.values())


BAD = {  # what is wrong: (the file, what the message says besides the file's name)
    "questions cut": (json.dumps(QUESTIONS[0])[:30], "char|column"),
    "label is neither": (changed(QUESTIONS, 0, "label", value="maybe"), "row 0.*maybe"),
    "question without text": (changed(QUESTIONS, 0, "text", value=None), "row 0.*text"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path, what):
    content, place = BAD[what]
    path = write_files(tmp_path, coco_pope_random=content)["coco_pope_random"]
    assert_names_the_fault(lambda: read_pope(str(tmp_path), "random"), path, place)
