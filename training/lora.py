"""LoRA (arXiv 2106.09685): LLaMA's linears stay frozen, and learn a change of low rank beside each
of them.

    y = W x + alpha / r · B A dropout(x)                                                     [eq. 3]

    add_lora(trunk.model, r=128, alpha=256, dropout=0.05)      # HA-DPO's sizes (arXiv 2311.16839)

A starts as `nn.Linear` does (Kaiming-uniform, a = sqrt 5) and B as zero, as in peft, so that the
model starts as it was. `weight` keeps its name, so a base loads and is recognised as ever; the new
tensors are called `….q_proj.lora_A.weight`, as in peft's files (checkpoints/save.py writes them).
"""
from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn

from llama import LINEARS


class Onto(nn.Linear):
    """x (n, r), onto (n, out) → onto, to which scale · W x was added by the matrix product itself:
    no other pass over memory.
    """

    def forward(self, x, onto, scale):
        return onto.addmm_(x, self.weight.T, alpha=scale)


class LoRALinear(nn.Linear):
    """A linear without bias, taken over with its weight, and its change."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **like)
        self.lora_B = Onto(r, self.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.scale, self.on = nn.Dropout(dropout), alpha / r, True

    def forward(self, x):
        if not self.on:
            return F.linear(x, self.weight)
        rows = x.flatten(0, -2)                                                        # (B · T, in)
        low = self.lora_A(self.dropout(rows))                                       # (B · T, r)
        y = self.lora_B(low, F.linear(rows, self.weight), self.scale)               # eq. 3
        return y.view(*x.shape[:-1], -1)


def add_lora(model, r, alpha, dropout):
    """Give every linear of the decoder layers of a LlamaModel its change, in place."""
    for layer in model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if name in LINEARS:
                    setattr(part, name, LoRALinear(linear, r, alpha, dropout))


@contextmanager
def without_lora(model):
    """Inside, a model is what it was before `add_lora`."""
    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for linear in linears:
        linear.on = False
    try:
        yield
    finally:
        for linear in linears:
            linear.on = True
