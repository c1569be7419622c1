"""evals/score.py: answers that exist already, in all three forms, against POPE's rule.

`counted` of test_pope.py is that rule, written again.
"""
import argparse
import json
import os
import random

import pytest
from conftest import largest_difference
from programs import shell, succeeds
from test_pope import POPE, counted, made_up_answer

from evals.score import score_file
from support.common import InputError, read_json
from support.questions import SPLITS

SUFFIX = "\nAnswer the question using a single word or phrase."


# ---- Made-up files -------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def label_files(folder):
    """Three small label files as POPE's: ids begin at 1 in each, and every "yes" question stands in
    all of them.
    """
    folder.mkdir()
    for kind, split in enumerate(SPLITS.values()):
        rows = []
        for i in range(120):
            thing = f"{split[0]}{(i + i * kind) % 60}" if i % 2 else f"thing{i % 6}"
            rows.append({"question_id": 1 + i, "image": f"COCO_{i // 6}.jpg",
                         "label": "no" if i % 2 else "yes",
                         "text": f"Is there a {thing} in the image?"})
        write_lines(folder / f"coco_pope_{split}.json", rows)
    return str(folder)


def read_labels(folder):
    return {split: read_json(os.path.join(folder, f"coco_pope_{split}.json"), lines=True)
            for split in SPLITS.values()}


def with_image(labels, rng):
    """Our form, all splits in one file. → rows of the file, {split: [(answer, label), ...]}"""
    said = {(q["image"], q["text"]): made_up_answer(rng) for rows in labels.values() for q in rows}
    rows = [{"image": image, "question": question, "answer": text}
            for (image, question), text in said.items()]
    return rows, {split: [(said[q["image"], q["text"]], q["label"]) for q in questions]
                  for split, questions in labels.items()}


def without_image(questions, rng):
    """The original HA-DPO's form, a file per split. → rows, [(answer, label), ...]"""
    rows = [{"question": q["text"], "answer": made_up_answer(rng), "question_id": q["question_id"]}
            for q in questions]
    return rows, [(row["answer"], q["label"]) for row, q in zip(rows, questions, strict=True)]


def like_llava(labels, rng):
    """LLaVA's form: one question may be answered differently in two splits.

    → question file, rows, {split: [(answer, label)]}
    """
    asked, rows, pairs = [], [], {}
    for n, (split, questions) in enumerate(labels.items()):
        pairs[split] = []
        for q in questions:
            number, text = n * 10_000_000 + q["question_id"], q["text"] + SUFFIX
            asked.append({"question_id": number, "image": q["image"], "text": text,
                          "category": split})
            rows.append({"question_id": number, "prompt": text, "text": made_up_answer(rng),
                         "answer_id": "x"})
            pairs[split].append((rows[-1]["text"], q["label"]))
    return asked, rows, pairs


def scored(answers, pope, question_file=None, splits=tuple(SPLITS)):
    """score_file's numbers per split."""
    metrics = score_file(argparse.Namespace(answers=answers, pope_path=pope,
                                            question_file=question_file, set=splits))
    return {split: model[os.path.basename(answers)] for split, model in metrics.items()}


def assert_agrees(ours, pairs):
    """With the transcription of POPE's rule, in counts and percentages."""
    counts, fractions = counted(pairs)
    assert {name: ours[name] for name in counts} == counts
    percent = [100 * x for x in fractions.values()]
    assert largest_difference("in percent", [ours[name] for name in fractions], percent) < 1e-9


def shuffled(rows, rng):
    return rng.sample(rows, len(rows))


