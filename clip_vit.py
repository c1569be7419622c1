"""The CLIP vision tower, up to the layer whose patch features LLaVA reads.

    tower = CLIPVisionTower(CLIPVisionConfig(), select_layer=-2)
    features = tower(pixel_values)                # (N, 3, 336, 336) normalised → (N, 576, 1024)

Follows CLIP (arXiv 2103.00020); parameter names are those of `CLIPVisionModel` in huggingface/transformers; open_clip's
names for the same tensors are told at the end.
Deliberately different: layers behind the selected one, the last norm and the projection to CLIP's joint space are never
built, because LLaVA does not use them (layer -2 of 24 means that 23 are built).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOWER = "vision_tower.vision_model."      # how the keys of a tower begin in a whole model
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class CLIPVisionConfig:
    """Sizes of the tower; the defaults are ViT-L/14-336's, the names those of a public `config.json`."""
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)             # (N, P, C)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), 1) + self.position_embedding.weight              # (N, 1 + P, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        N, T, C = x.shape
        q, k, v = (proj(x).view(N, T, self.num_heads, C // self.num_heads).transpose(1, 2)  # (N, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(num_layers))


class VisionModel(nn.Module):
    def __init__(self, config, num_layers):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)   # spelt so in the public files
        self.encoder = Encoder(config, num_layers)


class CLIPVisionTower(nn.Module):
    """`select_layer` counts as in LLaVA's `mm_vision_select_layer`: -1 is the last layer's output, -2 the one before."""

    def __init__(self, config, select_layer=-2):
        super().__init__()
        num_layers = config.num_hidden_layers + 1 + select_layer if select_layer < 0 else select_layer
        if not 0 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"select_layer {select_layer} does not exist: the tower has {config.num_hidden_layers} layers")
        self.config, self.hidden_size = config, config.hidden_size
        self.vision_model = VisionModel(config, num_layers)

    def forward(self, pixel_values):
        """(N, 3, image_size, image_size), CLIP-normalised → patch features (N, P, C), the class token dropped."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return x[:, 1:]

    def unused_key(self, key):
        """Whether a key of a public file belongs to a part that is not built here."""
        parts = key.split(".")
        behind = "layers" in parts and int(parts[parts.index("layers") + 1]) >= len(self.vision_model.encoder.layers)
        return behind or "post_layernorm" in parts or parts[-1] == "position_ids"


# ---------------------------------------------------------------------------------------------------------------------
# open_clip's names for the same tower

OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2"}


def from_open_clip(tensors, third):
    """{open_clip's key: tensor} → {ours: tensor}, the text half and what follows the layers left out.

    open_clip keeps q, k and v in one: `third(tensor, n)` gives the n-th third of its rows.
    """
    ours = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("visual.")
        if name == key or name.startswith(("ln_post.", "attn_pool.")) or name == "proj":
            continue
        for theirs, our in OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, our)
        name = TOWER + name
        before, fused, kind = name.partition("attn.in_proj_")
        if fused:
            ours |= {f"{before}self_attn.{part}_proj.{kind}": third(tensor, n) for n, part in enumerate("qkv")}
        else:
            ours[name] = tensor
    return ours


def open_clip_config(values, quick_gelu):
    """CLIPVisionConfig of an open_clip model config. Raises ValueError naming what our tower does not build."""
    vision = values["vision_cfg"]
    known = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size",
             "pool_type", "final_ln_after_pool", "output_tokens")                       # these act behind the layers
    other = [name for name in vision if name not in known] + [name for name in ("image_size", "layers", "patch_size")
                                                              if not isinstance(vision.get(name), int)]
    if other:
        raise ValueError(f"its {other[0]} ({vision.get(other[0])}) is not built here")
    width = vision["width"]
    return CLIPVisionConfig(width, int(width * vision.get("mlp_ratio", 4.0)), vision["layers"],
                            width // vision.get("head_width", 64), vision["image_size"], vision["patch_size"],
                            hidden_act="quick_gelu" if quick_gelu or values.get("quick_gelu") else "gelu")
