"""The post-interaction block: a second look at the image, in front of `lm_head`.

    h   = LLaMA's hidden states after the final norm    (B, T, hidden)
    F   = CLIP patch features, before the projector      (B, P, mm_hidden)
    f   = LayerNorm(align(F))                            align = Linear → GELU(erf) → Linear [eq. 1]
    a   = h + Attention(q = LN1(h), kv = f)              no biases, no mask, scale 1/√D      [eq. 2]
    b   = a + W2 SiLU(W1 LN2(a))                                                             [eq. 3]
    out = b (+ h with `outer_residual`)                                                      [eq. 4]

LLaMA has read the image only through the projector. What the projector lost, or what the decoder
forgot because it knows too well what usually stands beside what, can be asked for again here. The
block is small and everything before it stays frozen, so training it needs one pass over the data
and no second model.

The block and its ablations are those of the training notes that this project started from (their
files hold it as `post_interaction_block.*`). Our default differs in two ways. It starts as the
identity (zero `out_proj` and `mlp.fc2`, no outer residual), so policy = reference at step 0; the
original adds h once more, which doubles h at the start. And blocks are chained when `depth` > 1;
the original feeds h to every one of them.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = {  # how the notes' tables call them → what changes in BlockConfig
    "full": {},
    "align_linear": {"align": "linear"},
    "no_cross_attn": {"attention": "none"},
    "self_attn": {"attention": "self"},                                   # "TransformerBlock"
    "align_after_align": {"image_source": "projector"},                   # "mlp after mlp"
    "no_cross_attn_v2": {"image_source": "projector", "attention": "none"},
}
ORIGINAL = {"outer_residual": True, "zero_init": False}     # the notes' own form of "full"


@dataclass
class BlockConfig:
    """Shape of the block. Sizes default to LLaVA-1.5-7B's."""
    hidden_size: int = 4096
    mm_hidden_size: int = 1024        # width of the features that `align` reads
    intermediate_size: int = 11008    # inner width of `align` and of the block's MLP
    num_attention_heads: int = 32
    layer_norm_eps: float = 1e-5
    depth: int = 1
    attention: str = "cross"          # cross: to the image | self: causal, over h | none
    align: str = "mlp"                # mlp | linear
    image_source: str = "clip"        # clip: the tower's features | projector: what LLaMA was given
    outer_residual: bool = False      # the original's form
    zero_init: bool = True            # start as the identity


class Align(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size if config.align == "mlp" else config.hidden_size
        self.fc1 = nn.Linear(config.mm_hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size) if config.align == "mlp" else None

    def forward(self, x):
        x = self.fc1(x)
        return x if self.fc2 is None else self.fc2(F.gelu(x))


class BlockAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                # (B, H, T|S, D)

    def forward(self, query, context, mask=None, wanted=None):
        q = self.q_proj(query)                                                      # (B, T, hidden)
        if wanted is not None:
            q = at_their_places(q, wanted)
        q = self.split(q)                                                           # (B, H, T, D)
        k, v = self.split(self.k_proj(context)), self.split(self.v_proj(context))   # (B, H, S, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)                                        # (B, T, hidden)
        return self.out_proj(out if wanted is None else out[wanted])

    def weights(self, query, context, mask):
        """softmax(q kᵀ / √D), in fp32, (B, H, T, S): `forward` never shows it."""
        q, k = self.split(self.q_proj(query)).float(), self.split(self.k_proj(context)).float()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1)


def at_their_places(x, wanted):
    """The inverse of y[wanted]: x (n, C) and wanted (B, T) → y (B, T, C), with zeros elsewhere."""
    y = x.new_zeros(*wanted.shape, x.shape[-1])
    y[wanted] = x
    return y


class BlockMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if config.attention == "cross":
            self.cross_attn = BlockAttention(config)
        elif config.attention == "self":
            self.self_attn = BlockAttention(config)
        if config.attention != "none":
            self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = BlockMLP(config)
        self.attention = config.attention
        if config.zero_init:
            nn.init.zeros_(self.mlp.fc2.weight)
            if config.attention != "none":
                nn.init.zeros_(getattr(self, f"{config.attention}_attn").out_proj.weight)

    def forward(self, h, context, mask=None, wanted=None):
        if self.attention == "none":
            return h + self.mlp(self.layer_norm1(h))
        if self.attention == "cross":
            a = h + self.cross_attn(self.layer_norm1(h), context, mask=mask, wanted=wanted)  # eq. 2
        else:
            a = h + self.self_attn(self.layer_norm1(h), self.layer_norm1(context), mask, wanted)
        return a + self.mlp(self.layer_norm2(a))                                             # eq. 3


class PostInteractionBlock(nn.Module):
    """See the module docstring. Parameter names are those of the notes' files.

    `forward(h, context, mask=None, wanted=None)`: h (B, T, hidden) are the positions asked for.
    `context` is what they look at. For cross-attention it is the image features (B, P, mm_hidden),
    with a `mask` (B, 1, 1, P) where images have different numbers of tiles;
    for self-attention all hidden states of the rows (B, S, hidden), with `mask` (B, 1, T, S) from
    `llama.branch_mask`; without attention it is not used. With `wanted` (B, T), rows are of
    different lengths: h is (n, hidden), the n positions where `wanted` is true, and only
    attention computes the others too.
    """

    def __init__(self, config):
        super().__init__()
        if config.attention == "self" and config.depth > 1:
            raise ValueError("self-attention needs the previous block's output at every position: "
                             "use depth 1")
        self.config = config
        if config.attention == "cross":
            self.align = Align(config)
            self.image_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def is_identity(self):
        """Whether the output is h whatever the image, as at the start of training."""
        last = ("out_proj.weight", "fc2.weight")
        written = [weight for name, weight in self.blocks.named_parameters() if name.endswith(last)]
        return not self.config.outer_residual and not any(weight.any() for weight in written)

    def forward(self, h, context, mask=None, wanted=None):
        context = self.aligned(context)
        out = h
        for block in self.blocks:
            out = block(out, context, mask, wanted)
        return out + h if self.config.outer_residual else out                                # eq. 4

    def aligned(self, context):
        if self.config.attention != "cross":
            return context
        return self.image_norm(self.align(context))                                         # eq. 1

    def attention_weights(self, h, context, mask=None):
        """Where cross-attention looks: (B, T, hidden), (B, P, mm_hidden) → (B, depth · H, T, P)."""
        context, weights = self.aligned(context), []
        for block in self.blocks:
            weights.append(block.cross_attn.weights(block.layer_norm1(h), context, mask))
            h = block(h, context, mask)
        return torch.cat(weights, 1)
