"""Train LLaVA-1.5 against hallucination: a hand-written DeepSpeed loop around one forward that is one loss.

    deepspeed train.py --stage 2                                    # the tiny world: no files needed, minutes on a CPU
    deepspeed train.py --stage 1 --model_name_or_path llava-v1.5-7b --vision_tower clip-vit-large-patch14-336 \\
        --vg_path VG --desc_data_path desc_data.json --pope_data_path pope_data.json --deepspeed ds_zero3.json

    stage 0    supervised training of projector, LLaMA and lm_head on LLaVA conversations (makes the tiny world's base)
    stage 1    DPO of the post-interaction block
    stage 2    DPO of block and lm_head, from stage 1's result if there is one beside the output folder, else from identity

Without --model_name_or_path everything is tiny: the world, its vision tower, its base model and the preference data mined
from that base's mistakes are made once, beside --output_dir, and found again. A run writes --output_dir (checkpoint.py)
with `metrics.jsonl`, one line per optimizer step.

HA-DPO (arXiv 2311.16839) with the direct loss instead of the HF Trainer. Deliberately different: the trunk is frozen in
stages 1 and 2, so policy and reference share its one pass, and nothing else is loaded for the reference.
"""
import argparse
import collections
import copy
import json
import math
import os
import time
from dataclasses import asdict

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from checkpoint import fingerprint, is_trained, load_base, load_trained, save_base, save_trained
from data import IGNORE, InputError, PackedDataset, ResumableSampler, check_images, run_program
from dpo import CHOSEN, dpo_loss, mean_nll, sequence_logps, token_logps
from features import keep_features
from model import Head, answer_states
from post_decoder import VARIANTS
from readers import image_paths, read_hadpo, read_json, read_llava
from tiny import TINY, prepare_tiny_world

STAGES = {0: ("projector", "llama", "lm_head"), 1: ("post_decoder",), 2: ("post_decoder", "lm_head")}
# Defaults by stage with a real model: the training notes' and LLaVA's. The tiny world's are in tiny.py.
REAL = {0: dict(learning_rate=2e-5, num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=5e-7, num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.0)}
REAL[2] = REAL[1]
MONITORED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen",
             "logps/rejected", "logps/reference_chosen", "logps/reference_rejected", "nll")


class Objective(nn.Module):
    """What the engine wraps. `forward(batch)` → loss, {name: scalar}: the only place where loss and model meet."""

    def __init__(self, trunk, head, loss, beta, sft_weight):
        super().__init__()
        self.trunk, self.head, self.loss, self.beta, self.sft_weight = trunk, head, loss, beta, sft_weight
        self.block = head.block
        if loss == "dpo":
            self.reference = reference_of(head)

    def logps(self, head, states, batch):
        """Log-probability of every answer token, (B, A); 0 at padding. Logits exist only for answer tokens."""
        wanted = batch.target != IGNORE
        logps = token_logps(head(*states, wanted), batch.target[wanted])                            # (number of answer tokens,)
        return torch.zeros(wanted.shape, device=logps.device).masked_scatter(wanted, logps)

    def forward(self, batch):
        hidden, context = batch.hidden, batch.features
        if hidden is None:
            with torch.set_grad_enabled(any(p.requires_grad for p in self.trunk.parameters())):
                hidden, features = self.trunk(batch)
                context = self.trunk.image_context(self.block, features)
        states = answer_states(self.head, hidden, context, batch)
        logps = self.logps(self.head, states, batch)
        if self.loss == "sft":
            loss = -logps.sum() / (batch.target != IGNORE).sum()                                    # per token, as LLaVA's
            return loss, {"loss": loss.detach()}
        chosen, rejected = sequence_logps(logps, batch.target_branch).unbind(1)                     # (B,)
        with torch.no_grad():
            reference_chosen, reference_rejected = sequence_logps(self.logps(self.reference, states, batch), batch.target_branch).unbind(1)
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, self.beta)
        nll = mean_nll(logps, batch.target_branch == CHOSEN).mean()
        loss = losses.mean() + self.sft_weight * nll if self.sft_weight else losses.mean()
        values = (loss, chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards,
                  (chosen_rewards > rejected_rewards).float(), chosen, rejected, reference_chosen, reference_rejected, nll)
        return loss, {name: value.detach().mean() for name, value in zip(MONITORED, values)}


