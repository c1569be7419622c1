"""The CLIP vision tower, up to the layer whose patch features LLaVA reads, and the projector.

    tower = CLIPVisionTower(CLIPVisionConfig(), select_layer=-2)
    features = tower(pixel_values)                # (N, 3, 336, 336) normalised → (N, 576, 1024)

Follows CLIP (arXiv 2103.00020); parameter names are those of `CLIPVisionModel` in
huggingface/transformers.
Deliberately different: what LLaVA does not use is never built. That is every layer behind the
selected one (layer -2 of 24 means that 23 are built), the last norm, and the projection to CLIP's
joint space.
"""
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

TOWER = "vision_tower.vision_model."      # how the keys of a tower begin in a whole model
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class CLIPVisionConfig:
    """Sizes of the tower. Defaults: ViT-L/14-336. Names: those of a public `config.json`."""
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
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size,
                                         stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)          # (N, P, C)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), 1) + self.position_embedding.weight       # (N, 1 + P, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        N, T, C = x.shape
        q, k, v = (project(x).view(N, T, self.num_heads, C // self.num_heads).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))           # (N, H, T, D)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, C)
        return self.out_proj(out)


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
        # The public files spell it so.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, num_layers)


def projector(depth, width, inner, hidden_size):
    """LLaVA's `mlpNx_gelu` of that depth, features → LLaMA's width; depth 0: its `linear`."""
    if not depth:
        return nn.Linear(width, hidden_size)
    parts = []
    for before, after in pairwise([width, *(depth - 1) * [inner], hidden_size]):
        parts += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*parts[1:])


class CLIPVisionTower(nn.Module):
    """The tower up to `select_layer`, which counts as LLaVA's `mm_vision_select_layer`.

    -1 is the last layer's output, -2 the output of the layer before.
    """

    def __init__(self, config, select_layer=-2):
        super().__init__()
        there = config.num_hidden_layers
        num_layers = there + 1 + select_layer if select_layer < 0 else select_layer
        if not 0 <= num_layers <= there:
            raise ValueError(f"select_layer {select_layer}: there are only {there} layers")
        self.config, self.hidden_size = config, config.hidden_size
        self.vision_model = VisionModel(config, num_layers)

    def forward(self, pixel_values):
        """Normalised pixels (N, 3, image_size, image_size) → patch features (N, P, C)."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return x[:, 1:]                                                   # without the class token

    def unused_key(self, key):
        """Whether a key of a public file belongs to a part that is not built here."""
        parts, built = key.split("."), len(self.vision_model.encoder.layers)
        behind = "layers" in parts and int(parts[parts.index("layers") + 1]) >= built
        return behind or "post_layernorm" in parts or parts[-1] == "position_ids"
