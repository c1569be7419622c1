"""data.py: HA-DPO's reader, tokens and labels, and one line that names what is wrong and where."""
import json
import os
import random
import re

import pytest
import sentencepiece
from conftest import load_json, row_format, small_config
from small_files import (
    DESCRIPTIONS,
    INDEX,
    PAIRS,
    assert_names_the_fault,
    changed,
    write_files,
)

from data import (
    BOS,
    DESCRIBE,
    EOS,
    IGNORE,
    IMAGE,
    IMAGE_ID,
    PAD,
    PackedDataset,
    Tokenizer,
    encode_conversation,
    read_hadpo,
)
from support.common import InputError
from support.images import check_images
from support.templates import SYSTEM
from training.conversations import image_paths


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer(world.tokenizer)


# ---- HA-DPO's files ------------------------------------------------------------------------------


def read(paths, **options):
    return read_hadpo(paths["desc"], paths["pairs"], paths["vg"], **options)


@pytest.mark.parametrize("keep_correct", (False, True))
def test_hadpo_order_and_sampling(tmp_path, keep_correct):
    """Question rows first, then the descriptions twice; one draw each of chosen, rejected and
    prompt, from seed 42.
    """
    paths = write_files(tmp_path)

    def image(i):
        return os.path.join(paths["vg"], "VG_100K_2" if int(i) % 2 else "VG_100K", f"{i}.jpg")

    expected = [(image(row["image_id"]), row["question"], row["chosen"], row["reject"])
                for row in PAIRS if keep_correct or not row["correct"]]
    random.seed(42)
    drawn = []
    for i, row in DESCRIPTIONS.items():
        chosen, rejected = random.choice(row["chosen"]), random.choice(row["rejected"])
        drawn.append((image(i), random.choice(DESCRIBE), chosen, rejected))
    expected += drawn + drawn
    examples = read(paths, keep_correct=keep_correct)
    assert [e.image for e in examples] == [image for image, *_ in expected]
    assert [e.conversations for e in examples] == [
        [[(f"<image>\n{q}", chosen)], [(f"<image>\n{q}", rejected)]]
        for _, q, chosen, rejected in expected]


def test_readers_take_the_tiny_world(world):
    pairs = read_hadpo(world.desc, world.pairs, world.vg)
    wrong = [row for row in load_json(world.pairs) if not row["correct"]]
    assert len(pairs) == len(wrong) + 2 * len(load_json(world.desc)) and len(wrong) > 24
    check_images(image_paths(pairs))


@pytest.mark.parametrize("written", (str, int, "00{}".format))
@pytest.mark.parametrize("indexed", (str, int, "00{}".format))
def test_an_id_is_the_same_as_text_and_as_a_number(tmp_path, indexed, written):
    """In Visual Genome's index, in the questions and in the descriptions, whose ids are keys."""
    index = [row | {"image_id": indexed(row["image_id"])} for row in INDEX]
    pairs = [row | {"image_id": written(row["image_id"])} for row in PAIRS]
    descriptions = {str(written(int(i))): row for i, row in DESCRIPTIONS.items()}
    expected = read(write_files(tmp_path))
    paths = write_files(tmp_path, index=index, pairs=pairs, desc=descriptions)
    assert read(paths) == expected and len(expected) == 6


@pytest.mark.parametrize("name", ("a7", "²", "7" * 5000))
def test_an_id_need_not_be_a_number(tmp_path, name):
    paths = write_files(tmp_path, index=changed(INDEX, 0, "image_id", value=name),
                        pairs=changed(PAIRS, 0, "image_id", value=name),
                        desc={"3": DESCRIPTIONS["3"]})
    assert read(paths)[0].image == os.path.join(paths["vg"], "VG_100K_2", "1.jpg")


@pytest.mark.parametrize("name", ("pairs", "desc"))
def test_the_files_of_instructblip_are_named(tmp_path, name):
    """HA-DPO publishes them beside LLaVA's, under the same names and in another form."""
    theirs = {"pairs": [{{"reject": "rejected"}.get(key, key): value for key, value in row.items()}
                        for row in PAIRS],
              "desc": [{"image_id": i, **row} for i, row in DESCRIPTIONS.items()]}
    paths = write_files(tmp_path, **{name: theirs[name]})
    assert_names_the_fault(lambda: read(paths), paths[name],
                           r"is HA-DPO's file for InstructBLIP.*llava-v1\.5$")


