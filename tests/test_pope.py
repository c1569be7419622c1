"""POPE's counting rule, the join of answers and questions, AUC and the best threshold.

`counted` is POPE's published evaluation written again, string by string: it replaces whole answers by yes and no, then
compares the two lists element by element.
"""
import glob
import os
import random

import pytest
from conftest import ROOT, largest_difference

from data import InputError, read_json
from eval_pope import calibration, says_yes, score, table

SAYINGS = {  # answer: does POPE's rule read it as yes?
    "Yes": True, "yes": True, "Yes, there is a dog in the image.": True, "No": False, "no": False,
    "No, there is no dog in the image.": False, "No.": False, "no, not at all": False, "There is not a dog": False,
    "": True, " ": True, "None": True, "Nothing": True, "Not": True, "NO": True, "nO": True, "NOT": True,    # these exact three words
    "I do not know": False, "I cannot see one": True, "I don't know": True, "no-one": True, "know": True, "Nobody": True,
    "Yes. There is no dog.": True,                                               # only up to the first full stop
    ".No": True, "...": True, "e.g. no": True, "3.5 no": True, "No.5": False,
    "N,o": False, "No,": False, ",no,": False, "yes,no": True, "yes, no": False,  # commas vanish, words may merge
    "No!": True, "No?": True, "No\n": True, "yes\nno": True, "\nno": True, "  no  ": False, "No\tdog": True,  # spaces alone divide
    "否": True, "Yes and not": False, "The answer is No": False, "“No”": True,
}


@pytest.mark.parametrize("text", SAYINGS)
def test_odd_answers(text):
    assert says_yes(text) is SAYINGS[text]


def counted(pairs):
    """[(answer, label), ...] → TP, FP, TN, FN, and POPE's numbers as fractions."""
    first = [" " + text.partition(".")[0].replace(",", "") + " " for text, _ in pairs]
    predicted = ["no" if " No " in text or " not " in text or " no " in text else "yes" for text in first]
    labels = [label for _, label in pairs]
    both = list(zip(predicted, labels))
    tp, fp, tn, fn = (both.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return dict(tp=tp, fp=fp, tn=tn, fn=fn), dict(accuracy=(tp + tn) / len(pairs), precision=precision, recall=recall,
                                                  f1=2 * precision * recall / (precision + recall), yes_ratio=predicted.count("yes") / len(pairs))


def made_up_questions(n, seed=0):
    rng = random.Random(seed)
    return [{"image": f"COCO_{i // 6}.jpg", "text": f"Is there a thing{i % 6} in the image?", "label": rng.choice(["yes", "no", "no"])} for i in range(n)]


def made_up_answer(rng):
    words = ["Yes", "yes", "No", "no", "not", "Not", "NO", "there", "is", "a", "dog", "know", "None", "nothing"]
    ends = [" ", " ", " ", ",", ", ", ".", ". ", "\n", "", "  "]
    return "".join(rng.choice(words) + rng.choice(ends) for _ in range(rng.randrange(7)))


SHARED = sorted(glob.glob(os.path.join(ROOT, "..", "shared", "pope", "*", "coco_pope_*.json")))


@pytest.mark.parametrize("path", [None, *SHARED], ids=lambda p: "/".join(p.split(os.sep)[-2:]) if p else "made up")
def test_counting_rule(path):
    """10,000 made-up answers against the transcription; questions made up, and both published sets where they lie here."""
    questions = read_json(path, lines=True) if path else made_up_questions(10_000)
    rng, compared, worst = random.Random(1), 0, 0
    while compared < 10_000:
        answers = {(q["image"], q["text"]): made_up_answer(rng) for q in questions}
        ours = score(questions, answers)
        counts, numbers = counted([(answers[q["image"], q["text"]], q["label"]) for q in questions])
        assert {name: ours[name] for name in counts} == counts and min(counts.values()) > 50
        worst = max(worst, largest_difference("in percent", [ours[name] for name in numbers], [100 * x for x in numbers.values()]))
        compared += len(questions)
    assert worst < 1e-9


def test_nothing_but_yes_or_no():
    """Divisions by nothing are 0 and no crash."""
    questions = made_up_questions(60)
    labels = [q["label"] for q in questions]
    everything = {(q["image"], q["text"]): "Yes" for q in questions}
    result = score(questions, everything)
    assert result["recall"] == 100 and result["yes_ratio"] == 100 and result["tn"] == result["fn"] == 0
    nothing = score(questions, dict.fromkeys(everything, "No"))
    assert nothing["precision"] == nothing["recall"] == nothing["f1"] == nothing["yes_ratio"] == 0
    assert nothing["accuracy"] == 100 * labels.count("no") / 60


def test_answers_are_joined_not_zipped():
    """The same answers in another order give the same table; the same answers for other questions give none."""
    questions, rng = made_up_questions(600), random.Random(2)
    answers = {(q["image"], q["text"]): made_up_answer(rng) for q in questions}
    expected = score(questions, answers)
    shuffled = list(answers.items())
    rng.shuffle(shuffled)
    assert score(questions, dict(shuffled)) == expected
    assert score(rng.sample(questions, len(questions)), answers) == expected
    zipped = dict(zip(answers, [text for _, text in shuffled]))
    assert score(questions, zipped) != expected                                  # so the order would have mattered
    for key in shuffled[:7]:
        del answers[key[0]]
    with pytest.raises(InputError, match="adversarial: 7 of 600 questions have no answer"):
        score(questions, answers, "adversarial")


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_best_threshold(seed):
    """Against all pairs and all thresholds, with many ties among the scores."""
    questions, rng = made_up_questions(90, seed), random.Random(seed)
    scores = {(q["image"], q["text"]): rng.randrange(12) + 3 * (q["label"] == "yes") for q in questions}
    yes = [scores[q["image"], q["text"]] for q in questions if q["label"] == "yes"]
    no = [scores[q["image"], q["text"]] for q in questions if q["label"] == "no"]
    auc = sum((y > n) + (y == n) / 2 for y in yes for n in no) / (len(yes) * len(no))
    best = max(sum(y > t for y in yes) + sum(n <= t for n in no) for t in range(-1, 16)) / 90
    ours = calibration(questions, scores)
    assert largest_difference("AUC, best threshold", [ours["auc"], ours["best_threshold"]], [100 * auc, 100 * best]) < 1e-9


def test_no_threshold_divides_equal_scores():
    """All questions score the same, and those with the label no happen to stand first: nothing can tell them apart."""
    questions = sorted(made_up_questions(90), key=lambda q: q["label"])
    no = sum(q["label"] == "no" for q in questions)
    assert calibration(questions, {(q["image"], q["text"]): 0.5 for q in questions}) == {"auc": 50, "best_threshold": 100 * max(no, 90 - no) / 90}


def test_table_flags_a_model_that_leans():
    row = dict(accuracy=50., precision=50., recall=100., f1=66.67, yes_ratio=100., tp=3, fp=3, tn=0, fn=0, auc=50., best_threshold=50.)
    text = table({"random": {"base": row, "better": row | {"yes_ratio": 52.}}}, {"random": 50.})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "100.00 (!)" in lines["base"] and "(!)" not in lines["better"]
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {13}
