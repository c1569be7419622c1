"""What the benchmarks against public peers share: one set of random weights for both sides, a clock, a table.

    ours = random_llava("7b")                    # trunk, head, tokenizer, ... on the GPU if there is one
    theirs = peer_of(ours)                       # transformers' LlavaForConditionalGeneration on the very same tensors
    measured = measure(function, ours.device)    # median seconds, peak memory, the result
    print(table([Line(...), ...], "pair", total, peak))

Speed does not depend on what weights say, so they are random and no file is needed; and because both sides hold the same
tensors, not copies, their answers must agree, which every benchmark checks in the run that it times. On a GPU everything
runs in bf16, on a CPU in fp32 (that is how the tests keep these files alive).

The peer is used as its documentation advises: scaled_dot_product_attention, key-value cache, left padding in batches.
"""
import gc
import os
import re
import statistics
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image

from clip_vit import TOWER, CLIPVisionConfig
from data import BOS, EOS, IMAGE_ID, PAD, ImageProcessor
from layouts import our_name
from llama import LlamaConfig
from model import Head, LlavaConfig, Trunk, device_and_dtype

SIZES = {
    "7b": LlavaConfig(),
    "1b": LlavaConfig(LlamaConfig(32000, 2048, 5632, 22, 32, 4, 4096)),                     # TinyLlama-1.1B's
    "tiny": LlavaConfig(LlamaConfig(512, 64, 96, 3, 8, 4, 2048), CLIPVisionConfig(24, 48, 3, 4, image_size=24, patch_size=8)),
}
# Root mean square of the differences, of the numbers' spread. One rounding to bf16 is 0.002 of a number on average; hundreds
# follow each other on the way through 32 layers: the peer differs from itself in a batch by as much as from us (0.05).
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


# ---------------------------------------------------------------------------------------------------------------------
# Models, words, pictures


class StandInTokenizer:
    """For lack of LLaMA's file: about as many ids for a text as LLaMA's tokenizer gives, each drawn from its piece's letters."""

    path = __file__         # what tells it from other tokenizers (features.py)

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def encode(self, text, continues=False):
        pieces = re.findall(r"[A-Z]{2}|[A-Za-z][a-z]*|\d|\n|[^\w\s]", text)
        return [3 + zlib.crc32(piece.encode()) % (self.size - 4) for piece in pieces]       # neither control nor image token

    def decode(self, ids):
        return " ".join(f"#{i}" for i in ids)


@dataclass
class Ours:
    device: torch.device
    dtype: torch.dtype
    config: LlavaConfig
    trunk: Trunk
    head: Head                  # without a block, so that the peer can be its equal
    tokenizer: StandInTokenizer
    preprocess: ImageProcessor


def random_llava(size, seed=0):
    """A frozen random model on this process's device. Weights have deviation 0.02 around 0, those of norms around 1.

    `</s>` and the image token have logit 0 and so are never the largest of all: every answer is as long as it may be.
    """
    config, (device, dtype) = SIZES[size], device_and_dtype()
    torch.manual_seed(seed)
    with torch.device("meta"):
        trunk, head = Trunk(config).to(dtype), Head(config).to(dtype)
    for module in (trunk, head):
        module.to_empty(device=device).requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.normal_(float("norm" in name and name.endswith(".weight")), 0.02)
    head.lm_head.weight[[EOS, image_token(config)]] = 0
    tokenizer, preprocess = StandInTokenizer(config.text.vocab_size), ImageProcessor(config.vision.image_size)
    return Ours(device, dtype, config, trunk, head, tokenizer, preprocess)


def image_token(config):
    """The id that stands for a patch in transformers; our tokenizer never gives it."""
    return config.text.vocab_size - 1


def peer_of(ours):
    """transformers' LLaVA whose parameters are ours, in the same memory."""
    text, vision = asdict(ours.config.text), asdict(ours.config.vision)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    settings = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS),
        vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=image_token(ours.config),
        vision_feature_layer=ours.config.select_layer, vision_feature_select_strategy="default", tie_word_embeddings=False)
    with init_empty_weights():                              # parameters only: buffers are made as usual
        theirs = transformers.LlavaForConditionalGeneration(settings)
    shared, tensors = {**ours.trunk.state_dict(), **ours.head.state_dict()}, {}
    for name, parameter in theirs.state_dict().items():
        key = our_name(name)
        if key.startswith(TOWER) and ours.trunk.vision_tower.unused_key(key):       # transformers builds and runs these too
            shared[key] = torch.zeros(parameter.shape, device=ours.device, dtype=ours.dtype)
        tensors[name] = shared[key]
    theirs.load_state_dict(tensors, assign=True)
    theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id = PAD, EOS
    return theirs.to(ours.device).requires_grad_(False).eval()


def unpack(row):
    """A packed row → the token ids of each branch alone behind its own prefix, the image once per patch."""
    return [[i for i, branch in zip(row.input_ids, row.branch) if branch in (0, number)] for number in range(1, len(row.ends) + 1)]


