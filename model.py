"""LLaVA-1.5 with a post-interaction block, in two halves that training and evaluation treat differently.

    Trunk   CLIP tower → projector → LLaMA                pixels and tokens → hidden states      frozen in stages 1 and 2
    Head    post-interaction block → lm_head              hidden states → logits                 what stages 1 and 2 train

Several heads can share one trunk: the policy and its reference in training, base and checkpoints in evaluation. Logits
are computed only where an answer token is predicted, never for a whole row.

    trunk, head = Trunk(config), Head(config, BlockConfig(...))
    hidden, features = trunk(batch)                                       # (B, T, hidden), (N, P, C)
    logits = head(*answer_states(head, hidden, features, batch))          # (B, A, vocab)
    tokens, first_logits = generate(trunk, [head, other_head], batch, max_new_tokens=128)[0]

Loading and saving: checkpoint.py. `python model.py CKPT` talks to one (chat.py), `python model.py --explain` shows how one
preference pair passes through it (explain.py). Follows LLaVA-1.5 (arXiv 2310.03744); parameter names are those of its files.
Deliberately different: `Trunk` has no `lm_head`, and the image's place in the row is expanded by data.py.
"""
import glob
import importlib.metadata
import os
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from clip_vit import CLIPVisionConfig, CLIPVisionTower
from data import EOS, IMAGE_ID, Batch, batches_ahead, spare_cores
from llama import PAD_BRANCH, KVCache, LlamaConfig, LlamaModel, branch_mask
from post_decoder import BlockConfig, PostInteractionBlock
from readers import InputError


