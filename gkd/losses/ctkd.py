from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gkd.losses.inputs import in_full_precision
from gkd.losses.logits import check_classes, check_logits, kl_divergence

__all__ = ["CTKDLoss", "ctkd_loss", "scale_gradient"]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Returns x as it is, and multiplies the gradient that flows back to it: a negative factor reverses it.

    Args:
        x: Any tensor.
        factor: A scalar; gets no gradient.

    References:
        Ganin, Lempitsky: Unsupervised Domain Adaptation by Backpropagation, ICML 2015.

    Examples:
        >>> x = torch.ones((), requires_grad=True)
        >>> (3 * scale_gradient(x, torch.tensor(-0.5))).backward()
        >>> x.grad
        tensor(-1.5000)
    """
    return _ScaleGradient.apply(x, factor)


@in_full_precision
def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    r"""Compares softened class probabilities at a temperature that is learned.

    .. math:: \frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^t_b / T) \,\|\, \sigma(z^s_b / T)\big)

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        temperature: T, a scalar above 0; unlike that of :func:`~gkd.losses.kd_loss` it gets a gradient, through its square as well.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2, **temperature** []; **output** scalar

    Raises:
        ValueError: If the shapes differ or are not [B, K] with K at least 2.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023.
    """
    check_logits(student_logits, teacher_logits, 1.0)
    check_classes(student_logits)
    student_log, teacher_log = ((logits / temperature).log_softmax(1) for logits in (student_logits, teacher_logits.detach()))
    return kl_divergence(student_log, teacher_log) * temperature.square()


class CTKDLoss(nn.Module):
    r"""KD whose temperature is learned against the student, see :func:`ctkd_loss`: what is compared grows harder by and by.

    One number :math:`\theta` for all images gives :math:`T = T_{min} + T_{range}\, \mathrm{sigmoid}(\theta)`. Its gradient is multiplied by

    .. math:: \lambda(e) = -\tfrac12 \big(1 - \cos(\pi \min(e, E) / E)\big)

    so that at epoch 0 it stands still and from epoch E on it climbs the loss that the student descends. Published with 0.1 x
    cross-entropy and weight 0.9.

    Args:
        min_temperature: :math:`T_{min}`.
        temperature_range: :math:`T_{range}`.
        epochs: E, the length of the curriculum.

    Raises:
        ValueError: If one of them is not positive.
    """

    level = "logits"
    reversal: Tensor

    def __init__(self, min_temperature: float = 1.0, temperature_range: float = 20.0, epochs: float = 10.0) -> None:
        super().__init__()
        if not min(min_temperature, temperature_range, epochs) > 0:
            raise ValueError(f"Expected numbers above 0 (got {min_temperature}, {temperature_range} and {epochs})")
        self.min_temperature, self.temperature_range, self.epochs = min_temperature, temperature_range, epochs
        self.theta = nn.Parameter(torch.ones(()))
        # A function of the epoch, so there is nothing to checkpoint.
        self.register_buffer("reversal", torch.zeros(()), persistent=False)

    @property
    def temperature(self) -> Tensor:
        """The temperature as it is now."""
        return self.min_temperature + self.temperature_range * scale_gradient(self.theta, self.reversal).sigmoid()

    def progress(self, epoch: float) -> None:
        """Sets how strongly the temperature works against the student."""
        share = min(max(epoch, 0.0) / self.epochs, 1.0)
        self.reversal.fill_(-0.5 * (1 - math.cos(math.pi * share)))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target is only looked at, to refuse several labels of an image."""
        check_classes(student_logits, target)
        return ctkd_loss(student_logits, teacher_logits, self.temperature)

    def extra_repr(self) -> str:
        """Names the range of temperatures and the length of the curriculum."""
        top = self.min_temperature + self.temperature_range
        return f"temperature={self.min_temperature:g} to {top:g}, epochs={self.epochs:g}"
