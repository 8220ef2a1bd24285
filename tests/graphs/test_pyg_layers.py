"""Layers of PyG on graphs of gkd: as on the same graph that somebody wrote down edge by edge."""

import pytest
import torch
from torch_geometric.nn import APPNP, GATConv, GCNConv, GraphConv, SAGEConv, SGConv, TAGConv

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    GridEdges,
    KNNEdges,
    PatchNodes,
    RadiusEdges,
    RandomEdges,
    StageGraph,
    from_dense,
    prune,
    to_dense,
)

LAYERS = {
    "GCNConv": lambda: GCNConv(9, 4),
    "GCNConv improved": lambda: GCNConv(9, 4, improved=True),
    "SGConv": lambda: SGConv(9, 4, K=2),
    "APPNP": lambda: APPNP(K=3, alpha=0.1),
    "TAGConv": lambda: TAGConv(9, 4),
    "GraphConv mean": lambda: GraphConv(9, 4, aggr="mean"),
    "GraphConv max": lambda: GraphConv(9, 4, aggr="max"),
    "SAGEConv": lambda: SAGEConv(9, 4),
    "GATConv": lambda: GATConv(9, 4, edge_dim=1),
}
EDGES = {
    "knn": KNNEdges(k=3),
    "knn mutual": KNNEdges(k=3, symmetrize="mutual"),
    "knn directed": KNNEdges(k=3, symmetrize=None),
    "radius": RadiusEdges(0.9, "cosine"),
    "complete": CompleteEdges(),
    "attention": AttentionEdges(k=2),
    "random": RandomEdges(k=2),
}
WITHOUT_WEIGHTS = ("SAGEConv", "GATConv")


def run(name, layer, graph):
    if name == "GATConv":
        return layer(graph.x, graph.edge_index, graph.edge_weight[:, None])
    return layer(graph.x, graph.edge_index) if name in WITHOUT_WEIGHTS else layer(graph.x, graph.edge_index, graph.edge_weight)


def maps():
    features = torch.randn(2, 8, 3, 3)
    features[:, 3] = 0  # a dead channel, which has no edge
    return features


def written_down(graph):
    """The same graph without a trace of how it was built."""
    A, mask = to_dense(graph)
    return from_dense(A, mask, graph.x.view(*mask.shape, -1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("edges", EDGES)
def test_channels(edges, layer):
    builder, module = GraphBuilder(ChannelNodes(), EDGES[edges]), LAYERS[layer]()
    graph = builder(maps())
    expected = run(layer, module, written_down(graph))
    torch.testing.assert_close(run(layer, module, graph), expected)
    torch.testing.assert_close(run(layer, module, prune(builder(maps() * 0 + graph.x.view(2, 8, 3, 3), static=True))), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_patches_on_a_grid(layer):
    graph, module = GraphBuilder(PatchNodes(), GridEdges(8))(torch.rand(2, 9, 3, 4)), LAYERS[layer]()
    torch.testing.assert_close(run(layer, module, graph), run(layer, module, written_down(graph)))


@pytest.mark.parametrize("layer", LAYERS)
def test_stages(layer):
    builder = GraphBuilder(ChannelNodes(grid=3), KNNEdges(k=2))
    graph, module = StageGraph({"a": builder, "b": builder})({"a": maps(), "b": maps()}), LAYERS[layer]()
    torch.testing.assert_close(run(layer, module, graph), run(layer, module, written_down(graph)))


def test_static_graphs_are_for_others():
    """The contrast: GCNConv takes fillers for the self-loops that it would add."""
    builder, layer = GraphBuilder(ChannelNodes(), KNNEdges(k=3)), GCNConv(9, 4)
    static, graph = builder(maps(), static=True), builder(maps())
    assert static.num_edges == 2 * 2 * 8 * 3
    assert not torch.allclose(run("GCNConv", layer, static), run("GCNConv", layer, written_down(static)))
    assert graph.num_edges < static.num_edges
