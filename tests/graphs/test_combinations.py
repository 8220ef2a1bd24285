"""Every node class with every edge class and every encoding: what holds for one of them has to hold for all."""

from functools import partial

import pytest
import torch
from torch_geometric.data import Batch

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    GridEdges,
    HeatKernelEncoding,
    InstanceNodes,
    KNNEdges,
    LaplacianEncoding,
    PatchNodes,
    RadiusEdges,
    RandomEdges,
    RandomWalkEncoding,
    RegionNodes,
    to_dense,
)
from gkd.graphs.encodings import add_attribute
from gkd.graphs.testing import fixture_features

BOXES = [
    torch.tensor([[0.0, 0, 5, 5], [2, 2, 8, 9], [6, 1, 11, 6], [1, 6, 7, 12], [0, 0, 12, 12]]),
    torch.tensor([[3.0, 3, 9, 9], [0, 4, 4, 12]]),
]


def mean_of_box(features, rois, output_size, spatial_scale):
    """The smallest thing that behaves like RoIAlign: weights every position by a smooth window around the box."""
    height, width = features.shape[-2:]
    index, (x0, y0, x1, y1) = rois[:, 0].long(), (rois[:, 1:] * spatial_scale).unbind(1)
    column, row = torch.arange(width).to(rois) + 0.5, torch.arange(height).to(rois) + 0.5
    window = torch.sigmoid(4 * (column - x0[:, None])) * torch.sigmoid(4 * (x1[:, None] - column))
    window = window[:, None, :] * (torch.sigmoid(4 * (row - y0[:, None])) * torch.sigmoid(4 * (y1[:, None] - row)))[:, :, None]
    mean = (features[index] * window[:, None]).sum((2, 3)) / window.sum((1, 2))[:, None]
    return mean[:, :, None, None].expand(-1, -1, *output_size)


def channel_case(features):
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    return (features,), (features[:, permutation],), [permutation] * len(features)


def patch_case(features):
    permutation = torch.tensor([4, 8, 0, 2, 7, 1, 3, 6, 5])
    return (features,), (features.flatten(2)[:, :, permutation].view_as(features),), [permutation] * len(features)


def instance_case(features):
    permutation = torch.tensor([2, 0, 4, 1, 3])
    return (features,), (features[permutation],), [permutation]


def region_case(features):
    permutations = [torch.tensor([4, 1, 0, 3, 2]), torch.tensor([1, 0])]
    boxes = [box[permutation] for box, permutation in zip(BOXES, permutations, strict=True)]
    return (features, BOXES, (12, 12)), (features, boxes, (12, 12)), permutations


# Node class, size of the batch, and: features -> inputs, inputs with permuted nodes, the permutations
NODES = {
    "channel": (ChannelNodes(), 2, channel_case),
    "patch": (PatchNodes(), 2, patch_case),
    "instance": (InstanceNodes(), 5, instance_case),
    "region": (RegionNodes(mean_of_box, output_size=1), 2, region_case),
}
PER_IMAGE = [name for name in NODES if name != "instance"]  # the others make one graph of a batch
EDGES = {
    "knn": KNNEdges(k=2),
    "knn-mutual-euclidean": KNNEdges(k=2, metric="euclidean", symmetrize="mutual"),
    "radius": RadiusEdges(0.4, metric="cosine"),
    "complete": CompleteEdges(),
    "complete-lowrank": CompleteEdges(nonnegative=True, self_loops=True),
    "grid": GridEdges(neighbors=4),
    "attention": AttentionEdges(k=2),
    "random": RandomEdges(k=2, seed=0),
}
ENCODINGS = {
    "laplacian": partial(LaplacianEncoding, num_eig=2, sign="abs"),
    "heat": partial(HeatKernelEncoding, times=(0.5, 4.0)),
    "heat-lowest": partial(HeatKernelEncoding, num_eig=2, times=(0.5, 4.0)),
    "walk": partial(RandomWalkEncoding, walk_length=3),
}
# Only patches lie on a grid.
NO_SENSE = {(nodes, "grid") for nodes in ("channel", "instance", "region")}
SENSE = [(nodes, edges) for nodes in NODES for edges in EDGES if (nodes, edges) not in NO_SENSE]
# Edges that do not look at features do not move with them.
FIXED = {"grid", "random"}


def features_for(nodes, name="random", dtype=torch.float64):
    return fixture_features(batch_size=NODES[nodes][1], dtype=dtype)[name]


def build(nodes, edges, inputs):
    return GraphBuilder(NODES[nodes][0], EDGES[edges])(*inputs)


def test_every_case_is_there():
    assert len(SENSE) == len(NODES) * len(EDGES) - 3


