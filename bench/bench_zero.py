"""Pairs per second and memory of one optimizer step, for every way to spread a training over GPUs: what fits on which cards.

    python bench/bench_zero.py --gpus 4 [--size 7b] [--pairs 4] [--tokens 24] [--only LoRA]

Each line is one of train.py's trainings under one ZeRO stage (arXiv 1910.02054): what every process holds whole (0), and
what is divided among them: the optimizer's states (1), gradients too (2), weights too (3); `+ offload` puts the states and
the step on the host. Weights are random; every process makes its own pairs before the clock starts. Memory is the highest of
a step on any GPU; before it, while the engine starts, every GPU holds the whole model once (14 GB at 7B). Trainings of
LLaMA or its LoRA use gradient checkpointing and include the reference's pass. A line has processes of its own, started
through torchrun, because DeepSpeed does not give back all memory of a ZeRO-3 engine.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from bench_dpo import engine_of, identity, make_pairs, step
from loop import start_deepspeed
from lora import add_lora
from objective import STAGES, checkpoint_layers
from peer import SIZES, measure, random_llava, write_images

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


def one(deepspeed, size, what, zero, offload, pairs, tokens, repeats):
    """Optimizer steps of one line, on every process → its last three cells."""
    ours, rank = random_llava(size), dist.get_rank()
    head = identity(ours) if what == "stage 2" else ours.head
    if what == "LoRA":
        add_lora(ours.trunk.model, 128, 256, 0.05)
    if what != "stage 2":
        checkpoint_layers(ours.trunk.model)
    if what == "full" and not fits(sum(p.numel() for p in ours.trunk.model.parameters()), zero, offload, ours.device):
        return "does not fit | – | –"
    with tempfile.TemporaryDirectory() as folder:
        images = [os.path.join(folder, image) for image in write_images(folder, pairs)]
        batch = make_pairs(ours, images, pairs, tokens, seed=rank)[list(range(pairs))].to(ours.device, ours.dtype)
        path = os.path.join(folder, "ds.json")
        with open(path, "w") as file:
            json.dump({"zero_optimization": {"stage": zero}, "gradient_clipping": 1.0}, file)
        engine = engine_of(deepspeed, ours, head, TRAININGS[what], pairs, zero=path, offload=offload)
    measured = measure(lambda: step(engine, batch), ours.device, repeats, warm_up=1)
    figures = torch.tensor([measured.seconds, float(measured.memory or 0)], dtype=torch.float64, device=ours.device)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    seconds, memory = figures.tolist()
    engine.destroy()
    return f"{dist.get_world_size() * pairs / seconds:.3g} | {seconds:.3g} | " + (f"{memory / 2 ** 30:.1f}" if memory else "–")


def say(gpus, what, zero, offload, cells):
    print(f"| {gpus} | {what} | {zero}{' + offload' * offload} | {cells} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--pairs", type=int, default=4, help="at once, on every GPU")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS))
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)         # one of RUNS: this is one of its processes
    args = parser.parse_args(argv)
    if args.line is not None:
        deepspeed = start_deepspeed()[0]
        cells = one(deepspeed, args.size, *RUNS[args.line], args.pairs, args.tokens, args.repeats)
        if dist.get_rank() == 0:
            say(args.gpus, *RUNS[args.line], cells)
        dist.destroy_process_group()
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.gpus} × {name}, torch {torch.__version__}, {args.pairs} pairs of {args.tokens} tokens on each\n\n"
          "| GPUs | trained | ZeRO | pairs/s | s a step | peak memory of a GPU, GiB |\n|---|---|---|---|---|---|", flush=True)
    for n, run in enumerate(RUNS):
        if run[0] in args.only:
            options = vars(args) | {"line": n}
            del options["only"]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus), __file__]
            if subprocess.run(command + [str(x) for name, value in options.items() for x in (f"--{name}", value)]).returncode:
                say(args.gpus, *run, "failed, see above | – | –")


if __name__ == "__main__":
    main()
