from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gkd.graphs.precision import full_precision


class Rows(NamedTuple):
    """The entries of a sparse matrix, row by row; those of one place add up."""

    column: Tensor
    """Columns of the entries, ``[E]``."""
    offset: Tensor
    """Where each row begins, and the end of the last, ``[num_rows + 1]``."""
    value: Tensor
    """Values of the entries, ``[E]``."""

    def multiply(self, X: Tensor) -> Tensor:
        """Computes the product with a matrix, as sums of its weighted rows: on a CPU the fastest sparse product that PyTorch has."""
        return embedding_bag(self.column, X, self.offset, mode="sum", per_sample_weights=self.value, include_last_offset=True)


def sort_rows(row: Tensor, column: Tensor, value: Tensor, num_rows: int) -> Rows:
    """Sorts the entries of a sparse matrix by rows; within a row they keep their order.

    Args:
        row: Rows of the entries; those from ``num_rows`` on come last and belong to no row.
        column: Columns of the entries.
        value: Values of the entries.
        num_rows: Number of rows.

    Shapes:
        - **row** [E], **column** [E], **value** [E]

    Examples:
        >>> rows = sort_rows(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([2.0, 3.0, 4.0]), num_rows=2)
        >>> rows.multiply(torch.eye(2))
        tensor([[0., 3.],
                [2., 4.]])
    """
    row, order = row.int().sort(stable=True)
    offset = torch.searchsorted(row, torch.arange(num_rows + 1, dtype=row.dtype, device=row.device))
    return Rows(column.index_select(0, order), offset, value.index_select(0, order))


def neighbor_products(x: Tensor, y: Tensor, source: Tensor, value: Tensor) -> Tensor:
    r"""Gives the products :math:`x_i \cdot y_j` of rows and their neighbours, which were computed already, their gradient.

    All pairs that are not neighbours have no part in it, so that it costs the neighbours alone.

    Args:
        x: Rows that chose.
        y: Rows that were chosen from.
        source: The neighbours.
        value: Their products; taken as they are.

    Shapes:
        - **x** [B, n, d], **y** [B, m, d], **source** [B, n, k], **value** [B, n, k]; **output** [B, n, k]
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        return value
    return _NeighborProducts.apply(x, y.view_as(y), source, value)  # torch.compile takes no tensor twice


class _NeighborProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, source: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, source)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, source = ctx.saved_tensors
        (batch_size, num_rows, k), num_choices = source.shape, y.shape[1]
        if source.numel() == 0:
            return torch.zeros_like(x), torch.zeros_like(y), None, None
        number = source + torch.arange(batch_size, device=source.device)[:, None, None] * num_choices
        with full_precision(grad):
            weight = grad.reshape(-1, k)
            grad_x = embedding_bag(number.view(-1, k), y.flatten(0, 1), mode="sum", per_sample_weights=weight).view_as(x)
            node = torch.arange(batch_size * num_rows, device=source.device).repeat_interleave(k)
            grad_y = sort_rows(number.flatten(), node, weight.flatten(), batch_size * num_choices).multiply(x.flatten(0, 1))
        return grad_x, grad_y.view_as(y), None, None
