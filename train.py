"""Train LLaVA-1.5 against hallucination: from flags and files to a trained checkpoint, a run or a
sweep.

    deepspeed train.py --stage 2                # the tiny world: no files needed, minutes on a CPU
    deepspeed train.py --stage 1 --model_name_or_path llava-v1.5-7b \\
        --vision_tower clip-vit-large-patch14-336 --vg_path VG \\
        --desc_data_path desc_data.json --pope_data_path pope_data.json
    deepspeed train.py --stage 1 --block full,no_cross_attn --learning_rate 2e-7 5e-7    # a sweep
    deepspeed train.py --lora_r 128 --lora_alpha 256 --gradient_checkpointing …     # HA-DPO itself
    deepspeed train.py --tune post_decoder --loss sft --data_path llava.json --image_folder images …

    --tune     groups of tensors: clip, projector, llama, post_decoder, lm_head, lora; the rest is
               frozen
    --stage    names for three choices. 0: supervised, projector, llama, lm_head (the tiny world's
               base). 1: DPO of post_decoder. 2: DPO of post_decoder and lm_head
    --init     the checkpoint that a run starts from, e.g. out/stage1; else a block is made
    --loss     dpo, ipo or hinge (dpo.py) on HA-DPO's pairs; sft on LLaVA's conversations, or on the
               chosen answers of HA-DPO's pairs: the control that tells what preferences add

Without --model_name_or_path everything is tiny (tiny/). A run writes --output_dir: what was
trained, `metrics.jsonl`, and `training.svg`, the same to look at. An interrupted run goes on with
--resume.

HA-DPO (arXiv 2311.16839) with the loss written out, through DeepSpeed's engine and without the HF
Trainer. Deliberately different: no reference model is loaded (dpo.py), both answers of a pair
stand in one row (data.py), and a frozen trunk runs once for all epochs (training/features.py).
"""
import argparse
import copy
import dataclasses
import itertools
import math
import os
import shutil

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import numpy as np
import torch
import torch.distributed as dist

from checkpoints.identity import identity_of
from checkpoints.load import load_base, load_trained
from checkpoints.quantised import in_bits
from checkpoints.save import save_base, save_trained
from data import IGNORE, Example, PackedDataset, read_hadpo
from dpo import Loss, Objective
from model import TRUNK, Head, Llava, set_trained
from post_decoder import PostInteractionBlock
from support.common import InputError, run_program, say
from support.images import check_images
from support.outputs import write_text
from tiny.prepare import prepare_tiny_world
from training.batches import micro_batches
from training.blocks import new_block_config, refuse_other_block
from training.conversations import image_paths, read_llava
from training.engine import (
    Schedule,
    checkpoint_layers,
    configure,
    memory_advice,
    start_deepspeed,
    start_engine,
)
from training.features import keep_features, load_trunk
from training.flags import combinations, parse_flags
from training.guards import Guards, refuse_few_bits, warn_of_cut_rows
from training.log import StepLog, announce, gradient_norm, mean_of_all_ranks, say_what_next
from training.lora import add_lora
from training.monitors import of_run
from training.picture import draw_training
from training.preferences import read_preferences
from training.reference import reference_logps
from training.resume import (
    Interruptions,
    claimed_folder,
    is_finished,
    load_state,
    resume_command,
    save_state,
)
from training.voco import with_voco


@dataclasses.dataclass
class Run:
    """One run, and what always travels with it."""
    args: argparse.Namespace               # its flags
    config: dict                           # DeepSpeed's
    model: Llava                           # the base; its trunk may still be in its files
    rows: torch.utils.data.Dataset         # PackedDataset, or KeptFeatures of a frozen trunk
    device: torch.device
    dtype: torch.dtype
    head: Head = None                      # the policy; what it starts from:
    start_name: str = None
    own_lm_head: bool = None
    trained: dict = None                   # {public name: parameter}
    identity: dict = None                  # what it is made from (checkpoints/identity.py)

    @property
    def steps(self):
        """How many steps of the optimizer the run takes."""
        epoch = len(self.rows) / self.config["train_batch_size"]                    # in steps
        return self.args.max_steps or math.ceil(self.args.num_train_epochs * epoch)

    @property
    def folder(self):
        """What the run needs until it is finished."""
        return self.args.output_dir + ".run"


# ---- What is loaded ------------------------------------------------------------------------------


