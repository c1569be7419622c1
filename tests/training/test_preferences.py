"""Preference pairs in other people's forms.

The golden test: the same handful of rows in every form gives the same rows of tokens as HA-DPO's
form of them, batch and picture included.
"""
import base64
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import dpo_flags, row_format, run_train
from PIL import Image
from short_runs import losses_of

from checkpoints.identity import data_digest
from checkpoints.load import load_base
from data import IGNORE, IMAGE, PackedDataset, Tokenizer, encode_conversation, read_hadpo
from support.common import InputError
from support.images import check_images
from training.conversations import image_paths
from training.flags import parse_flags
from training.guards import long_rows
from training.pairs import read_pair
from training.preferences import read_preferences

HANDFUL = [0, 3, 17, 60, 146]           # question pairs, and a description


@pytest.fixture(scope="module")
def handful(world):
    """HA-DPO's form → (its examples, [(image below world.vg, question, chosen, rejected)])."""
    read = read_hadpo(world.desc, world.pairs, world.vg, keep_correct=True)
    examples, rows = [read[i] for i in HANDFUL], []
    for example in examples:
        (question, chosen), = example.conversations[0]
        (_, rejected), = example.conversations[1]
        name = os.path.relpath(example.image, world.vg)
        rows.append((name, question.removeprefix(f"{IMAGE}\n"), chosen, rejected))
    return examples, rows


def in_base64(world, name):
    with open(os.path.join(world.vg, name), "rb") as file:
        return base64.b64encode(file.read()).decode()


