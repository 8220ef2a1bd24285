from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from gkd.graphs.arguments import one_of
from gkd.graphs.dense import padded_edges, to_padded
from gkd.graphs.edge_index import Edges, Symmetrize, bipartite_index, check_edge_index, neighbor_index
from gkd.graphs.nodes import Nodes, checked_rows
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity import Comparable, Metric, build_similarity


class SimilarityEdges(nn.Module, ABC):
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
            rows = self.similarity.prepare(self.rows(nodes))
            return self.own_edges(rows, nodes) if edge_index is None else self.given_edges(rows, edge_index)

    @abstractmethod
    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""

    def rows(self, nodes: Nodes) -> Tensor:
        """The rows that are compared."""
        return checked_rows(nodes)

    @abstractmethod
    def own_edges(self, rows: Comparable, nodes: Nodes) -> Edges:
        """The edges that this class chooses, with their weights."""

    def given_edges(self, rows: Comparable, edge_index: Tensor) -> Edges:
        """The weights on edges that are given."""
        batch_size, num_nodes, _ = rows.x.shape
        edge_index = check_edge_index(edge_index, batch_size * num_nodes, batch_size * num_nodes)
        exists = edge_index[0] >= 0 if self.self_loops else edge_index[0] != edge_index[1]
        slots = edge_index.clamp(min=0)
        graph = torch.div(slots[1], max(num_nodes, 1), rounding_mode="floor")
        scores = self.given_scores(rows, slots)
        return Edges(edge_index, self.similarity.weights(scores, exists, graph, batch_size, rows.unit))

    def given_scores(self, rows: Comparable, edge_index: Tensor) -> Tensor:
        """The scores of edges that are given."""
        return self.similarity.edge_scores(rows.x, rows.y, edge_index)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"metric={self.metric!r}" + ("" if self.sigma is None else f", sigma={self.sigma}")


class NeighborEdges(SimilarityEdges):
    """Base of the edge classes that choose equally many neighbours for every node: :meth:`choose`, :meth:`width`."""

    def __init__(self, metric: Metric = "cosine", symmetrize: Symmetrize | None = None, sigma: float | None = None) -> None:
        super().__init__(metric, sigma)
        one_of(symmetrize, ("union", "mutual", None), "symmetrize")
        self.symmetrize = symmetrize

    @abstractmethod
    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""

    @abstractmethod
    def choose(self, rows: Comparable, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Neighbours [B, n, k] in the numbering of their graph, which of them exist (None: all), and their scores if at hand."""

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        return num_nodes * self.width(num_nodes) * (2 if self.symmetrize == "union" else 1)

    def own_edges(self, rows: Comparable, nodes: Nodes) -> Edges:
        """The chosen neighbours, symmetrised."""
        batch_size, num_nodes, _ = rows.x.shape
        source, exists, scores = self.choose(rows, nodes)
        edge_index = neighbor_index(source, exists, self.symmetrize)
        if scores is None:
            scores = self.similarity.edge_scores(rows.x, rows.y, bipartite_index(source, num_nodes)).view(source.shape)
        if self.symmetrize == "union":  # the reverse edges have the scores of the others
            scores = scores.flatten(1)[:, None].expand(-1, 2, -1)
        exists = edge_index[0] != edge_index[1]
        return Edges(edge_index, self.similarity.weights(scores.reshape(-1), exists, None, batch_size, rows.unit))


def signed_weights(graph: Data, edges: Callable[..., Edges] | None) -> Tensor:
    """Weights of the edges of a graph before cosines are clipped at 0; fillers weigh 0 all the same.

    Args:
        graph: A graph or a batch of graphs.
        edges: What weighed the edges. Of a class without cosines, and for None, the weights are as they are.

    Shapes:
        - **output** [E]
    """
    edge_index, edge_weight, mask = padded_edges(graph)
    if not isinstance(edges, SimilarityEdges) or edges.metric != "cosine":
        return edge_weight
    with full_precision(graph.x):
        rows = edges.similarity.prepare(edges.rows(Nodes(to_padded(graph.x, graph), mask=mask)))
        scores = edges.given_scores(rows, edge_index)
    return scores if edges.self_loops else scores.where(edge_index[0] != edge_index[1], 0.0)
