from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from gkd.graphs.encodings import add_node_attribute
from gkd.graphs.nodes import Nodes
from gkd.graphs.topology import Edges, check_edge_index, static_tensors

# The class of what Batch.from_data_list returns. Batch makes it when it is called, which torch.compile cannot follow.
_DataBatch: type[Data] = type(Batch(_base_cls=Data))


class GraphBuilder(nn.Module):
    """Turns features into a :class:`torch_geometric.data.Batch` of graphs, all at once.

    The batch has the attributes, slices and increments that ``Batch.from_data_list`` gives for the graphs one by one, but no list is made.
    Where all graphs have equally many nodes, shapes are static: nothing waits for a GPU, and ``torch.compile(fullgraph=True)`` compiles
    the builder. Index tensors are shared between batches; do not write into them.

    Slots without an edge are fillers, self-loops of weight 0. Whatever reads ``edge_weight`` passes over them: the Laplacians and messages
    of gkd.graphs, GCNConv and other weighted convolutions. One that does not (GATConv, TransformerConv) should get a pruned graph.

    Graphs of different sizes (nodes with a mask) are compacted, which waits for a GPU: padded nodes and edges of weight 0 are dropped.

    Args:
        nodes: Makes :class:`~gkd.graphs.nodes.Nodes` of features.
        edges: Makes :class:`~gkd.graphs.topology.Edges` of nodes.
        encoding: Called with the batch; what it returns becomes ``pe`` [N, t].
        prune: Drops the edges of weight 0, as :func:`prune` does.

    Shapes:
        - **output**: ``x`` [N, d], ``pos`` [N, p], ``edge_index`` [2, E], ``edge_weight`` [E], ``batch`` [N], ``ptr`` [B + 1],
          ``pe`` [N, t], and ``factor`` [N, d] for complete graphs of low rank

    Examples:
        >>> from gkd.graphs.edges import KNNEdges
        >>> from gkd.graphs.nodes import ChannelNodes
        >>> GraphBuilder(nodes=ChannelNodes(), edges=KNNEdges(k=2))(torch.rand(2, 8, 4, 4))
        DataBatch(x=[16, 16], edge_index=[2, 64], edge_weight=[64], batch=[16], ptr=[3])
    """

    def __init__(self, nodes: nn.Module, edges: nn.Module, encoding: nn.Module | None = None, prune: bool = False) -> None:
        super().__init__()
        self.nodes = nodes
        self.edges = edges
        self.encoding = encoding
        self.prune = prune

    def forward(self, features: Tensor, *node_args: Any, edge_index: Tensor | Batch | None = None) -> Batch:
        """Builds the graphs.

        Args:
            features: What the node class takes.
            *node_args: What else the node class takes, such as boxes.
            edge_index: Another network's graph, or its ``edge_index``, whose topology is used: the weights are evaluated on these edges,
                in their order, and none is dropped. A graph also tells how many edges each of its graphs has; for a tensor they are
                counted, or on a GPU, which would have to be waited for, taken for the same number if there are as many as it makes itself.
        """
        nodes = self.nodes(features, *node_args)
        if not hasattr(nodes, "mask"):
            raise TypeError(f"Expected nodes to return Nodes (got {type(nodes).__name__}; are nodes and edges exchanged?)")
        if edge_index is None:
            graph = build_batch(nodes, self.edges(nodes))
            if self.prune and nodes.mask is None:
                graph = prune(graph)
        else:
            graph = build_on(nodes, self.edges, edge_index)
        return encode(graph, self.encoding)


