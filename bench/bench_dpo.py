"""A step of DPO, from pairs to updated weights, beside transformers and peft on the same GPU and
base weights.

    python bench/bench_dpo.py [--size 7b] [--stage 2] [--tokens 24 128 512] [--output FILE.jsonl]

The peers are HA-DPO's recipe, the same with more pairs at once or without gradient checkpointing,
and a frozen trunk with transformers: peer_dpo.py. Our side is what train.py does through DeepSpeed.
First the trunk is in the loop, as in an epoch without kept features. Then comes a whole run (an
ablation, another learning rate) from kept features, then LoRA with master weights in fp32.

Everything takes its turn on the same weights and gives its memory back. "Times faster" compares
with four peers: HA-DPO's recipe in bf16, the same under autocast, the fastest of all LoRAs, the
faster of the frozen trunks.

A pair is system prompt, image, question and two answers of as many tokens as the table says, `</s>`
included. For both sides batches are made before the clock starts; reading kept features counts. The
share of the peak counts the operations of tower and decoder (measuring.py).
"""
import argparse
import itertools
import math
import os
import random
import string
import sys
import tempfile
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import peft
import torch

from bench.measuring import (
    Line,
    agreement,
    attempt,
    keep_line,
    line_of,
    matmul_peak,
    measure,
    table,
)
from bench.peer import SIZES, environment, identity, peer_of, random_llava, write_images
from bench.peer_dpo import (
    LORA_PASSES,
    LOSS,
    Sides,
    peer_batch,
    peer_logps,
    peers_of,
    time_peer,
)
from data import IMAGE, Example, PackedDataset
from dpo import Objective
from model import STAGES, set_trained
from support.loading import batches_ahead, spare_cores
from training.batches import ResumableSampler, Share
from training.engine import (
    Schedule,
    checkpoint_layers,
    deepspeed_config,
    start_deepspeed,
    start_engine,
)
from training.features import keep_features
from training.lora import add_lora
from training.reference import as_reference


@dataclass
class Training:
    """What an engine trains, in which batches, and how fast."""
    groups: tuple               # of tensors (model.py)
    micro_batch: int
    accumulation: int = 1
    kept: bool = False          # whether batches come from kept features
    deepspeed: str = None       # a configuration file
    offload: bool = False
    schedule: Schedule = field(default_factory=lambda: Schedule(5e-7))


def make_pairs(ours, images, count, tokens, per_image=1, seed=0):
    """`count` preference pairs, `per_image` about each image, answers of `tokens` tokens →
    PackedDataset.
    """
    rng = random.Random(seed)

    def words(n):
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(n))

    examples = []
    for n in range(count):
        question = (f"{IMAGE}\nIs there a {words(1)} in the image, and if there is one, what does "
                    "it look like?")
        answers = [words(tokens - 1) for _ in range(2)]
        conversations = [[(question, answer)] for answer in answers]
        examples.append(Example(images[int(n / per_image) % len(images)], conversations))
    return PackedDataset(examples, ours.row_format())


def first_pairs(dataset, count):
    """Batch of the first pairs, and the positions of each row's tokens."""
    return dataset[list(range(count))], [dataset.row(n).position for n in range(count)]


# ---- Ours ----------------------------------------------------------------------------------------


def engine_of(deepspeed, ours, head, training):
    """DeepSpeed around the objective, as in train.py."""
    trained = set_trained(ours.trunk, head, training.groups)
    objective = Objective(None if training.kept else ours.trunk, head, LOSS)
    flags = SimpleNamespace(deepspeed=training.deepspeed, offload=training.offload, bf16=None,
                            report_to=None,
                            per_device_train_batch_size=training.micro_batch,
                            gradient_accumulation_steps=training.accumulation)
    on_gpu = ours.device.type == "cuda"
    config = deepspeed_config(flags, torch.distributed.get_world_size(), on_gpu)
    return start_engine(deepspeed, objective, trained, config, training.schedule)


def step(engine, batch):
    """One optimizer step → its metrics. Where the trunk is trained the reference's pass counts too;
    train.py needs it once per pair.
    """
    reference = None
    if engine.module.needs_reference_logps:
        with as_reference(engine):
            reference = engine(batch)
    loss, metrics = engine(batch, reference)
    engine.backward(loss)
    engine.step()
    return metrics


def with_trunk(deepspeed, ours, dataset, tokens, micro_batch, args):
    """Optimizer steps with the trunk in the loop → Line."""
    training = Training(STAGES[args.stage], micro_batch)
    engine = engine_of(deepspeed, ours, identity(ours), training)
    batch, rows = first_pairs(dataset, micro_batch)
    measured = attempt(lambda: step(engine, batch.to(ours.device, ours.dtype)), ours.device,
                       args.repeats, warm_up=2)
    engine.destroy()
    what = f"{tokens} tokens: ours, stage {args.stage}, {micro_batch} pairs"
    return line_of(ours.config, what, measured, micro_batch, rows)


def from_features(deepspeed, ours, dataset, tokens, args):
    """The frozen pass over all pairs, images opened, and a whole run from what it kept → two
    Lines.
    """
    micro_batch = max(args.micro_batches)
    accumulation = args.global_batch // micro_batch
    training = Training(STAGES[args.stage], micro_batch, accumulation, kept=True)
    with tempfile.TemporaryDirectory() as folder:
        def keep():
            return keep_features(folder, dataset, ours, ours.config.block_config(), batch_size=64)

        measured = measure(keep, ours.device, repeats=1, warm_up=0)
        what = (f"{tokens} tokens: ours, the frozen pass onto the disk, {args.pairs_per_image:g} "
                "pairs an image")
        frozen = Line(what, measured.seconds, len(dataset), 0, 0, measured.memory)
        kept = measured.result

        def run():
            engine = engine_of(deepspeed, ours, identity(ours), training)
            share = Share(args.global_batch, micro_batch)
            sampler = ResumableSampler(len(kept), args.steps, share, seed=42)
            for batch in batches_ahead(kept, sampler, spare_cores()):
                step(engine, batch.to(ours.device, ours.dtype))
            engine.destroy()

        measured = measure(run, ours.device, repeats=1, warm_up=0)
    what = f"{tokens} tokens: ours, a whole run of {args.steps} steps from kept features"
    pairs = args.steps * args.global_batch
    return frozen, Line(what, measured.seconds, pairs, 0, 0, measured.memory)


