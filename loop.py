"""The DeepSpeed side of training: configuration and batch arithmetic, the start, and the loop over optimizer steps.

    config = deepspeed_config(args, world_size, on_gpu)               # the user's file, checked and completed
    engine = start_engine(deepspeed, objective, trained, config, learning_rate)
    run_steps(engine, rows, start, steps, args, trained, reference, interruptions, device, dtype)

The loop only calls the engine's forward, backward and step, so that it is the same under every ZeRO stage.
"""
import collections
import contextlib
import itertools
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import IGNORE, ResumableSampler, batches_ahead
from lora import without_lora
from model import device_and_dtype, versions
from readers import InputError, read_json
from resume import read_latest, resume_command, save_state, say


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed


def deepspeed_config(args, world_size, on_gpu):
    """The configuration file, checked, with the batch arithmetic filled in."""
    config = {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0}
    if args.deepspeed:
        config = read_json(args.deepspeed, dict)
        refuse_settings(config, args.deepspeed, args.offload)
    for name, flag in (("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
                       ("gradient_accumulation_steps", "gradient_accumulation_steps")):
        in_file, typed = config.get(name), getattr(args, flag)
        if in_file and typed and in_file != typed:
            raise InputError(f"{args.deepspeed}: {name} is {in_file} and --{flag} {typed}; remove one of them")
    micro = args.per_device_train_batch_size or config.get("train_micro_batch_size_per_gpu")
    accumulation = args.gradient_accumulation_steps or config.get("gradient_accumulation_steps")
    total = config.get("train_batch_size")
    if total is None:
        total = micro * accumulation * world_size if micro and accumulation else args.default_batch
    fits = [m for m in range(1, total + 1) if total % (m * world_size) == 0]
    if micro is None and accumulation and total % (accumulation * world_size) == 0:
        micro = total // (accumulation * world_size)
    elif micro is None and fits:
        micro = max(m for m in fits if m <= args.default_micro or m == fits[0])
    if micro not in fits or accumulation and accumulation * micro * world_size != total:
        nearest = sorted(fits, key=lambda m: abs(m - (micro or 1)))[:3]
        near = ", ".join(f"{m} (accumulation {total // (m * world_size)})" for m in nearest)
        raise InputError(f"global batch {total} ≠ {micro} per device × {accumulation or 'any'} accumulation × {world_size} "
                         "processes; " + (f"--per_device_train_batch_size can be {near}" if fits else
                            f"it is no multiple of {world_size}: change train_batch_size or the number of processes"))
    config |= {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro,
               "gradient_accumulation_steps": total // (micro * world_size)}
    config.setdefault("steps_per_print", 10 ** 9)                    # the loop narrates itself
    config.setdefault("bf16", {"enabled": on_gpu})                   # on a CPU fp32 is the faster one
    if args.bf16 is not None:
        config["bf16"] = {"enabled": args.bf16}
    config.setdefault("zero_allow_untested_optimizer", True)
    if args.offload:
        if not config.get("zero_optimization", {}).get("stage"):
            raise InputError("--offload needs ZeRO stage 1, 2 or 3; name a configuration with one, e.g. --deepspeed ds_zero3.json")
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config.setdefault("zero_force_ds_cpu_optimizer", False)          # DeepSpeed's own Adam would have to be compiled
    return config


def refuse_settings(config, path, offload):
    """InputError for what stands in many a copied file and this loop would ignore, or do without being asked."""
    auto, zero = find_auto(config), config.get("zero_optimization", {})
    batch = [name for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
             if name in config and not (isinstance(config[name], int) and config[name] > 0)]
    bf16 = config.get("bf16", {})
    precision = [name for name in ("torch_autocast", "data_types") if name in config]
    precision += ["bf16"] if not isinstance(bf16, dict) or set(bf16) - {"enabled"} else []
    offloaded = [name for name in ("offload_optimizer", "offload_param")
                 if isinstance(zero, dict) and (zero.get(name) or {}).get("device", "none") != "none"]
    for wrong, what in (
            (auto, f"{auto} is \"auto\", which only the HF Trainer understands; write a value or remove it"),
            (batch, f"{', '.join(batch)} must be a whole number above 0; write one or remove it"),
            (not isinstance(zero, dict), 'zero_optimization must be an object; write for example {"stage": 3}'),
            ("optimizer" in config or "scheduler" in config, "optimizer and scheduler are not read from the file; remove them and "
             "say --learning_rate, --weight_decay, --warmup_ratio"),
            ((config.get("fp16") or {}).get("enabled"), "fp16, which needs its loss scaled, is not built here; say --bf16 instead"),
            (precision, f'{", ".join(precision)}: weights and gradients are bf16 or fp32 here, and masters fp32; write '
             '"bf16": {"enabled": true} or remove it'),
            (offloaded and not offload, f"{', '.join(offloaded)}: slow, and done only where asked for; remove it or say --offload")):
        if wrong:
            raise InputError(f"{path}: {what}")


def find_auto(value, path=""):
    """Where in a configuration an "auto" stands, or None."""
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return next((found for k, v in inner if (found := find_auto(v, f"{path}.{k}" if path else str(k)))), None)
    return path if value == "auto" else None


def cosine(step, total, warmup):
    """Factor on the learning rate: linear warm-up, then half a cosine to 0, as in transformers."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def start_deepspeed():
    """Import and start DeepSpeed on whatever is here. Returns the module, rank, number of processes, device."""
    device, _ = device_and_dtype()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")               # or it warns that it found none
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        os.environ.setdefault(name, str(value))                      # `python train.py` is one process
    import logging
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # "No CUDA runtime is found" on a CPU
    try:
        import deepspeed
    except Exception as e:      # whatever one that does not fit this torch or this CUDA may raise
        raise InputError(f"deepspeed cannot be imported ({str(e).splitlines()[0]}). Here are {versions()}: "
                         "pip install -r requirements.txt installs what fits together")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # none of its C++ ops is probed for, built or used
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        deepspeed.init_distributed(verbose=False)                    # takes over the group that there is
    return deepspeed, dist.get_rank(), dist.get_world_size(), device


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies (masters) of bf16 parameters, whose rounding would swallow small steps; gradients are clipped first.

    DeepSpeed's own for ZeRO-0 goes over the tensors one by one, which takes 0.16 s for LoRA's 448 on an H100; this takes 0.01 s.
    """

    def __init__(self, parameters, max_norm, **options):
        self.rounded, self.max_norm = list(parameters), max_norm
        self.masters = [p.detach().float() for p in self.rounded]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure=None):
        pairs = [(p, m) for p, m in zip(self.rounded, self.masters) if p.grad is not None]
        for parameter, master in pairs:
            master.grad = torch.empty_like(master)
        self.copy([p.grad for p, _ in pairs], [m.grad for _, m in pairs])
        for parameter, _ in pairs:
            parameter.grad = None
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm or math.inf)     # the engine asks for it
        super().step(closure)
        self.zero_grad()
        self.copy(self.masters, self.rounded)

    @torch.no_grad()
    def copy(self, source, to):
        torch._foreach_copy_(to, source)

    def state_dict(self):
        return super().state_dict() | {"masters": self.masters}

    def load_state_dict(self, state):
        super().load_state_dict({name: value for name, value in state.items() if name != "masters"})
        self.copy(state["masters"], self.masters)


