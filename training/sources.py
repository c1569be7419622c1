"""Which files a run's data come from: what the flags name must be there, and belong together.

    look_at_the_data(args, tiny=False)      # InputError before anything is read

There are three kinds: HA-DPO's three paths, --preference_data, and LLaVA's conversations. --loss
sft takes conversations, or the chosen answers of HA-DPO's files.
"""
import os

from support.command_line import meant
from support.common import InputError

FILES = ("vision_tower", "vg_path", "desc_data_path", "pope_data_path", "preference_data",
         "data_path", "image_folder")
PAIRS = ("desc_data_path", "pope_data_path")
# What can be named in the tiny world: other pairs of the same images, or conversations.
OF_TINY = (*PAIRS, "data_path", "image_folder")


def look_at_the_data(args, tiny):
    """InputError where the data's files are missing, or do not belong together."""
    given = [name for name in FILES if getattr(args, name)]
    for name in given if tiny else ():
        if name not in OF_TINY:
            raise InputError(f"--{name} is given and --model_name_or_path is not: then everything "
                             f"is the tiny world's own; name the base, or leave --{name} out")
    if args.data_path and args.loss != "sft":
        raise InputError(f"--data_path {args.data_path}: conversations have no rejected answers, "
                         f"which --loss {args.loss} needs; name --loss sft, or preference data")
    if args.preference_data and args.loss == "sft":
        raise InputError("--preference_data: is the data of --loss dpo, ipo and hinge; for --loss "
                         "sft name HA-DPO's files or --data_path")
    pairs = [name for name in given if name in ("vg_path", *PAIRS)]
    kinds = [name for name in (*pairs[:1], "preference_data", "data_path") if name in given]
    if len(kinds) > 1:
        raise InputError(f"--{kinds[0]} and --{kinds[1]} are two kinds of data: name one of them")
    needed = ("vg_path", *PAIRS) if pairs or not kinds else kinds
    if tiny:
        needed = pairs or kinds                 # what is not named is mined from the base
    or_else = "; or --data_path alone, conversations" if args.loss == "sft" else ""
    for name in needed:
        paths = getattr(args, name)
        if not paths:
            wanted = ", ".join(f"--{n}" for n in needed)
            raise InputError(f"--{name} is missing: --loss {args.loss} needs {wanted}{or_else}; "
                             "docs/real_weights.md tells where they come from")
        for path in paths if isinstance(paths, list) else [paths]:
            if not os.path.exists(path):
                raise InputError(f"--{name} {path}: no such file or folder; {meant(path)}")
    if tiny and kinds and args.stage == 0:
        raise InputError(f"--{kinds[0]}: stage 0 of the tiny world learns its own conversations; "
                         "leave it out, or name another stage")
