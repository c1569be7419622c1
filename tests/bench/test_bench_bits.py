"""bench_bits.py on a tiny model: every line is measured, what does not fit is said so, and the peer
computes the same from the same bits.
"""
import json
from dataclasses import replace

import pytest
import torch

from bench import bench_bits, peer
from llama import LlamaConfig

TINY = "--size tiny --pairs 2 --tokens 6 --repeats 1".split()
LINES = "loading", "POPE, an image", "frozen pass", "LoRA, 2 pairs", "stage 2, 16 pairs"


@pytest.fixture
def tiny(monkeypatch, in_this_process):
    """Rows of whole blocks of 64: bitsandbytes' kernel for the CPU gives wrong numbers for others.
    """
    text = LlamaConfig(512, 64, 128, 2, 8, 4, 2048)
    monkeypatch.setitem(peer.SIZES, "tiny", replace(peer.SIZES["tiny"], text=text))


def rows_of(capsys):
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()
            if line.startswith("|")]
    return said, {tuple(row[:3]): row[4] for row in rows[2:]}


def test_every_line(tiny, capsys, tmp_path):
    pytest.importorskip("bitsandbytes")
    bench_bits.main([*TINY, "--bits", "4", "16", "--cards", "8", "--output",
                     str(tmp_path / "bits.jsonl")])
    said, rows = rows_of(capsys)
    peers = [("all", "4, bitsandbytes and peft", what) for what in (LINES[2], LINES[3])]
    assert list(rows) == [("8", bits, what) for bits in ("4", "16") for what in LINES] + peers
    assert all(float(seconds) > 0 for seconds in rows.values())
    assert "log-probabilities in 4 bits: differ by" in said
    kept = [json.loads(line) for line in (tmp_path / "bits.jsonl").read_text().splitlines()]
    assert len(kept) == len(rows) and not any(row["out_of_memory"] for row in kept)


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("name, left", [("load_weights", 1), ("engine_of", 5), ("generate", 5)])
def test_what_does_not_fit(tiny, capsys, monkeypatch, name, left):
    """It is a line like any other, and the next lines follow; without weights there are none."""
    before, calls = getattr(bench_bits, name), []

    def limited(*args, **kwargs):
        calls.append(args)
        if name == "load_weights" and len(calls) == 1:              # the head
            return before(*args, **kwargs)
        return no_memory()

    monkeypatch.setattr(bench_bits, name, limited)
    monkeypatch.setattr(bench_bits.importlib.util, "find_spec", lambda name: None)
    bench_bits.main([*TINY, "--bits", "4", "--cards", "8"])
    _, rows = rows_of(capsys)
    assert len(rows) == left
    missing = {"load_weights": LINES[:1], "engine_of": LINES[3:], "generate": LINES[1:2]}[name]
    assert [what for (*_, what), cell in rows.items() if cell == "–"] == list(missing)