@pytest.mark.parametrize("version", ["made up", "current", "llava_2023"])
@pytest.mark.parametrize("form", ["image", "id", "llava"])
def test_files_of_answers(tmp_path, version, form):
    """10,000 random answers in each form on each question set, with all lines shuffled, against
    POPE's rule.
    """
    made_up = version == "made up"
    pope = label_files(tmp_path / "made up") if made_up else os.path.join(POPE, version)
    if not os.path.isdir(pope):
        pytest.skip(f"{pope} is absent; the environment variable POPE names the folder")
    labels, rng, compared = read_labels(pope), random.Random(3), 0
    answers = tmp_path / "a.jsonl"
    while compared < (360 if made_up else 10_000):
        if form == "image":
            rows, pairs = with_image(labels, rng)
            ours = scored(write_lines(answers, shuffled(rows, rng)), pope)
        elif form == "llava":
            asked, rows, pairs = like_llava(labels, rng)
            question_file = write_lines(tmp_path / "questions.jsonl", shuffled(asked, rng))
            ours = scored(write_lines(answers, shuffled(rows, rng)), pope, question_file)
        else:
            ours, pairs = {}, {}
            for split, questions in labels.items():
                rows, pairs[split] = without_image(questions, rng)
                found = scored(write_lines(answers, shuffled(rows, rng)), pope)
                assert list(found) == [split]           # found out, though all three were looked at
                ours |= found
        assert set(ours) == set(labels) and "auc" not in ours["random"]
        for split in labels:
            assert_agrees(ours[split], pairs[split])
            compared += len(pairs[split])


# ---- Real files ----------------------------------------------------------------------------------


def test_real_answers_of_llava(capsys):
    """LLaVA-1.5-7B's own answers: adversarial F1 is 84.2 as published, and what is lacking is not
    scored.
    """
    answers = os.path.join(POPE, "llava_v1.5_7b_answers_partial.jsonl")
    questions, pope = os.path.join(POPE, "llava_pope_test.jsonl"), os.path.join(POPE, "llava_2023")
    if not os.path.isfile(answers):
        pytest.skip(f"{answers} is absent; the environment variable POPE names the folder")
    metrics = scored(answers, pope, questions)
    said = capsys.readouterr().out
    assert list(metrics) == ["adversarial"] and f"{metrics['adversarial']['f1']:.1f}" == "84.2"
    assert ("random: incomplete, 2,712 of 2,910 questions answered, not scored\n"
            "popular: no answers\n") in said
    asked = {q["question_id"]: q for q in read_json(questions, lines=True)}
    label = {(q["image"], q["text"]): q["label"] for q in read_labels(pope)["adversarial"]}
    pairs = []
    for row in read_json(answers, lines=True):
        q = asked[row["question_id"]]
        if q["category"] == "adversarial":
            pairs.append((row["text"], label[q["image"], q["text"].removesuffix(SUFFIX)]))
    assert_agrees(metrics["adversarial"], pairs)
    # Today's label files have 58 other questions.
    with pytest.raises(InputError, match="answers no split"):
        scored(answers, os.path.join(POPE, "current"), questions)
    assert "adversarial: incomplete, 2,942 of 3,000 questions" in capsys.readouterr().out


def test_real_label_files_told_apart(tmp_path):
    """In llava_2023, 109 pairs of id and question are the same in random and adversarial, 100 of
    them about other images.
    """
    pope = os.path.join(POPE, "llava_2023")
    if not os.path.isdir(pope):
        pytest.skip(f"{pope} is absent; the environment variable POPE names the folder")
    labels = read_labels(pope)
    other = {(q["question_id"], q["text"]): q["image"] for q in labels["adversarial"]}
    twins = [q for q in labels["random"]
             if other.get((q["question_id"], q["text"]), q["image"]) != q["image"]]
    assert len(twins) == 100
    path = write_lines(tmp_path / "a.jsonl", without_image(twins, random.Random(0))[0])
    with pytest.raises(InputError, match="100 in random, .*100 in adversarial"):
        scored(path, pope)
    # Named, it is clear which split is meant; but not all of its questions are answered.
    with pytest.raises(InputError, match="answers no split"):
        scored(path, pope, splits=["random"])


# ---- What is lacking, twice there or wrong -------------------------------------------------------


@pytest.fixture
def labels(tmp_path):
    return read_labels(label_files(tmp_path / "pope"))


