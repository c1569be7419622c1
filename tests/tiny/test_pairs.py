"""tiny/preferences.py: pairs from hand-written answers, from a base's own, and as files.

`NOTES` are the notes of four images in preference.json's form; `ANSWERS` is what a base says.
"""
import json
import os
from types import SimpleNamespace

import pytest
from conftest import load_json

from checkpoints.layouts import OURS
from support.common import InputError
from tiny import preferences, prepare
from tiny.pictures import CLASSES, NAMES, SCENES
from tiny.preferences import Pairs, answers_of, as_said, chosen_description, write_pairs
from tiny.world import Sizes, answer, any_questions, ask, hallucinated, make_world, sentence

SCENE, OTHER_SCENE = list(SCENES)[:2]
A, B, C, X, Y, Z = NAMES[:3] + NAMES[4:7]       # there: A, B, C; not there: X, Y, Z
DESCRIBE = "What is to be seen?"


def note(image_id, objects=(A, B, C), absent=(X, Y, Z)):
    questions = []
    for there, not_there in zip(objects, absent, strict=True):
        questions += [{"question": ask(there), "word": there, "label": "yes"},
                      {"question": ask(not_there), "word": not_there, "label": "no"}]
    return {"image_id": image_id, "scene": SCENE, "objects": list(objects), "describe": DESCRIBE,
            "description": sentence(SCENE, objects), "questions": questions}


NOTES = [note(i) for i in range(1, 41)]


def answers_to(notes, described=None):
    """Yes to everything, and `described` or a description with X in the middle."""
    said = {(n["image_id"], q["question"]): answer(q["word"], True)
            for n in notes for q in n["questions"]}
    text = described or sentence(SCENE, [A, X, C])
    return said | {(n["image_id"], DESCRIBE): text for n in notes}


def written(folder, pairs, notes=NOTES, said=None):
    """The two files of some pairs: rows about questions, {image id: (chosen, rejected)}."""
    counts = write_pairs(notes, said or answers_to(notes), pairs, str(folder))
    rows, described = load_json(folder / "pope_data.json"), load_json(folder / "desc_data.json")
    wrong = [row for row in rows if not row["correct"]]
    assert counts == {"questions": len(rows), "wrong": len(wrong), "descriptions": len(described)}
    assert all(len(row["chosen"]) == len(row["rejected"]) == 1 for row in described.values())
    return rows, {int(i): (row["chosen"][0], row["rejected"][0]) for i, row in described.items()}


# ---- What should have been said ------------------------------------------------------------------


SAID = {        # what is wrong: the words said; repaired to; deleted to
    "the first": ([X, B, A], [A, B, C], [B, A]),
    "the middle": ([C, X, B], [C, A, B], [C, B]),
    "the last": ([C, A, X], [C, A, B], [C, A]),
    "two": ([C, X, A, Y], [C, A, B], [C, A]),
    "the last of all": ([C, B, A, X], [C, B, A], [C, B, A]),
    "none": ([C, A], [C, A, B], [C, A]),
    "all": ([X, Y], [A, B, C], None),
}


@pytest.mark.parametrize("what", SAID)
def test_descriptions(what):
    """Repaired: the base's own words up to the first wrong one, then the rest in its order."""
    words, repaired, deleted = SAID[what]
    said = sentence(OTHER_SCENE, words)                     # the scene is the base's own word, too
    expected = {"repaired": sentence(OTHER_SCENE, repaired), "none": "",
                "deleted": sentence(OTHER_SCENE, deleted) if deleted else "",
                "true": sentence(SCENE, [A, B, C])}
    assert expected.keys() == preferences.DESCRIBED.keys()
    for described, text in expected.items():
        assert chosen_description(NOTES[0], said, Pairs(described)) == text, described


@pytest.mark.parametrize("said, kept", (("", []), ("The The a a image.", []),
                                        (f"{B} {B} a {X}, {X} {A}", [B]), (f"{B.upper()}!", [B])))
def test_malformed_descriptions(said, kept):
    """Without a scene, words said twice, not a sentence: the chosen one is a sentence."""
    rest = [word for word in (A, B, C) if word not in kept]
    assert chosen_description(NOTES[0], said, Pairs()) == sentence(SCENE, [*kept, *rest])


