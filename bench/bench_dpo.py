"""A step of DPO, from pairs to updated weights, beside LoRA with transformers and peft on the same GPU and base weights.

    python bench/bench_dpo.py [--size 7b] [--stage 2] [--tokens 24 128 512]

The peer is HA-DPO's recipe: LoRA (r 128, alpha 256, dropout 0.05) on all linear layers of LLaMA, gradient checkpointing,
chosen and rejected as two rows, the reference with adapters off, AdamW, logits for answer tokens only; once with
everything in bf16, AdamW's states too (fast and small, but steps of 2e-6 are lost in bf16's rounding), once with adapters
in fp32 under autocast, as Hugging Face's trainers run it. Ours is what train.py does through DeepSpeed: first with the
trunk in the loop, as in an epoch without kept features, then a whole run (an ablation, another learning rate) from kept
features, then LoRA with master weights in fp32. A pair is system prompt, image, question and two answers of as many tokens
as the table says, `</s>` included. Batches are made before the clock starts, for both; reading kept features counts. Share
of the peak: operations of tower and decoder (see peer.py) in the one pass of ours; LoRA needs four: policy, reference,
recomputation, gradients of the activations.
"""
import argparse
import os
import random
import string
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import peft
import torch

from data import PackedDataset, ResumableSampler, batches_ahead, spare_cores
from dpo import dpo_loss, token_logps
from features import keep_features
from loop import as_reference, deepspeed_config, start_deepspeed, start_engine
from lora import add_lora
from model import Head
from objective import STAGES, Objective, checkpoint_layers, set_trained
from peer import (SIZES, Line, agreement, decoder_flops, environment, matmul_peak, measure, peer_inputs, peer_of, random_llava,
                  table, tower_flops, unpack, write_images)
from readers import IMAGE, Example

BETA, LEARNING_RATE = 0.1, 5e-7


def make_pairs(ours, images, count, tokens, seed=0):
    """`count` preference pairs about these images, answers of `tokens` tokens → PackedDataset."""
    rng = random.Random(seed)

    def words(n):
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(n))

    examples = []
    for n in range(count):
        question = f"{IMAGE}\nIs there a {words(1)} in the image, and if there is one, what does it look like?"
        examples.append(Example(images[n % len(images)], [[(question, words(tokens - 1))], [(question, words(tokens - 1))]]))
    return PackedDataset(examples, ours.tokenizer, ours.preprocess, ours.config.vision.num_patches, ours.config.max_length)


def line_of(config, what, measured, pairs, rows, decoder_passes=1, tower_passes=1):
    """`rows`: the positions of each row's tokens. A row has an image."""
    positions = [p for row in rows for p in row]
    flops = decoder_passes * decoder_flops(config, positions) + tower_passes * tower_flops(config, len(rows))
    return Line(what, measured.seconds, pairs, len(positions), flops, measured.memory)


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def identity(ours):
    """A head as train.py starts from it: an identity block and its own lm_head."""
    with ours.device:
        head = Head(ours.config, ours.config.block()).to(ours.dtype)
    head.lm_head.load_state_dict(ours.head.lm_head.state_dict())
    return head


def engine_of(deepspeed, ours, head, groups, micro_batch, accumulation=1, kept=False, zero=None, offload=False):
    """DeepSpeed around the objective, as in train.py. `kept`: batches come from kept features; `zero`: a configuration file."""
    trained = set_trained(ours.trunk, head, groups)
    objective = Objective(None if kept else ours.trunk, head, "dpo", BETA, 0.0)
    config = deepspeed_config(SimpleNamespace(deepspeed=zero, per_device_train_batch_size=micro_batch, bf16=None, offload=offload,
                                              gradient_accumulation_steps=accumulation),
                              torch.distributed.get_world_size(), ours.device.type == "cuda")
    return start_engine(deepspeed, objective, trained, config, LEARNING_RATE)


def step(engine, batch):
    """One optimizer step; where the trunk learns, behind the reference's pass, which train.py needs once per pair."""
    reference = None
    if engine.module.needs_table:
        with as_reference(engine):
            reference = engine(batch)
    loss, _ = engine(batch, None, reference)
    engine.backward(loss)
    engine.step()