def test_incomplete_and_absent_splits(tmp_path, labels, capsys):
    pope, rng = str(tmp_path / "pope"), random.Random(4)
    asked, rows, pairs = like_llava(labels, rng)
    question_file = write_lines(tmp_path / "questions.jsonl", asked)
    part = write_lines(tmp_path / "a.jsonl", rows[:200])                # random, and 80 of popular
    assert_agrees(scored(part, pope, question_file)["random"], pairs["random"])
    said = capsys.readouterr().out
    assert ("popular: incomplete, 80 of 120 questions answered, not scored\n"
            "adversarial: no answers\n") in said
    assert "AUC" not in said and "| a.jsonl |" in said
    with pytest.raises(InputError, match="answers no split"):
        scored(part, pope, question_file, ["popular", "adv"])

    # The yes-questions of random are popular's too.
    rows, pairs = with_image({"random": labels["random"]}, rng)
    path = write_lines(tmp_path / "b.jsonl", rows)
    assert list(scored(path, pope)) == ["random"]
    in_random, in_popular = ({(q["image"], q["text"]) for q in labels[split]}
                             for split in ("random", "popular"))
    shared = len(in_random & in_popular)
    assert 0 < shared < 120
    assert f"popular: incomplete, {shared} of 120" in capsys.readouterr().out

    rows, _ = without_image(labels["adversarial"], rng)
    with pytest.raises(InputError, match="answers no split"):
        scored(write_lines(tmp_path / "c.jsonl", rows[:-1]), pope)
    said = capsys.readouterr().out
    assert "random: no answers" in said and "adversarial: incomplete, 119 of 120" in said


def test_yes_scores_bring_their_columns(tmp_path, labels, capsys):
    pope, answers = str(tmp_path / "pope"), tmp_path / "a.jsonl"
    rows, _ = with_image(labels, random.Random(5))
    yes = {(q["image"], q["text"]) for q in labels["random"] if q["label"] == "yes"}
    for row in rows:
        row["yes_score"] = 1.5 if (row["image"], row["question"]) in yes else -2
    ours = scored(write_lines(answers, rows), pope)["random"]
    assert ours["auc"] == ours["best_threshold"] == 100 and "AUC" in capsys.readouterr().out
    del rows[7]["yes_score"]
    assert "auc" not in scored(write_lines(answers, rows), pope)["random"]


def test_repeated_lines(tmp_path, labels):
    """Twice the same is the same; two different answers to one question are refused, with the
    row.
    """
    pope, answers = str(tmp_path / "pope"), tmp_path / "a.jsonl"
    rows, pairs = without_image(labels["popular"], random.Random(6))
    assert_agrees(scored(write_lines(answers, rows + rows[:9]), pope)["popular"], pairs)
    again = rows[4] | {"answer": rows[4]["answer"] + " indeed"}
    message = "a.jsonl, row 120: .*answered otherwise in a row before; remove"
    with pytest.raises(InputError, match=message):
        scored(write_lines(answers, rows + [again]), pope)


