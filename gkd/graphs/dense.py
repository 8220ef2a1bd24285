from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from gkd.graphs.layout import layout, slices_of
from gkd.graphs.precision import as_float
from gkd.graphs.values import readable


def to_dense(graph: Data) -> tuple[Tensor, Tensor]:
    r"""Writes the weighted edges of a batch of graphs as one padded adjacency tensor.

    .. math:: A_b[i, j] = \sum_{e:\, i \to j} w_e

    The entry in row i and column j is the weight of the edges from i (``edge_index[0]``) to j (``edge_index[1]``). Parallel edges add up,
    an edge of weight 0 is no edge, and edges without ``edge_weight`` weigh one.

    Args:
        graph: A :class:`~torch_geometric.data.Data` (taken for a batch of one) or :class:`~torch_geometric.data.Batch`.

    Shapes:
        - **output** A [B, N, N] in float32 or float64, mask [B, N], true where a node exists

    Gradient:
        Flows to ``edge_weight``.

    Raises:
        ValueError: If there is not one weight per edge, or (checked on the CPU only) an edge joins two graphs of the batch.

    Examples:
        >>> edge_index = torch.tensor([[0, 1, 1], [1, 0, 2]])
        >>> A, mask = to_dense(Data(edge_index=edge_index, edge_weight=torch.tensor([0.5, 0.5, 2.0]), num_nodes=3))
        >>> A
        tensor([[[0.0000, 0.5000, 0.0000],
                 [0.5000, 0.0000, 2.0000],
                 [0.0000, 0.0000, 0.0000]]])
    """
    edge_index, edge_weight, mask = padded_edges(graph)
    return dense_adjacency(edge_index, edge_weight, *mask.shape), mask