def with_trunk(deepspeed, ours, stage, micro_batch, dataset, tokens, repeats):
    """Optimizer steps with the trunk in the loop → Line."""
    engine = engine_of(deepspeed, ours, identity(ours), STAGES[stage], micro_batch)
    batch, rows = dataset[list(range(micro_batch))], [dataset.row(n).position for n in range(micro_batch)]
    measured = measure(lambda: step(engine, batch.to(ours.device, ours.dtype)), ours.device, repeats, warm_up=2)
    engine.destroy()
    return line_of(ours.config, f"{tokens} tokens: ours, stage {stage}, {micro_batch} pairs", measured, micro_batch, rows)


def from_features(deepspeed, ours, stage, micro_batch, dataset, tokens, steps, global_batch):
    """The frozen pass over all pairs, images opened, and a whole run from what it kept → two Lines."""
    with tempfile.TemporaryDirectory() as folder:
        block = ours.config.block()
        measured = measure(lambda: keep_features(folder, dataset, ours.trunk, block, "random weights", 64), ours.device, 1, 0)
        frozen = line_of(ours.config, f"{tokens} tokens: ours, the frozen pass onto the disk", measured, len(dataset),
                         [dataset.row(n).position for n in range(len(dataset))])
        kept = measured.result

        def run():
            engine = engine_of(deepspeed, ours, identity(ours), STAGES[stage], micro_batch, global_batch // micro_batch, True)
            sampler = ResumableSampler(len(kept), steps, global_batch, micro_batch, 0, 1, seed=42)
            for batch in batches_ahead(kept, sampler, spare_cores()):
                step(engine, batch.to(ours.device, ours.dtype))
            engine.destroy()

        measured = measure(run, ours.device, repeats=1, warm_up=0)
    return frozen, Line(f"{tokens} tokens: ours, a whole run of {steps} steps from kept features", measured.seconds,
                        steps * global_batch, 0, 0, measured.memory)


def with_lora(deepspeed, ours, micro_batch, datasets, repeats):
    """Optimizer steps of HA-DPO itself, `train.py --lora_r 128 --gradient_checkpointing` → {tokens: Line}. Changes the trunk."""
    add_lora(ours.trunk.model, 128, 256, 0.05)
    checkpoint_layers(ours.trunk.model)
    lines = {}
    for tokens, dataset in datasets.items():
        engine = engine_of(deepspeed, ours, ours.head, ("lora",), micro_batch)
        batch, rows = dataset[list(range(micro_batch))], [dataset.row(n).position for n in range(micro_batch)]
        measured = measure(lambda: step(engine, batch.to(ours.device, ours.dtype)), ours.device, repeats, warm_up=2)
        engine.destroy()
        lines[tokens] = line_of(ours.config, f"{tokens} tokens: ours, LoRA, {micro_batch} pairs", measured, micro_batch, rows, 4, 2)
    return lines


@torch.no_grad()
def our_logps(ours, dataset, count):
    """log pi_ref of the chosen, then of the rejected answers of the first pairs, (2 · count,), through the Objective."""
    objective = Objective(ours.trunk, ours.head, "dpo", BETA, 0.0)
    metrics = [objective(dataset[[n]].to(ours.device, ours.dtype))[1] for n in range(count)]
    return torch.stack([m[f"logps/reference_{which}"] for which in ("chosen", "rejected") for m in metrics])


# ---------------------------------------------------------------------------------------------------------------------
# The peer


def with_peft(theirs, fp32):
    """theirs with adapters in training mode → PeftModel, optimizer."""
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=(
        r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")), autocast_adapter_dtype=fp32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=2e-6, weight_decay=0.0, fused=True)


def peer_batch(ours, dataset, count):
    """The first pairs as rows of their own: all chosen, then all rejected."""
    batch, alone = dataset[list(range(count))], [unpack(dataset.row(n)) for n in range(count)]
    sequences = [chosen for chosen, _ in alone] + [rejected for _, rejected in alone]
    return peer_inputs(ours, sequences, batch.pixel_values[batch.image_index].repeat(2, 1, 1, 1)), list(map(len, sequences))


def peer_logps(model, inputs, tokens):
    """Sums over the last `tokens` tokens of each row, (2 · pairs,)."""
    logits = model(**inputs, logits_to_keep=tokens + 1, use_cache=False).logits[:, :-1]             # (rows, tokens, vocab)
    return token_logps(logits, inputs["input_ids"][:, -tokens:]).sum(1)


def peer_step(model, optimizer, inputs, tokens):
    with torch.no_grad(), model.disable_adapter():
        reference = peer_logps(model, inputs, tokens)
    losses, _, _ = dpo_loss(*peer_logps(model, inputs, tokens).chunk(2), *reference.chunk(2), BETA)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_peer(ours, theirs, fp32, datasets, pairs, repeats):
    """Optimizer steps of the peer → {tokens: Line}."""
    (model, optimizer), lines = with_peft(theirs, fp32), {}
    what = f"peft, LoRA, {'adapters in fp32, autocast' if fp32 else 'adapters in bf16'}, {pairs} pairs"
    for tokens, dataset in datasets.items():
        inputs, lengths = peer_batch(ours, dataset, pairs)

        def one_step():
            with torch.autocast(ours.device.type, ours.dtype, enabled=fp32 and ours.dtype != torch.float32):
                peer_step(model, optimizer, inputs, tokens)

        measured = measure(one_step, ours.device, repeats, warm_up=2)
        lines[tokens] = line_of(ours.config, f"{tokens} tokens: {what}", measured, pairs, [range(n) for n in lengths], 4, 2)
    model.unload()
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="1 trains the block, 2 block and lm_head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 128, 512], help="of an answer")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[4, 16], help="pairs at once, ours")
    parser.add_argument("--peer_pairs", type=int, default=4, help="pairs at once, peer")
    parser.add_argument("--pairs", type=int, default=512, help="whose features are kept")
    parser.add_argument("--steps", type=int, default=39, help="of the run from kept features; 39 of 128 are HA-DPO's epoch")
    parser.add_argument("--global_batch", type=int, default=128, help="of the run from kept features")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    deepspeed = start_deepspeed()[0]
    ours = random_llava(args.size)
    peak = matmul_peak(ours.device, ours.dtype)
    print(f"{environment(ours.device, peak)}, peft {peft.__version__}, deepspeed {deepspeed.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        images = [os.path.join(folder, name) for name in write_images(folder, min(args.pairs, 128))]
        datasets = {tokens: make_pairs(ours, images, args.pairs, tokens) for tokens in args.tokens}
        print("timing ours", flush=True)
        lines = {tokens: [with_trunk(deepspeed, ours, args.stage, micro, dataset, tokens, args.repeats)
                          for micro in args.micro_batches] for tokens, dataset in datasets.items()}
        first = args.tokens[0]
        lines[first] += from_features(deepspeed, ours, args.stage, max(args.micro_batches), datasets[first], first, args.steps,
                                      args.global_batch)
        print("timing the peer", flush=True)
        theirs = peer_of(ours)
        said = our_logps(ours, datasets[first], args.peer_pairs)
        with torch.no_grad():
            expected = peer_logps(theirs, peer_batch(ours, datasets[first], args.peer_pairs)[0], first)
        peers = [time_peer(ours, theirs, fp32, datasets, args.peer_pairs, args.repeats) for fp32 in (False, True)]
        del theirs
        for tokens, line in with_lora(deepspeed, ours, args.peer_pairs, datasets, args.repeats).items():
            lines[tokens].insert(0, line)
    shown = []
    for tokens in args.tokens:
        beside = tuple(peer[tokens] for peer in peers)
        shown += [*beside, *(replace(line, peers=beside) for line in lines[tokens])]
    print("\n" + table(shown, "pair", args.global_batch, peak) + "\n")
    agreement("log-probabilities of the same answers, adapters off", said, expected, ours.dtype)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
