"""NF4 and int8 against bitsandbytes, which shares no code with them, and against hand-made numbers.

bitsandbytes has two ways to quantise on a CPU: its reference in Python, of which its CUDA kernels
give the same, and a library whose search for the nearest of 256 values is only nearly right. Codes
and scales are compared with the reference.
"""
import pytest
import torch
from torch import nn

from support.nf4 import NF4, QUANTILES, dynamic_values, quantiles
from support.packed import Int8, PackedLinear, packed

CPU = torch.device("cpu")
# Rows of whole blocks, blocks across rows, more scales than one block of them, ends that are cut.
SHAPES = (64, 64), (56, 32), (100, 33), (1100, 256), (300, 192)
DTYPES = torch.float32, torch.bfloat16, torch.float16


def random_weight(shape, dtype=torch.float32):
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0                                                   # a block of zeros
    return weight.to(dtype)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def reference(name, *args):
    """What bitsandbytes' reference in Python makes of these arguments."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return getattr(torch.ops.bitsandbytes, name).default._op_dk(key, *args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes(bnb, shape, dtype):
    weight = random_weight(shape, dtype)
    ours = NF4.quantised(weight)
    codes, absmax = reference("quantize_4bit", weight, 64, "nf4", torch.uint8)
    offset = absmax.mean()
    values = bnb.create_dynamic_map()
    nested, nested_absmax = reference("quantize_blockwise", absmax - offset, values, 256)
    assert torch.equal(ours.codes, codes) and ours.offset == offset.item()
    assert torch.equal(ours.absmax, nested)
    assert torch.equal(ours.nested_absmax, nested_absmax)

    # What a user calls. Its library puts some absmax beside the nearest value.
    public, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True,
                                      quant_type="nf4")
    assert torch.equal(ours.codes, public) and ours.offset == state.offset.item()
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1
    assert (ours.absmax != state.absmax).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_weights_are_those_of_bitsandbytes(bnb, dtype):
    """Its kernel for the CPU takes rows for whole blocks, so these are."""
    weight = random_weight((1100, 256), dtype)
    for nested in True, False:
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested,
                                         quant_type="nf4")
        inner = (state.state2.absmax, state.offset.item()) if nested else (None, None)
        ours = NF4(codes, state.absmax, *inner, (1100, 256), dtype)
        assert torch.equal(ours.dequantised(dtype), bnb.dequantize_4bit(codes, state))


def test_tables_are_those_of_bitsandbytes(bnb):
    assert torch.equal(dynamic_values(CPU), bnb.create_dynamic_map())
    assert torch.equal(quantiles(CPU), bnb.get_4bit_type("nf4", device="cpu"))


def test_quantiles_are_those_of_the_normal_distribution():
    """QLoRA, eq. 4: midpoints in probability, from 1 / 2 (1 / 32 + 1 / 30) on."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    below = normal.icdf(torch.linspace(1 - end, 0.5, 8, dtype=torch.float64))
    above = normal.icdf(torch.linspace(0.5, end, 9, dtype=torch.float64))[1:]
    expected = torch.cat((below, above)) / above.max()
    assert (expected - torch.tensor(QUANTILES)).abs().max() < 1e-6


def test_by_hand():
    weight = torch.zeros(64)
    weight[:4] = torch.tensor([2.0, -2.0, 0.33, -1.2])          # 1, -1, 0.165, -0.6 of absmax
    ours = NF4.quantised(weight)
    assert ours.codes[:2, 0].tolist() == [15 * 16 + 0, 9 * 16 + 2] and ours.codes[2] == 7 * 16 + 7
    expected = [2.0, -2.0, 2 * QUANTILES[9], 2 * QUANTILES[2]]
    assert ours.dequantised(torch.float32)[:4].tolist() == pytest.approx(expected)
    assert not ours.dequantised(torch.float32)[4:].any()


def test_rounding_of_a_normal_weight():
    """Its share of a normal weight, and the bits that hold a number: QLoRA, section 3."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    for bits, low, high in (4, 0.085, 0.1), (8, 0.005, 0.01):
        error = packed(weight, bits).dequantised(torch.float32) - weight
        assert low < (error.norm() / weight.norm()).item() < high
    ours = packed(weight, 4)
    held = sum(getattr(ours, name).nbytes for name in ours.TENSORS)
    assert 8 * held / weight.numel() == pytest.approx(4.127, abs=0.001)


def test_int8_rows_are_those_of_bitsandbytes(bnb):
    weight = random_weight((300, 192))
    ours = Int8.quantised(weight)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(ours.codes[1:], codes[1:]) and torch.equal(ours.absmax, absmax)
    assert not ours.codes[0].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_products_and_their_gradients(bits):
    """Those of a linear with the weight as it comes back, to the last bit; only bits are kept."""
    linear = PackedLinear(packed(random_weight((96, 64)), bits))
    whole = nn.Linear(64, 96, bias=False)
    whole.weight = nn.Parameter(linear.packed.dequantised(torch.float32))
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for module in linear, whole:
        inputs = x.clone().requires_grad_(True)
        y = module(inputs)
        y.square().sum().backward()
        gradients.append((y.detach(), inputs.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_another_dtype_leaves_the_bits_alone(bits):
    linear = PackedLinear(packed(random_weight((96, 64)), bits))
    before = linear.packed.dequantised(torch.float32)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.packed.dequantised(torch.float32), before)
    assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert linear.to("meta").packed.codes.is_meta