def test_only_wrong_descriptions_become_pairs(tmp_path):
    """And the chosen one is true, whatever was said."""
    said = answers_to(NOTES[:3])
    said[1, DESCRIBE], said[2, DESCRIBE] = sentence(SCENE, [C, A]), sentence(SCENE, [X, Y])
    for described, ids in (("repaired", {2, 3}), ("true", {2, 3}), ("deleted", {3}),
                           ("none", set())):
        rows, pairs = written(tmp_path, Pairs(described), NOTES[:3], said)
        assert pairs.keys() == ids and len(rows) == 18
        for i, (chosen, rejected) in pairs.items():
            assert rejected == said[i, DESCRIBE] and not hallucinated(chosen, [A, B, C])


def test_notes_without_a_prompt_have_no_description(tmp_path):
    notes = [{k: v for k, v in NOTES[0].items() if k != "describe"}, NOTES[1]]
    _, pairs = written(tmp_path, Pairs(), notes, answers_to(NOTES[:2]))
    assert pairs.keys() == {2}


# ---- Questions -----------------------------------------------------------------------------------


def test_questions(tmp_path):
    """Rejected is what was said where it was wrong, else the opposite sentence."""
    said = answers_to(NOTES[:1])
    said[1, ask(B)], said[1, ask(Y)] = " No, not at all.\n", "A kite?"
    said[1, ask(Z)] = answer(Z, False)
    rows, _ = written(tmp_path, Pairs(), NOTES[:1], said)
    found = {row["question"]: (row["chosen"], row["reject"], row["correct"]) for row in rows}
    yes, no = ({word: answer(word, there) for word in NAMES} for there in (True, False))
    assert found == {ask(A): (yes[A], no[A], True), ask(B): (yes[B], "No, not at all.", False),
                     ask(C): (yes[C], no[C], True), ask(X): (no[X], yes[X], False),
                     ask(Y): (no[Y], "A kite?", False), ask(Z): (no[Z], yes[Z], True)}
    assert [row["answer"] for row in rows] == ["yes", "no"] * 3


def test_flipped_questions(tmp_path):
    """The share that is asked for; chosen and rejected change places, with what follows."""
    plain, described = written(tmp_path, Pairs())
    for share, low, high in ((0.2, 0.1, 0.3), (0.7, 0.6, 0.8), (1.0, 1.0, 1.0)):
        rows, same = written(tmp_path, Pairs(flipped=share))
        assert rows == written(tmp_path, Pairs(flipped=share))[0]
        assert same == described                                # descriptions stay as they are
        flipped = [(a, b) for a, b in zip(plain, rows, strict=True) if a != b]
        assert low <= len(flipped) / len(plain) <= high
        for before, after in flipped:
            assert (after["chosen"], after["reject"]) == (before["reject"], before["chosen"])
            assert after["answer"] == {"yes": "no", "no": "yes"}[before["answer"]]
            assert after["correct"] is not before["correct"]
            assert all(after[name] == before[name] for name in ("image_id", "question"))


# ---- Fewer pairs ---------------------------------------------------------------------------------


def test_each_nth_description(tmp_path):
    rows, described = written(tmp_path, Pairs(every=8))
    assert described.keys() == {8, 16, 24, 32, 40} and len(rows) == 240
    assert len(written(tmp_path, Pairs())[1]) == 40


def test_fewer_images(tmp_path):
    rows, described = written(tmp_path, Pairs(images=7))
    assert {row["image_id"] for row in rows} == described.keys() == set(range(1, 8))
    assert len(rows) == 42


def test_held_out_classes_are_in_no_pair(tmp_path):
    """Neither what is asked, nor what is there, nor what a base names."""
    last, before = NAMES[-1], NAMES[-3]
    notes = [note(1), note(2, (A, last, C)), note(3, absent=(before, Y, last)), note(4)]
    said = answers_to(notes)
    said[4, DESCRIBE] = sentence(SCENE, [A, before])
    rows, described = written(tmp_path, Pairs(), notes, said)
    assert len(rows) == 24 and described.keys() == {1, 2, 3, 4}
    rows, described = written(tmp_path, Pairs(held_out=2), notes, said)
    assert len(rows) == 22 and described.keys() == {1, 3, 4}
    rows, described = written(tmp_path, Pairs(held_out=3), notes, said)
    assert len(rows) == 21 and described.keys() == {1, 3}
    text = json.dumps([rows, described])
    assert not any(name in text for name in NAMES[-3:]) and A in text


