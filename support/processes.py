"""Several processes of one program, as torchrun starts them; or the only one.

    start_processes()               # before any of them makes a file
    rank, world_size = place()      # 0, 1 where it is alone
    end_processes()

For programs that exchange texts and numbers and no gradients; training/engine.py starts the others.
"""
import os

import torch.distributed as dist


def start_processes():
    """Let the processes of torchrun find each other. A process alone stays alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")


def place():
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()
