"""DeepSpeed: its configuration with the batch arithmetic, its start, and the optimizer.

    deepspeed, device = start_deepspeed()
    config = configure(args, deepspeed, device)             # the user's file, checked, completed
    engine = start_engine(deepspeed, objective, trained, config, Schedule(5e-7, steps=39))

The loop in train.py only calls the engine's forward, backward and step, so it is the same under
every ZeRO stage (arXiv 1910.02054). Deliberately different from transformers' Trainer: nothing in
the file may be "auto", the optimizer is torch's own AdamW, and no C++ code of DeepSpeed's is
compiled.
"""
import collections
import datetime
import functools
import logging
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from model import TRUNK
from support.common import InputError, device_and_dtype, versions
from training.ds_file import MONITORS, read_ds_file
from training.monitors import add_reports

# How long a process waits in a barrier. The default, ten minutes under NCCL, is too short where
# rank 0 works alone: it writes a model of 13.5 GB to a slow disk, packs millions of rows, draws the
# tiny world. A process that dies does not keep the others waiting: the launcher ends them.
LONGEST_WAIT = datetime.timedelta(hours=12)
LONGEST_START = datetime.timedelta(minutes=30)          # until all processes are there


def configure(args, deepspeed, device):
    """DeepSpeed's configuration for these flags. InputError, before a weight is read, for whatever
    is wrong with the user's file.
    """
    config, error, errors = None, "", [""] * dist.get_world_size()
    try:
        config = deepspeed_config(args, dist.get_world_size(), device.type == "cuda")
    except InputError as e:
        error = str(e)
    # A monitor may be missing on rank 0 alone. All processes end, or none would hear of it.
    dist.all_gather_object(errors, error)
    if any(errors):
        raise InputError(max(errors, key=len))
    if args.deepspeed:
        rehearse(deepspeed, device, config, args.deepspeed)
    return config


def rehearse(deepspeed, device, config, path):
    """Start an engine around a module of two numbers: DeepSpeed checks much only where it starts.
    """
    config = {name: value for name, value in config.items() if name not in MONITORS}
    module = torch.nn.Linear(1, 1, device=device)
    try:
        engine = start_engine(deepspeed, module, dict(module.named_parameters()), config,
                              Schedule(1e-6))
        engine.destroy()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:      # its checks raise whatever came to hand
        reason = str(e).strip().partition("\n")[0]
        raise InputError(f"{path}: DeepSpeed does not start with it: {reason or type(e).__name__}; "
                         "change or remove that setting") from e


def deepspeed_config(args, world_size, on_gpu):
    """The configuration file, checked and completed: the batch arithmetic, bf16, ZeRO-0 by
    default.
    """
    config = read_ds_file(args.deepspeed, args.offload) if args.deepspeed else {}
    add_reports(config, args)
    config |= batch_sizes(args, config, world_size)
    config.setdefault("gradient_clipping", 1.0)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = int(zero.get("stage", 0))
    config.setdefault("steps_per_print", 10 ** 9)                    # the loop narrates itself
    config.setdefault("bf16", {"enabled": on_gpu})                 # on a CPU fp32 is the faster one
    if args.bf16 is not None:
        config["bf16"] = {"enabled": args.bf16}
    config.setdefault("zero_allow_untested_optimizer", True)
    if args.offload:
        if not zero["stage"]:
            raise InputError("--offload needs ZeRO stage 1, 2 or 3; name a configuration with one, "
                             "e.g. --deepspeed ds_zero3.json")
        zero["offload_optimizer"] = (zero.get("offload_optimizer") or {}) | {"device": "cpu"}
    config.setdefault("zero_force_ds_cpu_optimizer", False)      # or it compiles an Adam of its own
    return config


