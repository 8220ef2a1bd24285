from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from gkd.graphs.dense import check_adjacency
from gkd.graphs.eigen import Exact, unit_vectors, zero_rows
from gkd.graphs.laplacian import Normalization, check_finite, connected, inverse_sqrt, laplacian, sparse_laplacian
from gkd.graphs.lowrank import LowRank
from gkd.graphs.operators import DenseOperator, FactorOperator, Operator, SparseOperator, noise
from gkd.graphs.perturbation import Gauge, check_options, damping_of, decompose, first_order, inverse_gaps, keep, rounding
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import power_of_two

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
    wanted: int
    """Number of pairs above the kernel that are exact."""


class Subspace:
    """Finds the lowest eigenpairs of large graphs by Chebyshev-filtered subspace iteration.

    A block of vectors is multiplied by a polynomial of the Laplacian that is small on the unwanted part of the spectrum, and made
    orthonormal again, until the wanted pairs satisfy the eigenvalue equation. A graph costs its edges times the block, not its
    nodes cubed; one that is known by a factor, twice its nodes times the columns of this times the block. The block holds the whole kernel,
    the wanted pairs and a few more; it grows when a graph turns out to have more components than fit, and once it would take a third of the
    nodes the exact method takes over. Isolated nodes are set apart. The start is deterministic. Fewer pairs than before come from the same
    block. The backward pass solves for the part of the gradient outside the block by conjugate gradients.

    Args:
        graph: A graph or a batch of graphs, whose edges stay sparse, Laplacians, or adjacencies by their factor.
        mask: True where a node exists, for Laplacians and factors.
        normalization: 'sym' or None, for graphs.
        init: Vectors to start from, such as the eigenvectors of the last step; any number of columns, zero columns too.
        tolerance: Largest norm of :math:`L u - \\lambda u` in units of the largest eigenvalue; None: 1e-5 in float32, 1e-9 in float64.
        max_iter: Number of filter rounds after which the pairs are taken as they are, with a warning.

    Shapes:
        - **graph** as Laplacians [B, N, N], **mask** [B, N], **init** [B, N, any]

    Raises:
        ValueError: If the shapes disagree, or (checked on the CPU only) a value is not finite.

    References:
        Zhou, Saad, Tiago, Chelikowsky: Self-Consistent-Field Calculations Using Chebyshev-Filtered Subspace Iteration,
        J. Comput. Phys. 2006.
    """

    def __init__(
        self,
        graph: Data | Tensor | LowRank,
        mask: Tensor | None = None,
        normalization: Normalization = "sym",
        init: Tensor | None = None,
        tolerance: float | None = None,
        max_iter: int = 60,
    ) -> None:
        self.graph, self.normalization, self.init, self.tolerance, self.max_iter = graph, normalization, init, tolerance, max_iter
        self.edge_index: Tensor | None = None
        if isinstance(graph, LowRank):
            self.mask = torch.ones_like(graph.factor[:, :, 0], dtype=torch.bool) if mask is None else mask
            self._take_factor(graph)
        elif isinstance(graph, Tensor):
            self.mask = check_adjacency(graph, mask)
            value = as_float(graph).masked_fill(~(self.mask[:, :, None] & self.mask[:, None, :]), 0.0)
            check_finite(value, "Laplacian")
            self.unit = power_of_two(value)[:, :, 0]
            value = value / self.unit[:, :, None]
            self.value = (value + value.mT) / 2
            self.diagonal = self.value.diagonal(dim1=1, dim2=2)
            self.isolated = self.mask & zero_rows(self.value.detach())
        else:
            self.diagonal, self.value, self.edge_index, self.mask = sparse_laplacian(graph, normalization)
            self.unit = power_of_two(self.diagonal, -1)
            if normalization is None:
                self.diagonal = self.diagonal / self.unit
                self.value = self.value / self.unit.expand_as(self.mask).flatten()[self.edge_index[0]]
            else:
                self.unit = torch.ones_like(self.unit)
            self.isolated = self.mask & (self.diagonal.detach() == 0)
        if init is not None and init.shape[:2] != self.mask.shape:
            raise ValueError(f"Expected 'init' of shape {[*self.mask.shape, 'any']} (got {list(init.shape)})")
        self.operator: Operator | None = None
        self.block: Block | None = None
        self.exact: Exact | None = None

    def lowest(
        self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace", damping: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the lowest pairs, as :func:`~gkd.graphs.eigenmaps` explains: eigval [B, num_eig], eigvec [B, N, num_eig]."""
        check_options(num_eig, gauge, damping)
        num_graphs, num_nodes = self.mask.shape
        if self.mask.numel() == 0:
            return self.value.new_zeros(num_graphs, num_eig), self.value.new_zeros(num_graphs, num_nodes, num_eig)
        if self.exact is None and (self.block is None or self.block.wanted < num_eig):
            self._iterate(num_eig)
        if self.exact is not None:
            return self.exact.lowest(num_eig, drop_trivial, gauge, damping)
        with full_precision(self.value):
            options = self.isolated, num_eig, drop_trivial, gauge, damping
            eigval, eigvec = _Attach.apply(self.diagonal, self.value, self.operator, self.block, *options)
            return eigval * self.unit, eigvec if drop_trivial else eigvec + unit_vectors(self.isolated, num_eig)

    def _take_factor(self, lowrank: LowRank) -> None:
        r"""Writes :math:`L = I - G G^\top`, without self-loops plus :math:`\operatorname{diag}(|g_i|^2)`, with :math:`G = D^{-1/2} F`."""
        factor = as_float(lowrank.factor).masked_fill(~self.mask[:, :, None], 0.0)
        check_finite(factor, "factor")
        lowrank = LowRank(factor / power_of_two(factor), lowrank.self_loops)
        with full_precision(factor):
            degree = lowrank.degree()
            reached = connected(degree)
            self.value = lowrank.factor * inverse_sqrt(degree)[:, :, None]
            loops = torch.zeros_like(degree) if lowrank.self_loops else self.value.square().sum(-1)
            self.diagonal = reached + loops
        self.isolated = self.mask & ~reached
        self.unit = torch.ones_like(degree[:, :1])

    def _iterate(self, num_eig: int) -> None:
        with full_precision(self.value), torch.no_grad():
            if self.operator is None:
                self.operator = self._operator()
            self.block = _iterate(self.operator, num_eig, self.init, self.tolerance, self.max_iter)
        if self.block is None:
            graph = self.graph
            if isinstance(graph, LowRank):
                self.exact = Exact(*laplacian(as_float(graph.dense()), "sym", self.mask), symmetric=True)
            elif isinstance(graph, Tensor):
                self.exact = Exact(graph, self.mask)
            else:
                self.exact = Exact(*laplacian(graph, self.normalization), symmetric=True)

    def _operator(self) -> Operator:
        diagonal, value, mask = self.diagonal.detach(), self.value.detach(), self.mask & ~self.isolated
        if isinstance(self.graph, LowRank):
            return FactorOperator(diagonal, value, mask)
        return DenseOperator(value, mask) if self.edge_index is None else SparseOperator(diagonal, value, self.edge_index, mask)


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
    init = operator.start(size) if init is None else init
    X = _widen(init, size, operator)
    lower = operator.bound / 3  # a fair guess as long as nothing is known
    if init.size(2) == 0:
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
            return Block(eigval, X, kernel, zero, num_eig)
        elif step == max_iter:
            warnings.warn(f"Subspace iteration stopped after {max_iter} rounds, {worst:.3g} times its tolerance off", stacklevel=4)
            return Block(eigval, X, kernel, zero, num_eig)
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
    random = noise(num_nodes, size, X).expand(num_graphs, -1, -1)
    X = torch.where(X.norm(dim=1, keepdim=True) > 0, X, random[:, :, :used])
    return torch.cat([X, random[:, :, used:]], 2) * operator.mask[:, :, None]


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


class _Attach(torch.autograd.Function):
    """Hands out the pairs that were found without a record of how, and knows their derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        diagonal: Tensor,
        value: Tensor,
        operator: Operator,
        block: Block,
        isolated: Tensor,
        num_eig: int,
        drop_trivial: bool,
        gauge: str,
        damping: float | None,
    ) -> tuple[Tensor, Tensor]:
        mask = operator.mask
        count = mask.sum(1)
        size = block.eigval.size(1)
        # The zeros of isolated nodes come first; their vectors are added by whoever set them apart.
        position, start = keep(block.eigval, count, isolated.sum(1), block.tolerance, num_eig, drop_trivial)
        present = (position >= 0) & (position < count[:, None])
        index = position.clamp(0, size - 1)
        eigvec = block.eigvec * mask[:, :, None]
        U = eigvec.gather(2, index[:, None, :].expand(-1, mask.size(1), -1)) * present[:, None, :]
        kept = block.eigval.gather(1, torch.minimum(position, (count - 1)[:, None]).clamp(0, size - 1))
        real = (position >= 0) & (start < count)[:, None]
        kept = torch.where(real & (kept.abs() > block.tolerance[:, None]), kept, 0.0)
        found = torch.arange(size, device=mask.device) < torch.minimum(block.kernel + num_eig, count)[:, None]
        ctx.save_for_backward(block.eigval, eigvec, U, index, present, found, block.tolerance, isolated)
        ctx.operator, ctx.gauge, ctx.damping = operator, gauge, damping_of(damping, operator.scale)
        return kept.to(value.dtype), U.to(value.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> tuple[Tensor | None, ...]:
        eigval, eigvec, U, index, present, found, tolerance, isolated = ctx.saved_tensors
        operator, damping, dtype = ctx.operator, ctx.damping, grad_eigvec.dtype
        grad_eigval = grad_eigval.to(operator.dtype) * present
        grad_eigvec = grad_eigvec.to(operator.dtype) * present[:, None, :]
        at = eigval.gather(1, index)
        # Vectors of isolated nodes, whose eigenvalue is 0.
        X = grad_eigvec * isolated[:, :, None] * inverse_gaps(torch.zeros_like(eigval[:, :1]), at, None, tolerance, damping)
        grad_eigvec = grad_eigvec * operator.mask[:, :, None]
        kept = torch.zeros_like(found).scatter(1, index, True) if ctx.gauge == "block" else None
        coefficient = eigvec.mT @ grad_eigvec * inverse_gaps(eigval, at, kept, tolerance, damping) * found[:, :, None]
        X = X + U * grad_eigval[:, None, :] + eigvec @ coefficient
        X = X - _solve_outside(operator, grad_eigvec, at, eigval, eigvec, found, damping)
        gradients = (None if grad is None else grad.to(dtype) for grad in operator.gradients(X, U))
        return *gradients, None, None, None, None, None, None, None


def _solve_outside(operator: Operator, right: Tensor, at: Tensor, eigval: Tensor, eigvec: Tensor, found: Tensor, damping: Tensor) -> Tensor:
    """Solves (L - at) Y = right in the complement of the eigenvectors that were found, by conjugate gradients, one system a column.

    The complement holds larger eigenvalues only, so that the matrix is positive there. The spare vectors of the block are nearly the
    lowest of them: the preconditioner inverts the matrix on these, leaves out those that were found, and is the identity on the rest.
    A direction whose curvature is below the damping is not followed: it belongs to an eigenspace that the cut goes through.
    """
    # Gap of the rest, most of which lies in the middle of the spectrum; what is wrong with it costs steps, not precision.
    usual = (_columns(operator.scale) / 2 - at[:, None, :]).maximum(_columns(operator.scale) / 1000)
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
