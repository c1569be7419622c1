"""Batches, prepared ahead of the model that waits for them.

    for batch in batches_ahead(dataset, [[0, 1], [2, 3]], spare_cores()): ...

Worker processes open images and pack rows while the GPU computes. Without a GPU the main process
does this itself, because then there are no cores to spare.
"""
import os
import signal

import torch


def batches_ahead(dataset, batches, num_workers):
    """The dataset's Batches, in order, prepared by worker processes while the caller computes.

    `batches`: lists of indices; dataset[list] is one Batch.
    """
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=batches, num_workers=num_workers, collate_fn=as_is,
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None)


def as_is(batch):
    """The collate function: the dataset makes whole Batches already."""
    return batch


def ignore_signals(worker):
    """Let a worker live on after Ctrl-C, which a terminal sends to all processes.

    The main process still needs it to finish its step and save (training/resume.py).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def spare_cores():
    """How many worker processes prepare batches by default: at most 8, and none without a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores - 1) if torch.cuda.is_available() else 0
