"""Conversations that stay on disk, rows without an image, and micro batches of similar length.

The oracle of the index is `json.load`: whatever it finds in a file, the indexed rows must be the same, however the file is
written and wherever the pieces that it is read in happen to end.
"""
import json
import os
import pickle
import random
import re

import numpy as np
import pytest
import torch
from conftest import largest_difference, load_json, small_llava, succeeds
from PIL import Image

import data
import readers
from data import ImageProcessor, PackedDataset, ResumableSampler, Tokenizer, check_images, collate, pack
from dpo import token_logps
from model import answer_states
from readers import Example, InputError, image_paths, index_rows, read_llava, row_lengths, run_program
from test_packed import PATCHES, make_sequences, pixels

NASTY = ('"', '\\', '\\\\', '\\"', '{', '}', '[', ']', '{"', '"}', ',', '\n', '\t', "/", "\u2028", "é", "漢", "🙂", "\x00", " ", "a",
         '"image": "no.jpg"')


def random_rows(seed, count):
    """Rows as LLaVA's, with texts that look like JSON, some without an image, with other keys before and behind."""
    rng = random.Random(seed)
    text = lambda: "".join(rng.choices(NASTY, k=rng.randrange(1, 30)))
    rows = []
    for n in range(count):
        image = rng.choice((None, None, f"{n % 5}.jpg", f'a "{n % 3}" \\ {{é🙂.jpg'))
        turns = [{"from": who, "value": text() + "."} for _ in range(rng.randint(1, 3)) for who in ("human", "gpt")]
        turns[0]["value"] = ("<image>\n" if image else "") + "What? " + turns[0]["value"]
        more = rng.choice(({}, [], {"a": [{"b": "}"}]}, None, -1.5e3, "\\"))
        row = {"id": text(), "image": image, "conversations": turns, "more": more}
        if rng.random() < .3:
            row = dict(reversed(row.items()))
        if image is None and rng.random() < .7:
            del row["image"]
        rows.append(row)
    return rows


FORMS = {
    "dense list": lambda rows: json.dumps(rows, separators=(",", ":")),
    "list": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented list": lambda rows: json.dumps(rows, indent=2),
    "tabs": lambda rows: "\r\n " + json.dumps(rows, indent="\t", ensure_ascii=False).replace("/", "\\/") + "\n\n",
    "a row a line": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "blank lines": lambda rows: "\n\n" + "".join(json.dumps(row) + "\r\n\n" for row in rows),
}


@pytest.mark.parametrize("chunk", (1, 2, 7, 64, 1000, None))
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_that_json_finds(tmp_path, monkeypatch, form, chunk):
    """However the pieces end: in a text, behind a backslash, inside of a letter, between two rows."""
    if chunk:
        monkeypatch.setattr(readers, "CHUNK", chunk)
    rows, path = random_rows(len(form), 60), tmp_path / "talk.json"
    path.write_text(FORMS[form](rows), encoding="utf-8")
    spans, has_image, names = index_rows(str(path))
    content = path.read_bytes()
    assert [json.loads(content[begin:end]) for begin, end in spans] == rows
    assert has_image.tolist() == [bool(row.get("image")) for row in rows]
    examples = read_llava(str(path), "images")
    expected = list(dict.fromkeys(os.path.join("images", row["image"]) for row in rows if row.get("image")))
    assert image_paths(examples) == expected == list(dict.fromkeys(e.image for e in examples if e.image))
    assert len(examples) == 60 and examples[-1] == examples[59] == list(examples)[59]
    with pytest.raises(IndexError):
        examples[60]


