from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gkd.losses.inputs import in_full_precision
from gkd.losses.term import ChangesWithTime, Term

__all__ = ["StandardizedLogits", "standardize_logits"]


@in_full_precision
def standardize_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Gives the logits of every image mean 0 and standard deviation 1 (unbiased); constant logits become 0.

    .. math:: (z - \bar z) / (\mathrm{std}(z) + \epsilon)

    Shapes:
        - **logits** [B, K] with K at least 2; **output** [B, K]

    Raises:
        ValueError: If there are fewer than two classes.

    References:
        Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"Expected logits [B, K] of at least 2 classes (got {tuple(logits.shape)})")
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + eps)


class StandardizedLogits(nn.Module):
    """Standardises both networks' logits before any loss of class logits, see :func:`standardize_logits`.

    What the loss declares, such as its parts, this module declares too. Published with temperature 2 and ten times the usual weight for
    KD; of the three parts of :class:`~gkd.losses.MLKDLoss` the published code standardises ``instance`` alone.

    Args:
        loss: What compares the logits that are left: shapes, not scales.

    Raises:
        TypeError: If loss does not compare class logits.

    Examples:
        >>> from gkd.losses import KDLoss
        >>> import torch
        >>> loss = StandardizedLogits(KDLoss(temperature=2.0))
        >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss(logits, 10 * logits).item() < 1e-6
        True
    """

    level = "logits"

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        term = Term.of(loss)
        if term.level != "logits" or term.compares != "classes":
            raise TypeError(f"Expected a loss of level 'logits' that compares classes (got {type(loss).__name__})")
        self.loss = loss
        self.parts, self.needs_index, self.dense = term.parts, term.needs_index, term.dense

    def progress(self, epoch: float) -> None:
        """Tells the epoch to a loss that changes with it."""
        if isinstance(self.loss, ChangesWithTime):
            self.loss.progress(epoch)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **options: Any
    ) -> Tensor | dict[str, Tensor]:
        """Returns the inner loss of the standardised logits."""
        return self.loss(standardize_logits(student_logits), standardize_logits(teacher_logits.detach()), target, **options)
