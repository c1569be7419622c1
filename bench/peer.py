"""Both sides of a comparison with a public peer, on one set of random weights.

    ours = random_llava("7b")       # a Llava, on the GPU if there is one
    theirs = peer_of(ours)          # transformers' LlavaForConditionalGeneration, same tensors

Speed does not depend on the values of weights, so they are random and no file is needed. Both sides
hold the same tensors, not copies, so their answers must agree. Every benchmark checks this in the
run that it times. On a GPU everything runs in bf16, on a CPU in fp32 (the tests do that).

The peer is used as its documentation advises: scaled_dot_product_attention, key-value cache, left
padding in batches.
"""
import os
import re
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image

from checkpoints.layouts import our_name
from clip_vit import TOWER, CLIPVisionConfig
from data import BOS, EOS, IMAGE_ID, PAD, ImageProcessor
from llama import LlamaConfig
from model import Head, Llava, LlavaConfig, Trunk
from support.common import device_and_dtype

SIZES = {
    "7b": LlavaConfig(),
    "13b": LlavaConfig(LlamaConfig(32000, 5120, 13824, 40, 40, 40)),
    "1b": LlavaConfig(LlamaConfig(32000, 2048, 5632, 22, 32, 4, 4096)),        # TinyLlama-1.1B's
    "tiny": LlavaConfig(LlamaConfig(512, 64, 96, 3, 8, 4, 2048),
                        CLIPVisionConfig(24, 48, 3, 4, image_size=24, patch_size=8)),
}


# ---- Ours ----------------------------------------------------------------------------------------


class StandInTokenizer:
    """Used because LLaMA's tokenizer.model may not be here: about as many ids for a text as LLaMA's
    gives, each computed from its piece's letters.
    """

    path = __file__         # training/features.py tells tokenizers apart by their files

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def encode(self, text, continues=False):
        pieces = re.findall(r"[A-Z]{2}|[A-Za-z][a-z]*|\d|\n|[^\w\s]", text)
        # Neither a control token nor the image token.
        return [3 + zlib.crc32(piece.encode()) % (self.size - 4) for piece in pieces]

    def decode(self, ids):
        return " ".join(f"#{i}" for i in ids)


@dataclass
class RandomLlava(Llava):
    """A Llava whose base has no block, so that the peer can compute the same."""
    device: torch.device
    dtype: torch.dtype


def random_llava(size, seed=0):
    """A frozen random model on this process's device. Weights have deviation 0.02 around 0, and
    those of norms around 1.

    `</s>` and the image token have logit 0, which is never the largest, so every answer is as long
    as it may be.
    """
    config, (device, dtype) = SIZES[size], device_and_dtype()
    torch.manual_seed(seed)
    with torch.device("meta"):
        trunk, head = Trunk(config).to(dtype), Head(config).to(dtype)
    for module in (trunk, head):
        module.to_empty(device=device).requires_grad_(False)
        for name, parameter in module.named_parameters():
            is_norm_weight = "norm" in name and name.endswith(".weight")
            parameter.normal_(1.0 if is_norm_weight else 0.0, 0.02)
    head.lm_head.weight[[EOS, image_token(config)]] = 0
    tokenizer = StandInTokenizer(config.text.vocab_size)
    preprocess = ImageProcessor(config.vision.image_size)
    return RandomLlava(trunk, {"base": head}, tokenizer, preprocess, "random weights", device,
                       dtype)


def identity(ours):
    """A head as train.py starts from it: an identity block and its own lm_head."""
    with ours.device:
        head = Head(ours.config, ours.config.block_config()).to(ours.dtype)
    head.lm_head.load_state_dict(ours.head.lm_head.state_dict())
    return head


def image_token(config):
    """The id that stands for a patch in transformers; our tokenizer never gives it."""
    return config.text.vocab_size - 1


def write_images(folder, count, seed=0):
    """Write smooth random pictures with a little grain as JPEG, each about as large as a photograph
    → their names.
    """
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"picture_{n:012d}.jpg" for n in range(count)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, (480, 640, 1), dtype=np.int16)
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(os.path.join(folder, name), quality=90)
    return names


# ---- The peer ------------------------------------------------------------------------------------


def peer_of(ours):
    """transformers' LLaVA whose parameters are ours, in the same memory."""
    text, vision = asdict(ours.config.text), asdict(ours.config.vision)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    settings = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, pad_token_id=PAD, bos_token_id=BOS,
                                             eos_token_id=EOS),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=image_token(ours.config), vision_feature_layer=ours.config.select_layer,
        vision_feature_select_strategy="default", tie_word_embeddings=False)
    with init_empty_weights():                      # parameters only: buffers are made as usual
        theirs = transformers.LlavaForConditionalGeneration(settings)
    shared, tensors = {**ours.trunk.state_dict(), **ours.head.state_dict()}, {}
    for name, parameter in theirs.state_dict().items():
        key = our_name(name)
        # transformers builds and runs also the layers behind the one that is read.
        if key.startswith(TOWER) and ours.trunk.vision_tower.unused_key(key):
            shared[key] = torch.zeros(parameter.shape, device=ours.device, dtype=ours.dtype)
        tensors[name] = shared[key]
    theirs.load_state_dict(tensors, assign=True)
    theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id = PAD, EOS
    return theirs.to(ours.device).requires_grad_(False).eval()


def unpack(row):
    """A packed row → the token ids of each branch alone behind its own prefix, the image's mark
    once per patch.
    """
    return [[i for i, branch in zip(row.input_ids, row.branch, strict=True)
             if branch in (0, number)] for number in range(1, len(row.ends) + 1)]


def peer_inputs(ours, sequences, pixel_values):
    """Token ids of several prompts and their images (N, 3, S, S) → what transformers' LLaVA is
    called with, left-padded.
    """
    longest, patch = max(map(len, sequences)), image_token(ours.config)
    padding = [longest - len(ids) for ids in sequences]
    ids = torch.tensor([[PAD] * n + [patch if i == IMAGE_ID else i for i in ids]
                        for n, ids in zip(padding, sequences, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    return {"input_ids": ids.to(ours.device), "attention_mask": mask.to(ours.device),
            "pixel_values": pixel_values.to(ours.device, ours.dtype)}


def peer_generate(theirs, inputs, tokens):
    """Greedy answers of exactly `tokens` tokens (B, tokens), and the logits of the first one (B,
    vocab).
    """
    result = theirs.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens,
                             do_sample=False, output_logits=True, return_dict_in_generate=True)
    return result.sequences[:, -tokens:], result.logits[0]


def environment(device, peak):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"measured matmul peak {peak / 1e12:.4g} TFLOP/s")
