from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gkd.graphs.arguments import one_of, positive_number
from gkd.graphs.rows import neighbor_products

Metric = Literal["cosine", "euclidean"]

# Of the largest entry of a graph: a shorter row counts as zero, a shorter edge has length 0. Nothing is divided by less.
_SMALLEST = 1e-12
_LARGEST_RATIO = 1e12  # of the unit of a graph to a bandwidth: beyond it a distance is 0 or without end


def power_of_two(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """An even power of two above the largest magnitude: dividing by it, or its root, is exact. It has no gradient, and is 1 for zeros.

    Squares of what was divided by it neither overflow nor vanish, whatever the unit of the features is.

    Args:
        x: Values, in float32 or float64.
        dim: Dimensions over which the magnitude is the largest; they stay, with size 1.

    Shapes:
        - **x** [..., n, d]; **output** [..., 1, 1]

    Examples:
        >>> power_of_two(torch.tensor([[3.0, -5e20]])).log2()
        tensor([[70.]])
    """
    x = x.detach()
    if x.numel() == 0:
        return x.new_ones(x.sum(dim, keepdim=True).shape)
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=dim, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-124, 124)  # inverses have to be finite and not denormal
    return torch.ldexp(torch.ones_like(largest), exponent + exponent % 2)


def unit_rows(x: Tensor) -> Tensor:
    r"""Divides every row by its Euclidean norm; a zero row stays zero.

    Rows shorter than 1e-12 of the largest entry of their matrix count as zero: their value *and* their gradient are zero, where a norm
    clamped from below would send back a gradient of 1e12. Unchanged by a positive scale of the matrix, also where squares overflow.

    Args:
        x: Rows, in float32 or float64.

    Shapes:
        - **x** [..., n, d] or [d]; **output** as x
    """
    x = x / power_of_two(x, (-2, -1) if x.dim() > 1 else -1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    exists = norm > _SMALLEST
    # The inner `where` keeps the quotient away from 0, so that no infinity meets the zero gradient of the outer one.
    return x * torch.where(exists, torch.where(exists, norm, 1.0).reciprocal(), 0.0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean distances between the rows of x and of y, by one batched product.

    .. math:: d_{ij}^2 = |x_i|^2 + |y_j|^2 - 2 x_i \cdot y_j

    Both sides should be shifted by a common row first, because the formula loses digits far from the origin; what remains below its
    rounding error is set to exactly 0, so that equal rows have distance 0. There is no square root, hence no singular gradient at
    distance 0.

    Shapes:
        - **x** [B, n, d], **y** [B, m, d]; **output** [B, n, m]
    """
    length = x.square().sum(dim=-1)[:, :, None] + y.square().sum(dim=-1)[:, None, :]
    square = length - 2 * (x @ y.mT)
    rounding = 4 * torch.finfo(x.dtype).eps * max(x.shape[-1], 1) ** 0.5
    return torch.where(square > rounding * length.detach(), square, 0.0)


def take_edges(matrix: Tensor, edge_index: Tensor) -> Tensor:
    """Reads the entries (target, source) of [B, n, m] at the edges, in padded numbering b * m + j -> b * n + i.

    Shapes:
        - **matrix** [B, n, m], **edge_index** [2, E]; **output** [E]
    """
    source, target = edge_index
    num_sources = max(matrix.shape[-1], 1)
    return matrix.reshape(-1).gather(0, target * num_sources + source % num_sources)


def per_edge(value: Tensor, graph: Tensor | None, num_edges: int) -> Tensor:
    """Repeats one number a graph for each of its edges.

    Shapes:
        - **value** [B], **graph** [E], the graph of every edge, or None if all have equally many, one's after the other's; **output** [E]
    """
    if graph is not None:
        return value[graph]
    num_graphs = value.shape[0]
    return value[:, None].expand(num_graphs, num_edges // max(num_graphs, 1)).reshape(-1)


def mean_per_graph(values: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int) -> Tensor:
    """Mean over the existing edges of every graph, one number an edge (that of its graph).

    Args:
        values: One number an edge.
        exists: False for fillers; None if there are none.
        graph: The graph of every edge, as in :func:`per_edge`.
        num_graphs: Number of graphs.

    Shapes:
        - **values** [E], **exists** [E], **graph** [E]; **output** [E]
    """
    one = torch.ones_like(values) if exists is None else exists.to(values.dtype)
    if graph is None:  # sums over rows: the same bits in every run, which atomic additions on a GPU do not promise
        total, count = (t.reshape(max(num_graphs, 1), -1).sum(dim=1) for t in (values * one, one))
    else:
        total, count = (t.new_zeros(num_graphs).index_add(0, graph, t) for t in (values * one, one))
    return per_edge(total / count.clamp(min=1), graph, values.shape[0])


class Comparable(NamedTuple):
    """Rows of two sets of nodes as a metric compares them; the sets may be one.

    Shapes:
        - **x** [B, n, d], **y** [B, m, d], **unit** [B], what one stands for in the features, or None if the metric has no unit
    """

    x: Tensor
    y: Tensor
    unit: Tensor | None = None


class Similarity(ABC):
    """What the edge classes ask of a metric: scores rank pairs (larger is closer), weights turn the scores of edges into edge weights.

    All the scores are of rows that :meth:`prepare` returned.
    """

    @abstractmethod
    def prepare(self, x: Tensor, y: Tensor | None = None) -> Comparable:
        """What is compared of rows: [B, n, d], [B, m, d] or None for x once more."""

    @abstractmethod
    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of all pairs: [B, n, d], [B, m, d] -> [B, n, m]."""

    @abstractmethod
    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Scores of the edges source j in y -> target i in x: [2, E] -> [E]."""

    @abstractmethod
    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, n, k] of the neighbours [B, n, k] in y of every x, with a gradient; those that are at hand have none."""

    @abstractmethod
    def radius_score(self, radius: float, unit: Tensor | None) -> float | Tensor:
        """The score of a pair at this distance, one number or [B]."""

    @abstractmethod
    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int, unit: Tensor | None) -> Tensor:
        """Edge weights [E] from the scores of the edges [E]; see :func:`mean_per_graph` for the other arguments."""


class CosineSimilarity(Similarity):
    r"""Weights :math:`\max(0, \cos(x_i, x_j))`; a zero row has similarity 0 with everything. Distance: :math:`1 - \cos`."""

    def prepare(self, x: Tensor, y: Tensor | None = None) -> Comparable:
        """Rows of length 1."""
        unit = unit_rows(x)
        return Comparable(unit, unit if y is None else unit_rows(y))

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Cosines of all pairs."""
        return x @ y.mT

    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Cosines of the edges, by the way that needs less memory: all pairs in one product, or two gathered rows an edge."""
        if x.shape[0] * x.shape[1] * y.shape[1] <= edge_index.shape[1] * x.shape[2]:
            return take_edges(x @ y.mT, edge_index)
        source, target = edge_index
        return (x.flatten(0, 1)[target] * y.flatten(0, 1)[source]).sum(dim=-1)

    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """The cosines at hand; only their gradient is computed."""
        return neighbor_products(x, y, source, scores)

    def radius_score(self, radius: float, unit: Tensor | None) -> float:
        """The cosine at this cosine distance."""
        return 1.0 - radius

    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int, unit: Tensor | None) -> Tensor:
        """Clips at 0."""
        weight = scores.relu()
        return weight if exists is None else torch.where(exists, weight, 0.0)


