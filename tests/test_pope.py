"""POPE's counting rule, the join of answers and questions, AUC and the best threshold.

`counted` is POPE's published evaluation written again, string by string: it replaces whole answers by yes and no, then
compares the two lists element by element.
"""
import argparse
import glob
import json
import os
import random

import pytest
from conftest import ROOT, largest_difference, shell, succeeds

from data import InputError
from eval_pope import SPLITS, calibration, says_yes, score, score_file, table
from readers import read_json

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


POPE = os.environ.get("POPE", os.path.join(ROOT, "..", "shared", "pope"))
SHARED = sorted(glob.glob(os.path.join(POPE, "*", "coco_pope_*.json")))


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


# ---------------------------------------------------------------------------------------------------------------------
# Files of answers

SUFFIX = "\nAnswer the question using a single word or phrase."


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def label_files(folder):
    """Three small label files as POPE's: ids begin at 1 in each, and every "yes" question stands in all of them."""
    folder.mkdir()
    for kind, split in enumerate(SPLITS.values()):
        write_lines(folder / f"coco_pope_{split}.json", [
            {"question_id": 1 + i, "image": f"COCO_{i // 6}.jpg", "label": "no" if i % 2 else "yes",
             "text": f"Is there a {f'{split[0]}{(i + i * kind) % 60}' if i % 2 else f'thing{i % 6}'} in the image?"}
            for i in range(120)])
    return str(folder)


def read_labels(folder):
    return {split: read_json(os.path.join(folder, f"coco_pope_{split}.json"), lines=True) for split in SPLITS.values()}


def with_image(labels, rng, **more):
    """Our form, all splits in one file. → rows of the file, {split: [(answer, label), ...]}"""
    said = {(q["image"], q["text"]): made_up_answer(rng) for rows in labels.values() for q in rows}
    return ([{"image": image, "question": question, "answer": text} | more for (image, question), text in said.items()],
            {split: [(said[q["image"], q["text"]], q["label"]) for q in rows] for split, rows in labels.items()})


def without_image(questions, rng):
    """The original HA-DPO's form, a file per split. → rows, [(answer, label), ...]"""
    rows = [{"question": q["text"], "answer": made_up_answer(rng), "question_id": q["question_id"]} for q in questions]
    return rows, [(row["answer"], q["label"]) for row, q in zip(rows, questions)]


def like_llava(labels, rng):
    """LLaVA's form: one question may be answered differently in two splits. → question file, rows, {split: [(answer, label)]}"""
    asked, rows, pairs = [], [], {}
    for n, (split, questions) in enumerate(labels.items()):
        pairs[split] = []
        for q in questions:
            number, text = n * 10_000_000 + q["question_id"], q["text"] + SUFFIX
            asked.append({"question_id": number, "image": q["image"], "text": text, "category": split})
            rows.append({"question_id": number, "prompt": text, "text": made_up_answer(rng), "answer_id": "x"})
            pairs[split].append((rows[-1]["text"], q["label"]))
    return asked, rows, pairs


def scored(answers, pope, question_file=None, splits=tuple(SPLITS)):
    """score_file's numbers per split."""
    metrics = score_file(argparse.Namespace(score=answers, pope_path=pope, question_file=question_file, set=splits))
    return {split: model[os.path.basename(answers)] for split, model in metrics.items()}


def agrees(ours, pairs):
    """With the transcription of POPE's rule, in counts and percentages. → how many answers were compared"""
    counts, numbers = counted(pairs)
    assert {name: ours[name] for name in counts} == counts
    assert largest_difference("in percent", [ours[name] for name in numbers], [100 * x for x in numbers.values()]) < 1e-9
    return len(pairs)


@pytest.mark.parametrize("version", ["made up", "current", "llava_2023"])
@pytest.mark.parametrize("form", ["image", "id", "llava"])
def test_files_of_answers(tmp_path, version, form):
    """10,000 random answers in each form on each question set, with all lines shuffled, against POPE's rule."""
    pope = label_files(tmp_path / "made up") if version == "made up" else os.path.join(POPE, version)
    if not os.path.isdir(pope):
        pytest.skip(f"{pope} is absent; the environment variable POPE names the folder")
    labels, rng, compared = read_labels(pope), random.Random(3), 0
    while compared < (360 if version == "made up" else 10_000):
        if form == "image":
            rows, pairs = with_image(labels, rng)
            ours = scored(write_lines(tmp_path / "a.jsonl", rng.sample(rows, len(rows))), pope)
        elif form == "llava":
            asked, rows, pairs = like_llava(labels, rng)
            question_file = write_lines(tmp_path / "questions.jsonl", rng.sample(asked, len(asked)))
            ours = scored(write_lines(tmp_path / "a.jsonl", rng.sample(rows, len(rows))), pope, question_file)
        else:
            ours, pairs = {}, {}
            for split, questions in labels.items():
                rows, pairs[split] = without_image(questions, rng)
                ours |= (found := scored(write_lines(tmp_path / "a.jsonl", rng.sample(rows, len(rows))), pope))
                assert list(found) == [split]                               # found out, though all three were looked at
        assert set(ours) == set(labels) and "auc" not in ours["random"]
        compared += sum(agrees(ours[split], pairs[split]) for split in labels)


