"""What ends a run before it wastes more time.

    warn_of_cut_rows(dataset)                        # before anything long begins
    long_rows(dataset)                               # the same for open prompts, which are not cut
    refuse_few_bits(tune, 4, zero_stage=3)           # what 4 and 8 bits do not go with
    guards = Guards(run)                             # before the first backward
    guards.check(step, values, seen)                 # once per optimizer step

A trained tensor without a gradient, a policy that is not the reference at the first step, a loss
or a gradient that is no number: each is one line that names the step, the rows and the last good
state.
"""
import collections
import functools
import math
import os

import numpy as np
import torch.distributed as dist

from data import IMAGE
from model import TRUNK
from support.common import InputError, progress, say
from training.states import read_latest

TEMPLATE = 32       # tokens at most around a question and its answer: USER, ASSISTANT, </s>, spaces


def refuse_few_bits(tune, bits, zero_stage=0):
    """InputError where a trunk in 4 or 8 bits does not go with what is trained or with ZeRO-3.

    `bits`: what was typed, or what the base's files are in.
    """
    if not bits or bits >= 16:
        return
    changed = [group for group in tune if group in TRUNK - {"lora"}]
    if changed:
        raise InputError(f"--tune {','.join(tune)}: {changed[0]} is in front of the head, and a "
                         "run that changes the trunk saves it whole, which "
                         f"{bits} bits cannot hold; train lora, post_decoder or lm_head, or name "
                         "a base in 16 bits without --bits")
    if zero_stage == 3:
        raise InputError(f"ZeRO-3 divides weights among the GPUs, and those in {bits} bits it does "
                         "not know; take ZeRO-0, 1 or 2, where every GPU holds them whole, or "
                         "leave --bits out")


def at_most(texts):
    """The most tokens that texts can have: a token is a byte at least, in every script."""
    return sum(len(text.encode()) for text in texts)


def long_rows(dataset):
    """Rows that may be longer than the model's length → [row number], about the longest first.

    InputError where a prompt, which is never cut, does not fit. Nothing is tokenised but the rows
    whose prompt has so many bytes that it might not.
    """
    examples, row_format = dataset.examples, dataset.format
    room, found = row_format.max_length - at_most([row_format.template.system]) - TEMPLATE, []
    numbers, of_image = range(len(examples)), row_format.num_patches + row_format.num_voco
    if not isinstance(examples, list):                      # rows that stay on disk
        size, has_image = examples.sizes()
        numbers = np.flatnonzero(size + has_image * of_image > room).tolist()
    for i in progress(numbers, "long rows", unit="row"):
        example = examples[i]
        here = room - bool(example.image) * of_image
        for turns in example.conversations:
            # What must not be cut: up to the first answer, and up to the image.
            marked = [n for n, (question, _) in enumerate(turns) if IMAGE in question]
            last = max(marked, default=0) if example.image else 0
            texts = [text or "" for turn in turns for text in turn]
            if at_most(texts[:2 * last + 1]) + TEMPLATE * (last + 1) > here:
                dataset.row(i)                              # raises InputError if it is too long
            if at_most(texts) + TEMPLATE * len(turns) > here:
                # A character of a byte is a quarter of a token, other bytes are up to one each.
                about = at_most(texts) - 3 / 4 * sum(map(len, texts))
                found.append((about - here, i))
    return list(dict.fromkeys(i for _, i in sorted(found, reverse=True)))


def warn_of_cut_rows(dataset):
    """Say how many rows lose the end of an answer to the model's length.

    The longest rows are made, until a hundred of them have fitted one after the other. InputError
    where a prompt does not fit.
    """
    cut, fitted = 0, 0
    for i in progress(long_rows(dataset), "longest rows", unit="row"):
        if dataset.row(i).cut:
            cut, fitted = cut + 1, 0
        else:
            fitted += 1
        if fitted == 100:
            break
    if cut:
        say(f"{cut:,} of {len(dataset):,} rows are longer than the model's "
            f"{dataset.format.max_length} tokens: their answers are cut at the end")
    return cut


class Guards:
    """Watches one run. `seen` is [(ids, metrics)] of this rank's micro batches of a step."""

    def __init__(self, run):
        self.run, self.recent, self.first = run, collections.deque(maxlen=20), True
        # ZeRO moves gradients out of `.grad` at once, so each tensor's backward makes a note.
        self.reached = set()
        for name, parameter in run.trained.items():
            note = functools.partial(self.note_reached, name)
            parameter.register_post_accumulate_grad_hook(note)

    def note_reached(self, name, parameter):
        self.reached.add(name)

    def check(self, step, values, seen):
        """InputError where something is wrong with this step, whose means are `values`."""
        if self.first:
            self.check_reached()
            self.first = False
        loss, beta = values["loss"], self.run.args.beta
        if step == 1 and abs(values.get("rewards/margin", 0)) > beta:              # more than a nat
            raise RuntimeError("policy and reference differ before the first step (loss "
                               f"{loss:g}, margin {values['rewards/margin']:g}, which must be 0): "
                               "one of them is not what the run starts from")
        # 20 times the mean of the last 20 losses is no bad batch any more, it is divergence.
        limit = 20 * max(1, sum(self.recent) / len(self.recent)) if self.recent else math.inf
        self.recent.append(loss)
        if not math.isfinite(loss) or loss > limit:
            parts = of_all_ranks(seen)
            worst = [part for part in parts if not math.isfinite(part[1])]
            worst = worst or [max(parts, key=lambda part: part[1])]
            self.raise_with_rows(f"the loss is {loss:g}", step, worst)
        if not 0 <= values["grad_norm"] < math.inf:                   # ZeRO says -1 when it is none
            self.raise_with_rows("the gradient is no number", step, of_all_ranks(seen))

    def check_reached(self):
        """After the first step's backwards every trained tensor must have got a gradient."""
        without = [name for name in self.run.trained if name not in self.reached]
        if without:
            some = ", ".join(without[:5]) + (" …" if without[5:] else "")
            raise InputError(f"{len(without)} trained tensors get no gradient ({some}): the loss "
                             "does not depend on them; leave their group out of --tune")

    def raise_with_rows(self, what, step, parts):
        """InputError that names the step, the rows of the micro batches `parts` and what to go
        back to.
        """
        ids, examples = [i for part in parts for i in part[0]], self.run.rows.examples
        images = [os.path.basename(examples[i].image or "text") for i in ids[:16]]
        named = ", ".join(f"{i} ({image})" for i, image in zip(ids, images, strict=False))
        named += " …" if len(ids) > 16 else ""
        latest = read_latest(self.run.folder)
        state = ""
        if latest:
            state = f", and {os.path.join(self.run.folder, latest)} is the last good state"
        raise InputError(f"{what} at step {step}, from examples {named} of the data; the step was "
                         f"not kept{state}: look at these examples, or lower --learning_rate")


def of_all_ranks(seen):
    """[(ids, metrics)] of this rank's micro batches → [(ids, loss)] of everybody's."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(ids, float(metrics["loss"])) for ids, metrics in seen])
    return [part for rank in parts for part in rank]
