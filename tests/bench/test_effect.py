"""bench/effect.py and its parts: what is run and at which rate, what is counted, and the tables."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_json
from programs import ROOT, succeeds

import train
from bench import effect, effect_asked, effect_table
from bench.effect import AT_ONCE, Task, another_image, tasks_of
from bench.effect_rows import (
    FEW,
    LADDER,
    REFERENCE,
    ROWS,
    SEEDS,
    STEPS,
    VALIDATION_SEEDS,
    best_rates,
    read_results,
    seeds_of,
)
from bench.effect_table import image_interval, mean_and_sd, paired, student_interval
from model import Trunk
from support.common import InputError

SPLITS = ("random", "popular", "adversarial")


def result(row, seed, rate, validation, accuracy, **more):
    """A line of results.jsonl: the same accuracy in all three sets."""
    numbers = {f"{split}/accuracy": accuracy for split in SPLITS}
    return {"row": row, "seed": seed, "rate": rate, "validation": validation,
            "numbers": numbers | {"well_formed": 100.0, **more}}


def write(folder, lines, end="\n"):
    text = "\n".join(json.dumps(line) for line in lines) + end
    (folder / "results.jsonl").write_text(text)


def typed(folder, rows, seeds=None, validation=False):
    return SimpleNamespace(rows=rows, seeds=seeds, validation=validation, output_dir=str(folder))


# ---- Rates ---------------------------------------------------------------------------------------


def test_best_rates(tmp_path):
    """The mean over seeds counts, of well-formed answers alone, and of validation images alone."""
    write(tmp_path, [
        result("dpo", 42, 1e-3, True, 90), result("dpo", 43, 1e-3, True, 70),       # mean 80
        result("dpo", 42, 3e-3, True, 82), result("dpo", 43, 3e-3, True, 81),       # 81.5
        result("dpo", 46, 3e-4, False, 99), result("base", 42, 0, True, 99),
        result("sft", 42, 1e-3, True, 90, well_formed=80.0),
        result("sft", 42, 3e-3, True, 75, well_formed=100.0),
        result(REFERENCE, 42, 3e-4, True, 60)])
    rates = best_rates(read_results(str(tmp_path)))
    assert rates["dpo"] == 3e-3 and rates["sft"] == 3e-3 and "base" not in rates
    assert rates["other_test"] == rates[REFERENCE] == 3e-4        # only what it is asked differs
    assert rates["teacher"] == 3e-4 and rates["teacher_sft"] == rates["sft"]
    assert "other_always" not in rates
    # All three sets count, and a line that is being written does not.
    lines = [result("dpo", 42, rate, True, 50) for rate in (1e-3, 3e-3)]
    lines[0]["numbers"] |= {"random/accuracy": 90, "popular/accuracy": 20}
    lines[1]["numbers"] |= {"adversarial/accuracy": 51}
    write(tmp_path, lines)
    assert best_rates(read_results(str(tmp_path)))["dpo"] == 1e-3
    write(tmp_path, lines, end="\n" + json.dumps(result("dpo", 42, 3e-3, True, 99)))
    assert best_rates(read_results(str(tmp_path)))["dpo"] == 1e-3
    assert read_results(str(tmp_path / "none")) == [] and best_rates([])["other_test"] is None
    assert best_rates([])["default1"] == ROWS["default1"].rate         # which is no choice


# ---- Tasks ---------------------------------------------------------------------------------------


def test_tasks_of_validation(tmp_path):
    """Each rate of the ladder, unless the row has its own; the base comes first."""
    args = typed(tmp_path, ["base", "default1", REFERENCE], validation=True)
    bases, behind = tasks_of(args, set())
    assert bases == [Task(0, seed, 0) for seed in VALIDATION_SEEDS]
    assert behind.keys() == {(seed, 0) for seed in VALIDATION_SEEDS}
    for tasks in behind.values():
        assert [task.rows for task in tasks] == [
            [("base", 0)],
            [("default1", ROWS["default1"].rate), *((REFERENCE, rate) for rate in LADDER)]]
        assert {task.priority for task in tasks} == {1}


def test_tasks_at_the_best_rates(tmp_path):
    """Rows that carry a claim before the others and on more seeds; another base of its own."""
    names = [REFERENCE, "nll30", "ipo", "projector16_sft"]
    write(tmp_path, [result(name, 42, 1e-3, True, 50) for name in names])
    bases, behind = tasks_of(typed(tmp_path, names), set())
    assert sorted(bases) == [*(Task(0, s, 0) for s in SEEDS),
                             *(Task(0, s, p) for s in FEW for p in (0, 16))]
    claims = [(REFERENCE, 1e-3), ("nll30", ROWS["nll30"].rate)]
    for seed in SEEDS:
        assert [(task.priority, task.rows) for task in behind[seed, 0]] == [(1, claims)]
        assert (seed, 16) not in behind
    for seed in FEW:
        of_seed = [(task.priority, task.rows) for task in behind[seed, 0]]
        assert of_seed == [(1, claims[:1]), (2, [("ipo", 1e-3)])]
        assert [task.rows for task in behind[seed, 16]] == [[("projector16_sft", 1e-3)]]
    everything = sorted(bases + sum(behind.values(), []))
    assert [task.priority for task in everything] == sorted(t.priority for t in everything)
    assert everything[0] == Task(0, SEEDS[0], 0)


def test_seeds_of():
    """None was seen by a choice; what small rows are compared with has theirs, too."""
    assert len(SEEDS) == 16 and len(FEW) == 6 and not {*SEEDS} & {*FEW}
    assert not {*VALIDATION_SEEDS} & {*SEEDS, *FEW}
    assert seeds_of("nll30") == SEEDS and seeds_of("ipo") == FEW
    for name in ("base", REFERENCE, "sft", "nothing"):
        assert seeds_of(name) == SEEDS + FEW


def test_tasks_leave_out_what_is_done(tmp_path):
    """A row, a seed, a rate: and its base is not made for nothing."""
    args = typed(tmp_path, [REFERENCE], [46, 47], validation=True)
    done = {(REFERENCE, 46, LADDER[1], True), (REFERENCE, 47, LADDER[0], False)}
    _, behind = tasks_of(args, done)
    assert [rate for _, rate in behind[46, 0][0].rows] == [LADDER[0], LADDER[2]]
    assert [rate for _, rate in behind[47, 0][0].rows] == list(LADDER)
    done |= {(REFERENCE, 47, rate, True) for rate in LADDER}
    bases, behind = tasks_of(args, done)
    assert bases == [Task(0, 46, 0)] and behind.keys() == {(46, 0)}


def test_tasks_are_of_one_kind_and_few_rows(tmp_path):
    """Rows of a task read the same kept features, and no task is long."""
    args = typed(tmp_path, list(ROWS), [42], validation=True)
    _, behind = tasks_of(args, set())
    tasks, rows = sum(behind.values(), []), []
    for task in tasks:
        assert 1 <= len(task.rows) <= AT_ONCE
        assert len({effect.kind_of(name) for name, _ in task.rows}) == 1
        assert {ROWS[name].projector for name, _ in task.rows} == {task.projector}
        rows += task.rows
    assert len(rows) == len(set(rows)) == sum(1 if row.rate else 3 for row in ROWS.values())
    assert any(len(task.rows) == AT_ONCE for task in tasks)


@pytest.mark.parametrize("name, of", (("ipo", "ipo"), ("other_test", REFERENCE),
                                      ("other_always", "other_always")))
def test_a_missing_rate_is_refused(tmp_path, name, of):
    """And it is said which row's rates are to be tried: what is followed, helps."""
    write(tmp_path, [result("sft", 42, 1e-3, True, 50), result(name, 46, 1e-3, False, 50)])
    with pytest.raises(InputError, match=f"^{name}: .*results.jsonl.*--validation --rows {of} f"):
        tasks_of(typed(tmp_path, ["sft", name]), set())
    write(tmp_path, [result(of, 42, 1e-3, True, 50)])
    assert tasks_of(typed(tmp_path, [name]), set())[1][FEW[0], 0][0].rows == [(name, 1e-3)]


