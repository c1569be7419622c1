"""train.py's flags: what they are called, what they mean together, and what is refused at once.

    args = parse_flags(["--stage", "2"])       # an argparse.Namespace, complete
    runs = combinations(args)                  # one Namespace for each variant and learning rate

Names are those that users of LLaVA and HA-DPO type. Whatever can be said before DeepSpeed starts
and before a weight is read is said here.
"""
import argparse
import itertools
import json
import os
import sys

from checkpoints.hub import pinned
from checkpoints.load import is_trained
from checkpoints.quantised import BITS, BITS_HELP
from checkpoints.save import check_output_folder
from model import GROUPS, STAGES, TRUNK
from support.command_line import Parser, first_process
from support.common import InputError, Number
from support.loading import spare_cores
from training.blocks import BLOCKS, resolve_block
from training.guards import refuse_few_bits
from training.monitors import REPORTS
from training.originals import train_arguments
from training.picture import read_run
from training.recipes import fill_in_defaults
from training.sources import look_at_the_data

HELP = """Train LLaVA-1.5 against hallucination: one run or a sweep.

    deepspeed train.py --stage 2  # the tiny world: no files needed, minutes on a CPU
    deepspeed train.py --block full,no_cross_attn --learning_rate 1e-3 2e-3  # a sweep
"""
# The tiny world's own folders, in recipes.py's tiny_root. Its base follows from SIZES; RUNNING does
# not change a result.
TINY_FOLDERS = ("world", "untrained", "base", "features")
SIZES = ("seed", "tiny_sizes", "tiny_tower", "tiny_projector", "tiny_base_steps")
RUNNING = ("resume", "save_steps", "dataloader_num_workers", "local_rank")


def parse_flags(argv=None):
    """The command line → Namespace with every default filled in. InputError where flags
    conflict.
    """
    argv = train_arguments(sys.argv[1:] if argv is None else argv)
    args = declare_flags().parse_args(argv)
    resolve_flags(args)
    look_at_the_disk(args)
    resolve_block(args)
    fill_in_defaults(args)
    if first_process():
        check_outputs(args)
    return args


def names_of(*allowed):
    """An argparse type: names, separated by commas, out of those allowed."""
    def names(text):
        if set(text.split(",")) <= set(allowed):
            return text.split(",")
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}; several are "
                                         "separated by commas")
    return names


def object_of(flag):
    """An argparse type: a JSON object."""
    def read(text):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"{flag} {text}: is no JSON ({e})") from e
        if not isinstance(values, dict):
            raise InputError(f"{flag} {text}: must be an object")
        return values
    return read


