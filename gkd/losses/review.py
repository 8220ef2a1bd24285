from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.losses.inputs import as_input, check_maps, check_same_shape, in_full_precision

__all__ = ["ReviewKDLoss", "hcl_loss"]


@in_full_precision
def hcl_loss(student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    r"""Compares two maps at full size and pooled to coarser grids: the hierarchical context loss.

    .. math:: \sum_l w_l\, \mathrm{MSE}\big(\mathrm{pool}_l F^s, \mathrm{pool}_l F^t\big) \Big/ \sum_l w_l,
              \quad w_l = 1, \tfrac12, \tfrac14, \dots

    Grids that are not smaller than the map are left out.

    Args:
        student: Feature map.
        teacher: Feature map of one shape with it; gets no gradient.
        levels: Heights (and widths) of the coarser grids, from fine to coarse.

    Shapes:
        - **student**, **teacher** [B, C, h, w]; **output** scalar

    References:
        Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    # Pooling is linear, so the difference is pooled once instead of both maps.
    difference = student - teacher.detach()
    loss, total, weight = difference.square().mean(), 1.0, 1.0
    for level in levels:
        if level < student.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
    return loss / total


class AttentionFusion(nn.Module):
    """Fuses a student's map with what comes from the deeper stages, by one attention map for each (the ABF block of ReviewKD).

    Args:
        in_channels: Of the student's map.
        mid_channels: Of what is handed from stage to stage.
        out_channels: Of the teacher's map.
        fuse: Whether there is a deeper stage.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        reduce, expand = (
            nn.Conv2d(in_channels, mid_channels, 1, bias=False),
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
        )
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(mid_channels))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(out_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, features: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns the map to compare with the teacher's, of this size, and what the next shallower stage receives."""
        x = self.reduce(features)
        if self.attention is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share, deeper_share = self.attention(torch.cat([x, y], 1)).split(1, 1)
            x = x * share + y * deeper_share
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


def as_map(features: Tensor) -> Tensor:
    """A vector as a map of one pixel; a map stays as it is.

    Shapes:
        - **features** [B, C, h, w] or [B, C]; **output** [B, C, h, w] or [B, C, 1, 1]
    """
    return features[:, :, None, None] if features.dim() == 2 else features


class ReviewKDLoss(nn.Module):
    """Knowledge review: every student stage, fused with all deeper ones, is compared with the teacher's by :func:`hcl_loss`.

    Layers are built from the probed shapes; no table of channels or sizes for each pair of networks is needed. Published with weights
    between 0.6 (ResNet56 -> ResNet20) and 8, and 20 epochs of ramp.

    Args:
        max_mid_channels: What is handed from stage to stage has as many channels as the student's deepest stage, at most this many.
        pooled: Whether the spatial mean of the deepest stage takes part as one stage more. The published recipe for CIFAR compares maps
            before their activation and the pooled vector, which is no mean of these: tap it as the last stage, and leave this out.
    """

    level = "stages"

    def __init__(self, max_mid_channels: int = 512, pooled: bool = True) -> None:
        super().__init__()
        self.max_mid_channels, self.pooled = max_mid_channels, pooled
        self.fusions = nn.ModuleList()

    def build(self, student_shapes: Mapping[str, torch.Size], teacher_shapes: Mapping[str, torch.Size]) -> None:
        """Creates a fusion for every stage of these shapes [B, C, h, w] or [B, C], given from shallow to deep."""
        channels = [(shape[1], teacher_shapes[stage][1]) for stage, shape in student_shapes.items()]
        if not channels:
            raise ValueError("Expected at least one stage (got none)")
        if self.pooled:
            channels.append(channels[-1])
        mid = min(self.max_mid_channels, channels[-1][0])
        self.fusions = nn.ModuleList(AttentionFusion(c, mid, d, fuse=i < len(channels) - 1) for i, (c, d) in enumerate(channels))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of all stages, given from shallow to deep."""
        students, teachers = [as_map(x) for x in student.values()], [as_map(teacher[stage]) for stage in student]
        if self.pooled:
            students.append(students[-1].mean((2, 3), keepdim=True))
            teachers.append(teachers[-1].mean((2, 3), keepdim=True))
        if len(self.fusions) != len(students):
            raise RuntimeError(f"Expected build() for the {len(student)} stages of the features before the first forward of ReviewKDLoss")
        losses, handed = [], None
        for fusion, student_map, teacher_map in zip(reversed(self.fusions), reversed(students), reversed(teachers), strict=True):
            compared, handed = fusion(as_input(student_map, fusion), handed, teacher_map.shape[2:])
            losses.append(hcl_loss(compared, teacher_map))
        return torch.stack(losses).sum()