def test_many_random_files(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    for seed in range(100):
        rng = random.Random(seed)
        monkeypatch.setattr(readers, "CHUNK", rng.randint(1, 300))
        rows = random_rows(seed, rng.randint(1, 12))
        path.write_text(rng.choice(list(FORMS.values()))(rows), encoding="utf-8")
        content = path.read_bytes()
        assert [json.loads(content[begin:end]) for begin, end in index_rows(str(path))[0]] == rows


def test_empty_list_holds_no_rows(tmp_path):
    (tmp_path / "talk.json").write_text(" [ ]\n")
    examples = read_llava(str(tmp_path / "talk.json"), "images")
    assert len(examples) == 0 and not examples and image_paths(examples) == [] and row_lengths(examples, 9).shape == (0,)


GOOD = json.dumps([{"id": "{", "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]}
                   for n in range(5)])
ROW = GOOD[1:-1].split(', {"id"')[0]
BROKEN = {  # name: (content, what the message says)
    "cut in a row": (GOOD[:-30], "row 4.*does not end.*cut short"),
    "cut behind a comma": (f"[{ROW},\n{ROW},", "row 2.*without a ].*cut short"),
    "cut in front of the bracket": (GOOD[:-1], "row 5.*without a ].*cut short"),
    "cut line": (f"{ROW}\n{ROW}\n{ROW[:40]}", "row 2.*does not end"),
    "nothing": ("", "is empty"), "white space": (" \n ", "is empty"),
    "a number among rows": (f"[{ROW}, 5, {ROW}]", "row 1.*'5,{"),
    "a text among rows": (f'[{ROW}, "{{}}", {ROW}]', "row 1.*here stands"),
    "no comma": (f"[{ROW} {ROW}]", "row 1.*one comma"), "two commas": (f"[{ROW},, {ROW}]", "row 1.*one comma"),
    "a list of lists": (f"[[{ROW}]]", r"row 0.*here stands"), "too many braces": (f"[{ROW}}}, {ROW}]", "row 1.*here stands '}"),
    "something behind": (f"[{ROW}] x", "here stands 'x'"),
    "a web page": ("<!DOCTYPE html><html lang=\"en\">", "row 0.*here stands '<!DOC"),
    "a number": ("5", "row 0.*'5'"), "a quote too few": (GOOD.replace('"q1"', '"q1'), "row 1.*does not end"),
    "an object of rows": (f'{{"rows": [{ROW}]}}', "row 0.*conversations"),
    "broken inside": (GOOD.replace('"q2"}', '"q2",}'), "row 2.*not readable as JSON.*column"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(tmp_path, monkeypatch, what):
    content, place = BROKEN[what]
    path = tmp_path / "talk.json"
    path.write_text(content)
    messages = set()
    for chunk in (1, 50, 2 ** 19):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        with pytest.raises(InputError) as error:
            read_llava(str(path), "images")
        messages.add(str(error.value))
    message, = messages                                          # the same wherever pieces end
    print(message)
    assert message.startswith(str(path)) and re.search(place, message) and "\n" not in message


def test_a_row_without_end_is_given_up(tmp_path, monkeypatch):
    """One quote too few turns gigabytes into one row: they are not read."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 2000)
    monkeypatch.setattr(readers, "CHUNK", 100)
    path = tmp_path / "talk.json"
    path.write_text("[" + ",".join([ROW] * 4 + [ROW.replace('"q0"', '"q0')] + [ROW] * 1000) + "]")
    with pytest.raises(InputError, match="row 4.*does not end"):
        read_llava(str(path), "images")


def test_rows_are_read_when_asked_for(tmp_path, monkeypatch):
    """Of a long file some rows are tried at the start, from the first to the last; another one speaks up when its turn comes."""
    monkeypatch.setattr(readers, "ROWS_READ_FIRST", 3)
    path = tmp_path / "talk.json"
    bad = ROW.replace("human", "nobody")
    path.write_text("[" + ",".join([ROW, bad, ROW, ROW, ROW]) + "]")
    examples = read_llava(str(path), "images")
    assert examples[0] == examples[4]
    with pytest.raises(InputError, match="row 1: turns must alternate"):
        examples[1]
    path.write_text("[" + ",".join([ROW] * 4 + [bad]) + "]")
    with pytest.raises(InputError, match="row 4: turns must alternate"):
        read_llava(str(path), "images")


def test_images_of_very_many_are_looked_up_in_their_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IMAGES_OPENED", 3)
    (tmp_path / "a").mkdir()
    there = [str(tmp_path / "a" / f"{n}.jpg") for n in range(5)]
    for path in there:
        open(path, "w").close()
    check_images(there)                                          # empty, but there
    with pytest.raises(InputError, match=r"2 images.*a/9\.jpg.*b/0\.jpg"):
        check_images([*there, str(tmp_path / "a" / "9.jpg"), str(tmp_path / "b" / "0.jpg")])
    with pytest.raises(InputError, match="a/0.jpg: not readable as an image"):
        ImageProcessor(24)(there[0])                             # it is said when it is opened


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def conversations(world):
    """The session's conversations from the file, as training has them."""
    return PackedDataset(read_llava(world.llava, world.images), Tokenizer(world.tokenizer), ImageProcessor(24), 9, 256)


@pytest.mark.parametrize("how", ("fork", "spawn"))
def test_workers_give_the_same_batches(world, how):
    dataset = conversations(world)
    sampler = ResumableSampler(len(dataset), 2, 8, 4, 0, 1, 42)
    loader = lambda **options: torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, **options)
    for alone, worker in zip(loader(), loader(num_workers=1, multiprocessing_context=how), strict=True):
        assert torch.equal(alone.input_ids, worker.input_ids) and torch.equal(alone.pixel_values, worker.pixel_values)


def test_pickled_tokenizer_and_rows(world):
    dataset = conversations(world)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.row(5) == dataset.row(5)
    assert again.tokenizer.encode("Is there a cup?") == dataset.tokenizer.encode("Is there a cup?")
    assert len(pickle.dumps(dataset.tokenizer)) < 1000           # its path, and not the model


class BadRow(torch.utils.data.Dataset):
    def __getitem__(self, i):
        raise InputError("talk.json, row 7: mend it")


def test_workers_errors_are_one_line(capsys):
    loader = torch.utils.data.DataLoader(BadRow(), batch_size=None, sampler=[0], num_workers=1)
    with pytest.raises(SystemExit):
        run_program(lambda: next(iter(loader)))
    assert capsys.readouterr().err == "error: talk.json, row 7: mend it\n"


def test_an_error_that_one_process_meets_alone(capsys, monkeypatch):
    """Rank 0 has nothing to say then; the others leave it time to."""
    waited = []
    monkeypatch.setattr(readers.time, "sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_program(lambda: BadRow()[7])
        assert capsys.readouterr().err == "error: talk.json, row 7: mend it\n"
    assert waited == [5]


# ---------------------------------------------------------------------------------------------------------------------
# Rows without an image


def packed(images, seed=0):
    """Rows with the given images (None = text only), all different."""
    rows = []
    for n, image in enumerate(images):
        has, sequences = make_sequences(False, seed + n)[0 if image else 3]
        rows.append(pack(sequences, PATCHES, 256, image))
    return rows


class Pixels:
    size = 24

    def __call__(self, image):
        return pixels(image)


def logits_of(trunk, head, rows, **options):
    batch = collate(rows, Pixels(), **options)
    hidden, features = trunk(batch)
    return head(*answer_states(head, hidden, trunk.image_context(head.block, features), batch), batch.target >= 0)


@pytest.mark.parametrize("variant", (None, "full", "self_attn", "no_cross_attn", "align_after_align"))
def test_text_rows_in_any_company(variant):
    """Alone, among text rows and among image rows a text row has the same logits: its block sees zeros."""
    trunk, head = small_llava(variant=variant)
    rows = packed((None, "a.jpg", None, "b.jpg"))
    mixed = logits_of(trunk, head, rows)
    separate = torch.cat([logits_of(trunk, head, [row]) for row in rows])
    assert largest_difference(f"block {variant}, mixed against alone", mixed, separate) < 1e-4
    text = [rows[0], rows[2]]
    alone = torch.cat([logits_of(trunk, head, [row]) for row in text])
    assert collate(text, Pixels()).pixel_values is None
    assert largest_difference(f"block {variant}, only text against alone", logits_of(trunk, head, text), alone) < 1e-4


def test_always_an_image_changes_nothing():
    """A zero image that no row looks at: tower and projector run, and loss and gradients are as without it."""
    rows, results = packed((None, None)), []
    for always in (False, True):
        trunk, head = (module.requires_grad_(True) for module in small_llava(variant="full"))
        ran = []
        trunk.vision_tower.register_forward_hook(lambda *_: ran.append("tower"))
        trunk.model.mm_projector.register_forward_hook(lambda *_: ran.append("projector"))
        batch = collate(rows, Pixels(), always_image=always)
        assert (batch.image_index == -1).all() and (batch.pixel_values is not None) == always
        loss = -token_logps(logits_of(trunk, head, rows, always_image=always), batch.target[batch.target >= 0]).mean()
        loss.backward()
        assert set(ran) == ({"tower", "projector"} if always else set())
        named = [*trunk.named_parameters(), *head.named_parameters()]
        results.append((loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named},
                        {name for name, p in named if p.grad is None}))
    (loss, gradients, without), (loss_with, gradients_with, still_without) = results
    assert largest_difference("loss", loss_with, loss) < 1e-6
    assert max((gradients_with[name] - gradients[name]).abs().max() for name in gradients) < 1e-6
    print(f"without a gradient: {len(without)} tensors, with an image {len(still_without)}: {sorted(still_without)}")
    assert any("mm_projector" in name for name in without) and not any("mm_projector" in name for name in still_without)
    with_images = packed(("a.jpg", None))
    assert torch.equal(collate(with_images, Pixels(), True).pixel_values, collate(with_images, Pixels()).pixel_values)


def test_dataset_passes_it_on(world, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(GOOD)
    options = Tokenizer(world.tokenizer), ImageProcessor(24), 9, 256
    assert PackedDataset(read_llava(str(path), ""), *options)[[0, 1]].pixel_values is None
    batch = PackedDataset(read_llava(str(path), ""), *options, always_image=True)[[0, 1]]
    assert batch.pixel_values.shape == (1, 3, 24, 24) and not batch.pixel_values.any() and batch.image_index.tolist() == [-1, -1]


# ---------------------------------------------------------------------------------------------------------------------
# Micro batches of similar length


def mixed_lengths(count=1000):
    rng = np.random.default_rng(1)
    return rng.integers(20, 2000, count) * rng.choice((-1, 1, 1), count)


def sampled(world_size, micro, start=0, lengths=None, examples=1000, steps=9, size=64):
    """(steps, micro batches a step, world_size, micro)"""
    ranks = [list(ResumableSampler(examples, steps, size, micro, rank, world_size, 42, start, lengths))
             for rank in range(world_size)]
    return np.array(ranks).reshape(world_size, steps - start, -1, micro).transpose(1, 2, 0, 3)


def test_grouping_leaves_every_step_its_examples():
    expected = np.sort(sampled(1, 64).reshape(9, -1))
    for world_size, micro in ((1, 1), (1, 16), (2, 8), (4, 4), (8, 8)):
        grouped = sampled(world_size, micro, lengths=mixed_lengths())
        assert np.array_equal(np.sort(grouped.reshape(9, -1)), expected)
        assert np.array_equal(sampled(world_size, micro, 4, mixed_lengths()), grouped[4:])           # resumed
    across = sampled(2, 4, lengths=mixed_lengths(50), examples=50, steps=25, size=16)           # 8 epochs, batches over their ends
    assert np.array_equal(np.bincount(across.ravel()), np.full(50, 8))


def test_micro_batches_are_alike():
    lengths = mixed_lengths()
    grouped, plain = (lengths[sampled(2, 4, lengths=given)] for given in (lengths, None))            # (9, 8, 2, 4)
    mixed = lambda x: ((x > 0).any(-1) & (x < 0).any(-1)).sum((1, 2))
    assert mixed(grouped).max() <= 1 and mixed(plain).mean() > 6
    padding = lambda x: 1 - np.abs(x).sum() / (np.abs(x).max(-1) * 4).sum()
    slowest = lambda x: np.abs(x).max((2, 3)).sum() * 4                          # the other rank waits for it every time
    print(f"padding {padding(plain):.2f} → {padding(grouped):.2f}, "
          f"tokens of the slowest rank {slowest(plain):,} → {slowest(grouped):,}")
    assert padding(grouped) < padding(plain) / 3 and slowest(grouped) < 0.7 * slowest(plain)


def test_lengths_of_a_file_and_of_a_list(world):
    """They rank rows as the true numbers of tokens do, and the sign is the modality."""
    examples = read_llava(world.llava, world.images)
    for given in (examples, list(examples)):
        dataset = PackedDataset(given, Tokenizer(world.tokenizer), ImageProcessor(24), 9, 256)
        estimated, true = row_lengths(given, 9), [len(dataset.row(i).input_ids) for i in range(len(given))]
        assert (estimated > 0).all() and np.corrcoef(estimated, true)[0, 1] > 0.8
    text = [Example(None, [[("Hi.", "Hello.")]]), Example("a.jpg", [[("<image>\nHi.", None)]])]
    assert row_lengths(text, 9)[0] < 0 < 9 < row_lengths(text, 9)[1]
    assert len(load_json(world.llava)) == len(examples)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_bench_rows_runs():
    table = succeeds("python", "bench/bench_rows.py", "--rows", "300", "--kilobytes", "0.3")
    lines = [line for line in table.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    assert [line.split(" |")[0] for line in lines] == ["| 300"] and lines[0].count(" s |") == 5