def train(args):
    """All runs of a command, from files to files: one load and one frozen pass serve them all."""
    deepspeed, device = start_deepspeed()
    config = configure(args, deepspeed, device)
    dtype = torch.bfloat16 if config["bf16"].get("enabled") else torch.float32

    # The data.
    if args.data_path:
        examples = read_llava(args.data_path, args.image_folder)
    elif args.preference_data:
        examples = read_preferences(args.preference_data, args.image_folder)
    else:
        examples = read_hadpo(args.desc_data_path, args.pope_data_path, args.vg_path,
                              args.keep_correct, args.seed)
        if args.loss == "sft":                                  # on the chosen answers alone
            examples = [Example(e.image, e.conversations[:1]) for e in examples]
    if not examples:
        raise InputError("the data hold no examples; --keep_correct takes also correct answers")

    # The base. Every process runs the tower in every step, so a batch without an image gets one.
    def load():
        base = load_base(args.model_name_or_path, args.vision_tower, dtype, device,
                         read_trunk=False)
        return in_bits(with_voco(base, args.voco) if args.voco else base, args.bits)

    model = load()
    refuse_few_bits(args.tune, model.config.bits, config["zero_optimization"]["stage"])
    dataset = PackedDataset(examples, model.row_format(), always_image=True)
    runs = [Run(one, of_run(config, one), model, dataset, device, dtype)
            for one in combinations(args)]

    # Of a command that goes on, the runs that are not finished yet.
    if args.resume:
        runs = [run for run in runs if not is_finished(run, initial_head)]
    if not runs:
        return
    warn_of_cut_rows(dataset)

    # A frozen trunk runs once; what it made of the rows is kept for all epochs and all runs.
    if args.cache_features and not TRUNK & set(args.tune):
        keep_features_of(runs)
    else:
        check_images(image_paths(examples))
    for n, run in enumerate(runs):
        if run.rows is dataset and n:
            run.model = load()                                # the run before has trained the first
        run.head, run.start_name, run.own_lm_head = initial_head(run)
        if run.rows is dataset:
            load_trunk(run.model.trunk)
        train_run(deepspeed, run)


def keep_features_of(runs):
    """One frozen pass per kind of block; every run gets the rows that its block reads."""
    kept = {}
    for run in runs:
        block_config = initial_head(run)[0].block_config
        kind = block_config and (block_config.image_source, block_config.attention == "self")
        if kind not in kept:
            kept[kind] = keep_features(run.args.cache_features, run.rows, run.model, block_config)
        run.rows = kept[kind]
    runs[0].model.trunk.to("meta")          # its work is done, and its memory is free
    torch.cuda.empty_cache()


def initial_head(run):
    """A copy of the head that a run starts from, its name, whether it has its own lm_head."""
    args, base = run.args, run.model
    torch.manual_seed(args.seed)
    if args.init == "identity":
        head, name = base.head, "the base's own block" if base.head.block_config else "the base"
    else:
        head, name = load_trained(args.init, base, run.dtype, run.device), args.init
    own_lm_head = head.lm_head is not base.head.lm_head
    head = copy.deepcopy(head)
    if head.block_config:
        refuse_other_block(args.block, head.block_config, f"--init {args.init}")
        return head, name, own_lm_head

    # None was brought along, so a block is made where it is trained.
    args.block = args.block or ("full" if "post_decoder" in args.tune else "head")
    if args.block != "head":
        with run.device:
            block = PostInteractionBlock(new_block_config(args, base.config))
        head.post_interaction_block = block.to(run.dtype)
        over = f" over {name}" if args.init != "identity" else ""
        name = ("an identity block" if block.is_identity() else "a random block") + over
    return head, name, own_lm_head


# ---- One run -------------------------------------------------------------------------------------


def train_run(deepspeed, run):
    """What is trained, the engine, the loop, the checkpoint."""
    args, config, trunk = run.args, run.config, run.model.trunk

    # What is trained; everything else is frozen.
    run.identity = identity_of(run.model, run.head, run.rows.examples)
    if "lora" in args.tune:
        add_lora(trunk.model, args.lora_r, args.lora_alpha, args.lora_dropout)
    run.trained = set_trained(trunk, run.head, args.tune)

    # The loss is a module around trunk and head; kept features stand in for the trunk.
    in_the_loop = isinstance(run.rows, PackedDataset)
    if in_the_loop and args.gradient_checkpointing:
        checkpoint_layers(trunk.model)
    loss = Loss(args.loss, *(getattr(args, f.name) for f in dataclasses.fields(Loss)[1:]))
    objective = Objective(trunk if in_the_loop else None, run.head, loss)

    with claimed_folder(run) as state:
        announce(run, run.start_name)

        # The engine, and a reference where the trunk itself is trained; then the loop.
        warmup = math.ceil(args.warmup_ratio * run.steps)
        schedule = Schedule(args.learning_rate, args.weight_decay, run.steps, warmup)
        engine = start_engine(deepspeed, objective, run.trained, config, schedule)
        reference = reference_logps(run, engine) if objective.needs_reference_logps else None
        start = load_state(engine, run.folder, state) if state else 0
        with Interruptions() as interruptions:
            loop(run, engine, reference, start, interruptions)
            save(deepspeed, run)
            engine.destroy()
    if interruptions.noted:
        raise SystemExit(130)           # between two runs of a sweep


