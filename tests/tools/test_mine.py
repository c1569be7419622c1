"""tools/mine.py: pairs by hand, drawn sentences beside a model that is run alone, the tiny world,
and COCO's form from the first description to a training run.
"""
import json
import os

import pytest
import torch
from beside import checkpoints_beside
from conftest import load_json, run_train, small_llava
from programs import TwoProcesses, shell, succeeds
from short_runs import losses_of

from checkpoints.load import load_base
from data import EOS, read_hadpo
from evals.objects import list_of_words
from evals.sampling import Conversation, Sampling
from tiny.pictures import NAMES
from tiny.world import hallucinated
from tools import mine
from tools.mine import Sentence, continuations, pairs_of, sort_out
from training.preferences import read_preferences

MINE = "python", "-m", "tools.mine"
WORDS = list_of_words(["dog", "cat", "boat", "kite"])


# ---- By hand -------------------------------------------------------------------------------------


def sentences(*texts, ended=()):
    return [Sentence([n], text, text in ended) for n, text in enumerate(texts)]


def test_sentences_are_sorted_out():
    """Right ones that name something new come first; what names nothing is neither."""
    drawn = sentences("A dog.", "A dog and a boat.", "It is sunny.", "A cat.", "Two kites.")
    right, wrong, other = ([sentence.text for sentence in kind] for kind in
                           sort_out(drawn, "Here is a dog.", {"dog", "cat"}, WORDS))
    assert right == ["A cat.", "A dog."] and other == ["It is sunny."]
    assert wrong == ["A dog and a boat.", "Two kites."]


def mined(steps, shown=("dog", "cat"), most=8):
    """What pairs_of makes of the draws of each step → (its rows, the contexts that were asked)."""
    contexts, steps = [], iter(steps)

    def draw(before):
        contexts.append(" ".join(sentence.text for sentence in before))
        return next(steps, [])

    return pairs_of(draw, set(shown), WORDS, most), contexts


def test_the_description_goes_on_behind_the_right_sentence():
    rows, contexts = mined([
        sentences("A boat.", "A dog.", "A kite."),          # a pair
        sentences("It is sunny.", "A dog sits."),           # nothing wrong, so no pair
        sentences("A kite.", "It is late."),                # nothing right, so no pair
        sentences("A cat.", "A boat and a cat.")])
    assert rows == [
        {"context": "", "y_win": "A dog.", "y_lose": "A boat."},
        {"context": "A dog. A dog sits. It is late.", "y_win": "A cat.",
         "y_lose": "A boat and a cat."}]
    assert contexts == ["", "A dog.", "A dog. A dog sits.", "A dog. A dog sits. It is late.",
                        "A dog. A dog sits. It is late. A cat."]


@pytest.mark.parametrize("steps, count, asked", (
    ([sentences("A boat.", "A kite.")] * 2, 0, 1),                          # all is wrong
    ([sentences("A dog.", "A boat.", ended=["A dog."])] * 2, 1, 1),         # the description ends
    ([sentences("A dog.", "A cat.", "A boat.", ended=["A dog."])] * 2, 2, 3),
    ([sentences("A dog.", "A boat.")] * 9, 3, 3)))                          # most = 3
def test_where_a_description_ends(steps, count, asked):
    rows, contexts = mined(steps, most=3)
    assert (len(rows), len(contexts)) == (count, asked)


# ---- What is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ("full", "self_attn", None))
def test_a_branch_is_drawn_as_if_alone(world, variant):
    """With top-k 1 every draw is the greedy answer, which model and cache give one by one; and the
    conversation goes on behind it as if it had said that.
    """
    model = load_base(world.base)
    trunk, head = small_llava(variant=variant, vocab_size=len(model.tokenizer))
    model.trunk, model.heads = trunk, {"base": head}
    image = os.path.join(world.coco, "val2014", sorted(os.listdir(f"{world.coco}/val2014"))[0])
    question, greedy = "Describe this image in detail.", Sampling(max_new_tokens=12)
    expected = list(Conversation(model, head, image).answer(question, greedy))
    # A sentence ends with a character that the fifth token brings, or later if it came before.
    text = model.tokenizer.decode(expected[:5])
    ends = text[-1]
    length = next(n for n in range(1, 13)
                  if model.tokenizer.decode(expected[:n]).rstrip().endswith(ends))
    conversation = Conversation(model, head, image)
    conversation.ids += conversation.turn(question)
    sampling = Sampling(temperature=1.0, top_k=1, max_new_tokens=12)
    drawn = continuations(conversation, 3, ends, sampling, None)
    assert [sentence.ids for sentence in drawn] == [expected[:length]] * 3
    assert not any(sentence.ended for sentence in drawn)
    conversation.ids += expected[:length]
    after = conversation.read_on().argmax(-1).tolist()
    assert after == (expected[length:length + 1] or [EOS])


