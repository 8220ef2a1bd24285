from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gkd.losses.inputs import check_maps, check_same_shape, in_full_precision
from gkd.losses.term import Outputs

__all__ = ["CATKDLoss", "cat_loss", "class_maps"]


@in_full_precision
def class_maps(features: Tensor, weight: Tensor, bias: Tensor | None = None, size: int | tuple[int, int] | None = None) -> Tensor:
    r"""Applies the last layer of a classifier at every place of the map that it sees the mean of: the class activation maps.

    .. math:: M_{bkij} = \sum_c W_{kc} F_{bcij} + \beta_k

    With a bias, their spatial mean is the logits.

    Args:
        features: The map whose mean the last layer sees.
        weight: Its weights.
        bias: Its biases, or None.
        size: Height and width to which the map is averaged first; None leaves it as it is.

    Shapes:
        - **features** [B, C, h, w], **weight** [K, C], **bias** [K]; **output** [B, K, h, w], or [B, K, *size]

    Raises:
        ValueError: If the map has other channels than the weights.

    References:
        Zhou, Khosla, Lapedriza, Oliva, Torralba: Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    if features.dim() != 4 or features.shape[1] != weight.shape[1]:
        raise ValueError(f"Expected a map [B, {weight.shape[1]}, h, w], as the last layer sees its mean (got {tuple(features.shape)})")
    if size is not None:
        features = F.adaptive_avg_pool2d(features, size)
    return F.conv2d(features, weight[:, :, None, None], bias)


@in_full_precision
def cat_loss(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    r"""Compares class activation maps by their mean squared difference.

    .. math:: \frac{1}{B K h w} \| M^s - M^t \|^2

    Args:
        student: Class activation maps.
        teacher: Likewise; get no gradient.
        normalize: Whether every map is first divided by its length over the places.

    Shapes:
        - **student**, **teacher** [B, K, h, w]; **output** scalar

    Raises:
        ValueError: If the shapes differ.

    References:
        Guo, Yan, Li, Lin: Class Attention Transfer Based Knowledge Distillation, CVPR 2023.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    teacher = teacher.detach()
    if normalize:
        student, teacher = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKDLoss(nn.Module):
    """Class attention transfer: class activation maps, averaged to a small grid, see :func:`class_maps` and :func:`cat_loss`.

    The maps are made without the last layer's bias, as published. The weight depends on the pair: from 0.5 to 600, 15 for
    resnet32x4 -> resnet8x4.

    Args:
        size: Height and width of the grid. Published: 2 on CIFAR-100, 4 for some pairs.
        normalize: Whether every map counts by its direction alone; about half of the published pairs do so.

    Raises:
        ValueError: If size is below 1.
    """

    level = "stage"
    needs_outputs = True

    def __init__(self, size: int = 2, normalize: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"Expected size of at least 1 (got {size})")
        self.size, self.normalize = size, normalize

    def forward(self, student: Tensor, teacher: Tensor, outputs: Outputs) -> Tensor:
        """Returns the loss of the map that both classifiers average."""
        outputs.student_head.check_map(student, outputs.student_logits)
        outputs.teacher_head.check_map(teacher, outputs.teacher_logits)
        student_maps = class_maps(student, outputs.student_head.weight, size=self.size)
        return cat_loss(student_maps, class_maps(teacher, outputs.teacher_head.weight, size=self.size), self.normalize)

    def extra_repr(self) -> str:
        """Names the grid."""
        return f"size={self.size}, normalize={self.normalize}"