def test_real_answers_of_llava(capsys):
    """LLaVA-1.5-7B's own answers: adversarial F1 is 84.2 as published, and what is lacking is not scored."""
    answers, questions = os.path.join(POPE, "llava_v1.5_7b_answers_partial.jsonl"), os.path.join(POPE, "llava_pope_test.jsonl")
    if not os.path.isfile(answers):
        pytest.skip(f"{answers} is absent; the environment variable POPE names the folder")
    metrics = scored(answers, os.path.join(POPE, "llava_2023"), questions)
    said = capsys.readouterr().out
    assert list(metrics) == ["adversarial"] and f"{metrics['adversarial']['f1']:.1f}" == "84.2"
    assert "random: incomplete, 2,712 of 2,910 questions answered, not scored\npopular: no answers\n" in said
    asked = {q["question_id"]: q for q in read_json(questions, lines=True)}
    label = {(q["image"], q["text"]): q["label"] for q in read_labels(os.path.join(POPE, "llava_2023"))["adversarial"]}
    pairs = [(row["text"], asked[row["question_id"]]) for row in read_json(answers, lines=True)]
    agrees(metrics["adversarial"], [(text, label[q["image"], q["text"].removesuffix(SUFFIX)])
                                    for text, q in pairs if q["category"] == "adversarial"])
    with pytest.raises(InputError, match="answers no split"):                # today's label files have 58 other questions
        scored(answers, os.path.join(POPE, "current"), questions)
    assert "adversarial: incomplete, 2,942 of 3,000 questions" in capsys.readouterr().out


def test_real_label_files_told_apart(tmp_path):
    """In llava_2023, 109 pairs of id and question are the same in random and adversarial, 100 of them about other images."""
    pope = os.path.join(POPE, "llava_2023")
    if not os.path.isdir(pope):
        pytest.skip(f"{pope} is absent; the environment variable POPE names the folder")
    labels = read_labels(pope)
    other = {(q["question_id"], q["text"]): q["image"] for q in labels["adversarial"]}
    twins = [q for q in labels["random"] if other.get((q["question_id"], q["text"]), q["image"]) != q["image"]]
    assert len(twins) == 100
    path = write_lines(tmp_path / "a.jsonl", without_image(twins, random.Random(0))[0])
    with pytest.raises(InputError, match="100 in random, .*100 in adversarial"):
        scored(path, pope)
    with pytest.raises(InputError, match="answers no split"):                # said which, but not all are there
        scored(path, pope, splits=["random"])


@pytest.fixture
def labels(tmp_path):
    return read_labels(label_files(tmp_path / "pope"))


def test_incomplete_and_absent_splits(tmp_path, labels, capsys):
    pope, rng = str(tmp_path / "pope"), random.Random(4)
    asked, rows, pairs = like_llava(labels, rng)
    question_file = write_lines(tmp_path / "questions.jsonl", asked)
    part = write_lines(tmp_path / "a.jsonl", rows[:200])                       # random, and 80 of popular
    agrees(scored(part, pope, question_file)["random"], pairs["random"])
    said = capsys.readouterr().out
    assert "popular: incomplete, 80 of 120 questions answered, not scored\nadversarial: no answers\n" in said
    assert "AUC" not in said and "| a.jsonl |" in said
    with pytest.raises(InputError, match="answers no split"):
        scored(part, pope, question_file, ["popular", "adv"])

    rows, pairs = with_image({"random": labels["random"]}, rng)                # its yes-questions are popular's too
    path = write_lines(tmp_path / "b.jsonl", rows)
    assert list(scored(path, pope)) == ["random"]
    shared = len({(q["image"], q["text"]) for q in labels["random"]} & {(q["image"], q["text"]) for q in labels["popular"]})
    assert 0 < shared < 120 and f"popular: incomplete, {shared} of 120" in capsys.readouterr().out

    rows, _ = without_image(labels["adversarial"], rng)
    with pytest.raises(InputError, match="answers no split"):
        scored(write_lines(tmp_path / "c.jsonl", rows[:-1]), pope)
    assert "random: no answers" in (said := capsys.readouterr().out) and "adversarial: incomplete, 119 of 120" in said


def test_yes_scores_bring_their_columns(tmp_path, labels, capsys):
    rows, _ = with_image(labels, random.Random(5))
    yes = {(q["image"], q["text"]) for q in labels["random"] if q["label"] == "yes"}
    rows = [row | {"yes_score": 1.5 if (row["image"], row["question"]) in yes else -2} for row in rows]
    ours = scored(write_lines(tmp_path / "a.jsonl", rows), str(tmp_path / "pope"))
    assert ours["random"]["auc"] == ours["random"]["best_threshold"] == 100 and "AUC" in capsys.readouterr().out
    del rows[7]["yes_score"]
    assert "auc" not in scored(write_lines(tmp_path / "a.jsonl", rows), str(tmp_path / "pope"))["random"]


