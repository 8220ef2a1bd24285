from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from gkd.graphs.cache import static_tensors
from gkd.graphs.edge_index import Edges, check_edge_index, complete_index, num_pairs
from gkd.graphs.edges import CompleteEdges
from gkd.graphs.encodings import add_attribute
from gkd.graphs.layout import Layout, slices_of, uniform_layout
from gkd.graphs.nodes import Nodes
from gkd.graphs.spectral import FACTOR, Spectrum
from gkd.graphs.values import readable

# The class of what Batch.from_data_list returns. Batch makes it when it is called, which torch.compile cannot follow.
_DataBatch: type[Data] = type(Batch(_base_cls=Data))


class GraphBuilder(nn.Module):
    """Turns features into a :class:`torch_geometric.data.Batch` of graphs, all at once.

    The batch has the attributes, slices and increments that ``Batch.from_data_list`` gives for the graphs one by one, but no list is made.
    Every edge has a weight above 0, so that the layers of PyG read the graph right, those too that count neighbours or ignore weights.
    How many edges there are depends on the values, for which a GPU is waited for. Graphs of different sizes (nodes with a mask) are
    compacted: padded nodes are dropped.

    With ``static=True`` shapes depend on sizes only, where all graphs have equally many nodes: nothing waits for a GPU, and
    ``torch.compile(fullgraph=True)`` compiles the builder. Slots without an edge are *fillers* then, self-loops of weight 0. Whatever in
    gkd reads the graph passes over them; layers of PyG that add self-loops (GCNConv, SGConv, APPNP) or average over neighbours (GraphConv
    with ``aggr='mean'``, GATConv) do not. :func:`prune` drops them afterwards. Index tensors are shared between batches; do not write into
    them.

    Args:
        nodes: Makes :class:`~gkd.graphs.Nodes` of features.
        edges: Makes :class:`~gkd.graphs.Edges` of nodes.
        encoding: Called with the batch; what it returns becomes ``pe`` [N, t].

    Shapes:
        - **output**: ``x`` [N, d], ``pos`` [N, p], ``edge_index`` [2, E], ``edge_weight`` [E], ``batch`` [N], ``ptr`` [B + 1],
          ``pe`` [N, t], and for complete graphs of low rank ``factor`` or ``loopless_factor`` [N, d], see :class:`~gkd.graphs.LowRank`

    Examples:
        >>> from gkd.graphs.edges import KNNEdges
        >>> from gkd.graphs.nodes import ChannelNodes
        >>> build = GraphBuilder(nodes=ChannelNodes(), edges=KNNEdges(k=2))
        >>> build(torch.rand(2, 8, 4, 4), static=True)
        DataBatch(x=[16, 16], edge_index=[2, 64], edge_weight=[64], batch=[16], ptr=[3])
        >>> (build(torch.rand(2, 8, 4, 4)).edge_weight > 0).all()
        tensor(True)
    """

    def __init__(self, nodes: Callable[..., Nodes], edges: Callable[..., Edges], encoding: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.nodes = nodes
        self.edges = edges
        self.encoding = encoding

    def forward(self, features: Tensor, *node_args: Any, topology: Tensor | Batch | None = None, static: bool = False) -> Batch:
        """Builds the graphs.

        Args:
            features: What the node class takes.
            *node_args: What else the node class takes, such as boxes.
            topology: Another network's graph, or its ``edge_index``: the weights are evaluated on its edges, in their order, and none is
                dropped. A graph also tells how many edges each of its graphs has; for a tensor they are counted, or on a GPU, which would
                have to be waited for, taken for the same number if there are as many as it makes itself.
            static: Keep slots without an edge, see the class.
        """
        return encode(self._build(self._nodes(features, node_args), topology, static), self.encoding)

    def view(self, features: Tensor, *node_args: Any, topology: Spectrum | None = None) -> Spectrum:
        """Builds the graphs for those who compare them: a view that makes the batch, with static shapes, when it is asked for.

        Complete graphs with more nodes than features are known by a factor, see :class:`~gkd.graphs.LowRank`: neither their adjacency nor
        their edges are written down unless somebody asks for ``graph``, ``adjacency`` or ``laplacian``.

        Args:
            features: What the node class takes.
            *node_args: What else the node class takes.
            topology: The view of another network's graph whose edges are used.
        """
        nodes = self._nodes(features, node_args)
        lowrank = None
        if isinstance(self.edges, CompleteEdges) and nodes.x.shape[2] < nodes.x.shape[1] and self.encoding is None:
            complete = topology is None or (topology.lowrank is not None and topology.lowrank.self_loops == self.edges.self_loops)
            lowrank = self.edges.lowrank(nodes) if complete else None
        if lowrank is None:
            graph = self._build(nodes, None if topology is None else topology.graph, static=True)
            return Spectrum(encode(graph, self.encoding), edges=self.edges)
        return Spectrum.of_lowrank(
            lambda: self._build(nodes, None if topology is None else topology.graph, static=True),
            nodes.x if nodes.mask is None else nodes.x.where(nodes.mask[:, :, None], 0.0),
            uniform_layout(nodes.x.shape[0], nodes.x.shape[1], nodes.x.device).mask if nodes.mask is None else nodes.mask,
            lowrank,
            self.edges,
        )

    def _nodes(self, features: Tensor, node_args: tuple[Any, ...]) -> Nodes:
        nodes: Nodes = self.nodes(features, *node_args)
        if not hasattr(nodes, "mask"):
            raise TypeError(f"Expected nodes to return Nodes (got {type(nodes).__name__}; are nodes and edges exchanged?)")
        return nodes

    def _build(self, nodes: Nodes, topology: Tensor | Batch | None, static: bool) -> Batch:
        if topology is not None:
            return build_on(nodes, self.edges, topology)
        graph = build_batch(nodes, self.edges(nodes))
        return graph if static or nodes.mask is not None else prune(graph)


def build_batch(nodes: Nodes, edges: Edges, **attributes: Tensor) -> Batch:
    """Puts nodes and the edges that were chosen for them, in padded numbering, into a batch.

    Args:
        nodes: The nodes of B graphs.
        edges: Their edges, equally many slots for every graph, one graph's after the other's. Graphs with a mask, whose sizes differ,
            are compacted: padded nodes and edges of weight 0 are dropped.
        **attributes: Other values of the nodes, padded alike: [B, n, ...].
    """
    where = _layout(nodes)
    num_graphs, edge_index, edge_weight = where.num_graphs, edges.edge_index, edges.edge_weight
    if nodes.mask is None:
        slices = static_tensors(_uniform_slices, num_graphs, edge_index.shape[1] // max(num_graphs, 1))[0]
    else:
        exists = nodes.mask.flatten()
        keep = (edge_weight.detach() != 0) & exists[edge_index].all(dim=0)
        edge_index, edge_weight = (exists.cumsum(0) - 1)[edge_index[:, keep]], edge_weight[keep]
        slices = slices_of(keep.view(num_graphs, -1).sum(dim=1) if num_graphs else keep)
    return _assemble(where, nodes, edges._replace(edge_index=edge_index, edge_weight=edge_weight), slices, attributes)


def build_on(nodes: Nodes, weigh: Callable[[Nodes, Tensor], Edges], topology: Tensor | Batch, **attributes: Tensor) -> Batch:
    """Puts nodes into a batch with the edges of another graph, weighed anew.

    Args:
        nodes: The nodes of B graphs.
        weigh: Called with the nodes and edges in padded numbering, such as an edge class.
        topology: The other graph, or its edge list, in the numbering of a batch.
        **attributes: Other values of the nodes, padded alike: [B, n, ...].
    """
    where = _layout(nodes)
    num_graphs, num_nodes = where.num_graphs, where.numbers.batch.numel()
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
    complete = isinstance(weigh, CompleteEdges) and _is_complete(topology, where, weigh.self_loops)
    if isinstance(weigh, CompleteEdges) and complete and nodes.mask is None:  # in the order in which the class makes them
        edges: Edges = weigh(nodes)
    else:
        edges = weigh(nodes, edge_index if where.layout.slot is None else where.layout.slot[edge_index])
        if isinstance(weigh, CompleteEdges) and complete:
            edges = edges._replace(lowrank=weigh.lowrank(nodes))
    edges = edges._replace(edge_index=edge_index)
    if slices is None:
        slots = getattr(weigh, "slots", None)
        usual = None if slots is None or nodes.mask is not None else slots(nodes.x.shape[1])
        if usual is None or edge_index.shape[1] != num_graphs * usual or readable(edge_index):
            slices = _count_edges(where.numbers.batch[edge_index[1]], num_graphs)
        else:
            slices = static_tensors(_uniform_slices, num_graphs, usual)[0]
    return _assemble(where, nodes, edges, slices, attributes)


def _is_complete(topology: Tensor | Batch, where: _Where, self_loops: bool) -> bool:
    """Whether the topology surely has all pairs of nodes, in the order of CompleteEdges; without waiting for a device."""
    (num_graphs, num_nodes, slot, _), sizes = where.layout, where.numbers.slices.diff()
    edge_index = topology if isinstance(topology, Tensor) else topology.edge_index
    if slot is None:
        if edge_index.shape[1] != num_graphs * num_pairs(num_nodes, self_loops):
            return False
    elif edge_index.shape[1] != int((sizes * (sizes if self_loops else sizes - 1)).sum()):
        return False
    if not isinstance(topology, Tensor):
        return FACTOR[self_loops] in topology  # that of a complete graph, of which no edge was dropped
    if slot is not None:
        return readable(edge_index) and torch.unique(edge_index, dim=1).shape[1] == edge_index.shape[1]
    every = complete_index(num_graphs, num_nodes, self_loops, edge_index.device)
    return edge_index is every or (readable(edge_index) and torch.equal(edge_index, every))


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
    if readable(keep) and bool(keep.all()):
        return pruned
    names = [name for name, value in graph.to_dict().items() if isinstance(value, Tensor) and name.startswith("edge_")]
    for name in names:
        pruned[name] = graph[name][:, keep] if name == "edge_index" else graph[name][keep]
    slices = getattr(graph, "_slice_dict", None)
    if slices is not None:
        old = slices["edge_index"].to(keep.device)
        new = torch.cat((old.new_zeros(1), keep.cumsum(0)))[old].cpu()
        pruned._slice_dict = {**slices, **dict.fromkeys(names, new)}
    return pruned


def encode(graph: Batch, encoding: Callable[..., Tensor] | None) -> Batch:
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
    return add_attribute(graph, "pe", pe)


class _BatchIndex(NamedTuple):
    """What a batch says about its nodes."""

    batch: Tensor
    ptr: Tensor
    slices: Tensor  # as ptr, on the CPU
    no_shift: Tensor  # a zero for every graph, on the CPU


class _Where(NamedTuple):
    """Where the nodes of the graphs lie in padded tensors and in the batch."""

    layout: Layout
    numbers: _BatchIndex

    @property
    def num_graphs(self) -> int:
        return self.layout.num_graphs


def _layout(nodes: Nodes) -> _Where:
    num_graphs, num_nodes = nodes.x.shape[:2]
    if nodes.mask is None:
        index = _BatchIndex(*static_tensors(_uniform_index, num_graphs, num_nodes, nodes.x.device))
        return _Where(uniform_layout(num_graphs, num_nodes, nodes.x.device), index)
    slot = nodes.mask.flatten().nonzero()[:, 0]
    slices = slices_of(nodes.mask.sum(dim=1))
    batch = torch.div(slot, max(num_nodes, 1), rounding_mode="floor")
    index = _BatchIndex(batch, slices.to(slot.device), slices, torch.zeros_like(slices[1:]))
    return _Where(Layout(num_graphs, num_nodes, slot, nodes.mask), index)


def _uniform_index(num_graphs: int, num_nodes: int, device: torch.device) -> tuple[Tensor, ...]:
    (slices,) = _uniform_slices(num_graphs, num_nodes)
    batch = torch.arange(num_graphs, device=device)[:, None].expand(num_graphs, num_nodes).reshape(-1)
    ptr = torch.arange(num_graphs + 1, device=device) * num_nodes
    return batch, ptr, slices, torch.zeros_like(slices[1:])


def _uniform_slices(num_graphs: int, size: int) -> tuple[Tensor]:
    return (torch.arange(num_graphs + 1, device="cpu") * size,)


def _count_edges(graph: Tensor, num_graphs: int) -> Tensor:
    if readable(graph) and bool((graph.diff() < 0).any()):
        raise ValueError("Expected an edge_index with the edges of one graph after those of another (got them mixed)")
    return slices_of(torch.zeros(num_graphs, dtype=torch.long, device=graph.device).index_add(0, graph, torch.ones_like(graph)))


def _assemble(where: _Where, nodes: Nodes, edges: Edges, edge_slices: Tensor, attributes: Mapping[str, Tensor]) -> Batch:
    (layout, index), padded = where, {"x": nodes.x, "pos": nodes.pos, **attributes}
    if edges.lowrank is not None:
        padded[FACTOR[edges.lowrank.self_loops]] = edges.lowrank.factor
    values = {name: layout.compact(value) for name, value in padded.items() if value is not None}
    graph: Batch = Data.__new__(_DataBatch)
    Data.__init__(graph)
    for name, value in values.items():
        graph[name] = value
    graph.edge_index, graph.edge_weight = edges.edge_index, edges.edge_weight
    graph.batch, graph.ptr = index.batch, index.ptr
    graph._num_graphs = layout.num_graphs
    graph._slice_dict = {**dict.fromkeys(values, index.slices), "edge_index": edge_slices, "edge_weight": edge_slices}
    graph._inc_dict = {**dict.fromkeys(values, index.no_shift), "edge_index": index.slices[:-1], "edge_weight": index.no_shift}
    return graph