def declare_flags():
    parser, boolean = Parser(HELP), argparse.BooleanOptionalAction

    def whole(flag, **bounds):
        return Number(flag, int, **bounds)

    def number(flag, **bounds):
        return Number(flag, float, **bounds)

    group = parser.add_argument_group("what is trained")
    group.add_argument("--stage", type=int, choices=STAGES,
                       help="0: the supervised base; 1: the block; 2: block and lm_head; "
                            "default: 2")
    group.add_argument("--tune", type=names_of(*GROUPS), metavar="NAME,…",
                       help=f"instead of a stage: groups out of {', '.join(GROUPS)}")
    group.add_argument("--block", type=names_of("head", *BLOCKS), metavar="NAME,…",
                       help=f"the block's variant, or several, a run each: {', '.join(BLOCKS)}; "
                            "or head, which is no block; default: full where post_decoder is "
                            "trained")
    group.add_argument("--block_intermediate_size",
                       type=whole("--block_intermediate_size", above=0),
                       help="inner width of a new block's layers; default: LLaMA's")
    group.add_argument("--init", help="trained checkpoint to start from, or the word identity: the "
                                      "base and a block that changes nothing; default: "
                                      "identity")
    group.add_argument("--loss", choices=["sft", "dpo", "ipo", "hinge"],
                       help="default: sft for stage 0, else dpo")
    group.add_argument("--voco", type=whole("--voco", above=0), metavar="N",
                       help="stage 0: learn to compress an image into N tokens (VoCo-LLaMA)")
    group.add_argument("--beta", type=number("--beta", above=0), default=0.1,
                       help="of dpo, ipo and hinge")
    group.add_argument("--label_smoothing", type=number("--label_smoothing", low=0, below=0.5),
                       default=0.0, help="conservative DPO: the share of wrong labels")
    group.add_argument("--length_normalised", action="store_true",
                       help="log-probabilities of an answer are divided by its number of tokens; "
                            "--beta then wants to be about that much larger")
    group.add_argument("--sft_weight", type=number("--sft_weight", low=0),
                       help="weight of the chosen answer's mean NLL beside a preference loss; "
                            "default: 0, in the tiny world 10, with LoRA there 1")
    group.add_argument("--lora_r", type=whole("--lora_r", above=0),
                       help="LoRA's rank; without --tune this means --tune lora; default: 128")
    group.add_argument("--lora_alpha", type=number("--lora_alpha", above=0), default=256,
                       help="LoRA's update is scaled by alpha / rank")
    group.add_argument("--lora_dropout", type=number("--lora_dropout", low=0, below=1),
                       default=0.05, help="dropout in front of LoRA's update")

    group = parser.add_argument_group("model and data (none of these: the tiny world)")
    group.add_argument("--model_name_or_path", help="base model: a folder in LLaVA's layout, or "
                                                    "its name on the Hugging Face hub")
    group.add_argument("--vision_tower",
                       help="CLIP's folder, if config.json's mm_vision_tower is no local path")
    group.add_argument("--vg_path", help="Visual Genome: image_data.json, VG_100K, VG_100K_2")
    group.add_argument("--desc_data_path", help="HA-DPO's desc_data.json (the tiny world: other "
                                                "pairs than its own, python -m tiny.prepare)")
    group.add_argument("--pope_data_path", help="HA-DPO's pope_data.json")
    group.add_argument("--preference_data", nargs="+",
                       help="in place of HA-DPO's three: pairs in RLHF-V's, TRL's, "
                            "LLaMA-Factory's, ms-swift's or SENTINEL's form, in JSON or parquet")
    group.add_argument("--keep_correct", action=boolean,
                       help="use also POPE rows that the base answered right; default: only in the "
                            "tiny world")
    group.add_argument("--data_path", help="LLaVA's conversations, JSON (--loss sft; without it "
                                           "the chosen answers of HA-DPO's files are learnt)")
    group.add_argument("--image_folder", default="",
                       help="the images of --preference_data or --data_path")
    group.add_argument("--cache_features", help="folder for a frozen trunk's outputs; later runs "
                                                "read neither weights nor images; default: "
                                                "out/features in the tiny world, features beside "
                                                "--output_dir for a sweep, else none")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=number("--learning_rate", above=0), nargs="+",
                       help="several: a run each; default: 5e-7, LoRA 2e-6, stage 0 2e-5; in the "
                            "tiny world 2e-3, 1e-3, 3e-3")
    group.add_argument("--num_train_epochs", type=number("--num_train_epochs", above=0),
                       help="how often each row is seen; default: 1; in the tiny world 5, LoRA 1, "
                            "stage 0 2")
    group.add_argument("--max_steps", type=whole("--max_steps", above=0),
                       help="optimizer steps, instead of epochs")
    group.add_argument("--per_device_train_batch_size",
                       type=whole("--per_device_train_batch_size", above=0),
                       help="rows at once; default: what divides the global batch, at most 16 from "
                            "kept features, 4 with the trunk (the tiny world: 128)")
    group.add_argument("--gradient_accumulation_steps",
                       type=whole("--gradient_accumulation_steps", above=0),
                       help="default: follows from the global batch")
    group.add_argument("--warmup_ratio", type=number("--warmup_ratio", low=0, high=1),
                       help="share of the steps in which the learning rate rises; default: 0, for "
                            "stage 0 0.03")
    group.add_argument("--weight_decay", type=number("--weight_decay", low=0), default=0.0,
                       help="of all trained tensors but norms and biases")
    group.add_argument("--seed", type=whole("--seed", low=0, high=2 ** 63 - 1), default=42,
                       help="of the order of the rows, of new weights, of the tiny world")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir",
                       help="folder for what is trained; default: out/stageN, or out/ and the "
                            "names of --tune; the tiny world's own base: out/base")
    group.add_argument("--bf16", action=boolean, help="bf16, or fp32; default: what the DeepSpeed "
                                                      "file says, or bf16 on a GPU and fp32 on a "
                                                      "CPU")
    group.add_argument("--bits", type=int, choices=BITS, help=BITS_HELP)
    group.add_argument("--deepspeed", help="DeepSpeed configuration; default: ZeRO-0, batch 128")
    group.add_argument("--offload", action="store_true",
                       help="ZeRO 1 to 3: the optimizer's state and step on the CPU")
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="where the trunk is trained: less memory, a third slower")
    group.add_argument("--save_steps", type=whole("--save_steps", above=0),
                       help="optimizer steps between saved states, which --resume goes on from; "
                            "default: no states are saved")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last saved state in OUTPUT_DIR.run")
    group.add_argument("--logging_steps", type=whole("--logging_steps", above=0), default=1,
                       help="optimizer steps between lines of metrics.jsonl")
    group.add_argument("--report_to", nargs="+", choices=["none", *REPORTS],
                       help="also write the steps' numbers there; default: as the DeepSpeed file "
                            "says")
    group.add_argument("--run_name", metavar="NAME", help="of the run in --report_to's; default: "
                                                          "the output folder's name")
    group.add_argument("--plot", nargs="+", default=[], metavar="METRICS",
                       help="metrics.jsonl of other runs, drawn with this one's in "
                            "OUTPUT_DIR/training.svg")
    group.add_argument("--dataloader_num_workers", type=whole("--dataloader_num_workers", low=0),
                       default=spare_cores(),
                       help="processes that prepare batches, on this machine")
    group.add_argument("--tiny_projector", type=whole("--tiny_projector", above=0),
                       help="inner width of the tiny base's projector: the narrower it is, the "
                            "less LLaMA sees of what the tower sees; default: 8")
    # The launcher's; and for tests: sizes of the tiny world, training of its tower, steps of its
    # stage 0.
    group.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    for flag in ("--tiny_sizes", "--tiny_tower"):
        group.add_argument(flag, type=object_of(flag), default={}, help=argparse.SUPPRESS)
    group.add_argument("--tiny_base_steps", type=whole("--tiny_base_steps", above=0),
                       help=argparse.SUPPRESS)
    return parser


