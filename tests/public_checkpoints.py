"""One random LLaVA in the files of the software that writes public checkpoints: transformers, peft,
and LLaVA's own layout key by key.

    public = PublicCheckpoints(world, tmp_path_factory)     # each layout is written when asked for
    agrees("what", public.expected, public.hf)              # what load_base reads says the same
"""
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from conftest import largest_difference, load_json
from safetensors.torch import load_file, save_file

from checkpoints.load import load_base
from data import BOS, EOS, IGNORE, IMAGE_ID, Batch, Tokenizer, collate, pack
from model import generate

transformers = pytest.importorskip("transformers")

VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              image_size=24, patch_size=8)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- The model, and what it says -----------------------------------------------------------------


def randomised(model):
    """Random values everywhere, also in norms and biases, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 1 else 0.05
            parameter += scale * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def llava_of_transformers(pieces, heads=4, kv_heads=4, select_layer=-2, **changes):
    """A random LlavaForConditionalGeneration. Like llava-1.5-7b-hf it has 64 embeddings more than
    its tokenizer has pieces.
    """
    torch.manual_seed(0)
    sizes = dict(intermediate_size=56, num_hidden_layers=3) | changes
    text = transformers.LlamaConfig(
        vocab_size=pieces + 64, hidden_size=8 * heads, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=256, rms_norm_eps=1e-5,
        pad_token_id=0, bos_token_id=BOS, eos_token_id=EOS, **sizes)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text,
        image_token_index=pieces, vision_feature_layer=select_layer)
    return randomised(transformers.LlavaForConditionalGeneration(config))


def prompts(*rows, pixels):
    """Rows of ids, an image each, as an open Batch."""
    packed = [pack([(ids, [IGNORE] * len(ids))], 9, 256, str(n)) for n, ids in enumerate(rows)]
    return collate(packed, lambda n: pixels[int(n)])


@dataclass
class Expected:
    """Two prompts, and what transformers says to them."""
    batch: Batch
    logits: torch.Tensor        # (2, T, vocab)
    tokens: list                # of the greedy answers, at most 20


def expected_of(theirs, pieces):
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    batch = prompts([BOS, 7, 8, IMAGE_ID, 9, 10, 11], [BOS, 20, 21, IMAGE_ID, 12, 14, 13],
                    pixels=pixels)
    ids = batch.input_ids[:, :6 + 9]                                        # without our padding
    ids = ids.masked_fill(ids == IMAGE_ID, pieces)
    theirs.generation_config.pad_token_id = 0
    answers = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=20,
                              do_sample=False)[:, ids.shape[1]:].tolist()
    tokens = [answer[:answer.index(EOS)] if EOS in answer else answer for answer in answers]
    return Expected(batch, theirs(input_ids=ids, pixel_values=pixels).logits, tokens)


def agrees(what, expected, folder, *named, **options):
    """The folder as we load it gives the expected logits and tokens → what load_base returned."""
    model = load_base(str(folder), *map(str, named), **options)
    hidden_states, _ = model.trunk(expected.batch)
    logits = model.head(hidden_states[:, :expected.logits.shape[1]])
    assert expected.logits.std() > 0.1 and max(map(len, expected.tokens)) > 5
    assert largest_difference(what, logits, expected.logits) < 1e-4
    (answers, _), = generate(model.trunk, [model.head], expected.batch, 20)
    assert [row[0] for row in answers] == expected.tokens
    return model


# ---- Its files -----------------------------------------------------------------------------------

# The beginnings of Hugging Face's keys (transformers 5), and LLaVA's own.
LLAVA_KEYS = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
              "multi_modal_projector.linear_1.": "model.mm_projector.0.",
              "multi_modal_projector.linear_2.": "model.mm_projector.2.",
              "vision_tower.": "model.vision_tower.vision_tower.vision_model."}
LLAVA_SETTINGS = {
    "model_type": "llava_llama", "rope_scaling": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False}


class PublicCheckpoints:
    """The folders of one random model; tests read them and write into copies."""

    def __init__(self, world, tmp_path_factory):
        self.tokenizer, self.new_folder = world.tokenizer, tmp_path_factory.mktemp
        self.pieces = len(Tokenizer(world.tokenizer))

    @cached_property
    def model(self):
        return llava_of_transformers(self.pieces)

    @cached_property
    def expected(self):
        return expected_of(self.model, self.pieces)

    def save(self, model, folder):
        """As save_pretrained writes it, with the tokenizer beside."""
        model.save_pretrained(folder)
        shutil.copy(self.tokenizer, folder / "tokenizer.model")
        return folder

    @cached_property
    def hf(self):
        """Hugging Face's layout."""
        return self.save(self.model, self.new_folder("hf"))

    @cached_property
    def llava_inside(self):
        """LLaVA's layout with the tower inside the checkpoint."""
        folder, tensors = self.new_folder("llava"), {}
        for key, tensor in load_file(self.hf / "model.safetensors").items():
            theirs = next(theirs for theirs in LLAVA_KEYS if key.startswith(theirs))
            tensors[LLAVA_KEYS[theirs] + key[len(theirs):]] = tensor
        for n in range(3):                          # numbers that must not be used
            frequencies = torch.full((4,), 1e9)
            tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = frequencies
        text = load_json(self.hf / "config.json")["text_config"]
        config = {name: value for name, value in text.items()
                  if name not in ("rope_parameters", "head_dim")}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | LLAVA_SETTINGS))
        shutil.copy(self.tokenizer, folder / "tokenizer.model")
        return folder

    @cached_property
    def llava(self):
        """LLaVA's layout with the tower outside, in `clip`."""
        def without_tower(key):
            return None if "vision_tower" in key else key

        return variant_of(self.llava_inside, self.new_folder("outside") / "llava", without_tower)

    @cached_property
    def clip(self):
        folder = self.new_folder("clip")
        self.model.model.vision_tower.save_pretrained(folder)
        return folder

    @cached_property
    def adapted(self):
        """A LoRA of peft on every linear of LLaMA → the adapter's folder, Expected of the model
        with it, unmerged.
        """
        peft, folder = pytest.importorskip("peft"), self.new_folder("lora")
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(self.hf)
        causal = transformers.LlamaForCausalLM(theirs.config.text_config)
        causal.model, causal.lm_head = theirs.model.language_model, theirs.lm_head
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, lora_dropout=0.05)
        wrapped = peft.get_peft_model(causal, config).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(folder)
        # peft has put its layers into `theirs`.
        return str(folder), expected_of(theirs, self.pieces)


def variant_of(folder, target, rename=lambda key: key, **changes):
    """A copy of a folder with other keys (None leaves one out) and another config.json."""
    shutil.copytree(folder, target)
    tensors = {rename(key): tensor
               for key, tensor in load_file(target / "model.safetensors").items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key is not None}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = load_json(target / "config.json") | changes
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def edit(path, change):
    """change(tensors) of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def as_bin(folder, name="model.safetensors", target="pytorch_model.bin"):
    """Write a safetensors file of a folder as .bin instead → its path, its tensors."""
    tensors = load_file(folder / name)
    torch.save(tensors, folder / target)
    os.remove(folder / name)
    return folder / target, tensors
