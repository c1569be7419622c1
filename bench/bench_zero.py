"""Pairs per second and memory of one optimizer step, for every way to spread a training over GPUs: what fits on which cards.

    torchrun --nproc_per_node 4 bench/bench_zero.py [--size 7b] [--pairs 4] [--tokens 24]

Each line is one of train.py's trainings under one ZeRO stage (arXiv 1910.02054): what every process holds whole (0), and
what is divided among them: the optimizer's states (1), gradients too (2), weights too (3), or with --offload the states and
the step on the host. Weights are random; every process makes its own pairs before the clock starts. Memory is the highest of
a step on any GPU; before it, while the engine starts, every GPU holds the whole model once (14 GB at 7B). Trainings of
LLaMA or its LoRA use gradient checkpointing and include the reference's pass. `--only full` takes the lines of that name.
"""
import argparse
import gc
import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from bench_dpo import identity, make_pairs, start_engine, step
from loop import start_deepspeed
from lora import add_lora
from objective import checkpoint_layers
from peer import SIZES, measure, random_llava, write_images
from train import STAGES

TRAININGS = {"stage 2": STAGES[2], "LoRA": ("lora",), "full": ("projector", "llama")}
RUNS = [("stage 2", 0, False), ("stage 2", 3, False), ("LoRA", 0, False), ("LoRA", 1, False), ("LoRA", 2, False),
        ("LoRA", 2, True), ("LoRA", 3, False), ("full", 3, False), ("full", 3, True)]
BYTES = 2 + 2 + 4 + 4 + 8       # per trained number: weight, gradient, master weight and its gradient, AdamW's two moments


def fits(trained, zero, offload, device):
    """Whether weights, gradients and states of `trained` numbers have room in what is free, so that nothing runs into the wall."""
    if device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info(device)[0]
    return trained * (4 if offload else BYTES) / (dist.get_world_size() if zero else 1) < free


def one(deepspeed, size, what, zero, offload, images, pairs, tokens, repeats):
    """Optimizer steps of one line → seconds of a step, bytes; None where it does not fit."""
    ours, rank = random_llava(size), dist.get_rank()
    head = identity(ours) if what == "stage 2" else ours.head
    if what == "LoRA":
        add_lora(ours.trunk.model, 128, 256, 0.05)
    if what != "stage 2":
        checkpoint_layers(ours.trunk.model)
    if what == "full" and not fits(sum(p.numel() for p in ours.trunk.model.parameters()), zero, offload, ours.device):
        return None
    dataset = make_pairs(ours, images, pairs, tokens, seed=rank)
    batch = dataset[list(range(pairs))].to(ours.device, ours.dtype)
    config = {"zero_optimization": {"stage": zero, "overlap_comm": True, "contiguous_gradients": True}, "gradient_clipping": 1.0}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        engine = start_engine(deepspeed, ours, head, TRAININGS[what], pairs, zero=file.name, offload=offload)
    measured = measure(lambda: step(engine, batch), ours.device, repeats, warm_up=1)
    figures = torch.tensor([measured.seconds, float(measured.memory or 0)], dtype=torch.float64, device=ours.device)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    engine.destroy()
    return figures.tolist()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--pairs", type=int, default=4, help="at once, on every GPU")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS))
    args = parser.parse_args(argv)
    deepspeed, rank, world_size, device = start_deepspeed()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        images = [os.path.join(folder, image) for image in write_images(folder, args.pairs)]
        if rank == 0:
            print(f"{world_size} × {name}, torch {torch.__version__}, deepspeed {deepspeed.__version__}, {args.pairs} pairs of "
                  f"{args.tokens} tokens on each\n\n| GPUs | trained | ZeRO | pairs/s | s a step | peak memory of a GPU, GiB |\n"
                  "|---|---|---|---|---|---|", flush=True)
        for what, zero, offload in RUNS:
            if what not in args.only:
                continue
            figures = one(deepspeed, args.size, what, zero, offload, images, args.pairs, args.tokens, args.repeats)
            gc.collect()
            cells = "does not fit | – | –"
            if figures:
                seconds, memory = figures
                cells = f"{world_size * args.pairs / seconds:.3g} | {seconds:.3g} | " + (f"{memory / 2 ** 30:.1f}" if memory else "–")
            if rank == 0:
                print(f"| {world_size} | {what} | {zero}{' + offload' * offload} | {cells} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
