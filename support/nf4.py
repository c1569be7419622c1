"""NF4: a frozen weight in four bits and an eighth, in plain PyTorch.

    packed = NF4.quantised(weight)              # (out, in) in 16 or 32 bits → a quarter of 16 bits
    weight = packed.dequantised(torch.bfloat16)

A block of 64 numbers keeps its largest magnitude, absmax, and each number x the index of the
nearest of 16 quantiles q of a normal distribution:

    c = argmin_i |q_i - x / absmax|,    x ~ q_c · absmax                     [QLoRA, eq. 4 and 1, 2]

The absmax of all blocks less their mean are quantised in their turn, in blocks of 256, each to the
nearest of 256 values of a dynamic data type: double quantisation [QLoRA, section 3].

Follows QLoRA (arXiv 2305.14314) and bitsandbytes, whose codes, scales and dequantised weights these
are to the last bit; checkpoints/quantised.py reads and writes its files. Deliberately different:
weights go straight to the dtype of the product, where bitsandbytes first rounds them to that of the
file; a weight is quantised piece by piece, which needs little memory beyond it.
"""
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.nn.functional as F

BLOCK, NESTED_BLOCK = 64, 256
PIECE = 2 ** 22                 # numbers that are quantised at once: 16 MiB in fp32
# QLoRA, eq. 4: midpoints between quantiles of N(0, 1), eight below zero and nine from zero on, over
# the largest. To all digits that bitsandbytes has.
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


@cache
def quantiles(device):
    return torch.tensor(QUANTILES, device=device)


@cache
def pairs(device):
    """The two quantiles of each of the 256 bytes, as one number of 8 bytes each: (256,)."""
    byte = torch.arange(256, device=device)
    both = torch.stack((quantiles(device)[byte >> 4], quantiles(device)[byte & 15]), -1)
    return both.view(torch.int64).flatten()


@cache
def dynamic_values(device):
    """The 256 values of the dynamic data type, in order (arXiv 1511.04561, figure 2): seven powers
    of ten, each with twice as many fractions as the one below it, of both signs; 0 and 1.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1)
        fractions = 10.0 ** exponent * ((edges[:-1] + edges[1:]) / 2)
        values += [fractions, -fractions]
    return torch.cat(values).sort().values.to(device)


def blocks_of(x, size):
    """x (n,) → (blocks, size), with zeros behind the last number, and how many these are."""
    missing = -len(x) % size
    return F.pad(x, (0, missing)).view(-1, size), missing


def nearest(x, size, values):
    """x (n,) in blocks → the index of the nearest of sorted `values` for each x over the largest
    magnitude of its block, (n + zeros behind it,), and these magnitudes (blocks,) in fp32.
    """
    rows, missing = blocks_of(x, size)
    bounds, codes, largest = (values[:-1] + values[1:]) / 2, [], []
    for piece in rows.split(PIECE // size):
        piece = piece.float()
        largest.append(piece.abs().amax(1))
        small = (piece * (1 / largest[-1].clamp(min=1e-38))[:, None]).clamp(-1, 1)
        codes.append(torch.bucketize(small, bounds, out_int32=True).to(torch.uint8))
    if missing:             # there bitsandbytes divides
        last = rows[-1].float() / largest[-1][-1].clamp(min=1e-38)
        codes[-1][-1] = torch.bucketize(last, bounds)
    return torch.cat(codes).flatten(), torch.cat(largest)


@dataclass
class NF4:
    """A weight in four bits: what bitsandbytes calls a weight and its QuantState."""
    codes: torch.Tensor             # (n / 2, 1) uint8: two codes a byte, the first in the high bits
    absmax: torch.Tensor            # (blocks,) uint8; fp32 where it is not quantised in its turn
    nested_absmax: torch.Tensor     # (blocks / 256,) fp32, or None
    offset: float                   # the mean of all absmax, or None
    shape: tuple                    # of the weight
    dtype: torch.dtype              # of the weight that was quantised

    bits = 4
    TENSORS = "codes", "absmax", "nested_absmax"

    @staticmethod
    def quantised(weight):
        """A weight of any shape → NF4. Not finite values make an absmax that is not finite."""
        codes, absmax = nearest(weight.flatten(), BLOCK, quantiles(weight.device))  # QLoRA, eq. 1
        codes = (codes[::2] << 4 | codes[1::2])[:(weight.numel() + 1) // 2, None]

        # Double quantisation.
        offset = absmax.mean()
        small, nested = nearest(absmax - offset, NESTED_BLOCK, dynamic_values(weight.device))
        return NF4(codes, small[:len(absmax)], nested, offset.item(), tuple(weight.shape),
                   weight.dtype)

    def scales(self):
        """absmax of every block in fp32, (blocks,)."""
        if self.nested_absmax is None:
            return self.absmax
        small = dynamic_values(self.absmax.device).index_select(0, self.absmax.int())
        nested, surplus = blocks_of(small, NESTED_BLOCK)
        scales = (nested * self.nested_absmax[:, None]).flatten() + self.offset
        return scales[:len(scales) - surplus]

    def dequantised(self, dtype):
        """q_c · absmax in `dtype`, rounded once."""
        numbers = pairs(self.codes.device).index_select(0, self.codes.flatten().int())   # (n / 2,)
        rows, _ = blocks_of(numbers.view(torch.float32), BLOCK)                     # (blocks, 64)
        weight = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        torch.mul(rows, self.scales()[:, None], out=weight)                         # QLoRA, eq. 2
        return weight.flatten()[:prod(self.shape)].view(self.shape)
