"""A step of DPO, from pairs to updated weights, beside LoRA with transformers and peft on the same
GPU and base weights.

    python bench/bench_dpo.py [--size 7b] [--stage 2] [--tokens 24 128 512]

The peer is HA-DPO's recipe: LoRA (r 128, alpha 256, dropout 0.05) on all linear layers of LLaMA,
gradient checkpointing, chosen and rejected as two rows, the reference with adapters off, AdamW,
logits for answer tokens only. It runs twice. First everything is bf16, AdamW's states too, which is
fast and small, but steps of 2e-6 are lost in bf16's rounding. Then the adapters are fp32 under
autocast, as Hugging Face's trainers do it.

Our side is what train.py does through DeepSpeed. First the trunk is in the loop, as in an epoch
without kept features. Then comes a whole run (an ablation, another learning rate) from kept
features, then LoRA with master weights in fp32.

A pair is system prompt, image, question and two answers of as many tokens as the table says, `</s>`
included. For both sides batches are made before the clock starts; reading kept features counts. The
share of the peak counts the operations of tower and decoder (measuring.py) in our one pass. LoRA
needs four: policy, reference, recomputation, gradients of the activations.
"""
import argparse
import math
import os
import random
import string
import sys
import tempfile
from dataclasses import dataclass, replace
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import peft
import torch

from bench.measuring import (
    Line,
    agreement,
    decoder_flops,
    matmul_peak,
    measure,
    table,
    tower_flops,
)
from bench.peer import SIZES, environment, peer_inputs, peer_of, random_llava, unpack, write_images
from data import IMAGE, Example, PackedDataset
from dpo import Loss, Objective, preference_loss, token_logps
from model import STAGES, Head, set_trained
from support.loading import batches_ahead, spare_cores
from training.batches import ResumableSampler, Share
from training.engine import (
    Schedule,
    checkpoint_layers,
    deepspeed_config,
    start_deepspeed,
    start_engine,
)
from training.features import keep_features
from training.lora import add_lora
from training.reference import as_reference

LOSS, LEARNING_RATE = Loss("dpo", beta=0.1), 5e-7
ONCE, LORA_PASSES = (1, 1), (4, 2)      # passes through decoder and tower in a step


@dataclass
class Training:
    """What an engine trains, and in which batches."""
    groups: tuple               # of tensors (model.py)
    micro_batch: int
    accumulation: int = 1
    kept: bool = False          # whether batches come from kept features
    deepspeed: str = None       # a configuration file
    offload: bool = False


def make_pairs(ours, images, count, tokens, per_image=1, seed=0):
    """`count` preference pairs, `per_image` about each image, answers of `tokens` tokens →
    PackedDataset.
    """
    rng = random.Random(seed)

    def words(n):
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(n))

    examples = []
    for n in range(count):
        question = (f"{IMAGE}\nIs there a {words(1)} in the image, and if there is one, what does "
                    "it look like?")
        answers = [words(tokens - 1) for _ in range(2)]
        conversations = [[(question, answer)] for answer in answers]
        examples.append(Example(images[int(n / per_image) % len(images)], conversations))
    return PackedDataset(examples, ours.row_format())


def first_pairs(dataset, count):
    """Batch of the first pairs, and the positions of each row's tokens."""
    return dataset[list(range(count))], [dataset.row(n).position for n in range(count)]


def line_of(config, what, measured, pairs, rows, passes=ONCE):
    """`rows`: the positions of each row's tokens. A row has an image."""
    positions = [p for row in rows for p in row]
    decoder, tower = passes
    flops = decoder * decoder_flops(config, positions) + tower * tower_flops(config, len(rows))
    return Line(what, measured.seconds, pairs, len(positions), flops, measured.memory)


# ---- Ours ----------------------------------------------------------------------------------------


def identity(ours):
    """A head as train.py starts from it: an identity block and its own lm_head."""
    with ours.device:
        head = Head(ours.config, ours.config.block_config()).to(ours.dtype)
    head.lm_head.load_state_dict(ours.head.lm_head.state_dict())
    return head


def engine_of(deepspeed, ours, head, training):
    """DeepSpeed around the objective, as in train.py."""
    trained = set_trained(ours.trunk, head, training.groups)
    objective = Objective(None if training.kept else ours.trunk, head, LOSS)
    flags = SimpleNamespace(deepspeed=training.deepspeed, offload=training.offload, bf16=None,
                            report_to=None,
                            per_device_train_batch_size=training.micro_batch,
                            gradient_accumulation_steps=training.accumulation)
    on_gpu = ours.device.type == "cuda"
    config = deepspeed_config(flags, torch.distributed.get_world_size(), on_gpu)
    return start_engine(deepspeed, objective, trained, config, Schedule(LEARNING_RATE))


