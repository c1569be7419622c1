"""Any-resolution images of LLaVA-1.6: which tiles an image has, and which patches LLaMA reads.

    grid = TileGrid(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
    tiles = grid.tiles(image)           # PIL, 336 x 336: the whole image squashed, then its parts
    count, order = grid.layout(image.size)          # of tiles; which patch of them stands where

An image is scaled into the resolution among `pinpoints` that keeps most of it, padded with black,
and cut into tiles, row by row. LLaMA reads all patches of the squashed image, and then the patches
of the tiles as if they were one picture: without rows and columns of padding, a newline behind each
row. At 336 pixels that is 2,928 tokens at most.

Follows LLaVA-1.6 (LLaVA-NeXT), `llava/mm_utils.py` and `prepare_inputs_labels_for_multimodal` in
`llava/model/llava_arch.py` of haotian-liu/LLaVA, with `mm_patch_merge_type` "spatial_unpad".
Deliberately different: padding is counted in whole numbers, which gives what transformers gives.
The original's floating point loses a row or column for 30 of the million sizes up to 1000 x 1000.
"""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

NEWLINE = -1


@dataclass(frozen=True)
class TileGrid:
    pinpoints: tuple        # ((width, height), ...) in pixels
    side: int = 336         # of a tile, in pixels
    patches: int = 24       # of a tile, in a row

    def resolution(self, size):
        """The pinpoint for an image of that size: the most pixels of it, then the least waste."""
        width, height = size

        def merit(pinpoint):
            scale = min(pinpoint[0] / width, pinpoint[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=merit)               # of equals the first

    def tiles(self, image):
        """An RGB image → its tiles; the first shows all of it, without its proportions."""
        wide, high = self.resolution(image.size)
        across, down = wide / image.width, high / image.height
        if across < down:
            size = wide, min(math.ceil(image.height * across), high)
        else:
            size = min(math.ceil(image.width * down), wide), high
        whole = Image.new("RGB", (wide, high))
        whole.paste(image.resize(size), ((wide - size[0]) // 2, (high - size[1]) // 2))
        side = self.side
        parts = [whole.crop((left, top, left + side, top + side))
                 for top in range(0, high, side) for left in range(0, wide, side)]
        return [image.resize((side, side)), *parts]

    @property
    def most_tokens(self):
        """How many tokens an image has at most."""
        return max(len(self.layout(size)[1]) for size in self.pinpoints)

    def layout(self, size):
        """How many tiles an image of that size has, and the patches that LLaMA reads, (n,).

        Patches are counted through all tiles; a newline is NEWLINE.
        """
        columns, rows = (edge // self.side for edge in self.resolution(size))
        of_tile, p = self.patches ** 2, self.patches
        parts = np.arange(of_tile, (1 + rows * columns) * of_tile)
        picture = parts.reshape(rows, columns, p, p).swapaxes(1, 2).reshape(rows * p, columns * p)
        top, left = padding(size, picture.shape)
        picture = picture[top:picture.shape[0] - top, left:picture.shape[1] - left]
        picture = np.pad(picture, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return 1 + rows * columns, np.concatenate((np.arange(of_tile), picture.flatten()))

    def in_batch(self, patches, image_index, counts):
        """Rows of patches (None without an image) → one after the other, counted through the tiles
        of all images. counts: tiles of each image.
        """
        first = np.cumsum([0, *counts]) * self.patches ** 2
        return np.concatenate([np.where(row == NEWLINE, NEWLINE, row + first[i])
                               for row, i in zip(patches, image_index, strict=True) if i >= 0])


def tile_grid(pinpoints, vision):
    """The grid of a tower (CLIPVisionConfig), None without pinpoints."""
    side = vision.image_size
    return TileGrid(pinpoints, side, side // vision.patch_size) if pinpoints else None


def padding(size, shape):
    """Rows above and columns before an image, counted in patches. shape: (rows, columns)."""
    (width, height), (rows, columns) = size, shape
    if width * rows > columns * height:
        return (rows - height * columns // width) // 2, 0
    return 0, (columns - width * rows // height) // 2


def numbered_tiles(counts):
    """How many tiles each image has → (images, most), their numbers, all together; -1 = none."""
    ends, numbers = np.cumsum(counts), np.full((len(counts), max(counts)), -1)
    for row, count, end in zip(numbers, counts, ends, strict=True):
        row[:count] = np.arange(end - count, end)
    return numbers
