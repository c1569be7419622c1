"""What tools/explain.py explains: a checkpoint and its pairs, or a small world and a random model.

    objective, model, examples = load("out/stage2")
    objective, model, examples = random_model(folder)
"""
import copy
import os

import torch

from checkpoints.load import Source, checkpoint_type, load_all, read_config
from data import ImageProcessor, Tokenizer, read_hadpo
from dpo import Loss, Objective
from model import Head, Llava, Trunk, set_trained
from post_decoder import PostInteractionBlock
from support.common import InputError, device_and_dtype, read_json
from tiny import world as tiny_world
from tiny.places import world_beside
from tiny.preferences import write_preferences
from tiny.prepare import TINY_LLAVA


def load(path):
    """A trained checkpoint or a base → Objective, Llava, examples; data and loss are its run's.

    The policy is the checkpoint and the reference is what its training started from. For a base the
    policy gets a fresh block: that is how training would start.
    """
    what = checkpoint_type(path)
    if what not in ("trained", "base"):
        raise InputError(f"{path}: neither a base nor a checkpoint of train.py's stages; "
                         "only these say where their data are")
    run = read_config(path).get("arguments", {}) if what == "trained" else {}
    start = run.get("init", "identity")
    paths = [path] if start == "identity" else [start, path]
    model = load_all(Source(paths), *device_and_dtype())
    *_, reference, head = [None, *model.heads.values()]        # a base alone has no reference

    world, _ = world_beside(path.rstrip("/"))
    names = "desc_data_path", "pope_data_path", "vg_path"
    data = [run.get(name) or beside
            for name, beside in zip(names, hadpo_paths(world), strict=True)]
    settings = {name: run[name] for name in ("beta", "sft_weight", "label_smoothing")
                if run.get(name) is not None}
    if run.get("loss") not in (None, "sft"):                   # what DPO would say of an SFT run
        settings["name"] = run["loss"]
    tune = run.get("tune", ("post_decoder",))
    return objective_of(model, head, reference, tune, Loss(**settings)), model, read_hadpo(*data)


def hadpo_paths(world):
    """Where a tiny world holds HA-DPO's descriptions, its questions, and Visual Genome."""
    parts = ("hadpo", "desc_data.json"), ("hadpo", "pope_data.json"), ("VG",)
    return [os.path.join(world, *part) for part in parts]


def random_model(folder):
    """A small tiny world in `folder`, and a model that was never trained; returns what `load` does.

    The model's "answers" in the preference data are a yes to everything.
    """
    sizes = tiny_world.Sizes(sft=96, preference=24, validation=8, evaluation=8)
    tiny_world.make_world(folder, 42, sizes, progress=False)
    said = {}
    for image in read_json(os.path.join(folder, "preference.json")):
        for q in image["questions"]:
            said[image["image_id"], q["question"]] = tiny_world.answer(q["word"], True)
        said[image["image_id"], image.get("describe")] = ""
    write_preferences(folder, said)

    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.model"))
    config = copy.deepcopy(TINY_LLAVA)
    config.text.vocab_size = len(tokenizer)
    torch.manual_seed(42)
    preprocess = ImageProcessor(config.vision.image_size)
    model = Llava(Trunk(config), {"base": Head(config)}, tokenizer, preprocess, "")
    objective = objective_of(model, model.head, None, ("post_decoder",), Loss())
    return objective, model, read_hadpo(*hadpo_paths(folder))


def objective_of(model, head, reference, tune, loss):
    """What train.py wraps for DeepSpeed.

    Without a reference, training starts here: a head without a block gets a fresh one.
    """
    head = copy.deepcopy(head)
    if reference is None and not head.block_config:
        torch.manual_seed(42)
        parameter = head.lm_head.weight
        block = PostInteractionBlock(model.config.block_config())
        head.post_interaction_block = block.to(parameter.device, parameter.dtype)
    set_trained(model.trunk, head, tune)
    objective = Objective(model.trunk, head, loss)
    if reference is not None:
        objective.reference = reference
    return objective
