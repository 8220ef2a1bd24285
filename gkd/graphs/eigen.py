from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd.graphs.dense import check_adjacency
from gkd.graphs.laplacian import check_finite, connected, inverse_sqrt
from gkd.graphs.precision import as_float, backward_in_full_precision, full_precision

Gauge = Literal["eigenspace", "block"]


def exact_eigenmaps(
    L: Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the lowest eigenpairs of every Laplacian from its complete decomposition; :func:`~gkd.graphs.spectral.eigenmaps` explains.

    Args:
        L: Laplacians; of a matrix that is not symmetric the symmetric part counts.
        num_eig: Number Q of pairs.
        mask: True where a node exists.
        drop_trivial: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        gauge: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        damping: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        symmetric: L is symmetric and zero where no node exists, as :func:`~gkd.graphs.laplacian.laplacian` makes it. Spares the time
            to make it so.

    Shapes:
        - **L** [B, N, N], **mask** [B, N]; **output** eigval [B, Q], eigvec [B, N, Q]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) L is not finite.
    """
    exists = check_adjacency(L, mask)
    check_options(num_eig, gauge, damping)
    L = as_float(L)
    if L.numel() == 0:
        return L.new_zeros(L.size(0), num_eig), L.new_zeros(*L.shape[:2], num_eig)
    mask = _partial(mask)
    if mask is not None and not symmetric:
        L = L.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)
    check_finite(L, "Laplacian")
    if not symmetric:
        L = (L + L.mT) / 2
    with full_precision(L):
        return _Exact.apply(L, exists.sum(1), mask, num_eig, drop_trivial, gauge, damping)


def lowrank_eigenmaps(
    factor: Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Finds the lowest eigenpairs of the normalised Laplacian of :math:`A = F F^\top` without forming A.

    .. math:: G = D^{-1/2} F, \quad d_i = f_i \cdot \sum_j f_j, \quad G^\top G = V M V^\top, \quad U = G V M^{-1/2}, \quad \Lambda = 1 - M

    For F with R columns the cost is :math:`O(N R^2)`. The pairs are those of :func:`exact_eigenmaps` except in the eigenspace of 1, the
    :math:`N - \operatorname{rank} F` dimensions that F does not reach: these pairs have their eigenvalue, 1, and a zero vector.

    Args:
        factor: Rows that are not negative. A zero row is an isolated node.
        num_eig: Number Q of pairs.
        mask: True where a node exists.
        drop_trivial: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        gauge: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        damping: As in :func:`~gkd.graphs.spectral.eigenmaps`.

    Shapes:
        - **factor** [B, N, R], **mask** [B, N]; **output** eigval [B, Q], eigvec [B, N, Q]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) the factor is not finite.

    References:
        Fowlkes, Belongie, Chung, Malik: Spectral Grouping Using the Nyström Method, TPAMI 2004 (degrees and eigenvectors from a factor).

    Examples:
        >>> factor = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # two components: {0, 1} and {2}
        >>> lowrank_eigenmaps(factor, num_eig=2, drop_trivial=False)[0]
        tensor([[0., 0.]])
    """
    if factor.dim() != 3:
        raise ValueError(f"Expected 'factor' of shape [num_graphs, num_nodes, rank] (got {list(factor.shape)})")
    if mask is not None and (mask.shape != factor.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"Expected a boolean 'mask' of shape {list(factor.shape[:2])} (got {mask.dtype} of {list(mask.shape)})")
    check_options(num_eig, gauge, damping)
    factor = as_float(factor)
    if factor.numel() == 0:
        return factor.new_zeros(factor.size(0), num_eig), factor.new_zeros(*factor.shape[:2], num_eig)
    mask = _partial(mask)
    factor = factor if mask is None else factor.masked_fill(~mask[:, :, None], 0.0)
    check_finite(factor, "factor")
    with full_precision(factor):
        degree = (factor * factor.sum(1, keepdim=True)).sum(-1)
        reached = connected(degree)
        isolated = ~reached if mask is None else ~reached & mask
        G = factor * inverse_sqrt(degree)[:, :, None]
        eigval, eigvec = _LowRank.apply(G, reached.sum(1), isolated.sum(1), num_eig, drop_trivial, gauge, damping)
    if drop_trivial:
        return eigval, eigvec
    # An isolated node is an eigenvector of 0 by itself, but no row of F leads to it.
    rank = torch.where(isolated, isolated.cumsum(1) - 1, -1)
    return eigval, eigvec + (rank[:, :, None] == torch.arange(num_eig, device=rank.device))


def _partial(mask: Tensor | None) -> Tensor | None:
    """Drops a mask that masks nothing, which is not worth a pass over the matrices; on the CPU only, as it waits."""
    if mask is None or torch.compiler.is_compiling() or mask.device.type != "cpu" or not bool(mask.all()):
        return mask
    return None


def check_options(num_eig: int, gauge: str, damping: float | None) -> None:
    """Raises a ValueError for options that no method takes."""
    if num_eig < 1:
        raise ValueError(f"Expected 'num_eig' to be at least 1 (got {num_eig})")
    if gauge not in ("eigenspace", "block"):
        raise ValueError(f"Expected 'gauge' to be 'eigenspace' or 'block' (got {gauge!r})")
    if damping is not None and damping < 0:
        raise ValueError(f"Expected 'damping' not to be negative (got {damping})")


