"""From a picture to pixels, as CLIP's tower takes them.

    pixels = ImageProcessor(336)("image.jpg")               # (3, 336, 336), padded to a square
    pixels = ImageProcessor(336, grid=grid)("image.jpg")    # (tiles, 3, 336, 336), anyres.py

Follows LLaVA's `expand2square` (haotian-liu/LLaVA) and CLIPImageProcessor of
huggingface/transformers.
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from support.anyres import TileGrid
from support.images import fit_thin, open_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class ImageProcessor:
    """CLIP's preprocessing behind LLaVA's padding. Path or PIL image → (3, size, size) fp32; with a
    `grid` (n, 3, size, size), a row per tile.
    """
    size: int = 336
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    pad: bool = True        # LLaVA's image_aspect_ratio "pad"; else the middle is cut out
    grid: TileGrid = None   # any resolution

    def __call__(self, image):
        if self.grid:
            tiles = self.grid.tiles(open_image(image))
            return torch.stack([self.normalised(tile) for tile in tiles])
        colour = tuple(int(m * 255) for m in self.mean) if self.pad else None
        image = fit_thin(open_image(image), self.size, colour)
        # Pad to a square in the mean colour, scale the short side, cut the middle out.
        if self.pad and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        short = min(image.size)
        if short != self.size:
            size = [int(self.size * edge / short) for edge in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return self.normalised(image.crop((left, top, left + self.size, top + self.size)))

    def normalised(self, image):
        """PIL → (3, S, S)"""
        pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)                      # (S, S, 3)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1)
