from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd.losses.inputs import in_full_precision
from gkd.losses.logits import check_classes, check_logits, check_target, kl_divergence

__all__ = ["RLDLoss", "rld_loss"]


@in_full_precision
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    r"""Corrects a teacher that is wrong: its confidence counts for the true class, and classes that it ranks above that are left out.

    .. math:: \alpha T_c^2\, \mathrm{KL}\big([\max p^t, 1 - \max p^t] \,\|\, [p^s_y, 1 - p^s_y]\big)
              + \beta T^2\, \mathrm{KL}\big(\hat p^t \,\|\, \hat p^s\big)

    averaged over the batch. :math:`p` are probabilities at the temperature :math:`T_c`, and :math:`\hat p` those at T among the classes
    whose logit of the teacher is below that of the true class y. Where there are no such classes, the second term is 0. Everything stays
    in the log domain. A constant added to all logits of an image changes nothing; at student = teacher it is 0 for images that the
    teacher classifies correctly.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        target: True class of every image.
        alpha: Weight of the confidence.
        beta: Weight of the relations between the classes that the teacher ranks below the true one.
        temperature: T, softens these relations.
        confidence_temperature: :math:`T_c`, softens the confidence.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2, **target** [B] long; **output** scalar

    Raises:
        ValueError: If the shapes are others, or a temperature is not positive.

    References:
        Sun, Chen, Lyu, Chen, Chen, Wang: Knowledge Distillation with Refined Logits, arXiv 2408.07703.
    """
    check_logits(student_logits, teacher_logits, min(temperature, confidence_temperature))
    check_classes(student_logits, target)
    check_target(target, len(student_logits), "RLD")
    true, teacher_logits = target.long().unsqueeze(1), teacher_logits.detach()
    confidence = kl_divergence(
        _against_rest(student_logits / confidence_temperature, true),
        _against_rest(teacher_logits / confidence_temperature, teacher_logits.argmax(1, keepdim=True)),
    )
    kept = teacher_logits < teacher_logits.gather(1, true)
    # A row without such classes keeps all of them, so that its softmax is finite, and is then counted as 0.
    has_kept = kept.any(1, keepdim=True)
    left_out = ~kept & has_kept
    student_log, teacher_log = (
        (logits / temperature).masked_fill(left_out, -torch.inf).log_softmax(1) for logits in (student_logits, teacher_logits)
    )
    differences = (teacher_log - student_log).masked_fill(~kept, 0.0)
    relations = (teacher_log.exp() * differences).sum() / max(len(student_logits), 1)
    return alpha * confidence_temperature**2 * confidence + beta * temperature**2 * relations


def _against_rest(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities [B, 2] of a chosen class and of all others together."""
    others = logits.scatter(1, chosen, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, chosen), others], 1).log_softmax(1)


class RLDLoss(nn.Module):
    """Refined logits, see :func:`rld_loss`. Published with weight 1 and 20 epochs of ramp."""

    level = "logits"

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, confidence_temperature: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.temperature, self.confidence_temperature = temperature, confidence_temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target must be given."""
        if target is None:
            raise ValueError("Expected target classes [B] (got None): RLD needs the true class of every image")
        return rld_loss(student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature, self.confidence_temperature)

    def extra_repr(self) -> str:
        """Names the weights and the temperatures."""
        return f"alpha={self.alpha}, beta={self.beta}, T={self.temperature}, confidence_temperature={self.confidence_temperature}"
