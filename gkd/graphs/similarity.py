from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from gkd.graphs.rows import neighbor_products

Metric = Literal["cosine", "euclidean"]

_SMALLEST_NORM = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    r"""Divides every row by its Euclidean norm; a zero row stays zero.

    Rows with a norm below 1e-12 count as zero: their value *and* their gradient are zero, where a norm clamped from below would send
    back a gradient of 1e12.

    Args:
        x: Rows, in float32 or float64.

    Shapes:
        - **x** [..., d]; **output** [..., d]
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    exists = norm > _SMALLEST_NORM
    # The inner `where` keeps the quotient away from 0, so that no infinity meets the zero gradient of the outer one.
    return x * torch.where(exists, torch.where(exists, norm, 1.0).reciprocal(), 0.0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean distances between the rows of x and of y, by one batched product.

    .. math:: d_{ij}^2 = |x_i|^2 + |y_j|^2 - 2 x_i \cdot y_j

    Both sides are shifted by the mean row first, because the formula loses digits far from the origin; what remains below its rounding
    error is set to exactly 0, so that equal rows have distance 0. There is no square root, hence no singular gradient at distance 0.

    Shapes:
        - **x** [B, n, d], **y** [B, m, d]; **output** [B, n, m]
    """
    if y.shape[1] > 0:
        shift = y.detach().mean(dim=1, keepdim=True)  # distances do not depend on it, so neither does their gradient
        x, y = x - shift, y - shift
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


def mean_per_graph(values: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int) -> Tensor:
    """Mean over the existing edges of every graph, one number an edge (that of its graph).

    Args:
        values: One number an edge.
        exists: False for fillers; None if there are none.
        graph: The graph of every edge; None if all the graphs have equally many edges, one graph after the other.
        num_graphs: Number of graphs.

    Shapes:
        - **values** [E], **exists** [E], **graph** [E]; **output** [E]
    """
    one = torch.ones_like(values) if exists is None else exists.to(values.dtype)
    if graph is None:  # sums over rows: the same bits in every run, which atomic additions on a GPU do not promise
        total, count = (t.reshape(max(num_graphs, 1), -1).sum(dim=1, keepdim=True) for t in (values * one, one))
        return (total / count.clamp(min=1)).expand(-1, values.numel() // max(num_graphs, 1)).reshape(-1)
    total, count = (t.new_zeros(num_graphs).index_add(0, graph, t) for t in (values * one, one))
    return (total / count.clamp(min=1))[graph]


class Similarity(Protocol):
    """What the edge classes ask of a metric: scores rank pairs (larger is closer), weights turn the scores of edges into edge weights."""

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of all pairs: [B, n, d], [B, m, d] -> [B, n, m]."""

    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Scores of the edges source j in y -> target i in x: [2, E] -> [E]."""

    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, n, k] of the neighbours [B, n, k] in y of every x, with a gradient; those that are known have none."""

    def radius_score(self, radius: float) -> float:
        """The score of a pair at this distance."""

    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int) -> Tensor:
        """Edge weights [E] from the scores of the edges [E]; see :func:`mean_per_graph` for the other arguments."""


class CosineSimilarity:
    r"""Weights :math:`\max(0, \cos(x_i, x_j))`; a zero row has similarity 0 with everything. Distance: :math:`1 - \cos`."""

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Cosines of all pairs."""
        unit = unit_rows(x)
        return unit @ (unit if y is x else unit_rows(y)).mT

    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Cosines of the edges, by the way that needs less memory: all pairs in one product, or two gathered rows an edge."""
        if x.shape[0] * x.shape[1] * y.shape[1] <= edge_index.shape[1] * x.shape[2]:
            return take_edges(self.scores(x, y), edge_index)
        source, target = edge_index
        x_target, y_source = unit_rows(x).flatten(0, 1)[target], unit_rows(y).flatten(0, 1)[source]
        return (x_target * y_source).sum(dim=-1)

    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """The known cosines; only their gradient is computed."""
        unit = unit_rows(x)
        return neighbor_products(unit, unit if y is x else unit_rows(y), source, scores)

    def radius_score(self, radius: float) -> float:
        """The cosine at this cosine distance."""
        return 1.0 - radius

    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int) -> Tensor:
        """Clips at 0."""
        weight = scores.relu()
        return weight if exists is None else torch.where(exists, weight, 0.0)


class EuclideanSimilarity:
    r"""Weights :math:`\exp(-d_{ij}^2 / 2 \sigma^2)`.

    Args:
        sigma: Bandwidth, in units of the features; None: the mean length of the edges of the graph, detached (1 if that is 0).
    """

    def __init__(self, sigma: float | None = None) -> None:
        if sigma is not None and not sigma > 0:
            raise ValueError(f"Expected a positive sigma (got {sigma})")
        self.sigma = sigma

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative squared distances of all pairs."""
        return -squared_distances(x, y)

    def edge_scores(self, x: Tensor, y: Tensor, edge_index: Tensor) -> Tensor:
        """Negative squared distances of the edges, from differences: exact where the product formula loses digits."""
        source, target = edge_index
        return -(x.flatten(0, 1)[target] - y.flatten(0, 1)[source]).square().sum(dim=-1)

    def neighbor_scores(self, x: Tensor, y: Tensor, source: Tensor, scores: Tensor) -> Tensor:
        """Negative squared distances anew, from differences as above; the known ones are less exact."""
        number = source + torch.arange(source.shape[0], device=source.device)[:, None, None] * y.shape[1]
        return -(x[:, :, None] - y.flatten(0, 1)[number]).square().sum(dim=-1)

    def radius_score(self, radius: float) -> float:
        """The negative square of this distance."""
        return -(radius**2)

    def weights(self, scores: Tensor, exists: Tensor | None, graph: Tensor | None, num_graphs: int) -> Tensor:
        """Gaussian of the distance."""
        if self.sigma is None:
            square = mean_per_graph(scores.detach().neg().sqrt(), exists, graph, num_graphs).square()
            variance: Tensor | float = torch.where(square > 0, square, 1.0)
        else:
            variance = self.sigma**2
        weight = (scores / (2 * variance)).exp()
        return weight if exists is None else torch.where(exists, weight, 0.0)


def build_similarity(metric: Metric, sigma: float | None = None) -> Similarity:
    """The similarity of this name.

    Raises:
        ValueError: If the name is unknown, or sigma is given to a metric without a bandwidth.
    """
    if metric == "cosine":
        if sigma is not None:
            raise ValueError(f"Expected sigma=None with metric='cosine', which has no bandwidth (got sigma={sigma})")
        return CosineSimilarity()
    if metric == "euclidean":
        return EuclideanSimilarity(sigma)
    raise ValueError(f"Expected metric 'cosine' or 'euclidean' (got {metric!r})")