def batch_sizes(args, config, world_size):
    """Global batch = micro batch × accumulation × processes, from what file and flags say of
    them.
    """
    for name, flag in (("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
                       ("gradient_accumulation_steps", "gradient_accumulation_steps")):
        in_file, typed = config.get(name), getattr(args, flag)
        if in_file and typed and in_file != typed:
            raise InputError(f"{args.deepspeed}: {name} is {in_file} and --{flag} {typed}; remove "
                             "one of them")
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
        cure = (f"--per_device_train_batch_size can be {near}" if fits else
                f"it is no multiple of {world_size}: change train_batch_size or the number of "
                "processes")
        raise InputError(f"global batch {total} ≠ {micro} per device × {accumulation or 'any'} "
                         f"accumulation × {world_size} processes; {cure}")
    return {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": total // (micro * world_size)}


def memory_advice(args, config):
    """What to try where the GPU is full: only what has an effect on this run."""
    zero, trains_trunk = config["zero_optimization"], bool(TRUNK & set(args.tune))
    advice = []
    if config["train_micro_batch_size_per_gpu"] > 1:
        advice.append("a lower --per_device_train_batch_size (accumulation makes up for it)")
    if trains_trunk and not args.gradient_checkpointing:
        advice.append("--gradient_checkpointing")
    loads_trunk = trains_trunk or not args.cache_features
    frozen = loads_trunk and not (TRUNK - {"lora"}) & set(args.tune)
    if frozen and zero["stage"] < 3 and (args.bits or 16) > 4:
        advice.append("--bits 4")
    if zero["stage"] and not args.offload:
        advice.append("--offload")
    if trains_trunk and zero["stage"] < 3:
        advice.append("--deepspeed ds_zero3.json on more GPUs")
    if zero["stage"] == 3:
        advice.append("more GPUs")
    return f"Try {', '.join(advice or ['a GPU of more memory'])}"


def cosine(step, total, warmup):
    """Factor on the learning rate: linear warm-up, then half a cosine to 0, as in transformers."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def start_deepspeed():
    """Import and start DeepSpeed on whatever is here → the module, the device."""
    device, _ = device_and_dtype()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")              # or it warns that it found none
    # `python train.py` is one process.
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        os.environ.setdefault(name, str(value))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)    # no CUDA is no news
    try:
        import deepspeed
    except Exception as e:      # whatever one that does not fit this torch or this CUDA may raise
        raise InputError(f"deepspeed cannot be imported ({str(e).splitlines()[0]}). Here are "
                         f"{versions()}: pip install -r requirements.txt installs what fits "
                         "together") from e
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # None of its C++ operations is probed for, built or used.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    if not dist.is_initialized():
        start_processes(device)
        deepspeed.init_distributed(verbose=False)               # takes over the group that there is
    return deepspeed, device


def start_processes(device):
    """Let the processes of this run find each other."""
    on_gpu = device.type == "cuda"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=LONGEST_START))
    except (dist.DistNetworkError, dist.DistStoreError) as e:
        if "EADDRINUSE" in str(e):
            raise InputError(f"port {port} on {address} is in use, perhaps by another training: "
                             "name a free one with deepspeed --master_port N (python: "
                             "MASTER_PORT=N)") from e
        reason = str(e).partition("\n")[0]
        raise InputError(f"the processes do not find each other at {address}, port {port} "
                         f"({reason}): check --master_addr and --master_port, and that all are "
                         "started") from e
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT, rank=rank,
                            world_size=world_size, store=dist.PrefixStore("default_pg", store),
                            device_id=device if on_gpu else None)


@dataclass
class Schedule:
    """AdamW's learning rate over a run: warm-up, then a cosine; constant without `steps`."""
    learning_rate: float
    weight_decay: float = 0.0
    steps: int = None
    warmup: int = 0

    def factor(self, step):
        return cosine(step, self.steps, self.warmup)


def is_decayed(name):
    """Whether weight decay counts for a tensor: not for biases and norms, as in transformers.

    CLIP spells one of its norms "pre_layrnorm".
    """
    module, _, kind = name.rpartition(".")
    return kind != "bias" and "norm" not in module.rpartition(".")[2]


def parameter_groups(trained, weight_decay):
    """AdamW's groups: {public name: parameter}, with and without decay."""
    if not weight_decay:
        return [{"params": list(trained.values())}]
    decayed = [parameter for name, parameter in trained.items() if is_decayed(name)]
    others = [parameter for name, parameter in trained.items() if not is_decayed(name)]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]       # ZeRO takes no empty group


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies (masters) of bf16 parameters, whose rounding would swallow small steps;
    gradients are clipped first.

    DeepSpeed's own for ZeRO-0 goes over the tensors one by one, which takes 0.16 s for LoRA's 448
    on an H100; this takes 0.01 s.
    """

    def __init__(self, groups, max_norm, **options):
        self.max_norm = max_norm
        self.rounded = [p for group in groups for p in group["params"]]
        self.masters = [p.detach().float() for p in self.rounded]
        masters = iter(self.masters)
        super().__init__([group | {"params": [next(masters) for _ in group["params"]]}
                          for group in groups], **options)

    @torch.no_grad()
    def step(self, closure=None):
        pairs = [(parameter, master)
                 for parameter, master in zip(self.rounded, self.masters, strict=True)
                 if parameter.grad is not None]
        for n in range(0, len(pairs), 4):       # few at a time, or all would stand there twice
            some = pairs[n:n + 4]
            for _, master in some:
                master.grad = torch.empty_like(master)
            self.copy([p.grad for p, _ in some], [m.grad for _, m in some])
            for parameter, _ in some:
                parameter.grad = None
        # The engine asks for this attribute.
        max_norm = self.max_norm or math.inf
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
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


def start_engine(deepspeed, objective, trained, config, schedule):
    """DeepSpeed's engine around `objective`, of which AdamW trains the parameters `trained`.

    Under ZeRO-0 in bf16 masters and clipping are ours. DeepSpeed must not hear of either, or it
    would wrap the optimizer in its own.
    """
    groups = parameter_groups(trained, schedule.weight_decay)
    options = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay, "fused": True}
    stage = config["zero_optimization"]["stage"]
    if config["bf16"].get("enabled") and stage == 0:
        optimizer = MasterAdamW(groups, config.get("gradient_clipping", 0), **options)
        config = {"communication_data_type": "bf16"} | config
        config |= {"bf16": {"enabled": False}, "gradient_clipping": 0.0}
    else:
        optimizer = torch.optim.AdamW(groups, **options)
    scheduler = None
    if schedule.steps:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    try:
        engine = deepspeed.initialize(model=objective, optimizer=optimizer, lr_scheduler=scheduler,
                                      config=config)[0]
    except OSError as e:                                                            # a monitor's
        raise InputError(f"{e.filename}: cannot be written ({e.strerror}); a monitor writes there, "
                         "which the DeepSpeed file or --report_to names: name another place") from e
    except Exception as e:
        if type(e).__module__.partition(".")[0] != "wandb":
            raise
        reason = str(e).strip().partition("\n")[0]
        raise InputError(f"wandb does not start ({reason}); wandb login, or WANDB_MODE=offline, or "
                         "leave it out of --report_to and the DeepSpeed file") from e
    if isinstance(optimizer, MasterAdamW):
        # DeepSpeed has given all ranks the first one's parameters.
        optimizer.copy(optimizer.rounded, optimizer.masters)
    # One process has nobody to share gradients with: without this line they are copied all the
    # same.
    engine.enable_backward_allreduce = dist.get_world_size() > 1 or stage > 0
    return engine


def checkpoint_layers(model):
    """Gradient checkpointing (arXiv 1604.06174): a decoder layer keeps its input, and is computed
    again in the backward.
    """
    for layer in model.layers:
        layer.forward = functools.partial(recomputed, layer.forward)


def recomputed(forward, x, *rest):
    """Reentrant: the first pass builds no graph, which takes half as long where the CPU cannot
    launch kernels fast enough. It asks for a gradient of its input, or its parameters would get
    none."""
    if not torch.is_grad_enabled():
        return forward(x, *rest)
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return checkpoint(forward, x, *rest, use_reentrant=True)
