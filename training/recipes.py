"""What train.py takes where a flag was not typed: the recipe's numbers, the tiny world's place.

    fill_in_defaults(args)      # an argparse.Namespace, complete
    tiny_root("runs/first")     # "out": there lie world, base and kept features
"""
import os

from model import TRUNK

# Defaults with a real model: LLaVA's for supervised training of the trunk (0), the training notes'
# for the head (1, 2), HA-DPO's for DPO of the trunk.
REAL = {0: dict(learning_rate=[2e-5], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=[5e-7], num_train_epochs=1, sft_weight=0.0, warmup_ratio=0.0)}
REAL |= {2: REAL[1], "trunk": REAL[1] | dict(learning_rate=[2e-6]),
         "voco": REAL[0] | dict(num_train_epochs=2)}
# Of the tiny world, chosen on validation images; for "voco" no rate was searched.
TINY = {0: dict(learning_rate=[3e-3], num_train_epochs=2, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=[2e-3], num_train_epochs=5, sft_weight=10.0, warmup_ratio=0.0)}
TINY |= {2: TINY[1], "voco": TINY[0] | dict(learning_rate=[2e-3]),
         "trunk": TINY[1] | dict(learning_rate=[1e-3], num_train_epochs=1, sft_weight=1.0)}


def fill_in_defaults(args):
    """The recipe's numbers, and what follows from the others."""
    tiny, trains_trunk = args.model_name_or_path is None, bool(TRUNK & set(args.tune))
    if trains_trunk:
        recipe = "trunk" if args.loss != "sft" else "voco" if args.voco else 0
    else:
        recipe = args.stage or (2 if "lm_head" in args.tune else 1)
    for name, value in (TINY if tiny else REAL)[recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # Tells a state that was saved when norms and biases were decayed too (training/engine.py).
    args.undecayed = "norms and biases" if args.weight_decay else None
    if args.keep_correct is None:
        args.keep_correct = tiny
    sweep = len(args.block) * len(args.learning_rate) > 1
    if (tiny or sweep) and args.cache_features is None:
        beside = os.path.dirname(args.output_dir)
        args.cache_features = os.path.join(tiny_root(args.output_dir) if tiny else beside,
                                           "features")
    args.default_batch, args.default_micro = 128, 4
    if tiny and args.stage == 0:
        args.default_batch, args.max_steps = 32, args.max_steps or args.tiny_base_steps
    if tiny:
        args.default_micro = 128
    elif args.cache_features and not trains_trunk:
        args.default_micro = 16


def tiny_root(output_dir):
    """The folder that holds the tiny world, its tower, its base and what is kept of them.

    It is out/, whatever the run's own folder is called. Another world is made by stage 0 with
    --output_dir FOLDER/base; then it serves the runs in FOLDER.
    """
    beside, name = os.path.split(output_dir)
    own = name == "base" or os.path.isdir(os.path.join(beside, "world"))
    return beside if own else "out"


def world_of_files(vg_path, data_path):
    """The tiny world that a run's images or conversations lie in, or None: they are others."""
    for path, depth in ((vg_path, 1), (data_path, 2)):
        for _ in range(depth):
            path = os.path.dirname(path or "")
        if path and os.path.isfile(os.path.join(path, "world.json")):
            return path
    return None
