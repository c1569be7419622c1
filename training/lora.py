"""LoRA (arXiv 2106.09685): LLaMA's linears stay frozen, and learn a change of low rank beside each
of them.

    y = W x + alpha / r · B A dropout(x)                                                     [eq. 3]

    add_lora(trunk.model, r=128, alpha=256, dropout=0.05)      # HA-DPO's sizes (arXiv 2311.16839)

The frozen weight may be held in 4 bits: QLoRA (arXiv 2305.14314, eq. 5; support/packed.py).

A starts as `nn.Linear` does (Kaiming-uniform, a = sqrt 5) and B as zero, as in peft, so that the
model starts as it was. `weight` keeps its name, so a base loads and is recognised as ever; the new
tensors are called `….q_proj.lora_A.weight`, as in peft's files (checkpoints/save.py writes them).
"""
from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn

from llama import LINEARS
from support.packed import PackedLinear


class Onto(nn.Linear):
    """x (n, r), onto (n, out) → onto, to which scale · W x was added by the matrix product itself:
    no other pass over memory.
    """

    def forward(self, x, onto, scale):
        return onto.addmm_(x, self.weight.T, alpha=scale)


class LoRALinear(nn.Linear):
    """A linear without bias, taken over with its weight, and its change. `like`: a tensor on the
    device and of the dtype that the change is to have.
    """

    def __init__(self, linear, r, alpha, dropout, like):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.packed = linear if isinstance(linear, PackedLinear) else None      # QLoRA's 4 bits
        self.weight = None if self.packed else linear.weight
        like = {"device": like.device, "dtype": like.dtype}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **like)
        self.lora_B = Onto(r, self.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.scale, self.on = nn.Dropout(dropout), alpha / r, True

    def frozen(self, x):
        return self.packed(x) if self.packed else F.linear(x, self.weight)

    def forward(self, x):
        if not self.on:
            return self.frozen(x)
        rows = x.flatten(0, -2)                                                        # (B · T, in)
        low = self.lora_A(self.dropout(rows))                                       # (B · T, r)
        y = self.lora_B(low, self.frozen(rows), self.scale)                         # eq. 3
        return y.view(*x.shape[:-1], -1)


def add_lora(model, r, alpha, dropout):
    """Give every linear of the decoder layers of a LlamaModel its change, in place."""
    for layer in model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if name in LINEARS:
                    like = layer.input_layernorm.weight
                    setattr(part, name, LoRALinear(linear, r, alpha, dropout, like))


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