# ---- What a base says ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("pairs") / "world")
    make_world(folder, 42, Sizes(sft=40, preference=24, validation=2, evaluation=3),
               supervised=False, progress=False)
    return folder


def test_any_questions(small_world):
    """Three objects that are there and three that are not, other ones than POPE asks about."""
    of_pope, notes = load_json(f"{small_world}/preference.json"), any_questions(small_world)
    assert notes == any_questions(small_world)
    same = {"image_id", "scene", "objects", "description"}
    for ours, theirs in zip(notes, of_pope, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == theirs[name] for name in same)
        words = {label: {q["word"] for q in ours["questions"] if q["label"] == label}
                 for label in ("yes", "no")}
        assert len(words["yes"]) == len(words["no"]) == 3
        assert words["yes"] <= set(ours["objects"])
        assert words["no"] <= set(CLASSES) - set(ours["objects"])
        assert all(q["question"] == ask(q["word"]) for q in ours["questions"])

    def absent(notes):
        return [sorted(q["word"] for q in n["questions"] if q["label"] == "no") for n in notes]

    differ = sum(a != b for a, b in zip(absent(notes), absent(of_pope), strict=True))
    assert differ > len(notes) / 2
    # Seldom seen classes are asked about as well.
    assert len(set(sum(absent(notes), []))) > 0.8 * len(NAMES)


def test_a_base_is_asked_once(tmp_path, monkeypatch):
    """Its answers are kept; another base, or other questions, ask anew."""
    asked, folder = [], str(tmp_path / "hadpo")

    def ask_base(model, world, notes, questions, asker):
        asked.append(model.fingerprint)
        return [[f"{model.fingerprint} {q}" for q in of_image] for of_image in questions]

    def ask_it(fingerprint, notes, trained=None):
        found = answers_of(SimpleNamespace(fingerprint=fingerprint), "world", notes, folder,
                           trained)
        assert found == {(n["image_id"], q): f"{fingerprint} {q}" for n in notes
                         for q in [*(q["question"] for q in n["questions"]), DESCRIBE]}

    monkeypatch.setattr(preferences, "ask_base", ask_base)
    for fingerprint in ("a", "a", "b", "b"):
        ask_it(fingerprint, NOTES[:3])
    assert asked == ["a", "b"] and os.listdir(folder) == ["said.json"]
    ask_it("b", NOTES[:4])
    ask_it("b", NOTES[:4])
    assert asked == ["a", "b", "b"]
    for digest in ("1", "1", "2"):                  # two checkpoints of the same base
        ask_it("b", NOTES[:4], {"trained.safetensors": digest})
    assert asked == ["a", "b", "b", "b", "b"]


def test_as_said():
    """What a teacher said is the truth of its notes, and of the pairs made of them."""
    note = NOTES[0] | {"questions": NOTES[0]["questions"][:2]}
    first, second = note["questions"]
    here, other = NAMES[0], NAMES[1]
    told = sentence(next(iter(SCENES)), [other, here])
    said = {(note["image_id"], first["question"]): " yes , there is",
            (note["image_id"], second["question"]): "Perhaps.",
            (note["image_id"], note["describe"]): f" {told}"}
    as_told, = as_said([note], said)
    assert [q["label"] for q in as_told["questions"]] == ["yes", "no"]
    assert as_told["description"] == told and set(as_told["objects"]) == {here, other}
    assert as_told["image_id"] == note["image_id"]
    assert note["questions"] == [first, second]                         # the notes stay


# ---- python -m tiny.prepare ----------------------------------------------------------------------


@pytest.fixture
def base_beside_its_world(world, tmp_path):
    """The session's base and world, as names in a folder of one's own."""
    os.symlink(world.base, tmp_path / "base")
    os.mkdir(tmp_path / "world")
    for name in os.listdir(world.folder):
        if name != "hadpo":
            os.symlink(f"{world.folder}/{name}", tmp_path / "world" / name)
    return tmp_path


