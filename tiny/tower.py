"""A tiny CLIP tower learns to see.

    auc = pretrain_tower(tower, seed=42, options=TowerTraining(epochs=1))

This stands in for CLIP's training (arXiv 2103.00020). Deliberately different: CLIP learnt from
captions, this tower learns which class stands in each patch and which classes are in the image.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support import common
from support.preprocessing import CLIP_MEAN, CLIP_STD
from tiny.pictures import NAMES, SIDE, picture

PATCH = 8                           # pixels of a patch's side
PATCHES = (SIDE // PATCH) ** 2      # of an image, 36
CLASSES = len(NAMES)
TEST_IMAGES = 2000


@dataclass(frozen=True)
class TowerTraining:
    """How a tower is trained; train.py's --tiny_tower."""
    images: int = 12000
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-3


def pretrain_tower(tower, seed, options, progress=True):
    """Train `tower` in place → its mean AUC over the classes, on fresh images.

    tower: pixels (B, 3, 48, 48), normalised as for CLIP → features (B, 36, hidden_size).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        seeing = TowerAndHead(tower)
        order = torch.cat([torch.randperm(options.images) for _ in range(options.epochs)])
        for module in tower.modules():
            if isinstance(module, nn.Embedding):
                # torch draws positions from N(0, 1), which would be louder than the patches.
                nn.init.normal_(module.weight, std=0.02)
    batches = order.split(options.batch_size)

    pixels, shares = render(seed, "tower", options.images, progress)
    tower.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(seeing.parameters(), weight_decay=0.01, fused=True)
    bar = common.progress(batches, "vision tower", unit="step", disable=not progress)
    for step, batch in enumerate(bar):
        # The learning rate: a tenth of warm-up, then a cosine.
        done = (step + 1) / len(batches)
        decay = 0.5 + 0.5 * math.cos(math.pi * done)
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(10 * done, decay)

        # What is in each patch, and what is in the image.
        in_patch, in_image = seeing(pixels[batch])
        share = shares[batch].to(in_patch.device)                   # (B, 36, classes + 1)
        present = (share[..., 1:].amax(1) > 0).float()              # (B, classes)
        loss = (F.cross_entropy(in_patch.flatten(0, 1), share.flatten(0, 1))
                + F.binary_cross_entropy_with_logits(in_image, present))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tower.eval()
    pixels, shares = render(seed, "tower_test", TEST_IMAGES, progress=False)
    with torch.no_grad():
        scores = torch.cat([seeing(part)[1] for part in pixels.split(250)]).cpu()
    return mean_auc(scores, shares[..., 1:].amax(1) > 0)


class TowerAndHead(nn.Module):
    """A tower with one linear layer that names what each patch and the whole image show."""

    def __init__(self, tower):
        super().__init__()
        device = next(tower.parameters()).device
        self.tower = tower
        self.head = nn.Sequential(nn.LayerNorm(tower.hidden_size),
                                  nn.Linear(tower.hidden_size, CLASSES + 1 + CLASSES)).to(device)
        self.mean = torch.tensor(CLIP_MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(CLIP_STD, device=device).view(3, 1, 1)

    def forward(self, pixels):
        """uint8 (B, 3, 48, 48) → logits of each patch's class (B, 36, classes + 1), where 0 is
        nobody, and of the classes in the image (B, classes)."""
        features = self.tower((pixels.to(self.mean.device) / 255 - self.mean) / self.std)
        in_patch, in_image = self.head(features).split([CLASSES + 1, CLASSES], -1)
        # Over the patches something between mean and maximum: an object fills few of them.
        return in_patch, in_image.logsumexp(1) - math.log(PATCHES)


def mean_auc(scores, present):
    """scores, present (images, classes) → the AUC of each class, averaged.

    AUC is the chance that a positive has a higher score than a negative. It follows from the sum
    of the positives' ranks (Mann-Whitney).
    """
    rank = scores.argsort(0).argsort(0) + 1.0
    positives = present.sum(0)
    negatives = len(scores) - positives
    above = (rank * present).sum(0) - positives * (positives + 1) / 2
    return (above / (positives * negatives)).mean().item()


def render(seed, split, count, progress):
    """Draw pictures → pixels uint8 (count, 3, 48, 48), shares (count, 36, classes + 1).

    A share is how much of a patch a class fills, 0 being nobody. In every second image the scene
    says nothing about the objects, so that the tower must look and cannot guess.
    """
    side, width = SIDE // PATCH, CLASSES + 1
    pixels = torch.empty(count, SIDE, SIDE, 3, dtype=torch.uint8)
    shares = torch.empty(count, PATCHES, width)
    patch_of = np.kron(np.arange(PATCHES).reshape(side, side), np.ones((PATCH, PATCH), int))
    for i in common.progress(range(count), "pictures for the tower", unit="image",
                             disable=not progress):
        _, _, image, owner = picture(seed, split, i, biased=i % 2 == 0)
        area = np.bincount((patch_of * width + owner).ravel(), minlength=PATCHES * width)
        pixels[i] = torch.from_numpy(image)
        shares[i] = torch.from_numpy(area / PATCH ** 2).view(-1, width)
    return pixels.permute(0, 3, 1, 2).contiguous(), shares
