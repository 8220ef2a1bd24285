from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from gkd.graphs.values import constant
from gkd.losses.inputs import gram, in_full_precision
from gkd.losses.logits import check_classes, check_logits

__all__ = ["MLKDLoss", "mlkd_loss"]

PARTS = ("instance", "batch", "class")


@in_full_precision
def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    parts: Collection[str] = PARTS,
) -> dict[str, Tensor]:
    r"""Compares class probabilities at several temperatures: image by image, between images and between classes.

    .. math::
        \ell_{instance} &= \sum_T \tfrac{T^2}{B} \sum_b \mathrm{KL}\big(P^t_{b:} \,\|\, P^s_{b:}\big) \\
        \ell_{batch} &= \sum_T \tfrac1B \big\| P^s P^{s\top} - P^t P^{t\top} \big\|_F^2 \\
        \ell_{class} &= \sum_T \tfrac1K \big\| P^{s\top} P^s - P^{t\top} P^t \big\|_F^2

    with :math:`P = \sigma(z / T)`. A constant added to all logits of an image changes nothing.

    The public code multiplies the means of a view by the share of images (or classes) that are at most as confident as the median. That
    share is one half, but for ties and odd numbers, so here it belongs to the weight.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        temperatures: Over which to sum.
        parts: Which of the three to compute.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2; **output** a scalar for every part

    Raises:
        ValueError: If the shapes are others, or there is no temperature or one that is not positive.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> {name: loss.item() for name, loss in mlkd_loss(logits, logits).items()}
        {'instance': 0.0, 'batch': 0.0, 'class': 0.0}
    """
    if not temperatures:
        raise ValueError("Expected at least one temperature (got none)")
    check_logits(student_logits, teacher_logits, min(temperatures))
    check_classes(student_logits)
    batch, classes = student_logits.shape
    scale = constant(temperatures, student_logits)[:, None, None]
    student_log, teacher_log = ((logits / scale).log_softmax(2) for logits in (student_logits, teacher_logits.detach()))
    student, teacher = student_log.exp(), teacher_log.exp()
    losses = {}
    if "instance" in parts:
        losses["instance"] = (scale.square() * teacher * (teacher_log - student_log)).sum() / max(batch, 1)
    if "batch" in parts:
        losses["batch"] = (gram(student) - gram(teacher)).square().sum() / max(batch, 1)
    if "class" in parts:
        losses["class"] = (gram(student.mT) - gram(teacher.mT)).square().sum() / classes
    return losses


class MLKDLoss(nn.Module):
    """Distillation at several levels and temperatures, see :func:`mlkd_loss`.

    Published with two views of every image and 0.9 for every part and view; the weights for one view are in ``gin/methods/mlkd.gin``.

    Raises:
        ValueError: If there is no temperature, or one that is not positive.
    """

    level = "logits"
    parts = PARTS

    def __init__(self, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)) -> None:
        super().__init__()
        if not temperatures or not min(temperatures) > 0:
            raise ValueError(f"Expected temperatures above 0 (got {tuple(temperatures)})")
        self.temperatures = tuple(temperatures)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, parts: Collection[str] = PARTS
    ) -> dict[str, Tensor]:
        """Returns the loss of every part; target is only looked at, to refuse several labels of an image."""
        check_classes(student_logits, target)
        return mlkd_loss(student_logits, teacher_logits, self.temperatures, parts)

    def extra_repr(self) -> str:
        """Names the temperatures."""
        return f"temperatures={self.temperatures}"