def reference_of(head):
    """A frozen copy of the head as it is now. What is not trained is shared, and an identity block is left out."""
    reference = copy.deepcopy(head).requires_grad_(False)
    if not head.lm_head.weight.requires_grad:
        reference.lm_head = head.lm_head
    if head.block and head.post_interaction_block.is_identity():
        reference.post_interaction_block = None
    return reference


def set_trained(trunk, head, groups):
    """Freeze everything but the named groups. Returns {public name: parameter} of what is trained."""
    modules = {"clip": [trunk.vision_tower], "projector": [trunk.model.mm_projector],
               "llama": [trunk.model.embed_tokens, trunk.model.layers, trunk.model.norm],
               "post_decoder": [head.post_interaction_block] if head.block else [], "lm_head": [head.lm_head]}
    for module in (trunk, head):
        module.requires_grad_(False)
    for group in groups:
        for module in modules[group]:
            module.requires_grad_(True)
    return {name: p for module in (trunk, head) for name, p in module.named_parameters() if p.requires_grad}


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
# One run


def train(args):
    """One training run from files to files."""
    deepspeed, rank, world_size, device = start_deepspeed()
    config = deepspeed_config(args, world_size, device.type == "cuda")
    dtype = torch.bfloat16 if config["bf16"].get("enabled") else torch.float32
    zero_stage = config.get("zero_optimization", {}).get("stage", 0)
    if args.stage == 0:
        examples = read_llava(args.data_path, args.image_folder)
    else:
        examples = read_hadpo(args.desc_data_path, args.pope_data_path, args.vg_path, args.keep_correct, args.seed)
    if not examples:
        raise InputError("the data hold no examples; with --keep_correct also rows that the base answered right are used")
    check_images(image_paths(examples))

    trunk, base_head, tokenizer, preprocess = load_base(args.model_name_or_path, args.vision_tower, dtype, device)
    base = fingerprint(trunk, base_head)
    torch.manual_seed(args.seed)
    head, start = base_head, "the base"
    if args.stage and args.init != "identity":
        head, start = load_trained(args.init, trunk.config, base_head, base, dtype, device), args.init
    elif args.stage and base_head.block:
        start = "the base's own block"
    elif args.stage and args.block != "head":
        head, start = Head(trunk.config, trunk.config.block(**VARIANTS[args.block])).to(device, dtype), "an identity block"
        head.lm_head = base_head.lm_head
    trained = set_trained(trunk, head, STAGES[args.stage])
    dataset = PackedDataset(examples, tokenizer, preprocess, trunk.config.vision.num_patches, trunk.config.max_length)
    rows = dataset
    if args.cache_features and args.stage:
        rows = keep_features(args.cache_features, dataset, trunk, head.block, base, 64, rank, world_size)
        trunk.to("meta")        # its work is done, its memory is free

    objective = Objective(trunk if rows is dataset else None, head, "sft" if args.stage == 0 else "dpo", args.beta, args.sft_weight)
    global_batch = config["train_batch_size"]
    steps = args.max_steps or math.ceil(args.num_train_epochs * len(examples) / global_batch)
    warmup = math.ceil(args.warmup_ratio * steps)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, warmup))
    say(f"stage {args.stage} from {start}: {len(trained)} tensors trained ({', '.join(STAGES[args.stage])}, "
        f"{sum(p.numel() for p in trained.values()):,} numbers); {len(examples):,} examples, {steps} steps of {global_batch} = "
        f"{config['train_micro_batch_size_per_gpu']} × {config['gradient_accumulation_steps']} × {world_size}, "
        f"learning rate {args.learning_rate:g}, {str(dtype).removeprefix('torch.')}, ZeRO-{zero_stage}")
    engine, _, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, lr_scheduler=schedule, config=config)
    sampler = ResumableSampler(len(rows), steps, global_batch, config["train_micro_batch_size_per_gpu"], rank, world_size, args.seed)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, sampler=sampler, num_workers=args.dataloader_num_workers,
                                         collate_fn=as_is)
    os.makedirs(args.output_dir + ".run", exist_ok=True)
    metrics_path = os.path.join(args.output_dir + ".run", "metrics.jsonl")
    with open(metrics_path if rank == 0 else os.devnull, "w") as log:
        run_steps(engine, loader, steps, device, dtype, trained, log, args.logging_steps, global_batch)
    # What is not the base's own: what is trained now, and what --init brought along.
    brought = head.lm_head is not base_head.lm_head
    ours = {name for name in head.state_dict() if name in trained or brought or name.startswith("post_interaction_block.")}
    save(deepspeed, args, trunk, head, ours, tokenizer, base, steps, metrics_path, zero_stage)
    engine.destroy()


