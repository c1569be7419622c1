"""What a step of DPO costs with transformers, done in the ways that people know: the peers of
bench_dpo.py.

    for tokens, line in time_peer(Peer("LoRA in bf16", 16), sides, datasets, repeats=3): ...

HA-DPO's recipe is LoRA (r 128, alpha 256, dropout 0.05) with peft on all linear layers of LLaMA,
with gradient checkpointing, and the reference with adapters off. It runs with few and with many
pairs at once, with checkpointing and without it. First everything is bf16, AdamW's states too,
which is fast and small, but steps of 2e-6 are lost in bf16's rounding. Then the adapters are fp32
under autocast, as Hugging Face's trainers do it.

The frozen trunk trains what our stage 2 trains. transformers' LLaVA runs once without gradients,
and its hidden states and its tower's features feed our block, `lm_head` and loss, which are trained
in bf16. So the peer has our algorithm, and lacks the packed rows.

In all of them chosen and rejected are rows of their own, each with its image, padded on the left,
and logits exist for answer tokens only. What the GPU has no memory for is a result, too.
"""
from dataclasses import dataclass, field

import peft
import torch
from torch import nn

from bench.measuring import attempt, line_of
from bench.peer import RandomLlava, identity, peer_inputs, unpack
from dpo import Loss, frozen_copy, preference_loss, token_logps
from model import STAGES, set_trained

LOSS = Loss("dpo", beta=0.1)
# Passes through decoder and tower in a step. LoRA: policy, reference, gradients of the activations,
# and with checkpointing the policy once more.
FROZEN_PASSES, LORA_PASSES = (1, 1), {True: (4, 2), False: (3, 2)}


@dataclass(frozen=True)
class Peer:
    """One way to do it. `trains`: "LoRA in bf16", "LoRA in fp32, autocast" or "frozen trunk"."""
    trains: str
    pairs: int
    checkpointing: bool = False

    @property
    def what(self):
        side = "transformers" if self.trains == "frozen trunk" else "peft"
        checkpointed = ", checkpointing" if self.checkpointing else ""
        return f"{side}, {self.trains}{checkpointed}, {self.pairs} pairs"


@dataclass
class Sides:
    """Both models, on the same tensors."""
    ours: RandomLlava
    theirs: nn.Module
    stage: int = 2          # what the frozen trunk's peer trains


def peers_of(pairs):
    """Every peer with each number of pairs; HA-DPO's recipe with the fewest comes first."""
    adapters = "LoRA in bf16", "LoRA in fp32, autocast"
    lora = [Peer(trains, count, checkpointing) for checkpointing in (True, False)
            for count in pairs for trains in adapters]
    return lora + [Peer("frozen trunk", count) for count in pairs]


def peer_batch(ours, dataset, count):
    """The first pairs as rows of their own: all chosen, then all rejected → inputs, lengths."""
    batch = dataset[list(range(count))]
    alone = [unpack(dataset.row(n)) for n in range(count)]
    sequences = [chosen for chosen, _ in alone] + [rejected for _, rejected in alone]
    pixel_values = batch.pixel_values[batch.image_index].repeat(2, 1, 1, 1)
    return peer_inputs(ours, sequences, pixel_values), list(map(len, sequences))


def answer_logps(logits, inputs, tokens):
    """Sums over the last `tokens` tokens of each row: (2 · pairs, tokens, vocab) → (pairs, 2)."""
    logps = token_logps(logits, inputs["input_ids"][:, -tokens:]).sum(1)              # (2 · pairs,)
    return logps.view(2, -1).T


@dataclass
class Update:
    """AdamW in the parameters' own dtype, behind clipped gradients."""
    trained: list
    learning_rate: float
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.learning_rate, weight_decay=0.0,
                                           fused=True)

    def __call__(self, policy, reference):
        losses, _ = preference_loss(policy, reference, LOSS)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- LoRA ----------------------------------------------------------------------------------------


def peer_logps(model, inputs, tokens):
    """log pi of the first pairs' answers, (pairs, 2)."""
    logits = model(**inputs, logits_to_keep=tokens + 1, use_cache=False).logits
    return answer_logps(logits[:, :-1], inputs, tokens)


class LoRA:
    """peft's adapters in training mode around transformers' LLaVA, taken off again by `close`."""

    def __init__(self, peer, sides):
        fp32 = "fp32" in peer.trains
        linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        config = peft.LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=linears)
        self.model = peft.get_peft_model(sides.theirs, config, autocast_adapter_dtype=fp32).train()
        if peer.checkpointing:
            once = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=once)
        self.update = Update([p for p in self.model.parameters() if p.requires_grad], 2e-6)
        self.device, self.dtype = sides.ours.device, sides.ours.dtype
        self.autocast = fp32 and self.dtype != torch.float32
        self.passes = LORA_PASSES[peer.checkpointing]

    def step(self, inputs, tokens):
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
            with torch.no_grad(), self.model.disable_adapter():
                reference = peer_logps(self.model, inputs, tokens)
            self.update(peer_logps(self.model, inputs, tokens), reference)

    def close(self):
        self.model.unload().gradient_checkpointing_disable()


# ---- A frozen trunk ------------------------------------------------------------------------------


class FrozenTrunk:
    """Our block, lm_head and loss behind transformers' LLaVA."""

    def __init__(self, peer, sides):
        self.llava, self.head = sides.theirs.eval().model, identity(sides.ours)
        trained = set_trained(sides.ours.trunk, self.head, STAGES[sides.stage])
        self.reference = frozen_copy(self.head)
        self.update = Update(list(trained.values()), 5e-7)
        self.passes = FROZEN_PASSES
        # The block looks at what the projector reads.
        projector = self.llava.multi_modal_projector
        self.hook = projector.register_forward_pre_hook(self.take_features)

    def take_features(self, module, read):
        self.features = read[0]                                              # (2 · pairs, P, C)

    @torch.no_grad()
    def states(self, inputs, tokens):
        """What a head reads: hidden states that predict answer tokens, and the image."""
        hidden_states = self.llava(**inputs, use_cache=False).last_hidden_state
        return hidden_states[:, -tokens - 1:-1], self.features       # (2 · pairs, tokens, hidden)

    def step(self, inputs, tokens):
        states = self.states(inputs, tokens)
        with torch.no_grad():
            reference = answer_logps(self.reference(*states), inputs, tokens)
        self.update(answer_logps(self.head(*states), inputs, tokens), reference)

    def close(self):
        self.hook.remove()


# ---- The clock -----------------------------------------------------------------------------------


def time_peer(peer, sides, datasets, repeats):
    """Optimizer steps for every length of answers, {tokens: dataset} → (tokens, Line), as they
    come.
    """
    kind = FrozenTrunk if peer.trains == "frozen trunk" else LoRA
    for tokens, dataset in datasets.items():
        # Everything is new each time: what ran out of memory leaves gradients behind.
        trainer = kind(peer, sides)
        inputs, lengths = peer_batch(sides.ours, dataset, peer.pairs)

        def step(trainer=trainer, inputs=inputs, tokens=tokens):
            trainer.step(inputs, tokens)

        measured = attempt(step, sides.ours.device, repeats, warm_up=2)
        trainer.close()
        rows = [range(n) for n in lengths]
        line = line_of(sides.ours.config, f"{tokens} tokens: {peer.what}", measured, peer.pairs,
                       rows, trainer.passes)
        del trainer, step
        yield tokens, line
