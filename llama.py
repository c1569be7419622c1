"""The LLaMA decoder, written out, for packed rows.

A packed row is a shared prefix followed by branches: prompt + (chosen | rejected) for DPO, image +
(question | question | ...) for POPE. Every token carries two integers: `position`, counted along
its own path through the row, and `branch` (0 = prefix, 1, 2, ... = that branch, -1 = padding). One
mask follows from them, `branch_mask`, and it serves training, evaluation and decoding alike. In
decoding its keys include what the cache holds, so a forward of one token is the same case as a
forward of many. A causal mask made from the input alone is wrong as soon as there is a cache; here
nobody can make one.

In VoCo-LLaMA (arXiv 2406.12275) a few <voco> tokens compress an image: they see it, and the text
behind them sees only them. Two more branches say so.

    hidden_states = LlamaModel(config)(inputs_embeds, position, branch)           # (B, T, hidden)
    cache = KVCache(config, batch_size, capacity, device, dtype)         # the same, token by token
    hidden_states = model(embeds[:, t:t + 1], position[:, t:t + 1], branch[:, t:t + 1], cache)

Follows LLaMA (arXiv 2302.13971), RoPE (arXiv 2104.09864), grouped-query attention (arXiv
2305.13245); numbers and parameter names are those of `LlamaModel` in huggingface/transformers.
Deliberately different: positions and branches are inputs and never derived from `input_ids`;
attention is `scaled_dot_product_attention` only.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAD_BRANCH = -1
BEFORE_VOCO, VOCO = -2, -3      # branches of a prefix with <voco> tokens: what they hide, and they
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LlamaConfig:
    """Sizes of the decoder. Defaults: Vicuna-7B. Names: those of a public `config.json`."""
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
    """Token i may look at token j iff j is not later, and j is in the prefix or in i's own branch.
    <voco> tokens are in the prefix, and see also what they hide from all others.

    Inputs (B, T_query) and (B, T_key), integers; result (B, 1, T_query, T_key), True = may attend.
    Padding needs no rule of its own: its branch -1 is neither the prefix nor anybody's branch, and
    it sees itself, so no row of the mask is empty.
    """
    i_branch, j_branch = query_branch[:, :, None], key_branch[:, None, :]
    not_later = key_position[:, None, :] <= query_position[:, :, None]
    in_prefix = (j_branch == 0) | (j_branch == VOCO)
    hidden = (j_branch == BEFORE_VOCO) & (i_branch == VOCO)
    return (not_later & (in_prefix | hidden | (j_branch == i_branch)))[:, None]


def plain_length(branch):
    """How many columns of rows (B, T) lie before every branch, where the mask is plainly causal.
    It is so up to the last <voco> token, too.

    Padding stands behind its row, so no token of the row looks at it there either.
    """
    behind_hidden = (branch == BEFORE_VOCO).cumsum(1).bool() & (branch > BEFORE_VOCO)       # (B, T)
    masked = ((branch > 0) | behind_hidden).any(0)                                            # (T,)
    return int(torch.cat((masked, masked.new_ones(1))).int().argmax())


class KVCache:
    """Keys and values of every layer, a column per token, with the token's position and branch.

    `length` columns are in use; the others count as padding. `cache.length = n` forgets what came
    after column n, so several checkpoints can decode from one pass over the prompt. The device
    itself knows where the newest tokens stand (`columns`), and attention reads all columns, so a
    GPU can record one step of decoding and replay it.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        capacity = -(-capacity // 8) * 8             # attention with a mask is fastest in eights
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity,
                 config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)              # (L, B, H_kv, S, D)
        self.values = torch.zeros_like(self.keys)
        self.position = torch.zeros(batch_size, capacity, device=device, dtype=torch.long)  # (B, S)
        self.branch = torch.full_like(self.position, PAD_BRANCH)
        self.columns = torch.empty(0, device=device, dtype=torch.long)   # (T,) of the newest tokens
        self._end = torch.zeros((), device=device, dtype=torch.long)
        self._length = 0

    @property
    def capacity(self):
        return self.position.shape[1]

    @property
    def length(self):
        return self._length

    @length.setter
    def length(self, length):
        self._length = length
        self._end.fill_(length)
        self.branch[:, length:] = PAD_BRANCH

    def reserve(self, tokens):
        """Make room for that many more tokens → whether the cache had to grow.

        It grows by more than asked for, because nobody knows how long the answers will be.
        """
        missing = self._length + tokens - self.capacity
        if missing > 0:
            more = -(-max(missing, self.capacity // 4) // 8) * 8
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.position = F.pad(self.position, (0, more))
            self.branch = F.pad(self.branch, (0, more), value=PAD_BRANCH)
        return missing > 0

    def add_tokens(self, position, branch):
        """Take in T more tokens, (B, T) → position and branch of all that they may see, (B, S)."""
        T, first = position.shape[1], self._length == 0
        self.reserve(T)
        self.columns = self._end + torch.arange(T, device=position.device)
        self.position.index_copy_(1, self.columns, position)
        self.branch.index_copy_(1, self.columns, branch)
        self._end += T
        self._length += T
        return (position, branch) if first else (self.position, self.branch)

    def begin(self, kept, position):
        """Begin with <voco> tokens that another pass has kept: keys and values (2, L, B, H_kv, V,
        D), positions (B, V)."""
        self.add_tokens(position, torch.full_like(position, VOCO))
        self.keys[:, :, :, self.columns], self.values[:, :, :, self.columns] = kept

    def add(self, layer, key, value):
        """One layer of the T newest tokens, (B, H_kv, T, D) → all they may see, (B, H_kv, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        as_words(keys).index_copy_(2, self.columns, as_words(key))
        as_words(values).index_copy_(2, self.columns, as_words(value))
        return (key, value) if self._length == key.shape[2] else (keys, values)


def rows_at_once(config, tokens, parameter):
    """How many rows of that many tokens are decoded together: what a GPU has memory for, up to
    64.
    """
    if not parameter.is_cuda:
        return 16
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim   # per token
    passing = 8 * config.hidden_size + 4 * config.intermediate_size
    free, _ = torch.cuda.mem_get_info(parameter.device)
    return max(1, min(64, int(0.8 * free / (tokens * (kept + passing) * parameter.itemsize))))


def as_words(x):
    """The same memory in numbers of 8 bytes, where they fit: a GPU moves those faster than 2."""
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        # torch's kernel works in fp32 and rounds once, behind the weight. The public
        # implementation rounds before the weight too.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_embedding(position, head_dim, theta, dtype):
    """cos and sin of the rotation angles position * theta^(-2i/D), each (B, T, 1, D); RoPE, eq. 34.

    Pairs are (i, i + D/2); the sign that the first of a pair has is in sin.
    """
    even = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)        # 2i
    frequency = theta ** (-even / head_dim)                                         # (D/2,)
    angle = position[:, :, None, None].float() * frequency                          # (B, T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x, cos, sin):
    """x (B, T, H, D) → the same, rotated by position; RoPE, eq. 34.

    A GPU spends its time here on reading and writing memory, so this takes few kernels.
    """
    halves = x.unflatten(-1, (2, -1))                                          # (B, T, H, 2, D/2)
    if x.requires_grad:
        swapped = halves.flip(-2)
    else:
        swapped = as_words(halves).flip(-2).view(x.dtype)         # as words it would lose gradients
    return torch.addcmul(x * cos, swapped.flatten(-2), sin)


def attend(q, k, v, bias, plain):
    """softmax(q k^T / sqrt(D) + bias) v, eq. 1 of arXiv 1706.03762.

    q (B, H, T, D), k and v (B, H_kv, S, D) → (B, T, H, D). The first `plain` queries are causal
    over the first `plain` keys; `bias` (B, 1, T - plain, S) rules the others. So the prefix, which
    is most of a row, takes the fast kernel without a mask, and a row without branches needs no
    mask at all.
    """
    grouped = q.shape[1] != k.shape[1]
    parts = []
    if plain:
        first = (x[:, :, :plain] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*first, is_causal=True, enable_gqa=grouped))
    if plain < q.shape[2]:
        parts.append(F.scaled_dot_product_attention(q[:, :, plain:], k, v, attn_mask=bias,
                                                    enable_gqa=grouped))
    parts = [part.transpose(1, 2) for part in parts]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary, bias, plain, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(q, *rotary).transpose(1, 2)                                    # (B, H, T, D)
        k = rotate(k, *rotary).transpose(1, 2)                                    # (B, H_kv, T, D)
        if cache is not None:
            k, v = cache.add(layer, k, v)                                          # (B, H_kv, S, D)
        return self.o_proj(attend(q, k, v, bias, plain).flatten(2))


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

    def forward(self, x, rotary, bias, plain, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rotary, bias, plain, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embeddings in, hidden states after the final RMSNorm out; `lm_head` is in model.py."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs_embeds, position, branch, cache=None):
        """(B, T, hidden), position and branch (B, T) → (B, T, hidden); of a cache the T newest."""
        plain = 0 if cache is not None and cache.length else plain_length(branch)
        keys = (position, branch) if cache is None else cache.add_tokens(position, branch)
        mask = branch_mask(position[:, plain:], branch[:, plain:], *keys)     # (B, 1, T - plain, S)
        bias = torch.zeros(mask.shape, device=mask.device, dtype=inputs_embeds.dtype)
        bias.masked_fill_(~mask, float("-inf"))
        rotary = rotary_embedding(position, self.config.head_dim, self.config.rope_theta,
                                  inputs_embeds.dtype)
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, bias, plain, cache, i)
        return self.norm(x)
