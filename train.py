"""Train LLaVA-1.5 against hallucination: a hand-written DeepSpeed loop around one forward that is one loss.

    deepspeed train.py --stage 2                                    # the tiny world: no files needed, minutes on a CPU
    deepspeed train.py --stage 1 --model_name_or_path llava-v1.5-7b --vision_tower clip-vit-large-patch14-336 \\
        --vg_path VG --desc_data_path desc_data.json --pope_data_path pope_data.json --deepspeed ds_zero3.json

    stage 0    supervised training of projector, LLaMA and lm_head on LLaVA conversations (makes the tiny world's base)
    stage 1    DPO of the post-interaction block
    stage 2    DPO of block and lm_head, from stage 1's result if there is one beside the output folder, else from identity

    deepspeed train.py --stage 1 --block full,no_cross_attn --learning_rate 2e-7 5e-7 1e-6      # a sweep: six runs

A sweep loads the base once, passes it once over the data, and leaves a checkpoint per run, e.g. out/stage1-full-5e-07.

Without --model_name_or_path everything is tiny: the world, its vision tower, its base model and the preference data mined
from that base's mistakes are made once, beside --output_dir, and found again. A run writes --output_dir (checkpoint.py)
with `metrics.jsonl`, one line per optimizer step, and `training.svg`, the same to look at (plots.py).

HA-DPO (arXiv 2311.16839) with the direct loss instead of the HF Trainer. Deliberately different: the trunk is frozen in
stages 1 and 2, so policy and reference share its one pass, and nothing else is loaded for the reference.
"""
import argparse
import copy
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import torch
import torch.distributed as dist
from torch import nn

from checkpoint import fingerprint, is_trained, load_base, load_trained, save_base, save_trained
from data import IGNORE, ImageProcessor, PackedDataset, Tokenizer, check_images, spare_cores
from dpo import CHOSEN, dpo_loss, mean_nll, sequence_logps, token_logps
from features import keep_features
from loop import cosine, deepspeed_config, run_steps, say, start_deepspeed
from model import Head, Trunk, answer_states
from plots import draw_training, read_run
from post_decoder import VARIANTS, PostInteractionBlock
from readers import InputError, image_paths, read_hadpo, read_llava, run_program
from tiny import TINY, prepare_tiny_world

STAGES = {0: ("projector", "llama", "lm_head"), 1: ("post_decoder",), 2: ("post_decoder", "lm_head")}
# Defaults by stage with a real model: the training notes' and LLaVA's. The tiny world's are in tiny.py.
REAL = {0: dict(learning_rate=[2e-5], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=[5e-7], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.0)}
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
# One run


@dataclass
class Base:
    """A loaded base, everything frozen, and its fingerprint."""
    trunk: Trunk
    head: Head
    tokenizer: Tokenizer
    preprocess: ImageProcessor
    fingerprint: str


def load(args, dtype, device):
    trunk, head, tokenizer, preprocess = load_base(args.model_name_or_path, args.vision_tower, dtype, device)
    return Base(trunk, head, tokenizer, preprocess, fingerprint(trunk, head))


def initial_head(args, base):
    """The head that a run starts from, a copy → Head, what to call it, whether an lm_head of its own came with --init."""
    torch.manual_seed(args.seed)
    parameter = base.head.lm_head.weight
    if args.stage and args.init != "identity":
        head = load_trained(args.init, base.trunk.config, base.head, base.fingerprint, parameter.dtype, parameter.device)
        return copy.deepcopy(head), args.init, head.lm_head is not base.head.lm_head
    head = copy.deepcopy(base.head)
    if args.stage and head.block:
        return head, "the base's own block", False
    if args.stage and args.block != "head":
        block = PostInteractionBlock(base.trunk.config.block(**VARIANTS[args.block]))
        head.post_interaction_block = block.to(parameter.device, parameter.dtype)
        return head, "an identity block", False
    return head, "the base", False