def start_engine(deepspeed, objective, trained, config, learning_rate, weight_decay=0.0, factor=None):
    """DeepSpeed's engine around `objective`, whose parameters `trained` AdamW trains. `factor`: of the learning rate, by step.

    Under ZeRO-0 in bf16 masters and clipping are ours, so DeepSpeed is told of neither, or it would wrap the optimizer.
    """
    options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if config["bf16"].get("enabled") and stage == 0:
        optimizer = MasterAdamW(trained.values(), config.get("gradient_clipping", 0), **options)
        config = {"communication_data_type": "bf16"} | config | {"bf16": {"enabled": False}, "gradient_clipping": 0.0}
    else:
        optimizer = torch.optim.AdamW(trained.values(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor) if factor else None
    engine = deepspeed.initialize(model=objective, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    if isinstance(optimizer, MasterAdamW):
        optimizer.copy(optimizer.rounded, optimizer.masters)        # DeepSpeed has given all ranks the first one's parameters
    engine.enable_backward_allreduce = dist.get_world_size() > 1 or stage > 0       # else it copies for nobody
    return engine


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def batches_of(engine, rows, steps, args, device, dtype, start=0):
    """(ids, Batch on the device) of this rank's micro batches, from step `start` on."""
    micro, total, rank = engine.train_micro_batch_size_per_gpu(), engine.train_batch_size(), dist.get_rank()
    sampler = ResumableSampler(len(rows), steps, total, micro, rank, dist.get_world_size(), args.seed, start, rows.lengths())
    loader = batches_ahead(rows, sampler, args.dataloader_num_workers)
    return ((ids, batch.to(device, dtype)) for ids, batch in zip(sampler, loader))


@contextlib.contextmanager
def as_reference(engine):
    """Inside, the engine says what the model said before its first step: log-probabilities, without LoRA, dropout and gradients."""
    engine.eval()
    with torch.no_grad(), without_lora(engine.module):
        yield
    engine.train()


def reference_logps(engine, rows, steps, args, device, dtype):
    """What the model says before its first step, of every row that a step will ask for → (number of rows, 2), nats.

    The micro batches are those of the first epoch, so that there policy and reference agree to the last bit at step 0.
    """
    path = os.path.join(args.output_dir + ".run", "reference.pt")
    if os.path.isfile(path):
        return torch.load(path, map_location=device)
    table = torch.full((len(rows), 2), -math.inf, device=device)
    steps = min(steps, math.ceil(len(rows) / engine.train_batch_size()))
    count = steps * engine.gradient_accumulation_steps()
    with as_reference(engine):
        for ids, batch in tqdm(batches_of(engine, rows, steps, args, device, dtype), "reference", count, unit="batch", leave=False,
                               disable=dist.get_rank() != 0):
            table[ids] = engine(batch)
    dist.all_reduce(table, dist.ReduceOp.MAX)       # every rank has its own rows, -inf elsewhere
    if dist.get_rank() == 0:
        torch.save(table.cpu(), path + ".partial")
        os.replace(path + ".partial", path)
    return table


def run_steps(engine, rows, start, steps, args, trained, reference, interruptions, device, dtype):
    """The loop: forward, backward, step. Once per optimizer step the metrics go to bar, log and DeepSpeed's monitor.

    start: steps already taken; reference: `reference_logps` or None; a Ctrl-C among the interruptions ends it with exit code 130.
    """
    rank, world_size, accumulation = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    folder, recent = args.output_dir + ".run", collections.deque(maxlen=20)
    micro_batches, noted = batches_of(engine, rows, steps, args, device, dtype, start), False
    reached = watch_gradients(trained)
    path, began = os.path.join(folder, "metrics.jsonl") if rank == 0 else os.devnull, time.perf_counter()
    with (open(path, "a", buffering=1) as log,      # line by line
          tqdm(total=steps, initial=start, desc="training", unit="step", disable=rank != 0, mininterval=0.5) as bar):
        for step in range(start + 1, steps + 1):
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
            batches, answer_tokens, seen = itertools.islice(micro_batches, accumulation), None, []
            if engine.module.loss == "sft":             # the mean over all answer tokens of the global batch
                batches = list(batches)
                answer_tokens = sum((batch.target != IGNORE).sum() for _, batch in batches)
                dist.all_reduce(answer_tokens)
                answer_tokens = answer_tokens / (accumulation * world_size)         # the engine takes the mean of the micro batches
            for n, (ids, batch) in enumerate(batches, start=1):
                loss, metrics = engine(batch, answer_tokens, None if reference is None else reference[ids])
                engine.backward(loss)
                seen.append((ids, metrics))
                if n < accumulation:
                    engine.step()                       # only counts
            if step == start + 1:
                check_gradients(trained, reached)
            values = torch.stack([torch.stack([m[name] for _, m in seen]).float().mean() for name in seen[0][1]])
            dist.all_reduce(values)
            values = dict(zip(seen[0][1], (values / world_size).tolist()))
            if step == 1 and abs(values.get("rewards/margin", 0)) > args.beta:        # more than a nat
                raise RuntimeError(f"policy and reference differ before the first step (loss {values['loss']:g}, margin "
                                   f"{values['rewards/margin']:g}, which must be 0): one of them is not what the run starts from")
            check_loss(values["loss"], recent, step, seen, folder, rows.examples)
            learning_rate = engine.get_lr()[0]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            engine.step()
            seconds, began = time.perf_counter() - began, time.perf_counter()
            values |= {"learning_rate": learning_rate, "grad_norm": float(engine.get_global_grad_norm() or norm),
                       "pairs_per_second": engine.train_batch_size() / seconds}
            if not 0 <= values["grad_norm"] < math.inf:                               # ZeRO says -1 when it is no number
                stop("the gradient is no number", step, of_all_ranks(seen), folder, rows.examples)
            bar.update()
            if step % args.logging_steps == 0 or step == steps:
                log.write(json.dumps({"step": step, **values}) + "\n")
                engine.monitor.write_events([(f"train/{name}", value, step) for name, value in values.items()])
                shown = {"loss": "loss", "rewards/margin": "margin", "rewards/accuracy": "accuracy"}
                bar.set_postfix_str(" ".join(f"{shown[k]} {v:.3f}" for k, v in values.items() if k in shown), refresh=False)
            noted = torch.tensor(len(interruptions.noted), device=device)
            dist.all_reduce(noted)                      # who heard it tells the others
            if noted or args.save_steps and step % args.save_steps == 0:
                save_state(engine, folder, step)
            if noted:
                break
    if noted:
        say(f"stopped after step {step} of {steps}; go on with: {resume_command(world_size)}")
        raise SystemExit(130)
    if start < steps:
        say(f"{steps} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def watch_gradients(trained):
    """A set that will hold the names of the tensors that a backward has reached: ZeRO moves gradients out of `.grad` at once."""
    reached = set()
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    return reached


def check_gradients(trained, reached):
    """After the first step's backwards every trained tensor must have got a gradient."""
    without = [name for name in trained if name not in reached]
    if without:
        some = ", ".join(without[:5]) + (" …" if without[5:] else "")
        raise InputError(f"{len(without)} trained tensors get no gradient ({some}): the loss does not depend on them; leave their "
                         "group out of --tune")


def check_loss(loss, recent, step, seen, folder, examples):
    """Before a step is taken: InputError when its loss is no number, or over 20 times the mean of the last 20 (at least 1)."""
    limit = 20 * max(1, sum(recent) / len(recent)) if recent else math.inf
    recent.append(loss)
    if not math.isfinite(loss) or loss > limit:
        parts = of_all_ranks(seen)
        worst = [p for p in parts if not math.isfinite(p[1])] or [max(parts, key=lambda p: p[1])]
        stop(f"the loss is {loss:g}", step, worst, folder, examples)


def of_all_ranks(seen):
    """[(ids, metrics)] of this rank's micro batches → [(ids, loss)] of everybody's."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(ids, float(metrics["loss"])) for ids, metrics in seen])
    return [part for rank in parts for part in rank]


def stop(what, step, parts, folder, examples):
    """InputError that names the step, the rows of the micro batches `parts` with their images, and what to go back to."""
    ids, latest = [i for part in parts for i in part[0]], read_latest(folder)
    named = ", ".join(f"{i} ({os.path.basename(examples[i].image or 'text')})" for i in ids[:16]) + (" …" if len(ids) > 16 else "")
    state = f", and {os.path.join(folder, latest)} is the last good state" if latest else ""
    raise InputError(f"{what} at step {step}, from examples {named} of the data; the step was not kept{state}: "
                     "look at these examples, or lower --learning_rate")
