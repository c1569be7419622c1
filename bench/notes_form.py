"""Our block beside the training notes' own form of it, at 7B size: what 39 steps of stage 1 do to
the model's rewards, logits and words.

    python bench/notes_form.py [--size 7b] [--learning_rate 2e-7 5e-7 1e-6 2e-6]
    python bench/notes_form.py --size tiny --pairs 40 --held_out 8 --steps 3 --global_batch 8

Ours starts as the identity. The notes' (`--block original`) is random at the start and adds the
hidden states once more, which doubles them (post_decoder.py). Both train from the same kept
features, as train.py does: HA-DPO's 39 steps of 128 pairs, each pair once, beta 0.1, at the rates
that the notes tried; 5e-7 is our default. Weights are random, so answers mean nothing; to leave
something to learn, chosen and rejected answers are made of different letters. On held-out pairs:

* Loss, margin (chosen reward - rejected reward), accuracy. Rewards compare with the block as it
  started, so in either form the loss is ln 2 at step 0.
* How far the logits of answer tokens lie from those of the model without a block, at the start and
  at the end, and how often another word is the likeliest.
* The share of the block's weights that changed. The steps add up in fp32, but a weight in bf16
  changes only where they reach the next number that bf16 has.
"""
import argparse
import copy
import itertools
import math
import os
import string
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from bench.bench_dpo import Training, engine_of, make_pairs, step
from bench.measuring import release
from bench.peer import SIZES, random_llava, write_images
from data import IGNORE, Example, PackedDataset
from model import STAGES, Head
from support.common import progress
from support.loading import batches_ahead, spare_cores
from training.batches import ResumableSampler, Share
from training.blocks import BLOCKS
from training.engine import Schedule, start_deepspeed
from training.features import keep_features

ABOUT_AN_IMAGE = 2.5        # pairs, in HA-DPO's data
REWARDS = ("loss", "rewards/margin", "rewards/accuracy")
COLUMNS = ("block", "learning rate", "loss, step 0", "loss", "margin", "accuracy",
           *(f"{when}: {what}" for when in ("step 0", "end", "by training")
             for what in ("mean change of logits", "largest", "other words")), "weights changed")


def told_apart(ours, dataset):
    """The same pairs; the letters of their chosen answers are a to e, of the rejected v to z."""
    letters = string.ascii_lowercase
    halves = [str.maketrans(letters, (few * 6)[:26]) for few in ("abcde", "vwxyz")]
    examples = [Example(example.image, [[(question, answer.translate(half))]
                                        for ((question, answer),), half
                                        in zip(example.conversations, halves, strict=True)])
                for example in dataset.examples]
    return PackedDataset(examples, ours.row_format())


# ---- One run -------------------------------------------------------------------------------------


def train(deepspeed, ours, kept, block, rate, args):
    """Stage 1 of a block from kept features → the Objective at its end, the head that it started
    from, the loss at step 0.
    """
    torch.manual_seed(42)
    with ours.device:
        head = Head(ours.config, ours.config.block_config(**BLOCKS[block])).to(ours.dtype)
    head.lm_head.load_state_dict(ours.head.lm_head.state_dict())
    start, metrics = copy.deepcopy(head), []
    accumulation = args.global_batch // args.micro_batch
    training = Training(STAGES[1], args.micro_batch, accumulation, kept=True,
                        schedule=Schedule(rate, steps=args.steps))
    engine = engine_of(deepspeed, ours, head, training)
    sampler = ResumableSampler(len(kept) - args.held_out, args.steps,
                               Share(args.global_batch, args.micro_batch), seed=42)
    batches = batches_ahead(kept, sampler, spare_cores())
    for batch in progress(batches, f"{block}, {rate:g}", unit="batch"):
        metrics.append(step(engine, batch.to(ours.device, ours.dtype)))
    objective = engine.module
    engine.destroy()
    return objective, start, sum(m["loss"].item() for m in metrics[:accumulation]) / accumulation


def change(logits, others):
    """How far two models' logits (n, vocab) lie apart: mean, largest, share of other words."""
    difference, words = (logits - others).abs(), logits.argmax(-1) != others.argmax(-1)
    return torch.stack((difference.mean(), difference.max(), words.float().mean()))


@torch.no_grad()
def cells_of(ours, run, kept, args):
    """One run in the table: its rewards, and how far its logits lie from others."""
    objective, start_head, first_loss = run
    changes, rewards = [], []
    for first in range(len(kept) - args.held_out, len(kept), args.micro_batch):
        batch = kept[list(range(first, first + args.micro_batch))].to(ours.device, ours.dtype)
        metrics = objective(batch)[1]
        rewards.append(torch.stack([metrics[name] for name in REWARDS]))
        states, wanted = objective.answer_states(batch), batch.target != IGNORE
        # Logits of the answer tokens (n, vocab): without a block, as it started, trained.
        base, start, end = (head(*states, wanted).float()
                            for head in (ours.head, start_head, objective.head))
        pairs = (start, base), (end, base), (end, start)
        changes.append(torch.stack([change(*pair) for pair in pairs]))
    loss, margin, accuracy = torch.stack(rewards).mean(0).tolist()
    changes = torch.stack(changes)                                             # (batches, 3, 3)
    means, largest = changes.mean(0).tolist(), changes.amax(0).tolist()
    weights = (torch.cat([weight.flatten() for weight in head.post_interaction_block.parameters()])
               for head in (start_head, objective.head))
    yield from (f"{first_loss:.4f}", f"{loss:.4f}", f"{margin:.4f}", f"{accuracy:.1%}")
    for (mean, _, words), (_, most, _) in zip(means, largest, strict=True):
        yield from (f"{mean:.3g}", f"{most:.3g}", f"{words:.1%}")
    yield f"{torch.ne(*weights).float().mean():.1%}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[2e-7, 5e-7, 1e-6, 2e-6])
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--pairs", type=int, default=39 * 128, help="to train on")
    parser.add_argument("--held_out", type=int, default=256, help="to measure on, in micro batches")
    parser.add_argument("--steps", type=int, default=39)
    parser.add_argument("--global_batch", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, default=16)
    args = parser.parse_args(argv)
    deepspeed, ours = start_deepspeed()[0], random_llava(args.size)
    count = args.pairs + args.held_out
    with tempfile.TemporaryDirectory() as folder:
        names = write_images(f"{folder}/images", math.ceil(count / ABOUT_AN_IMAGE))
        images = [os.path.join(folder, "images", name) for name in names]
        pairs = told_apart(ours, make_pairs(ours, images, count, args.tokens, ABOUT_AN_IMAGE))
        kept = keep_features(f"{folder}/kept", pairs, ours, ours.config.block_config(), 64)
        ours.trunk.to("meta")                   # its work is done, and its memory is free
        release()
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for rate, block in itertools.product(args.learning_rate, ("full", "original")):
            run = train(deepspeed, ours, kept, block, rate, args)
            cells = cells_of(ours, run, kept, args)
            print(f"| {' | '.join((block, f'{rate:g}', *cells))} |", flush=True)
            release()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
