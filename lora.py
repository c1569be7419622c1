"""LoRA (arXiv 2106.09685): LLaMA's linears stay frozen, and learn a change of low rank beside each of them.

    y = W x + alpha / r · B A dropout(x)                                                                       [eq. 3]

    add_lora(trunk.model, r=128, alpha=256, dropout=0.05)     # before the optimizer; HA-DPO's sizes (arXiv 2311.16839)

A starts as `nn.Linear` does (Kaiming-uniform, a = sqrt 5) and B as zero, as in peft, so that the model starts as it was.
`weight` keeps its name, so a base loads and is recognised as ever; the new tensors are called `….q_proj.lora_A.weight`,
as in peft's files (checkpoint.py writes them).
"""
import torch
import torch.nn.functional as F
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # all of a decoder layer's


class Onto(nn.Linear):
    """x, onto → onto + scale · W x, as one matrix product that adds: no pass over memory for the scale, nor for the sum."""

    def forward(self, x, onto, scale):
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), self.weight.T, alpha=scale).view_as(onto)


class LoRALinear(nn.Linear):
    """A linear without bias, taken over with its weight, and its change."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **like)
        self.lora_B = Onto(r, self.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.scale = nn.Dropout(dropout), alpha / r

    def forward(self, x):
        return self.lora_B(self.lora_A(self.dropout(x)), F.linear(x, self.weight), self.scale)      # eq. 3


def add_lora(model, r, alpha, dropout):
    """Give every linear of the decoder layers of a LlamaModel its change, in place."""
    for layer in model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if name in LINEARS:
                    setattr(part, name, LoRALinear(linear, r, alpha, dropout))
