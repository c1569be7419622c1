"""Make what a run without files trains on, and other preference pairs of the same base.

    python -m tiny.prepare tiny/base --output noisy --flipped 0.1  # a tenth of the answers is wrong
    python -m tiny.prepare tiny/base --output true --described true
    deepspeed train.py --stage 1 --desc_data_path noisy/desc_data.json \\
        --pope_data_path noisy/pope_data.json           # other pairs of the same base
    python -m tiny.prepare out/stage1 --output again    # a second round, of what was trained

`prepare_tiny_world` makes the tiny world's images, tower, base model and preference data, each
once, in one place (training/recipes.py: tiny_root). From then on it names them as paths, as a user
with real files would. The base is trained by stage 0 of train.py itself. The rejected answers are
mined from what that base says about images it has not seen, as HA-DPO's were.

The sizes below follow a recipe that was found by measuring (docs/results.md). The projector is
narrow, so the tower sees more than LLaMA gets to know, and the block has something to find.
"""
import copy
import json
import os
import re
import shlex
from dataclasses import asdict, fields

import torch
import torch.distributed as dist
from torch import nn

from checkpoints.layouts import typed
from checkpoints.load import Source, checkpoint_type, load_base, load_one, weights_of
from checkpoints.save import save_base
from clip_vit import CLIPVisionConfig
from data import Tokenizer
from llama import LlamaConfig
from model import Head, Llava, LlavaConfig, Trunk
from support.command_line import Parser
from support.common import (
    InputError,
    Number,
    device_and_dtype,
    read_json,
    run_program,
    write_json,
)
from support.folders import check_can_write
from tiny.pictures import NAMES, SIDE
from tiny.places import draw_world, made_with, shipped_base, ships_base_of, world_beside
from tiny.preferences import DESCRIBED, Pairs, answers_of, as_said, say_mined, write_pairs
from tiny.tower import PATCH, TowerTraining, pretrain_tower
from tiny.world import Sizes, any_questions
from training.flags import RUNNING, SIZES, parse_flags
from training.recipes import tiny_root

TINY_LLAVA = LlavaConfig(
    LlamaConfig(vocab_size=0,               # replaced by the tokenizer's
                hidden_size=96, intermediate_size=240, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512),
    CLIPVisionConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=4,
                     num_attention_heads=4, image_size=SIDE, patch_size=PATCH),
    select_layer=-1, projector_hidden_size=8, max_length=512)


def prepare_tiny_world(args, train, device):
    """Make what is missing, then set the paths in `args` → whether that was all that was asked for.

    `train`: train.py's function for one run. InputError if what is there has another --seed or
    other sizes. Stage 0 with flags of its own starts from the untrained model, as the base did;
    with --voco from the base, which has learnt to see.
    """
    check_sizes(args)
    root, first = tiny_root(args.output_dir), dist.get_rank() == 0
    world, untrained, base = (os.path.join(root, name) for name in ("world", "untrained", "base"))
    only_base = args.stage == 0 and args.output_dir == base
    own_stage_0 = args.stage == 0 and not only_base
    anew = own_stage_0 and not args.voco
    refuse_other_sizes(args, world, untrained, base)
    if not os.path.isdir(base) and not (anew or only_base) and ships_base_of(args):
        base = shipped_base()
    supervised = own_stage_0 or not os.path.isdir(base)
    if first:
        draw_world(world, args.seed, Sizes(**args.tiny_sizes), supervised)
    if first and (anew or not os.path.isdir(base)) and not os.path.isdir(untrained):
        print(f"no untrained model in {untrained}: pre-training a vision tower (once; two minutes "
              "on two cores)", flush=True)
        make_untrained_base(untrained, world, device, args)
    dist.barrier()

    # Stage 0's data; the base; what the base says, which is the others' data.
    if not anew and not os.path.isdir(base):
        train(stage_0(args, untrained, base))
    if own_stage_0:
        args.model_name_or_path = untrained if anew else base
        name_conversations(args, world)
        return False
    args.model_name_or_path = base
    args.vg_path = os.path.join(world, "VG")
    if first and not (args.data_path or args.pope_data_path and args.desc_data_path):
        mine_preferences(world, base, device)
    dist.barrier()
    if not args.data_path:
        for name in ("desc_data_path", "pope_data_path"):
            file = name.replace("_path", ".json")
            setattr(args, name, getattr(args, name) or os.path.join(world, "hadpo", file))
    return only_base