def test_repeated_lines(tmp_path, labels):
    """Twice the same is the same; two different answers to one question are refused, with the row."""
    pope, (rows, pairs) = str(tmp_path / "pope"), without_image(labels["popular"], random.Random(6))
    agrees(scored(write_lines(tmp_path / "a.jsonl", rows + rows[:9]), pope)["popular"], pairs)
    again = rows[4] | {"answer": rows[4]["answer"] + " indeed"}
    with pytest.raises(InputError, match="a.jsonl, row 120: .*answered otherwise in a row before; remove"):
        scored(write_lines(tmp_path / "a.jsonl", rows + [again]), pope)


def test_answers_of_other_questions(tmp_path, labels, capsys):
    """Nothing is zipped: what does not fit is counted, and refused where only an id could say what was meant."""
    pope, rng = str(tmp_path / "pope"), random.Random(7)
    asked, rows, _ = like_llava(labels, rng)
    question_file = write_lines(tmp_path / "questions.jsonl", asked)
    moved = [row | {"question_id": row["question_id"] + 2} for row in rows]
    with pytest.raises(InputError, match=r"a.jsonl: of 360 questions .* match 0 in .*questions.jsonl \(row 0 in none\)"):
        scored(write_lines(tmp_path / "a.jsonl", moved), pope, question_file)
    restart = [q | {"question_id": q["question_id"] % 10_000_000} for q in asked]      # yes-questions: one name, three splits
    with pytest.raises(InputError, match="of 120 questions"):
        scored(write_lines(tmp_path / "a.jsonl", rows[:120]), pope, write_lines(tmp_path / "restart.jsonl", restart))
    with pytest.raises(InputError, match="--question_file names the file"):
        scored(str(tmp_path / "a.jsonl"), pope)

    three = [row for questions in labels.values() for row in without_image(questions, random.Random(8))[0]]
    with pytest.raises(InputError, match="one must have all: score each split's file alone"):
        scored(write_lines(tmp_path / "a.jsonl", three), pope)
    alone = three[:120]
    with pytest.raises(InputError, match=r"of 120 questions without an image, .*\d+ in popular \(row 1 in none\)"):
        scored(write_lines(tmp_path / "a.jsonl", alone), pope, splits=["popular"])
    with pytest.raises(InputError, match="'question_id' should be"):
        scored(write_lines(tmp_path / "a.jsonl", [{"question": "Is there a dog?", "answer": "No"}]), pope)

    rows, _ = with_image({"random": labels["random"]}, rng)
    for row in rows[:5]:
        row["image"] = "COCO_of_another_version.jpg"
    with pytest.raises(InputError, match="answers no split"):
        scored(write_lines(tmp_path / "a.jsonl", rows), pope, splits=["random"])
    said = capsys.readouterr().out
    assert "random: incomplete, 115 of 120" in said and "5 answers are to questions of none of these label files" in said


BROKEN = {"a.jsonl, row 2: not readable as JSON": lambda lines: lines[:2] + [lines[2][:-4]] + lines[3:],
          "a.jsonl, row 3: 'answer' should be str and is 5": lambda lines:
              lines[:3] + [lines[3].replace('"answer": ', '"answer": 5, "was": ')],
          "a.jsonl, row 1: 'question_id' should be": lambda lines: [lines[0], "7"],
          "a.jsonl, row 0: ": lambda lines: ["[]"],
          "a.jsonl, row 0: 'yes_score' should be": lambda lines: [lines[0][:-1] + ', "yes_score": "high"}'],
          "a.jsonl: is empty": lambda lines: []}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_lines(tmp_path, labels, message):
    lines = [json.dumps(row) for row in without_image(labels["random"], random.Random(9))[0]]
    (tmp_path / "a.jsonl").write_text("\n".join(BROKEN[message](lines)))
    with pytest.raises(InputError, match=message):
        scored(str(tmp_path / "a.jsonl"), str(tmp_path / "pope"))


def test_typed_by_a_user(tmp_path, labels):
    """Exit code 0 with a table where a split is complete; else 1, the counts and one line of error, and no traceback."""
    rows, pairs = without_image(labels["adversarial"], random.Random(10))
    command = ["python", os.path.join(ROOT, "eval_pope.py"), "--pope_path", tmp_path / "pope", "--score"]
    said = succeeds(*command, write_lines(tmp_path / "a.jsonl", rows))
    assert f" {counted(pairs)[0]['tp']} |" in said and "random: no answers" in said
    done = shell(*command, write_lines(tmp_path / "a.jsonl", rows[1:]))
    assert done.returncode == 1 and "adversarial: incomplete, 119 of 120" in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "name the checkpoints to ask" in shell("python", command[1]).stderr
