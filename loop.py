"""The DeepSpeed side of training: configuration and batch arithmetic, the start, the loop over optimizer steps.

    config = deepspeed_config(args, world_size, on_gpu)               # the user's file, checked and completed
    engine, *_ = deepspeed.initialize(model=objective, ...)
    run_steps(engine, rows, steps, args, trained, folder)

The loop only calls the engine's forward, backward and step, so that it is the same under every ZeRO stage.
"""
import collections
import json
import math
import os
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import ResumableSampler, batches_ahead
from readers import InputError, read_json


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed


def deepspeed_config(args, world_size, on_gpu):
    """The configuration file, checked, with the batch arithmetic filled in."""
    config = {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0}
    if args.deepspeed:
        config = read_json(args.deepspeed)
        path = find_auto(config)
        if path:
            raise InputError(f"{args.deepspeed}: {path} is \"auto\", which only the HF Trainer understands; write a value or remove it")
    in_file = config.get("train_micro_batch_size_per_gpu")
    micro, accumulation = args.per_device_train_batch_size or in_file, args.gradient_accumulation_steps
    if in_file and in_file != micro:
        raise InputError(f"{args.deepspeed}: train_micro_batch_size_per_gpu is {in_file} and --per_device_train_batch_size {micro}; "
                         "remove one of them")
    total = config.get("train_batch_size")
    if total is None:
        total = micro * accumulation * world_size if micro and accumulation else args.default_batch
    fits = [m for m in range(1, total + 1) if total % (m * world_size) == 0]
    if micro is None and accumulation and total % (accumulation * world_size) == 0:
        micro = total // (accumulation * world_size)
    elif micro is None and fits:
        micro = max(m for m in fits if m <= args.default_micro or m == fits[0])
    if micro not in fits or accumulation and accumulation * micro * world_size != total:
        near = ", ".join(f"{m} (accumulation {total // (m * world_size)})" for m in sorted(fits, key=lambda m: abs(m - (micro or 1)))[:3])
        raise InputError(f"global batch {total} ≠ {micro} per device × {accumulation or 'any'} accumulation × {world_size} processes; "
                         + (f"--per_device_train_batch_size can be {near}" if fits else
                            f"it is no multiple of {world_size}: change train_batch_size or the number of processes"))
    config |= {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro,
               "gradient_accumulation_steps": total // (micro * world_size)}
    config.setdefault("steps_per_print", 10 ** 9)                    # the loop narrates itself
    config.setdefault("bf16", {"enabled": on_gpu})                   # on a CPU fp32 is the faster one
    if args.bf16 is not None:
        config["bf16"] = {"enabled": args.bf16}
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def find_auto(value, path=""):
    """Where in a configuration an "auto" stands, or None."""
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := find_auto(v, f"{path}.{k}" if path else k))), None)
    return path if value == "auto" else None


def cosine(step, total, warmup):
    """Factor on the learning rate: linear warm-up, then half a cosine to 0, as in transformers."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def start_deepspeed():
    """Import and start DeepSpeed on whatever is here. Returns the module, rank, number of processes, device."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")               # or it warns that it found none
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        os.environ.setdefault(name, str(value))                      # `python train.py` is one process
    import logging
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # "No CUDA runtime is found" on a CPU
    import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # none of its C++ ops is probed for, built or used
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        deepspeed.init_distributed(verbose=False)                    # takes over the group that there is
    if on_gpu:
        torch.cuda.set_device(device)
    return deepspeed, dist.get_rank(), dist.get_world_size(), device


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def run_steps(engine, rows, steps, args, trained, folder, device, dtype):
    """The loop: forward, backward, step. Once per optimizer step the metrics go to bar, log and DeepSpeed's monitor."""
    rank, world_size, global_batch = dist.get_rank(), dist.get_world_size(), engine.train_batch_size()
    accumulation, gathered, step = engine.gradient_accumulation_steps(), [], 0
    sampler = ResumableSampler(len(rows), steps, global_batch, engine.train_micro_batch_size_per_gpu(), rank, world_size, args.seed,
                               lengths=rows.lengths())
    loader = batches_ahead(rows, sampler, args.dataloader_num_workers)
    os.makedirs(folder, exist_ok=True)
    log = open(os.path.join(folder, "metrics.jsonl") if rank == 0 else os.devnull, "w")
    bar = tqdm(total=steps, desc="training", unit="step", disable=rank != 0, mininterval=0.5)
    began = time.perf_counter()
    for micro, batch in enumerate(loader, start=1):
        loss, metrics = engine(batch.to(device, dtype))
        engine.backward(loss)
        gathered.append(metrics)
        if micro % accumulation:
            engine.step()       # only counts
            continue
        if step == 0:
            check_gradients(trained, engine)
        learning_rate = engine.get_lr()[0]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
        engine.step()
        step += 1
        values = torch.stack([torch.stack([m[name] for m in gathered]).float().mean() for name in gathered[0]])
        dist.all_reduce(values)
        values, gathered = dict(zip(gathered[0], (values / world_size).tolist())), []
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"the loss is {values['loss']} at step {step}; lower --learning_rate")
        seconds, began = time.perf_counter() - began, time.perf_counter()
        values |= {"learning_rate": learning_rate, "grad_norm": float(engine.get_global_grad_norm() or norm),
                   "pairs_per_second": global_batch / seconds}
        bar.update()
        if step % args.logging_steps == 0 or step == steps:
            log.write(json.dumps({"step": step, **values}) + "\n")
            engine.monitor.write_events([(f"train/{name}", value, step) for name, value in values.items()])
            shown = {"loss": "loss", "rewards/margin": "margin", "rewards/accuracy": "accuracy"}
            bar.set_postfix_str(" ".join(f"{shown[k]} {v:.3f}" for k, v in values.items() if k in shown), refresh=False)
    bar.close()
    log.close()
    say(f"{steps} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def check_gradients(trained, engine):
    """After the first backward every trained tensor must have a gradient (ZeRO keeps them elsewhere than in .grad)."""
    if engine.zero_optimization_stage() == 0:
        without = [name for name, p in trained.items() if p.grad is None]
        if without:
            raise RuntimeError(f"trained tensors without a gradient: {', '.join(without)}")
