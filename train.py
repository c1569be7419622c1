"""Train LLaVA-1.5 against hallucination: from flags and files to a trained checkpoint, one run or a sweep.

    deepspeed train.py --stage 2                                    # the tiny world: no files needed, minutes on a CPU
    deepspeed train.py --stage 1 --model_name_or_path llava-v1.5-7b --vision_tower clip-vit-large-patch14-336 \\
        --vg_path VG --desc_data_path desc_data.json --pope_data_path pope_data.json
    deepspeed train.py --stage 1 --block full,no_cross_attn --learning_rate 2e-7 5e-7 1e-6      # a sweep: six runs
    deepspeed train.py --lora_r 128 --lora_alpha 256 --gradient_checkpointing …                 # HA-DPO itself
    deepspeed train.py --tune post_decoder --loss sft --data_path llava.json --image_folder images …

    --tune     groups of tensors: clip, projector, llama, post_decoder, lm_head, lora; what is not named is frozen
    --stage    names for three choices: 0 supervised projector,llama,lm_head (makes the tiny world's base);
               1 DPO of post_decoder; 2 DPO of post_decoder,lm_head, from stage 1's result if there is one beside the output
    --loss     sft on LLaVA conversations; dpo, ipo or hinge (dpo.py) on HA-DPO's pairs

Without --model_name_or_path everything is tiny: the world, its vision tower, its base model and the preference data mined
from that base's mistakes are made once, beside --output_dir, and found again. A run writes --output_dir (checkpoint.py)
with `metrics.jsonl`, one line per optimizer step, and `training.svg`, the same to look at (plots.py); a run that was
interrupted goes on with --resume (resume.py).

HA-DPO (arXiv 2311.16839) with the direct loss instead of the HF Trainer. Deliberately different: no reference model is
loaded (objective.py).
"""
import argparse
import copy
import itertools
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import torch
import torch.distributed as dist

from checkpoint import fill, fingerprint, is_trained, load_base, load_trained, save_base, save_trained
from data import ImageProcessor, PackedDataset, Tokenizer, check_images, spare_cores
from features import keep_features
from loop import cosine, deepspeed_config, reference_logps, run_steps, start_deepspeed, start_engine
from lora import add_lora
from model import Head, Trunk
from objective import GROUPS, STAGES, TRUNK, Objective, checkpoint_layers, set_trained
from plots import draw_training, read_run
from post_decoder import VARIANTS, PostInteractionBlock
from readers import InputError, image_paths, read_hadpo, read_llava, run_program
from resume import Interruptions, begin, discard, is_finished, load_state, say
from tiny import TINY, prepare_tiny_world

# Defaults with a real model: LLaVA's for supervised training (0), the training notes' for the head (1, 2), HA-DPO's for
# DPO of the trunk. The tiny world's are in tiny.py.
REAL = {0: dict(learning_rate=[2e-5], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=[5e-7], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.0)}
REAL |= {2: REAL[1], "trunk": REAL[1] | dict(learning_rate=[2e-6])}


# ---------------------------------------------------------------------------------------------------------------------
# One run


@dataclass
class Base:
    """A base, everything frozen, and its fingerprint. The trunk is still in its files, where `fill` finds it."""
    trunk: Trunk
    head: Head
    tokenizer: Tokenizer
    preprocess: ImageProcessor
    fingerprint: str


def load(args, dtype, device):
    trunk, head, tokenizer, preprocess = load_base(args.model_name_or_path, args.vision_tower, dtype, device, read_trunk=False)
    return Base(trunk, head, tokenizer, preprocess, fingerprint(trunk, head))


