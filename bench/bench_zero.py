"""Pairs per second and memory of one optimizer step, for every way to spread a training over GPUs.
It tells what fits on which cards.

    python bench/bench_zero.py --gpus 4 [--size 7b] [--pairs 4] [--tokens 24] [--only LoRA]

Each line is one of train.py's trainings under one ZeRO stage (arXiv 1910.02054). The stage says
what is divided among the processes: nothing (0), the optimizer's states (1), gradients too (2),
weights too (3). `+ offload` puts the states and the step on the host.

Weights are random, and every process makes its own pairs before the clock starts. Memory is the
highest of a step on any GPU. Before it, while the engine starts, every GPU holds the whole model
once (14 GB at 7B). Trainings of LLaMA or its LoRA use gradient checkpointing and include the
reference's pass. Every line has its own processes, started through torchrun, because DeepSpeed does
not give back all memory of a ZeRO-3 engine.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from bench.bench_dpo import Training, engine_of, make_pairs, step
from bench.measuring import measure
from bench.peer import SIZES, identity, random_llava, write_images
from model import STAGES
from training.engine import checkpoint_layers, start_deepspeed
from training.lora import add_lora


@dataclass(frozen=True)
class Setup:
    """One line of the table."""
    what: str
    zero: int
    offload: bool = False


TRAININGS = {"stage 2": STAGES[2], "LoRA": ("lora",), "full": ("projector", "llama")}
SETUPS = [Setup("stage 2", 0), Setup("stage 2", 3), Setup("LoRA", 0), Setup("LoRA", 1),
          Setup("LoRA", 2), Setup("LoRA", 2, True), Setup("LoRA", 3), Setup("full", 3),
          Setup("full", 3, True)]
# Per trained number: weight, gradient, master weight and its gradient, AdamW's two moments.
BYTES = 2 + 2 + 4 + 4 + 8


def fits(trained, setup, device):
    """Whether weights, gradients and states of `trained` numbers have room in the free memory."""
    if device.type != "cuda":
        return True
    needed = trained * (4 if setup.offload else BYTES)
    processes = dist.get_world_size() if setup.zero else 1
    return needed / processes < torch.cuda.mem_get_info(device)[0]


def cells_of(setup, deepspeed, args):
    """Optimizer steps of one line, on every process → its last three cells."""
    ours, pairs, what = random_llava(args.size), args.pairs, setup.what
    head = identity(ours) if what == "stage 2" else ours.head
    if what == "LoRA":
        add_lora(ours.trunk.model, 128, 256, 0.05)
    if what != "stage 2":
        checkpoint_layers(ours.trunk.model)
    trained = sum(p.numel() for p in ours.trunk.model.parameters())
    if what == "full" and not fits(trained, setup, ours.device):
        return "does not fit | – | –"
    with tempfile.TemporaryDirectory() as folder:
        images = [os.path.join(folder, image) for image in write_images(folder, pairs)]
        dataset = make_pairs(ours, images, pairs, args.tokens, seed=dist.get_rank())
        batch = dataset[list(range(pairs))].to(ours.device, ours.dtype)
        path = os.path.join(folder, "ds.json")
        with open(path, "w") as file:
            zero = {"stage": setup.zero}
            json.dump({"zero_optimization": zero, "gradient_clipping": 1.0}, file)
        training = Training(TRAININGS[what], pairs, deepspeed=path, offload=setup.offload)
        engine = engine_of(deepspeed, ours, head, training)
    measured = measure(lambda: step(engine, batch), ours.device, args.repeats, warm_up=1)
    figures = torch.tensor([measured.seconds, float(measured.memory or 0)], dtype=torch.float64,
                           device=ours.device)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    seconds, memory = figures.tolist()
    engine.destroy()
    gibibytes = f"{memory / 2 ** 30:.1f}" if memory else "–"
    return f"{dist.get_world_size() * pairs / seconds:.3g} | {seconds:.3g} | {gibibytes}"


def print_line(gpus, setup, cells):
    zero = f"{setup.zero} + offload" if setup.offload else f"{setup.zero}"
    print(f"| {gpus} | {setup.what} | {zero} | {cells} |", flush=True)


def start_line(n, args):
    """Start the processes of line n and wait for them; they print it."""
    options = {name: value for name, value in vars(args).items() if name != "only"} | {"line": n}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", str(args.gpus), os.path.abspath(__file__)]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    if subprocess.run(command).returncode:
        print_line(args.gpus, SETUPS[n], "failed, see above | – | –")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--pairs", type=int, default=4, help="at once, on every GPU")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS))
    # The line of SETUPS whose processes this one belongs to.
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.line is not None:
        cells = cells_of(SETUPS[args.line], start_deepspeed()[0], args)
        if dist.get_rank() == 0:
            print_line(args.gpus, SETUPS[args.line], cells)
        dist.destroy_process_group()
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.gpus} × {name}, torch {torch.__version__}, {args.pairs} pairs of {args.tokens} "
          "tokens on each\n\n"
          "| GPUs | trained | ZeRO | pairs/s | s a step | peak memory of a GPU, GiB |\n"
          "|---|---|---|---|---|---|", flush=True)
    for n, setup in enumerate(SETUPS):
        if setup.what in args.only:
            start_line(n, args)


if __name__ == "__main__":
    main()