def build_batch(nodes: Nodes, edges: Edges, **attributes: Tensor) -> Batch:
    """Puts nodes and the edges that were chosen for them, in padded numbering, into a batch.

    Args:
        nodes: The nodes of B graphs.
        edges: Their edges, equally many slots for every graph, one graph's after the other's.
        **attributes: Other values of the nodes, padded alike: [B, n, ...].
    """
    layout = _layout(nodes)
    edge_index, edge_weight, _ = edges
    if nodes.mask is None:
        slices = static_tensors(_uniform_slices, layout.num_graphs, edge_index.shape[1] // max(layout.num_graphs, 1))[0]
    else:
        exists = nodes.mask.flatten()
        keep = (edge_weight.detach() != 0) & exists[edge_index].all(dim=0)
        edge_index, edge_weight = (exists.cumsum(0) - 1)[edge_index[:, keep]], edge_weight[keep]
        slices = _slices(keep.view(layout.num_graphs, -1).sum(dim=1) if layout.num_graphs else keep)
    return _assemble(layout, nodes, Edges(edge_index, edge_weight, edges.factor), slices, attributes)


def build_on(nodes: Nodes, weigh: Callable[[Nodes, Tensor], Edges], topology: Tensor | Batch, **attributes: Tensor) -> Batch:
    """Puts nodes into a batch with the edges of another graph, weighed anew.

    Args:
        nodes: The nodes of B graphs.
        weigh: Called with the nodes and edges in padded numbering, such as an edge class.
        topology: The other graph, or its edge list, in the numbering of a batch.
        **attributes: Other values of the nodes, padded alike: [B, n, ...].
    """
    layout = _layout(nodes)
    num_graphs, num_nodes = layout.num_graphs, layout.batch.numel()
    slices: Tensor | None = None
    if isinstance(topology, Tensor):
        edge_index = topology
    else:
        edge_index, slices = topology.edge_index, getattr(topology, "_slice_dict", {}).get("edge_index")
        size = num_nodes if topology.x is None else topology.x.shape[0]
        if size != num_nodes or (slices is not None and slices.numel() != num_graphs + 1):
            raise ValueError(
                f"Expected the topology of {num_graphs} graphs with {num_nodes} nodes in all "
                f"(got {num_graphs if slices is None else slices.numel() - 1} graphs with {size} nodes)"
            )
    check_edge_index(edge_index, num_nodes, num_nodes)
    edges = weigh(nodes, edge_index if layout.place is None else layout.place[edge_index])
    if slices is None:
        slots = getattr(weigh, "slots", None)
        own = None if slots is None or nodes.mask is not None else slots(nodes.x.shape[1])
        if own is None or edge_index.shape[1] != num_graphs * own or edge_index.device.type == "cpu":
            slices = _count_edges(layout.batch[edge_index[1]], num_graphs)
        else:
            slices = static_tensors(_uniform_slices, num_graphs, own)[0]
    return _assemble(layout, nodes, edges._replace(edge_index=edge_index), slices, attributes)


def prune(graph: Data) -> Data:
    """Drops the edges of weight 0, fillers among them; a :class:`~torch_geometric.data.Batch` stays one. Waits for a GPU.

    Args:
        graph: A graph or batch of graphs with ``edge_weight``. It is not changed; node attributes are shared with it. What is named
            ``edge_...`` belongs to the edges.

    Examples:
        >>> prune(Data(edge_index=torch.tensor([[0, 1], [1, 1]]), edge_weight=torch.tensor([0.5, 0.0]), num_nodes=2)).edge_index.tolist()
        [[0], [1]]
    """
    edge_weight = graph.get("edge_weight")
    if edge_weight is None:
        raise ValueError(f"Expected a graph with edge_weight (got {graph})")
    keep = edge_weight.detach() != 0
    keep = keep if keep.dim() == 1 else keep.flatten(1).any(dim=1)
    pruned = copy.copy(graph)
    names = [name for name, value in graph.to_dict().items() if isinstance(value, Tensor) and name.startswith("edge_")]
    for name in names:
        pruned[name] = graph[name][:, keep] if name == "edge_index" else graph[name][keep]
    slices = getattr(graph, "_slice_dict", None)
    if slices is not None:
        old = slices["edge_index"].to(keep.device)
        new = torch.cat((old.new_zeros(1), keep.cumsum(0)))[old].cpu()
        pruned._slice_dict = {**slices, **dict.fromkeys(names, new)}
    return pruned


def encode(graph: Batch, encoding: nn.Module | None) -> Batch:
    """Gives the nodes what the encoding returns as ``pe``.

    Args:
        graph: The batch, which is changed.
        encoding: Called with the batch; None does nothing.
    """
    if encoding is None:
        return graph
    pe = encoding(graph)
    if pe.dim() == 0 or pe.shape[0] != graph.x.shape[0]:
        raise ValueError(f"Expected an encoding with one row for each of {graph.x.shape[0]} nodes (got {list(pe.shape)})")
    return add_node_attribute(graph, "pe", pe)


class _Layout(NamedTuple):
    """Where the nodes of the graphs lie in a batch."""

    num_graphs: int
    batch: Tensor
    ptr: Tensor
    slices: Tensor  # as ptr, on the CPU
    no_shift: Tensor  # a zero for every graph, on the CPU
    place: Tensor | None = None  # the padded row of every node; None if nothing is padded

    def flat(self, value: Tensor) -> Tensor:
        """[B, n, ...] -> [N, ...]."""
        return value.reshape(-1, *value.shape[2:]) if self.place is None else value.flatten(0, 1)[self.place]


def _layout(nodes: Nodes) -> _Layout:
    num_graphs, num_nodes = nodes.x.shape[:2]
    if nodes.mask is None:
        return _Layout(num_graphs, *static_tensors(_uniform_layout, num_graphs, num_nodes, nodes.x.device))
    place = nodes.mask.flatten().nonzero()[:, 0]
    slices = _slices(nodes.mask.sum(dim=1))
    batch = torch.div(place, max(num_nodes, 1), rounding_mode="floor")
    return _Layout(num_graphs, batch, slices.to(place.device), slices, torch.zeros_like(slices[1:]), place)


def _uniform_layout(num_graphs: int, num_nodes: int, device: torch.device) -> tuple[Tensor, ...]:
    (slices,) = _uniform_slices(num_graphs, num_nodes)
    batch = torch.arange(num_graphs, device=device).repeat_interleave(num_nodes)
    ptr = torch.arange(num_graphs + 1, device=device) * num_nodes
    return batch, ptr, slices, torch.zeros_like(slices[1:])


def _uniform_slices(num_graphs: int, size: int) -> tuple[Tensor]:
    return (torch.arange(num_graphs + 1) * size,)


def _slices(sizes: Tensor) -> Tensor:
    return torch.cat((sizes.new_zeros(1, dtype=torch.long), sizes.cumsum(0))).cpu()


def _count_edges(graph: Tensor, num_graphs: int) -> Tensor:
    if not torch.compiler.is_compiling() and graph.device.type == "cpu" and bool((graph.diff() < 0).any()):
        raise ValueError("Expected an edge_index with the edges of one graph after those of another (got them mixed)")
    return _slices(torch.zeros(num_graphs, dtype=torch.long, device=graph.device).index_add(0, graph, torch.ones_like(graph)))


def _assemble(layout: _Layout, nodes: Nodes, edges: Edges, edge_slices: Tensor, attributes: Mapping[str, Tensor]) -> Batch:
    padded = {"x": nodes.x, "pos": nodes.pos, "factor": edges.factor, **attributes}
    values = {name: layout.flat(value) for name, value in padded.items() if value is not None}
    graph: Batch = Data.__new__(_DataBatch)
    Data.__init__(graph)
    for name, value in values.items():
        graph[name] = value
    graph.edge_index, graph.edge_weight = edges.edge_index, edges.edge_weight
    graph.batch, graph.ptr = layout.batch, layout.ptr
    graph._num_graphs = layout.num_graphs
    graph._slice_dict = {**dict.fromkeys(values, layout.slices), "edge_index": edge_slices, "edge_weight": edge_slices}
    graph._inc_dict = {**dict.fromkeys(values, layout.no_shift), "edge_index": layout.slices[:-1], "edge_weight": layout.no_shift}
    return graph