def test_draws_differ_and_long_ones_are_left_out(world):
    model = load_base(world.base)
    conversation = Conversation(model, model.head)
    conversation.ids += conversation.turn("Is there a dog in the image?")
    before, generator = list(conversation.ids), torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, max_new_tokens=3)
    drawn = continuations(conversation, 40, "aeiou", sampling, generator)
    assert conversation.ids == before
    assert 1 < len({sentence.text for sentence in drawn}) and len(drawn) < 40
    assert all(len(sentence.ids) <= 3 for sentence in drawn)
    assert all(sentence.ended or sentence.text[-1] in "aeiou" for sentence in drawn)


# ---- The tiny world ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    """The session's world and base, and a checkpoint whose `lm_head` says other things."""
    return checkpoints_beside(world, tmp_path_factory.mktemp("mine"))


def said_by(root, name, note):
    """What a checkpoint says of a preference image, asked alone."""
    base = load_base(str(root / "base"))
    if name == "stage1":
        base.head.lm_head.weight.data = base.head.lm_head.weight.roll(1, 0)
    number = note["image_id"]
    image = root / "world" / "VG" / f"VG_100K{'_2' if number % 2 else ''}" / f"{number}.jpg"
    ids = Conversation(base, base.head, str(image)).answer(
        note["describe"], Sampling(max_new_tokens=40))
    return base.tokenizer.decode(list(ids)).strip()


@pytest.mark.parametrize("name", ("base", "stage1"))
def test_the_tiny_world(root, tmp_path, name):
    """Base and second round: what was said, and the same up to the first wrong object."""
    file, notes = tmp_path / "desc.json", load_json(root / "world" / "preference.json")
    said = succeeds(*MINE, root / name, "--output", file)
    pairs = load_json(file)
    assert f"24 images, described by {name}: greedy" in said
    assert said.splitlines()[-1] == (
        f"{len(pairs)} pairs about {len(pairs)} of 24 images: {file}")
    of_image = {str(note["image_id"]): note for note in notes}
    assert 0 < len(pairs) and pairs.keys() <= of_image.keys()
    for number, row in list(pairs.items())[:3]:
        note, (chosen,), (rejected,) = of_image[number], row["chosen"], row["rejected"]
        assert rejected == said_by(root, name, note)
        assert hallucinated(rejected, note["objects"])
        named = hallucinated(rejected, [])
        wrong = [word not in note["objects"] for word in named].index(True)
        assert hallucinated(chosen, [])[:wrong] == named[:wrong]
        assert sorted(hallucinated(chosen, [])) == sorted(note["objects"])
    for number in of_image.keys() - pairs.keys():
        assert not hallucinated(said_by(root, name, of_image[number]),
                                of_image[number]["objects"])
    examples = read_hadpo(str(file), str(root / "world" / "hadpo" / "pope_data.json"),
                          str(root / "world" / "VG"))
    assert examples[-1].conversations[1][0][1] == list(pairs.values())[-1]["rejected"][0]
    assert not [path for path in os.listdir(root / "world") if path.startswith("unfinished")]


def test_rounds_in_the_tiny_world(root):
    """Mine, train, mine from what was trained, train on; only the descriptions are named. The first
    mining gives the pairs of a run without files.
    """
    few = "--stage", 1, "--max_steps", 2, "--per_device_train_batch_size", 8
    for name, before in (("one", "base"), ("two", "one")):
        succeeds(*MINE, root / before, "--output", root / f"{name}.json")
        init = ["--init", root / before] * (name == "two")
        said = succeeds("python", "train.py", *few, *init, "--desc_data_path",
                        root / f"{name}.json", "--output_dir", root / name)
        pairs = len(load_json(root / f"{name}.json"))
        assert f"{144 + 2 * pairs} examples, 2 steps" in said
    assert load_json(root / "one.json") == load_json(root / "world" / "hadpo" / "desc_data.json")
    assert load_json(root / "one.json") != load_json(root / "two.json")


