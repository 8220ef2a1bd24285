from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from gkd.graphs.cache import static_tensors
from gkd.graphs.values import readable


class Layout(NamedTuple):
    """Where the nodes of a batch of graphs lie in padded tensors ``[num_graphs, num_nodes, ...]``."""

    num_graphs: int
    num_nodes: int
    slot: Tensor | None
    """Row of every node in the flattened padding, or None where all graphs have ``num_nodes`` nodes and nothing is padded."""
    mask: Tensor
    """True where a node exists, ``[num_graphs, num_nodes]``."""

    def compact(self, value: Tensor) -> Tensor:
        """Gathers the rows of nodes: [B, n, ...] -> [N, ...]."""
        rows = value.flatten(0, 1)
        return rows if self.slot is None else rows.index_select(0, self.slot)

    def pad(self, value: Tensor) -> Tensor:
        """Spreads the rows of nodes, zeros where no node is: [N, ...] -> [B, n, ...]."""
        if self.slot is not None:
            value = value.new_zeros(self.num_graphs * self.num_nodes, *value.shape[1:]).index_copy(0, self.slot, value)
        return value.reshape(self.num_graphs, self.num_nodes, *value.shape[1:])


def layout(graph: Data) -> Layout:
    """Says where the nodes of a graph, or of a batch of graphs, lie in padded tensors.

    On the CPU ``batch`` is counted, so that an edited batch (by ``subgraph``, say) is right too. Elsewhere the sizes come from the part of
    a :class:`~torch_geometric.data.Batch` that is always on the CPU, so that nothing waits for the device; only a batch that lost it is
    counted.

    Raises:
        ValueError: If the graph has several types of nodes, or (looked at where it is counted) ``batch`` is not in ascending order.
    """
    if isinstance(graph, HeteroData) or not isinstance(graph, Data):
        raise ValueError(
            f"Expected a Data or Batch with one type of nodes (got {type(graph).__name__}): "
            "take to_homogeneous() of a HeteroData, or a Data of one of its node and edge types"
        )
    batch = graph.get("batch")
    if batch is None:
        return uniform_layout(1, int(graph.num_nodes or 0), _device(graph))
    if torch.compiler.is_compiling():  # what a builder makes there has graphs of one size
        num_graphs = graph._num_graphs
        return uniform_layout(num_graphs, batch.shape[0] // num_graphs if num_graphs else 0, batch.device)
    sizes = None if readable(batch) else _recorded_sizes(graph)
    sizes = _counted_sizes(graph) if sizes is None else sizes
    num_graphs, num_nodes = len(sizes), max(sizes, default=0)
    if min(sizes, default=0) == num_nodes:
        return uniform_layout(num_graphs, num_nodes, batch.device)
    size = torch.tensor(sizes).to(batch.device, non_blocking=True)
    start = size.cumsum(0) - size
    slot = torch.arange(batch.numel(), device=batch.device) + batch * num_nodes - start[batch]
    return Layout(num_graphs, num_nodes, slot, torch.arange(num_nodes, device=batch.device) < size[:, None])


def uniform_layout(num_graphs: int, num_nodes: int, device: torch.device) -> Layout:
    """Is the layout of graphs of one size."""
    return Layout(num_graphs, num_nodes, None, static_tensors(_all_true, num_graphs, num_nodes, device)[0])


def _all_true(num_graphs: int, num_nodes: int, device: torch.device) -> tuple[Tensor]:
    return (torch.ones(num_graphs, num_nodes, dtype=torch.bool, device=device),)


def slices_of(sizes: Tensor) -> Tensor:
    """Where each of several parts begins, and the end of the last, on the CPU."""
    return torch.cat((sizes.new_zeros(1, dtype=torch.long), sizes.cumsum(0))).cpu()


def _counted_sizes(graph: Data) -> list[int]:
    batch = graph["batch"]
    step = batch.diff()
    if bool((step < 0).any()):
        node = int((step < 0).nonzero()[0]) + 1
        raise ValueError(
            "Expected 'batch' in ascending order, the nodes of one graph after those of another "
            f"(got graph {int(batch[node])} at node {node} after graph {int(batch[node - 1])}): sort the nodes by their graph"
        )
    num_graphs = getattr(graph, "_num_graphs", None)
    if num_graphs is None:
        ptr = graph.get("ptr")
        num_graphs = 0 if ptr is None else ptr.numel() - 1
    sizes: list[int] = torch.bincount(batch, minlength=num_graphs).tolist()
    return sizes


def _recorded_sizes(graph: Data) -> list[int] | None:
    """Numbers of nodes from the slices that a batch keeps on the CPU; None where these are missing or out of date."""
    slices = getattr(graph, "_slice_dict", None) or {}
    sizes = next((slices[name].diff().tolist() for name in ("x", "pos", "pe", "factor") if name in slices), None)
    if sizes is None:
        sizes = graph._store.__dict__.get("_num_nodes")
    return sizes if sizes is not None and sum(sizes) == graph["batch"].numel() else None


def _device(graph: Data) -> torch.device:
    return next((value.device for value in graph.to_dict().values() if isinstance(value, Tensor)), torch.device("cpu"))