def said(role, *parts):
    return {"role": role, "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


FORMS = {       # (world, image, question, chosen, rejected) → a row
    "RLAIF-V": lambda w, i, q, c, r: {"image": i, "question": q, "chosen": c, "rejected": r},
    "RLHF-V, text in JSON": lambda w, i, q, c, r: {
        "ds_name": "x", "image": {"path": i, "bytes": None},
        "text": json.dumps({"question": q, "chosen": c, "rejected": r})},
    "RLAIF-V, bytes": lambda w, i, q, c, r: {
        "image": {"bytes": in_base64(w, i), "path": "gone.jpg"}, "question": q, "chosen": c,
        "rejected": r},
    "data: address": lambda w, i, q, c, r: {
        "image": f"data:image/png;base64,{in_base64(w, i)}", "question": q, "chosen": c,
        "rejected": r},
    "TRL, plain": lambda w, i, q, c, r: {"prompt": q, "chosen": c, "rejected": r, "images": [i]},
    "TRL, messages": lambda w, i, q, c, r: {
        "prompt": [said("user", {"type": "image"}, text(q))],
        "chosen": [said("assistant", text(c))], "rejected": [said("assistant", text(r))],
        "images": [i]},
    "TRL, image in its part": lambda w, i, q, c, r: {
        "prompt": [said("user", {"type": "image", "image": i}, text(q))],
        "chosen": [{"role": "assistant", "content": c}],
        "rejected": [{"role": "assistant", "content": r}]},
    "TRL, no prompt": lambda w, i, q, c, r: {
        "chosen": [{"role": "user", "content": q}, {"role": "assistant", "content": c}],
        "rejected": [{"role": "user", "content": q}, {"role": "assistant", "content": r}],
        "images": [i]},
    "LLaMA-Factory": lambda w, i, q, c, r: {
        "conversations": [{"from": "human", "value": f"<image>{q}"}],
        "chosen": {"from": "gpt", "value": c}, "rejected": {"from": "gpt", "value": r},
        "images": [i]},
    "LLaMA-Factory, roles": lambda w, i, q, c, r: {
        "messages": [{"role": "user", "content": f"{q}\n<image>"}],
        "chosen": {"role": "assistant", "content": c},
        "rejected": {"role": "assistant", "content": r}, "images": i},
    "ms-swift": lambda w, i, q, c, r: {
        "messages": [{"role": "user", "content": f"<image>{q}"},
                     {"role": "assistant", "content": c}],
        "rejected_response": r, "images": [{"path": i}]},
}


def write(path, rows, form="lines"):
    content = json.dumps(rows, indent=1) if form == "list" else "\n".join(map(json.dumps, rows))
    path.write_text(content + "\n")
    return str(path)


def rows_of(dataset):
    """All that a row says, apart from where its picture lies."""
    return [vars(dataset.row(i)) | {"image": None} for i in range(len(dataset))]


def same(world, examples, golden):
    format = row_format(load_base(world.base).config, Tokenizer(world.tokenizer))
    ours, theirs = PackedDataset(examples, format), PackedDataset(golden, format)
    assert rows_of(ours) == rows_of(theirs)
    batches = [dataset[list(range(len(golden)))].tensors() for dataset in (ours, theirs)]
    assert batches[0].keys() == batches[1].keys() and "pixel_values" in batches[0]
    pixels = [batch["pixel_values"][batch["image_index"]] for batch in batches]
    assert torch.equal(*pixels)
    assert sorted(long_rows(ours)) == sorted(long_rows(theirs))
    return ours


@pytest.mark.parametrize("form", ("lines", "list"))
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_hadpos_tokens(world, handful, tmp_path, name, form):
    golden, rows = handful
    file = write(tmp_path / "rows.json", [FORMS[name](world, *row) for row in rows], form)
    examples = read_preferences([file], world.vg)
    check_images(image_paths(examples))
    same(world, examples, golden)
    size, has_image = examples.sizes()
    assert len(size) == len(golden) and has_image.all()
    assert pickle.loads(pickle.dumps(examples))[0].conversations == golden[0].conversations


def test_parquet(world, handful, tmp_path):
    """RLAIF-V's own file, in several groups, with the pictures inside."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    golden, rows = handful
    content = [{"ds_name": "RLAIF-V", "question": q, "chosen": c, "rejected": r,
                "image": {"bytes": base64.b64decode(in_base64(world, i)), "path": i}, "idx": n}
               for n, (i, q, c, r) in enumerate(rows)]
    path = str(tmp_path / "rlaif.parquet")
    parquet.write_table(pa.Table.from_pylist(content), path, row_group_size=2)
    examples = read_preferences([path], "")
    check_images(image_paths(examples))
    same(world, examples, golden)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(InputError, match="not readable as parquet"):
        read_preferences([path], "")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow cannot be imported.*pip install pyarrow"):
        read_preferences([str(tmp_path / "rows.parquet")], "")


def test_a_mixture_is_a_list(world, handful, tmp_path):
    """Files of several forms, one behind the other; another order is other data."""
    golden, rows = handful
    files = [write(tmp_path / f"{n}.json", [FORMS[name](world, *row) for row in rows[n::2]])
             for n, name in enumerate(("ms-swift", "RLAIF-V, bytes"))]
    examples = read_preferences(files, world.vg)
    same(world, examples, golden[::2] + golden[1::2])
    assert examples[-1].conversations == examples[4].conversations
    with pytest.raises(IndexError):
        examples[5]
    tokenizer = Tokenizer(world.tokenizer)
    digests = {data_digest(read_preferences(order, world.vg), tokenizer)
               for order in (files, files[::-1], files[:1])}
    assert len(digests) == 3


def test_earlier_answers_are_prompt(world, tmp_path):
    """Of a longer conversation only the last answers are learnt, and the prefix holds the rest."""
    row = {"messages": [{"role": "user", "content": "is there a dog"},
                        {"role": "assistant", "content": "yes"},
                        {"role": "user", "content": "and a cat"},
                        {"role": "assistant", "content": "no"}],
           "rejected_response": "yes there is"}
    example, = read_preferences([write(tmp_path / "talk.json", [row])], "")
    assert example.given == 1 and example.image is None
    tokenizer = Tokenizer(world.tokenizer)
    format = row_format(load_base(world.base).config, tokenizer)
    packed = PackedDataset([example], format).row(0)
    learnt = [[t for t, b in zip(packed.target, packed.target_branch, strict=True) if b == branch]
              for branch in (1, 2)]
    assert learnt == [tokenizer.encode("no") + [2], tokenizer.encode("yes there is") + [2]]
    ids, labels = encode_conversation(tokenizer, example.conversations[0], has_image=False)
    assert sum(label != IGNORE for label in labels) > len(learnt[0])
    assert packed.input_ids[:packed.branch.count(0)] == ids[:len(ids) - len(learnt[0])]


# ---- SENTINEL's form -----------------------------------------------------------------------------

LAKE = {"question": "is there a dog", "context": "yes there is.",
        "y_win": "a cat", "y_lose": "a dog"}


def by_image(folder, values):
    """A file of SENTINEL's form, beside a picture a.png."""
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    path = folder / "mined.json"
    path.write_text(json.dumps(values, indent=4))
    return str(path)


def learnt_of(row, branch):
    pairs = zip(row.target, row.target_branch, strict=True)
    return [token for token, number in pairs if number == branch]


def test_a_context_is_prompt(world, tmp_path):
    """It stands in the prefix and is not learnt; what follows it is, without `</s>`."""
    other = LAKE | {"context": None, "y_win": "no", "y_lose": "yes"}
    first = LAKE | {"context": "", "y_win": "no", "y_lose": "yes"}
    file = by_image(tmp_path, {"a.png": [LAKE, other], "./a.png": [first]})
    examples, tokenizer = read_preferences([file], str(tmp_path)), Tokenizer(world.tokenizer)
    format = row_format(load_base(world.base).config, tokenizer)
    packed = [PackedDataset(examples, format).row(i) for i in range(3)]
    assert [[learnt_of(row, branch) for branch in (1, 2)] for row in packed] == [
        [tokenizer.encode("a cat"), tokenizer.encode("a dog")],
        [tokenizer.encode("no") + [2], tokenizer.encode("yes") + [2]],      # a whole answer
        [tokenizer.encode("no"), tokenizer.encode("yes")]]                  # a first sentence
    ids, _ = encode_conversation(tokenizer, [(f"{IMAGE}\nis there a dog", None)])
    prefix = [token for token in packed[0].input_ids[:packed[0].branch.count(0)] if token >= 0]
    assert prefix == [token for token in ids if token >= 0] + tokenizer.encode("yes there is.")
    assert pickle.loads(pickle.dumps(examples))[0] == examples[0]


def test_images_by_their_number(tmp_path):
    """SENTINEL's own files say Visual Genome's ids, and --image_folder is Visual Genome's."""
    os.makedirs(tmp_path / "VG_100K")
    index = [{"image_id": 17, "url": "http://x/VG_100K/17.jpg"}]
    (tmp_path / "image_data.json").write_text(json.dumps(index))
    file = by_image(tmp_path, {"17": [LAKE], "a.png": [LAKE]})
    examples = read_preferences([file], str(tmp_path))
    assert [example.image for example in examples] == [
        str(tmp_path / "VG_100K" / "17.jpg"), str(tmp_path / "a.png")]


@pytest.mark.parametrize("values, message", (
    ({"a.png": [LAKE, LAKE | {"context": 3}]}, "row 1: its context is a int"),
    ({"a.png": [LAKE, LAKE | {"y_lose": " "}]}, "row 1: the rejected answer is empty"),
    ({"a.png": [LAKE, LAKE | {"y_lose": None}]}, "row 1: is no preference pair"),
    ({"a.png": [LAKE], "b.png": LAKE}, "image b.png: holds a dict where a list should be"),
    ({"a.png": [LAKE, 3]}, "image a.png: holds a int where a dict should be")))
def test_wrong_files_of_sentinels_form(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        read_preferences([by_image(tmp_path, values)], str(tmp_path))


def test_rows_stay_on_disk(world, handful, tmp_path):
    """What is read at the start is not kept: a row that changes on disk is another row."""
    _, rows = handful
    path = tmp_path / "rows.json"
    file = write(path, [FORMS["TRL, plain"](world, *row) for row in rows])
    examples = read_preferences([file], world.vg)
    before = examples[0].conversations[0][0][1]
    content = path.read_text()
    path.write_text(content.replace(before, "x" * len(before), 1))
    assert examples[0].conversations[0][0][1] == "x" * len(before)


QUESTION = {"question": "is there a dog", "chosen": "no", "rejected": "yes"}
WRONG = {       # what is wrong: (the row, what is said)
    "several images": (QUESTION | {"images": ["a.jpg", "b.jpg"]}, "has 2 images"),
    "a video": (QUESTION | {"videos": ["a.mp4"]}, "names 'videos'"),
    "an address": (QUESTION | {"image": "https://example.org/a.jpg"}, "is an address"),
    "a number": (QUESTION | {"image": 17}, "its image is a int"),
    "above the folder": (QUESTION | {"image": "../a.jpg"}, "does not lie below"),
    "an empty answer": (QUESTION | {"rejected": " "}, "the rejected answer is empty"),
    "no answers": ({"question": "is there a dog"}, r"no preference pair of a form .*\(keys: ques"),
    "HA-DPO's": ({"image_id": 1, "question": "q", "chosen": "c", "reject": "r"},
                 "--pope_data_path"),
    "a system prompt": (QUESTION | {"system": "be brief"}, "a system prompt of its own"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}], "chosen": {}, "rejected": {}},
               "is no message of user or assistant"),
    "two questions": ({"messages": [{"role": "user", "content": "a"}] * 2 + [
        {"role": "assistant", "content": "b"}], "rejected_response": "c"}, "turns must alternate"),
    "the mark twice": (QUESTION | {"image": "a.jpg", "question": "<image> or <image>"},
                       "stands elsewhere than once"),
    "no base64": (QUESTION | {"image": {"bytes": "%%"}}, "is no base64"),
    "text of no JSON": ({"text": "{", "image": "a.jpg"}, "'text' is no JSON"),
    "a list": ([1], "where an object should be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows(tmp_path, what):
    """One line with file and row, before anything is trained."""
    row, message = WRONG[what]
    if not isinstance(row, dict):
        with pytest.raises(InputError, match=message):
            read_pair(row, "rows.json, row 0")
        return
    file = write(tmp_path / "rows.json", [QUESTION, row])
    with pytest.raises(InputError, match=message) as error:
        examples = read_preferences([file], str(tmp_path))
        check_images(image_paths(examples))
    assert f"{file}, row 1" in str(error.value) and "\n" not in str(error.value)


def test_a_picture_in_a_row_is_checked(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(picture)
    cut = base64.b64encode(picture.read_bytes()[:40]).decode()
    file = write(tmp_path / "rows.json", [QUESTION | {"image": {"bytes": cut}}])
    with pytest.raises(InputError, match=r"row 0: is no"):
        check_images(image_paths(read_preferences([file], "")))


def test_training_on_them(world, handful, tmp_path, in_this_process):
    """The flag, from the command line to the losses: as with HA-DPO's own files of these rows."""
    _, rows = handful
    base = ["--model_name_or_path", world.base]
    same = ["--stage", 1, "--max_steps", 2, "--learning_rate", "1e-2", "--seed", 3,
            "--per_device_train_batch_size", 5, "--gradient_accumulation_steps", 1]
    files = [write(tmp_path / f"{n}.json", [FORMS[name](world, *row) for row in rows])
             for n, name in enumerate(("TRL, messages", "RLAIF-V, bytes"))]
    for n, file in enumerate(files):
        run_train("--preference_data", file, "--image_folder", world.vg, *base, *same,
                  "--output_dir", tmp_path / str(n), *(["--cache_features", tmp_path / "kept"] * n))
    pairs = [{"image_id": n, "question": q, "answer": "", "chosen": c, "reject": r,
              "correct": False} for n, (i, q, c, r) in enumerate(rows)]
    os.makedirs(tmp_path / "VG" / "VG_100K")
    index = [{"image_id": n, "url": f"http://x/VG_100K/{n}.png"} for n in range(len(rows))]
    for n, (name, *_) in enumerate(rows):
        shutil.copy(os.path.join(world.vg, name), tmp_path / "VG" / "VG_100K" / f"{n}.png")
    write(tmp_path / "VG" / "image_data.json", index, "list")
    (tmp_path / "desc.json").write_text("{}")
    run_train("--vg_path", tmp_path / "VG", "--desc_data_path", tmp_path / "desc.json",
              "--pope_data_path", write(tmp_path / "pairs.json", pairs, "list"), *base, *same,
              "--output_dir", tmp_path / "hadpo")
    losses = [losses_of(tmp_path / name) for name in ("0", "1", "hadpo")]
    assert len(losses[0]) == 2 and losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_flags(world, tmp_path):
    base = ["--model_name_or_path", world.base]
    for flags, message in (
            (["--preference_data", "no.json", *base], "--preference_data no.json: no such file"),
            (["--preference_data", world.pairs, *dpo_flags(world)],
             "--vg_path and --preference_data are two kinds"),
            (["--preference_data", world.pairs, "--loss", "sft", *base], "sft name HA-DPO"),
            (["--preference_data", world.pairs], "everything is the tiny world's own")):
        with pytest.raises(InputError, match=message):
            parse_flags(flags)
