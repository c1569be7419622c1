"""Rows that are longer than the model's length, in scripts of few and of many tokens a letter."""
import json
import random

import pytest
from conftest import row_format, small_config

import eval_pope
from checkpoints.load import load_base
from data import IMAGE, Example, PackedDataset, Tokenizer
from support.common import InputError
from training.conversations import read_llava
from training.guards import long_rows, warn_of_cut_rows

THAI = "มีสุนัขอยู่ในภาพหรือไม่"                        # three tokens a letter
LONG = "is there a dog and a cat in the image: "        # far less than one


def ask(words, answer):
    question = f"{IMAGE}\n" + "Is there a cup? " * words
    return Example("a.jpg", [[(question, "Yes. " * answer)]])


def test_rows_that_are_too_long_are_counted_before_training(world, capsys):
    """Answers that will be cut at their end are counted, whatever their place; and a prompt, which
    is never cut, is an error.
    """
    tokenizer = Tokenizer(world.tokenizer)

    def dataset(examples):
        return PackedDataset(examples, row_format(small_config(), tokenizer))

    short = [ask(1, 1 + n % 3) for n in range(300)]
    assert warn_of_cut_rows(dataset(short)) == 0
    assert capsys.readouterr().out == ""
    mixed = dataset(short[:50] + [ask(1, 200)] + short[50:] + [ask(2, 150)])
    assert warn_of_cut_rows(mixed) == 2 == sum(mixed.row(i).cut > 0 for i in range(302))
    assert capsys.readouterr().out.startswith("2 of 302 rows are longer than the model's 256 ")
    assert warn_of_cut_rows(dataset([ask(1, 200)] * 150)) == 150                # nothing fits
    with pytest.raises(InputError, match="does not fit into 256 .*a.jpg.*never cut"):
        warn_of_cut_rows(dataset(short + [ask(90, 1)]))


# ---- Other scripts -------------------------------------------------------------------------------
# Of the two, the English row has three times the letters, more bytes, and far fewer tokens.


def rows_of(byte_tokenizer, examples):
    return PackedDataset(examples, row_format(small_config(), byte_tokenizer, max_length=600))


def english_and_thai(image, question, answer="Yes."):
    """150 long rows of English, and one in the middle that says something else."""
    mark = f"{IMAGE}\n" if image else ""
    english = Example(image, [[(mark + LONG * 20, LONG * 5)]])
    other = Example(image, [[(mark + question, answer)]])
    return [english] * 75 + [other] + [english] * 75


def on_disk(path, examples):
    rows = []
    for example in examples:
        turns = [{"from": who, "value": text} for turn in example.conversations[0]
                 for who, text in zip(("human", "gpt"), turn, strict=True)]
        rows.append({"image": example.image, "conversations": turns})
    path.write_text(json.dumps(rows, ensure_ascii=len(rows) % 2 == 0), encoding="utf-8")
    return read_llava(str(path), "")


@pytest.mark.parametrize("image", (None, "a.jpg"))
@pytest.mark.parametrize("where", ("list", "file"))
def test_a_prompt_of_few_letters_and_many_tokens(tmp_path, byte_tokenizer, where, image):
    examples = english_and_thai(image, THAI * 10)
    dataset = rows_of(byte_tokenizer, examples)
    lengths = [len(e.conversations[0][0][0]) for e in examples]
    assert lengths[75] < min(lengths[:75]) / 3 and dataset.row(0).cut == 0
    if where == "file":
        dataset = rows_of(byte_tokenizer, on_disk(tmp_path / "talk.json", examples))
    with pytest.raises(InputError, match="example 75 .*prompt of .* does not fit into 600"):
        warn_of_cut_rows(dataset)


@pytest.mark.parametrize("where", ("list", "file"))
def test_an_answer_of_few_letters_and_many_tokens(tmp_path, byte_tokenizer, capsys, where):
    """It is counted, though a hundred rows with more letters fit."""
    examples = english_and_thai("a.jpg", "Is there?", THAI * 10)
    if where == "file":
        examples = on_disk(tmp_path / "talk.json", examples)
    assert warn_of_cut_rows(rows_of(byte_tokenizer, examples)) == 1
    assert capsys.readouterr().out.startswith("1 of 151 rows are longer than the model's 600")


def test_an_image_behind_a_long_turn(byte_tokenizer):
    """Everything in front of the image belongs to what cannot be cut."""
    turns = [("Hi.", THAI * 10), (f"{IMAGE}\nWhat?", "A cat.")]
    with pytest.raises(InputError, match="example 1 .*does not fit into 600"):
        long_rows(rows_of(byte_tokenizer, [Example(None, [[turns[0]]]), Example("a.jpg", [turns])]))


def test_the_second_answer_of_a_pair(byte_tokenizer):
    pair = Example("a.jpg", [[(f"{IMAGE}\nIs it?", "No.")], [(f"{IMAGE}\nIs it?", THAI * 10)]])
    assert warn_of_cut_rows(rows_of(byte_tokenizer, [pair])) == 1


def test_no_row_is_missed(tmp_path, byte_tokenizer):
    """Random texts of several scripts: whatever does not fit is among the long rows, and a file's
    rows are those of the list."""
    rng, examples = random.Random(0), []
    for _ in range(400):
        def text(most):
            letters = rng.choice(("a dog ", "1234567890", "สุนัข", "漢字", "éß", "🐕‍🦺", '"\\\n</s>'))
            return "x" + "".join(rng.choices(letters, k=rng.randrange(most))) + "."  # noqa: B023
        turns = [(text(60), text(200)) for _ in range(rng.randint(1, 3))]
        image = rng.choice((None, "a.jpg"))
        if image:
            turns[0] = f"{IMAGE}\n{turns[0][0]}", turns[0][1]
        examples.append(Example(image, [turns]))
    dataset = rows_of(byte_tokenizer, examples)
    cut = {i for i in range(400) if dataset.row(i).cut}
    found = long_rows(dataset)
    assert 20 < len(cut) < 300 and cut <= set(found) and len(found) < 400
    again = rows_of(byte_tokenizer, on_disk(tmp_path / "talk.json", examples))
    assert long_rows(again) == found


def test_nothing_is_tokenised_where_all_fits(byte_tokenizer, monkeypatch):
    dataset = rows_of(byte_tokenizer, [Example("a.jpg", [[(f"{IMAGE}\nIs it?", "No.")]])] * 9)
    monkeypatch.setattr(dataset, "row", lambda i: pytest.fail("was made"))
    assert long_rows(dataset) == [] and warn_of_cut_rows(dataset) == 0


def test_a_long_question_of_pope_is_refused_before_any_is_asked(world, byte_tokenizer, tmp_path,
                                                                monkeypatch):
    with open(f"{world.pope}/coco_pope_random.json", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows[len(rows) // 2]["text"] = THAI * 40
    path = tmp_path / "coco_pope_random.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(*_):
        model = load_base(world.base)
        model.tokenizer = byte_tokenizer
        return model

    monkeypatch.setattr("eval_pope.load_all", load)
    monkeypatch.setattr("eval_pope.ask", lambda *_: pytest.fail("was asked"))
    words = [world.base, "--coco_path", world.coco, "--pope_path", str(path), "--output_dir",
             str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["eval_pope.py", *words])
    with pytest.raises(InputError, match="a prompt of .* does not fit into"):
        eval_pope.main()
