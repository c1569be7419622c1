"""Which examples stand in which batch.

    sampler = ResumableSampler(len(rows), steps, Share(128, 4, rank, world_size), seed)
    for ids, batch in micro_batches(run, engine): ...

The examples of an optimizer step follow from (seed, epoch, step) alone. So a run that goes on from
a saved state sees what it would have seen, on any number of processes.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from support.loading import batches_ahead


@dataclass
class Share:
    """How a global batch is split, and which part is this process's."""
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1


class ResumableSampler(torch.utils.data.Sampler):
    """Micro batches of one rank: a permutation per epoch from (seed, epoch), cut into global
    batches.

    The examples of a global batch depend on neither the number of processes nor the micro batch
    size. The stream runs over the ends of epochs, so no example is dropped and every batch is
    full. `start` is the number of optimizer steps already done.

    With `lengths` (PackedDataset.lengths) a global batch is sorted before it is cut: a micro batch
    then holds rows of one modality and of similar length, and those that run at the same time on
    several ranks cost the same. The loss is a mean over the global batch, so this changes it by
    rounding only. (LLaVA's `group_by_modality_length` does it with whole batches, each of one
    modality; here the batches stay random.)
    """

    def __init__(self, num_examples, steps, share, seed, start=0, lengths=None):
        self.num_examples, self.steps, self.share, self.seed = num_examples, steps, share, seed
        self.start, self.lengths = start, lengths
        self.epoch, self.order = None, None

    def __len__(self):
        share = self.share
        left = (self.steps - self.start) * share.global_batch
        return left // (share.micro_batch * share.world_size)

    def examples(self, step):
        """Examples of one optimizer step in the order in which they are cut, (global_batch,)."""
        size, batch = self.share.global_batch, []
        stream = np.arange(step * size, (step + 1) * size)
        for epoch in np.unique(stream // self.num_examples):
            if epoch != self.epoch:
                random = np.random.default_rng([self.seed, epoch])
                self.epoch, self.order = epoch, random.permutation(self.num_examples)
            in_epoch = stream[stream // self.num_examples == epoch] % self.num_examples
            batch.append(self.order[in_epoch])
        batch = np.concatenate(batch)
        if self.lengths is None:
            return batch
        return batch[np.argsort(self.lengths[batch], kind="stable")]

    def __iter__(self):
        share = self.share
        for step in range(self.start, self.steps):
            cut = self.examples(step).reshape(-1, share.world_size, share.micro_batch)
            yield from cut[:, share.rank].tolist()


def micro_batches(run, engine, start=0, steps=None):
    """(ids, Batch on the device) of this rank's micro batches, from step `start` to `steps`."""
    share = Share(engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(),
                  dist.get_rank(), dist.get_world_size())
    sampler = ResumableSampler(len(run.rows), steps or run.steps, share, run.args.seed, start,
                               run.rows.lengths())
    loader = batches_ahead(run.rows, sampler, run.args.dataloader_num_workers)
    return ((ids, batch.to(run.device, run.dtype))
            for ids, batch in zip(sampler, loader, strict=True))
