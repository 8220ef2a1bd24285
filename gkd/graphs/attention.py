from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd.graphs.arguments import positive_integer, positive_number
from gkd.graphs.edge_index import Edges, bipartite_index, check_edge_index, complete_index, neighbor_index, num_pairs, without_diagonal
from gkd.graphs.nearest import check_neighbors, neighbors, num_slots
from gkd.graphs.nodes import Nodes, checked_rows
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity import power_of_two, take_edges

_LARGEST_SCORE = 1e30  # of a pair; it attends to nothing else long before


class AttentionEdges(nn.Module):
    r"""Joins every node with those it attends to.

    .. math:: a_{ij} = \frac{1}{H} \sum_h \mathrm{softmax}_{j \neq i} \frac{q_i^h \cdot k_j^h}{T \sqrt{d}}

    Node i hears node j with weight :math:`a_{ij}` over the edge j -> i: directed by nature. The softmax goes over all the other nodes of
    the graph; then the k largest weights of a node are kept as they are, so that they say how much attention the kept edges have. Queries
    and keys are the rows themselves, or, if ``in_channels`` is given, two learned linear maps of them.

    Args:
        k: Number of neighbours that are kept; None: all.
        heads: Number of equal parts of the rows (or of the learned queries and keys) that attend separately; weights are their mean.
        temperature: T; small ones make attention sharp.
        in_channels: Length of the rows, to learn queries and keys; None: no parameters.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * k], or [2, B * n * (n - 1)], **output.edge_weight** in [0, 1]

    Gradient:
        Of the weights, to the rows and to the maps; the choice of neighbours has none.

    Raises:
        ValueError: If k is not smaller than the number of nodes, in graphs without padding that have at least two, or if d is not a
            multiple of ``heads`` or not ``in_channels``.

    References:
        Vaswani et al.: Attention Is All You Need, NeurIPS 2017.

    Examples:
        >>> edges = AttentionEdges()(Nodes(torch.rand(2, 5, 8)))
        >>> torch.allclose(edges.edge_weight.view(2, 5, 4).sum(dim=-1), torch.ones(2, 5))
        True
    """

    def __init__(self, k: int | None = None, heads: int = 1, temperature: float = 1.0, in_channels: int | None = None) -> None:
        super().__init__()
        if k is not None:
            positive_integer(k, "k")
        positive_integer(heads, "heads")
        if in_channels is not None:
            positive_integer(in_channels, "in_channels")
        if in_channels is not None and in_channels % heads != 0:
            raise ValueError(f"Expected in_channels to be a multiple of heads (got in_channels={in_channels}, heads={heads})")
        self.k = k
        self.heads = heads
        self.temperature = positive_number(temperature, "temperature")
        self.in_channels = in_channels
        self.query = nn.Identity() if in_channels is None else nn.Linear(in_channels, in_channels, bias=False)
        self.key = nn.Identity() if in_channels is None else nn.Linear(in_channels, in_channels, bias=False)

    def slots(self, num_nodes: int) -> int:
        """Number of edge slots of a graph, fillers included."""
        return num_pairs(num_nodes, False) if self.k is None else num_nodes * num_slots(self.k, num_nodes - 1)

    def forward(self, nodes: Nodes, edge_index: Tensor | None = None) -> Edges:
        """Chooses edges and weighs them, or weighs those of another network: self-loops among these are fillers and weigh 0.

        Args:
            nodes: The nodes of B graphs.
            edge_index: Edges in padded numbering (b * n + i) whose weights are asked for.
        """
        with full_precision(nodes.x):
            x = checked_rows(nodes)
            batch_size, num_nodes, _ = x.shape
            itself = torch.eye(num_nodes, dtype=torch.bool, device=x.device)
            attends = ~itself if nodes.mask is None else ~itself & nodes.mask[:, None, :] & nodes.mask[:, :, None]
            attention = self.attention(x, x, attends)
            if edge_index is not None:
                edge_index = check_edge_index(edge_index, batch_size * num_nodes, batch_size * num_nodes)
                return Edges(edge_index, given_weights(attention, edge_index))
            if self.k is None:
                edge_index = complete_index(batch_size, num_nodes, False, x.device)
                if nodes.mask is not None:
                    exists = without_diagonal(attends).reshape(-1)
                    edge_index = torch.stack((torch.where(exists, edge_index[0], edge_index[1]), edge_index[1]))
                return Edges(edge_index, without_diagonal(attention).reshape(-1))
            k = check_neighbors(self.k, num_nodes - 1, nodes.mask)
            source, exists_or_none = neighbors(attention.detach(), k, nodes.mask, loops=False)
            if nodes.mask is not None and exists_or_none is not None:
                exists_or_none = exists_or_none & nodes.mask[:, :, None]
            edge_index = neighbor_index(source, exists_or_none, None)
            return Edges(edge_index, take_edges(attention, edge_index))

    def between(self, targets: Nodes, sources: Nodes, edge_index: Tensor | None = None) -> Edges:
        """Edges from the nodes that each target attends to among the sources, two sets of nodes of the same B graphs.

        Args:
            targets: Nodes that attend, numbered b * n + i.
            sources: Nodes that are attended to, numbered b * m + j.
            edge_index: Edges (source, target) whose weights are asked for, instead of choosing; negative ones are no edges.
        """
        with full_precision(targets.x):
            x, y = checked_rows(targets), checked_rows(sources)
            batch_size, num_targets, num_sources = x.shape[0], x.shape[1], y.shape[1]
            if x.shape[2] != y.shape[2]:
                raise ValueError(f"Expected targets and sources with rows of equal length (got {x.shape[2]} and {y.shape[2]})")
            attends = torch.ones(batch_size, num_targets, num_sources, dtype=torch.bool, device=x.device)
            if sources.mask is not None:
                attends = attends & sources.mask[:, None, :]
            if targets.mask is not None:
                attends = attends & targets.mask[:, :, None]
            attention = self.attention(x, y, attends)
            if edge_index is not None:
                edge_index = check_edge_index(edge_index, batch_size * num_targets, batch_size * num_sources)
                return Edges(edge_index, given_weights(attention, edge_index))
            k = num_sources if self.k is None else check_neighbors(self.k, num_sources, sources.mask)
            edge_index = bipartite_index(neighbors(attention.detach(), k, sources.mask)[0], num_sources)
            return Edges(edge_index, take_edges(attention, edge_index))

    def attention(self, x: Tensor, y: Tensor, attends: Tensor) -> Tensor:
        """Attention weights of all pairs.

        Args:
            x: Rows that attend.
            y: Rows that are attended to.
            attends: False where a pair must not attend: its weight is 0; rows without any choice are zero.

        Shapes:
            - **x** [B, n, d], **y** [B, m, d], **attends** [B, n, m] or [n, m]; **output** [B, n, m]
        """
        width = x.shape[-1]
        if width % self.heads != 0 or (self.in_channels is not None and width != self.in_channels):
            expected = f"a multiple of {self.heads} heads" if self.in_channels is None else f"in_channels={self.in_channels}"
            raise ValueError(f"Expected rows of length {expected} (got {width})")
        query, key = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), self.key(y)))
        # Products of large features would overflow; powers of two change no digit of the others.
        query_unit, key_unit = power_of_two(query, (1, 2, 3)), power_of_two(key, (1, 2, 3))
        scale = (query_unit * key_unit / (self.temperature * max(query.shape[-1], 1) ** 0.5)).clamp(max=_LARGEST_SCORE)
        allowed = attends if attends.dim() == 2 else attends[:, None]
        # A finite lowest score, since a row of nothing but -inf would be NaN.
        score = ((query / query_unit) @ (key / key_unit).mT * scale).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return score.softmax(dim=-1).masked_fill(~allowed, 0.0).mean(dim=1)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"k={self.k}, heads={self.heads}, temperature={self.temperature}, in_channels={self.in_channels}"


def given_weights(attention: Tensor, edge_index: Tensor) -> Tensor:
    """Reads the weights of edges off [B, n, m]; slots with negative numbers are no edges."""
    return torch.where(edge_index[0] >= 0, take_edges(attention, edge_index.clamp(min=0)), 0.0)
