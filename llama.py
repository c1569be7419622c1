"""The LLaMA decoder, written out, for packed rows.

A packed row is a shared prefix followed by branches: prompt + (chosen | rejected) for DPO, image + (question | question
| ...) for POPE. Every token carries two integers: `position`, counted along its own path through the row, and `branch`
(0 = prefix, 1, 2, ... = that branch, -1 = padding). One mask follows from them, `branch_mask`, and it serves training,
evaluation and decoding alike. In decoding its keys include what the cache holds, so a forward of one token is the same
case as a forward of many: building a causal mask from the input alone, which is wrong as soon as there is a cache, is
not possible here.

    hidden_states = LlamaModel(config)(inputs_embeds, position, branch)           # (B, T, hidden)
    cache = KVCache(config, batch_size, capacity, device, dtype)                  # the same, token by token:
    hidden_states = model(inputs_embeds[:, t:t + 1], position[:, t:t + 1], branch[:, t:t + 1], cache)

Follows LLaMA (arXiv 2302.13971), RoPE (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245); numbers and
parameter names are those of `LlamaModel` in huggingface/transformers. Deliberately different: positions and branches
are inputs and never derived from `input_ids`; attention is `scaled_dot_product_attention` only.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAD_BRANCH = -1


@dataclass
class LlamaConfig:
    """Sizes of the decoder; the defaults are Vicuna-7B's, the names those of a public `config.json`."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def branch_mask(query_position, query_branch, key_position, key_branch):
    """Who may look at whom: token i at token j iff j is not later, and j is in the prefix or in i's own branch.

    Inputs (B, T_query) and (B, T_key), integers; result (B, 1, T_query, T_key), True = may attend. Padding needs no
    rule of its own: its branch -1 is neither the prefix nor anybody's branch, and it sees itself, so no row of the mask
    is empty.
    """
    i_branch, j_branch = query_branch[:, :, None], key_branch[:, None, :]
    not_later = key_position[:, None, :] <= query_position[:, :, None]
    return (not_later & ((j_branch == 0) | (j_branch == i_branch)))[:, None]


class KVCache:
    """Keys and values of every layer, with the position and branch of the tokens that they belong to.

    `length` is the number of tokens held; setting it back (`cache.length = n`) forgets what came after, which is how
    several checkpoints decode from one pass over the prompt.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)                            # (L, B, H_kv, S, D)
        self.values = torch.empty_like(self.keys)
        self.position = torch.zeros(batch_size, capacity, device=device, dtype=torch.long)    # (B, S)
        self.branch = torch.full_like(self.position, PAD_BRANCH)
        self.length = 0

    def add_tokens(self, position, branch):
        """Make room for T more tokens in every layer. Returns position and branch of all tokens held, (B, S)."""
        end, capacity = self.length + position.shape[1], self.position.shape[1]
        if end > capacity:
            more = max(end - capacity, capacity // 4)           # rarely: nobody knows how long the answers will be
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.position, self.branch = F.pad(self.position, (0, more)), F.pad(self.branch, (0, more), value=PAD_BRANCH)
        self.position[:, self.length:end] = position
        self.branch[:, self.length:end] = branch
        self.length = end
        return self.position[:, :end], self.branch[:, :end]

    def add(self, layer, key, value):
        """Store the T newest tokens of one layer, (B, H_kv, T, D). Returns all that are held, (B, H_kv, S, D)."""
        start = self.length - key.shape[2]
        self.keys[layer, :, :, start:self.length] = key
        self.values[layer, :, :, start:self.length] = value
        return self.keys[layer, :, :, :self.length], self.values[layer, :, :, :self.length]


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        # In fp32, and rounded before the weight is applied, as the public implementation does.
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_embedding(position, head_dim, theta, dtype):
    """cos and sin of the rotation angles position * theta^(-2i/D), each (B, 1, T, D); RoPE, eq. 34."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position[:, None, :, None].float() * frequency                          # (B, 1, T, D/2)
    angle = torch.cat((angle, angle), -1)                                           # pairs are (i, i + D/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)        # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)     # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.add(layer, k, v)                                                   # (B, H_kv, S, D)
        grouped = self.num_heads != self.num_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)   # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embeddings in, hidden states after the final RMSNorm out. `lm_head` is not here: see model.py."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs_embeds, position, branch, cache=None):
        """(B, T, hidden) with position and branch (B, T) → (B, T, hidden). With a cache, these are its T newest."""
        keys = (position, branch) if cache is None else cache.add_tokens(position, branch)
        mask = branch_mask(position, branch, *keys)                                         # (B, 1, T, S)
        rotary = rotary_embedding(position, self.config.head_dim, self.config.rope_theta, inputs_embeds.dtype)
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache, i)
        return self.norm(x)