def step(engine, batch):
    """One optimizer step. Where the trunk is trained the reference's pass counts too; train.py
    needs it once per pair.
    """
    reference = None
    if engine.module.needs_reference_logps:
        with as_reference(engine):
            reference = engine(batch)
    loss, _ = engine(batch, reference)
    engine.backward(loss)
    engine.step()


def with_trunk(deepspeed, ours, dataset, tokens, micro_batch, args):
    """Optimizer steps with the trunk in the loop → Line."""
    training = Training(STAGES[args.stage], micro_batch)
    engine = engine_of(deepspeed, ours, identity(ours), training)
    batch, rows = first_pairs(dataset, micro_batch)
    measured = measure(lambda: step(engine, batch.to(ours.device, ours.dtype)), ours.device,
                       args.repeats, warm_up=2)
    engine.destroy()
    what = f"{tokens} tokens: ours, stage {args.stage}, {micro_batch} pairs"
    return line_of(ours.config, what, measured, micro_batch, rows)


def from_features(deepspeed, ours, dataset, tokens, args):
    """The frozen pass over all pairs, images opened, and a whole run from what it kept → two
    Lines.
    """
    micro_batch = max(args.micro_batches)
    accumulation = args.global_batch // micro_batch
    training = Training(STAGES[args.stage], micro_batch, accumulation, kept=True)
    with tempfile.TemporaryDirectory() as folder:
        def keep():
            return keep_features(folder, dataset, ours, ours.config.block_config(), batch_size=64)

        measured = measure(keep, ours.device, repeats=1, warm_up=0)
        what = (f"{tokens} tokens: ours, the frozen pass onto the disk, {args.pairs_per_image:g} "
                "pairs an image")
        frozen = Line(what, measured.seconds, len(dataset), 0, 0, measured.memory)
        kept = measured.result

        def run():
            engine = engine_of(deepspeed, ours, identity(ours), training)
            share = Share(args.global_batch, micro_batch)
            sampler = ResumableSampler(len(kept), args.steps, share, seed=42)
            for batch in batches_ahead(kept, sampler, spare_cores()):
                step(engine, batch.to(ours.device, ours.dtype))
            engine.destroy()

        measured = measure(run, ours.device, repeats=1, warm_up=0)
    what = f"{tokens} tokens: ours, a whole run of {args.steps} steps from kept features"
    pairs = args.steps * args.global_batch
    return frozen, Line(what, measured.seconds, pairs, 0, 0, measured.memory)


def with_lora(deepspeed, ours, datasets, args):
    """Optimizer steps of HA-DPO itself, `train.py --lora_r 128 --gradient_checkpointing` →
    {tokens: Line}. Changes the trunk.
    """
    add_lora(ours.trunk.model, 128, 256, 0.05)
    checkpoint_layers(ours.trunk.model)
    pairs, lines = args.peer_pairs, {}
    for tokens, dataset in datasets.items():
        engine = engine_of(deepspeed, ours, ours.head, Training(("lora",), pairs))
        batch, rows = first_pairs(dataset, pairs)

        def one_step(engine=engine, batch=batch):
            step(engine, batch.to(ours.device, ours.dtype))

        measured = measure(one_step, ours.device, args.repeats, warm_up=2)
        engine.destroy()
        what = f"{tokens} tokens: ours, LoRA, {pairs} pairs"
        lines[tokens] = line_of(ours.config, what, measured, pairs, rows, LORA_PASSES)
    return lines


@torch.no_grad()
def our_logps(ours, dataset, count):
    """log pi_ref of the chosen, then of the rejected answers of the first pairs, (2 · count,)."""
    objective = Objective(ours.trunk, ours.head, LOSS)
    metrics = [objective(dataset[[n]].to(ours.device, ours.dtype))[1] for n in range(count)]
    names = "logps/reference_chosen", "logps/reference_rejected"
    return torch.stack([m[name] for name in names for m in metrics])


# ---- The peer ------------------------------------------------------------------------------------


def with_peft(theirs, fp32):
    """theirs with adapters in training mode → PeftModel, optimizer."""
    linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = peft.LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=linears)
    model = peft.get_peft_model(theirs, config, autocast_adapter_dtype=fp32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=2e-6, weight_decay=0.0, fused=True)