def initial_head(args, base):
    """The head that a run starts from, a copy → Head, what to call it, whether an lm_head of its own came with --init."""
    torch.manual_seed(args.seed)
    parameter = base.head.lm_head.weight
    if args.init != "identity":
        head = load_trained(args.init, base.trunk.config, base.head, base.fingerprint, parameter.dtype, parameter.device)
        return copy.deepcopy(head), args.init, head.lm_head is not base.head.lm_head
    head = copy.deepcopy(base.head)
    if head.block:
        return head, "the base's own block", False
    if args.block != "head":
        with parameter.device:
            block = PostInteractionBlock(base.trunk.config.block(**VARIANTS[args.block]))
        head.post_interaction_block = block.to(parameter.dtype)
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
    if args.loss == "sft":
        examples = read_llava(args.data_path, args.image_folder)
    else:
        examples = read_hadpo(args.desc_data_path, args.pope_data_path, args.vg_path, args.keep_correct, args.seed)
    if not examples:
        raise InputError("the data hold no examples; with --keep_correct also rows that the base answered right are used")
    runs = [run for run in combinations(args) if not (args.resume and is_finished(run))]
    if not runs:
        return
    base = load(args, dtype, device)
    vision = base.trunk.config.vision
    dataset = PackedDataset(examples, base.tokenizer, base.preprocess, vision.num_patches, base.trunk.config.max_length,
                            always_image=True)      # every process runs the tower in every step, and projector and tower learn
    if cut := dataset.cut_rows():
        say(f"{cut:,} of {len(dataset):,} rows are longer than the model's {dataset.max_length} tokens: their answers are cut at "
            "the end")
    rows = {run.output_dir: dataset for run in runs}
    if args.cache_features and not TRUNK & set(args.tune):
        kept = {}       # by what a block reads: its image source, and whether it attends to the row itself
        for variant, first in {run.block: run for run in runs}.items():
            block = initial_head(first, base)[0].block
            kind = block and (block.image_source, block.attention == "self")
            if kind not in kept:
                kept[kind] = keep_features(args.cache_features, dataset, base.trunk, block, base.fingerprint, 16, rank, world_size)
            rows |= {run.output_dir: kept[kind] for run in runs if run.block == variant}
        base.trunk.to("meta")       # if it was needed, its work is done and its memory is free
        torch.cuda.empty_cache()
    else:
        check_images(image_paths(examples))
    for n, run in enumerate(runs):
        if rows[run.output_dir] is dataset:
            base = load(args, dtype, device) if n else base         # the run before has trained it
            fill(base.trunk)
        train_one(deepspeed, run, config, base, rows[run.output_dir], device, dtype)


def train_one(deepspeed, args, config, base, rows, device, dtype):
    """One run: head, objective, optimizer, engine, steps, checkpoint."""
    head, start, brought = initial_head(args, base)
    if "lora" in args.tune:
        add_lora(base.trunk.model, args.lora_r, args.lora_alpha, args.lora_dropout)
    trained = set_trained(base.trunk, head, args.tune)
    trunk = base.trunk if isinstance(rows, PackedDataset) else None
    if trunk and args.gradient_checkpointing:
        checkpoint_layers(trunk.model)
    objective = Objective(trunk, head, args.loss, args.beta, args.sft_weight, args.label_smoothing)
    global_batch, zero_stage = config["train_batch_size"], config.get("zero_optimization", {}).get("stage", 0)
    steps = args.max_steps or math.ceil(args.num_train_epochs * len(rows) / global_batch)
    warmup = math.ceil(args.warmup_ratio * steps)
    facts = {"base": base.fingerprint, "examples": len(rows), "steps": steps, "global batch": global_batch,
             "ZeRO stage": zero_stage, "dtype": str(dtype).removeprefix("torch."),
             "gradient_clipping": config.get("gradient_clipping", 0)}
    state, lock = begin(args, facts)        # which is held until this function ends
    say(f"{args.loss if args.stage is None else f'stage {args.stage}'} from {start}: {len(trained)} tensors trained "
        f"({', '.join(args.tune)}, {sum(p.numel() for p in trained.values()):,} numbers); {len(rows):,} examples, {steps} steps of "
        f"{global_batch} = {config['train_micro_batch_size_per_gpu']} × {config['gradient_accumulation_steps']} × "
        f"{dist.get_world_size()}, learning rate {args.learning_rate:g}, {facts['dtype']}, ZeRO-{zero_stage}")
    engine = start_engine(deepspeed, objective, trained, config, args.learning_rate, args.weight_decay,
                          lambda step: cosine(step, steps, warmup))
    reference = reference_logps(engine, rows, steps, args, device, dtype) if objective.needs_table else None
    first = load_state(engine, args.output_dir + ".run", state) if state else 0
    with Interruptions() as interruptions:
        run_steps(engine, rows, first, steps, args, trained, reference, interruptions, device, dtype)
        # What is not the base's own: what is trained now, and what --init brought along.
        ours = {name for name in head.state_dict() if brought or name.startswith("post_interaction_block.")} | set(trained)
        save(deepspeed, args, base, head, ours, steps, zero_stage)
        engine.destroy()
    if interruptions.noted:
        raise SystemExit(130)           # between two runs of a sweep