def with_lora(deepspeed, ours, datasets, args):
    """Optimizer steps of HA-DPO itself, `train.py --lora_r 128`, without --gradient_checkpointing
    and with it → (tokens, Line), as they come. Changes the trunk.
    """
    add_lora(ours.trunk.model, 128, 256, 0.05)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(ours.trunk.model)
        for pairs, (tokens, dataset) in itertools.product(args.peer_pairs, datasets.items()):
            engine = engine_of(deepspeed, ours, ours.head, Training(("lora",), pairs))
            batch, rows = first_pairs(dataset, pairs)

            def one_step(engine=engine, batch=batch):
                step(engine, batch.to(ours.device, ours.dtype))

            measured = attempt(one_step, ours.device, args.repeats, warm_up=2)
            engine.destroy()
            ours.trunk.zero_grad()                  # where memory was missing, some are left
            checkpointed = ", checkpointing" if checkpointing else ""
            what = f"{tokens} tokens: ours, LoRA{checkpointed}, {pairs} pairs"
            passes = LORA_PASSES[checkpointing]
            del engine, one_step                    # their memory is the next one's
            yield tokens, line_of(ours.config, what, measured, pairs, rows, passes)


@torch.no_grad()
def our_logps(ours, dataset, count):
    """log pi of the first pairs' answers, (count, 2)."""
    objective = Objective(ours.trunk, ours.head, LOSS)
    return torch.cat([objective.policy_logps(dataset[[n]].to(ours.device, ours.dtype))
                      for n in range(count)])


# ---- Command line --------------------------------------------------------------------------------


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2,
                        help="1 trains the block, 2 block and lm_head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 128, 512],
                        help="of an answer")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[4, 16],
                        help="pairs at once, ours")
    parser.add_argument("--peer_pairs", type=int, nargs="+", default=[4, 16],
                        help="pairs at once, peers and our LoRA; HA-DPO's recipe has the first")
    parser.add_argument("--pairs", type=int, default=512, help="whose features are kept")
    parser.add_argument("--pairs_per_image", type=float, default=1,
                        help="of those; HA-DPO's data have 2.5")
    parser.add_argument("--steps", type=int, default=39,
                        help="of the run from kept features; 39 of 128 are HA-DPO's epoch")
    parser.add_argument("--global_batch", type=int, default=128,
                        help="of the run from kept features")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON lines, each appended as soon as it is measured")
    return parser.parse_args(argv)


def fastest(lines, *words):
    """Of the lines whose names have one of the words, the one with the fewest seconds a pair."""
    return min((line for line in lines if any(word in line.what for word in words)),
               key=lambda line: line.per_unit)


def main(argv=None):
    args = parse_flags(argv)
    deepspeed = start_deepspeed()[0]
    ours = random_llava(args.size)
    peak = matmul_peak(ours.device, ours.dtype)
    print(f"{environment(ours.device, peak)}, peft {peft.__version__}, "
          f"deepspeed {deepspeed.__version__}", flush=True)
    found = {tokens: ([], []) for tokens in args.tokens}               # lines: ours, the peers'

    def note(side, tokens, line):
        found[tokens][side].append(line)
        if args.output:
            keep_line(args.output, line)

    with tempfile.TemporaryDirectory() as folder:
        names = write_images(folder, math.ceil(args.pairs / args.pairs_per_image))
        images = [os.path.join(folder, name) for name in names]
        datasets = {tokens: make_pairs(ours, images, args.pairs, tokens) for tokens in args.tokens}
        first = args.tokens[0]

        print("timing ours", flush=True)
        for tokens, micro in itertools.product(args.tokens, args.micro_batches):
            note(0, tokens, with_trunk(deepspeed, ours, datasets[tokens], tokens, micro, args))
        kept = make_pairs(ours, images, args.pairs, first, args.pairs_per_image)
        for line in from_features(deepspeed, ours, kept, first, args):
            note(0, first, line)

        print("timing the peers", flush=True)
        sides = Sides(ours, peer_of(ours), args.stage)
        said = our_logps(ours, datasets[first], args.peer_pairs[0])
        with torch.no_grad():
            inputs, _ = peer_batch(ours, datasets[first], args.peer_pairs[0])
            expected = peer_logps(sides.theirs, inputs, first)
        for peer in peers_of(args.peer_pairs):
            for tokens, line in time_peer(peer, sides, datasets, args.repeats):
                note(1, tokens, line)
        del sides
        for tokens, line in with_lora(deepspeed, ours, datasets, args):
            note(0, tokens, line)

    shown = []
    for mine, theirs in found.values():
        beside = (*theirs[:2], fastest(theirs, "LoRA"), fastest(theirs, "frozen trunk"))
        shown += [*theirs, *(replace(line, peers=beside) for line in mine)]
    print("\n" + table(shown, "pair", args.global_batch, peak) + "\n")
    what = "log-probabilities of the same answers, adapters off"
    agreement(what, said, expected, ours.dtype)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
