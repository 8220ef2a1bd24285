from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gkd.losses.inputs import as_input, in_full_precision
from gkd.losses.logits import check_classes, check_logits, check_target
from gkd.losses.term import Outputs

__all__ = ["OFALoss", "ofa_loss"]

PARTS = ("exits", "logits")


@in_full_precision
def ofa_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, eps: float = 1.0, temperature: float = 1.0) -> Tensor:
    r"""Cross-entropy with the teacher's probabilities, in which the true class is enhanced.

    .. math:: -\frac1B \sum_b \sum_k \big( (p^t_{bk} + [k = y_b])^\epsilon - [k = y_b] \big) \log p^s_{bk},
              \quad p = \sigma(z / T)

    With :math:`\epsilon = 1` it is the cross-entropy with :math:`p^t`; the larger :math:`\epsilon`, the more the true class counts and the
    less the others. A constant added to all logits of an image changes nothing. It is not 0 at student = teacher.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        target: True class of every image.
        eps: The exponent.
        temperature: T; there is no factor of its square.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2, **target** [B] long; **output** scalar

    Raises:
        ValueError: If the shapes are others, or the temperature is not positive.

    References:
        Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation, NeurIPS 2023.
    """
    check_logits(student_logits, teacher_logits, temperature)
    check_classes(student_logits)
    check_target(target, len(student_logits), "OFA-KD")
    student_log, teacher = (student_logits / temperature).log_softmax(1), (teacher_logits.detach() / temperature).softmax(1)
    true = torch.zeros_like(teacher).scatter(1, target.long().unsqueeze(1), 1.0)
    return -(((teacher + true) ** eps - true) * student_log).sum() / max(len(student_logits), 1)


def separable(channels: int, out_channels: int) -> nn.Sequential:
    """Two depthwise separable convolutions, of which the first halves height and width.

    Shapes:
        - **input** [B, channels, h, w]; **output** [B, out_channels, ceil(h / 2), ceil(w / 2)]
    """
    layers: list[nn.Module] = []
    for width, stride in ((channels, 2), (out_channels, 1)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class OFALoss(nn.Module):
    """Distillation between unlike architectures: every stage of the student gets an exit of its own, whose logits learn from the teacher's.

    An exit halves the map once for every stage that is still to come, then averages it and classifies; ``exits`` is the sum over the
    stages of :func:`ofa_loss` of their logits, ``logits`` that of the student's own. Published with weight 1 for both and for the task,
    and an exponent of 1 to 1.5. The exits serve the training alone. Where the student is a transformer, the published exits have
    attention blocks; here they are the convolutional ones for every student.

    Args:
        eps: The exponent.
        temperature: Of both networks' probabilities.
    """

    level = "stages"
    needs_outputs = True
    parts = PARTS

    def __init__(self, eps: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.eps, self.temperature = eps, temperature
        self.exits: nn.ModuleList | None = None

    def build(self, student_shape: Mapping[str, torch.Size], teacher_shape: Mapping[str, torch.Size], num_classes: int) -> None:
        """Creates the exits for maps of these shapes, shallow to deep."""
        shapes = list(student_shape.values())
        if any(len(shape) != 4 for shape in shapes):
            raise ValueError(f"Expected maps [B, C, h, w] for OFALoss (got {[list(shape) for shape in shapes]})")
        width = max(shapes[-1][1], list(teacher_shape.values())[-1][1])
        self.exits = nn.ModuleList(self._exit(shape[1], width, len(shapes) - 1 - place, num_classes) for place, shape in enumerate(shapes))

    @staticmethod
    def _exit(channels: int, width: int, halvings: int, num_classes: int) -> nn.Sequential:
        widths = [channels * 2**step for step in range(halvings)] + [width]
        body: list[nn.Module] = [separable(*pair) for pair in itertools.pairwise(widths)]
        body = body or [nn.Conv2d(channels, width, 1)]
        classify = nn.Linear(width, num_classes)
        exit_ = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classify)
        for module in exit_.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.trunc_normal_(classify.weight, std=0.02)
        nn.init.zeros_(classify.bias)
        return exit_

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], outputs: Outputs, parts: Collection[str] = PARTS
    ) -> dict[str, Tensor]:
        """Returns the loss of every part; of the teacher only the logits count."""
        if self.exits is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape, num_classes) before the first forward of OFALoss")
        losses = {}
        if "exits" in parts:
            answers = [exit_(as_input(features, exit_)) for exit_, features in zip(self.exits, student.values(), strict=True)]
            losses["exits"] = torch.stack([self._compare(logits, outputs) for logits in answers]).sum()
        if "logits" in parts:
            losses["logits"] = self._compare(outputs.student_logits, outputs)
        return losses

    def _compare(self, logits: Tensor, outputs: Outputs) -> Tensor:
        return ofa_loss(logits, outputs.teacher_logits, outputs.target, self.eps, self.temperature)

    def extra_repr(self) -> str:
        """Names the exponent and the temperature."""
        return f"eps={self.eps:g}, temperature={self.temperature:g}"
