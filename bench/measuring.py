"""What the benchmarks share: clock, counted operations, table, and a check of both sides' numbers.

    measured = measure(function, device)         # median seconds, peak memory, the result
    measured = attempt(function, device)         # None where the GPU has no memory for it
    print(table([Line(...), ...], "pair", total, peak))
    agreement("logits", ours, theirs, dtype)     # ends the program where they differ
"""
import gc
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Tolerated root mean square of the differences, as a share of the numbers' own spread. One rounding
# to bf16 is 0.002 of a number on average, and hundreds of roundings follow each other on the way
# through 32 layers. The peer alone differs from the peer in a batch by as much as from us (0.05).
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


# ---- Clock and memory ----------------------------------------------------------------------------


@dataclass
class Measured:
    seconds: float      # median
    memory: float       # highest allocated bytes while it ran, models included; None on a CPU
    result: Any


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release():
    """Give unused memory back to the GPU: our side takes as many rows at once as have room."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def measure(function, device, repeats=3, warm_up=1):
    """Call `function()` `warm_up` times, then time `repeats` calls."""
    release()
    for _ in range(warm_up):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        began = clock(device)
        result = function()
        seconds.append(clock(device) - began)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(statistics.median(seconds), memory, result)


def attempt(function, device, repeats=3, warm_up=1):
    """As `measure`; None where the GPU has no memory for it, which is a result like any other."""
    try:
        return measure(function, device, repeats, warm_up)
    except torch.OutOfMemoryError:
        return None


def matmul_peak(device, dtype):
    """What this device's matrix products reach, FLOP/s: 8192³ on random numbers.

    A GPU needs less power for zeros and is faster with them, so the numbers are random.
    """
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / measure(lambda: a @ b, device, repeats=20, warm_up=5).seconds


def memory_bandwidth(device):
    """Bytes per second, read and written, of a copy that is too large for any cache."""
    x = torch.zeros(2 ** 31 if device.type == "cuda" else 2 ** 26, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * x.nbytes / measure(lambda: y.copy_(x), device, repeats=20, warm_up=2).seconds


# ---- Counted operations --------------------------------------------------------------------------


def decoder_weights(config):
    """Number of weights in the linear layers of LLaMA's decoder, without embeddings and lm_head."""
    text = config.text
    key_values = text.num_key_value_heads * text.head_dim
    attention = 2 * text.hidden_size * (text.hidden_size + key_values)
    mlp = 3 * text.hidden_size * text.intermediate_size
    return text.num_hidden_layers * (attention + mlp)


def decoder_flops(config, positions):
    """Operations of the decoder on tokens at these positions.

    Each token costs 2 operations per weight, and 4 · hidden per layer for each token that it may
    look at: packed or padded, a token at position p looks at p + 1. Norms, softmax and RoPE are not
    counted.
    """
    text, positions = config.text, np.asarray(positions)
    pairs = int(positions.sum()) + len(positions)
    per_pair = 4 * text.hidden_size * text.num_hidden_layers
    return 2 * decoder_weights(config) * len(positions) + per_pair * pairs


def tower_flops(config, images):
    """Operations of tower (up to the layer that is read) and projector, counted likewise."""
    vision, hidden = config.vision, config.text.hidden_size
    tokens = vision.num_patches + 1
    weights = 4 * vision.hidden_size ** 2 + 2 * vision.hidden_size * vision.intermediate_size
    layer = 2 * weights * tokens + 4 * vision.hidden_size * tokens ** 2
    layers = vision.num_hidden_layers + 1 + config.select_layer
    projector = 2 * vision.num_patches * hidden * (vision.hidden_size + hidden)
    return images * (layers * layer + projector)


def answer_positions(lengths, tokens):
    """Positions of the tokens that decoding feeds back behind prompts of these lengths: all but the
    answer's last.
    """
    return [length + t for length in lengths for t in range(tokens - 1)]


# ---- What is printed -----------------------------------------------------------------------------


@dataclass
class Line:
    """One line of a table: what was measured. tokens: those that went through the decoder."""
    what: str
    seconds: float          # infinite where the GPU had no memory for it
    units: float            # how many pairs, answers, ... these seconds were for
    tokens: int
    flops: float
    memory: float = None
    peers: tuple = ()       # lines that it is compared with

    @property
    def per_unit(self):
        return self.seconds / self.units

    @property
    def ran(self):
        return self.seconds < math.inf


def line_of(config, what, measured, pairs, rows, passes=(1, 1)):
    """A step over `pairs` pairs as a Line. `rows` are the positions of each row's tokens, and a row
    has an image; `passes` is how often they go through decoder and tower.
    """
    if measured is None:
        return Line(what, math.inf, pairs, 0, 0)
    positions = [p for row in rows for p in row]
    decoder, tower = passes
    flops = decoder * decoder_flops(config, positions) + tower * tower_flops(config, len(rows))
    return Line(what, measured.seconds, pairs, len(positions), flops, measured.memory)


def keep_line(path, line):
    """Append a line to a file of JSON lines, at once, so that a run that is cut keeps the rest."""
    row = {"what": line.what, "measured": line.units, "out_of_memory": not line.ran,
           "seconds_per_unit": line.per_unit if line.ran else None,
           "peak_memory_gib": line.memory and round(line.memory / 2 ** 30, 1)}
    add_rows(path, [row])


def add_rows(path, rows):
    """Append to a file of JSON lines; several processes may do so at the same time."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_rows(path):
    """The rows of such a file, [] without one. A line that an interruption has cut does not count.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def table(lines, unit, total, peak):
    """Lines as Markdown.

    The seconds are given for `total` units, by extrapolation where fewer were measured.
    """
    head = f"s for {total:,} {unit}" + ("s" if total > 1 else "")
    text = [f"| | measured | {head} | times faster | tokens/s | of matmul peak | "
            "peak memory, GiB |", "|---" * 7 + "|"]
    for line in lines:
        if not line.ran:
            text.append(f"| {line.what} | {line.units:,} | out of memory | – | – | – | – |")
            continue
        ratios = " / ".join(f"{peer.per_unit / line.per_unit:.2f}" if peer.ran else "–"
                            for peer in line.peers)
        speed = f"{line.tokens / line.seconds:,.0f}" if line.tokens else "–"
        share = f"{100 * line.flops / line.seconds / peak:.1f} %" if line.flops else "–"
        memory = "–" if line.memory is None else f"{line.memory / 2 ** 30:.1f}"
        cells = [line.what, f"{line.units:,}", f"{line.per_unit * total:.4g}", ratios or "–",
                 speed, share, memory]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def agreement(what, ours, theirs, dtype, control=False):
    """Print how far the same numbers, computed twice in `dtype`, differ as a share of their spread.

    SystemExit beyond TOLERANCE. A control compares the peer with itself: it shows what rounding
    alone does, and fails nothing.
    """
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    if ours.shape != theirs.shape:
        raise SystemExit(f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    difference, spread = ours - theirs, theirs.std().item()
    mean = difference.square().mean().sqrt().item() / spread
    largest = difference.abs().max().item() / spread
    tolerance = "" if control else f"; tolerance {100 * TOLERANCE[dtype]:g} %"
    print(f"{what}: differ by {100 * mean:.3g} % of their standard deviation {spread:.3g} (root "
          f"mean square), at most {100 * largest:.3g} %{tolerance}", flush=True)
    if not control and not mean <= TOLERANCE[dtype]:
        raise SystemExit(f"{what}: they differ, so their times cannot be compared")