# ---- COCO's form ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(root):
    """Flags for images whose objects are known, in COCO's form. A random model's "sentences" end
    with any vowel.
    """
    truth = load_json(root / "world" / "world.json")["evaluation"]
    classes = load_json(root / "world" / "world.json")["classes"]
    values = {"images": [{"id": n, "file_name": image} for n, image in enumerate(truth)],
              "categories": [{"id": n, "name": name} for n, name in enumerate(classes)],
              "annotations": [{"image_id": n, "category_id": classes.index(name)}
                              for n, facts in enumerate(truth.values())
                              for name in facts["objects"]]}
    (root / "detected.json").write_text(json.dumps(values))
    (root / "synonyms.txt").write_text("\n".join(classes))
    return ["--images", root / "world" / "coco" / "val2014", "--annotations",
            root / "detected.json", "--synonyms", root / "synonyms.txt", "--samples", 16,
            "--temperature", 1, "--max_new_tokens", 12, "--max_sentences", 4, "--ends", "aeioudt"]


def test_from_objects_to_a_run(root, coco, tmp_path, in_this_process):
    """Mined, read, trained on; the kept features of rows with a context are those of the trunk."""
    file = tmp_path / "mined.json"
    said = succeeds(*MINE, root / "base", *coco, "--output", file)
    values, truth = load_json(file), load_json(root / "world" / "world.json")["evaluation"]
    rows = [(image, row) for image, rows in values.items() for row in rows]
    assert f"{len(rows)} pairs about {len(values)} of 12 images: {file}" in said
    assert any(row["context"] for _, row in rows)
    words = list_of_words(NAMES)
    for image, row in rows:
        there = set(truth[image]["objects"])
        context, win, lose = ({mention.name for mention in words.mentions(row[key])}
                              for key in ("context", "y_win", "y_lose"))
        assert context <= there and win and win <= there and lose - there
    folder = str(root / "world" / "coco" / "val2014")
    examples = read_preferences([str(file)], folder)
    assert len(examples) == len(rows) and examples[0].context == rows[0][1]["context"]

    for kept in (0, 1):
        run_train("--model_name_or_path", root / "base", "--preference_data", file,
                  "--image_folder", folder, "--stage", 1, "--max_steps", 2, "--learning_rate",
                  "1e-2", "--sft_weight", 1, "--per_device_train_batch_size", 4,
                  "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / str(kept),
                  *(["--cache_features", tmp_path / "kept"] * kept))
    losses = [losses_of(tmp_path / str(kept)) for kept in (0, 1)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_two_processes_mine_the_same(root, coco, tmp_path):
    flags = root / "stage1", *coco, "--output"
    succeeds(*MINE, *flags, tmp_path / "one")
    TwoProcesses("-m")("tools.mine", *flags, tmp_path / "two")
    assert load_json(tmp_path / "one") == load_json(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_an_interruption_keeps_what_is_there(root, coco, tmp_path, monkeypatch, capsys):
    real, asked = mine.mine_image, []

    def run(output, stop=99):
        def counting(model, path, *rest):
            if len(asked) == stop:
                raise KeyboardInterrupt
            asked.append(os.path.basename(path))
            return real(model, path, *rest)

        asked.clear()
        monkeypatch.setattr(mine, "mine_image", counting)
        monkeypatch.setattr("sys.argv", ["mine", *map(str, [root / "base", *coco, "--output",
                                                            output])])
        mine.main()

    run(tmp_path / "whole.json")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "cut.json", 5)
    assert ended.value.code == 130 and "5 of 12 images are kept" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "cut.json")
    first = list(asked)
    run(tmp_path / "cut.json")
    assert len(asked) == 7 and not {*first} & {*asked}
    assert load_json(tmp_path / "cut.json") == load_json(tmp_path / "whole.json")
    assert sorted(os.listdir(tmp_path)) == ["cut.json", "whole.json"]


def test_what_is_refused(root, coco, tmp_path):
    """One line, before a model is loaded; a file that is there stays."""
    there = tmp_path / "there.json"
    there.write_text("mine")
    new = tmp_path / "new.json"
    for flags, message in (
            (["--output", there], "exists already"),
            (["--output", tmp_path / "no" / "new.json"], "lies in none"),
            (["--output", new, "--images", tmp_path], "--annotations is missing"),
            (["--output", new, "--annotations", root / "detected.json"], "--images is missing"),
            (["--output", new, *coco, "--samples", 1], "two samples are needed"),
            (["--output", new, *coco, "--ends", ""], "names no character"),
            (["--output", new, *coco, "--temperature", -1], "--temperature -1"),
            (["--output", new, *coco, "--images", tmp_path], "holds none of the 12 images")):
        done = shell(*MINE, root / "base", *flags)
        assert done.returncode == 1 and message in done.stderr, (flags, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert there.read_text() == "mine" and not new.exists()