def dense_adjacency(edge_index: Tensor, edge_weight: Tensor, num_graphs: int, num_nodes: int) -> Tensor:
    """Writes edges in padded numbering, node i of graph b being ``b * num_nodes + i``, as an adjacency tensor ``[B, N, N]``.

    This is :func:`to_dense` without the graph around it: plain tensors and Python numbers, for code that is to be compiled.

    Args:
        edge_index: Source and target of every edge.
        edge_weight: Weight of every edge; 0 is no edge.
        num_graphs: Number B of graphs.
        num_nodes: Number N of nodes that every graph is padded to.

    Shapes:
        - **edge_index** [2, E], **edge_weight** [E]; **output** [B, N, N] in float32 or float64

    Gradient:
        Flows to ``edge_weight``.

    Raises:
        ValueError: If there is not one weight per edge, or (checked on the CPU only) an edge joins two graphs.

    Examples:
        >>> dense_adjacency(torch.tensor([[0, 2], [1, 3]]), torch.tensor([1.0, 2.0]), num_graphs=2, num_nodes=2)
        tensor([[[0., 1.],
                 [0., 0.]],
        <BLANKLINE>
                [[0., 2.],
                 [0., 0.]]])
    """
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"Expected 'edge_index' of shape [2, num_edges] (got {list(edge_index.shape)})")
    if edge_weight.shape != edge_index.shape[1:]:
        raise ValueError(f"Expected 'edge_weight' of shape [{edge_index.size(1)}] (got {list(edge_weight.shape)})")
    source, target = edge_index
    if num_nodes > 0 and readable(edge_index) and not torch.equal(source // num_nodes, target // num_nodes):
        raise ValueError("Expected every edge to join two nodes of one graph (got an edge between two graphs of the batch)")
    return scatter_edges(edge_index, as_float(edge_weight), num_graphs, num_nodes)


def scatter_edges(edge_index: Tensor, value: Tensor, num_graphs: int, num_nodes: int, both_ways: bool = False) -> Tensor:
    """Adds up the values of edges as :func:`dense_adjacency` does, without its checks; ``both_ways`` adds each at (j, i) too."""
    dense = value.new_zeros(num_graphs * num_nodes * num_nodes)
    if num_nodes > 0:
        source, target = edge_index
        dense.scatter_add_(0, source * num_nodes + target % num_nodes, value)
        if both_ways:
            dense.scatter_add_(0, target * num_nodes + source % num_nodes, value)
    return dense.view(num_graphs, num_nodes, num_nodes)


def from_dense(A: Tensor, mask: Tensor | None = None, x: Tensor | None = None) -> Batch:
    """Turns padded adjacencies into a :class:`~torch_geometric.data.Batch`; the inverse of :func:`to_dense`.

    Every entry that is not 0 becomes an edge, in row-major order. The batch has the attributes and slices that
    ``Batch.from_data_list`` gives for the single graphs. The number of edges depends on the values, so this waits for a GPU.

    Args:
        A: Adjacencies; entry (i, j) is the weight of the edge from i to j.
        mask: True where a node exists; None if all do. Holes are closed up.
        x: Node features, padded alike.

    Shapes:
        - **A** [B, N, N], **mask** [B, N], **x** [B, N, D]

    Gradient:
        Flows from ``edge_weight`` and ``x`` to A and x.

    Raises:
        ValueError: If the shapes disagree.

    Examples:
        >>> from_dense(torch.tensor([[[0.0, 2.0], [2.0, 0.0]]]))
        DataBatch(edge_index=[2, 2], edge_weight=[2], num_nodes=2, batch=[2], ptr=[2])
    """
    mask = check_adjacency(A, mask)
    num_graphs, num_nodes = mask.shape
    if x is not None and x.shape[:2] != mask.shape:
        raise ValueError(f"Expected 'x' of shape [{num_graphs}, {num_nodes}, num_features] (got {list(x.shape)})")
    sizes = mask.sum(1)
    number = mask.flatten().cumsum(0).view_as(mask) - 1  # of every node in the batch
    graph, source, target = ((A != 0) & mask[:, :, None] & mask[:, None, :]).nonzero().unbind(1)
    node_slices = slices_of(sizes)
    edge_slices = slices_of(torch.bincount(graph, minlength=num_graphs))
    attributes = {"edge_index": torch.stack([number[graph, source], number[graph, target]]), "edge_weight": A[graph, source, target]}
    slices = {"edge_index": edge_slices, "edge_weight": edge_slices}
    no_shift = torch.zeros(num_graphs, dtype=torch.long)
    shifts = {"edge_index": node_slices[:-1], "edge_weight": no_shift}
    if x is not None:
        attributes = {"x": x[mask], **attributes}
        slices = {"x": node_slices, **slices}
        shifts = {"x": no_shift, **shifts}

    # What Batch.from_data_list does at the end, without a list.
    batch = Batch(_base_cls=Data)
    batch.stores_as(Data())
    for name, value in attributes.items():
        batch[name] = value
    if x is None:
        batch._store._num_nodes = sizes.tolist()
        batch.num_nodes = int(node_slices[-1])
    batch.batch = mask.nonzero()[:, 0]
    batch.ptr = node_slices.to(A.device)
    batch._num_graphs, batch._slice_dict, batch._inc_dict = num_graphs, slices, shifts
    return batch


def to_padded(x: Tensor, graph: Data) -> Tensor:
    """Spreads node values over padded rows, zeros where no node is.

    Args:
        x: A value per node.
        graph: The graph, or batch, whose nodes they are.

    Shapes:
        - **x** [num_nodes, ...]; **output** [B, N, ...]

    Raises:
        ValueError: If there is not one row per node.

    Examples:
        >>> to_padded(torch.ones(3, 2), Data(num_nodes=3)).shape
        torch.Size([1, 3, 2])
    """
    where = layout(graph)
    expected = where.mask.numel() if where.slot is None else where.slot.numel()
    if x.dim() == 0 or x.size(0) != expected:
        raise ValueError(f"Expected one row for each of {expected} nodes (got {list(x.shape)})")
    return where.pad(x)


def from_padded(x: Tensor, graph: Data) -> Tensor:
    """Gathers the padded rows that belong to nodes; the inverse of :func:`to_padded`, and like it without waiting for a GPU.

    Args:
        x: Padded node values.
        graph: The graph, or batch, whose nodes they are.

    Shapes:
        - **x** [B, N, ...]; **output** [num_nodes, ...]

    Raises:
        ValueError: If the padding is not that of the graph.

    Examples:
        >>> graph = Data(num_nodes=3)
        >>> from_padded(to_padded(torch.arange(3), graph), graph)
        tensor([0, 1, 2])
    """
    where = layout(graph)
    if x.shape[:2] != where.mask.shape:
        raise ValueError(f"Expected 'x' of shape [{where.num_graphs}, {where.num_nodes}, ...] (got {list(x.shape)})")
    return where.compact(x)


def padded_edges(graph: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``edge_index`` in padded numbering, one weight per edge (ones where the graph has none), and the mask ``[B, N]``."""
    _, _, slot, mask = layout(graph)
    edge_index = graph.edge_index
    if edge_index is None:
        raise ValueError(f"Expected a graph with 'edge_index' (got {graph})")
    if slot is not None:
        edge_index = slot[edge_index]
    edge_weight = graph.get("edge_weight")
    if edge_weight is None:
        x = graph.get("x")
        dtype = torch.float64 if x is not None and x.dtype == torch.float64 else torch.float32
        return edge_index, torch.ones(edge_index.size(1), dtype=dtype, device=edge_index.device), mask
    if edge_weight.dim() == 2 and edge_weight.size(1) == 1:
        edge_weight = edge_weight[:, 0]
    return edge_index, as_float(edge_weight), mask


def check_adjacency(A: Tensor, mask: Tensor | None) -> Tensor:
    """Checks that A is [B, N, N] and the mask [B, N], and returns the mask, all true where there is none."""
    if A.dim() != 3 or A.size(1) != A.size(2):
        raise ValueError(f"Expected square matrices of shape [num_graphs, num_nodes, num_nodes] (got {list(A.shape)})")
    if mask is None:
        return torch.ones(A.shape[:2], dtype=torch.bool, device=A.device)
    if mask.shape != A.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"Expected a boolean 'mask' of shape {list(A.shape[:2])} (got {mask.dtype} of {list(mask.shape)})")
    return mask
