"""Linears whose frozen weight is held in 4 or 8 bits, and their products.

    linear = PackedLinear(packed(weight, 4))         # weight (out, in); also for gradients
    y = linear(x)                                    # x (..., in) → (..., out)

Four bits are NF4 (nf4.py). Eight are LLM.int8's vector-wise rows (arXiv 2208.07339, section 2.1):
each row of a weight keeps its largest magnitude, and whole numbers up to 127. The weight is made
whole again for every product, in the dtype of x, once for all rows of x, and again in the backward
pass, so that between the two only the bits are held. Deliberately different from LLM.int8: x stays
as it is, so nothing needs its decomposition of outliers, and no product is faster than in 16 bits.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from support.nf4 import NF4


@dataclass
class Int8:
    """A weight in eight bits: W ~ codes · absmax / 127, row by row."""
    codes: torch.Tensor             # (out, in) int8
    absmax: torch.Tensor            # (out,) fp32
    shape: tuple

    bits = 8
    TENSORS = "codes", "absmax"

    @staticmethod
    def quantised(weight):
        absmax = weight.abs().amax(1).float()
        scale = 127 / absmax.clamp(min=1e-38)
        return Int8((weight * scale[:, None]).round().to(torch.int8), absmax, tuple(weight.shape))

    def scales(self):
        return self.absmax

    def dequantised(self, dtype):
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        return torch.mul(self.codes, (self.absmax / 127)[:, None], out=weight)


def packed(weight, bits):
    """A weight (out, in) in 4 or 8 bits: NF4 or Int8."""
    return (NF4 if bits == 4 else Int8).quantised(weight)


class Product(torch.autograd.Function):
    """x W^T of a frozen W that is held in few bits; the gradient of x is that of y times W."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, weight.dequantised(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.dequantised(gradient.dtype), None


class PackedLinear(nn.Module):
    """A linear without bias. It has no parameters: nothing of it is trained, rounded to another
    dtype or divided among GPUs.
    """

    def __init__(self, weight):
        super().__init__()
        self.packed = weight
        self.out_features, self.in_features = weight.shape

    def forward(self, x):
        return Product.apply(x, self.packed)

    def _apply(self, fn, recurse=True):
        # Only the device may change: as bytes, scales keep their 32 bits in model.to(bf16).
        moved = {name: fn(tensor.view(torch.uint8)).view(tensor.dtype)
                 for name in self.packed.TENSORS
                 if (tensor := getattr(self.packed, name)) is not None}
        self.packed = replace(self.packed, **moved)
        return super()._apply(fn, recurse)