def as_is(batch):
    return batch


def run_steps(engine, loader, steps, device, dtype, trained, log, logging_steps, global_batch):
    """The loop: forward, backward, step. Once per optimizer step the metrics go to bar, `log` and DeepSpeed's monitor."""
    accumulation, rank, step, gathered = engine.gradient_accumulation_steps(), dist.get_rank(), 0, []
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
        values, gathered = dict(zip(gathered[0], (values / dist.get_world_size()).tolist())), []
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"the loss is {values['loss']} at step {step}; lower --learning_rate")
        seconds, began = time.perf_counter() - began, time.perf_counter()
        values |= {"learning_rate": learning_rate, "grad_norm": float(engine.get_global_grad_norm() or norm),
                   "pairs_per_second": global_batch / seconds}
        bar.update()
        if step % logging_steps == 0 or step == steps:
            log.write(json.dumps({"step": step, **values}) + "\n")
            engine.monitor.write_events([(f"train/{name}", value, step) for name, value in values.items()])
            shown = {"loss": "loss", "rewards/margin": "margin", "rewards/accuracy": "accuracy"}
            bar.set_postfix_str(" ".join(f"{shown[k]} {v:.3f}" for k, v in values.items() if k in shown), refresh=False)
    bar.close()
    say(f"{steps} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def check_gradients(trained, engine):
    """After the first backward every trained tensor must have a gradient (ZeRO keeps them elsewhere than in .grad)."""
    if engine.zero_optimization_stage() == 0:
        without = [name for name, p in trained.items() if p.grad is None]
        if without:
            raise RuntimeError(f"trained tensors without a gradient: {', '.join(without)}")


def save(deepspeed, args, trunk, head, ours, tokenizer, base, steps, metrics_path, zero_stage):
    """Gather the tensors named in `ours` (stage 0: all), one at a time, and let rank 0 write them."""
    parameters = dict(trunk.named_parameters()) | dict(head.named_parameters())
    wanted = [n for n in parameters if args.stage == 0 or n in ours]
    tensors = {}
    for name in wanted:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=zero_stage == 3):
            if dist.get_rank() == 0:
                tensors[name] = parameters[name].detach().cpu().clone()
    if dist.get_rank() == 0:
        if args.stage == 0:
            save_base(args.output_dir, trunk, head, tokenizer, tensors)
        else:
            info = {"stage": args.stage, "base": args.model_name_or_path, "vision_tower": args.vision_tower, "fingerprint": base,
                    "block": asdict(head.block) if head.block else None, "steps": steps,
                    "arguments": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}}
            save_trained(args.output_dir, tensors, info, tokenizer)
        os.replace(metrics_path, os.path.join(args.output_dir, "metrics.jsonl"))
        os.rmdir(os.path.dirname(metrics_path))
    dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("what is trained")
    group.add_argument("--stage", type=int, choices=STAGES, default=2, help="0 supervised base, 1 block, 2 block and lm_head")
    group.add_argument("--init", help="trained checkpoint to start from, or identity; default for stage 2: stage1 beside "
                       "--output_dir, if there is one")
    group.add_argument("--block", choices=["head", *VARIANTS], default="full", help="the block's variant; head = no block")
    group.add_argument("--beta", type=float, default=0.1, help="DPO's beta")
    group.add_argument("--sft_weight", type=float, help="weight of the chosen answer's mean NLL beside the DPO loss")
    group = parser.add_argument_group("model and data (none of these: the tiny world)")
    group.add_argument("--model_name_or_path", help="base model, a folder in LLaVA's layout")
    group.add_argument("--vision_tower", help="CLIP's folder, if config.json's mm_vision_tower is no local path")
    group.add_argument("--vg_path", help="Visual Genome: image_data.json, VG_100K, VG_100K_2")
    group.add_argument("--desc_data_path", help="HA-DPO's desc_data.json")
    group.add_argument("--pope_data_path", help="HA-DPO's pope_data.json")
    group.add_argument("--keep_correct", action=argparse.BooleanOptionalAction, help="use also POPE rows that the base answered right")
    group.add_argument("--data_path", help="LLaVA conversation JSON (stage 0)")
    group.add_argument("--image_folder", default="", help="its images")
    group.add_argument("--cache_features", help="folder in which the frozen trunk's outputs are kept and found again")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float)
    group.add_argument("--num_train_epochs", type=float)
    group.add_argument("--max_steps", type=int, help="optimizer steps, instead of epochs")
    group.add_argument("--per_device_train_batch_size", type=int)
    group.add_argument("--gradient_accumulation_steps", type=int, help="default: follows from the global batch")
    group.add_argument("--warmup_ratio", type=float)
    group.add_argument("--weight_decay", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=42)
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", help="default: out/stageN")
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="else fp32; default: what the DeepSpeed file says, "
                       "or bf16 on a GPU and fp32 on a CPU")
    group.add_argument("--deepspeed", help="DeepSpeed configuration; default: ZeRO-0, global batch 128")
    group.add_argument("--logging_steps", type=int, default=1)
    group.add_argument("--dataloader_num_workers", type=int, default=0)
    group.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)      # set by the launcher
    for name in ("tiny_sizes", "tiny_tower"):
        group.add_argument(f"--{name}", type=json.loads, default={}, help="JSON, for tests: sizes of the tiny world")
    group.add_argument("--tiny_base_steps", type=int, help="for tests: steps of stage 0 in the tiny world")
    args = parser.parse_args(argv)
    tiny = args.model_name_or_path is None
    for name, value in (TINY if tiny else REAL)[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output_dir = (args.output_dir or f"out/stage{args.stage}").rstrip("/")
    if args.stage == 1 and args.block == "head":
        raise InputError("--block head leaves stage 1 nothing to train; --stage 2 trains lm_head")
    beside = os.path.join(os.path.dirname(args.output_dir), "stage1")
    args.init = args.init or (beside if args.stage == 2 and os.path.isdir(beside) else "identity")
    args.default_batch, args.default_micro = 128, 128 if tiny else 4
    if args.keep_correct is None:
        args.keep_correct = tiny
    if tiny and args.cache_features is None:
        args.cache_features = os.path.join(os.path.dirname(args.output_dir), "features")
    needed = ("data_path",) if args.stage == 0 else ("vg_path", "desc_data_path", "pope_data_path")
    for name in () if tiny else needed:
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: with a real model (--model_name_or_path) stage {args.stage} needs "
                             + ", ".join(f"--{n}" for n in needed))
        if not os.path.exists(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)}: no such file or folder")
    if args.init != "identity" and not is_trained(args.init):
        raise InputError(f"--init {args.init}: is no trained checkpoint of ours")
    return args


def main():
    args = parse()
    _, _, world_size, device = start_deepspeed()
    deepspeed_config(args, world_size, device.type == "cuda")        # what cannot work is said before anything is made
    tiny = args.model_name_or_path is None
    if tiny:
        prepare_tiny_world(args, train, device)
    if tiny and args.stage == 0:
        args.output_dir = args.model_name_or_path                    # the base that has just been made, or was there
    else:
        train(args)
    world = os.path.join(os.path.dirname(args.output_dir), "world")
    say(f"done; look at it with: python eval_pope.py {args.output_dir}"
        + ("" if os.path.isdir(world) else " --coco_path … --pope_path …"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