def save(deepspeed, args, base, head, ours, steps, zero_stage):
    """Gather the tensors named in `ours`, one at a time, and let rank 0 write them; a changed trunk as a whole model."""
    parameters = dict(base.trunk.named_parameters()) | dict(head.named_parameters())
    whole, tensors = bool(TRUNK - {"lora"} & set(args.tune)), {}
    for name in parameters if whole else [n for n in parameters if n in ours]:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=zero_stage == 3):
            if dist.get_rank() == 0:
                tensors[name] = parameters[name].detach().cpu().clone()
    if dist.get_rank() == 0:
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if v is not None}
        if whole:
            save_base(args.output_dir, base.trunk, head, base.tokenizer, tensors, base.preprocess, arguments)
        else:
            info = {"stage": args.stage, "base": args.model_name_or_path, "vision_tower": args.vision_tower,
                    "fingerprint": base.fingerprint, "block": asdict(head.block) if head.block else None, "steps": steps,
                    "arguments": arguments}
            save_trained(args.output_dir, tensors, info, base.tokenizer)
        metrics = os.path.join(args.output_dir, "metrics.jsonl")
        shutil.copyfile(os.path.join(args.output_dir + ".run", "metrics.jsonl"), metrics)
        with open(os.path.join(args.output_dir, "training.svg"), "w", encoding="utf-8") as file:
            file.write(draw_training([metrics, *args.plot]))
        discard(args.output_dir + ".run")
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
    group.add_argument("--stage", type=int, choices=STAGES, help="0 supervised base, 1 block, 2 block and lm_head; default 2")
    group.add_argument("--tune", type=names_of(*GROUPS), help=f"instead of a stage: groups out of {','.join(GROUPS)}")
    group.add_argument("--block", type=names_of("head", *VARIANTS), help="the block's variant, or several (a,b,c), a run each; "
                       "head = no block; default: full where post_decoder is tuned")
    group.add_argument("--init", help="trained checkpoint to start from, or identity; default for stage 2: stage1 beside "
                       "--output_dir, if there is one")
    group.add_argument("--loss", choices=["sft", "dpo", "ipo", "hinge"], help="default: sft for stage 0, else dpo")
    group.add_argument("--beta", type=float, default=0.1, help="of dpo, ipo and hinge")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="conservative DPO: the share of wrong labels")
    group.add_argument("--sft_weight", type=float, help="weight of the chosen answer's mean NLL beside a preference loss")
    group.add_argument("--lora_r", type=int, help="rank; without --tune: HA-DPO, that is --tune lora; default 128")
    group.add_argument("--lora_alpha", type=float, default=256)
    group.add_argument("--lora_dropout", type=float, default=0.05)
    group = parser.add_argument_group("model and data (none of these: the tiny world)")
    group.add_argument("--model_name_or_path", help="base model, a folder in LLaVA's layout")
    group.add_argument("--vision_tower", help="CLIP's folder, if config.json's mm_vision_tower is no local path")
    group.add_argument("--vg_path", help="Visual Genome: image_data.json, VG_100K, VG_100K_2")
    group.add_argument("--desc_data_path", help="HA-DPO's desc_data.json")
    group.add_argument("--pope_data_path", help="HA-DPO's pope_data.json")
    group.add_argument("--keep_correct", action=argparse.BooleanOptionalAction,
                       help="use also POPE rows that the base answered right")
    group.add_argument("--data_path", help="LLaVA conversation JSON (--loss sft)")
    group.add_argument("--image_folder", default="", help="its images")
    group.add_argument("--cache_features", help="folder for a frozen trunk's outputs; later runs read neither weights nor images")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float, nargs="+", help="several: a run each")
    group.add_argument("--num_train_epochs", type=float)
    group.add_argument("--max_steps", type=int, help="optimizer steps, instead of epochs")
    group.add_argument("--per_device_train_batch_size", type=int, help="rows at once; default: what divides the global batch, at "
                       "most 16 from kept features, 4 with the trunk (the tiny world: 128)")
    group.add_argument("--gradient_accumulation_steps", type=int, help="default: follows from the global batch")
    group.add_argument("--warmup_ratio", type=float)
    group.add_argument("--weight_decay", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=42)
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", help="default: out/stageN")
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="else fp32; default: what the DeepSpeed file says, "
                       "or bf16 on a GPU and fp32 on a CPU")
    group.add_argument("--deepspeed", help="DeepSpeed configuration; default: ZeRO-0, global batch 128")
    group.add_argument("--offload", action="store_true", help="ZeRO 1 to 3: the optimizer's state and step on the CPU")
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="where the trunk is trained: less memory, a third slower")
    group.add_argument("--save_steps", type=int, help="optimizer steps between saved states, which --resume goes on from")
    group.add_argument("--resume", action="store_true", help="go on from the last saved state in OUTPUT_DIR.run")
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
    settle(args)
    recipe = 0 if args.loss == "sft" and TRUNK & set(args.tune) else "trunk" if TRUNK & set(args.tune) else args.stage or \
        (2 if "lm_head" in args.tune else 1)
    for name, value in (TINY if tiny else REAL)[recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
                 "save_steps", "logging_steps", "lora_r", "beta"):
        for value in args.learning_rate if name == "learning_rate" else [getattr(args, name)]:
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value:g}: must be above 0; leave it out for the default")
    beside = os.path.join(os.path.dirname(args.output_dir), "stage1")
    args.init = args.init or (beside if args.stage == 2 and os.path.isdir(beside) else "identity")
    if args.keep_correct is None:
        args.keep_correct = tiny
    sweep = len(args.block) * len(args.learning_rate) > 1
    if (tiny or sweep) and args.cache_features is None:
        args.cache_features = os.path.join(os.path.dirname(args.output_dir), "features")
    args.default_batch, args.default_micro = 128, 128 if tiny else 16 if args.cache_features and not TRUNK & set(args.tune) else 4
    needed = ("data_path",) if args.loss == "sft" else ("vg_path", "desc_data_path", "pope_data_path")
    for name in ("vision_tower", "vg_path", "desc_data_path", "pope_data_path", "data_path", "image_folder") if tiny else ():
        if getattr(args, name):
            raise InputError(f"--{name} is given and --model_name_or_path is not: then everything is the tiny world's own; name the "
                             f"base, or leave --{name} out")
    for name in () if tiny else needed:
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: with a real model (--model_name_or_path) --loss {args.loss} needs "
                             + ", ".join(f"--{n}" for n in needed))
        if not os.path.exists(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)}: no such file or folder")
    if not tiny and is_trained(args.model_name_or_path):
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: is no whole model, but what was trained of one; name "
                         "its base here (and it with --init), or make both into a model with checkpoint.py")
    for path in args.plot:
        read_run(path)                                               # what cannot be drawn is said now
    if args.init != "identity" and not is_trained(args.init):
        raise InputError(f"--init {args.init}: is no trained checkpoint of ours")
    if args.init != "identity" and len(args.block) > 1:
        raise InputError(f"--block names {len(args.block)} variants, but --init {args.init} brings its block along; "
                         "say --init identity")
    return args


