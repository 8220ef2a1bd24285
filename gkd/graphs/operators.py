from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from gkd.graphs.perturbation import decompose, symmetric_product
from gkd.graphs.rows import Rows, sort_rows

Step = Callable[[Tensor, Tensor], Tensor]


class Operator(ABC):
    """Multiplies blocks of vectors by the Laplacians; nodes that are no part of the problem are moved above the spectrum.

    It works in float64 on a GPU, which may be set to multiply float32 with ten bits only.

    Args:
        diagonal: Diagonals of the Laplacians, or the part of these that a subclass takes apart.
        value: What else the subclass makes the Laplacians of.
        mask: True for the nodes of the problem.
        largest: The largest diagonal entries of the Laplacians; None: of ``diagonal``.

    Shapes:
        - **diagonal** [B, N], **mask** [B, N], **largest** [B]
    """

    def __init__(self, diagonal: Tensor, value: Tensor, mask: Tensor, largest: Tensor | None = None) -> None:
        self.dtype = torch.float64 if value.is_cuda else value.dtype
        self.mask = mask
        self.diagonal, self.value = diagonal.to(self.dtype), value.to(self.dtype)
        # No eigenvalue of a Laplacian exceeds twice its largest diagonal entry.
        largest = self.diagonal.amax(1) if largest is None else largest.to(self.dtype)
        self.scale = 2 * torch.where(largest > 0, largest, 1.0)
        self.bound = float(self.scale.max()) * (1.02 if bool(mask.all()) else 1.3)
        self.shift = (1.25 * self.scale)[:, None] * ~mask

    @abstractmethod
    def __call__(self, X: Tensor) -> Tensor:
        """Computes L X."""

    def recurrence(self, centre: float, half: float) -> Step:
        """Makes a function that computes ``2 / half * (L - centre) X - before`` in hardly more than one product; may overwrite before."""
        slope = 2 / half
        return lambda before, X: self(X).sub_(X, alpha=centre).mul_(slope).sub_(before)

    @abstractmethod
    def gradients(self, X: Tensor, U: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Turns the gradient X U^T of the Laplacians, of which the symmetric part counts, into those of diagonal and value."""

    def start(self, size: int) -> Tensor:
        """Vectors to start from, ``[B, N, any number up to size]``."""
        return self.diagonal.new_zeros(*self.mask.shape, 0)


class DenseOperator(Operator):
    """Laplacians as they are, ``value`` [B, N, N]."""

    def __init__(self, value: Tensor, mask: Tensor) -> None:
        super().__init__(value.diagonal(dim1=1, dim2=2), value, mask)
        self.matrix = self.value + torch.diag_embed(self.shift)

    def __call__(self, X: Tensor) -> Tensor:
        """Computes L X."""
        return self.matrix @ X

    def recurrence(self, centre: float, half: float) -> Step:
        """As for any operator."""
        slope = 2 / half
        return lambda before, X: before.baddbmm_(self.matrix, X, beta=-1, alpha=slope).add_(X, alpha=-slope * centre)

    def gradients(self, X: Tensor, U: Tensor) -> tuple[None, Tensor]:
        """The whole gradient is that of the value."""
        return None, symmetric_product(X, U)


class SparseOperator(Operator):
    """Laplacians diag(diagonal) - (S + S^T) / 2, ``value`` [E] holding the entries of S at ``edge_index``."""

    def __init__(self, diagonal: Tensor, value: Tensor, edge_index: Tensor, mask: Tensor) -> None:
        super().__init__(diagonal, value, mask)
        self.edge_index = edge_index
        self.rows = _rows(self.diagonal + self.shift, self.value, edge_index)

    def __call__(self, X: Tensor) -> Tensor:
        """Computes L X."""
        return self.rows.multiply(X.flatten(0, 1)).view_as(X)

    def recurrence(self, centre: float, half: float) -> Step:
        """As for any operator."""
        slope = 2 / half
        value = slope * self.rows.value
        value[self.rows.offset[:-1]] -= slope * centre  # every row begins with its diagonal entry
        rows = self.rows._replace(value=value)
        return lambda before, X: rows.multiply(X.flatten(0, 1)).view_as(X).sub_(before)

    def gradients(self, X: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Products of rows at the edges."""
        left, right = torch.cat([X, U], -1).flatten(0, 1), torch.cat([U, X], -1).flatten(0, 1)
        return (X * U).sum(-1), _edge_products(left, right, self.edge_index) / -2


class FactorOperator(Operator):
    """Normalised Laplacians diag(diagonal) - G G^T, ``value`` [B, N, R] holding G. None is negative, and no eigenvalue exceeds 2."""

    def __init__(self, diagonal: Tensor, value: Tensor, mask: Tensor) -> None:
        super().__init__(diagonal, value, mask, torch.ones_like(diagonal[:, 0]))
        # Without the part that is not negative, L would be the diagonal: a bound that is far nearer to the end of the spectrum.
        self.bound = min(float(self.diagonal.max()) * (1 + 1e-3), 2.0) if bool(mask.all()) else self.bound
        self.weight = (self.diagonal + self.shift)[:, :, None]

    def __call__(self, X: Tensor) -> Tensor:
        """Computes L X."""
        return torch.baddbmm(self.weight * X, self.value, self.value.mT @ X, alpha=-1)

    def gradients(self, X: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Products with G."""
        return (X * U).sum(-1), -(X @ (U.mT @ self.value) + U @ (X.mT @ self.value))

    def start(self, size: int) -> Tensor:
        """The vectors of G G^T, from which the wanted ones differ as far as the diagonal varies."""
        _, V = decompose(self.value.mT @ self.value)
        return self.value @ V.flip(-1)[:, :, :size]


def noise(num_nodes: int, size: int, like: Tensor) -> Tensor:
    """Random vectors, the same ones every time."""
    return torch.randn(num_nodes, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


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
    probe = noise(diagonal.size(1), 8, value).expand(diagonal.size(0), -1, -1)
    image = rows.multiply(probe.flatten(0, 1)).view_as(probe)
    product = probe.mT @ image
    rounding = 16 * torch.finfo(value.dtype).eps * probe.norm(dim=(1, 2)) * image.norm(dim=(1, 2))
    if bool(((product - product.mT).abs().amax((1, 2)) <= rounding).all()):
        return rows
    return build(torch.cat([edge_index, edge_index.flip(0)], 1), torch.cat([value, value]) / 2)


def _edge_products(X: Tensor, Y: Tensor, edge_index: Tensor) -> Tensor:
    """Computes x_i . y_j for every edge i -> j; so many at a time that the rows stay in the cache."""
    source, target = (index.split(2**15) for index in edge_index)
    parts = [(X.index_select(0, i) * Y.index_select(0, j)).sum(-1) for i, j in zip(source, target, strict=True)]
    return torch.cat(parts) if parts else X.new_zeros(0)
