from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gkd.graphs.cache import static_tensors
from gkd.graphs.lowrank import LowRank
from gkd.graphs.values import readable

Symmetrize = Literal["union", "mutual"]


class Edges(NamedTuple):
    """The edges of B graphs in padded numbering: node i of graph b has the number b * n + i.

    An edge goes from ``edge_index[0]``, the neighbour that is heard, to ``edge_index[1]``, the node that hears it. Every graph has
    equally many slots, one graph's after the other's. An edge of weight 0 is no edge: slots without one are fillers, self-loops of
    weight 0.

    Args:
        edge_index: Sources and targets.
        edge_weight: Weights, in float32 or float64.
        lowrank: The same adjacencies by a factor, where they are known to have one.

    Shapes:
        - **edge_index** [2, E], **edge_weight** [E]
    """

    edge_index: Tensor
    edge_weight: Tensor
    lowrank: LowRank | None = None


def complete_index(batch_size: int, num_nodes: int, self_loops: bool, device: torch.device) -> Tensor:
    """All pairs of nodes of the same graph, target by target: [2, B * n * n], or n * (n - 1) a graph without self-loops."""
    return static_tensors(_complete_index, batch_size, num_nodes, self_loops, device)[0]


def _complete_index(batch_size: int, num_nodes: int, self_loops: bool, device: torch.device) -> tuple[Tensor]:
    node = torch.arange(batch_size * num_nodes, device=device).view(batch_size, num_nodes)
    shape = (batch_size, num_nodes, num_nodes)
    pair = torch.stack((node[:, None, :].expand(shape), node[:, :, None].expand(shape)))
    return ((pair if self_loops else without_diagonal(pair)).reshape(2, -1),)


def num_pairs(num_nodes: int, self_loops: bool) -> int:
    """Number of ordered pairs of nodes."""
    return num_nodes * (num_nodes if self_loops else max(num_nodes - 1, 0))


def without_diagonal(matrix: Tensor) -> Tensor:
    """Leaves out the diagonal, row by row: [..., n, n] -> [..., n, n - 1]."""
    n = matrix.shape[-1]
    if n < 2:
        return matrix[..., :0]
    # After the first entry, the diagonal ends every run of n + 1 entries.
    return matrix.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1].reshape(*matrix.shape[:-1], n - 1)


def neighbor_index(source: Tensor, exists: Tensor | None, symmetrize: Symmetrize | None) -> Tensor:
    """Edge list of neighbours: static size, with fillers where there is no edge.

    Args:
        source: The neighbours of every node, numbered within the graph.
        exists: False where there is no neighbour; None if all exist.
        symmetrize: None: the edges neighbour -> node, as they are. 'union': these, then their reverses, except of pairs that chose each
            other and are there already. 'mutual': only pairs that chose each other.

    Shapes:
        - **source** [B, n, k], **exists** [B, n, k]; **output** [2, B * n * k], twice as long for 'union'
    """
    batch_size, num_nodes, _ = source.shape
    node = torch.arange(num_nodes, device=source.device)[:, None].expand_as(source)
    source = source if exists is None else torch.where(exists, source, node)
    pairs = [(source, node)]
    if symmetrize is not None:
        # One byte a pair, against the four of the similarity matrix that the neighbours came from.
        chosen = torch.zeros(batch_size, num_nodes, num_nodes, dtype=torch.bool, device=source.device).scatter_(2, source, True)
        mutual = chosen.mT.gather(2, source)
        if symmetrize == "union":
            pairs.append((node, torch.where(mutual, node, source)))
        else:
            pairs = [(torch.where(mutual, source, node), node)]
    offset = torch.arange(batch_size, device=source.device)[:, None, None, None] * num_nodes
    return torch.stack([(torch.stack(side, dim=1) + offset).reshape(-1) for side in zip(*pairs, strict=True)])


def bipartite_index(source: Tensor, num_sources: int) -> Tensor:
    """Edge list of neighbours in another set of nodes: [B, n, k] in [0, m) -> [2, B * n * k], numbered b * m + j and b * n + i."""
    batch_size, num_targets = source.shape[:2]
    graph = torch.arange(batch_size, device=source.device)[:, None, None]
    target = torch.arange(batch_size * num_targets, device=source.device).view(batch_size, num_targets, 1).expand_as(source)
    return torch.stack(((source + graph * num_sources).reshape(-1), target.reshape(-1)))


def check_edge_index(edge_index: Tensor, num_targets: int, num_sources: int) -> Tensor:
    """The edge list, after its shape, type and (on the CPU) its largest values were checked."""
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.long:
        raise ValueError(f"Expected edge_index of shape [2, E] and type torch.int64 (got {list(edge_index.shape)}, {edge_index.dtype})")
    if readable(edge_index) and edge_index.numel() > 0:
        source, target = edge_index.amax(dim=1).tolist()
        if source >= num_sources or target >= num_targets:
            raise ValueError(f"Expected edges of {num_sources} sources and {num_targets} targets (got node {source} -> node {target})")
    return edge_index