@pytest.mark.parametrize(("nodes", "edges"), sorted(NO_SENSE))
def test_what_makes_no_sense_says_so(nodes, edges):
    inputs, _, _ = NODES[nodes][2](features_for(nodes))
    with pytest.raises(ValueError, match="Expected"):
        GraphBuilder(NODES[nodes][0], EDGES[edges])(*inputs)


def encodings_of(edges):
    """Mutual neighbours fall into more components than 'heat-lowest' keeps pairs: its cut would lie inside the kernel."""
    return [name for name in ENCODINGS if (name, edges) != ("heat-lowest", "knn-mutual-euclidean")]


@pytest.mark.parametrize(("nodes", "edges"), [pair for pair in SENSE if pair[1] not in FIXED])
def test_permutation_of_the_nodes(nodes, edges):
    inputs, permuted_inputs, permutations = NODES[nodes][2](features_for(nodes))
    graph, permuted = build(nodes, edges, inputs), build(nodes, edges, permuted_inputs)
    (A, _), (permuted_A, _) = to_dense(graph), to_dense(permuted)
    for number, permutation in enumerate(permutations):
        size = len(permutation)
        torch.testing.assert_close(permuted_A[number, :size, :size], A[number][permutation][:, permutation])
    offsets = [sum(map(len, permutations[:number])) for number in range(len(permutations))]
    rows = torch.cat([permutation + offset for permutation, offset in zip(permutations, offsets, strict=True)])
    for encoding in encodings_of(edges):
        pe, permuted_pe = ENCODINGS[encoding]()(graph), ENCODINGS[encoding]()(permuted)
        torch.testing.assert_close(permuted_pe, pe[rows], rtol=1e-5, atol=1e-7, msg=lambda text, name=encoding: f"{name}: {text}")


@pytest.mark.parametrize(("nodes", "edges"), [pair for pair in SENSE if pair[0] in PER_IMAGE and pair[1] != "random"])
def test_batch_equals_singles(nodes, edges):
    (features, *others), _, _ = NODES[nodes][2](features_for(nodes))
    together = build(nodes, edges, (features, *others))
    together.validate()
    for encoding in encodings_of(edges):
        add_attribute(together, encoding, ENCODINGS[encoding]()(together))
    singles = together.to_data_list()
    assert len(singles) == len(features)
    for number, single in enumerate(singles):
        boxes = [others[0][number : number + 1], others[1]] if others else []
        alone = build(nodes, edges, (features[number : number + 1], *boxes))
        torch.testing.assert_close(single.x, alone.x)
        torch.testing.assert_close(to_dense(single)[0], to_dense(alone)[0])
        for encoding in encodings_of(edges):
            torch.testing.assert_close(single[encoding], ENCODINGS[encoding]()(alone), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("nodes", NODES)
def test_builder_attaches_the_encoding(nodes, encoding):
    inputs, _, _ = NODES[nodes][2](features_for(nodes))
    graph = GraphBuilder(NODES[nodes][0], EDGES["knn"], ENCODINGS[encoding]())(*inputs)
    torch.testing.assert_close(graph.pe, ENCODINGS[encoding]()(graph))
    again = Batch.from_data_list(graph.to_data_list())
    torch.testing.assert_close(ENCODINGS[encoding]()(again), graph.pe, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("nodes", "edges"), SENSE)
def test_gradients_are_finite_everywhere(nodes, edges):
    maps = fixture_features(batch_size=NODES[nodes][1])
    cases = maps if nodes == "instance" else {"all": torch.cat(list(maps.values()))}
    for name, features in cases.items():
        features.requires_grad_()
        inputs = (features, BOXES * len(maps), (12, 12)) if nodes == "region" else (features,)
        graph = build(nodes, edges, inputs)
        pe = torch.cat([encoding()(graph) for encoding in ENCODINGS.values()], dim=1)
        total = (pe * torch.linspace(0.5, 1.5, pe.numel()).view_as(pe)).sum() + graph.edge_weight.square().sum() + graph.x.sum()
        (gradient,) = torch.autograd.grad(total, features)
        assert pe.isfinite().all(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("edges", ["knn", "complete", "complete-lowrank", "attention"])
def test_gradient_of_the_encoding_reaches_the_features(edges, encoding):
    features = features_for("channel").requires_grad_()
    pe = ENCODINGS[encoding]()(build("channel", edges, (features,)))
    (gradient,) = torch.autograd.grad((pe * torch.linspace(0.5, 1.5, pe.numel()).view_as(pe)).sum(), features)
    assert gradient.abs().sum() > 0


def test_builder_with_an_encoding_compiles():
    for nodes in ("channel", "patch", "instance"):
        features = features_for(nodes, dtype=torch.float32)
        for encoding in ("walk", "heat"):
            builder = GraphBuilder(NODES[nodes][0], EDGES["knn"], ENCODINGS[encoding]())
            torch.compiler.reset()
            compiled = torch.compile(lambda x, build=builder: build(x, static=True).pe, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(features), builder(features).pe)
