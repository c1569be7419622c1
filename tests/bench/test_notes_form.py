"""bench/notes_form.py at tiny size: two blocks are trained, and what is printed of them is so."""
import math

import pytest
import torch
from programs import succeeds

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench import notes_form, peer
from bench.bench_dpo import make_pairs

PEERS = ("peft", "transformers.models.llava.modeling_llava")
TINY = ("--size tiny --pairs 24 --held_out 8 --steps 6 --global_batch 8 --micro_batch 4 --tokens 6 "
        "--learning_rate 0 1e-2").split()


def test_both_forms():
    said = succeeds("python", "bench/notes_form.py", *TINY, imports=PEERS)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                      for line in said.splitlines() if line.startswith("|")]
    assert head == list(notes_form.COLUMNS)
    found = {tuple(row[:2]): [float(cell.strip("%")) for cell in row[2:]] for row in rows}
    assert len(rows) == len(found) == 4
    for cells in found.values():
        assert cells[0] == pytest.approx(math.log(2), abs=1e-4)
    # Without a rate nothing is learnt: ours is the model without a block, the notes' is not.
    ours, notes = found["full", "0"], found["original", "0"]
    assert ours[4:] == [0] * 10
    assert notes[2] == 0 and notes[4:7] == notes[7:10] and min(notes[4:7]) > 0
    assert notes[10:] == [0] * 4
    # With one, both learn to prefer the letters of chosen answers.
    for cells in (found["full", "0.01"], found["original", "0.01"]):
        assert cells[1] < math.log(2) and cells[2] > 0 and cells[3] > 60
        assert min(cells[10:]) > 0


def test_answers_are_told_apart_by_their_letters():
    ours = peer.random_llava("tiny")
    pairs = make_pairs(ours, ["a.jpg"], 3, 5)
    for before, after in zip(pairs.examples, notes_form.told_apart(ours, pairs).examples,
                             strict=True):
        (((question, chosen),), ((_, rejected),)) = after.conversations
        assert question == before.conversations[0][0][0] and after.image == before.image
        assert set(chosen) <= set("abcde ") and set(rejected) <= set("vwxyz ")
        lengths = [len(turns[0][1]) for turns in before.conversations]
        assert lengths == [len(chosen), len(rejected)]


def test_change():
    logits = torch.tensor([[0., 1., 2.], [5., 0., 0.]])
    others = torch.tensor([[0., 4., 2.], [5., 0., 0.]])
    assert notes_form.change(logits, others).tolist() == [0.5, 3.0, 0.5]