def combinations(args):
    """The runs of a command: one per block variant and learning rate. What varies is part of the output folder's name."""
    runs = []
    for block, rate in itertools.product(dict.fromkeys(args.block), dict.fromkeys(args.learning_rate)):
        output_dir = args.output_dir + f"-{block}" * (len(args.block) > 1) + f"-{rate:g}" * (len(args.learning_rate) > 1)
        runs.append(argparse.Namespace(**vars(args) | dict(block=block, learning_rate=rate, output_dir=output_dir)))
    return runs


def train(args):
    """All runs of a command, from files to files. One load of the base and one frozen pass serve them all."""
    deepspeed, rank, world_size, device = start_deepspeed()
    config = deepspeed_config(args, world_size, device.type == "cuda")
    dtype = torch.bfloat16 if config["bf16"].get("enabled") else torch.float32
    if args.stage == 0:
        examples = read_llava(args.data_path, args.image_folder)
    else:
        examples = read_hadpo(args.desc_data_path, args.pope_data_path, args.vg_path, args.keep_correct, args.seed)
    if not examples:
        raise InputError("the data hold no examples; with --keep_correct also rows that the base answered right are used")
    check_images(image_paths(examples))
    base, runs = load(args, dtype, device), combinations(args)
    vision = base.trunk.config.vision
    dataset = PackedDataset(examples, base.tokenizer, base.preprocess, vision.num_patches, base.trunk.config.max_length)
    rows = {run.output_dir: dataset for run in runs}
    if args.cache_features and args.stage:
        kept = {}       # by what a block reads: its image source, and whether it attends to the row itself
        for run in runs:
            block = initial_head(run, base)[0].block
            kind = block and (block.image_source, block.attention == "self")
            if kind not in kept:
                kept[kind] = keep_features(args.cache_features, dataset, base.trunk, block, base.fingerprint, 16, rank, world_size)
            rows[run.output_dir] = kept[kind]
        base.trunk.to("meta")       # its work is done, its memory is free
    for n, run in enumerate(runs):
        if n and rows[run.output_dir] is dataset:
            base = load(args, dtype, device)        # the run before has trained it
        train_one(deepspeed, run, config, base, rows[run.output_dir], device, dtype)


def train_one(deepspeed, args, config, base, rows, device, dtype):
    """One run: head, objective, optimizer, engine, steps, checkpoint."""
    head, start, brought = initial_head(args, base)
    trained = set_trained(base.trunk, head, STAGES[args.stage])
    trunk = base.trunk if isinstance(rows, PackedDataset) else None
    objective = Objective(trunk, head, "sft" if args.stage == 0 else "dpo", args.beta, args.sft_weight)
    global_batch, zero_stage = config["train_batch_size"], config.get("zero_optimization", {}).get("stage", 0)
    steps = args.max_steps or math.ceil(args.num_train_epochs * len(rows) / global_batch)
    warmup = math.ceil(args.warmup_ratio * steps)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, warmup))
    say(f"stage {args.stage} from {start}: {len(trained)} tensors trained ({', '.join(STAGES[args.stage])}, "
        f"{sum(p.numel() for p in trained.values()):,} numbers); {len(rows):,} examples, {steps} steps of {global_batch} = "
        f"{config['train_micro_batch_size_per_gpu']} × {config['gradient_accumulation_steps']} × {dist.get_world_size()}, "
        f"learning rate {args.learning_rate:g}, {str(dtype).removeprefix('torch.')}, ZeRO-{zero_stage}")
    engine, _, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, lr_scheduler=schedule, config=config)
    folder = args.output_dir + ".run"
    run_steps(engine, rows, steps, args, trained, folder, device, dtype)
    # What is not the base's own: what is trained now, and what --init brought along.
    ours = {name for name in head.state_dict() if name in trained or brought or name.startswith("post_interaction_block.")}
    save(deepspeed, args, base, head, ours, steps, folder, zero_stage)
    engine.destroy()