class EuclideanSimilarity(Similarity):
    r"""Weights :math:`\exp(-d_{ij}^2 / 2 \sigma^2)`.

    Args:
        sigma: Bandwidth, in units of the features; None: the mean length of the edges of the graph, detached (1 if that is 0).
    """

    def __init__(self, sigma: float | None = None) -> None:
        self.sigma = None if sigma is None else positive_number(sigma, "sigma")

    def prepare(self, x: Tensor, y: Tensor | None = None) -> Comparable:
        """Rows around their mean, in a unit in which they can be squared. The distances do not depend on the former."""
        unit = power_of_two(x) if y is None else torch.maximum(power_of_two(x), power_of_two(y))
        x, y_or_none = x / unit, None if y is None else y / unit
        chosen = x if y_or_none is None else y_or_none
        if chosen.shape[1] > 0:
            shift = chosen.detach().mean(dim=1, keepdim=True)
            x, y_or_none = x - shift, None if y_or_none is None else y_or_none - shift
        return Comparable(x, x if y_or_none is None else y_or_none, unit.flatten())

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative squared distances of all pairs."""
        return -squared_distances(x, y)

    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Negative squared distances of the edges, from differences: exact where the product formula loses digits."""
        source, target = edge_index
        return -(x.flatten(0, 1)[target] - y.flatten(0, 1)[source]).square().sum(dim=-1)

    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """Negative squared distances anew, from differences as above; those at hand are less exact."""
        number = source + torch.arange(source.shape[0], device=source.device)[:, None, None] * y.shape[1]
        return -(x[:, :, None] - y.flatten(0, 1)[number]).square().sum(dim=-1)

    def radius_score(self, radius: float, unit: Tensor | None) -> Tensor:
        """The negative square of this distance."""
        assert unit is not None
        return -(radius / unit).clamp(max=_LARGEST_RATIO).square()

    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int, unit: Tensor | None) -> Tensor:
        """Gaussian of the distance."""
        if self.sigma is None:
            length = mean_per_graph(scores.detach().neg().sqrt(), exists, graph, num_graphs)
            inverse = torch.where(length > _SMALLEST, length, 1.0).reciprocal()
        else:
            assert unit is not None
            inverse = per_edge((unit / self.sigma).clamp(max=_LARGEST_RATIO), graph, scores.shape[0])
        weight = (scores * inverse.square() / 2).exp()
        return weight if exists is None else torch.where(exists, weight, 0.0)


def build_similarity(metric: Metric, sigma: float | None = None) -> Similarity:
    """The similarity of this name.

    Raises:
        ValueError: If the name is unknown, or sigma is given to a metric without a bandwidth.
    """
    one_of(metric, ("cosine", "euclidean"), "metric")
    if metric == "cosine":
        if sigma is not None:
            raise ValueError(f"Expected sigma=None with metric='cosine', which has no bandwidth (got sigma={sigma})")
        return CosineSimilarity()
    return EuclideanSimilarity(sigma)
