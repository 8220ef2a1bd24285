from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_geometric.data import Data

from gkd.graphs.dense import check_adjacency
from gkd.graphs.eigen import (
    Gauge,
    check_options,
    damping_of,
    decompose,
    exact_eigenmaps,
    inverse_gaps,
    keep,
    rounding,
    symmetric_product,
)
from gkd.graphs.laplacian import Normalization, check_finite, sparse_laplacian
from gkd.graphs.precision import as_float, backward_in_full_precision, full_precision
from gkd.graphs.rows import Rows, sort_rows

_SPARE = 8  # vectors beyond the wanted ones; they set the pace of convergence
# How much more the lowest vector may grow than the highest before the random vectors of the start are made orthonormal. What comes after
# that are Ritz vectors, each near its own eigenvector, which stand twice as many digits.
_GROWTH = {torch.float32: 1e4, torch.float64: 1e8}
_MAX_DEGREE = 60  # of the polynomial that is applied between two orthonormalisations
_MAX_SOLVE = 1000  # conjugate gradient steps of the backward pass


class Block(NamedTuple):
    """Lowest Ritz pairs of every graph."""

    eigval: Tensor
    """Ascending, ``[B, M]``."""
    eigvec: Tensor
    """Orthonormal columns, ``[B, N, M]``."""
    kernel: Tensor
    """Number of zero eigenvalues, ``[B]``."""
    tolerance: Tensor
    """Eigenvalues that are no farther apart are one, ``[B]``."""


def subspace_eigenmaps(
    graph: Data | Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    normalization: Normalization = "sym",
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
    init: Tensor | None = None,
    tolerance: float | None = None,
    max_iter: int = 60,
) -> tuple[Tensor, Tensor]:
    """Finds the lowest eigenpairs of large graphs by Chebyshev-filtered subspace iteration.

    A block of vectors is multiplied by a polynomial of the Laplacian that is small on the unwanted part of the spectrum, and made
    orthonormal again, until the wanted pairs satisfy the eigenvalue equation. A graph costs its edges times the block, not its
    nodes cubed. The block holds the whole kernel, the wanted pairs and a few more; it grows when a graph turns out to have more
    components than fit, and once it would take a third of the nodes the exact method takes over. The start is deterministic. The
    backward pass solves for the part of the gradient outside the block by conjugate gradients.

    Args:
        graph: A graph or a batch of graphs, whose edges stay sparse, or Laplacians.
        num_eig: Number Q of pairs.
        mask: True where a node exists, for Laplacians.
        normalization: 'sym' or None, for graphs.
        drop_trivial: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        gauge: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        damping: As in :func:`~gkd.graphs.spectral.eigenmaps`.
        init: Vectors to start from, such as the eigenvectors of the last step; any number of columns, zero columns too.
        tolerance: Largest norm of :math:`L u - \\lambda u` in units of the largest eigenvalue; None: 1e-5 in float32, 1e-9 in float64.
        max_iter: Number of filter rounds after which the pairs are taken as they are, with a warning.

    Shapes:
        - **graph** as Laplacians [B, N, N], **mask** [B, N], **init** [B, N, any]; **output** eigval [B, Q], eigvec [B, N, Q]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) a value is not finite.

    References:
        Zhou, Saad, Tiago, Chelikowsky: Self-Consistent-Field Calculations Using Chebyshev-Filtered Subspace Iteration,
        J. Comput. Phys. 2006.
    """
    check_options(num_eig, gauge, damping)
    if isinstance(graph, Tensor):
        mask = check_adjacency(graph, mask)
        value = as_float(graph).masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)
        check_finite(value, "Laplacian")
        value = (value + value.mT) / 2
        diagonal, edge_index = value.diagonal(dim1=1, dim2=2), None
    else:
        sparse = sparse_laplacian(graph, normalization)
        diagonal, value, edge_index, mask = sparse
    if init is not None and init.shape[:2] != mask.shape:
        raise ValueError(f"Expected 'init' of shape {[*mask.shape, 'any']} (got {list(init.shape)})")
    num_graphs, num_nodes = mask.shape
    if mask.numel() == 0:
        return value.new_zeros(num_graphs, num_eig), value.new_zeros(num_graphs, num_nodes, num_eig)
    with full_precision(value), torch.no_grad():
        operator = Operator(diagonal.detach(), value.detach(), edge_index, mask)
        block = _iterate(operator, num_eig, init, tolerance, max_iter)
    if block is None:
        L = value if edge_index is None else sparse.to_dense()
        return exact_eigenmaps(L, num_eig, mask, drop_trivial, gauge, damping, symmetric=True)
    with full_precision(value):
        return _Attach.apply(diagonal, value, operator, block, num_eig, drop_trivial, gauge, damping)


