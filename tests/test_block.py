"""The post-interaction block against a transcription of its four equations, for every ablation.

The transcription shares no code with post_decoder.py: heads are looped over, softmax and GELU are
written out.
"""
import math

import pytest
import torch
from conftest import largest_difference, shake, small_config

from llama import branch_mask
from model import LlavaConfig
from post_decoder import VARIANTS, PostInteractionBlock

B, T, P = 2, 7, 9


def normed(x, w, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(query, context, w, name, heads, causal):
    q = query @ w[f"{name}.q_proj.weight"].T
    k = context @ w[f"{name}.k_proj.weight"].T
    v = context @ w[f"{name}.v_proj.weight"].T
    out, D = [], q.shape[-1] // heads
    for part in (slice(n * D, n * D + D) for n in range(heads)):
        scores = q[..., part] @ k[..., part].mT * D ** -0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        e = (scores - scores.max(-1, keepdim=True).values).exp()
        out.append(e / e.sum(-1, keepdim=True) @ v[..., part])
    return torch.cat(out, -1) @ w[f"{name}.out_proj.weight"].T


def mlp(x, w, name):
    x = x @ w[f"{name}.fc1.weight"].T
    return (x / (1 + (-x).exp())) @ w[f"{name}.fc2.weight"].T


def transcription(w, h, F, config):
    if config.attention == "cross":
        F = F @ w["align.fc1.weight"].T + w["align.fc1.bias"]
        if config.align == "mlp":
            F = F / 2 * (1 + torch.erf(F / 2 ** 0.5))
            F = F @ w["align.fc2.weight"].T + w["align.fc2.bias"]
        F = normed(F, w, "image_norm")                                                         # f
    out = h
    for name in (f"blocks.{n}" for n in range(config.depth)):
        x = normed(out, w, f"{name}.layer_norm1")
        if config.attention == "none":
            out = out + mlp(x, w, f"{name}.mlp")
            continue
        context = F if config.attention == "cross" else x
        kind, causal = f"{name}.{config.attention}_attn", config.attention == "self"
        a = out + attention(x, context, w, kind, config.num_attention_heads, causal)
        out = a + mlp(normed(a, w, f"{name}.layer_norm2"), w, f"{name}.mlp")                   # b
    return out + h if config.outer_residual else out


CASES = [(variant, depth, outer)
         for variant in VARIANTS for depth in (1, 2) for outer in (False, True)
         if depth == 1 or variant != "self_attn"]


def make(variant, depth, outer, zero_init):
    """A block; h (B, T, hidden) and F (B, P, C); and what the block is called with."""
    torch.manual_seed(0)
    block = PostInteractionBlock(small_config().block_config(
        **VARIANTS[variant], depth=depth, outer_residual=outer, zero_init=zero_init))
    h = torch.randn(B, T, block.config.hidden_size)
    F = torch.randn(B, P, block.config.mm_hidden_size)
    position, branch = torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.long)
    if block.config.attention == "self":
        return block, h, F, (h, h, branch_mask(position, branch, position, branch))
    return block, h, F, (h, F)


@pytest.mark.parametrize("variant, depth, outer", CASES)
def test_equations(variant, depth, outer):
    block, h, F, inputs = make(variant, depth, outer, zero_init=False)
    shake(block)
    expected = transcription(block.state_dict(), h, F, block.config)
    assert (expected - h).abs().mean() > 0.1                                     # it does something
    what = f"{variant}, depth {depth}, outer residual {outer}"
    assert largest_difference(what, block(*inputs), expected) < 1e-5


@pytest.mark.parametrize("variant, depth, outer", CASES)
def test_starts_as_the_identity(variant, depth, outer):
    """Bit by bit h (2h in the original's form), and yet the zeroed matrices have a gradient."""
    block, h, F, inputs = make(variant, depth, outer, zero_init=True)
    out = block(*inputs)
    assert torch.equal(out, 2 * h if outer else h)
    out.square().sum().backward()
    zeroed = {name: p for name, p in block.named_parameters() if not p.any() and p.dim() == 2}
    assert len(zeroed) == depth * (1 if block.config.attention == "none" else 2)
    assert all(p.grad.abs().max() > 1e-3 for p in zeroed.values())


@pytest.mark.parametrize("variant, depth, outer", CASES)
def test_only_where_it_is_wanted(variant, depth, outer):
    """Rows of different lengths: the positions that are wanted get the same numbers, and the
    parameters the same gradients, whatever stands at the others."""
    block, h, _, (_, *seen) = make(variant, depth, outer, zero_init=False)
    shake(block)
    wanted = torch.arange(T) < torch.tensor([[T], [3]])                                     # (B, T)
    block.requires_grad_()
    h.requires_grad_()
    expected, parameters = block(h, *seen)[wanted], [h, *block.parameters()]
    seen = [*seen, None][:2]
    out = block(h[wanted], *seen, wanted=wanted)
    assert largest_difference("values", out, expected) < 1e-5
    gradients = [torch.autograd.grad(x.square().sum(), parameters) for x in (out, expected)]
    for one, other in zip(*gradients, strict=True):
        assert largest_difference("gradients", one, other) < 1e-4 * float(other.abs().max())


@pytest.mark.parametrize("variant, depth", [("full", 1), ("full", 2), ("align_linear", 1),
                                            ("align_after_align", 2)])
def test_attention_weights(variant, depth):
    """They are those that the block itself uses: with its values and output projection they give
    what its attention gives.
    """
    block, h, F, _ = make(variant, depth, outer=False, zero_init=False)
    shake(block)
    weights, used = block.attention_weights(h, F), []

    def keep(module, inputs, out):
        used.append((module, *inputs, out))

    for part in block.blocks:
        part.cross_attn.register_forward_hook(keep)
    block(h, F)
    heads = block.config.num_attention_heads
    assert weights.shape == (B, depth * heads, T, P) and len(used) == depth
    assert largest_difference("sums", weights.sum(-1), torch.ones(B, depth * heads, T)) < 1e-6
    assert weights.std(-1).mean() > 0.01                                 # it prefers some patches
    for n, (module, query, context, out) in enumerate(used):
        v = module.v_proj(context).view(B, P, heads, -1)
        mine = weights[:, n * heads:(n + 1) * heads]
        ours = torch.einsum("bhtp,bphd->bthd", mine, v).reshape(query.shape)
        ours = ours @ module.out_proj.weight.T
        assert largest_difference(f"{variant}, block {n}", ours, out) < 1e-5


def test_names_are_those_of_the_notes_files():
    block, *_ = make("full", 1, True, zero_init=False)
    with_bias = ("align.fc1", "align.fc2", "image_norm", "blocks.0.layer_norm1",
                 "blocks.0.layer_norm2")
    expected = {f"{name}.{kind}" for name in with_bias for kind in ("weight", "bias")}
    expected |= {f"blocks.0.cross_attn.{x}_proj.weight" for x in ("q", "k", "v", "out")}
    expected |= {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"}
    assert set(block.state_dict()) == expected


def test_sizes_of_the_7b_model_are_the_defaults():
    """The shapes that the notes' files have."""
    config = LlavaConfig().block_config()
    with torch.device("meta"):
        block = PostInteractionBlock(config)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes["align.fc1.weight"] == (11008, 1024)
    assert shapes["align.fc2.weight"] == (4096, 11008)
    assert shapes["blocks.0.cross_attn.q_proj.weight"] == (4096, 4096)
    assert shapes["blocks.0.mlp.fc1.weight"] == (11008, 4096)
    assert config.num_attention_heads == 32