def rounding(scale: Tensor, num_nodes: int) -> Tensor:
    """Bounds the error of computed eigenvalues whose largest is ``scale``: what differs by less is one eigenspace, or the kernel."""
    info = torch.finfo(scale.dtype)
    return 8 * info.eps * num_nodes**0.25 * scale + info.tiny  # some five times what LAPACK was seen to miss, 16 to 1024 nodes


def keep(eigval: Tensor, count: Tensor, skip: Tensor | int, tolerance: Tensor, num_eig: int, drop_trivial: bool) -> tuple[Tensor, Tensor]:
    """Says at which positions of the ascending eigenvalues the kept pairs lie, and below which position everything is kernel.

    ``count`` of the eigenvalues are real, and ``skip`` zero eigenvalues more lie before the first one.
    """
    position = torch.arange(eigval.size(1), device=eigval.device)
    kernel = ((eigval <= tolerance[:, None]) & (position < count[:, None])).sum(1)
    start = kernel if drop_trivial else torch.zeros_like(kernel)
    first = start if drop_trivial else start - skip
    return first[:, None] + torch.arange(num_eig, device=eigval.device), start


def inverse_gaps(eigval: Tensor, at: Tensor, block: Tensor | None, tolerance: Tensor, damping: Tensor) -> Tensor:
    r"""Computes the damped :math:`1 / (\lambda_i - \lambda_j)` of perturbation theory, 0 where it is undetermined or cancels.

    Args:
        eigval: All eigenvalues :math:`\lambda_j`, ``[B, K]``.
        at: The kept ones :math:`\lambda_i`, ``[B, Q]``.
        block: True for those j that are kept themselves and turn into each other freely, ``[B, K]``.
        tolerance: Eigenvalues that are no farther apart are one, ``[B]``.
        damping: The :math:`\epsilon` of :math:`\delta / (\delta^2 + \epsilon^2)`, ``[B]``.

    Shapes:
        - **output** [B, K, Q]
    """
    delta = at[:, None, :] - eigval[:, :, None]
    apart = delta.abs() > tolerance[:, None, None]
    if block is not None:
        apart = apart & ~block[:, :, None]
    delta = torch.where(apart, delta, 1.0)
    return torch.where(apart, delta / (delta.square() + damping.square()[:, None, None]), 0.0)


def damping_of(damping: float | None, scale: Tensor) -> Tensor:
    """Turns the relative damping into an absolute one; the default is what rounding makes uncertain anyway."""
    return scale * ((1e-4 if scale.dtype == torch.float32 else 1e-8) if damping is None else damping)


def symmetric_product(X: Tensor, U: Tensor) -> Tensor:
    """Computes (X U^T + U X^T) / 2 in one product, symmetric bit for bit."""
    return torch.cat([X, U], -1) @ torch.cat([U, X], -1).mT / 2


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Is ``torch.linalg.eigh`` with a failure that says what is wrong: LAPACK only reports that it did not converge."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        bad = int((~matrix.isfinite()).sum())
        if bad == 0:
            raise
        raise ValueError(f"Expected a finite Laplacian (got {bad} NaN or infinite of {matrix.numel()} values)") from error


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, L: Tensor, count: Tensor, mask: Tensor | None, num_eig: int, drop_trivial: bool, gauge: str, damping: float | None
    ) -> tuple[Tensor, Tensor]:
        num_nodes = L.size(1)
        if mask is not None:
            # Missing nodes go to the top of the spectrum. A Laplacian ends at twice its largest diagonal entry, so this is above it, and
            # near enough to cost no precision.
            largest = L.diagonal(dim1=1, dim2=2).amax(1).clamp(min=0)
            above = torch.where(largest > 0, 2.5 * largest, 1.0)
            L = L + torch.diag_embed(above[:, None] * ~mask)
        eigval, W = decompose(L)
        if mask is not None:
            W = W * mask[:, :, None]
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
    @once_differentiable
    @backward_in_full_precision
    def backward(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> tuple[Tensor | None, ...]:
        eigval, W, U, index, present, tolerance, damping = ctx.saved_tensors
        grad_eigval = grad_eigval * present
        block = torch.zeros_like(eigval, dtype=torch.bool).scatter(1, index, True) if ctx.gauge == "block" else None
        gaps = inverse_gaps(eigval, eigval.gather(1, index), block, tolerance, damping)
        coefficient = W.mT @ (grad_eigvec * present[:, None, :]) * gaps
        X = torch.baddbmm(U * grad_eigval[:, None, :], W, coefficient)
        return symmetric_product(X, U), None, None, None, None, None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        G: Tensor,
        reached: Tensor,
        isolated: Tensor,
        num_eig: int,
        drop_trivial: bool,
        gauge: str,
        damping: float | None,
    ) -> tuple[Tensor, Tensor]:
        # A GPU may be set to multiply float32 with ten bits; the kernel would not be recognised then.
        precise = G.double() if G.is_cuda else G
        mu, V = decompose((precise.mT @ precise).to(G.dtype))
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
    @once_differentiable
    @backward_in_full_precision
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
        return grad, None, None, None, None, None, None