class Operator:
    """Multiplies blocks of vectors by the Laplacians; nodes that do not exist are moved above the spectrum.

    It works in float64 on a GPU, which may be set to multiply float32 with ten bits only.
    """

    def __init__(self, diagonal: Tensor, value: Tensor, edge_index: Tensor | None, mask: Tensor) -> None:
        dtype = torch.float64 if value.is_cuda else value.dtype
        diagonal, value = diagonal.to(dtype), value.to(dtype)
        self.mask, self.edge_index, self.dtype = mask, edge_index, dtype
        # No eigenvalue of a Laplacian exceeds twice its largest diagonal entry.
        largest = diagonal.amax(1)
        self.scale = 2 * torch.where(largest > 0, largest, 1.0)
        self.bound = float(self.scale.max()) * (1.02 if bool(mask.all()) else 1.3)
        shift = (1.25 * self.scale)[:, None] * ~mask
        if edge_index is None:
            self.matrix = value + torch.diag_embed(shift)
        else:
            self.rows = _rows(diagonal + shift, value, edge_index)

    def __call__(self, X: Tensor) -> Tensor:
        """Computes L X."""
        if self.edge_index is None:
            return self.matrix @ X
        return self.rows.multiply(X.flatten(0, 1)).view_as(X)

    def recurrence(self, centre: float, half: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Makes a function that computes ``2 / half * (L - centre) X - before`` in hardly more than one product; may overwrite before."""
        slope = 2 / half
        if self.edge_index is None:
            return lambda before, X: before.baddbmm_(self.matrix, X, beta=-1, alpha=slope).add_(X, alpha=-slope * centre)
        value = slope * self.rows.value
        value[self.rows.offset[:-1]] -= slope * centre  # every row begins with its diagonal entry
        rows = self.rows._replace(value=value)
        return lambda before, X: rows.multiply(X.flatten(0, 1)).view_as(X).sub_(before)


def _iterate(operator: Operator, num_eig: int, init: Tensor | None, tolerance: float | None, max_iter: int) -> Block | None:
    """Finds the kernel and the ``num_eig`` pairs above it in every graph, or None where they are too many for a block."""
    num_nodes = operator.mask.size(1)
    count = operator.mask.sum(1)
    limit = operator.scale * (tolerance or {torch.float32: 1e-5, torch.float64: 1e-9}[operator.dtype])
    zero = rounding(operator.scale, num_nodes) + limit / 10  # a Rayleigh quotient is off by the square of its residual
    size = num_eig + _SPARE
    growth = _GROWTH[operator.dtype]
    if 3 * size > num_nodes:
        return None
    X = _widen(operator.mask.new_zeros(*operator.mask.shape, 0) if init is None else init, size, operator)
    lower = operator.bound / 3  # a fair guess as long as nothing is known
    if init is None:
        X = _filter(operator, X, operator(X), lower, _largest_degree(operator, lower, growth))
    for step in range(max_iter + 1):
        X, LX, eigval = _rayleigh_ritz(operator, X)
        kernel = (eigval <= zero[:, None]).sum(1)
        wanted = torch.minimum(kernel + num_eig, count)
        residual = (LX - eigval[:, None, :] * X).square().sum(1).sqrt() / limit[:, None]
        excess = residual.masked_fill(torch.arange(size, device=wanted.device) >= wanted[:, None], 0.0).amax(1)
        largest, worst = int(wanted.max()), float(excess.max())
        if largest + _SPARE // 2 > size:
            size = largest + max(_SPARE, size // 2)
            excess = excess.clamp(min=2.0)
        elif worst <= 1:
            return Block(eigval, X, kernel, zero)
        elif step == max_iter:
            warnings.warn(f"Subspace iteration stopped after {max_iter} rounds, {worst:.3g} times its tolerance off", stacklevel=4)
            return Block(eigval, X, kernel, zero)
        if 3 * size > num_nodes:
            return None
        lower, degree = _next_filter(operator, eigval, wanted, excess, lower / 10, growth**2)
        X = torch.where((excess > 1)[:, None, None], _filter(operator, X, LX, lower, degree), X)
        if size > X.size(2):
            X = _widen(X, size, operator)
    return None  # the block was still growing


def _widen(X: Tensor, size: int, operator: Operator) -> Tensor:
    """Fills a block up to its size with random vectors, the same ones every time, and puts these in place of zero columns too."""
    X = X[:, :, :size].to(operator.dtype)
    used, (num_graphs, num_nodes) = X.size(2), operator.mask.shape
    noise = _noise(num_nodes, size, X).expand(num_graphs, -1, -1)
    X = torch.where(X.norm(dim=1, keepdim=True) > 0, X, noise[:, :, :used])
    return torch.cat([X, noise[:, :, used:]], 2) * operator.mask[:, :, None]


def _noise(num_nodes: int, size: int, like: Tensor) -> Tensor:
    return torch.randn(num_nodes, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


def _rayleigh_ritz(operator: Operator, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a block into orthonormal Ritz vectors; returns them, their images and their values, ascending."""
    X = torch.linalg.qr(X)[0]
    LX = operator(X)
    projected = X.mT @ LX
    eigval, Q = decompose((projected + projected.mT) / 2)
    return X @ Q, LX @ Q, eigval


def _next_filter(operator: Operator, eigval: Tensor, wanted: Tensor, excess: Tensor, lowest: float, growth: float) -> tuple[float, int]:
    """Chooses where the damped part of the spectrum begins, and the degree that should bring the worst residual to its limit."""
    limit, last = float(operator.scale.max()), (wanted - 1).clamp(0, eigval.size(1) - 1)
    # Ritz values come from above: the one in the middle of the spare ones is nearer to the end of what the block can hold than the last.
    middle = (last + eigval.size(1)) // 2
    edge = eigval.gather(1, middle[:, None])[excess > 1]
    # Not all at once: a block that the kernel fills has to leave its neighbours behind before it is known to be the kernel.
    lower = min(max(float(edge.max()), lowest, 1e-6 * limit), 1.1 * limit)
    centre, half = (operator.bound + lower) / 2, (operator.bound - lower) / 2
    at = torch.stack([eigval.gather(1, last[:, None])[:, 0], eigval[:, -1]])
    speed = torch.acosh(((centre - at) / half).clamp(min=1.0))  # at which vectors of these eigenvalues grow from degree to degree
    needed = torch.acosh(2 * excess.clamp(min=1.0)) / (speed[0] - speed[1]).clamp(min=1e-3)
    degree = math.ceil(float(needed[excess > 1].max()))
    return lower, min(max(degree, 2), _largest_degree(operator, lower, growth))


def _largest_degree(operator: Operator, lower: float, growth: float) -> int:
    """The degree at which a vector of the eigenvalue 0 grows by so much."""
    return min(max(int(math.acosh(growth) / math.acosh((operator.bound + lower) / (operator.bound - lower))), 2), _MAX_DEGREE)


def _filter(operator: Operator, X: Tensor, LX: Tensor, lower: float, degree: int) -> Tensor:
    """Multiplies X by the Chebyshev polynomial of L that is small between ``lower`` and the end of the spectrum."""
    centre, half = (operator.bound + lower) / 2, (operator.bound - lower) / 2
    step = operator.recurrence(centre, half)
    previous, X = X.clone(), (LX - centre * X) / half
    for _ in range(degree - 1):
        previous, X = X, step(previous, X)
    return X


def _columns(value: Tensor) -> Tensor:
    return value[:, None, None]


def _rows(diagonal: Tensor, value: Tensor, edge_index: Tensor) -> Rows:
    """Writes diag(diagonal) - (S + S^T) / 2 as one sparse matrix over the nodes of all the graphs, the diagonal entry first in each row."""
    size = diagonal.numel()
    node = torch.arange(size, device=value.device)

    def build(edge_index: Tensor, value: Tensor) -> Rows:
        row = torch.cat([node, torch.where(value == 0, size, edge_index[0])])  # what is zero goes beyond the last row
        rows = sort_rows(row, torch.cat([node, edge_index[1]]), torch.cat([diagonal.flatten(), -value]), size)
        end = int(rows.offset[-1])
        return Rows(rows.column[:end], rows.offset, rows.value[:end])

    rows = build(edge_index, value)
    # S is symmetric if in every graph it treats random vectors as its transpose does, and need not be doubled then.
    probe = _noise(diagonal.size(1), 8, value).expand(diagonal.size(0), -1, -1)
    image = rows.multiply(probe.flatten(0, 1)).view_as(probe)
    product = probe.mT @ image
    rounding = 16 * torch.finfo(value.dtype).eps * probe.norm(dim=(1, 2)) * image.norm(dim=(1, 2))
    if bool(((product - product.mT).abs().amax((1, 2)) <= rounding).all()):
        return rows
    return build(torch.cat([edge_index, edge_index.flip(0)], 1), torch.cat([value, value]) / 2)


class _Attach(torch.autograd.Function):
    """Hands out the pairs that were found without a record of how, and knows their derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        diagonal: Tensor,
        value: Tensor,
        operator: Operator,
        block: Block,
        num_eig: int,
        drop_trivial: bool,
        gauge: str,
        damping: float | None,
    ) -> tuple[Tensor, Tensor]:
        mask = operator.mask
        count = mask.sum(1)
        size = block.eigval.size(1)
        position, start = keep(block.eigval, count, 0, block.tolerance, num_eig, drop_trivial)
        present = position < count[:, None]
        index = position.clamp(max=size - 1)
        eigvec = block.eigvec * mask[:, :, None]
        U = eigvec.gather(2, index[:, None, :].expand(-1, mask.size(1), -1)) * present[:, None, :]
        kept = block.eigval.gather(1, torch.minimum(position, (count - 1)[:, None]).clamp(0, size - 1))
        kept = torch.where((kept.abs() > block.tolerance[:, None]) & (start < count)[:, None], kept, 0.0)
        found = torch.arange(size, device=mask.device) < torch.minimum(block.kernel + num_eig, count)[:, None]
        ctx.save_for_backward(block.eigval, eigvec, U, index, present, found, block.tolerance)
        ctx.operator, ctx.gauge, ctx.damping = operator, gauge, damping_of(damping, operator.scale)
        return kept.to(value.dtype), U.to(value.dtype)

    @staticmethod
    @once_differentiable
    @backward_in_full_precision
    def backward(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> tuple[Tensor | None, ...]:
        eigval, eigvec, U, index, present, found, tolerance = ctx.saved_tensors
        operator, damping, dtype = ctx.operator, ctx.damping, grad_eigvec.dtype
        grad_eigval = grad_eigval.to(operator.dtype) * present
        grad_eigvec = grad_eigvec.to(operator.dtype) * present[:, None, :] * operator.mask[:, :, None]
        at = eigval.gather(1, index)
        kept = torch.zeros_like(found).scatter(1, index, True) if ctx.gauge == "block" else None
        coefficient = eigvec.mT @ grad_eigvec * inverse_gaps(eigval, at, kept, tolerance, damping) * found[:, :, None]
        X = U * grad_eigval[:, None, :] + eigvec @ coefficient
        X = X - _solve_outside(operator, grad_eigvec, at, eigval, eigvec, found, damping)
        if operator.edge_index is None:
            return None, symmetric_product(X, U).to(dtype), None, None, None, None, None, None
        grad_diagonal = (X * U).sum(-1).to(dtype) if ctx.needs_input_grad[0] else None
        grad_value = _edge_products(torch.cat([X, U], -1).flatten(0, 1), torch.cat([U, X], -1).flatten(0, 1), operator.edge_index) / -2
        return grad_diagonal, grad_value.to(dtype), None, None, None, None, None, None


def _edge_products(X: Tensor, Y: Tensor, edge_index: Tensor) -> Tensor:
    """Computes x_i . y_j for every edge i -> j; so many at a time that the rows stay in the cache."""
    source, target = (index.split(2**15) for index in edge_index)
    parts = [(X.index_select(0, i) * Y.index_select(0, j)).sum(-1) for i, j in zip(source, target, strict=True)]
    return torch.cat(parts) if parts else X.new_zeros(0)


def _solve_outside(operator: Operator, right: Tensor, at: Tensor, eigval: Tensor, eigvec: Tensor, found: Tensor, damping: Tensor) -> Tensor:
    """Solves (L - at) Y = right in the complement of the eigenvectors that were found, by conjugate gradients, one system a column.

    The complement holds larger eigenvalues only, so that the matrix is positive there. The spare vectors of the block are nearly the
    lowest of them: the preconditioner inverts the matrix on these, leaves out those that were found, and is the identity on the rest.
    A direction whose curvature is below the damping is not followed: it belongs to an eigenspace that the cut goes through.
    """
    usual = (operator.scale / 2)[:, None, None]  # gap of the rest; what is wrong with it costs steps, not precision
    gap = (eigval[:, :, None] - at[:, None, :]).maximum(_columns(damping))
    gain = torch.where(found[:, :, None], -1.0, (usual / gap - 1).clamp(min=0.0))

    def precondition(Y: Tensor) -> Tensor:
        return Y.baddbmm(eigvec, eigvec.mT @ Y * gain)

    rest = right.baddbmm(eigvec, eigvec.mT @ right * found[:, :, None], alpha=-1)
    goal = (1e-4 if operator.dtype == torch.float32 else 1e-11) ** 2 * rest.square().sum(1)
    Y = torch.zeros_like(rest)
    direction = precondition(rest)
    energy = (rest * direction).sum(1)  # at least the square of the rest
    for step in range(_MAX_SOLVE):
        if step % 4 == 0 and not bool((energy > goal).any()):
            break
        image = operator(direction) - at[:, None, :] * direction
        curvature = (direction * image).sum(1)
        follow = (curvature > damping[:, None] * direction.square().sum(1)) & (energy > goal)
        length = torch.where(follow, energy / torch.where(follow, curvature, 1.0), 0.0)[:, None, :]
        Y.addcmul_(direction, length)
        rest.addcmul_(image, length, value=-1)
        better = precondition(rest)
        previous, energy = energy, torch.where(follow, (rest * better).sum(1), 0.0)
        ratio = torch.where(follow, energy / torch.where(follow, previous, 1.0), 0.0)[:, None, :]
        direction = torch.addcmul(better, direction, ratio)
    return Y
