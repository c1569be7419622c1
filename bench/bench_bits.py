"""A 7B with its trunk in 4, 8 and 16 bits: what fits on which card, and how long it takes.

    python bench/bench_bits.py [--bits 4 16] [--cards 8 12 16] [--size 7b] [--output FILE.jsonl]

A card of so many GB is this GPU with no more memory than that for one process
(`torch.cuda.set_per_process_memory_fraction`), less half a GiB, which CUDA itself takes beside
PyTorch. So "fits" is not an inference: what does not fit ends in out of memory, and that is the
result. A card 0 is the whole GPU. On each card the same is done as by the programs:

    loading         tensor by tensor, rounded on the way (checkpoints/weights.py)
    frozen pass     what train.py keeps for stages 1 and 2, 16 rows at once, fewer where memory ends
    stage 2         an optimizer step from kept features, without the trunk
    POPE            one image at a time, nine questions, ten tokens each
    LoRA            an optimizer step of r 128 with gradient checkpointing; in 4 bits this is QLoRA

Weights are random, made on the GPU, and each tensor follows from its name alone. Seconds are for a
pair, or for an image with its nine answers. Beside it stands QLoRA as people know it, transformers,
bitsandbytes and peft on the same 4-bit weights, where bitsandbytes is installed.
"""
import argparse
import importlib.util
import os
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from bench.bench_dpo import Training, engine_of, first_pairs, make_pairs, our_logps, step
from bench.measuring import Line, agreement, attempt, keep_line, measure, release
from bench.peer import (
    SIZES,
    RandomLlava,
    StandInTokenizer,
    identity,
    image_token,
    peer_of,
    write_images,
)
from bench.peer_dpo import LoRA, Peer, Sides, peer_batch, peer_logps
from checkpoints.quantised import BITS, PARTS, in_bits, packed_tensors
from checkpoints.weights import attach_weights, load_weights
from data import EOS, IMAGE, Example, ImageProcessor, PackedDataset
from llama import LINEARS
from model import STAGES, Head, Trunk, generate
from support.common import InputError, device_and_dtype
from support.tensors import LazyTensor
from training.engine import checkpoint_layers, start_deepspeed
from training.features import keep_features
from training.lora import add_lora

CONTEXT = 2 ** 29       # bytes that CUDA takes beside PyTorch: 0.3 to 0.5 GiB
QUESTIONS, TOKENS = 9, 10
ROWS = 16               # of a batch of the frozen pass; pairs of a step of stage 2


@dataclass
class Setup:
    """What a line is measured with."""
    size: str
    bits: int
    device: torch.device
    dtype: torch.dtype
    images: list
    pairs: int              # of a step of LoRA; the frozen pass has 16 times as many
    tokens: int             # of an answer
    repeats: int


# ---- A model that is made as it is read ----------------------------------------------------------


def random_tensor(name, shape, setup, pinned=False):
    """Deviation 0.02 around 0, norms' weights around 1; from its name alone."""
    generator = torch.Generator(setup.device).manual_seed(zlib.crc32(name.encode()))
    mean = 1.0 if "norm" in name and name.endswith(".weight") else 0.0
    tensor = torch.empty(shape, device=setup.device, dtype=setup.dtype)
    return tensor.normal_(mean, 0.02, generator=generator)


def random_in_bits(setup):
    """A frozen random model, its trunk still unread, as after load_base(…, read_trunk=False)."""
    config = SIZES[setup.size]
    with torch.device("meta"):
        trunk, head = Trunk(config), Head(config)
    for module in (trunk, head):
        tensors = {}
        for name, parameter in module.state_dict().items():
            shape = tuple(parameter.shape)
            tensors[name] = LazyTensor(shape, partial(random_tensor, name, shape, setup))
        attach_weights(module, tensors, "random weights", setup.dtype, setup.device)
    load_weights(head)
    head.lm_head.weight.data[[EOS, image_token(config)]] = 0      # answers are as long as they may
    ours = RandomLlava(trunk, {"base": head}, StandInTokenizer(config.text.vocab_size),
                       ImageProcessor(config.vision.image_size), "random weights", setup.device,
                       setup.dtype)
    return in_bits(ours, setup.bits)