def name_conversations(flags, world):
    flags.data_path = os.path.join(world, "llava", "train.json")
    flags.image_folder = os.path.join(world, "llava", "images")


# ---- What is asked for, and what is there --------------------------------------------------------


def check_sizes(args):
    """InputError where --tiny_sizes or --tiny_tower has a name or a number that cannot be."""
    for flag, kind, values in (("--tiny_sizes", Sizes, args.tiny_sizes),
                               ("--tiny_tower", TowerTraining, args.tiny_tower)):
        types = {field.name: field.type for field in fields(kind)}
        if not values.keys() <= types.keys():
            raise InputError(f"{flag} {json.dumps(values)}: must be an object with some of "
                             f"{', '.join(types)}")
        for name, value in values.items():
            Number(f"{flag} {name}", types[name], above=0)(json.dumps(value))


def refuse_other_sizes(args, world, untrained, base):
    """InputError if the folders that are there were made with another seed or other sizes."""
    def refuse(when, text):
        if when:
            raise InputError(text)

    def other(name, value):
        root = f"out/{name}{value}" if isinstance(value, int) else "out/other"
        return (f"for such a world say first: train.py --stage 0 --{name} "
                f"{shlex.quote(json.dumps(value))} --output_dir {root}/base, and then name "
                f"--output_dir {root}/…")

    if os.path.isdir(world):
        (seed, there), sizes = made_with(world), Sizes(**args.tiny_sizes)
        refuse(seed != args.seed,
               f"{world}: was made with --seed {seed}, not {args.seed}; "
               + other("seed", args.seed))
        refuse(args.tiny_sizes and asdict(sizes) != there,
               f"{world}: was made with --tiny_sizes {json.dumps(there)}; "
               + other("tiny_sizes", args.tiny_sizes))
    for folder in filter(os.path.isdir, (untrained, base)):
        path = os.path.join(folder, "config.json")
        before = typed(read_json(path, dict), "arguments", dict, path) or {}
        if not before.get("tiny_projector"):        # where none was typed, there is nothing or None
            before["tiny_projector"] = TINY_LLAVA.projector_hidden_size
        for name in ("tiny_tower", "tiny_projector", "tiny_base_steps"):
            asked = getattr(args, name)
            refuse(asked and name in before and asked != before[name],
                   f"{folder}: was made with --{name} {json.dumps(before.get(name))}; "
                   + other(name, asked))


def stage_0(args, untrained, base):
    """The flags of the run that trains the base: of what was typed only the seed, the sizes, and
    what does not change a result.

    The precision is the same on every machine.
    """
    beside = os.path.join(os.path.dirname(base), "stage0")
    flags = parse_flags(["--stage", "0", "--no-bf16", "--output_dir", beside])
    flags.output_dir, flags.model_name_or_path = base, untrained
    for name in (*SIZES, *RUNNING):
        setattr(flags, name, getattr(args, name))
    name_conversations(flags, os.path.join(os.path.dirname(base), "world"))
    flags.max_steps = args.tiny_base_steps
    return flags


def make_untrained_base(folder, world, device, args):
    """Write a random tiny LLaVA around a pre-trained tower, in LLaVA's layout. Of the flags `args`
    it follows from the seed and the sizes.
    """
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(os.path.join(world, "tokenizer.model"))
    config = copy.deepcopy(TINY_LLAVA)
    config.text.vocab_size = len(tokenizer)
    if args.tiny_projector:
        config.projector_hidden_size = args.tiny_projector
    trunk, head = Trunk(config), Head(config)
    for module in (*trunk.model.modules(), head.lm_head):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)                # as LLaMA is initialised
    auc = pretrain_tower(trunk.vision_tower.to(device), args.seed,
                         TowerTraining(**args.tiny_tower))
    print(f"vision tower: mean AUC of the classes {auc:.3f}", flush=True)
    save_base(folder, Llava(trunk.cpu(), {"base": head}, tokenizer, None, ""),
              arguments={"tiny_tower": args.tiny_tower, "tiny_projector": args.tiny_projector})