BAD = {  # what is wrong: ({file: content}, what the message says besides the file's name)
    "pairs cut": ({"pairs": json.dumps(PAIRS)[:150]}, "char|column"),
    "descriptions cut": ({"desc": json.dumps(DESCRIPTIONS)[:40]}, "char|column"),
    "index cut": ({"index": json.dumps(INDEX)[:60]}, "char|column"),
    "empty file": ({"pairs": ""}, "JSON"),
    "question is a number": ({"pairs": changed(PAIRS, 2, "question", value=7)},
                             "row 2.*question"),
    "no chosen": ({"pairs": changed(PAIRS, 0, "chosen", value=None)}, "row 0.*chosen"),
    "correct is a word": ({"pairs": changed(PAIRS, 1, "correct", value="no")}, "row 1.*correct"),
    "row is a number": ({"pairs": changed(PAIRS, 1, value=5)}, "row 1"),
    "pairs are an object": ({"pairs": {"rows": PAIRS}}, ""),
    "pairs are a number": ({"pairs": 5}, ""),
    "image_id is a list": ({"pairs": changed(PAIRS, 0, "image_id", value=[1])}, "image_id"),
    "unknown image_id": ({"pairs": changed(PAIRS, 0, "image_id", value=77)},
                         "77.*image_data.json"),
    "unknown image_id of a description":
        ({"desc": changed(DESCRIPTIONS, "88", value=DESCRIPTIONS["1"])}, "88.*image_data.json"),
    "descriptions are a list": ({"desc": [DESCRIPTIONS]}, ""),
    "chosen is a text": ({"desc": changed(DESCRIPTIONS, "1", "chosen", value="c")},
                         "(row 1|image 1).*chosen"),
    "chosen holds a number": ({"desc": changed(DESCRIPTIONS, "1", "chosen", value=[5])},
                              "(row 1|image 1).*chosen"),
    "nothing rejected": ({"desc": changed(DESCRIPTIONS, "1", "rejected", value=[])},
                         "image 1.*rejected"),
    "chosen is empty": ({"pairs": changed(PAIRS, 2, "chosen", value=" ")}, "row 2.*empty"),
    "rejected is empty": ({"desc": changed(DESCRIPTIONS, "1", "rejected", value=["\n"])},
                          "row 1.*image 1 is empty"),
    "index without url": ({"index": changed(INDEX, 1, "url", value=None)}, "row 1.*url"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path, what):
    changes, place = BAD[what]
    paths = write_files(tmp_path, **changes)
    assert_names_the_fault(lambda: read(paths), paths[next(iter(changes))], place)


@pytest.mark.parametrize("absent", ("desc", "pairs", "vg"))
def test_absent_files_are_named(tmp_path, absent):
    paths = write_files(tmp_path) | {absent: str(tmp_path / "nowhere")}
    with pytest.raises(InputError, match="nowhere.*no such file"):
        read(paths)


# ---- Tokens and labels ---------------------------------------------------------------------------


def test_answers_without_words_are_an_error(tokenizer):
    for answer in ("", "  \n"):
        with pytest.raises(InputError, match="'What\\?'.*empty"):
            encode_conversation(tokenizer, [("What?", answer)])


def test_conversation_layout(tokenizer):
    """One BOS; the image's mark between two pieces of text; labels on answers and their </s>, and
    on nothing else.
    """
    turns = [(f"{IMAGE}\nIs there a cup in the image?", "Yes, there is a cup in the image."),
             ("Is there a dog in the image?", "No.")]
    ids, labels = encode_conversation(tokenizer, turns)
    assert len(ids) == len(labels)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert ids[-1] == EOS and ids.count(EOS) == 2 and ids.count(IMAGE_ID) == 1
    at = ids.index(IMAGE_ID)
    assert tokenizer.decode(ids[:at]).strip() == f"{SYSTEM} USER:"
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))

    runs = re.findall("1+", "".join(str(int(label != IGNORE)) for label in labels))
    assert [len(run) for run in runs] == [len(tokenizer.encode(answer)) + 1 for _, answer in turns]
    supervised = [label for label in labels if label != IGNORE]
    end = supervised.index(EOS)
    assert tokenizer.decode(supervised[:end]) == turns[0][1]
    assert tokenizer.decode(supervised[end:]) == turns[1][1]

    whole = tokenizer.decode([i for i in ids[at + 1:] if i != EOS])    # behind `</s>` is no space
    texts = [f"USER: {q.removeprefix(IMAGE)} ASSISTANT: {a}" for q, a in turns]
    expected = "".join("".join(texts).split()).removeprefix("USER:")
    assert "".join(whole.split()) == expected


