"""What the model says before its first step: the reference of a run that trains the trunk itself.

A frozen trunk needs none of this (dpo.py). Where the trunk is trained, with LoRA or without, the
reference's log-probabilities, two numbers a pair, are taken from the model before its first step.
"""
import contextlib
import math
import os

import torch
import torch.distributed as dist

from support.common import InputError, progress, temporary
from training.batches import micro_batches
from training.lora import without_lora


@contextlib.contextmanager
def as_reference(engine):
    """Inside, engine(batch) gives the log-probabilities (B, 2) of the model without LoRA and
    dropout.

    ZeRO-3 gathers weights when the engine calls the module. So `policy_logps` stands in for
    `forward` and is called in the same way.
    """
    objective = engine.module
    engine.eval()
    objective.forward = objective.policy_logps
    try:
        with torch.no_grad(), without_lora(objective):
            yield
    finally:
        del objective.forward
        engine.train()


def reference_logps(run, engine):
    """What the model says before its first step of every row of the run → (number of rows, 2),
    nats.

    The micro batches are those of the first epoch, so that there policy and reference agree to the
    last bit at step 0. Kept in OUTPUT_DIR.run for a run that goes on.
    """
    path = os.path.join(run.folder, "reference.pt")
    if os.path.isfile(path):
        return torch.load(path, map_location=run.device)
    table = torch.full((len(run.rows), 2), -math.inf, device=run.device)
    steps = min(run.steps, math.ceil(len(run.rows) / engine.train_batch_size()))
    count = steps * engine.gradient_accumulation_steps()
    batches = micro_batches(run, engine, steps=steps)
    with as_reference(engine):
        for ids, batch in progress(batches, "reference", count, unit="batch"):
            table[ids] = engine(batch)
    dist.all_reduce(table, dist.ReduceOp.MAX)       # every rank has its own rows, -inf elsewhere
    if dist.get_rank() == 0:
        partial = temporary(path)
        try:
            torch.save(table.cpu(), partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as e:        # torch's writer raises RuntimeError
            reason = getattr(e, "strerror", None) or "is the disk full?"
            raise InputError(f"{path}: cannot be written ({reason}); make room there") from e
    return table
