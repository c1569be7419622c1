"""LLaMA on packed rows: one pass and one step of decoding, beside transformers' LlamaModel on the same questions unpacked.

    python bench/bench_trunk.py [--size 7b] [--images 16] [--questions 10]

A row is system prompt, image and all questions about it; the peer gets every question behind its own copy of prompt and
image, right-padded and causal, so that its fastest attention applies. Timed is the decoder alone, without tower and
lm_head; its share of the matmul peak counts the operations of decoder_flops (peer.py), unmasked pairs only, each side its
own. A step of decoding (all branches one token further, logits and choice included) is the difference of two generations
of different lengths, so that what happens once does not count; the floor beside it is what reading all weights (for each
batch) and the cache once takes at the measured bandwidth.
"""
import argparse
import os
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from data import SYSTEM, PackedDataset
from model import generate
from peer import (SIZES, Line, agreement, decoder_flops, decoder_weights, environment, matmul_peak, measure, memory_bandwidth,
                  peer_generate, peer_inputs, peer_of, random_llava, table, unpack)
from readers import IMAGE, Example


def rows_of(ours, images, questions):
    """Packed rows of random pictures → [Row], Batch on the device."""
    size = ours.config.vision.image_size
    asked = [f"{IMAGE}\nIs there {'an' if q % 5 == 0 else 'a'} {chr(97 + q % 26) * 3} in the image?" for q in range(questions)]
    examples = [Example(f"picture {n}", [[(question, None)] for question in asked]) for n in range(images)]
    dataset = PackedDataset(examples, ours.tokenizer, lambda path: torch.randn(3, size, size), ours.config.vision.num_patches,
                            ours.config.max_length, SYSTEM)
    return [dataset.row(n) for n in range(images)], dataset[list(range(images))].to(ours.device, ours.dtype)


def one_pass(ours, theirs, rows, batch, peer_batch, repeats):
    """The decoder over all rows → Lines of both sides; hidden states of every question's last token are compared."""
    embeds, _ = ours.trunk.embed(batch)
    measured = measure(lambda: ours.trunk.model(embeds, batch.position, batch.branch), ours.device, repeats)
    positions = [p for row in rows for p in row.position]
    line = Line(f"ours, rows of {batch.input_ids.shape[1]} tokens", measured.seconds, 1, len(positions),
                decoder_flops(ours.config, positions), measured.memory)
    said = torch.cat([hidden[row.ends] for hidden, row in zip(measured.result, rows)])                  # (questions, hidden)

    # Each question behind its prefix, from the very embeddings of the packed row.
    alone = [embeds[n, [t for t, branch in enumerate(row.branch) if branch in (0, number)]]
             for n, row in enumerate(rows) for number in range(1, len(row.ends) + 1)]
    parts = [torch.nn.utils.rnn.pad_sequence(alone[start:start + peer_batch], batch_first=True)         # (B, T, hidden)
             for start in range(0, len(alone), peer_batch)]
    model, lengths = theirs.model.language_model, [len(a) for a in alone]

    def last_states():
        hidden = [model(inputs_embeds=part, use_cache=False).last_hidden_state for part in parts]
        return [row for part in hidden for row in part]

    measured = measure(last_states, ours.device, repeats)
    positions = [p for length in lengths for p in range(length)]
    peer = Line(f"transformers, {len(alone)} rows of {max(lengths)} tokens in batches of {peer_batch}", measured.seconds, 1,
                len(positions), decoder_flops(ours.config, positions), measured.memory)
    expected = torch.stack([hidden[length - 1] for hidden, length in zip(measured.result, lengths)])
    line.peers = (peer,)
    return peer, line, said, expected


def one_step(ours, theirs, rows, batch, peer_batch, steps, bandwidth, repeats):
    """One more token for every branch → Lines of ours, the peer and the floors of both."""
    text, few = ours.config.text, 2
    sequences = [ids for row in rows for ids in unpack(row)]
    pixels = batch.pixel_values.repeat_interleave(len(rows[0].ends), 0)                                 # (questions, 3, S, S)
    inputs = [peer_inputs(ours, sequences[start:start + peer_batch], pixels[start:start + peer_batch])
              for start in range(0, len(sequences), peer_batch)]
    lengths, middle = [len(ids) for ids in sequences], few + steps // 2

    def step(what, generation, calls, prompt_tokens):
        """`calls` of the model make one step; `prompt_tokens` are held in the cache besides the answers."""
        short, long = (measure(lambda: generation(tokens), ours.device, repeats) for tokens in (few, few + steps))
        flops = decoder_flops(ours.config, [n + middle for n in lengths]) + 2 * text.hidden_size * text.vocab_size * len(lengths)
        weights = decoder_weights(ours.config) + text.hidden_size * text.vocab_size
        held = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * (prompt_tokens + middle * len(lengths))
        floor = (calls * weights + held) * ours.head.lm_head.weight.element_size() / bandwidth
        return (Line(what, (long.seconds - short.seconds) / steps, 1, len(lengths), flops, long.memory),
                Line(f"floor of {what}", floor, 1, len(lengths), flops))

    peer, peer_floor = step(f"transformers, batches of {peer_batch}",
                            lambda tokens: [peer_generate(theirs, part, tokens) for part in inputs], len(inputs), sum(lengths))
    line, floor = step("ours", lambda tokens: generate(ours.trunk, [ours.head], batch, tokens), 1,
                       sum(len(row.input_ids) for row in rows))
    line.peers = floor.peers = (peer,)
    return peer, peer_floor, line, floor


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=10, help="per image")
    parser.add_argument("--peer_batch", type=int, default=64, help="questions at once, peer")
    parser.add_argument("--steps", type=int, default=14, help="steps of decoding that are timed together")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    ours = random_llava(args.size)
    theirs, peak, bandwidth = peer_of(ours), matmul_peak(ours.device, ours.dtype), memory_bandwidth(ours.device)
    print(f"{environment(ours.device, peak)}, memory bandwidth {bandwidth / 1e9:,.0f} GB/s", flush=True)
    rows, batch = rows_of(ours, args.images, args.questions)

    peer, line, said, expected = one_pass(ours, theirs, rows, batch, args.peer_batch, args.repeats)
    print("\n" + table([peer, line], "pass", 1, peak))
    if ours.device.type == "cuda":                          # our programs do not: it takes longer than it saves in a short run
        for layer in ours.trunk.model.layers:
            layer.compile(dynamic=False)
        embeds, _ = ours.trunk.embed(batch)
        measured = measure(lambda: ours.trunk.model(embeds, batch.position, batch.branch), ours.device, args.repeats)
        print("\n" + table([replace(line, what="ours, layers compiled", seconds=measured.seconds)], "pass", 1, peak))
        for layer in ours.trunk.model.layers:
            layer._compiled_call_impl = None
    lines = one_step(ours, theirs, rows, batch, args.peer_batch, args.steps, bandwidth, args.repeats)
    print("\n" + table(lines, "step", 1, peak) + "\n")
    agreement("hidden states behind every question", said, expected, ours.dtype)


if __name__ == "__main__":
    main()