def test_other_pairs_of_a_base(base_beside_its_world, monkeypatch, capsys):
    """Its answers are what the files reject; a second command asks nothing."""
    root = base_beside_its_world
    prepare.main([str(root / "base"), "--output", str(root / "plain")])
    assert sorted(os.listdir(root / "plain")) == ["desc_data.json", "pope_data.json"]
    said = load_json(root / "world" / "hadpo" / "said.json")["answers"]
    notes, rows = load_json(root / "world" / "preference.json"), load_json(
        root / "plain" / "pope_data.json")
    assert len(rows) == 6 * len(notes) == 144 and len(said) == len(notes)
    assert "mined from the base's own answers: 144 questions" in capsys.readouterr().out
    texts = [text.strip() for of_image in said for text in of_image[:6]]
    for row, text in zip(rows, texts, strict=True):
        assert row["correct"] is text.lower().startswith(row["answer"])
        assert row["correct"] or not text or row["reject"] == text

    monkeypatch.setattr(preferences, "ask_base", lambda *args: pytest.fail("it is asked again"))
    prepare.main([str(root / "base"), "--output", str(root / "other"), "--flipped", "1",
                  "--images", "5", "--described", "none"])
    other = load_json(root / "other" / "pope_data.json")
    assert [row["correct"] for row in other] == [not row["correct"] for row in rows[:30]]
    assert load_json(root / "other" / "desc_data.json") == {}


def test_any_questions_are_asked_beside_the_others(base_beside_its_world):
    """What is said to them is kept in --output, so the world's own answers stay."""
    root = base_beside_its_world
    prepare.main([str(root / "base"), "--output", str(root / "any"), "--questions", "any"])
    assert sorted(os.listdir(root / "any")) == ["desc_data.json", "pope_data.json", "said.json"]
    assert not os.path.exists(root / "world" / "hadpo")
    questions = [q["question"] for n in any_questions(str(root / "world")) for q in n["questions"]]
    assert [row["question"] for row in load_json(root / "any" / "pope_data.json")] == questions


def test_a_second_round_and_a_teacher(base_beside_its_world, monkeypatch, capsys):
    """A checkpoint's own answers are corrected, or are what is chosen; the base's stay as they are.
    """
    root, asked = base_beside_its_world, []
    notes = load_json(root / "world" / "preference.json")

    def ask_base(model, world, notes, questions, asker):
        """The base says yes to all, what was trained on it no."""
        asked.append("trained" in asker)
        text = "No." if "trained" in asker else "Yes."
        return [[text] * len(of_image) for of_image in questions]

    monkeypatch.setattr(preferences, "ask_base", ask_base)
    monkeypatch.setattr(prepare, "load_one", lambda *args: SimpleNamespace(fingerprint="of it"))
    monkeypatch.setattr(prepare, "weights_of", lambda path: {"trained.safetensors": "1"})
    (root / "stage1").mkdir()
    (root / "stage1" / "config.json").write_text(json.dumps({"model_type": OURS}))

    def rows_of(base, output, *flags):
        prepare.main([str(root / base), "--output", str(root / output), *flags])
        return load_json(root / output / "pope_data.json")

    # Of what was trained: what it said wrongly is rejected, and the truth is chosen.
    again = rows_of("stage1", "again")
    assert not os.path.exists(root / "world" / "hadpo" / "said.json")
    labels = [q["label"] for note in notes for q in note["questions"]]
    assert [row["answer"] for row in again] == labels
    assert [row["reject"] for row in again if not row["correct"]] == ["No."] * labels.count("yes")

    # Of the base, with a teacher: what the teacher said is chosen, whatever is there.
    told = rows_of("base", "told", "--teacher", str(root / "stage1"))
    assert {row["answer"] for row in told} == {"no"} and not any(row["correct"] for row in told)
    assert {row["reject"] for row in told} == {"Yes."} and asked == [True, False, True]
    assert "mined from" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_refused(base_beside_its_world, monkeypatch):
    root = base_beside_its_world
    monkeypatch.setattr(prepare, "load_one", lambda *args: pytest.fail("it is read"))
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("mine")
    (root / "file").write_text("mine")
    for name, said in (("mine", "is not empty"), ("file", "cannot be written")):
        with pytest.raises(InputError, match=f"{root / name}: {said}"):
            prepare.main([str(root / "base"), "--output", str(root / name)])
    assert os.listdir(root / "mine") == ["notes.txt"] and (root / "file").read_text() == "mine"
