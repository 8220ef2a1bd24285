from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gkd.graphs.dense import check_adjacency
from gkd.graphs.laplacian import check_finite, connected, inverse_sqrt
from gkd.graphs.perturbation import (
    Gauge,
    check_options,
    damping_of,
    decompose,
    first_order,
    inverse_gaps,
    keep,
    rounding,
    symmetric_product,
)
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import power_of_two
from gkd.graphs.values import readable


class Exact:
    """The complete decomposition of every Laplacian, made once; any of the lowest pairs can be asked for.

    Isolated nodes are set apart, as nodes that do not exist are: LAPACK does not converge where most of the matrix is zero. Each is an
    eigenvector of 0 by itself, and these come first.

    Args:
        L: Laplacians; of a matrix that is not symmetric the symmetric part counts.
        mask: True where a node exists.
        symmetric: L is symmetric and zero where no node exists, as :func:`~gkd.graphs.laplacian` makes it. Spares the time to make it so.

    Shapes:
        - **L** [B, N, N], **mask** [B, N]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) L is not finite.
    """

    def __init__(self, L: Tensor, mask: Tensor | None = None, symmetric: bool = False) -> None:
        exists = check_adjacency(L, mask)
        L = as_float(L)
        if mask is not None and not symmetric:
            L = L.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)
        check_finite(L, "Laplacian")
        self.unit = power_of_two(L)
        L = L / self.unit
        self.L = L if symmetric else (L + L.mT) / 2
        with torch.no_grad(), full_precision(L):
            self.spectrum = None if L.numel() == 0 else _decomposed(self.L.detach(), exists)

    def lowest(
        self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace", damping: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the lowest pairs, as :func:`~gkd.graphs.eigenmaps` explains: eigval [B, num_eig], eigvec [B, N, num_eig]."""
        check_options(num_eig, gauge, damping)
        if self.spectrum is None:
            return self.L.new_zeros(self.L.size(0), num_eig), self.L.new_zeros(*self.L.shape[:2], num_eig)
        with full_precision(self.L):
            eigval, eigvec = _ExactPairs.apply(self.L, self.spectrum, num_eig, drop_trivial, gauge, damping)
            return eigval * self.unit[:, :, 0], eigvec


class _Spectrum(NamedTuple):
    """All eigenpairs of every graph, ascending: isolated nodes, then the rest; those of missing nodes at the end, with zero vectors."""

    eigval: Tensor
    eigvec: Tensor
    num_nodes: Tensor
    """Number of nodes, ``[B]``."""


def _decomposed(L: Tensor, exists: Tensor) -> _Spectrum:
    isolated = exists & zero_rows(L)
    aside = isolated | ~exists
    count = exists.sum(1)
    if readable(L) and not bool(aside.any()):
        return _Spectrum(*decompose(L), count)
    # To the top of the spectrum. A Laplacian ends at twice its largest diagonal entry, so this is above it, and near enough to cost no
    # precision.
    largest = L.diagonal(dim1=1, dim2=2).amax(1).clamp(min=0)
    above = torch.where(largest > 0, 2.5 * largest, 1.0)
    eigval, W = decompose(L + torch.diag_embed(above[:, None] * aside))
    first = isolated.sum(1)[:, None]
    position = torch.arange(L.size(1), device=L.device)
    source = (position - first).clamp(min=0)
    single = position < first
    rest = ~single & (position < count[:, None])
    eigval = torch.where(single, 0.0, torch.where(rest, eigval.gather(1, source), above[:, None]))
    W = W.gather(2, source[:, None, :].expand_as(W)) * (~aside)[:, :, None] * rest[:, None, :]
    return _Spectrum(eigval, W + unit_vectors(isolated, L.size(1)), count)


def zero_rows(L: Tensor) -> Tensor:
    """True where a row is zero, ``[B, N]``."""
    return (L != 0).any(-1).logical_not()


def unit_vectors(isolated: Tensor, num_eig: int) -> Tensor:
    """Writes, for the k-th isolated node of a graph, a one into column k: the eigenvector that it is by itself.

    Shapes:
        - **isolated** [B, N] bool; **output** [B, N, num_eig] bool
    """
    rank = torch.where(isolated, isolated.cumsum(1) - 1, -1)
    return rank[:, :, None] == torch.arange(num_eig, device=rank.device)


def exact_eigenmaps(
    L: Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the lowest eigenpairs of every Laplacian from its complete decomposition; :func:`~gkd.graphs.eigenmaps` explains.

    Args:
        L: Laplacians, as :class:`Exact` takes them.
        num_eig: Number Q of pairs.
        mask: True where a node exists.
        drop_trivial: As in :func:`~gkd.graphs.eigenmaps`.
        gauge: As in :func:`~gkd.graphs.eigenmaps`.
        damping: As in :func:`~gkd.graphs.eigenmaps`.
        symmetric: As :class:`Exact` takes it.

    Shapes:
        - **L** [B, N, N], **mask** [B, N]; **output** eigval [B, Q], eigvec [B, N, Q]

    Raises:
        ValueError: As :class:`Exact`.
    """
    return Exact(L, mask, symmetric).lowest(num_eig, drop_trivial, gauge, damping)


class Factored:
    r"""The decomposition of the normalised Laplacian of :math:`A = F F^\top`, made once without A.

    .. math:: G = D^{-1/2} F, \quad d_i = f_i \cdot \sum_j f_j, \quad G^\top G = V M V^\top, \quad U = G V M^{-1/2}, \quad \Lambda = 1 - M

    For F with R columns the cost is :math:`O(N R^2)`. The pairs are those of :class:`Exact` except in the eigenspace of 1, the
    :math:`N - \operatorname{rank} F` dimensions that F does not reach: these pairs have their eigenvalue, 1, and a zero vector.

    Args:
        factor: Rows that are not negative. A zero row is an isolated node.
        mask: True where a node exists.

    Shapes:
        - **factor** [B, N, R], **mask** [B, N]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) the factor is not finite.

    References:
        Fowlkes, Belongie, Chung, Malik: Spectral Grouping Using the Nyström Method, TPAMI 2004 (degrees and eigenvectors from a factor).
    """

    def __init__(self, factor: Tensor, mask: Tensor | None = None) -> None:
        if factor.dim() != 3:
            raise ValueError(f"Expected 'factor' of shape [num_graphs, num_nodes, rank] (got {list(factor.shape)})")
        if mask is not None and (mask.shape != factor.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"Expected a boolean 'mask' of shape {list(factor.shape[:2])} (got {mask.dtype} of {list(mask.shape)})")
        factor = as_float(factor)
        factor = factor if mask is None else factor.masked_fill(~mask[:, :, None], 0.0)
        check_finite(factor, "factor")
        factor = factor / power_of_two(factor)  # the normalised Laplacian does not change
        with full_precision(factor):
            degree = (factor * factor.sum(1, keepdim=True)).sum(-1)
            self.reached = connected(degree)
            self.isolated = ~self.reached if mask is None else ~self.reached & mask
            self.G = factor * inverse_sqrt(degree)[:, :, None]
            with torch.no_grad():
                # A GPU may be set to multiply float32 with ten bits; the kernel would not be recognised then.
                precise = self.G.double() if self.G.is_cuda else self.G
                gram = (precise.mT @ precise).to(self.G.dtype)
                self.gram_pairs = None if factor.numel() == 0 else decompose(gram)

    def lowest(
        self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace", damping: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the lowest pairs, as :func:`~gkd.graphs.eigenmaps` explains: eigval [B, num_eig], eigvec [B, N, num_eig]."""
        check_options(num_eig, gauge, damping)
        if self.gram_pairs is None:
            return self.G.new_zeros(self.G.size(0), num_eig), self.G.new_zeros(*self.G.shape[:2], num_eig)
        with full_precision(self.G):
            counts = self.reached.sum(1), self.isolated.sum(1)
            eigval, eigvec = _FactoredPairs.apply(self.G, *self.gram_pairs, *counts, num_eig, drop_trivial, gauge, damping)
        # An isolated node is an eigenvector of 0 by itself, but no row of F leads to it.
        return eigval, eigvec if drop_trivial else eigvec + unit_vectors(self.isolated, num_eig)


def lowrank_eigenmaps(
    factor: Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Finds the lowest eigenpairs of the normalised Laplacian of :math:`A = F F^\top` without forming A, see :class:`Factored`.

    Args:
        factor: Rows that are not negative, as :class:`Factored` takes them.
        num_eig: Number Q of pairs.
        mask: True where a node exists.
        drop_trivial: As in :func:`~gkd.graphs.eigenmaps`.
        gauge: As in :func:`~gkd.graphs.eigenmaps`.
        damping: As in :func:`~gkd.graphs.eigenmaps`.

    Shapes:
        - **factor** [B, N, R], **mask** [B, N]; **output** eigval [B, Q], eigvec [B, N, Q]

    Raises:
        ValueError: As :class:`Factored`.

    Examples:
        >>> factor = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # two components: {0, 1} and {2}
        >>> lowrank_eigenmaps(factor, num_eig=2, drop_trivial=False)[0]
        tensor([[0., 0.]])
    """
    return Factored(factor, mask).lowest(num_eig, drop_trivial, gauge, damping)


class _ExactPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, L: Tensor, spectrum: _Spectrum, num_eig: int, drop_trivial: bool, gauge: str, damping: float | None
    ) -> tuple[Tensor, Tensor]:
        (eigval, W, count), num_nodes = spectrum, L.size(1)
        last = (count - 1).clamp(min=0)[:, None]
        scale = eigval.gather(1, last)[:, 0].abs() * (count > 0)
        tolerance = rounding(scale, num_nodes)
        position, start = keep(eigval, count, 0, tolerance, num_eig, drop_trivial)
        present = position < count[:, None]
        index = position.clamp(max=num_nodes - 1)
        U = W.gather(2, index[:, None, :].expand(-1, num_nodes, -1)) * present[:, None, :]
        kept = eigval.gather(1, torch.minimum(position, last))
        kept = torch.where((kept.abs() > tolerance[:, None]) & (start < count)[:, None], kept, 0.0)
        ctx.save_for_backward(eigval, W, U, index, present, tolerance, damping_of(damping, scale))
        ctx.gauge = gauge
        return kept, U

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> tuple[Tensor | None, ...]:
        eigval, W, U, index, present, tolerance, damping = ctx.saved_tensors
        grad_eigval = grad_eigval * present
        block = torch.zeros_like(eigval, dtype=torch.bool).scatter(1, index, True) if ctx.gauge == "block" else None
        gaps = inverse_gaps(eigval, eigval.gather(1, index), block, tolerance, damping)
        coefficient = W.mT @ (grad_eigvec * present[:, None, :]) * gaps
        X = torch.baddbmm(U * grad_eigval[:, None, :], W, coefficient)
        return symmetric_product(X, U), None, None, None, None, None


class _FactoredPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        G: Tensor,
        mu: Tensor,
        V: Tensor,
        reached: Tensor,
        isolated: Tensor,
        num_eig: int,
        drop_trivial: bool,
        gauge: str,
        damping: float | None,
    ) -> tuple[Tensor, Tensor]:
        precise = G.double() if G.is_cuda else G
        eigval = 1 - mu.flip(-1)
        one = torch.ones_like(eigval[:, 0])
        tolerance = rounding(one, G.size(1))
        # Vectors of the smallest mu are G v / sqrt(mu) = rounding errors blown up; they count as beyond the rank.
        in_range = 1 - eigval > math.sqrt(torch.finfo(G.dtype).eps)
        inverse = in_range / torch.where(in_range, 1 - eigval, 1.0)
        rank = in_range.sum(1)
        position, start = keep(eigval, rank, isolated, tolerance, num_eig, drop_trivial)
        present = (position >= 0) & (position < rank[:, None])
        index = position.clamp(0, eigval.size(1) - 1)
        # LAPACK's order is that of mu, ascending: the last column is the first pair.
        V_kept = V.gather(2, (V.size(2) - 1 - index)[:, None, :].expand(-1, V.size(1), -1))
        V_kept = V_kept * (inverse.gather(1, index).sqrt() * present)[:, None, :]
        U = (V_kept.to(precise.dtype).mT @ precise.mT).mT.to(G.dtype)  # a third of the time of the product the other way round
        position = torch.minimum(position, reached[:, None] - 1)
        kept = torch.where(position < rank[:, None], eigval.gather(1, position.clamp(0, eigval.size(1) - 1)), 1.0)
        kept = torch.where((position >= start[:, None]) & (kept.abs() > tolerance[:, None]), kept, 0.0)
        ctx.save_for_backward(eigval, G, V, U, index, present, inverse, tolerance, damping_of(damping, one))
        ctx.gauge = gauge
        return kept, U

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> tuple[Tensor | None, ...]:
        # L = I - G G^T has the eigenvectors W = G V / sqrt(mu) of the range, and everything orthogonal to them with eigenvalue 1. Its
        # gradient is the symmetric part of X U^T, as for the exact method, so that of G is -(X U^T + U X^T) G. W itself is never formed.
        eigval, G, V, U, index, present, inverse, tolerance, damping = ctx.saved_tensors
        grad_eigval = grad_eigval * present
        grad_eigvec = grad_eigvec * present[:, None, :]
        at = eigval.gather(1, index)
        block = None
        if ctx.gauge == "block":
            block = torch.zeros_like(eigval, dtype=torch.bool).scatter(1, index, True)
        gaps = inverse_gaps(eigval, at, block, tolerance, damping)
        beyond = inverse_gaps(torch.ones_like(eigval[:, :1]), at, None, tolerance, damping)
        along = ((gaps - beyond) * inverse[:, :, None]).flip(1)
        X = U * grad_eigval[:, None, :] + grad_eigvec * beyond + G @ (V @ (along * (V.mT @ (G.mT @ grad_eigvec))))
        grad = -(X @ (U.mT @ G) + U @ (X.mT @ G))
        return grad, None, None, None, None, None, None, None, None