def test_answers_of_other_questions(tmp_path, labels, capsys):
    """Nothing is zipped: what does not fit is counted, and refused where only an id could say what
    was meant.
    """
    pope, answers, rng = str(tmp_path / "pope"), tmp_path / "a.jsonl", random.Random(7)
    asked, rows, _ = like_llava(labels, rng)
    question_file = write_lines(tmp_path / "questions.jsonl", asked)
    moved = [row | {"question_id": row["question_id"] + 2} for row in rows]
    message = r"a.jsonl: of 360 questions .* match 0 in .*questions.jsonl \(row 0 in none\)"
    with pytest.raises(InputError, match=message):
        scored(write_lines(answers, moved), pope, question_file)
    # The yes-questions have one name in three splits.
    restart = [q | {"question_id": q["question_id"] % 10_000_000} for q in asked]
    restart = write_lines(tmp_path / "restart.jsonl", restart)
    with pytest.raises(InputError, match="of 120 questions"):
        scored(write_lines(answers, rows[:120]), pope, restart)
    with pytest.raises(InputError, match="--question_file names the file"):
        scored(str(answers), pope)

    three = [row for questions in labels.values()
             for row in without_image(questions, random.Random(8))[0]]
    message = "one must have all: score each split's file alone"
    with pytest.raises(InputError, match=message):
        scored(write_lines(answers, three), pope)
    message = r"of 120 questions without an image, .*\d+ in popular \(row 1 in none\)"
    with pytest.raises(InputError, match=message):
        scored(write_lines(answers, three[:120]), pope, splits=["popular"])
    nameless = [{"question": "Is there a dog?", "answer": "No"}]
    with pytest.raises(InputError, match="'question_id' should be"):
        scored(write_lines(answers, nameless), pope)

    rows, _ = with_image({"random": labels["random"]}, rng)
    for row in rows[:5]:
        row["image"] = "COCO_of_another_version.jpg"
    with pytest.raises(InputError, match="answers no split"):
        scored(write_lines(answers, rows), pope, splits=["random"])
    said = capsys.readouterr().out
    assert "random: incomplete, 115 of 120" in said
    assert "5 answers are to questions of none of these label files" in said


def cut(lines):
    return lines[:2] + [lines[2][:-4]] + lines[3:]


def answer_is_a_number(lines):
    return lines[:3] + [lines[3].replace('"answer": ', '"answer": 5, "was": ')]


BROKEN = {  # what the message says: what is done to the lines
    "a.jsonl, row 2: not readable as JSON": cut,
    "a.jsonl, row 3: 'answer' should be str and is 5": answer_is_a_number,
    "a.jsonl, row 1: 'question_id' should be": lambda lines: [lines[0], "7"],
    "a.jsonl, row 0: ": lambda lines: ["[[]]"],
    "a.jsonl: holds an empty list": lambda lines: ["[]"],
    "a.jsonl, row 0: 'yes_score' should be": lambda lines: [lines[0][:-1] + ', "yes_score": "x"}'],
    "a.jsonl: is empty": lambda lines: [],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_lines(tmp_path, labels, message):
    rows, _ = without_image(labels["random"], random.Random(9))
    lines = BROKEN[message]([json.dumps(row) for row in rows])
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        scored(str(tmp_path / "a.jsonl"), str(tmp_path / "pope"))


def test_typed_by_a_user(tmp_path, labels):
    """Exit code 0 with a table where a split is complete; else 1, the counts and one line of error,
    and no traceback.
    """
    rows, pairs = without_image(labels["adversarial"], random.Random(10))
    answers = write_lines(tmp_path / "a.jsonl", rows)
    flags = ["--pope_path", tmp_path / "pope"]
    said = succeeds("python", "-m", "evals.score", answers, *flags, fresh=True)
    assert f" {counted(pairs)[0]['tp']} |" in said and "random: no answers" in said
    write_lines(tmp_path / "a.jsonl", rows[1:])
    done = shell("python", "-m", "evals.score", answers, *flags)
    assert done.returncode == 1 and "adversarial: incomplete, 119 of 120" in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_flags_typed_by_a_user(tmp_path, labels):
    """LLaVA's answers with the file that was asked, and one split of three."""
    asked, rows, pairs = like_llava(labels, random.Random(11))
    answers = write_lines(tmp_path / "a.jsonl", rows)
    command = ["python", "-m", "evals.score", answers, "--pope_path", tmp_path / "pope"]
    questions = ["--question_file", write_lines(tmp_path / "questions.jsonl", asked)]
    said = succeeds(*command, *questions, "--set", "adv")
    assert f" {counted(pairs['adversarial'])[0]['tp']} |" in said
    assert "random" not in said and "popular" not in said
    done = shell(*command)
    assert done.returncode == 1 and "--question_file names the file" in done.stderr
    assert shell("python", "-m", "evals.score", answers).returncode == 2        # no --pope_path