def peer_inputs(ours, sequences, pixel_values):
    """Token ids of several prompts and their images (N, 3, S, S) → what transformers' LLaVA is called with, left-padded."""
    longest, patch = max(map(len, sequences)), image_token(ours.config)
    ids = torch.tensor([[PAD] * (longest - len(s)) + [patch if i == IMAGE_ID else i for i in s] for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return {"input_ids": ids.to(ours.device), "attention_mask": mask.to(ours.device),
            "pixel_values": pixel_values.to(ours.device, ours.dtype)}


def peer_generate(theirs, inputs, tokens):
    """Greedy answers of exactly `tokens` tokens (B, tokens), and the logits of the first one (B, vocab)."""
    result = theirs.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)
    return result.sequences[:, -tokens:], result.logits[0]


def write_images(folder, count, seed=0):
    """Smooth random pictures with a little grain as JPEG, about as many bytes as a photograph. Returns their names."""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"picture_{n:012d}.jpg" for n in range(count)]
    for name in names:
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        grain = rng.integers(-12, 13, (480, 640, 1), dtype=np.int16)
        Image.fromarray((np.asarray(smooth, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8)).save(
            os.path.join(folder, name), quality=90)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Clock and measure


@dataclass
class Measured:
    seconds: float      # median
    memory: float       # highest allocated bytes while it ran, models included; None on a CPU
    result: Any


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release():
    """Give back to the device what nobody holds: ours takes as many rows at once as it finds memory for."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(function, device, repeats=3, warm_up=1):
    """Call `function()` until it is warm, then time it."""
    release()
    for _ in range(warm_up):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        began = clock(device)
        result = function()
        seconds.append(clock(device) - began)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(statistics.median(seconds), memory, result)


def matmul_peak(device, dtype):
    """What this device's matrix products reach, FLOP/s: 8192³ on random numbers (their values cost power, so no zeros)."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / measure(lambda: a @ b, device, repeats=20, warm_up=5).seconds


def memory_bandwidth(device):
    """Bytes per second, read and written, of a copy that no cache holds."""
    x = torch.zeros(2 ** 31 if device.type == "cuda" else 2 ** 26, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * x.nbytes / measure(lambda: y.copy_(x), device, repeats=20, warm_up=2).seconds


def decoder_weights(config):
    """Number of weights in the linear layers of LLaMA's decoder, without embeddings and lm_head."""
    text = config.text
    attention = 2 * text.hidden_size * (text.hidden_size + text.num_key_value_heads * text.head_dim)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def decoder_flops(config, positions):
    """Operations of the decoder on tokens at these positions: 2 per weight and token, 4 · hidden per layer and pair.

    A pair is a token and one that it may look at; whatever is packed or padded, a token at position p looks at p + 1.
    Norms, softmax and RoPE are not counted.
    """
    positions = np.asarray(positions)
    pairs = int(positions.sum()) + len(positions)
    return 2 * decoder_weights(config) * len(positions) + 4 * config.text.hidden_size * config.text.num_hidden_layers * pairs


def tower_flops(config, images):
    """Operations of tower (up to the layer that is read) and projector, counted likewise."""
    vision, tokens, hidden = config.vision, config.vision.num_patches + 1, config.text.hidden_size
    weights = 4 * vision.hidden_size ** 2 + 2 * vision.hidden_size * vision.intermediate_size
    layer = 2 * weights * tokens + 4 * vision.hidden_size * tokens ** 2
    projector = 2 * vision.num_patches * hidden * (vision.hidden_size + hidden)
    return images * ((vision.num_hidden_layers + 1 + config.select_layer) * layer + projector)


def answer_positions(lengths, tokens):
    """Positions of the tokens that decoding feeds back behind prompts of these lengths: all but the answer's last."""
    return [length + t for length in lengths for t in range(tokens - 1)]


# ---------------------------------------------------------------------------------------------------------------------
# What is said


@dataclass
class Line:
    """One line of a table: what was measured. tokens: those that went through the decoder."""
    what: str
    seconds: float
    units: float            # how many pairs, answers, ... these seconds were for
    tokens: int
    flops: float
    memory: float = None
    peers: tuple = ()       # lines that it is compared with


def table(lines, unit, total, peak):
    """Lines as Markdown. `total` is how many units the seconds are given for, by extrapolation where fewer were measured."""
    head = f"s for {total:,} {unit}" + ("s" if total > 1 else "")
    text = [f"| | measured | {head} | times faster | tokens/s | of matmul peak | peak memory, GiB |", "|---" * 7 + "|"]
    for line in lines:
        ratios = " / ".join(f"{peer.seconds / peer.units / (line.seconds / line.units):.2f}" for peer in line.peers)
        cells = [line.what, f"{line.units:,}", f"{line.seconds / line.units * total:.4g}", ratios or "–",
                 f"{line.tokens / line.seconds:,.0f}" if line.tokens else "–",
                 f"{100 * line.flops / line.seconds / peak:.1f} %" if line.flops else "–",
                 "–" if line.memory is None else f"{line.memory / 2 ** 30:.1f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def agreement(what, ours, theirs, dtype, control=False):
    """Say how far the same numbers, computed twice in `dtype`, differ as a share of their spread; SystemExit beyond TOLERANCE.

    A control compares the peer with itself, which says what rounding alone does and fails nothing.
    """
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    if ours.shape != theirs.shape:
        raise SystemExit(f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    difference, spread = ours - theirs, theirs.std().item()
    mean, largest = difference.square().mean().sqrt().item() / spread, difference.abs().max().item() / spread
    print(f"{what}: differ by {100 * mean:.3g} % of their standard deviation {spread:.3g} (root mean square), at most {100 * largest:.3g} %"
          + ("" if control else f"; tolerance {100 * TOLERANCE[dtype]:g} %"), flush=True)
    if not control and not mean <= TOLERANCE[dtype]:
        raise SystemExit(f"{what}: they differ, so their times cannot be compared")


def environment(device, peak):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"measured matmul peak {peak / 1e12:.4g} TFLOP/s")