def test_open_prompt_is_the_beginning_of_the_answered_one(tokenizer):
    question = f"{IMAGE}\nIs there a cup in the image?"
    open_ids, open_labels = encode_conversation(tokenizer, [(question, None)])
    ids, labels = encode_conversation(tokenizer, [(question, "No.")])
    length = len(open_ids)
    assert ids[:length] == open_ids
    assert set(open_labels) == {IGNORE} and set(labels[:length]) == {IGNORE}
    assert IGNORE not in labels[length:]


@pytest.mark.parametrize("text", ("</s>", "<s>No</s>", "Yes</s> there", " </s>", "a<s>"))
def test_control_tokens_are_text(tokenizer, text):
    """Whoever types `</s>` has typed four characters: no end of the sequence, no beginning."""
    assert not {BOS, EOS} & set(tokenizer.encode(text)) and len(tokenizer.encode(text)) >= 3
    assert not {BOS, EOS} & set(tokenizer.encode(text, continues=True))
    ids, labels = encode_conversation(tokenizer, [(f"{IMAGE}\n{text}?", f"Yes {text}")])
    assert ids.count(BOS) == 1 and ids.count(EOS) == 1 and labels.count(EOS) == 1


@pytest.mark.parametrize("text", ("", "Is there a cup", " two  spaces", "\nfirst", "a\n\nb",
                                  "Ünïcödé 漢字 🙂", "USER: x ASSISTANT:"))
def test_encode_decode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < len(tokenizer) for i in ids)
    if PAD not in ids:                                        # the tiny vocabulary knows no Chinese
        assert tokenizer.decode(ids) == text

    def pieces(ids):
        return "".join(tokenizer.model.id_to_piece(i) for i in ids)

    # Behind a control token the first piece has no space mark; nothing else changes.
    if ids and PAD not in ids:
        continued = tokenizer.encode(text, continues=True)
        assert pieces(continued) == pieces(ids).removeprefix("\u2581")


def test_decode_skips_control_ids(tokenizer):
    assert tokenizer.decode([BOS, *tokenizer.encode("Yes"), EOS, PAD, PAD]) == "Yes"


def test_tokenizer_files_are_checked(tmp_path, world):
    with pytest.raises(InputError, match="no such file.*tokenizer.model"):
        Tokenizer(str(tmp_path / "tokenizer.model"))
    with open(world.tokenizer, "rb") as file:
        beginning = file.read(500)
    for content in (b"", b"hello, I am no model", beginning):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match="bad.model"):
            Tokenizer(str(tmp_path / "bad.model"))


def test_other_tokenizers_are_refused(tmp_path):
    """Pad, bos and eos that are not LLaMA's are the answers that never stop (pitfall 16)."""
    with open(tmp_path / "t5.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world"] * 9), model_writer=file, model_type="char",
            vocab_size=12, unk_id=2, bos_id=-1, eos_id=1, pad_id=0, minloglevel=2)
    with pytest.raises(InputError, match=r"\(2, -1, 1\).*\(0, 1, 2\)"):
        Tokenizer(str(tmp_path / "t5.model"))


def test_image_mark_in_a_users_text(tmp_path, tokenizer):
    """A question that itself says <image> must not ask for a second picture: 36 patches for 18
    would shift every row.
    """
    question = "What does <image> mean?"
    paths = write_files(tmp_path, pairs=changed(PAIRS, 0, "question", value=question))
    try:
        row = PackedDataset(read(paths), row_format(small_config(), tokenizer)).row(0)
    except InputError:
        return
    assert row.input_ids.count(IMAGE_ID) == 9
