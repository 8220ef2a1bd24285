from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.precision import full_precision
from gkd.losses.inputs import as_input, check_same_shape, in_full_precision, pool

__all__ = ["VkDLoss", "vkd_loss"]


@in_full_precision
def vkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the student's projected vectors with the teacher's of mean 0 and variance 1, by the smooth L1 distance.

    .. math:: \frac{1}{B D} \sum_{b, d} s\Big(z_{bd} - \frac{t_{bd} - \bar t_b}{\sqrt{\mathrm{var}(t_b) + 10^{-5}}}\Big),
              \quad s(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - \tfrac12 & \text{otherwise} \end{cases}

    Scale and shift of a teacher's vector do not matter.

    Args:
        projected: The student's vectors in the teacher's dimension.
        teacher: The teacher's vectors; gets no gradient.

    Shapes:
        - **projected**, **teacher** [B, D]; **output** scalar

    Raises:
        ValueError: If the shapes differ or are not [B, D].

    References:
        Miles, Elezi, Deng: VkD: Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024.
    """
    if projected.dim() != 2:
        raise ValueError(f"Expected vectors [B, D] (got {tuple(projected.shape)})")
    check_same_shape(projected, teacher)
    return F.smooth_l1_loss(projected, F.layer_norm(teacher.detach(), teacher.shape[1:]))


class VkDLoss(nn.Module):
    r"""Compares penultimate vectors through an orthogonal projection, see :func:`vkd_loss`; made for transformers.

    The projection :math:`z = W x` keeps the distances within the student's features where the teacher has at least as many channels, as
    :math:`W^\top W = I`; where it has fewer, :math:`W W^\top = I`. So the student's features themselves must change. It is kept
    orthogonal by :func:`torch.nn.utils.parametrizations.orthogonal`. A map is averaged over its places first. Published with weight 1
    beside KD on the student's distillation token.
    """

    level = "stage"

    def __init__(self) -> None:
        super().__init__()
        self.projection: nn.Module | None = None

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the projection for maps or vectors of these shapes."""
        self.projection = nn.utils.parametrizations.orthogonal(nn.Linear(student_shape[1], teacher_shape[1], bias=False))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        if self.projection is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of VkDLoss")
        with full_precision(student):  # a product in half precision is no longer orthogonal
            return vkd_loss(self.projection(as_input(pool(student), self.projection)), pool(teacher))