def settle(args):
    """What --stage, --tune, --block, --loss and --lora_r mean together."""
    def refuse(when, text):
        if when:
            raise InputError(text)

    refuse(args.stage is not None and (args.tune or args.lora_r),
           f"--stage {args.stage} is a name for a choice of --tune and has no LoRA: leave it out, or --tune and --lora_r")
    if args.tune is None and args.lora_r:
        args.tune = ["lora", "post_decoder"] if args.block and args.block != ["head"] else ["lora"]
    elif args.tune is None:
        args.stage = 2 if args.stage is None else args.stage
    args.tune = tuple(g for g in GROUPS if g in (args.tune or STAGES[args.stage]))
    args.loss = args.loss or ("sft" if args.stage == 0 else "dpo")
    if "lora" in args.tune:
        refuse(len(TRUNK & set(args.tune)) > 1,
               f"--tune {','.join(args.tune)}: beside lora only post_decoder and lm_head can be trained")
        args.lora_r = args.lora_r or 128
    refuse(args.lora_r and "lora" not in args.tune, f"--lora_r {args.lora_r}: --tune does not name lora; add it")
    args.block = args.block or ["full" if "post_decoder" in args.tune else "head"]
    refuse(set(args.tune) == {"post_decoder"} and "head" in args.block,
           "--block head leaves nothing to train; add lm_head (--stage 2) or another group to --tune")
    refuse(args.block != ["head"] and "post_decoder" not in args.tune,
           f"--block {','.join(args.block)}: a block that is not trained stays the identity; add post_decoder to --tune")
    refuse(args.label_smoothing and (args.loss != "dpo" or not 0 <= args.label_smoothing < 0.5),
           f"--label_smoothing {args.label_smoothing:g}: belongs to --loss dpo, and lies between 0 and 0.5")
    args.output_dir = (args.output_dir or f"out/{'-'.join(args.tune) if args.stage is None else f'stage{args.stage}'}").rstrip("/")


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
        try:
            train(args)
        except torch.OutOfMemoryError as e:
            raise InputError(f"{str(e).splitlines()[0]} Lower --per_device_train_batch_size (accumulation makes up for it); where "
                             "the trunk is trained, --gradient_checkpointing, --offload or --deepspeed ds_zero3.json on more GPUs "
                             "help too")
        folders = [run.output_dir for run in combinations(args)]
    world = os.path.join(os.path.dirname(args.output_dir), "world")
    say(f"done; look at it with: python eval_pope.py {' '.join(folders)}"
        + ("" if os.path.isdir(world) else " --coco_path … --pope_path …"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
