from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.precision import as_float
from gkd.losses.inputs import as_input, check_maps, check_same_shape, in_full_precision, sigmoid_divergence

__all__ = ["CWDLoss", "DenseKDLoss", "MGDLoss", "PKDLoss", "cwd_loss", "dense_kd_loss", "pkd_loss"]


@in_full_precision
def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compares, channel by channel, where in the image a channel responds: the divergence of softmaxes over the pixels.

    .. math:: \frac{T^2}{B C} \sum_{bc} \mathrm{KL}\big(\sigma(F^t_{bc} / T) \,\|\, \sigma(F^s_{bc} / T)\big)

    A constant added to a channel changes nothing.

    Args:
        student: Feature map.
        teacher: Feature map; gets no gradient.
        temperature: Softens both distributions.

    Shapes:
        - **student**, **teacher** [B, C, h, w]; **output** scalar

    References:
        Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")
    student_log, teacher_log = ((x.flatten(2) / temperature).log_softmax(2) for x in (student, teacher.detach()))
    return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True) * temperature**2 / student.shape[:2].numel()


@in_full_precision
def pkd_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Asks for correlated, rather than equal, channels: half the mean squared difference of standardised maps.

    .. math:: \frac{1}{2 B C h w} \sum
              \left( \frac{F^s - \mu^s_c}{\sigma^s_c + \epsilon} - \frac{F^t - \mu^t_c}{\sigma^t_c + \epsilon} \right)^2
              \approx 1 - \overline{\rho_c}

    Mean and (unbiased) deviation of a channel are taken over batch and pixels. Invariant to a positive scale and a shift of every channel.

    Args:
        student: Feature map; resized to the teacher's size where that differs.
        teacher: Feature map; gets no gradient.
        eps: Added to the deviations.

    Shapes:
        - **student** [B, C, h, w], **teacher** [B, C, h', w'] of at least two values a channel; **output** scalar

    References:
        Cao, Zhang, Gao, Cheng, Cheng, Cheng: PKD: General Distillation Framework for Object Detectors via Pearson Correlation
        Coefficient, NeurIPS 2022.
    """
    check_maps(student, teacher)
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
    check_same_shape(student, teacher)
    if teacher.numel() == teacher.shape[1]:
        raise ValueError(f"Expected at least two values in a channel (got {tuple(teacher.shape)})")

    def standardize(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        varies = variance > 0  # the square root has no gradient at 0
        return (x - mean) / (torch.where(varies, variance, 1).sqrt() * varies + eps)

    return F.mse_loss(standardize(student), standardize(teacher.detach())) / 2


@in_full_precision
def dense_kd_loss(student: Tensor, teacher: Tensor, focus: float = 1.0) -> Tensor:
    r"""Compares the class scores of a one-stage detector, place by place and class by class, most where the two disagree.

    .. math:: \frac{\sum_{ik} |p^s_{ik} - p^t_{ik}|^\gamma\; \mathrm{KL}(p^t_{ik} \,\|\, p^s_{ik})}{\max(1, \sum_i \max_k p^t_{ik})},
              \quad p = \sigma(\text{logit})

    A score is the chance of a class against all else, so each is a distribution of two outcomes. Nearly all places are background on which
    both agree: the factor keeps their number from deciding, and the denominator counts the places at which the teacher finds something.

    Args:
        student: Class logits of all places of all images.
        teacher: Those of the teacher at the same places; get no gradient.
        focus: Gamma; 0 weighs all places alike.

    Shapes:
        - **student**, **teacher** [n, K]; **output** scalar

    Raises:
        ValueError: If the shapes differ or `focus` is negative.

    References:
        Yang et al.: Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, ICCV 2023.

    Examples:
        >>> sure, unsure = torch.tensor([[20.0, -20.0]]), torch.tensor([[0.0, -20.0]])
        >>> dense_kd_loss(unsure, sure)  # half the way off, at a cost of log 2
        tensor(0.3466)
    """
    check_same_shape(student, teacher)
    if focus < 0:
        raise ValueError(f"Expected focus >= 0 (got {focus})")
    chance, divergence = teacher.detach().sigmoid(), sigmoid_divergence(student, teacher.detach())
    if focus > 0:
        divergence = (student.sigmoid() - chance).abs().pow(focus) * divergence
    count = chance.amax(1).sum() if chance.numel() else chance.sum()
    return divergence.sum() / count.clamp(min=1)


class CWDLoss(nn.Module):
    """Channel-wise distillation, see :func:`cwd_loss`. Published on FPN levels with weight 10."""

    level = "stage"
    matched_channels = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the loss of one stage; boxes are not used."""
        return cwd_loss(student, teacher, self.temperature)


class DenseKDLoss(nn.Module):
    """Class scores at all places of a one-stage detector, see :func:`dense_kd_loss`."""

    level = "logits"
    dense = True  # for detectors without proposals

    def __init__(self, focus: float = 1.0) -> None:
        super().__init__()
        self.focus = focus

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; targets are not used."""
        return dense_kd_loss(student, teacher, self.focus)


class PKDLoss(nn.Module):
    """Pearson correlation distillation, see :func:`pkd_loss`. Published on FPN levels with weight 6."""

    level = "stage"
    matched_channels = True

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the loss of one stage; boxes are not used."""
        return pkd_loss(student, teacher)


class MGDLoss(nn.Module):
    r"""Masked generation: the teacher's map has to be generated from a student's map with random pixels left out.

    .. math:: \frac1B \| G(m \odot F^s) - F^t \|^2

    G are two 3x3 convolutions; a 1x1 convolution goes before where the channels differ. The minimum depends on what G can generate.
    Published on FPN levels with weight 2e-5 and mask 0.65 (one-stage detectors), or 5e-7 and 0.45 (two-stage ones).

    Args:
        mask_ratio: Share of the pixels (or channels) that are left out.
        mask_channels: Whether whole channels are left out instead of pixels, as published for classifiers.

    References:
        Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation, ECCV 2022.
    """

    level = "stage"

    def __init__(self, mask_ratio: float = 0.65, mask_channels: bool = False) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"Expected a mask_ratio in [0, 1) (got {mask_ratio})")
        self.mask_ratio, self.mask_channels = mask_ratio, mask_channels
        self.align: nn.Module = nn.Identity()
        self.generation: nn.Module | None = None

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the generator for maps of these shapes [B, C, h, w]."""
        c, d = student_shape[1], teacher_shape[1]
        self.align = nn.Identity() if c == d else nn.Conv2d(c, d, 1)
        self.generation = nn.Sequential(nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.Conv2d(d, d, 3, padding=1))

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the loss of one stage; boxes are not used."""
        if self.generation is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of MGDLoss")
        check_maps(student, teacher)
        aligned = self.align(as_input(student, self.align))
        check_same_shape(aligned, teacher)
        shape = (*aligned.shape[:2], 1, 1) if self.mask_channels else (len(aligned), 1, *aligned.shape[2:])
        kept = torch.rand(shape, device=aligned.device) >= self.mask_ratio
        generated = self.generation(as_input(aligned * kept, self.generation))
        return (as_float(generated) - as_float(teacher.detach())).square().sum() / len(student)
