"""LLaMA on packed rows: one pass and one step of decoding, beside transformers' LlamaModel on the
same questions unpacked.

    python bench/bench_trunk.py [--size 7b] [--images 16] [--questions 10]

A row is system prompt, image and all questions about it. The peer gets every question behind its
own copy of prompt and image, right-padded and causal, so that its fastest attention applies. The
decoder alone is timed, without tower and lm_head. Its share of the matmul peak counts the
operations of decoder_flops (measuring.py), unmasked pairs only, for each side its own.

In a step of decoding all branches go one token further, logits and choice included. Its time is the
difference of two generations of different lengths, so that what happens once does not count. The
floor beside it is the time to read all weights (for each batch) and the cache once at the measured
bandwidth.
"""
import argparse
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from torch import nn

from bench.measuring import (
    Line,
    agreement,
    decoder_flops,
    decoder_weights,
    matmul_peak,
    measure,
    memory_bandwidth,
    table,
)
from bench.peer import (
    SIZES,
    RandomLlava,
    environment,
    peer_generate,
    peer_inputs,
    peer_of,
    random_llava,
    unpack,
)
from data import IMAGE, Batch, Example, PackedDataset
from model import generate

FEW = 2             # tokens of the shorter generation


@dataclass
class Sides:
    """Both models, and what both are asked."""
    ours: RandomLlava
    theirs: nn.Module
    rows: list              # packed
    batch: Batch            # the same rows on the device


def rows_of(ours, images, questions):
    """Packed rows of random pictures → [Row], Batch on the device."""
    size, asked = ours.config.vision.image_size, []
    for q in range(questions):
        article, word = "an" if q % 5 == 0 else "a", chr(97 + q % 26) * 3
        asked.append([(f"{IMAGE}\nIs there {article} {word} in the image?", None)])
    examples = [Example(f"picture {n}", asked) for n in range(images)]

    def noise(path):
        return torch.randn(3, size, size)

    dataset = PackedDataset(examples, replace(ours.row_format(), preprocess=noise))
    batch = dataset[list(range(images))].to(ours.device, ours.dtype)
    return [dataset.row(n) for n in range(images)], batch


def one_pass(sides, peer_batch, repeats):
    """The decoder over all rows → Lines of the peer and of ours, and the hidden states (questions,
    hidden) of every question's last token, ours and the peer's.
    """
    ours, batch = sides.ours, sides.batch
    embeds, _ = ours.trunk.embed(batch)
    measured = measure(lambda: ours.trunk.model(embeds, batch.position, batch.branch), ours.device,
                       repeats)
    positions = [p for row in sides.rows for p in row.position]
    line = Line(f"ours, rows of {batch.input_ids.shape[1]} tokens", measured.seconds, 1,
                len(positions), decoder_flops(ours.config, positions), measured.memory)
    said = torch.cat([hidden_states[row.ends] for hidden_states, row
                      in zip(measured.result, sides.rows, strict=True)])

    # Each question behind its prefix, from the very embeddings of the packed row.
    alone = []
    for n, row in enumerate(sides.rows):
        for number in range(1, len(row.ends) + 1):
            tokens = [t for t, branch in enumerate(row.branch) if branch in (0, number)]
            alone.append(embeds[n, tokens])                                        # (T, hidden)
    parts = [nn.utils.rnn.pad_sequence(alone[start:start + peer_batch], batch_first=True)
             for start in range(0, len(alone), peer_batch)]                      # (B, T, hidden)
    llama, lengths = sides.theirs.model.language_model, [len(a) for a in alone]

    def last_states():
        passes = [llama(inputs_embeds=part, use_cache=False).last_hidden_state for part in parts]
        return [row for hidden_states in passes for row in hidden_states]

    measured = measure(last_states, ours.device, repeats)
    positions = [p for length in lengths for p in range(length)]
    what = f"transformers, {len(alone)} rows of {max(lengths)} tokens in batches of {peer_batch}"
    peer = Line(what, measured.seconds, 1, len(positions), decoder_flops(ours.config, positions),
                measured.memory)
    expected = torch.stack([hidden_states[length - 1] for hidden_states, length
                            in zip(measured.result, lengths, strict=True)])
    line.peers = (peer,)
    return peer, line, said, expected


