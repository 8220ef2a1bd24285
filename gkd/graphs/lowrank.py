from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gkd.graphs.precision import full_precision


class LowRank(NamedTuple):
    r"""Adjacencies of B graphs that are known by a factor, and what follows from it without them.

    .. math:: A = F F^\top \text{ with self-loops}, \qquad A = F F^\top - \operatorname{diag}(|f_1|^2, \dots, |f_n|^2) \text{ without}

    For F with r columns a product with A costs :math:`2nr` instead of :math:`n^2`, and A is never written down. This is what a loss should
    take where :attr:`Spectrum.lowrank <gkd.graphs.Spectrum.lowrank>` is not None.

    Args:
        factor: Rows of F; none is negative. The row of a node that is isolated, or does not exist, is zero.
        self_loops: Whether the diagonal belongs to the graph.

    Shapes:
        - **factor** [B, n, r]

    Examples:
        >>> lowrank = LowRank(torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]), self_loops=False)
        >>> lowrank.dense()
        tensor([[[0.0000, 0.6000],
                 [0.6000, 0.0000]]])
        >>> lowrank.degree()
        tensor([[0.6000, 0.6000]])
    """

    factor: Tensor
    self_loops: bool = True

    def degree(self) -> Tensor:
        r"""Sums the weights at every node, :math:`d_i = f_i \cdot \sum_j f_j`, without self-loops :math:`f_i \cdot \sum_{j \ne i} f_j`.

        Shapes:
            - **output** [B, n]
        """
        if self.self_loops:
            return (self.factor * self.factor.sum(dim=1, keepdim=True)).sum(dim=-1)
        # In float64, as what is left may be far smaller than what is taken away. A node without a common feature has exactly 0.
        rows = self.factor.double()
        return (rows * (rows.sum(dim=1, keepdim=True) - rows)).sum(dim=-1).clamp(min=0).to(self.factor.dtype)

    def multiply(self, X: Tensor) -> Tensor:
        r"""Computes A X by :math:`F (F^\top X)`.

        Shapes:
            - **X** [B, n, q]; **output** [B, n, q]
        """
        with full_precision(X):
            product = self.factor @ (self.factor.mT @ X)
            return product if self.self_loops else product - self._loops()[:, :, None] * X

    def dense(self) -> Tensor:
        """Writes the adjacencies down, ``[B, n, n]``."""
        with full_precision(self.factor):
            A = self.factor @ self.factor.mT
            return A if self.self_loops else A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))

    def squared_distance(self, lowrank: LowRank) -> Tensor:
        r"""Computes :math:`\| A_s - A_t \|_F^2` from r x r products.

        .. math::
            \| F_s F_s^\top - F_t F_t^\top \|_F^2
            = \| F_s^\top F_s \|_F^2 - 2 \| F_s^\top F_t \|_F^2 + \| F_t^\top F_t \|_F^2
            = \tfrac{1}{2} \langle P^\top P, M^\top M \rangle + \tfrac{1}{2} \langle P^\top M, M^\top P \rangle

        with :math:`P = F_s - F_t` and :math:`M = F_s + F_t`; without self-loops less :math:`\sum_i (|f^s_i|^2 - |f^t_i|^2)^2`. The last
        form loses no digits where both are close; it is taken where the factors are equally wide.

        Args:
            lowrank: Adjacencies of as many nodes, which have self-loops too or have none either.

        Shapes:
            - **output** [B], at least 0

        Raises:
            ValueError: If the graphs do not match.
        """
        own, goal = self.factor, lowrank.factor
        if own.shape[:2] != goal.shape[:2] or self.self_loops != lowrank.self_loops:
            raise ValueError(
                f"Expected graphs of equally many nodes, both with or both without self-loops (got {list(own.shape[:2])} and "
                f"{list(goal.shape[:2])}, self_loops={self.self_loops} and {lowrank.self_loops})"
            )
        with full_precision(own):
            if own.shape[2] == goal.shape[2]:
                apart, both = own - goal, own + goal
                cross = apart.mT @ both
                square = ((apart.mT @ apart) * (both.mT @ both) + cross * cross.mT).sum(dim=(1, 2)) / 2
            else:
                products = ((own, own), (own, goal), (goal, goal))
                same, crossed, goals = ((left.mT @ right).square().sum(dim=(1, 2)) for left, right in products)
                square = same - 2 * crossed + goals
            if not self.self_loops:
                square = square - (self._loops() - lowrank._loops()).square().sum(dim=1)
        return square.clamp(min=0)

    def _loops(self) -> Tensor:
        return self.factor.square().sum(dim=-1)
