from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from gkd.graphs.arguments import one_of
from gkd.graphs.dense import check_adjacency, padded_edges, scatter_edges, to_dense
from gkd.graphs.layout import layout
from gkd.graphs.precision import as_float
from gkd.graphs.similarity import power_of_two
from gkd.graphs.values import readable

Normalization = Literal["sym", "rw"] | None


def laplacian(graph: Data | Tensor, normalization: Normalization = "sym", mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Builds the Laplacian of every graph.

    .. math::
        L = D - A, \qquad L_{sym} = D^{-1/2} L D^{-1/2}, \qquad L_{rw} = D^{-1} L, \qquad d_i = \sum_j a_{ij}

    with :math:`D^{-1/2} = D^{-1} = 0` where the degree is 0: the row of an isolated node is zero, so that every component, an isolated
    node too, adds one zero eigenvalue. A directed graph stands for the undirected :math:`(A + A^\top) / 2`; symmetric weights are left
    as they are, bit for bit. The two normalised Laplacians do not change when all the weights of a graph are scaled.

    Args:
        graph: A graph, a batch of graphs, or padded adjacencies, whose weights are not negative.
        normalization: 'sym', 'rw', or None for :math:`D - A`.
        mask: True where a node exists, for padded adjacencies. Whatever else they hold has no influence.

    Shapes:
        - **graph** as adjacencies [B, N, N], **mask** [B, N]; **output** L [B, N, N] in float32 or float64, mask [B, N]

    Gradient:
        Finite everywhere; zero at the weights between isolated nodes, where the normalised Laplacians jump.

    Raises:
        ValueError: If the shapes disagree, the normalisation is unknown, or (checked on the CPU only) a weight is negative or not finite.

    Examples:
        >>> path = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> L, mask = laplacian(path, normalization=None)
        >>> L
        tensor([[[ 1., -1.,  0.],
                 [-1.,  2., -1.],
                 [ 0., -1.,  1.]]])
    """
    check_normalization(normalization)
    if isinstance(graph, Tensor):
        mask = check_adjacency(graph, mask)
        A = as_float(graph).masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)
    else:
        if mask is not None:
            raise ValueError("Expected 'mask' with dense adjacencies only (got one beside a graph, which has its own)")
        if normalization != "rw" and is_sparse(graph):
            sparse = sparse_laplacian(graph, normalization)
            return sparse.to_dense(), sparse.mask
        A, mask = to_dense(graph)
    check_weights(A)
    if normalization is not None:  # which no common factor of the weights changes
        A = A / power_of_two(A)
    A = (A + A.mT) / 2
    degree = A.sum(-1)
    if normalization is None:
        return torch.diag_embed(degree) - A, mask
    scale = inverse_sqrt(degree)
    scale = scale.square()[:, :, None] if normalization == "rw" else scale[:, :, None] * scale[:, None, :]
    return torch.diag_embed(connected(degree).to(A.dtype)) - A * scale, mask


def connected(degree: Tensor) -> Tensor:
    """True where a node is not isolated. So small a degree that the gradient of its inverse root overflows counts as 0."""
    return degree > math.sqrt(torch.finfo(degree.dtype).tiny)


def inverse_sqrt(degree: Tensor) -> Tensor:
    """Computes degree ** -1/2 with 0, and a gradient of 0, for isolated nodes."""
    keep = connected(degree)
    # The inner `where` keeps the infinite slope out of the backward pass: 0 * inf would be NaN.
    return torch.where(keep, torch.where(keep, degree, 1.0).rsqrt(), 0.0)


def check_normalization(normalization: str | None) -> None:
    """Raises a ValueError for a normalisation that does not exist."""
    one_of(normalization, ("sym", "rw", None), "normalization")


def check_weights(weight: Tensor) -> None:
    """Raises a ValueError for edge weights that are negative, NaN or infinite, on the CPU only."""
    if not readable(weight) or weight.numel() == 0:
        return
    least, most = (float(value) for value in torch.aminmax(weight.detach()))
    if not 0 <= least <= most < math.inf:
        bad = weight.detach()[~((weight >= 0) & weight.isfinite())].flatten()
        raise ValueError(f"Expected finite edge weights that are not negative (got {bad.numel()} others, such as {float(bad[0]):g})")


def check_finite(value: Tensor, name: str) -> None:
    """Raises a ValueError for NaN or infinity, on the CPU only: elsewhere asking would wait for the device."""
    if not readable(value) or value.detach().sum().isfinite():
        return
    bad = int((~value.isfinite()).sum())  # a sum can overflow though all its terms are finite
    if bad:
        raise ValueError(f"Expected finite {name} (got {bad} NaN or infinite of {value.numel()} values)")


class SparseLaplacian(NamedTuple):
    r"""Laplacians of a batch as a diagonal less edges, :math:`L = \operatorname{diag}(d) - (S + S^\top) / 2`, in padded numbering."""

    diagonal: Tensor
    """``[B, N]``, zero at nodes that do not exist."""
    value: Tensor
    """Entry of S for every edge, ``[E]``."""
    edge_index: Tensor
    """Node i of graph b is ``b * N + i``, ``[2, E]``."""
    mask: Tensor
    """True where a node exists, ``[B, N]``."""

    def to_dense(self) -> Tensor:
        """Writes the Laplacians as ``[B, N, N]``."""
        num_graphs, num_nodes = self.mask.shape
        L = scatter_edges(self.edge_index, -self.value / 2, num_graphs, num_nodes, both_ways=True)
        L.diagonal(dim1=1, dim2=2).add_(self.diagonal)
        return L


def is_sparse(graph: Data) -> bool:
    """True if so few pairs of nodes are joined that working edge by edge is cheaper than by rows of the padding."""
    num_graphs, num_nodes, _, _ = layout(graph)
    return graph.edge_index is not None and graph.edge_index.size(1) * 8 <= num_graphs * num_nodes**2


def sparse_laplacian(graph: Data, normalization: Normalization = "sym") -> SparseLaplacian:
    """Builds the Laplacian of every graph without a dense matrix; 'rw' is not symmetric and has none here.

    Args:
        graph: A graph or a batch of graphs.
        normalization: 'sym' or None, as in :func:`laplacian`.

    Raises:
        ValueError: As :func:`laplacian`.
    """
    one_of(normalization, ("sym", None), "normalization")
    edge_index, edge_weight, mask = padded_edges(graph)
    check_weights(edge_weight)
    source, target = edge_index
    if normalization is not None:  # which no common factor of the weights of a graph changes
        edge_weight = edge_weight / _unit_of_edges(edge_index, edge_weight, mask)
    degree = _edge_degree(edge_index, edge_weight, mask)
    if normalization is None:
        return SparseLaplacian(degree, edge_weight, edge_index, mask)
    scale = inverse_sqrt(degree).flatten()
    return SparseLaplacian(
        connected(degree).to(degree.dtype), edge_weight * (scale.index_select(0, source) * scale.index_select(0, target)), edge_index, mask
    )


def _unit_of_edges(edge_index: Tensor, edge_weight: Tensor, mask: Tensor) -> Tensor:
    """The power of two above the largest weight of the graph of every edge, as in :func:`power_of_two`."""
    graph = torch.div(edge_index[0], max(mask.shape[1], 1), rounding_mode="floor")
    largest = edge_weight.detach().new_zeros(mask.shape[0]).scatter_reduce(0, graph, edge_weight.detach(), "amax")
    return power_of_two(largest[:, None], -1)[:, 0][graph]


def node_degree(graph: Data) -> tuple[Tensor, Tensor]:
    """Sums the weights at every node, half from each direction, and returns the degree ``[B, N]`` and the mask ``[B, N]``."""
    edge_index, edge_weight, mask = padded_edges(graph)
    return _edge_degree(edge_index, edge_weight, mask), mask


def _edge_degree(edge_index: Tensor, edge_weight: Tensor, mask: Tensor) -> Tensor:
    degree = edge_weight.new_zeros(mask.numel())
    degree.scatter_add_(0, edge_index[0], edge_weight).scatter_add_(0, edge_index[1], edge_weight)
    return degree.view_as(mask) / 2
