"""The cheapest that a step with a method could be: terms that take its place and do only what none of its implementations can leave out.

========= ===========================================================================================================================
AT        reads both maps of every stage and writes a gradient as large as the student's: a dot product, in the precision of the maps
SP        both Gram matrices of the flattened last maps, in float32, and one product backward
RKD       both Gram matrices of the pooled last maps, one value for every three images in each network, and their Huber loss
ICKD      its 1x1 convolution with norm, then the products of pixels with pixels, and of channels with these, which replace the Gram
          matrices of the channels where there are fewer pixels than channels
========= ===========================================================================================================================

Normalising, and what is smaller than a map, is left out. Values are kept tiny, so that the networks keep theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gkd.losses.inputs import gram, in_full_precision, pool, vectors

__all__ = ["ATBound", "ICKDBound", "RKDBound", "SPBound"]

TINY = 1e-12


class ATBound(nn.Module):
    level = "stage"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return TINY * (student * teacher).sum()


class SPBound(nn.Module):
    level = "stage"

    @in_full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return TINY * (gram(vectors(student)) * gram(vectors(teacher))).sum()


class RKDBound(nn.Module):
    level = "stage"

    @in_full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        own, other = gram(pool(student)), gram(pool(teacher))
        return TINY * F.smooth_l1_loss(own[:, :, None] + own[:, None], other[:, :, None] + other[:, None])


class ICKDBound(nn.Module):
    level = "stage"

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.Identity()

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        channels = teacher_shape[1]
        self.embedding = nn.Sequential(nn.Conv2d(student_shape[1], channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return TINY * products(self.embedding(student).flatten(2), teacher.flatten(2))


@in_full_precision
def products(own: Tensor, other: Tensor) -> Tensor:
    return (own @ gram(own.mT)).sum() + (other @ gram(other.mT)).sum() + (own @ (own.mT @ other)).sum()