@dataclass
class LlavaConfig:
    """LLaVA-1.5's sizes. `projector_hidden_size` is ours: the projector's inner width where it is not LLaMA's."""
    text: LlamaConfig = field(default_factory=LlamaConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    select_layer: int = -2
    projector_hidden_size: int = None
    max_length: int = 2048            # tokens of a row, image patches included
    pad_images: bool = True

    def block(self, **changes):
        """BlockConfig of this model's sizes: the notes' block has LLaMA's heads and inner width."""
        source = changes.get("image_source", "clip")
        sizes = dict(hidden_size=self.text.hidden_size, intermediate_size=self.text.intermediate_size,
                     num_attention_heads=self.text.num_attention_heads,
                     mm_hidden_size=self.vision.hidden_size if source == "clip" else self.text.hidden_size)
        return BlockConfig(**{**sizes, **changes})


class Trunk(nn.Module):
    """Everything before the hidden states. Names: `vision_tower.*`, `model.mm_projector.*`, `model.layers.*`, …"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision, config.select_layer)
        self.model = LlamaModel(config.text)
        inner = config.projector_hidden_size or config.text.hidden_size
        self.model.mm_projector = nn.Sequential(nn.Linear(config.vision.hidden_size, inner), nn.GELU(),
                                                nn.Linear(inner, config.text.hidden_size))

    def embed(self, batch):
        """Token embeddings with the projected patches in their places, (B, T, hidden), and the features (N, P, C)."""
        embeds = self.model.embed_tokens(batch.input_ids.clamp(min=0))
        if batch.pixel_values is None:
            return embeds, None
        features = self.vision_tower(batch.pixel_values)                                            # (N, P, C)
        patches = self.model.mm_projector(features)[batch.image_index[batch.image_index >= 0]]
        return embeds.masked_scatter((batch.input_ids == IMAGE_ID)[:, :, None], patches.to(embeds.dtype)), features

    def forward(self, batch, cache=None):
        """Batch → hidden states (B, T, hidden) and tower features (N, P, C), None without images."""
        embeds, features = self.embed(batch)
        return self.model(embeds, batch.position, batch.branch, cache), features

    def image_context(self, block, features):
        """What the block (a BlockConfig or None) looks at: the tower's features or the projector's output, (N, P, C')."""
        projected = block is not None and block.image_source == "projector" and features is not None
        return self.model.mm_projector(features) if projected else features


class Head(nn.Module):
    """Hidden states → logits. Names: `post_interaction_block.*` (absent when `block` is None) and `lm_head.weight`."""

    def __init__(self, config, block=None):
        super().__init__()
        self.post_interaction_block = PostInteractionBlock(block) if block else None
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def block(self):
        return self.post_interaction_block.config if self.post_interaction_block else None

    def forward(self, h, context=None, mask=None, wanted=None):
        """h (B, A, hidden) and what the block looks at → logits (B, A, vocab), or (n, vocab) of the n `wanted` (B, A)."""
        if self.post_interaction_block is not None:
            h = self.post_interaction_block(h, context, mask)
        return self.lm_head(h if wanted is None else h[wanted])


def take(x, index):
    """x (B, T, ...) at index (B, A) → (B, A, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def answer_states(head, hidden, image_context, batch, at=None):
    """Inputs of `head` for the tokens `at` (B, A), by default those that predict an answer token (`batch.source`).

    image_context (N, P, C), see `Trunk.image_context`. A row without an image looks at zeros.
    Returns h (B, A, hidden), context, mask.
    """
    at = batch.source if at is None else at
    h, attention = take(hidden, at), head.block.attention if head.block else "none"
    if attention == "cross":
        if image_context is None:
            return h, h.new_zeros(len(h), 1, head.block.mm_hidden_size), None
        nothing = image_context.new_zeros(1, *image_context.shape[1:])      # found by image_index -1
        return h, torch.cat((image_context, nothing))[batch.image_index], None
    if attention == "self":
        return h, hidden, branch_mask(take(batch.position, at), take(batch.branch, at), batch.position, batch.branch)
    return h, None, None


@torch.inference_mode()
def generate(trunk, heads, batch, max_new_tokens):
    """Greedy answers of every branch of every row, by every head, from one pass over the prompts.

    All branches of all rows advance together, one token each per step: a step is a forward of N tokens per row, whose
    branch ids let each see the prefix and its own past. Returns one (tokens, first_logits) per head: tokens[row][branch]
    is a list of ids without `</s>`, and first_logits (B, N, vocab) are those of the first answer token.
    """
    (B, T), N = batch.input_ids.shape, batch.ends.shape[1]
    parameter = next(trunk.parameters())
    steps = min(max_new_tokens - 1, 16)                          # room for short answers; the cache grows for longer ones
    cache = KVCache(trunk.config.text, B, T + steps * N, parameter.device, parameter.dtype)
    hidden, features = trunk(batch, cache)
    return [_decode(trunk, head, batch, cache, hidden, features, max_new_tokens) for head in heads]


def _decode(trunk, head, batch, cache, prompt, features, max_new_tokens):
    """One head's answers. A step changes nothing but tensors in place, so that a GPU can record it once and replay it:
    launching a step's thousand kernels one by one takes longer than running them."""
    real, at = batch.ends >= 0, batch.ends.clamp(min=0)                                     # (B, N)
    token, unfinished = torch.full_like(at, EOS), real.clone()
    branch = torch.where(real, take(batch.branch, at), PAD_BRANCH)
    position = take(batch.position, at)
    context = trunk.image_context(head.block, features)
    whole = head.block is not None and head.block.attention == "self"      # then the block looks at all hidden states
    cache.length, N = prompt.shape[1], at.shape[1]

    def choose(hidden, at, seen):
        logits = head(*answer_states(head, hidden, context, seen, at))                      # (B, N, vocab)
        token.copy_(torch.where(unfinished, logits.argmax(-1), EOS))
        unfinished.logical_and_(token != EOS)
        position.add_(1)
        branch.masked_fill_(~unfinished, PAD_BRANCH)
        return logits

    def step():
        hidden, _ = trunk(Batch(input_ids=token, position=position, branch=branch), cache)  # (B, N, hidden)
        if whole:
            history.index_copy_(1, cache.columns, hidden)
            seen = Batch(position=cache.position, branch=cache.branch, image_index=batch.image_index)
            choose(history, cache.columns.expand_as(token), seen)
        else:
            choose(hidden, newest, Batch(position=position, branch=branch, image_index=batch.image_index))

    first_logits = choose(prompt, at, batch)
    newest = torch.arange(N, device=token.device).expand_as(token)
    tokens, graph, history = [token.clone()], None, prompt
    while len(tokens) < max_new_tokens and unfinished.any():
        grown = cache.reserve(N)
        if whole and history.shape[1] < cache.capacity:
            history = F.pad(history, (0, 0, 0, cache.capacity - history.shape[1]))
        if token.is_cuda:
            if recorded := graph is None or grown:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):       # others may pin the next batch meanwhile
                    step()                              # nothing runs yet, but cache.length counts this step
            graph.replay()
            cache.length += 0 if recorded else N
        else:
            step()
        tokens.append(token.clone())
    tokens = torch.stack(tokens, -1).tolist()                                               # (B, N, steps)
    answers = [[ids[:ids.index(EOS)] if EOS in ids else ids for ids, r in zip(row, rs) if r]
               for row, rs in zip(tokens, real.tolist())]
    return answers, first_logits


def versions():
    """What has to fit together, for a message."""
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = "(not installed)"
    path, driver = "/proc/driver/nvidia/version", None
    if os.path.isfile(path):
        with open(path) as file:
            driver = re.search(r"\d+\.\d+[.\d]*", file.readline())
    return (f"torch {torch.__version__} (built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}), "
            f"NVIDIA's driver {driver[0] if driver else '(not found)'}, deepspeed {deepspeed}")


def can_use_gpu():
    """Whether there is a GPU. InputError when there is one that this torch cannot use: nobody wants LLaVA on a CPU unasked."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    found = torch.cuda.is_available()
    try:
        if found:
            torch.ones(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}").add_(1)          # it has kernels for this one
        elif not hidden and glob.glob("/dev/nvidia[0-9]*"):
            raise RuntimeError("torch finds none, but this machine has one")
    except RuntimeError as e:
        raise InputError(f"the GPU cannot be used ({str(e).splitlines()[0]}). Here are {versions()}: install a torch that is "
                         "built for this GPU and driver (pytorch.org/get-started), or a newer driver; CUDA_VISIBLE_DEVICES= (empty) "
                         "takes the CPU")
    return found


def device_and_dtype(bf16=None):
    """Where this process computes, and in what: bf16 on a GPU and fp32 on a CPU unless told."""
    on_gpu = can_use_gpu()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)               # or NCCL and a recorded step of decoding take the first GPU
    return device, torch.bfloat16 if (on_gpu if bf16 is None else bf16) else torch.float32


def rows_at_once(config, tokens, parameter):
    """How many rows of that many tokens are decoded together: what a GPU has memory for, up to 64."""
    if not parameter.is_cuda:
        return 16
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim              # numbers per token
    passing = 8 * config.hidden_size + 4 * config.intermediate_size
    free, _ = torch.cuda.mem_get_info(parameter.device)
    return max(1, min(64, int(0.8 * free / (tokens * (kept + passing) * parameter.itemsize))))


def answer(trunk, heads, dataset, max_new_tokens, batch_size=None, indices=None, title=None, words=[]):
    """Greedy answers to a PackedDataset of open prompts, longest rows together; images are decoded ahead of the GPU.

    `indices` are the rows to answer (default all), `batch_size` is in rows (default: what fits). Returns for every head
    {index: ([text of each branch], logits of the tokens `words` at the first place (branches, words))}. Shows a progress bar
    when it has a title.
    """
    order = sorted(range(len(dataset)) if indices is None else indices, key=dataset.lengths().__getitem__, reverse=True)
    parameter, results = next(trunk.parameters()), [{} for _ in heads]
    if batch_size is None and order:
        row = dataset.row(order[0])
        tokens = len(row.input_ids) + min(max_new_tokens, 64) * len(row.ends)
        batch_size = rows_at_once(trunk.config.text, tokens, parameter)
    starts = [0, *range(min(batch_size or 1, 16), len(order), batch_size or 1)]     # the first is short, so that a GPU starts early
    chosen = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)]) if start < end]
    loader = batches_ahead(dataset, chosen, spare_cores())

    def give(rows, batch):
        try:
            answered = generate(trunk, heads, batch.to(parameter.device, parameter.dtype), max_new_tokens)
        except torch.OutOfMemoryError:
            answered = None                     # long answers; half as many rows need half as much
        if answered is None and len(rows) == 1:
            raise InputError(f"the GPU has no memory for one row of {batch.input_ids.shape[1]} tokens and {max_new_tokens} new ones for "
                             f"each of its {batch.ends.shape[1]} branches; lower --max_new_tokens")
        if answered is None:
            return [give(part, dataset[part]) for part in (rows[:len(rows) // 2], rows[len(rows) // 2:])]
        for result, (tokens, first_logits) in zip(results, answered):
            for i, ids, logits in zip(rows, tokens, first_logits[..., words].float().cpu()):
                result[i] = [dataset.tokenizer.decode(t) for t in ids], logits[:len(ids)]

    for rows, batch in zip(chosen, tqdm(loader, title, disable=title is None, unit="batch", leave=False)):
        give(rows, batch)
    return results


if __name__ == "__main__":
    import sys
    if "--explain" in sys.argv:
        import explain as program
    else:
        import chat as program
    program.run_program(program.main)