def resolve_flags(args):
    """What --stage, --tune, --loss and --lora_r mean together."""
    def refuse(when, text):
        if when:
            raise InputError(text)

    tiny_base = is_tiny_base(args)
    refuse(args.stage is not None and (args.tune or args.lora_r),
           f"--stage {args.stage} is a name for a choice of --tune and has no LoRA: leave it out, "
           "or --tune and --lora_r")
    if args.tune is None and args.lora_r:
        with_block = args.block and args.block != ["head"]
        args.tune = ["lora", "post_decoder"] if with_block else ["lora"]
    elif args.tune is None:
        args.stage = 2 if args.stage is None else args.stage
    args.tune = tuple(g for g in GROUPS if g in (args.tune or STAGES[args.stage]))
    args.loss = args.loss or ("sft" if args.stage == 0 else "dpo")
    if "lora" in args.tune:
        refuse(len(TRUNK & set(args.tune)) > 1,
               f"--tune {','.join(args.tune)}: beside lora only post_decoder and lm_head can be "
               "trained")
        args.lora_r = args.lora_r or 128
    refuse(args.lora_r and "lora" not in args.tune,
           f"--lora_r {args.lora_r}: --tune does not name lora; add it")
    refuse(args.label_smoothing and args.loss != "dpo",
           f"--label_smoothing {args.label_smoothing:g}: belongs to --loss dpo; leave it out")
    refuse(args.length_normalised and args.loss == "sft",
           "--length_normalised: belongs to a preference loss; leave it out")
    refuse(args.voco and (args.loss != "sft" or "llama" not in args.tune),
           f"--voco {args.voco}: a new token is learnt with LLaMA, from conversations; say --stage "
           "0 with it, or leave it out where the base has it already")
    refuse_few_bits(args.tune, args.bits)
    name = "-".join(args.tune) if args.stage is None else f"stage{args.stage}"
    name = "base" if tiny_base else name
    args.output_dir = (args.output_dir or f"out/{name}").rstrip("/")
    its_own = args.model_name_or_path is None and os.path.basename(args.output_dir) in TINY_FOLDERS
    refuse(its_own and not (tiny_base and os.path.basename(args.output_dir) == "base"),
           f"--output_dir {args.output_dir}: is a folder of the tiny world's own, which all runs "
           "beside it start from; name another")


def is_tiny_base(args):
    """Whether the tiny world's own base is asked for: --stage 0, and no flag that it does not
    follow from.
    """
    plain = vars(declare_flags().parse_args(["--stage", "0"]))
    typed = {name for name, value in vars(args).items() if value != plain[name]}
    return typed <= {"output_dir", "report_to", "run_name", *SIZES, *RUNNING}


def look_at_the_disk(args):
    """InputError for paths that are missing, superfluous or something else."""
    tiny = args.model_name_or_path is None
    args.init = args.init or "identity"
    look_at_the_data(args, tiny)
    for name in ("model_name_or_path", "vision_tower", "init"):     # the hub's, with the revision
        setattr(args, name, pinned(getattr(args, name)))
    if not tiny and is_trained(args.model_name_or_path):
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: is no whole model, but "
                         "what was trained of one; name its base here (and it with --init), or "
                         "make both into a model with python -m tools.merge")
    for path in args.plot:
        read_run(path)                              # a file that cannot be drawn is refused now
    if args.init != "identity" and not is_trained(args.init):
        raise InputError(f"--init {args.init}: is no trained checkpoint of ours")


def check_outputs(args):
    """InputError where a run of this command cannot write, or would replace what is not ours."""
    inputs = {"--model_name_or_path": args.model_name_or_path, "--init": args.init}
    for run in combinations(args):
        for flag, path in inputs.items():
            if path and os.path.realpath(path) == os.path.realpath(run.output_dir):
                raise InputError(f"--output_dir {run.output_dir}: is also {flag}, which would be "
                                 "replaced; name another folder")
        check_output_folder(run.output_dir, args.resume)


def combinations(args):
    """The runs of a command, one per variant and learning rate: what varies is in the folder's
    name.
    """
    runs = []
    variants, rates = dict.fromkeys(args.block), dict.fromkeys(args.learning_rate)
    for variant, rate in itertools.product(variants, rates):
        output_dir = args.output_dir
        if len(args.block) > 1:
            output_dir += f"-{variant}"
        if len(args.learning_rate) > 1:
            output_dir += f"-{rate:g}"
        changes = dict(block=variant, learning_rate=rate, output_dir=output_dir)
        if args.run_name:
            changes["run_name"] = args.run_name + output_dir.removeprefix(args.output_dir)
        runs.append(argparse.Namespace(**vars(args) | changes))
    return runs
