from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.losses.class_maps import class_maps
from gkd.losses.inputs import check_same_shape, in_full_precision
from gkd.losses.logits import check_target
from gkd.losses.term import Outputs, Term

__all__ = ["SDDLoss", "local_logits", "sdd_loss"]


def local_logits(features: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[int]) -> Tensor:
    """Logits of an image's regions: the last layer applied to the means of the cells of several grids.

    Coarser grids are averaged from the finest one, as published.

    Args:
        features: The map whose mean the last layer sees.
        weight: Its weights.
        bias: Its biases, or None.
        scales: Cells of every grid along a side.

    Shapes:
        - **features** [B, C, h, w], **weight** [K, C], **bias** [K]; **output** [B, N, K] with N the sum of all squared scales,
          the coarsest grid first
    """
    finest = class_maps(features, weight, bias, size=max(scales))
    return torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in sorted(scales)], dim=2).mT


@in_full_precision
def sdd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    complementary_weight: float = 2.0,
) -> Tensor:
    r"""Compares the logits of regions, and counts a region double where the teacher sees something else there than in the whole.

    .. math:: \frac{1}{B N} \sum_{b, n} w_{bn}\, \ell(z^s_{bn}, z^t_{bn}, y_b), \quad
              w_{bn} = \begin{cases} 1 & [\hat y_{bn} = y_b] = [\hat y_{b0} = y_b] \\ 2 & \text{otherwise} \end{cases}

    where :math:`\hat y_{bn}` is the class that the teacher gives to a region and n = 0 is the whole image.

    Args:
        student_logits: Logits of regions, those of the whole image first.
        teacher_logits: Likewise; get no gradient.
        target: True class of every image.
        loss: Compares logits [1, K] with others, given the class [1]; called for every region by itself.
        complementary_weight: Weight of a region in which the teacher is right but not in the whole, or the other way round.

    Shapes:
        - **student_logits**, **teacher_logits** [B, N, K], **target** [B] long; **output** scalar

    Raises:
        ValueError: If the shapes are others.

    References:
        Luo, Wei: Scale Decoupled Distillation, CVPR 2024.
    """
    if student_logits.dim() != 3:
        raise ValueError(f"Expected logits of regions [B, N, K] (got {tuple(student_logits.shape)})")
    check_same_shape(student_logits, teacher_logits)
    batch, regions, classes = student_logits.shape
    check_target(target, batch, "SDD")
    teacher_logits = teacher_logits.detach()
    classes_of_regions = target.long().repeat_interleave(regions)
    rows = (student_logits.reshape(-1, 1, classes), teacher_logits.reshape(-1, 1, classes), classes_of_regions.unsqueeze(1))
    divergences = torch.vmap(loss)(*rows).view(batch, regions)
    right = teacher_logits.argmax(2) == target.unsqueeze(1)
    weights = torch.where(right == right[:, :1], 1.0, complementary_weight)
    return (weights * divergences).sum() / max(batch * regions, 1)


class SDDLoss(nn.Module):
    """Scale decoupled distillation: a loss of logits for every region of several grids, see :func:`local_logits` and :func:`sdd_loss`.

    Published with the grids 1, 2 and 4, and with KD, DKD and NKD as the loss, each with its own weight. Grids finer than the map of
    either network are left out.

    Args:
        loss: A loss of class logits that is a mean over the images, such as :class:`~gkd.losses.KDLoss`.
        scales: Cells of every grid along a side; 1 is the whole image.
        complementary_weight: See :func:`sdd_loss`.

    Raises:
        TypeError: If loss does not compare class logits.
        ValueError: If 1 is not among the scales.
    """

    level = "stage"
    needs_outputs = True

    def __init__(self, loss: nn.Module, scales: Sequence[int] = (1, 2, 4), complementary_weight: float = 2.0) -> None:
        super().__init__()
        term = Term.of(loss)
        if term.level != "logits" or term.compares != "classes" or term.parts or term.needs_index:
            raise TypeError(f"Expected a loss of class logits that returns one value (got {type(loss).__name__})")
        if 1 not in scales or min(scales) < 1:
            raise ValueError(f"Expected scales of at least 1, and 1 itself for the whole image (got {tuple(scales)})")
        self.loss, self.scales, self.complementary_weight = loss, tuple(scales), complementary_weight

    def forward(self, student: Tensor, teacher: Tensor, outputs: Outputs) -> Tensor:
        """Returns the loss of the map that both classifiers average."""
        outputs.student_head.check_map(student, outputs.student_logits)
        outputs.teacher_head.check_map(teacher, outputs.teacher_logits)
        largest = min(*student.shape[2:], *teacher.shape[2:])
        scales = [scale for scale in self.scales if scale <= largest]
        student_logits = local_logits(student, outputs.student_head.weight, outputs.student_head.bias, scales)
        teacher_logits = local_logits(teacher, outputs.teacher_head.weight, outputs.teacher_head.bias, scales)
        return sdd_loss(student_logits, teacher_logits, outputs.target, self.loss, self.complementary_weight)

    def extra_repr(self) -> str:
        """Names the grids."""
        return f"scales={self.scales}, complementary_weight={self.complementary_weight:g}"
