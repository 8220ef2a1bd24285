from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from gkd.graphs.dense import padded_edges, to_padded
from gkd.graphs.nearest import nearest
from gkd.graphs.nodes import Nodes
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity import Metric, build_similarity, take_edges, unit_rows
from gkd.graphs.topology import (
    Edges,
    Symmetrize,
    bipartite_index,
    check_edge_index,
    check_neighbors,
    checked_rows,
    complete_index,
    neighbor_index,
    num_slots,
    without_diagonal,
)


class SimilarityEdges(nn.Module):
    """Base of the edge classes whose weights come from a similarity of the two nodes.

    A subclass says which pairs are edges (:meth:`own_edges`) and how many slots a graph has for them (:meth:`slots`).

    Args:
        metric: 'cosine' or 'euclidean'.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.
    """

    self_loops = False

    def __init__(self, metric: Metric = "cosine", sigma: float | None = None) -> None:
        super().__init__()
        self.similarity = build_similarity(metric, sigma)
        self.metric = metric
        self.sigma = sigma

    def forward(self, nodes: Nodes, edge_index: Tensor | None = None) -> Edges:
        """Chooses edges and weighs them, or weighs those of another network.

        Args:
            nodes: The nodes of B graphs.
            edge_index: Edges in padded numbering (b * n + i) whose weights are asked for. Self-loops among them are fillers and weigh 0,
                except in a class with self-loops; so are slots with negative numbers.

        Shapes:
            - **edge_index** [2, E]; **output.edge_index** [2, E], **output.edge_weight** [E]

        Gradient:
            Through the weights to ``nodes.x``; the choice of edges has none.
        """
        with full_precision(nodes.x):
            x = self.rows(nodes)
            return self.own_edges(x, nodes) if edge_index is None else self.given_edges(x, nodes, edge_index)

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        raise TypeError(f"{type(self).__name__} has to define slots()")

    def rows(self, nodes: Nodes) -> Tensor:
        """The rows that are compared."""
        return checked_rows(nodes)

    def own_edges(self, x: Tensor, nodes: Nodes) -> Edges:
        """The edges that this class chooses, with their weights."""
        raise TypeError(f"{type(self).__name__} has to define own_edges()")

    def given_edges(self, x: Tensor, nodes: Nodes, edge_index: Tensor) -> Edges:
        """The weights on edges that are given."""
        batch_size, num_nodes, _ = x.shape
        edge_index = check_edge_index(edge_index, batch_size * num_nodes, batch_size * num_nodes)
        exists = edge_index[0] >= 0 if self.self_loops else edge_index[0] != edge_index[1]
        slots = edge_index.clamp(min=0)
        graph = torch.div(slots[1], max(num_nodes, 1), rounding_mode="floor")
        return Edges(edge_index, self.similarity.weights(self.given_scores(x, slots), exists, graph, batch_size))

    def given_scores(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """The scores of edges that are given."""
        return self.similarity.edge_scores(x, x, edge_index)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"metric={self.metric!r}" + ("" if self.sigma is None else f", sigma={self.sigma}")


class NeighborEdges(SimilarityEdges):
    """Base of the edge classes that choose equally many neighbours for every node: :meth:`choose`, :meth:`width`."""

    def __init__(self, metric: Metric = "cosine", symmetrize: Symmetrize | None = None, sigma: float | None = None) -> None:
        super().__init__(metric, sigma)
        if symmetrize not in ("union", "mutual", None):
            raise ValueError(f"Expected symmetrize 'union', 'mutual' or None (got {symmetrize!r})")
        self.symmetrize = symmetrize

    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""
        raise TypeError(f"{type(self).__name__} has to define width()")

    def choose(self, x: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Neighbours [B, n, k] in the numbering of their graph, which of them exist (None: all), and their scores if at hand."""
        raise TypeError(f"{type(self).__name__} has to define choose()")

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        return num_nodes * self.width(num_nodes) * (2 if self.symmetrize == "union" else 1)

    def own_edges(self, x: Tensor, nodes: Nodes) -> Edges:
        """The chosen neighbours, symmetrised."""
        batch_size, num_nodes, _ = x.shape
        source, exists, scores = self.choose(x, nodes)
        edge_index = neighbor_index(source, exists, self.symmetrize)
        if scores is None:
            scores = self.similarity.edge_scores(x, x, bipartite_index(source, num_nodes)).view(source.shape)
        if self.symmetrize == "union":  # the reverse edges have the scores of the others
            scores = scores.flatten(1)[:, None].expand(-1, 2, -1)
        return Edges(edge_index, self.similarity.weights(scores.reshape(-1), edge_index[0] != edge_index[1], None, batch_size))


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
        self.k = _positive(k, "k")

    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""
        return num_slots(self.k, num_nodes - 1)

    def choose(self, x: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The k nearest nodes of each."""
        k, mask = check_neighbors(self.k, x.shape[1] - 1, nodes.mask), nodes.mask
        source, scores, exists = nearest(self.similarity, x, x, k, mask, loops=False)
        exists = exists if mask is None or exists is None else exists & mask[:, :, None]
        return source, exists, self.similarity.neighbor_scores(x, x, source, scores)

    def between(self, targets: Nodes, sources: Nodes, edge_index: Tensor | None = None) -> Edges:
        """Edges from the k most similar sources to each target, two sets of nodes of the same B graphs; directed.

        Args:
            targets: Nodes that choose, numbered b * n + i.
            sources: Nodes to choose from, numbered b * m + j.
            edge_index: Edges (source, target) whose weights are asked for, instead of choosing; negative ones are no edges.
        """
        with full_precision(targets.x):
            x, y = checked_rows(targets), checked_rows(sources)
            batch_size, num_targets, num_sources = x.shape[0], x.shape[1], y.shape[1]
            if edge_index is not None:
                edge_index = check_edge_index(edge_index, batch_size * num_targets, batch_size * num_sources)
                slots = edge_index.clamp(min=0)
                graph = torch.div(slots[1], max(num_targets, 1), rounding_mode="floor")
                score = self.similarity.edge_scores(x, y, slots)
                return Edges(edge_index, self.similarity.weights(score, edge_index[0] >= 0, graph, batch_size))
            k = check_neighbors(self.k, num_sources, sources.mask)
            source, scores, exists = nearest(self.similarity, x, y, k, sources.mask)
            if targets.mask is not None:
                exists = targets.mask[:, :, None].expand_as(source) if exists is None else exists & targets.mask[:, :, None]
            edge_index = bipartite_index(source, num_sources)
            score = self.similarity.neighbor_scores(x, y, source, scores).reshape(-1)
            return Edges(edge_index, self.similarity.weights(score, None if exists is None else exists.reshape(-1), None, batch_size))

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"k={self.k}, symmetrize={self.symmetrize!r}, {super().extra_repr()}"


class AllPairsEdges(SimilarityEdges):
    """Base of the edge classes that look at every pair of nodes of a graph, in one product."""

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        return num_nodes * (num_nodes if self.self_loops else max(num_nodes - 1, 0))

    def given_scores(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """The scores of edges that are given."""
        return take_edges(self.similarity.scores(x, x), edge_index)

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
        if not radius > 0:
            raise ValueError(f"Expected a positive radius (got {radius})")
        self.radius = radius

    def own_edges(self, x: Tensor, nodes: Nodes) -> Edges:
        """All pairs, those beyond the radius replaced by fillers."""
        scores = self.pairs(self.similarity.scores(x, x))
        exists = scores.detach() >= self.similarity.radius_score(self.radius)
        possible = self.existing(nodes)
        exists = exists if possible is None else exists & possible
        return Edges(self.filled(x, exists), self.similarity.weights(scores, exists, None, x.shape[0]))

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"radius={self.radius}, {super().extra_repr()}"


class CompleteEdges(AllPairsEdges):
    r"""Joins every node with every other.

    With ``nonnegative=True`` the rows are clipped at 0, so that the cosines are not negative and need no clipping: with self-loops the
    adjacency is then exactly :math:`A = F F^T`, F being the rows divided by their norms (a zero row has no self-loop either). F is handed
    on as ``factor``, from which the spectrum of a graph with more nodes than features is far cheaper.

    Args:
        metric: 'cosine' or 'euclidean'.
        self_loops: Whether every node is joined with itself too.
        nonnegative: Whether negative features are clipped; for 'cosine' only.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * (n - 1)], with self-loops [2, B * n * n]; **output.factor** [B, n, d]

    Examples:
        >>> edges = CompleteEdges(self_loops=True, nonnegative=True)(Nodes(torch.rand(2, 5, 3)))
        >>> torch.allclose(edges.factor @ edges.factor.mT, edges.edge_weight.view(2, 5, 5))
        True
    """

    def __init__(self, metric: Metric = "cosine", self_loops: bool = False, nonnegative: bool = False, sigma: float | None = None) -> None:
        super().__init__(metric, sigma)
        if nonnegative and metric != "cosine":
            raise ValueError(f"Expected metric 'cosine' with nonnegative=True (got {metric!r})")
        self.self_loops = self_loops
        self.nonnegative = nonnegative

    def rows(self, nodes: Nodes) -> Tensor:
        """The rows that are compared."""
        x = checked_rows(nodes)
        return x.relu() if self.nonnegative else x

    def own_edges(self, x: Tensor, nodes: Nodes) -> Edges:
        """All pairs."""
        exists = self.existing(nodes)
        edge_index = self.filled(x, exists)
        if not self.nonnegative:
            return Edges(edge_index, self.similarity.weights(self.pairs(self.similarity.scores(x, x)), exists, None, x.shape[0]))
        factor = unit_rows(x)  # zero where no node exists, and so are its products
        return Edges(edge_index, self.pairs(factor @ factor.mT), factor if self.self_loops else None)

    def given_edges(self, x: Tensor, nodes: Nodes, edge_index: Tensor) -> Edges:
        """The weights on edges that are given."""
        batch_size, num_nodes, _ = x.shape
        if nodes.mask is None:
            if edge_index is complete_index(batch_size, num_nodes, self.self_loops, x.device):
                return self.own_edges(x, nodes)
            num_pairs = batch_size * num_nodes**2
        else:  # ragged graphs wait for the device anyway
            num_pairs = int(nodes.mask.sum(dim=1).square().sum())
        edges = super().given_edges(x, nodes, edge_index)
        # Edges are given once each, so as many as there are pairs are all the pairs.
        complete = self.nonnegative and self.self_loops and edge_index.shape[1] == num_pairs
        return edges._replace(factor=unit_rows(x)) if complete else edges

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{super().extra_repr()}, self_loops={self.self_loops}, nonnegative={self.nonnegative}"


def signed_weights(graph: Data, edges: nn.Module | None) -> Tensor:
    """Weights of the edges of a graph before cosines are clipped at 0; fillers weigh 0 all the same.

    Args:
        graph: A graph or a batch of graphs.
        edges: What weighed the edges. Of a class without cosines, and for None, the weights are as they are.

    Shapes:
        - **output** [E]
    """
    if isinstance(edges, SimilarityEdges) and edges.metric == "cosine":
        edge_index, _, mask = padded_edges(graph)
        with full_precision(graph.x):
            scores = edges.given_scores(edges.rows(Nodes(to_padded(graph.x, graph), mask=mask)), edge_index)
        return scores if edges.self_loops else scores.where(edge_index[0] != edge_index[1], 0.0)
    return padded_edges(graph)[1]


def _positive(value: int, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {name} to be a positive integer (got {value!r})")
    return value
