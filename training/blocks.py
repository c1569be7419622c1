"""Which block a run trains: what --block, --init and the base say together.

    resolve_block(args)             # flags: args.block becomes what will be trained, or InputError

A checkpoint or a base that has a block brings it along. Then another --block is a conflict, and the
same one is none. Where nothing is brought along, the block is made where it is trained.
"""
import dataclasses

from checkpoints.load import checkpoint_type, read_config
from post_decoder import ORIGINAL, VARIANTS, BlockConfig
from support.common import InputError

# What --block can name: the identity-initialised variants, and the notes' own form.
BLOCKS = VARIANTS | {"original": ORIGINAL}


def variant_of(block_config):
    """What --block calls a block; None where it has no name for it."""
    for name, changes in BLOCKS.items():
        named = dataclasses.replace(BlockConfig(), **changes)
        if all(getattr(named, part) == getattr(block_config, part)
               for part in ("attention", "align", "image_source", "outer_residual")):
            return name


def new_block_config(args, config):
    """The BlockConfig that --block and --block_intermediate_size name, for a LlavaConfig."""
    changes = BLOCKS[args.block]
    if args.block_intermediate_size:
        changes = changes | {"intermediate_size": args.block_intermediate_size}
    return config.block_config(**changes)


def refuse_other_block(typed, block_config, owner):
    """InputError if --block names another block than the one that is brought along."""
    variant = variant_of(block_config)
    if typed not in (None, variant):
        raise InputError(f"--block {typed}: {owner} brings a block of its own "
                         f"({variant or 'none of the names of --block'}); leave --block out to "
                         "keep that one, or start from what has none (--init identity, another "
                         "base)")


def resolve_block(args):
    """Which block is trained: what --init or the base brings along, or a new one.

    The training notes' file says nothing about its block, so `initial_head` in train.py looks at
    it.
    """
    seed_file = args.init != "identity" and checkpoint_type(args.init) == "seed"
    owner, brought = f"--init {args.init}", None
    if args.init != "identity" and not seed_file:
        brought = read_config(args.init).get("block")
    elif args.init == "identity" and args.model_name_or_path:
        owner = f"the base {args.model_name_or_path}"
        brought = read_config(args.model_name_or_path).get("post_interaction_block")
    if args.block and len(set(args.block)) > 1 and (seed_file or brought):
        raise InputError(f"--block names {len(set(args.block))} variants, but {owner} brings its "
                         "block along; start from what has none (--init identity, another base)")
    if brought and args.block_intermediate_size:
        raise InputError(f"--block_intermediate_size {args.block_intermediate_size}: {owner} "
                         "brings a block of its own; leave it out, or start from what has none")
    if brought:
        try:
            block_config = BlockConfig(**brought)
        except TypeError as e:
            path = args.model_name_or_path if args.init == "identity" else args.init
            raise InputError(f"{path}/config.json: what it calls its block is none of ours ({e}); "
                             "copy the file again") from e
        for typed in args.block or ():
            refuse_other_block(typed, block_config, owner)
        args.block = [variant_of(block_config)]
        return
    if set(args.tune) == {"post_decoder"} and "head" in (args.block or ()):
        raise InputError("--block head leaves nothing to train; add lm_head (--stage 2) or another "
                         "group to --tune")
    if seed_file:
        args.block = args.block or [None]
        return
    trained = "post_decoder" in args.tune
    args.block = args.block or ["full" if trained else "head"]
    if args.block != ["head"] and not trained:
        raise InputError(f"--block {','.join(args.block)}: a block that is not trained stays the "
                         "identity; add post_decoder to --tune")
    if args.block == ["head"] and args.block_intermediate_size:
        raise InputError(f"--block_intermediate_size {args.block_intermediate_size}: no block is "
                         "made; leave it out, or add post_decoder to --tune")