# ---- What is measured ----------------------------------------------------------------------------


def questions_of(ours, images):
    """Open prompts: a row per image, a branch per question."""
    asked = [[(f"{IMAGE}\nIs there a thing number {n} in the image?", None)]
             for n in range(QUESTIONS)]
    return PackedDataset([Example(image, asked) for image in images], ours.row_format())


def answers(ours, setup):
    """One image's answers from its prompts on, as eval_pope.py --batch_size 1 gives them."""
    batch = questions_of(ours, setup.images[:1])[[0]].to(ours.device, ours.dtype)
    return lambda: generate(ours.trunk, [ours.head], batch, TOKENS)


def steps(deepspeed, ours, head, training, batch, repeats):
    """Optimizer steps on one batch → Measured, or None where they or their engine do not fit."""
    try:
        engine = engine_of(deepspeed, ours, head, training)
    except torch.OutOfMemoryError:
        return None
    measured = attempt(lambda: step(engine, batch.to(ours.device, ours.dtype)), ours.device,
                       repeats)
    engine.destroy()
    ours.trunk.zero_grad()                          # where memory was missing, some are left
    return measured


def lines_of(deepspeed, setup, folder):
    """Everything on one card → (what, Measured or None, pairs or images), as it comes."""
    ours = random_in_bits(setup)
    yield "loading", attempt(lambda: load_weights(ours.trunk), setup.device, 1, warm_up=0), 1
    if any(p.is_meta for p in ours.trunk.parameters()):         # nothing else fits either
        return
    yield "POPE, an image", attempt(answers(ours, setup), setup.device, setup.repeats), 1

    # The frozen pass; then LoRA; then stage 2 without the trunk, as train.py goes about it.
    count = ROWS * setup.pairs
    dataset = make_pairs(ours, setup.images, count, setup.tokens)
    kept, block = [], ours.config.block_config()

    def keep():
        kept.append(keep_features(f"{folder}/{len(kept)}", dataset, ours, block, ROWS))

    yield "frozen pass", where_it_fits(keep, setup.device), count
    add_lora(ours.trunk.model, 128, 256, 0.05)
    checkpoint_layers(ours.trunk.model)
    batch, _ = first_pairs(dataset, setup.pairs)
    training = Training(("lora",), setup.pairs)
    measured = steps(deepspeed, ours, ours.head, training, batch, setup.repeats)
    yield f"LoRA, {setup.pairs} pairs", measured, setup.pairs
    ours.trunk.to("meta")
    if kept:
        training, batch = Training(STAGES[2], ROWS, kept=True), kept[-1][list(range(ROWS))]
        measured = steps(deepspeed, ours, identity(ours), training, batch, setup.repeats)
        yield f"stage 2, {ROWS} pairs", measured, ROWS


def where_it_fits(keep, device):
    """As `attempt`; the frozen pass tells in a line of its own that not even one row fits."""
    try:
        return measure(keep, device, repeats=1)
    except InputError as e:
        if "no memory" not in str(e):
            raise
        return None


# ---- The peer ------------------------------------------------------------------------------------


def peer_in_four_bits(ours, setup):
    """transformers' LLaVA whose LLaMA's linears are bitsandbytes' Linear4bit, with the bits of
    ours → Sides.
    """
    import bitsandbytes
    whole = random_in_bits(replace(setup, bits=16))
    load_weights(whole.trunk)
    theirs, bits = peer_of(whole), packed_tensors(ours.trunk)
    llama = theirs.model.language_model
    for name, linear in list(llama.named_modules()):
        if name.split(".")[-1] in LINEARS:
            key = f"model.{name}.weight"
            parts = {part[1:]: bits[key + part] for part in PARTS[1:]}
            linear = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=setup.dtype,
                quant_type="nf4", device="meta")
            linear.weight = bitsandbytes.nn.Params4bit.from_prequantized(
                bits[key], parts, device=setup.device)
            llama.set_submodule(name, linear)
    theirs.is_loaded_in_4bit = True                 # peft asks for it
    whole.trunk.to("meta")
    return Sides(ours, theirs)


