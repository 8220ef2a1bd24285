from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from gkd.graphs.arguments import one_of
from gkd.graphs.attention import AttentionEdges
from gkd.graphs.builder import GraphBuilder, build_batch, build_on, encode, prune
from gkd.graphs.edge_index import Edges
from gkd.graphs.encodings import add_attribute
from gkd.graphs.nodes import Nodes


class StageGraph(nn.Module):
    """Puts several stages of a network into one graph an image, and joins the stages by cross-stage edges.

    The nodes of an image are those of the first stage, then those of the second, and so on; ``stage`` says which is which. Inside a stage,
    edges are those of the stage's own builder. Between two stages, each node is joined with the nodes of the other stage that ``cross``
    gives it, in both directions: shallow nodes hear deep ones and deep nodes hear shallow ones.

    Rows of all stages have to be equally long, and are compared with each other across stages, so they should mean the same: channels
    pooled to the same grid do; patches need ``projections``.

    Args:
        builders: A builder for every stage, from shallow to deep, without an encoding.
        cross: Edge class with a method ``between(targets, sources, edge_index=None)``, such as AttentionEdges or KNNEdges; None:
            parameter-free attention that keeps the 4 strongest edges of a node.
        projections: A module for each stage that maps its rows [B, n, d] to the common length; None: rows as they are.
        pairs: 'adjacent' joins each stage with the next, 'all' every two.
        encoding: Called with the batch, all stages in it; what it returns becomes ``pe`` [N, t].

    Shapes:
        - **features** {stage: what its node class takes}; **output**: ``x`` [N, d], ``stage`` [N] long, ``edge_index`` [2, E],
          ``edge_weight`` [E], ``edge_type`` [E] long (source stage * number of stages + target stage, as RGCNConv takes it),
          ``batch`` [N], ``ptr`` [B + 1], and ``pos`` [N, p] if all stages have positions of p numbers

    Raises:
        ValueError: If stages are missing or unknown, differ in the number of graphs or in the length of their rows, if a builder has an
            encoding of its own, or if ``cross`` cannot join two sets of nodes.

    Examples:
        >>> from gkd.graphs.edges import KNNEdges
        >>> from gkd.graphs.nodes import ChannelNodes
        >>> builder = GraphBuilder(nodes=ChannelNodes(grid=2), edges=KNNEdges(k=2))
        >>> graph = StageGraph({"layer1": builder, "layer2": builder})({"layer1": torch.rand(1, 4, 8, 8), "layer2": torch.rand(1, 8, 4, 4)})
        >>> graph.stage.tolist()
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """

    def __init__(
        self,
        builders: Mapping[str, GraphBuilder],
        cross: nn.Module | None = None,
        projections: Mapping[str, nn.Module] | None = None,
        pairs: Literal["adjacent", "all"] = "adjacent",
        encoding: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not builders:
            raise ValueError("Expected a builder for at least one stage (got none)")
        one_of(pairs, ("adjacent", "all"), "pairs")
        cross = AttentionEdges(k=4) if cross is None else cross
        if not callable(getattr(cross, "between", None)):
            raise ValueError(
                f"Expected cross to be an edge class with a method between(targets, sources), such as AttentionEdges or KNNEdges "
                f"(got {type(cross).__name__})"
            )
        for stage, builder in builders.items():
            if builder.encoding is not None:
                raise ValueError(f"Expected builders without an encoding, which StageGraph takes itself (got one for stage {stage!r})")
        if projections is not None and set(projections) != set(builders):
            raise ValueError(f"Expected projections for the stages {sorted(builders)} (got {sorted(projections)})")
        self.stages = tuple(builders)
        # Stages are named by module paths, whose dots a ModuleDict does not take.
        self.builders = nn.ModuleList(builders.values())
        self.projections = None if projections is None else nn.ModuleList(projections[stage] for stage in self.stages)
        self.cross = cross
        last = len(self.stages)
        self.pairs = tuple((a, b) for a in range(last) for b in range(a + 1, last if pairs == "all" else min(a + 2, last)))
        self.encoding = encoding

    def forward(
        self, features: Mapping[str, Tensor], *node_args: Any, topology: Tensor | Batch | None = None, static: bool = False
    ) -> Batch:
        """Builds the graphs.

        Args:
            features: Features of every stage.
            *node_args: What else the node classes take, such as boxes.
            topology: Another network's stage graph, or its ``edge_index``, as in
                :meth:`GraphBuilder.forward <gkd.graphs.GraphBuilder.forward>`.
            static: Keep slots without an edge, as there.
        """
        if set(features) != set(self.stages):
            raise ValueError(f"Expected features of the stages {list(self.stages)} (got {list(features)})")
        parts: list[Nodes] = [
            builder.nodes(features[stage], *node_args) for stage, builder in zip(self.stages, self._builders, strict=True)
        ]
        rows = [part.x for part in parts] if self.projections is None else [p(n.x) for p, n in zip(self.projections, parts, strict=True)]
        self._check(rows)
        rows = _promoted(rows)
        projected = [Nodes(x, part.pos, part.mask) for x, part in zip(rows, parts, strict=True)]
        nodes = _joined(projected)
        stage = torch.cat([torch.full((x.shape[1],), i, device=x.device) for i, x in enumerate(rows)])
        attributes = {"stage": stage.expand(nodes.x.shape[0], -1)}
        if topology is not None:
            graph = build_on(nodes, lambda _, index: self._given_edges(parts, projected, index), topology, **attributes)
        else:
            graph = build_batch(nodes, self._own_edges(parts, projected, nodes.x.shape[1]), **attributes)
            graph = graph if static or nodes.mask is not None else prune(graph)
        source, target = graph.edge_index
        edge_type = graph.stage[source] * len(self.stages) + graph.stage[target]
        return encode(add_attribute(graph, "edge_type", edge_type, like="edge_index"), self.encoding)

    @property
    def _builders(self) -> list[GraphBuilder]:
        return cast(list[GraphBuilder], list(self.builders))

    def _between(self, targets: Nodes, sources: Nodes, edge_index: Tensor | None = None) -> Edges:
        return cast(AttentionEdges, self.cross).between(targets, sources, edge_index)

    def _check(self, rows: list[Tensor]) -> None:
        lengths = dict(zip(self.stages, (x.shape[-1] for x in rows), strict=True))
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"Expected rows of equal length in all stages (got {lengths}): pool channels to a common grid=, or give projections"
            )
        if len({x.shape[0] for x in rows}) > 1:
            raise ValueError(f"Expected equally many graphs in all stages (got {[x.shape[0] for x in rows]})")

    def _own_edges(self, parts: list[Nodes], projected: list[Nodes], num_nodes: int) -> Edges:
        batch_size = parts[0].x.shape[0]
        sizes = [part.x.shape[1] for part in parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        indices, weights = [], []

        def add(edges: Edges, source: int, target: int) -> None:
            moved = [_renumber(edges.edge_index[side], sizes[s], num_nodes, starts[s]) for side, s in enumerate((source, target))]
            indices.append(torch.stack(moved).view(2, batch_size, -1))
            weights.append(edges.edge_weight.view(batch_size, -1))

        for i, (builder, part) in enumerate(zip(self._builders, parts, strict=True)):
            add(builder.edges(part), i, i)
        for a, b in self.pairs:
            add(self._between(projected[b], projected[a]), a, b)
            add(self._between(projected[a], projected[b]), b, a)
        return Edges(torch.cat(indices, dim=2).view(2, -1), torch.cat(weights, dim=1).view(-1))

    def _given_edges(self, parts: list[Nodes], projected: list[Nodes], edge_index: Tensor) -> Edges:
        """Weighs all edges as those of each stage and pair of stages in turn, the others being empty slots: shapes stay static."""
        sizes = [part.x.shape[1] for part in parts]
        num_nodes = sum(sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        graph = torch.div(edge_index, max(num_nodes, 1), rounding_mode="floor")
        local = edge_index - graph * num_nodes
        weight = parts[0].x.new_zeros(edge_index.shape[1])

        def weigh(source: int, target: int, weight: Tensor) -> Tensor:
            places = [local[side] - starts[s] for side, s in enumerate((source, target))]
            inside = (places[0] >= 0) & (places[0] < sizes[source]) & (places[1] >= 0) & (places[1] < sizes[target])
            numbers = [graph[side] * sizes[s] + places[side] for side, s in enumerate((source, target))]
            block = torch.where(inside, torch.stack(numbers), -1)
            if source == target:
                edges = self._builders[source].edges(parts[source], block)
            else:
                edges = self._between(projected[target], projected[source], block)
            return torch.where(inside, edges.edge_weight, weight)

        for i, size in enumerate(sizes):
            weight = weigh(i, i, weight) if size > 0 else weight
        for a, b in self.pairs:
            if sizes[a] > 0 and sizes[b] > 0:
                weight = weigh(b, a, weigh(a, b, weight))
        return Edges(edge_index, weight)


def _promoted(rows: list[Tensor]) -> list[Tensor]:
    """All rows in the type that holds those of every stage, such as float32 where one stage runs in half precision."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in rows))
    return [x.to(dtype) for x in rows]


def _joined(parts: list[Nodes]) -> Nodes:
    x = torch.cat([part.x for part in parts], dim=1)
    places = [part.pos for part in parts if part.pos is not None]
    pos = torch.cat(places, dim=1) if len(places) == len(parts) and len({p.shape[2] for p in places}) == 1 else None
    if all(part.mask is None for part in parts):
        return Nodes(x, pos)
    masks = [torch.ones_like(part.x[..., 0], dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    return Nodes(x, pos, torch.cat(masks, dim=1))


def _renumber(index: Tensor, size: int, num_nodes: int, start: int) -> Tensor:
    """From b * size + i to b * num_nodes + start + i."""
    return index + torch.div(index, max(size, 1), rounding_mode="floor") * (num_nodes - size) + start
