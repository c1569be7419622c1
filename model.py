"""LLaVA-1.5 with a post-interaction block, in two halves that training and evaluation treat
differently.

    Trunk   CLIP tower → projector → LLaMA       pixels, tokens → hidden states    usually frozen
    Head    post-interaction block → lm_head     hidden states → logits            trained

Several heads can share one trunk: the policy and its reference in training, base and checkpoints in
evaluation. Logits are computed only where an answer token is predicted, never for a whole row.

    trunk, head = Trunk(config), Head(config, config.block_config())
    hidden_states, image_features = trunk(batch)                     # (B, T, hidden), (N, P, C)
    logits = head(*answer_states(head, hidden_states, image_features, batch))   # (B, A, vocab)
    tokens, first_logits = generate(trunk, [head, other_head], batch, max_new_tokens=128)[0]

Follows LLaVA-1.5 (arXiv 2310.03744) and haotian-liu/LLaVA; parameter names are those of its files.
Deliberately different: `Trunk` has no `lm_head`, and data.py expands the image's place in the row.
Loading and saving: checkpoints/.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from clip_vit import CLIPVisionConfig, CLIPVisionTower, projector
from data import EOS, IMAGE_ID, VOCO_ID, Batch, ImageProcessor, RowFormat, Tokenizer
from llama import PAD_BRANCH, KVCache, LlamaConfig, LlamaModel, branch_mask, rows_at_once
from post_decoder import BlockConfig, PostInteractionBlock
from support.anyres import tile_grid
from support.common import InputError, progress
from support.graphs import RecordedStep
from support.loading import batches_ahead, spare_cores
from support.templates import SYSTEM, template_of

GROUPS = ("clip", "projector", "llama", "post_decoder", "lm_head", "lora")    # what can be trained
TRUNK = {"clip", "projector", "llama", "lora"}                                # in front of the head
STAGES = {0: ("projector", "llama", "lm_head"),                               # train.py's --stage
          1: ("post_decoder",),
          2: ("post_decoder", "lm_head")}


@dataclass
class LlavaConfig:
    """LLaVA-1.5's sizes, and what other versions have otherwise (checkpoints/versions.py)."""
    text: LlamaConfig = field(default_factory=LlamaConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    select_layer: int = -2
    projector_depth: int = 2          # of mlpNx_gelu; 0: one linear layer
    projector_hidden_size: int = None       # its inner width; None: LLaMA's
    max_length: int = 2048            # tokens of a row, image patches included
    pad_images: bool = True
    pinpoints: tuple = None           # any resolution: sizes of whole images, (width, height)
    template: str = "v1"              # support/templates.py
    image_start_end: bool = False     # <im_start> and <im_end>, the last two embeddings (LLaVA v1)
    bits: int = 16                    # that hold a weight of LLaMA's linears: 4, 8, or 16 and more
    num_voco: int = 0                 # VoCo-LLaMA's tokens an image; <voco> is the last embedding

    def block_config(self, **changes):
        """BlockConfig of this model's sizes: the notes' block has LLaMA's heads and inner width."""
        from_clip = changes.get("image_source", "clip") == "clip"
        sizes = dict(hidden_size=self.text.hidden_size,
                     intermediate_size=self.text.intermediate_size,
                     num_attention_heads=self.text.num_attention_heads,
                     mm_hidden_size=self.vision.hidden_size if from_clip else self.text.hidden_size)
        return BlockConfig(**{**sizes, **changes})


class Trunk(nn.Module):
    """Everything before the hidden states: `vision_tower.*`, `model.mm_projector.*`,
    `model.layers.*`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision, config.select_layer)
        self.model = LlamaModel(config.text)
        inner = config.projector_hidden_size or config.text.hidden_size
        widths = config.vision.hidden_size, inner, config.text.hidden_size
        self.model.mm_projector = projector(config.projector_depth, *widths)
        if config.pinpoints:
            self.model.image_newline = nn.Parameter(torch.randn(widths[-1]) * widths[-1] ** -0.5)

    def embed(self, batch):
        """Token embeddings with the projected patches in their places, and the tower's features."""
        voco = self.config.text.vocab_size - 1
        ids = batch.input_ids.masked_fill(batch.input_ids == VOCO_ID, voco)
        embeds = self.model.embed_tokens(ids.clamp(min=0))                          # (B, T, hidden)
        if batch.pixel_values is None:
            return embeds, None
        image_features = self.vision_tower(batch.pixel_values)                         # (N, P, C)
        patches = self.model.mm_projector(image_features)                         # (N, P, hidden)
        if batch.patches is None:
            patches = patches[batch.image_index[batch.image_index >= 0]]
        else:
            newline = self.model.image_newline[None]                        # found by number -1
            patches = torch.cat((patches.flatten(0, 1), newline))[batch.patches]
        at_image = (batch.input_ids == IMAGE_ID)[:, :, None]
        return embeds.masked_scatter(at_image, patches.to(embeds.dtype)), image_features

    def forward(self, batch, cache=None):
        """Batch → hidden states (B, T, hidden), image features (N, P, C) or None without images."""
        embeds, image_features = self.embed(batch)
        return self.model(embeds, batch.position, batch.branch, cache), image_features

    def image_context(self, block_config, image_features):
        """What a block looks at: the tower's features or the projector's output, (N, P, C')."""
        if image_features is None or block_config is None or block_config.image_source == "clip":
            return image_features
        return self.model.mm_projector(image_features)


class Head(nn.Module):
    """Hidden states → logits: `post_interaction_block.*` (absent without a config),
    `lm_head.weight`.
    """

    def __init__(self, config, block_config=None):
        super().__init__()
        self.post_interaction_block = PostInteractionBlock(block_config) if block_config else None
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def block_config(self):
        return self.post_interaction_block.config if self.post_interaction_block else None

    def forward(self, h, context=None, mask=None, wanted=None):
        """h (B, A, hidden) and what the block looks at → logits (B, A, vocab), or (n, vocab) of the
        n `wanted` (B, A)."""
        h = h if wanted is None else h[wanted]                                      # (n, hidden)
        if self.post_interaction_block is not None:
            h = self.post_interaction_block(h, context, mask, wanted)
        return self.lm_head(h)


@dataclass
class Llava:
    """A model that is ready to use: what always travels together (checkpoints/load.py makes it)."""
    trunk: Trunk
    heads: dict                  # {name: Head}; the first is the base's own
    tokenizer: Tokenizer
    preprocess: ImageProcessor
    fingerprint: str             # which base this is

    @property
    def head(self):
        return next(iter(self.heads.values()))

    @property
    def config(self):
        return self.trunk.config

    def row_format(self, system=SYSTEM):
        config, ids = self.config, ()
        if config.image_start_end:
            ids = config.text.vocab_size - 2, config.text.vocab_size - 1
        template = template_of(config.template, system, ids)
        grid = tile_grid(config.pinpoints, config.vision)
        tokens = grid.most_tokens if grid else config.vision.num_patches
        return RowFormat(self.tokenizer, self.preprocess, tokens, config.max_length, template,
                         config.num_voco, grid)


def set_trained(trunk, head, groups):
    """Freeze everything but the named groups → {public name: parameter} of what is trained."""
    modules = {"clip": [trunk.vision_tower], "projector": [trunk.model.mm_projector],
               "llama": [trunk.model.embed_tokens, trunk.model.layers, trunk.model.norm],
               "post_decoder": [head.post_interaction_block] if head.block_config else [],
               "lm_head": [head.lm_head]}
    if trunk.config.pinpoints:
        modules["projector"].append(trunk.model.image_newline)
    for module in (trunk, head):
        module.requires_grad_(False)
    for group in groups:
        for module in modules.get(group, []):
            module.requires_grad_(True)
    if "lora" in groups:
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(".lora_" in name or parameter.requires_grad)
    return {name: parameter for module in (trunk, head)
            for name, parameter in module.named_parameters() if parameter.requires_grad}


def take(x, index):
    """x (B, T, ...) at index (B, A) → (B, A, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def answer_states(head, hidden_states, context, batch, at=None):
    """Inputs of `head` for the tokens `at` (B, A), by default those that predict an answer token.

    context (N, P, C), see `Trunk.image_context`. A row without an image looks at zeros.
    Returns h (B, A, hidden), context, mask.
    """
    at = batch.source if at is None else at
    h = take(hidden_states, at)                                                     # (B, A, hidden)
    attention = head.block_config.attention if head.block_config else "none"
    if attention == "cross":
        if context is None:
            return h, h.new_zeros(len(h), 1, head.block_config.mm_hidden_size), None
        tiles, patches = batch.row_tiles(), context.shape[1]                # (B, M) of M * P
        nothing = context.new_zeros(1, *context.shape[1:])                  # found by number -1
        context, mask = torch.cat((context, nothing))[tiles].flatten(1, 2), None
        if batch.tiles is not None:                         # others have more tiles than this row
            real = (tiles >= 0) | (batch.image_index < 0)[:, None]
            mask = real.repeat_interleave(patches, 1)[:, None, None]        # (B, 1, 1, M * P)
        return h, context, mask
    if attention == "self":
        position, branch = batch.position, batch.branch
        mask = branch_mask(take(position, at), take(branch, at), position, branch)  # (B, 1, A, T)
        return h, hidden_states, mask
    return h, None, None


# ---- Greedy decoding -----------------------------------------------------------------------------


@dataclass
class Prompts:
    """Open rows, and what the trunk has made of them."""
    batch: Batch
    cache: KVCache
    hidden_states: torch.Tensor      # (B, T, hidden)
    image_features: torch.Tensor     # (N, P, C)
    length: int                      # columns of the cache that hold them


@torch.inference_mode()
def generate(trunk, heads, batch, max_new_tokens):
    """Greedy answers of every branch of every row, by every head, from one pass over the prompts.

    Returns one (tokens, first_logits) per head: tokens[row][branch] is a list of ids without
    `</s>`, and first_logits (B, N, vocab) are those of the first answer token.
    """
    (B, T), N = batch.input_ids.shape, batch.ends.shape[1]
    parameter = next(trunk.parameters())
    steps = min(max_new_tokens - 1, 16)    # room for short answers; the cache grows for longer ones
    kept = 0 if batch.compressed is None else batch.compressed.shape[-2]
    cache = KVCache(trunk.config.text, B, kept + T + steps * N, parameter.device, parameter.dtype)
    if kept:                               # the <voco> tokens stand where the text begins
        before = torch.arange(-kept, 0, device=parameter.device)
        cache.begin(batch.compressed.movedim(0, 2), batch.position[:, :1] + before)
    prompts = Prompts(batch, cache, *trunk(batch, cache), cache.length)
    return [decode(trunk, head, prompts, max_new_tokens) for head in heads]


def decode(trunk, head, prompts, max_new_tokens):
    """One head's answers to `prompts`, as `generate` returns them.

    All branches of all rows advance together, a token each per step: a step is a forward of N
    tokens per row, whose branch ids let each see the prefix and its own past. A step changes
    tensors in place only, so that a GPU can record it (support/graphs.py).
    """
    batch, cache, states = prompts.batch, prompts.cache, prompts.hidden_states
    is_branch, at = batch.ends >= 0, batch.ends.clamp(min=0)                                # (B, N)
    cache.length, N = prompts.length, at.shape[1]
    token, unfinished = torch.full_like(at, EOS), is_branch.clone()                         # (B, N)
    branch = torch.where(is_branch, take(batch.branch, at), PAD_BRANCH)
    position = take(batch.position, at)
    newest = torch.arange(N, device=token.device).expand_as(token)
    context = trunk.image_context(head.block_config, prompts.image_features)
    self_attends = head.block_config is not None and head.block_config.attention == "self"

    def choose(states, at, seen):
        # The likeliest token of each branch that still speaks; a finished branch becomes padding.
        logits = head(*answer_states(head, states, context, seen, at))               # (B, N, vocab)
        token.copy_(torch.where(unfinished, logits.argmax(-1), EOS))
        unfinished.logical_and_(token != EOS)
        position.add_(1)
        branch.masked_fill_(~unfinished, PAD_BRANCH)
        return logits

    def step():
        # The tokens just chosen go through the trunk; a block with self-attention sees all states.
        hidden_states, _ = trunk(Batch(input_ids=token, position=position, branch=branch), cache)
        if self_attends:
            states.index_copy_(1, cache.columns, hidden_states)
            seen = Batch(position=cache.position, branch=cache.branch,
                         image_index=batch.image_index, tiles=batch.tiles)
            choose(states, cache.columns.expand_as(token), seen)
        else:
            seen = Batch(position=position, branch=branch, image_index=batch.image_index,
                         tiles=batch.tiles)
            choose(hidden_states, newest, seen)

    first_logits = choose(states, at, batch)
    tokens, run = [token.clone()], RecordedStep(step, token.is_cuda)
    while len(tokens) < max_new_tokens and unfinished.any():
        moved = cache.reserve(N)
        if self_attends and states.shape[1] < cache.capacity:
            states = F.pad(states, (0, 0, 0, cache.capacity - states.shape[1]))
        if not run(moved):
            cache.length += N                       # a replay has not counted its tokens
        tokens.append(token.clone())
    tokens = torch.stack(tokens, -1).tolist()                                        # (B, N, steps)
    answers = [[ids[:ids.index(EOS)] if EOS in ids else ids
                for ids, real in zip(row, branches, strict=True) if real]
               for row, branches in zip(tokens, is_branch.tolist(), strict=True)]
    return answers, first_logits


def answer(model, dataset, max_new_tokens, batch_size=None, indices=None, words=()):
    """Greedy answers of every head of a Llava to a PackedDataset of open prompts, as they come.

    `indices` are the rows to answer (default all), `batch_size` is in rows (default: what fits).
    Yields (index, [for every head ([text of each branch], logits of the tokens `words` at the first
    place (branches, words))]). Longest rows stand together; images are decoded ahead of the GPU.
    """
    trunk, heads = model.trunk, list(model.heads.values())
    parameter, lengths = next(trunk.parameters()), dataset.lengths()
    order = range(len(dataset)) if indices is None else indices
    order = sorted(order, key=lengths.__getitem__, reverse=True)
    if not order:
        return
    if batch_size is None:
        row = dataset.row(order[0])
        tokens = len(row.input_ids) + min(max_new_tokens, 64) * len(row.ends)
        batch_size = rows_at_once(trunk.config.text, tokens, parameter)
    # Short first: a GPU starts early
    starts = [0, *range(min(batch_size, 16), len(order), batch_size)]
    ends = [*starts[1:], len(order)]
    chosen = [order[start:end] for start, end in zip(starts, ends, strict=True)]

    def ask(rows, batch):
        try:
            batch = batch.to(parameter.device, parameter.dtype)
            answered = generate(trunk, heads, batch, max_new_tokens)
        except torch.OutOfMemoryError:
            answered = None                     # long answers; half as many rows need half as much
        if answered is None and len(rows) == 1:
            length, branches = batch.input_ids.shape[1], batch.ends.shape[1]
            raise InputError(f"the GPU has no memory for a row of {length} tokens and "
                             f"{max_new_tokens} new ones for each of its {branches} branches; "
                             "lower --max_new_tokens")
        if answered is None:
            for part in (rows[:len(rows) // 2], rows[len(rows) // 2:]):
                yield from ask(part, dataset[part])
            return
        results = [[] for _ in rows]
        for tokens, first_logits in answered:
            first_logits = first_logits[..., list(words)].float().cpu()
            for result, ids, logits in zip(results, tokens, first_logits, strict=True):
                texts = [model.tokenizer.decode(t) for t in ids]
                result.append((texts, logits[:len(ids)]))
        yield from zip(rows, results, strict=True)

    loader = progress(batches_ahead(dataset, chosen, spare_cores()), "asking", unit="batch")
    for rows, batch in zip(chosen, loader, strict=True):
        yield from ask(rows, batch)
