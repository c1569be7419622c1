"""What a run without files trains on: the tiny world's images, vision tower, base model and preference data.

`prepare_tiny_world` makes each of them once, beside the run's output folder, and from then on names them as paths, as a
user with real files would. The base is trained by stage 0 of train.py itself; the rejected answers are mined from what
that base says about images it has not seen, as HA-DPO's were.

The sizes and defaults below follow a recipe that was found by measuring (README, "What it shows"): the projector is so
narrow that the tower sees what LLaMA does not get to know, which leaves the block something to find.
"""
import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import nn

import shapes
from checkpoint import load_base, save_base
from clip_vit import CLIPVisionConfig
from data import PackedDataset, Tokenizer
from llama import LlamaConfig
from model import Head, LlavaConfig, Trunk, answer
from objective import STAGES
from readers import IMAGE, Example, InputError, read_image_index, read_json

# Chosen on validation images; by stage.
TINY = {0: dict(learning_rate=[3e-3], num_train_epochs=2, sft_weight=0.0, warmup_ratio=0.03),
        1: dict(learning_rate=[2e-3], num_train_epochs=6, sft_weight=1.0, warmup_ratio=0.0)}
TINY |= {2: TINY[1] | dict(learning_rate=[1e-3]), "trunk": TINY[1] | dict(learning_rate=[1e-3], num_train_epochs=1)}
TINY_LLAVA = LlavaConfig(
    LlamaConfig(vocab_size=0, hidden_size=96, intermediate_size=240, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=512),        # the vocabulary is the tokenizer's
    CLIPVisionConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=48,
                     patch_size=8),
    select_layer=-1, projector_hidden_size=8, max_length=512)


def prepare_tiny_world(args, train, device):
    """Make what is missing, then set the paths in `args`. `train` is train.py's function for one run."""
    root = os.path.dirname(args.output_dir)
    world, untrained, base = (os.path.join(root, name) for name in ("world", "untrained", "base"))
    first = dist.get_rank() == 0
    if first and not os.path.isdir(world):
        print(f"no world in {world}: drawing it (seed {args.seed})", flush=True)
        shapes.make_world(world, args.seed, shapes.Sizes(**args.tiny_sizes))
    if first and not os.path.isdir(base):
        print(f"no base model in {base}: pre-training a vision tower, then stage 0 (once; minutes on two cores)", flush=True)
        make_untrained_base(untrained, world, args.seed, device, args.tiny_tower)
    dist.barrier()
    seed = read_json(os.path.join(world, "world.json"))["seed"]
    if seed != args.seed:
        raise InputError(f"{world}: was made with --seed {seed}, not {args.seed}; name another --output_dir, "
                         f"e.g. out/seed{args.seed}/{os.path.basename(args.output_dir)}")
    args.data_path, args.image_folder = os.path.join(world, "llava", "train.json"), os.path.join(world, "llava", "images")
    if not os.path.isdir(base):
        train(argparse.Namespace(**vars(args) | TINY[0] | dict(
            stage=0, tune=STAGES[0], loss="sft", block=["head"], init="identity",
            model_name_or_path=untrained, output_dir=base, deepspeed=None, offload=False, default_batch=32,
            per_device_train_batch_size=None, gradient_accumulation_steps=None, max_steps=args.tiny_base_steps)))
    hadpo = os.path.join(world, "hadpo")
    if first and not os.path.isdir(hadpo):
        mine_preferences(world, base, device)
    dist.barrier()
    args.model_name_or_path, args.vg_path = base, os.path.join(world, "VG")
    args.desc_data_path, args.pope_data_path = os.path.join(hadpo, "desc_data.json"), os.path.join(hadpo, "pope_data.json")


def make_untrained_base(folder, world, seed, device, tower_options):
    """A random tiny LLaVA around a pre-trained tower, in LLaVA's layout."""
    torch.manual_seed(seed)
    tokenizer, config = Tokenizer(os.path.join(world, "tokenizer.model")), copy.deepcopy(TINY_LLAVA)
    config.text.vocab_size = len(tokenizer)
    trunk, head = Trunk(config), Head(config)
    for module in (*trunk.model.modules(), head.lm_head):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)                                        # as LLaMA is initialised
    auc = shapes.pretrain_tower(trunk.vision_tower.to(device), seed, **tower_options)
    print(f"vision tower: mean AUC of the classes {auc:.3f}", flush=True)
    save_base(folder, trunk.cpu(), head, tokenizer)


def mine_preferences(world, base, device):
    """Ask the base every preference question and write HA-DPO's files from its answers."""
    trunk, head, tokenizer, preprocess = load_base(base, device=device)
    images = read_image_index(os.path.join(world, "VG"))
    rows = read_json(os.path.join(world, "preference.json"))
    asked = [[q["question"] for q in row["questions"]] + ([row["describe"]] if "describe" in row else []) for row in rows]
    examples = [Example(images[row["image_id"]], [[(f"{IMAGE}\n{q}", None)] for q in questions]) for row, questions in zip(rows, asked)]
    dataset = PackedDataset(examples, tokenizer, preprocess, trunk.config.vision.num_patches, trunk.config.max_length)
    answers, = answer(trunk, [head], dataset, 40, batch_size=64, title="asking the base")
    counts = shapes.write_preferences(world, {(row["image_id"], q): a for i, (row, questions) in enumerate(zip(rows, asked))
                                              for q, a in zip(questions, answers[i][0])})
    print("preference data mined from the base's own answers: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()), flush=True)