def loop(run, engine, reference, start, interruptions):
    """The steps of a run, from `start` on. Ctrl-C ends it behind a step, with exit code 130."""
    args, accumulation = run.args, engine.gradient_accumulation_steps()
    batches, guards = micro_batches(run, engine, start), Guards(run)
    with StepLog(run, engine, start) as log:
        for step in range(start + 1, run.steps + 1):
            # Dropout follows from (seed, step, rank), so a run that goes on draws the same.
            seed = np.random.SeedSequence([args.seed, step, dist.get_rank()])
            torch.manual_seed(int(seed.generate_state(1)[0]))

            # The next micro batches. SFT's loss is a mean over the answer tokens of all of them.
            batch_group, answer_tokens, seen = itertools.islice(batches, accumulation), None, []
            if args.loss == "sft":
                batch_group = list(batch_group)
                answer_tokens = answer_tokens_per_micro_batch(batch_group)

            # Forward, loss and backward. The engine's step only counts before the last one.
            for ids, batch in batch_group:
                if seen:
                    engine.step()
                known = None if reference is None else reference[ids]
                loss, metrics = engine(batch, known, answer_tokens)
                engine.backward(loss)
                seen.append((ids, metrics))

            # The optimizer and the cosine take their step.
            learning_rate, norm = engine.get_lr()[0], gradient_norm(run.trained)
            engine.step()
            values = mean_of_all_ranks(seen)
            values["learning_rate"] = learning_rate
            values["grad_norm"] = float(engine.get_global_grad_norm() or norm)
            values["pairs_per_second"] = engine.train_batch_size() / log.seconds()

            # Whatever is wrong with this step ends the run; else it is logged, and perhaps saved.
            guards.check(step, values, seen)
            log.write(step, values)
            stopped = interruptions.heard_by_any(run.device)
            if stopped or args.save_steps and step % args.save_steps == 0:
                save_state(engine, run.folder, step)
            if stopped:
                break
    if start < run.steps and stopped:
        say(f"stopped after step {step} of {run.steps}; go on with: {resume_command()}")
        raise SystemExit(130)
    log.summary()


def answer_tokens_per_micro_batch(batch_group):
    """Answer tokens of the global batch, over its micro batches: the engine takes their mean."""
    answer_tokens = sum((batch.target != IGNORE).sum() for _, batch in batch_group)
    dist.all_reduce(answer_tokens)
    return answer_tokens / (len(batch_group) * dist.get_world_size())


# ---- What is saved -------------------------------------------------------------------------------


def save(deepspeed, run):
    """Gather what is to be saved, a tensor at a time, and let rank 0 write it."""
    args, model = run.args, run.model
    parameters = dict(model.trunk.named_parameters()) | dict(run.head.named_parameters())

    # A changed trunk is saved as a whole model. Else what is not the base's own: what is trained
    # now, and what --init brought along.
    whole = bool(TRUNK - {"lora"} & set(args.tune))
    ours = {name for name in run.head.state_dict()
            if run.own_lm_head or name.startswith("post_interaction_block.")} | set(run.trained)
    in_pieces, tensors = run.config["zero_optimization"]["stage"] == 3, {}
    for name in [name for name in parameters if whole or name in ours]:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=in_pieces):
            if dist.get_rank() == 0:
                tensors[name] = parameters[name].detach().cpu().clone()

    # Rank 0 writes the checkpoint, the log of its steps and their picture.
    if dist.get_rank() == 0:
        arguments = {name: list(value) if isinstance(value, tuple) else value
                     for name, value in vars(args).items() if value is not None}
        if whole:
            trained = dataclasses.replace(model, heads={"trained": run.head})
            save_base(args.output_dir, trained, tensors, arguments, run.identity)
        else:
            block_config = run.head.block_config
            info = {"stage": args.stage, "base": args.model_name_or_path,
                    "vision_tower": args.vision_tower, "fingerprint": model.fingerprint,
                    "block": dataclasses.asdict(block_config) if block_config else None,
                    "identity": run.identity, "steps": run.steps, "arguments": arguments}
            save_trained(args.output_dir, tensors, info, model.tokenizer)
        metrics = os.path.join(args.output_dir, "metrics.jsonl")
        shutil.copyfile(os.path.join(run.folder, "metrics.jsonl"), metrics)
        write_text(f"{args.output_dir}/training.svg", draw_training([metrics, *args.plot]))
    dist.barrier()


def main():
    args = parse_flags()
    deepspeed, device = start_deepspeed()
    config = configure(args, deepspeed, device)             # said before anything is made
    try:
        if args.model_name_or_path or not prepare_tiny_world(args, train, device):
            train(args)
    except torch.OutOfMemoryError as e:
        raise InputError(f"{str(e).splitlines()[0]} {memory_advice(args, config)}") from e
    say_what_next(args, [one.output_dir for one in combinations(args)])
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