def save(deepspeed, args, base, head, ours, steps, folder, zero_stage):
    """Gather the tensors named in `ours` (stage 0: all), one at a time, and let rank 0 write them."""
    parameters = dict(base.trunk.named_parameters()) | dict(head.named_parameters())
    wanted = [n for n in parameters if args.stage == 0 or n in ours]
    tensors = {}
    for name in wanted:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=zero_stage == 3):
            if dist.get_rank() == 0:
                tensors[name] = parameters[name].detach().cpu().clone()
    if dist.get_rank() == 0:
        if args.stage == 0:
            save_base(args.output_dir, base.trunk, head, base.tokenizer, tensors)
        else:
            info = {"stage": args.stage, "base": args.model_name_or_path, "vision_tower": args.vision_tower,
                    "fingerprint": base.fingerprint, "block": asdict(head.block) if head.block else None, "steps": steps,
                    "arguments": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}}
            save_trained(args.output_dir, tensors, info, base.tokenizer)
        metrics = os.path.join(args.output_dir, "metrics.jsonl")
        os.replace(os.path.join(folder, "metrics.jsonl"), metrics)
        with open(os.path.join(args.output_dir, "training.svg"), "w", encoding="utf-8") as file:
            file.write(draw_training([metrics, *args.plot]))
        os.rmdir(folder)
    dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def names_of(*allowed):
    """An argparse type: names, separated by commas, out of those allowed."""
    def names(text):
        if set(text.split(",")) <= set(allowed):
            return text.split(",")
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}; several are separated by commas")
    return names


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("what is trained")
    group.add_argument("--stage", type=int, choices=STAGES, default=2, help="0 supervised base, 1 block, 2 block and lm_head")
    group.add_argument("--init", help="trained checkpoint to start from, or identity; default for stage 2: stage1 beside "
                       "--output_dir, if there is one")
    group.add_argument("--block", type=names_of("head", *VARIANTS), default="full",
                       help="the block's variant, or several (a,b,c), a run each; head = no block")
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
    group.add_argument("--learning_rate", type=float, nargs="+", help="several: a run each")
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
    group.add_argument("--plot", nargs="+", default=[], metavar="METRICS",
                       help="metrics.jsonl of other runs, drawn with this one's in OUTPUT_DIR/training.svg")
    group.add_argument("--dataloader_num_workers", type=int, default=spare_cores(), help="processes that prepare batches")
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
    if args.stage == 1 and "head" in args.block:
        raise InputError("--block head leaves stage 1 nothing to train; --stage 2 trains lm_head")
    beside = os.path.join(os.path.dirname(args.output_dir), "stage1")
    args.init = args.init or (beside if args.stage == 2 and os.path.isdir(beside) else "identity")
    args.default_batch, args.default_micro = 128, 128 if tiny else 4
    if args.keep_correct is None:
        args.keep_correct = tiny
    sweep = len(args.block) * len(args.learning_rate) > 1
    if (tiny or sweep) and args.cache_features is None:
        args.cache_features = os.path.join(os.path.dirname(args.output_dir), "features")
    needed = ("data_path",) if args.stage == 0 else ("vg_path", "desc_data_path", "pope_data_path")
    for name in () if tiny else needed:
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: with a real model (--model_name_or_path) stage {args.stage} needs "
                             + ", ".join(f"--{n}" for n in needed))
        if not os.path.exists(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)}: no such file or folder")
    for path in args.plot:
        read_run(path)                                               # what cannot be drawn is said now
    if args.init != "identity" and not is_trained(args.init):
        raise InputError(f"--init {args.init}: is no trained checkpoint of ours")
    if args.init != "identity" and len(args.block) > 1:
        raise InputError(f"--block names {len(args.block)} variants, but --init {args.init} brings its block along; say --init identity")
    return args


def main():
    args = parse()
    _, _, world_size, device = start_deepspeed()
    deepspeed_config(args, world_size, device.type == "cuda")        # what cannot work is said before anything is made
    tiny = args.model_name_or_path is None
    if tiny:
        prepare_tiny_world(args, train, device)
    if tiny and args.stage == 0:
        folders = [args.model_name_or_path]                          # the base that has just been made, or was there
    else:
        train(args)
        folders = [run.output_dir for run in combinations(args)]
    world = os.path.join(os.path.dirname(args.output_dir), "world")
    say(f"done; look at it with: python eval_pope.py {' '.join(folders)}"
        + ("" if os.path.isdir(world) else " --coco_path … --pope_path …"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