def peer_lines(setup):
    """The peer's frozen pass and QLoRA on the whole GPU → (what, Measured, pairs)."""
    ours = random_in_bits(setup)
    load_weights(ours.trunk)
    dataset = make_pairs(ours, setup.images, ROWS * setup.pairs, setup.tokens)
    said = our_logps(ours, dataset, setup.pairs)
    sides = peer_in_four_bits(ours, setup)
    ours.trunk.to("meta")
    inputs, _ = peer_batch(ours, dataset, setup.pairs)
    with torch.no_grad():
        theirs = peer_logps(sides.theirs, inputs, setup.tokens)
    agreement("log-probabilities in 4 bits", said, theirs, setup.dtype)
    many, _ = peer_batch(ours, dataset, ROWS)

    @torch.no_grad()
    def forward():
        return sides.theirs.model(**many, use_cache=False).last_hidden_state

    yield "frozen pass", attempt(forward, setup.device, setup.repeats), ROWS
    trainer = LoRA(Peer("LoRA in fp32, autocast", setup.pairs, True), sides)
    measured = attempt(lambda: trainer.step(inputs, setup.tokens), setup.device, setup.repeats)
    yield f"LoRA, {setup.pairs} pairs", measured, setup.pairs


# ---- Command line --------------------------------------------------------------------------------


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bits", type=int, choices=BITS, nargs="+", default=[4, 16])
    parser.add_argument("--cards", type=int, nargs="+", default=[0, 8, 12, 16],
                        help="GB of memory; 0: all that this GPU has")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--pairs", type=int, default=4, help="of a step of LoRA")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON lines, each appended as soon as it is measured")
    return parser.parse_args(argv)


def limit_memory(card, device):
    """Let this process have no more than a card of so many GB; 0: everything."""
    release()
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = (card * 2 ** 30 - CONTEXT) / whole if card else 1.0
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def note(card, bits, lines, path):
    """Print lines of the table as they come."""
    for what, measured, units in lines:
        cells = "does not fit | –"
        line = Line(f"{card or 'all'} GB, {bits} bits: {what}", float("inf"), units, 0, 0)
        if measured:
            line.seconds, line.memory = measured.seconds, measured.memory
            memory = "–" if line.memory is None else f"{line.memory / 2 ** 30:.2f}"
            cells = f"{memory} | {line.per_unit:.3g}"
        print(f"| {card or 'all'} | {bits} | {what} | {cells} |", flush=True)
        if path:
            keep_line(path, line)


def main(argv=None):
    args = parse_flags(argv)
    deepspeed, (device, dtype) = start_deepspeed()[0], device_and_dtype()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.size}, answers of {args.tokens} tokens\n\n"
          "| card, GB | bits | what | peak memory, GiB | s a pair or image |\n"
          "|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        images = [os.path.join(folder, name) for name in write_images(folder, ROWS * args.pairs)]
        for card in args.cards:
            for bits in args.bits:
                setup = Setup(args.size, bits, device, dtype, images, args.pairs, args.tokens,
                              args.repeats)
                limit_memory(card, device)
                note(card, bits, lines_of(deepspeed, setup, f"{folder}/{card}-{bits}"),
                     args.output)
        limit_memory(0, device)
        if 4 in args.bits and importlib.util.find_spec("bitsandbytes"):
            lines = peer_lines(replace(setup, bits=4))
            note(0, "4, bitsandbytes and peft", lines, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