# ---- Runs before a row ---------------------------------------------------------------------------


def run_rows(monkeypatch, tmp_path, *names):
    """[flags of train.py] and [flags of tiny.prepare] of training these rows, which do nothing."""
    trained, prepared = [], []
    monkeypatch.setattr(effect, "run_train", trained.append)
    monkeypatch.setattr(effect.prepare, "main", prepared.append)
    for name in names:
        effect.train_row(str(tmp_path), 62, name, 1e-3, STEPS)
    return trained, prepared


def value(flags, name):
    return flags[flags.index(name) + 1] if name in flags else None


def test_a_second_round(monkeypatch, tmp_path):
    """Half the steps; then pairs of what that run says, and the other half from where it ended."""
    (before, after), (asked,) = run_rows(monkeypatch, tmp_path, "round2")
    first = str(tmp_path / "round2-0.001-first")
    assert value(before, "--output_dir") == value(after, "--init") == asked[0] == first
    assert value(before, "--max_steps") == value(after, "--max_steps") == str(STEPS // 2)
    assert "--init" not in before and "--pope_data_path" not in before
    pairs = os.path.dirname(value(after, "--pope_data_path"))
    assert value(asked, "--output").startswith(pairs) and "--teacher" not in asked
    assert value(after, "--output_dir") == str(tmp_path / "round2-0.001")


def test_pairs_of_a_teacher(monkeypatch, tmp_path):
    """The base is corrected by what another run says, and the row does not start from that run."""
    (before, after), (asked,) = run_rows(monkeypatch, tmp_path, "teacher_sft")
    teacher = value(before, "--output_dir")
    assert value(asked, "--teacher") == teacher == str(tmp_path / "teacher_sft-0.001-teacher")
    assert asked[0] == str(tmp_path / "base") and value(asked, "--described") == "true"
    assert "--init" not in after and "sft" in after
    assert value(after, "--desc_data_path").startswith(str(tmp_path / "pairs-base"))


def test_rows_without_runs_before(monkeypatch, tmp_path):
    trained, prepared = run_rows(monkeypatch, tmp_path, "ipo", "flip5")
    assert len(trained) == 2 and "--pope_data_path" not in trained[0]
    (asked,) = prepared
    assert asked[0] == str(tmp_path / "base") and value(asked, "--flipped") == "0.05"


# ---- Another image -------------------------------------------------------------------------------


def test_another_image_in_training(monkeypatch):
    """Each row gets the features of another row's image, and only inside."""
    def keep(*args):
        return SimpleNamespace(args=args, image_index=np.array([0, 0, 1, 2, 2, 3]))

    monkeypatch.setattr(train, "keep_features", keep)
    with another_image():
        kept = train.keep_features("folder", "rows")
    assert kept.image_index.tolist() == [1, 1, 2, 3, 3, 0] and kept.args == ("folder", "rows")
    assert train.keep_features is keep
    with pytest.raises(RuntimeError), another_image():
        raise RuntimeError
    assert train.keep_features is keep


def test_another_image_in_the_test(monkeypatch):
    monkeypatch.setattr(Trunk, "image_context", lambda trunk, config, features: features)
    before, features = Trunk.image_context, torch.arange(3.0)[:, None, None]         # (3, 1, 1)
    with effect.another_image_asked():
        assert Trunk.image_context(None, None, features).flatten().tolist() == [2, 0, 1]
    assert Trunk.image_context is before


# ---- What is counted -----------------------------------------------------------------------------


def rows_of(images, word="cat", labels=("yes", "no")):
    return [{"image": image, "text": f"Is there a {word}{n} in the image?", "label": label}
            for image in images for n, label in enumerate(labels)]


def test_digits():
    """In the order of the images' names, whatever that of the questions."""
    rows = rows_of(("b", "a")) + rows_of(("a",)) + rows_of(("c",))
    right = [True, True, False, True, np.True_, True, False, False]
    assert effect_asked.digits(rows, right) == "320"


def test_best_threshold():
    assert effect_asked.best_threshold((3, 1, 2, 0), (True, False, True, False)) == 1.5
    assert effect_asked.best_threshold((5, 4), (True, True)) == 3                 # always yes
    assert effect_asked.best_threshold((5, 4), (False, False)) == 6               # never
    # 0 n, 1 y, 2 n, 3 y, 4 y: above 0 or above 2, one is wrong; the first of both.
    assert effect_asked.best_threshold(range(5), (False, True, False, True, True)) == 0.5


def test_no_threshold_between_equal_scores():
    """Equal scores get the same answer, so their order must not count."""
    for labels in ((False, True, True), (True, False, True), (True, True, False)):
        assert effect_asked.best_threshold((0, 0, 0), labels) == -1
        assert effect_asked.best_threshold((0, 0, 0, -4), (*labels, False)) == -2


def test_with_threshold():
    """Fitted on the one set and tested on the other, in groups or all together."""
    fitted = {"adversarial": rows_of("f", "cat") + rows_of("g", "dog")}
    tested = {"adversarial": rows_of("t", "cat") + rows_of("u", "dog")}
    keys = [[(q["image"], q["text"]) for q in rows["adversarial"]] for rows in (fitted, tested)]
    #            cat: yes, no; dog: yes, no
    scores = [dict(zip(keys[0], (9, 7, 3, 1), strict=True)),
              dict(zip(keys[1], (8.5, 7.5, 4, 2.5), strict=True))]

    def animal(q):
        return effect_asked.word_of(q)[:3]

    def judged(group):
        line = effect_asked.with_threshold(fitted, tested, scores, group)
        return line["numbers"], line["right"]

    # Thresholds 8 and 2: the last answer is a yes, and wrong.
    numbers, right = judged(animal)
    assert right == {"adversarial": "21"}
    assert numbers == {"adversarial/accuracy": 75, "adversarial/yes_ratio": 75,
                       "adversarial/auc": 75}
    # One threshold for all: 2, with 3 of 4 right; then all are yes.
    numbers, right = judged(lambda q: "all")
    assert right == {"adversarial": "11"} and numbers["adversarial/yes_ratio"] == 100


# ---- Tables --------------------------------------------------------------------------------------


def of_seeds(digits, accuracies):
    """{seed: line}."""
    return {seed: {"right": {"adversarial": text}, "numbers": {"adversarial/accuracy": accuracy}}
            for seed, (text, accuracy) in enumerate(zip(digits, accuracies, strict=True))}


def test_mean_and_sd():
    assert mean_and_sd([1, 2, 3, 6]) == "3.0 ± 2.2"             # sqrt((4 + 1 + 0 + 9) / 3) = 2.16
    assert mean_and_sd([0.25, 0.75], 2) == "0.50 ± 0.35" and mean_and_sd([7.25]) == "7.2"


def test_student_interval():
    # Standard deviation 2 of four: 3.182 * 2 / sqrt(4); of two: 12.706 * sqrt(2) / sqrt(2).
    four = np.array([0, 0, 3, 3]) * 2 / np.sqrt(3)
    assert student_interval(four) == pytest.approx(3.182)
    assert student_interval(np.array([1.0, 3.0])) == pytest.approx(12.706)
    assert student_interval(np.ones(16)) == 0
    assert student_interval(np.tile([-1.0, 1.0], 8)) == pytest.approx(2.131 / np.sqrt(15))


def test_paired():
    row, reference = of_seeds("66", (80, 90)), of_seeds("666", (70, 85, 10))
    assert paired(row, reference, "adversarial/accuracy").tolist() == [10, 5]


def test_image_interval():
    """No width where all images differ alike; else the width that theory tells."""
    alike = image_interval(of_seeds(["4565"] * 2, (0, 0)), of_seeds(["3454"] * 2, (0, 0)))
    assert alike.tolist() == pytest.approx([100 / 6] * 2)
    # 400 images, half of them better by one of six: 8.33 ± 1.96 * 8.33 / sqrt(400) points.
    row, reference = (of_seeds([text * 200] * 1, (0,)) for text in ("34", "33"))
    low, high = image_interval(row, reference)
    assert (low, high) == pytest.approx((7.517, 9.150), abs=0.1)
    # Images are drawn by themselves in each seed: four seeds halve the width.
    row, reference = (of_seeds([text * 200] * 4, (0,) * 4) for text in ("34", "33"))
    of_four = image_interval(row, reference)
    assert of_four[1] - of_four[0] == pytest.approx((high - low) / 2, rel=0.1)


def test_the_table(tmp_path, capsys):
    """A row stands beside the reference, which comes last; what is measured twice counts once."""
    def line(row, seed, accuracy, right, validation=False):
        return result(row, seed, 1e-3, validation, accuracy) | {"right": {"adversarial": right}}

    write(tmp_path, [line("sft", 46, 80, "66")])
    with pytest.raises(InputError, match="has no row 'reference'"):
        effect_table.main(["--output_dir", str(tmp_path)])
    write(tmp_path, [line("sft", 46, 10, "00"), line("sft", 46, 80, "55"),
                     line("sft", 47, 84, "55"), line("sft", 42, 1, "00", True),
                     line(REFERENCE, 46, 79, "44"), line(REFERENCE, 47, 81, "44"),
                     line("ipo", 46, 79, "44")])
    effect_table.main(["--output_dir", str(tmp_path), "--question", "loss"])
    lines = [[cell.strip() for cell in text.strip("|").split(" | ")]
             for text in capsys.readouterr().out.splitlines() if text.startswith("| ")]
    titles, sft, ipo, reference = (line[:4] for line in lines)
    assert titles == ["", "seeds", "adversarial", "difference"]
    assert sft == [ROWS["sft"].title, "2", "82.0 ± 2.8", "+2.0 ± 12.7 [+16.7, +16.7]"]
    assert ipo == [ROWS["ipo"].title, "1", "79.0", "+0.0 [+0.0, +0.0]"]
    assert reference == [f"*reference: {ROWS[REFERENCE].title}*", "2", "80.0 ± 1.4", ""]


def test_the_page_shows_what_was_measured(capsys):
    with open(os.path.join(ROOT, "docs", "results.md"), encoding="utf-8") as file:
        page = file.read().splitlines()
    folder = os.path.join(ROOT, "docs", "effect")
    effect_table.main(["--output_dir", folder, "--least", "3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 40 and [line for line in lines if line not in page] == []


# ---- All of it -----------------------------------------------------------------------------------


def test_a_small_experiment(tmp_path):
    """The base with what needs no training, and one row; what is there is not made again."""
    command = ["python", "bench/effect.py", "--small", "--jobs", 1, "--rows", "base", "default1",
               "--seeds", 46, "--output_dir", tmp_path]
    assert "2 rows in " in succeeds(*command, fresh=True)
    with open(tmp_path / "results.jsonl") as file:
        lines = {line["row"]: line for line in map(json.loads, file)}
    assert list(lines) == ["base", "threshold", "class_threshold", "probe", "default1"]
    for line in lines.values():
        assert (line["seed"], line["validation"]) == (46, False)
        for split in SPLITS:                    # eight images with six questions each
            right = [int(digit) for digit in line["right"][split]]
            assert len(right) == 8
            assert line["numbers"][f"{split}/accuracy"] == pytest.approx(100 * sum(right) / 48,
                                                                         abs=1e-4)
    names = {"well_formed", "held_out", "chair_i", "chair_s", "coverage", "words", "nll"}
    assert names <= lines["base"]["numbers"].keys() == lines["default1"]["numbers"].keys()
    assert lines["base"]["numbers"]["nll"] != lines["default1"]["numbers"]["nll"]
    config = load_json(tmp_path / "seed46" / "default1-0.002" / "config.json")
    assert (config["steps"], config["arguments"]["sft_weight"]) == (effect.SMALL_STEPS, 10)
    assert not [path for path in (tmp_path / "seed46").iterdir() if "features" in path.name]
    before = (tmp_path / "results.jsonl").read_bytes()
    assert "0 rows in " in succeeds(*command, fresh=True)
    assert (tmp_path / "results.jsonl").read_bytes() == before