def mine_preferences(world, base, device):
    """Ask the base every preference question and write HA-DPO's files from its answers.

    They are made once for a base; those of another base move aside.
    """
    model = load_base(base, dtype=torch.float32, device=device, read_trunk=False)
    if mined_from(world, model.fingerprint):
        return
    notes, hadpo = read_json(os.path.join(world, "preference.json")), os.path.join(world, "hadpo")
    counts = write_pairs(notes, answers_of(model, world, notes, hadpo), Pairs(), hadpo)
    made = {"fingerprint": model.fingerprint, "pairs": asdict(Pairs())}
    write_json(os.path.join(hadpo, "base.json"), made)
    say_mined(counts)


def mined_from(world, fingerprint):
    """Whether HA-DPO's files are there and were mined from this base. Else their place is free."""
    hadpo = os.path.join(world, "hadpo")
    if not os.path.isfile(os.path.join(hadpo, "base.json")):            # the last file of them
        return False
    path = os.path.join(hadpo, "base.json")
    made = read_json(path, dict)
    before, same_pairs = made.get("fingerprint"), made.get("pairs") == asdict(Pairs())
    if before == fingerprint and same_pairs:
        return True
    if not isinstance(before, str) or not re.fullmatch("[0-9a-f-]+", before):
        raise InputError(f"{path}: does not tell which base was asked; remove {hadpo}, and its "
                         "files are made again")
    aside, what = f"{hadpo}-{before}", "was mined from another base"
    if before == fingerprint:
        aside, what = f"{aside}-others", "holds other pairs than this version makes"
    if os.path.exists(aside):
        raise InputError(f"{hadpo}: {what}, and {aside}, where it would go, is there already; move "
                         "one of them")
    print(f"{hadpo}: {what}; it is {aside} now", flush=True)
    os.rename(hadpo, aside)
    if os.path.isdir(f"{hadpo}-{fingerprint}"):
        os.rename(f"{hadpo}-{fingerprint}", hadpo)
    return mined_from(world, fingerprint)       # what came back may be other pairs


# ---- Other pairs of the same base ----------------------------------------------------------------


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("base", metavar="BASE",
                        help="a tiny base, or a checkpoint trained on one: its answers are "
                             "corrected; its world lies beside it (tiny/base: in out/)")
    parser.add_argument("--output", required=True, metavar="FOLDER",
                        help="for desc_data.json and pope_data.json")
    parser.add_argument("--described", choices=DESCRIBED, default="repaired",
                        help="the chosen descriptions. " + "; ".join(
                            f"{name}: {text}" for name, text in DESCRIBED.items()))
    parser.add_argument("--every", type=Number("--every", int, above=0), default=1,
                        help="describe each n-th image only")
    parser.add_argument("--flipped", type=Number("--flipped", float, low=0, high=1), default=0.0,
                        help="share of questions whose chosen answer is made wrong")
    parser.add_argument("--images", type=Number("--images", int, low=0), default=0,
                        help="how many images have pairs; 0 is all")
    parser.add_argument("--held_out", type=Number("--held_out", int, low=0, below=len(NAMES)),
                        default=0, help="so many classes are in no pair")
    parser.add_argument("--questions", choices=("pope", "any"), default="pope",
                        help="which absent objects are asked about: those of POPE's three sets, or "
                             "any")
    parser.add_argument("--teacher", help="a checkpoint whose answers are the chosen ones, where "
                                          "they differ; default: the truth is chosen")
    args = parser.parse_args(argv)
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise InputError(f"--output {args.output}: is not empty; name another folder")
    check_can_write(args.output)
    world, _ = world_beside(args.base)
    pairs = Pairs(**{field.name: getattr(args, field.name) for field in fields(Pairs)})
    own = args.questions == "pope"
    plain = own and checkpoint_type(args.base) == "base"
    notes = read_json(os.path.join(world, "preference.json")) if own else any_questions(world)
    kept = os.path.join(world, "hadpo") if plain else args.output
    said = said_by(args.base, world, notes, kept)
    if args.teacher:
        folder = os.path.join(args.output, "teacher")
        notes = as_said(notes, said_by(args.teacher, world, notes, folder))
    say_mined(write_pairs(notes, said, pairs, args.output))


def said_by(checkpoint, world, notes, folder):
    """What a base or a trained checkpoint says to the questions of `notes`; kept in `folder`."""
    device, _ = device_and_dtype(False)
    model = load_one(Source([checkpoint]), device, torch.float32)
    trained = {} if checkpoint_type(checkpoint) == "base" else weights_of(checkpoint)
    return answers_of(model, world, notes, folder, trained)


if __name__ == "__main__":
    run_program(main)
