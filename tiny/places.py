"""Where the tiny world lies, and the tiny base that comes with the code.

    world, beside = world_beside("out/stage2")      # "out/world", and where answers are written
    draw_world("out/world", 42, Sizes(), supervised=False)      # what is missing of it
"""
import os
from dataclasses import asdict

import torch.distributed as dist

from checkpoints.hub import is_name
from checkpoints.layouts import typed
from support.command_line import first_process
from support.common import InputError, read_json
from tiny.words import about
from tiny.world import Sizes, draw_supervised, make_world
from training.recipes import world_of_files

SHIPPED_BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "base")
SHIPPED_SEED = 42
DRAWN = 450             # images a second, on one core


def shipped_base():
    """The folder, as a user in the repository would type it."""
    inside = os.path.dirname(os.path.dirname(SHIPPED_BASE)) == os.getcwd()
    return os.path.relpath(SHIPPED_BASE) if inside else SHIPPED_BASE


def ships_base_of(args):
    """Whether the base of these flags is the one that comes with the code."""
    return args.seed == SHIPPED_SEED and not (
        args.tiny_sizes or args.tiny_tower or args.tiny_projector or args.tiny_base_steps)


def world_beside(checkpoint):
    """The tiny world that a checkpoint belongs to, and a folder beside it for what is asked.

    A checkpoint says where it was trained; else the world lies beside it, or in out/. The shipped
    base has none beside it, and nothing is written there: out/ stands in, and a world is drawn
    where none is.
    """
    if os.path.realpath(checkpoint) != os.path.realpath(SHIPPED_BASE):
        beside = checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint)
        if is_name(checkpoint):                 # out/NAME for what is asked of a hub's OWNER/NAME
            beside = os.path.join("out", os.path.basename(checkpoint).partition("@")[0])
        return world_of(checkpoint), beside
    world = os.path.join("out", "world")
    if os.path.isdir(world):
        seed, _ = made_with(world)
        if seed != SHIPPED_SEED:
            raise InputError(f"{world}: was made with --seed {seed}, and {checkpoint} with "
                             f"{SHIPPED_SEED}; name other images and questions with --coco_path "
                             "and --pope_path, or another folder's checkpoint")
    elif first_process():
        draw_world(world, SHIPPED_SEED, Sizes(), supervised=False)
    if dist.is_initialized():
        dist.barrier()
    return world, "out"


def world_of(checkpoint):
    """The world that a checkpoint was trained in, by its config.json; else one that is near."""
    config = os.path.join(checkpoint, "config.json")
    told = read_json(config, dict) if os.path.isfile(config) else {}
    arguments = typed(told, "arguments", dict, config) or {}
    world = world_of_files(arguments.get("vg_path"), arguments.get("data_path"))
    near = os.path.join(os.path.dirname(checkpoint), "world")
    there = os.path.join("out", "world")
    return world or (near if os.path.isdir(near) or not os.path.isdir(there) else there)


def draw_world(world, seed, sizes, supervised):
    """Draw what is missing of a world; `supervised`: the images of stage 0 as well."""
    if not os.path.isdir(world):
        images = sum(asdict(sizes).values()) - (0 if supervised else sizes.sft)
        print(f"no world in {world}: drawing it (seed {seed}; once, {about(images / DRAWN)})",
              flush=True)
        make_world(world, seed, sizes, supervised)
    elif supervised and not os.path.isdir(os.path.join(world, "llava", "images")):
        _, made = made_with(world)
        print(f"no images in {world}/llava: drawing them (once, {about(made['sft'] / DRAWN)})",
              flush=True)
        draw_supervised(world)


def made_with(world):
    """The seed and the sizes that a world was made with. InputError where it does not tell."""
    path = os.path.join(world, "world.json")
    values = read_json(path, dict)
    seed, sizes = values.get("seed"), values.get("sizes")
    if type(seed) is not int or not isinstance(sizes, dict):
        raise InputError(f"{path}: does not tell the world's seed and sizes; remove {world}, and "
                         "it is drawn again")
    return seed, sizes