def peer_batch(ours, dataset, count):
    """The first pairs as rows of their own: all chosen, then all rejected → inputs, lengths."""
    batch = dataset[list(range(count))]
    alone = [unpack(dataset.row(n)) for n in range(count)]
    sequences = [chosen for chosen, _ in alone] + [rejected for _, rejected in alone]
    pixel_values = batch.pixel_values[batch.image_index].repeat(2, 1, 1, 1)
    return peer_inputs(ours, sequences, pixel_values), list(map(len, sequences))


def peer_logps(model, inputs, tokens):
    """Sums over the last `tokens` tokens of each row, (2 · pairs,)."""
    logits = model(**inputs, logits_to_keep=tokens + 1, use_cache=False).logits
    logits = logits[:, :-1]                                                  # (rows, tokens, vocab)
    return token_logps(logits, inputs["input_ids"][:, -tokens:]).sum(1)


def peer_step(model, optimizer, inputs, tokens):
    with torch.no_grad(), model.disable_adapter():
        reference = peer_logps(model, inputs, tokens).view(2, -1).T                     # (pairs, 2)
    policy = peer_logps(model, inputs, tokens).view(2, -1).T                            # (pairs, 2)
    losses, _ = preference_loss(policy, reference, LOSS)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_peer(ours, theirs, fp32, datasets, args):
    """Optimizer steps of the peer → {tokens: Line}."""
    (model, optimizer), lines, pairs = with_peft(theirs, fp32), {}, args.peer_pairs
    adapters = "adapters in fp32, autocast" if fp32 else "adapters in bf16"
    autocast = fp32 and ours.dtype != torch.float32
    for tokens, dataset in datasets.items():
        inputs, lengths = peer_batch(ours, dataset, pairs)

        def one_step(inputs=inputs, tokens=tokens):
            with torch.autocast(ours.device.type, ours.dtype, enabled=autocast):
                peer_step(model, optimizer, inputs, tokens)

        measured = measure(one_step, ours.device, args.repeats, warm_up=2)
        what = f"{tokens} tokens: peft, LoRA, {adapters}, {pairs} pairs"
        rows = [range(n) for n in lengths]
        lines[tokens] = line_of(ours.config, what, measured, pairs, rows, LORA_PASSES)
    model.unload()
    return lines


# ---- Command line --------------------------------------------------------------------------------


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2,
                        help="1 trains the block, 2 block and lm_head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 128, 512],
                        help="of an answer")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[4, 16],
                        help="pairs at once, ours")
    parser.add_argument("--peer_pairs", type=int, default=4, help="pairs at once, peer")
    parser.add_argument("--pairs", type=int, default=512, help="whose features are kept")
    parser.add_argument("--pairs_per_image", type=float, default=1,
                        help="of those; HA-DPO's data have 2.5")
    parser.add_argument("--steps", type=int, default=39,
                        help="of the run from kept features; 39 of 128 are HA-DPO's epoch")
    parser.add_argument("--global_batch", type=int, default=128,
                        help="of the run from kept features")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    deepspeed = start_deepspeed()[0]
    ours = random_llava(args.size)
    peak = matmul_peak(ours.device, ours.dtype)
    print(f"{environment(ours.device, peak)}, peft {peft.__version__}, "
          f"deepspeed {deepspeed.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        names = write_images(folder, math.ceil(args.pairs / args.pairs_per_image))
        images = [os.path.join(folder, name) for name in names]
        datasets = {tokens: make_pairs(ours, images, args.pairs, tokens) for tokens in args.tokens}
        first = args.tokens[0]

        print("timing ours", flush=True)
        lines = {tokens: [with_trunk(deepspeed, ours, dataset, tokens, micro, args)
                          for micro in args.micro_batches] for tokens, dataset in datasets.items()}
        kept = make_pairs(ours, images, args.pairs, first, args.pairs_per_image)
        lines[first] += from_features(deepspeed, ours, kept, first, args)

        print("timing the peer", flush=True)
        theirs = peer_of(ours)
        said = our_logps(ours, datasets[first], args.peer_pairs)
        with torch.no_grad():
            inputs, _ = peer_batch(ours, datasets[first], args.peer_pairs)
            expected = peer_logps(theirs, inputs, first)
        peers = [time_peer(ours, theirs, fp32, datasets, args) for fp32 in (False, True)]
        del theirs
        for tokens, line in with_lora(deepspeed, ours, datasets, args).items():
            lines[tokens].insert(0, line)

    shown = []
    for tokens in args.tokens:
        beside = tuple(peer[tokens] for peer in peers)
        shown += [*beside, *(replace(line, peers=beside) for line in lines[tokens])]
    print("\n" + table(shown, "pair", args.global_batch, peak) + "\n")
    what = "log-probabilities of the same answers, adapters off"
    agreement(what, said, expected, ours.dtype)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
