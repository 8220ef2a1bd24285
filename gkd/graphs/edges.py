from __future__ import annotations

import torch
from torch import Tensor

from gkd.graphs.arguments import flag, positive_integer, positive_number
from gkd.graphs.edge_index import Edges, Symmetrize, bipartite_index, check_edge_index, complete_index, num_pairs, without_diagonal
from gkd.graphs.lowrank import LowRank
from gkd.graphs.nearest import check_neighbors, nearest, num_slots
from gkd.graphs.nodes import Nodes, checked_rows
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity import Comparable, Metric, per_edge, take_edges
from gkd.graphs.similarity_edges import NeighborEdges, SimilarityEdges
from gkd.graphs.values import readable

__all__ = ["CompleteEdges", "KNNEdges", "RadiusEdges"]


class KNNEdges(NeighborEdges):
    r"""Joins every node with the k nodes most similar to it.

    Weights are :math:`\max(0, \cos(x_i, x_j))` or :math:`\exp(-|x_i - x_j|^2 / 2 \sigma^2)`. A zero row has cosine 0 with every other.
    Cosine edges do not change when rows are scaled, euclidean ones when all rows are moved, rotated or (with ``sigma=None``) scaled.

    Directed edges go from the neighbour to the node that chose it, the direction in which torch_geometric sends messages. 'union' adds the
    reverse of each, in 2 * n * k slots a graph: where two nodes chose each other, the second copies are fillers (self-loops of weight 0).
    'mutual' keeps only such pairs, in n * k slots. In a padded graph with k nodes or fewer, every node is joined with all the others. A
    graph of one node, or of none, has no edges.

    Args:
        k: Number of neighbours, without the node itself.
        metric: 'cosine' or 'euclidean'.
        symmetrize: 'union', 'mutual', or None for directed edges.
        sigma: Bandwidth of the euclidean weights, in units of the features; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * k], twice as long for 'union', **output.edge_weight** [as long]

    Gradient:
        Of the weights; finite for equal rows and zero rows. The choice of neighbours has none.

    Raises:
        ValueError: If k is not smaller than the number of nodes, in graphs without padding that have at least two.

    Examples:
        >>> nodes = Nodes(torch.tensor([[[1., 0.], [1., 1.], [0., 1.]]]))
        >>> edges = KNNEdges(k=1, symmetrize=None)(nodes)
        >>> edges.edge_index[1].tolist(), [round(w, 3) for w in edges.edge_weight.tolist()]
        ([0, 1, 2], [0.707, 0.707, 0.707])
    """

    def __init__(self, k: int = 8, metric: Metric = "cosine", symmetrize: Symmetrize | None = "union", sigma: float | None = None) -> None:
        super().__init__(metric, symmetrize, sigma)
        self.k = positive_integer(k, "k")

    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""
        return num_slots(self.k, num_nodes - 1)

    def choose(self, rows: Comparable, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The k nearest nodes of each."""
        k, mask = check_neighbors(self.k, rows.x.shape[1] - 1, nodes.mask), nodes.mask
        source, scores, exists = nearest(self.similarity, rows, k, mask, loops=False)
        exists = exists if mask is None or exists is None else exists & mask[:, :, None]
        return source, exists, self.similarity.neighbor_scores(rows.x, rows.y, source, scores)

    def between(self, targets: Nodes, sources: Nodes, edge_index: Tensor | None = None) -> Edges:
        """Edges from the k most similar sources to each target, two sets of nodes of the same B graphs; directed.

        Args:
            targets: Nodes that choose, numbered b * n + i.
            sources: Nodes to choose from, numbered b * m + j.
            edge_index: Edges (source, target) whose weights are asked for, instead of choosing; negative ones are no edges.
        """
        with full_precision(targets.x):
            rows = self.similarity.prepare(checked_rows(targets), checked_rows(sources))
            batch_size, num_targets, num_sources = rows.x.shape[0], rows.x.shape[1], rows.y.shape[1]
            if edge_index is not None:
                edge_index = check_edge_index(edge_index, batch_size * num_targets, batch_size * num_sources)
                slots = edge_index.clamp(min=0)
                graph = torch.div(slots[1], max(num_targets, 1), rounding_mode="floor")
                score = self.similarity.edge_scores(rows.x, rows.y, slots)
                return Edges(edge_index, self.similarity.weights(score, edge_index[0] >= 0, graph, batch_size, rows.unit))
            k = check_neighbors(self.k, num_sources, sources.mask)
            source, scores, exists = nearest(self.similarity, rows, k, sources.mask)
            if targets.mask is not None:
                exists = targets.mask[:, :, None].expand_as(source) if exists is None else exists & targets.mask[:, :, None]
            edge_index = bipartite_index(source, num_sources)
            score = self.similarity.neighbor_scores(rows.x, rows.y, source, scores).reshape(-1)
            exists = None if exists is None else exists.reshape(-1)
            return Edges(edge_index, self.similarity.weights(score, exists, None, batch_size, rows.unit))

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"k={self.k}, symmetrize={self.symmetrize!r}, {super().extra_repr()}"


class AllPairsEdges(SimilarityEdges):
    """Base of the edge classes that look at every pair of nodes of a graph, in one product."""

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        return num_pairs(num_nodes, self.self_loops)

    def given_scores(self, rows: Comparable, edge_index: Tensor) -> Tensor:
        """The scores of edges that are given."""
        return take_edges(self.similarity.scores(rows.x, rows.y), edge_index)

    def pairs(self, matrix: Tensor) -> Tensor:
        """The entries [B, n, n] of all the pairs that have a slot, in the order of the edges."""
        return (matrix if self.self_loops else without_diagonal(matrix)).reshape(-1)

    def filled(self, x: Tensor, exists: Tensor | None) -> Tensor:
        """The edge list of all pairs, with fillers where no edge exists."""
        edge_index = complete_index(x.shape[0], x.shape[1], self.self_loops, x.device)
        return edge_index if exists is None else torch.stack((torch.where(exists, edge_index[0], edge_index[1]), edge_index[1]))

    def existing(self, nodes: Nodes) -> Tensor | None:
        """Which slots join two nodes that exist (None: all)."""
        return None if nodes.mask is None else self.pairs(nodes.mask[:, :, None] & nodes.mask[:, None, :])


class RadiusEdges(AllPairsEdges):
    """Joins all nodes that are closer than a radius.

    The number of edges depends on the values, so every pair keeps a slot, n * (n - 1) a graph, and pairs further apart are fillers
    (self-loops of weight 0): no waiting for a GPU. ``prune`` makes the short list of it.

    Args:
        radius: Largest distance of an edge: Euclidean distance in units of the features, or 1 - cos.
        metric: 'cosine' or 'euclidean': of the distance and of the weights.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * (n - 1)], **output.edge_weight** [B * n * (n - 1)]

    Gradient:
        Of the weights; the choice of edges has none.

    Examples:
        >>> line = Nodes(torch.tensor([[[0.], [1.], [3.]]]))
        >>> edges = RadiusEdges(radius=1.5, metric='euclidean', sigma=1.)(line)
        >>> edges.edge_index[:, edges.edge_weight > 0].tolist()
        [[1, 0], [0, 1]]
    """

    def __init__(self, radius: float, metric: Metric = "euclidean", sigma: float | None = None) -> None:
        super().__init__(metric, sigma)
        self.radius = positive_number(radius, "radius")

    def own_edges(self, rows: Comparable, nodes: Nodes) -> Edges:
        """All pairs, those beyond the radius replaced by fillers."""
        scores = self.pairs(self.similarity.scores(rows.x, rows.y))
        least = self.similarity.radius_score(self.radius, rows.unit)
        exists = scores.detach() >= (per_edge(least, None, scores.shape[0]) if isinstance(least, Tensor) else least)
        possible = self.existing(nodes)
        exists = exists if possible is None else exists & possible
        return Edges(self.filled(rows.x, exists), self.similarity.weights(scores, exists, None, rows.x.shape[0], rows.unit))

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"radius={self.radius}, {super().extra_repr()}"


class CompleteEdges(AllPairsEdges):
    r"""Joins every node with every other.

    Where no feature is negative, no cosine is, and none needs clipping. With F, the rows divided by their norms, the adjacency is then
    exactly :math:`F F^\top`, with self-loops (a zero row has none) or without its diagonal: a matrix whose rank is the number of features,
    less a diagonal. F is handed on as ``lowrank``, from which all that is needed of a graph with more nodes than features comes without the
    adjacency, see :class:`~gkd.graphs.LowRank`.

    Args:
        metric: 'cosine' or 'euclidean'.
        self_loops: Whether every node is joined with itself too. The spectrum is cheapest then.
        nonnegative: For 'cosine': True clips negative features at 0. None looks whether there are any, on the CPU only, since elsewhere
            that would wait for the device; what is on another device counts as having some. False does not look.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * (n - 1)], with self-loops [2, B * n * n]

    Examples:
        >>> edges = CompleteEdges(self_loops=True)(Nodes(torch.rand(2, 5, 3)))
        >>> torch.allclose(edges.lowrank.dense(), edges.edge_weight.view(2, 5, 5))
        True
        >>> CompleteEdges()(Nodes(torch.randn(2, 5, 3))).lowrank is None
        True
    """

    def __init__(
        self, metric: Metric = "cosine", self_loops: bool = False, nonnegative: bool | None = None, sigma: float | None = None
    ) -> None:
        super().__init__(metric, sigma)
        if nonnegative is not None and flag(nonnegative, "nonnegative") and metric != "cosine":
            raise ValueError(f"Expected metric 'cosine' with nonnegative=True (got {metric!r})")
        self.self_loops = flag(self_loops, "self_loops")
        self.nonnegative = nonnegative

    def rows(self, nodes: Nodes) -> Tensor:
        """The rows that are compared."""
        x = checked_rows(nodes)
        return x.relu() if self.nonnegative else x

    def lowrank(self, nodes: Nodes) -> LowRank | None:
        """The adjacencies by their factor, without forming them; None where they have none."""
        if self.metric != "cosine":
            return None
        with full_precision(nodes.x):
            x = self.rows(nodes)
            return LowRank(self.similarity.prepare(x).x, self.self_loops) if self._clean(x) else None

    def own_edges(self, rows: Comparable, nodes: Nodes) -> Edges:
        """All pairs."""
        exists = self.existing(nodes)
        edge_index = self.filled(rows.x, exists)
        scores = self.pairs(self.similarity.scores(rows.x, rows.y))
        if self.metric == "cosine" and self._clean(rows.x):  # products with the zero rows of missing nodes are 0
            return Edges(edge_index, scores, LowRank(rows.x, self.self_loops))
        return Edges(edge_index, self.similarity.weights(scores, exists, None, rows.x.shape[0], rows.unit))

    def _clean(self, x: Tensor) -> bool:
        """Whether no feature is negative, as far as that can be known without waiting."""
        if self.nonnegative is not None or not readable(x):
            return bool(self.nonnegative)
        return x.numel() == 0 or bool(x.detach().amin() >= 0)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{super().extra_repr()}, self_loops={self.self_loops}, nonnegative={self.nonnegative}"