def one_step(sides, bandwidth, args):
    """One more token for every branch → Lines: the peer, its floor, ours, our floor."""
    ours, rows, text, size = sides.ours, sides.rows, sides.ours.config.text, args.peer_batch
    sequences = [ids for row in rows for ids in unpack(row)]
    # Every question has its own copy of the image: (questions, 3, S, S).
    pixels = sides.batch.pixel_values.repeat_interleave(len(rows[0].ends), 0)
    inputs = [peer_inputs(ours, sequences[start:start + size], pixels[start:start + size])
              for start in range(0, len(sequences), size)]
    lengths, middle = [len(ids) for ids in sequences], FEW + args.steps // 2

    def step(what, generation, calls, prompt_tokens):
        """`calls` of the model make one step. The cache holds `prompt_tokens` and the answers."""
        short, long = (measure(partial(generation, tokens), ours.device, args.repeats)
                       for tokens in (FEW, FEW + args.steps))
        lm_head = text.hidden_size * text.vocab_size
        flops = decoder_flops(ours.config, [n + middle for n in lengths])
        flops += 2 * lm_head * len(lengths)
        weights = decoder_weights(ours.config) + lm_head
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        held = per_token * (prompt_tokens + middle * len(lengths))
        itemsize = ours.head.lm_head.weight.element_size()
        floor = (calls * weights + held) * itemsize / bandwidth
        seconds = (long.seconds - short.seconds) / args.steps
        return (Line(what, seconds, 1, len(lengths), flops, long.memory),
                Line(f"floor of {what}", floor, 1, len(lengths), flops))

    def peer_answers(tokens):
        return [peer_generate(sides.theirs, part, tokens) for part in inputs]

    def our_answers(tokens):
        return generate(ours.trunk, [ours.head], sides.batch, tokens)

    peer, peer_floor = step(f"transformers, batches of {size}", peer_answers, len(inputs),
                            sum(lengths))
    line, floor = step("ours", our_answers, 1, sum(len(row.input_ids) for row in rows))
    line.peers = floor.peers = (peer,)
    return peer, peer_floor, line, floor


def compiled(sides, line, repeats):
    """Our pass again with compiled layers → Line. Our programs do not compile: in a short run it
    takes longer than it saves.
    """
    ours, batch = sides.ours, sides.batch
    for layer in ours.trunk.model.layers:
        layer.compile(dynamic=False)
    embeds, _ = ours.trunk.embed(batch)
    measured = measure(lambda: ours.trunk.model(embeds, batch.position, batch.branch), ours.device,
                       repeats)
    for layer in ours.trunk.model.layers:
        layer._compiled_call_impl = None
    return replace(line, what="ours, layers compiled", seconds=measured.seconds)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=10, help="per image")
    parser.add_argument("--peer_batch", type=int, default=64, help="questions at once, peer")
    parser.add_argument("--steps", type=int, default=14,
                        help="steps of decoding that are timed together")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    ours = random_llava(args.size)
    theirs, peak = peer_of(ours), matmul_peak(ours.device, ours.dtype)
    bandwidth = memory_bandwidth(ours.device)
    print(f"{environment(ours.device, peak)}, memory bandwidth {bandwidth / 1e9:,.0f} GB/s",
          flush=True)
    sides = Sides(ours, theirs, *rows_of(ours, args.images, args.questions))

    peer, line, said, expected = one_pass(sides, args.peer_batch, args.repeats)
    print("\n" + table([peer, line], "pass", 1, peak))
    if ours.device.type == "cuda":
        print("\n" + table([compiled(sides, line, args.repeats)], "pass", 1, peak))
    print("\n" + table(one_step(sides, bandwidth, args), "step", 1, peak) + "\n")
    agreement("hidden states behind every question", said, expected, ours.dtype)


if __name__ == "__main__":
    main()
