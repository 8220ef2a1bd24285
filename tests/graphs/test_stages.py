import itertools
import math

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import RGCNConv

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    KNNEdges,
    Nodes,
    PatchNodes,
    RadiusEdges,
    StageGraph,
    to_dense,
)


class Padded(torch.nn.Module):
    """Takes the rows given for its stage, with a mask that says how many of an image's rows exist."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, x):
        return Nodes(x, None, torch.arange(x.shape[1]) < torch.tensor(self.sizes)[:, None])


def channels(edges, grid=2):
    return GraphBuilder(ChannelNodes(grid=grid), edges)


def features(batch_size=2, dtype=torch.float64):
    sizes = {"layer1.0": (3, 8), "layer2": (5, 4), "layer3": (4, 2)}
    return {stage: torch.rand(batch_size, c, s, s, dtype=dtype) for stage, (c, s) in sizes.items()}


def three_stages(cross=None, **options):
    builders = {
        "layer1.0": channels(KNNEdges(k=2)),
        "layer2": channels(CompleteEdges()),
        "layer3": channels(KNNEdges(k=1, symmetrize=None)),
    }
    return StageGraph(builders, AttentionEdges(k=2) if cross is None else cross, **options)


def test_blocks_of_the_adjacency():
    maps, cross = features(), AttentionEdges(k=2)
    model = three_stages(cross)
    graph = model(maps)
    assert graph.validate()
    A, mask = to_dense(graph)  # A[source, target]
    assert A.shape == (2, 12, 12)
    assert mask.all()
    stages = [range(3), range(3, 8), range(8, 12)]
    nodes = [builder.nodes(x) for builder, x in zip(model.builders, maps.values(), strict=True)]
    for a, b in itertools.product(range(3), range(3)):
        block = A[:, stages[a]][:, :, stages[b]]
        if a == b:
            expected = to_dense(model.builders[a](list(maps.values())[a]))[0]
        elif abs(a - b) == 1:
            edges = cross.between(nodes[b], nodes[a])
            expected = torch.zeros_like(block)
            source, target = edges.edge_index
            size = block.shape[1:]
            expected[target // size[1], source % size[0], target % size[1]] = edges.edge_weight
        else:
            expected = torch.zeros_like(block)
        torch.testing.assert_close(block, expected)


def test_cross_edges_by_hand():
    # One channel in the first stage, rows of length 1: it attends to the rows 0 and ln 3 of the second with weights 1/4 and 3/4.
    maps = {"a": torch.ones(1, 1, 1, 1), "b": torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)}
    graph = StageGraph({stage: channels(CompleteEdges(), grid=None) for stage in maps}, AttentionEdges())(maps)
    A = to_dense(graph)[0][0]
    torch.testing.assert_close(A[1:, 0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(A[0, 1:], torch.tensor([1.0, 1.0]))  # nobody else to attend to


def test_nodes_of_an_image_lie_together():
    maps = features()
    graph = three_stages()(maps)
    assert graph.stage.dtype == torch.long
    assert graph.stage.tolist() == [0] * 3 + [1] * 5 + [2] * 4 + [0] * 3 + [1] * 5 + [2] * 4
    assert graph.batch.tolist() == [0] * 12 + [1] * 12
    assert graph.ptr.tolist() == [0, 12, 24]
    torch.testing.assert_close(graph.x[12 + 3], ChannelNodes(grid=2)(maps["layer2"]).x[1, 0])


@pytest.mark.parametrize("cross", [None, KNNEdges(k=2, metric="euclidean")], ids=["attention", "knn"])
@pytest.mark.parametrize("static", [False, True])
def test_is_what_from_data_list_gives(cross, static):
    model, maps = three_stages(cross, pairs="all", encoding=torch.nn.Identity()), features(3)
    model.encoding.forward = lambda graph: graph.x[:, :1]
    graph = model(maps, static=static)
    singles = []
    for image in range(3):
        alone = model({stage: x[image : image + 1] for stage, x in maps.items()}, static=static)
        singles.append(Data(**{name: alone[name] for name in alone.keys() if name not in ("batch", "ptr")}))  # noqa: SIM118
    expected = Batch.from_data_list(singles)
    assert set(graph.keys()) == set(expected.keys())
    for name in expected.keys():  # noqa: SIM118
        torch.testing.assert_close(graph[name], expected[name])
    for name, slices in expected._slice_dict.items():
        assert torch.equal(graph._slice_dict[name], slices)
        assert torch.equal(graph._inc_dict[name], expected._inc_dict[name])


@pytest.mark.parametrize("cross", [AttentionEdges(k=1), KNNEdges(k=2), KNNEdges(k=2, metric="euclidean")], ids=repr)
@pytest.mark.parametrize("static", [False, True])
def test_shared_topology(cross, static):
    teacher, student = features(), features()
    model = three_stages(cross, pairs="all")
    graph = model(teacher, static=static)
    for topology in (graph, graph.edge_index):
        same = model(teacher, topology=topology)
        torch.testing.assert_close(same.edge_weight, graph.edge_weight)
        assert torch.equal(same._slice_dict["edge_weight"], graph._slice_dict["edge_weight"])
    other, own = model(student, topology=graph), to_dense(three_stages(cross, pairs="all")(student))[0]
    if not isinstance(cross, KNNEdges) or cross.metric == "cosine":
        A = to_dense(other)[0]
        both = (A != 0) & (own != 0)
        torch.testing.assert_close(A[both], own[both])


@pytest.mark.parametrize("static", [False, True])
def test_types_of_edges(static):
    graph = three_stages(pairs="all")(features(), static=static)
    source, target = graph.edge_index
    assert torch.equal(torch.div(graph.edge_type, 3, rounding_mode="floor"), graph.stage[source])
    assert torch.equal(graph.edge_type % 3, graph.stage[target])
    assert graph.edge_type.unique().tolist() == list(range(9))
    single = graph[1]
    assert torch.equal(single.edge_type, graph.edge_type[graph.batch[source] == 1])
    conv = RGCNConv(4, 2, num_relations=9).double()
    assert conv(graph.x, graph.edge_index, graph.edge_type).shape == (graph.num_nodes, 2)
    assert torch.equal(three_stages(pairs="all")(features(), topology=graph).edge_type, graph.edge_type)


@pytest.mark.parametrize("cross", [AttentionEdges(k=3), KNNEdges(k=3, metric="euclidean")], ids=repr)
def test_ragged_stages(cross):
    x = {"a": torch.rand(3, 4, 2, dtype=torch.float64), "b": torch.rand(3, 5, 2, dtype=torch.float64)}
    sizes = {"a": [4, 2, 0], "b": [3, 5, 2]}

    def model(sizes):
        return StageGraph({stage: GraphBuilder(Padded(sizes[stage]), KNNEdges(k=2)) for stage in sizes}, cross)

    graph = model(sizes)(x)
    assert graph.validate()
    assert graph.ptr.tolist() == [0, 7, 14, 16]
    for image, single in enumerate(graph.to_data_list()):
        counts = {stage: sizes[stage][image] for stage in sizes}
        alone = model({stage: [count] for stage, count in counts.items()})(
            {s: x[s][image : image + 1, :count] for s, count in counts.items()}
        )
        for name in ("x", "stage", "edge_index", "edge_weight"):
            torch.testing.assert_close(single[name], alone[name])
    torch.testing.assert_close(model(sizes)(x, topology=graph).edge_weight, graph.edge_weight)


def test_projections():
    maps = {"a": torch.rand(2, 3, 2, 2), "b": torch.rand(2, 5, 2, 2)}
    builders = {stage: GraphBuilder(PatchNodes(), KNNEdges(k=2)) for stage in maps}
    model = StageGraph(builders, projections={"b": torch.nn.Linear(5, 7), "a": torch.nn.Linear(3, 7)})
    graph = model(maps)
    assert graph.x.shape == (16, 7)
    assert graph.pos.shape == (16, 2)
    torch.testing.assert_close(graph.x[:4], model.projections[0](PatchNodes()(maps["a"]).x[0]))
    graph.edge_weight.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.projections.parameters())


def test_learned_cross_edges():
    model = three_stages(AttentionEdges(k=2, in_channels=4)).double()
    model(features()).edge_weight.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.cross.parameters())


def test_gradients():
    model = three_stages(AttentionEdges())
    maps = {stage: torch.rand(1, 3, 2, 2, dtype=torch.float64) for stage in features()}
    edges = model(maps)

    def weights(*values):
        return model(dict(zip(maps, values, strict=True)), topology=edges).edge_weight

    assert torch.autograd.gradcheck(weights, tuple(x.requires_grad_() for x in maps.values()))
    zero = {stage: torch.zeros_like(x, requires_grad=True) for stage, x in maps.items()}
    gradients = torch.autograd.grad(model(zero).edge_weight.sum(), list(zero.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_compiles_in_one_graph():
    torch.compiler.reset()
    model, maps = three_stages(), features(dtype=torch.float32)
    graph, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(maps, static=True), model(maps, static=True)
    for name in expected.keys():  # noqa: SIM118
        torch.testing.assert_close(graph[name], expected[name])


def test_one_stage_is_its_own_graph():
    maps = torch.rand(2, 6, 4, 4)
    alone, graph = channels(KNNEdges(k=2))(maps), StageGraph({"a": channels(KNNEdges(k=2))})({"a": maps})
    for name in alone.keys():  # noqa: SIM118
        torch.testing.assert_close(graph[name], alone[name])


def test_bad_arguments():
    maps = features()
    with pytest.raises(ValueError, match=r"Expected a builder for at least one stage \(got none\)"):
        StageGraph({})
    with pytest.raises(ValueError, match=r"method between\(targets, sources\), such as AttentionEdges or KNNEdges \(got RadiusEdges\)"):
        three_stages(RadiusEdges(1.0))
    with pytest.raises(ValueError, match=r"Expected pairs to be 'adjacent' or 'all' \(got 'some'\)"):
        three_stages(pairs="some")
    with pytest.raises(ValueError, match=r"Expected projections for the stages .* \(got \['layer2'\]\)"):
        three_stages(projections={"layer2": torch.nn.Identity()})
    with pytest.raises(ValueError, match=r"without an encoding, which StageGraph takes itself \(got one for stage 'a'\)"):
        StageGraph({"a": GraphBuilder(ChannelNodes(), KNNEdges(), encoding=torch.nn.Identity())})
    with pytest.raises(ValueError, match=r"Expected features of the stages \['layer1.0', 'layer2', 'layer3'\] \(got \['layer2'\]\)"):
        three_stages()({"layer2": maps["layer2"]})
    with pytest.raises(ValueError, match=r"rows of equal length in all stages \(got {'a': 64, 'b': 16}\): pool channels to a common grid="):
        StageGraph({stage: channels(KNNEdges(k=1), None) for stage in "ab"})({"a": maps["layer1.0"], "b": maps["layer2"]})
    with pytest.raises(ValueError, match=r"Expected equally many graphs in all stages \(got \[2, 2, 1\]\)"):
        three_stages()(maps | {"layer3": maps["layer3"][:1]})


@pytest.mark.parametrize("cross", [KNNEdges(k=1), AttentionEdges(k=1)])
def test_stages_of_unlike_precision_are_joined_in_the_larger_one(cross):
    half = {stage: x.float() if stage == "layer3" else x for stage, x in features().items()}
    builders = {stage: channels(KNNEdges(k=1)) for stage in half}
    graph = StageGraph(builders, cross)(half)
    assert graph.x.dtype == graph.edge_weight.dtype == torch.float64
