from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.losses.detection import DenseKDLoss
from gkd.losses.inputs import check_same_shape, in_full_precision, sigmoid_divergence

__all__ = ["CrossKDLoss", "LDLoss", "MaskKDLoss", "ld_loss", "mask_kd_loss"]


@in_full_precision
def ld_loss(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 10.0) -> Tensor:
    r"""Compares where two one-stage detectors see the sides of boxes, most at the places at which the teacher is sure of an object.

    .. math:: \frac{1}{\max(1, \sum_i w_i)} \sum_i w_i \frac14 \sum_{s=1}^4
              T^2\, \mathrm{KL}\big(\sigma(z^t_{is} / T) \,\|\, \sigma(z^s_{is} / T)\big)

    A head that gives a distribution over distances for every side (as GFL's) is compared by these distributions; of one that gives a number
    for every side (RetinaNet, FCOS) the divergence is replaced by the smooth absolute difference of the numbers.

    Args:
        student: Outputs of the regression head at all places, m for each of the four sides.
        teacher: Those of the teacher at the same places; get no gradient.
        weight: How sure the teacher is of an object, in [0, 1]; gets no gradient.
        temperature: Softens the distributions; numbers have none.

    Shapes:
        - **student**, **teacher** [n, 4 m], **weight** [n]; **output** scalar

    Raises:
        ValueError: If the shapes differ, or 4 does not divide their width.

    References:
        Zheng et al.: Localization Distillation for Dense Object Detection, CVPR 2022.

    Examples:
        >>> ld_loss(torch.zeros(1, 4), torch.full((1, 4), 2.0), torch.ones(1))
        tensor(1.5000)
    """
    check_same_shape(student, teacher)
    if student.dim() != 2 or student.shape[1] % 4 or weight.shape != student.shape[:1]:
        raise ValueError(
            f"Expected [n, 4 m] for the sides and [n] weights (got {list(student.shape)} and {list(weight.shape)}): one row for a place"
        )
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")
    ours, goal = (x.unflatten(1, (4, -1)) for x in (student, teacher.detach()))
    if ours.shape[2] == 1:
        difference = F.smooth_l1_loss(ours, goal, reduction="none")
    else:
        logs, target = ((x / temperature).log_softmax(2) for x in (ours, goal))
        difference = F.kl_div(logs, target, reduction="none", log_target=True) * temperature**2
    weight = weight.detach()
    return (weight * difference.sum(2).mean(1)).sum() / weight.sum().clamp(min=1)


@in_full_precision
def mask_kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the masks that two networks draw in the same boxes: the mean divergence of their pixels.

    .. math:: \frac{1}{n m^2} \sum_{ip} \mathrm{KL}\big(\sigma(z^t_{ip}) \,\|\, \sigma(z^s_{ip})\big)

    Args:
        student: Scores before the sigmoid; resized to the teacher's size where that differs.
        teacher: Those of the teacher; get no gradient.

    Shapes:
        - **student** [n, m, m], **teacher** [n, m', m'], n may be 0; **output** scalar

    Examples:
        >>> mask_kd_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item()
        0.0
    """
    if len(student) == 0:
        return student.sum()
    if student.shape[1:] != teacher.shape[1:]:
        student = F.interpolate(student.unsqueeze(1), teacher.shape[1:], mode="bilinear")[:, 0]
    check_same_shape(student, teacher)
    return sigmoid_divergence(student, teacher.detach()).mean()


class LDLoss(nn.Module):
    """Localisation distillation of one-stage detectors, see :func:`ld_loss`."""

    level = "logits"
    dense = True
    compares = "locations"

    def __init__(self, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Returns the loss; the target is how sure the teacher is of an object at every place."""
        return ld_loss(student, teacher, target, self.temperature)


class MaskKDLoss(nn.Module):
    """Masks of the objects on proposals that both networks share, see :func:`mask_kd_loss`."""

    level = "logits"
    compares = "masks"

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; targets are not used."""
        return mask_kd_loss(student, teacher)


class CrossKDLoss(nn.Module):
    """Compares what the *teacher's* head makes of the student's maps with what it makes of its own: the student learns maps that the head
    can read, and its own head is left to the annotations.

    The published method enters the teacher's head after some of its layers; here it is entered at its beginning, so that the heads may
    differ. The pyramids must have equally many channels.

    Args:
        loss: How the class scores are compared: `DenseKDLoss` for a teacher of one stage, `KDLoss` for one of two stages.

    References:
        Wang, Chen, Zheng, Li, Cheng, Hou: CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024.
    """

    level = "logits"
    compares = "crossed"

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.loss = DenseKDLoss() if loss is None else loss
        self.dense = bool(getattr(self.loss, "dense", False))

    def forward(self, student: Tensor, teacher: Tensor, target: torch.Tensor | None = None) -> Tensor:
        """Returns the loss of the crossed scores."""
        return self.loss(student, teacher, target)
