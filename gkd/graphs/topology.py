from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gkd.graphs.nodes import Nodes
from gkd.graphs.precision import as_float

Symmetrize = Literal["union", "mutual"]

_LARGEST_CACHED = 2**24


class Edges(NamedTuple):
    """The edges of B graphs in padded numbering: node i of graph b has the number b * n + i.

    An edge goes from ``edge_index[0]``, the neighbour that is heard, to ``edge_index[1]``, the node that hears it. Every graph has
    equally many slots, one graph's after the other's. An edge of weight 0 is no edge: slots without one are fillers, self-loops of
    weight 0.

    Args:
        edge_index: Sources and targets.
        edge_weight: Weights, in float32 or float64.
        factor: F with A = F F^T, where the adjacency is known to have this form.

    Shapes:
        - **edge_index** [2, E], **edge_weight** [E], **factor** [B, n, d]
    """

    edge_index: Tensor
    edge_weight: Tensor
    factor: Tensor | None = None


def static_tensors(build: Callable[..., tuple[Tensor, ...]], *key: object, large: bool = False) -> tuple[Tensor, ...]:
    """Index tensors that depend on sizes and device only, from a small cache.

    They are shared between graphs. Should somebody write into one of them all the same, it is built anew. Under torch.compile they are
    computed in the compiled code; under inference mode they are built as ordinary tensors, since autograd may meet them later.
    Of large ones only a few are kept.
    """
    if torch.compiler.is_compiling():
        return build(*key)
    cached = _few_cached if large else _cached
    tensors, versions = cached(build, *key)
    if tuple(t._version for t in tensors) != versions:
        cached.cache_clear()
        tensors, _ = cached(build, *key)
    return tensors


def _built(build: Callable[..., tuple[Tensor, ...]], *key: object) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    with torch.inference_mode(False):
        tensors = build(*key)
        return tensors, tuple(t._version for t in tensors)


_cached = functools.lru_cache(maxsize=64)(_built)
_few_cached = functools.lru_cache(maxsize=4)(_built)


def complete_index(batch_size: int, num_nodes: int, self_loops: bool, device: torch.device) -> Tensor:
    """All pairs of nodes of the same graph, target by target: [2, B * n * n], or n * (n - 1) a graph without self-loops."""
    if batch_size * num_nodes**2 > _LARGEST_CACHED // 2:
        return _complete_index(batch_size, num_nodes, self_loops, device)[0]
    return static_tensors(_complete_index, batch_size, num_nodes, self_loops, device, large=True)[0]


def _complete_index(batch_size: int, num_nodes: int, self_loops: bool, device: torch.device) -> tuple[Tensor]:
    node = torch.arange(batch_size * num_nodes, device=device).view(batch_size, num_nodes)
    shape = (batch_size, num_nodes, num_nodes)
    pair = torch.stack((node[:, None, :].expand(shape), node[:, :, None].expand(shape)))
    return ((pair if self_loops else without_diagonal(pair)).reshape(2, -1),)


def without_diagonal(matrix: Tensor) -> Tensor:
    """Leaves out the diagonal, row by row: [..., n, n] -> [..., n, n - 1]."""
    n = matrix.shape[-1]
    if n < 2:
        return matrix[..., :0]
    # After the first entry, the diagonal ends every run of n + 1 entries.
    return matrix.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1].reshape(*matrix.shape[:-1], n - 1)


def neighbors(scores: Tensor, k: int, mask: Tensor | None, loops: bool = True) -> tuple[Tensor, Tensor | None]:
    """The k columns with the highest scores in each row, best first, and which of them exist.

    Which of several equal scores comes first is the same in every run, but otherwise not specified.

    Args:
        scores: Scores; integer scores are not negative.
        k: Number of neighbours, at most the number of columns.
        mask: False for columns that cannot be chosen; None if all can.
        loops: Whether a row may choose the column of the same number.

    Shapes:
        - **scores** [B, n, m], **mask** [B, m]; **output** [B, n, k] long and [B, n, k] bool, or None if all exist
    """
    lowest = float("-inf") if scores.is_floating_point() else -1
    if not loops:
        scores = scores.masked_fill(torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device), lowest)
    if mask is None:
        return largest(scores, k)[1], None
    best = scores.masked_fill(~mask[:, None, :], lowest).topk(k, dim=-1)
    return best.indices, best.values > lowest


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Is ``scores.topk(k)``, in about half the time on a CPU where rows are long.

    Columns with equal remainder by 32 are a group. No more than k groups hold the k best, and these are the ones with the best maxima.
    """
    num_groups = 32
    size = scores.shape[-1] // num_groups
    if scores.device.type != "cpu" or scores.shape[-1] % num_groups or 2 * k > num_groups or size < 4:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    groups = scores.unflatten(-1, (size, num_groups))
    best = groups.amax(-2).topk(k, dim=-1, sorted=False).indices
    values, place = groups.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], size, k)).flatten(-2).topk(k, dim=-1)
    return values, torch.div(place, k, rounding_mode="floor") * num_groups + best.gather(-1, place % k)


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


def checked_rows(nodes: Nodes) -> Tensor:
    """The rows x [B, n, d] in float32 or float64, zero where no node exists, so that nothing of the padding enters a result."""
    x, _, mask = nodes
    if x.dim() != 3:
        raise ValueError(f"Expected nodes.x of shape [B, n, d] (got {list(x.shape)})")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"Expected nodes.mask of shape {list(x.shape[:2])} and type torch.bool (got {list(mask.shape)}, {mask.dtype})")
    x = as_float(x)
    return x if mask is None else torch.where(mask[:, :, None], x, 0.0)


def check_edge_index(edge_index: Tensor, num_targets: int, num_sources: int) -> Tensor:
    """The edge list, after its shape, type and (on the CPU) its largest values were checked."""
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.long:
        raise ValueError(f"Expected edge_index of shape [2, E] and type torch.int64 (got {list(edge_index.shape)}, {edge_index.dtype})")
    if not torch.compiler.is_compiling() and edge_index.device.type == "cpu" and edge_index.numel() > 0:
        source, target = edge_index.amax(dim=1).tolist()
        if source >= num_sources or target >= num_targets:
            raise ValueError(f"Expected edges of {num_sources} sources and {num_targets} targets (got node {source} -> node {target})")
    return edge_index


def num_slots(k: int, num_choices: int) -> int:
    """Number of neighbour slots of a node that has so many others to choose from."""
    return max(min(k, num_choices), 0)


def check_neighbors(k: int, num_choices: int, mask: Tensor | None) -> int:
    """Number of neighbour slots: in padded graphs, and where there is nobody to choose, k need not be reached."""
    if mask is None and 0 < num_choices < k:
        raise ValueError(f"Expected k <= {num_choices}, the number of nodes to choose from (got k={k})")
    return num_slots(k, num_choices)
