import copy
import math
import pickle

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATConv, GCNConv, TransformerConv

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    GridEdges,
    InstanceNodes,
    KNNEdges,
    Nodes,
    PatchNodes,
    RadiusEdges,
    RandomEdges,
    RandomWalkEncoding,
    prune,
    to_dense,
)


class Padded(torch.nn.Module):
    """Takes nodes and mask as they are: ragged graphs without boxes."""

    def forward(self, x, mask):
        return Nodes(x, x[..., :2], mask)


class Degrees(torch.nn.Module):
    """The smallest encoding: how much weight comes in."""

    def forward(self, graph):
        return torch.zeros(graph.num_nodes, 1).index_add(0, graph.edge_index[1], graph.edge_weight[:, None])


BUILDERS = {
    "channel-knn": GraphBuilder(ChannelNodes(), KNNEdges(k=2)),
    "channel-euclidean": GraphBuilder(ChannelNodes(grid=2, center=True), KNNEdges(k=2, metric="euclidean", symmetrize="mutual")),
    "channel-lowrank": GraphBuilder(ChannelNodes(), CompleteEdges(self_loops=True, nonnegative=True)),
    "channel-encoded": GraphBuilder(ChannelNodes(), RadiusEdges(0.3, "cosine"), encoding=Degrees()),
    "patch-grid": GraphBuilder(PatchNodes(), GridEdges()),
    "patch-attention": GraphBuilder(PatchNodes(), AttentionEdges(k=3)),
    "patch-random": GraphBuilder(PatchNodes(), RandomEdges(k=3)),
}


def each(names):
    return pytest.mark.parametrize("builder", [BUILDERS[name] for name in names], ids=names)


def features(batch_size=3):
    return torch.rand(batch_size, 6, 4, 4)


def ragged(poison=1e6):
    mask = torch.arange(6) < torch.tensor([4, 0, 6, 1])[:, None]
    return torch.where(mask[:, :, None], torch.rand(4, 6, 3), poison), mask


def assert_same_batch(graph, expected):
    assert type(graph) is type(expected)
    assert set(graph.keys()) == set(expected.keys())
    for name in expected.keys():  # noqa: SIM118  iterating a batch yields pairs
        assert graph[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(graph[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    for table in ("_slice_dict", "_inc_dict"):
        ours, theirs = getattr(graph, table), getattr(expected, table)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), (table, name)
            assert ours[name].device.type == "cpu"
    assert graph.num_graphs == expected.num_graphs


class TestBatch:
    @each(BUILDERS)
    def test_is_what_from_data_list_gives(self, builder):
        maps = features()
        graph = builder(maps)
        assert graph.validate()
        singles = []
        for image in maps:
            alone = builder(image[None])
            names = [name for name in alone.keys() if name not in ("batch", "ptr")]  # noqa: SIM118
            singles.append(Data(**{name: alone[name] for name in names}))
        assert_same_batch(graph, Batch.from_data_list(singles))

    @pytest.mark.parametrize("edges", [KNNEdges(k=3), CompleteEdges(self_loops=True, nonnegative=True), AttentionEdges(k=3)], ids=repr)
    def test_ragged_is_what_from_data_list_gives(self, edges):
        x, mask = ragged()
        graph = GraphBuilder(Padded(), edges, encoding=Degrees())(x, mask)
        assert graph.validate()
        singles = []
        for row, size in zip(x, mask.sum(dim=1).tolist(), strict=True):
            alone = GraphBuilder(Padded(), edges, encoding=Degrees())(row[None, :size], torch.ones(1, size, dtype=torch.bool))
            singles.append(Data(**{name: alone[name] for name in alone.keys() if name not in ("batch", "ptr")}))  # noqa: SIM118
        assert_same_batch(graph, Batch.from_data_list(singles))
        assert (graph.edge_weight != 0).all()

    def test_holes_close_up(self):
        x, mask = torch.rand(1, 5, 3), torch.tensor([[False, True, True, False, True]])
        graph = GraphBuilder(Padded(), CompleteEdges())(x, mask)
        expected = GraphBuilder(Padded(), CompleteEdges())(x[:, mask[0]], torch.ones(1, 3, dtype=torch.bool))
        assert_same_batch(graph, expected)

    @each(BUILDERS)
    def test_taken_apart_and_put_together(self, builder):
        graph = builder(features())
        assert_same_batch(Batch.from_data_list(graph.to_data_list()), graph)
        second = graph[1]
        assert isinstance(second, Data)
        assert torch.equal(second.x, graph.x[graph.batch == 1])
        assert second.edge_index.max() < second.num_nodes
        assert [g.num_nodes for g in graph[1:]] == [second.num_nodes] * 2

    @each(BUILDERS)
    def test_copies(self, builder):
        graph = builder(features())
        for other in (
            copy.copy(graph),
            copy.deepcopy(graph.detach()),
            pickle.loads(pickle.dumps(graph.detach())),
            graph.clone(),
        ):
            assert_same_batch(other, graph)
            other.x = torch.zeros(1)
            assert graph.x.shape[0] > 1

    def test_to_another_device(self):
        graph = BUILDERS["channel-encoded"](features()).to("meta")
        assert {value.device.type for value in graph.to_dict().values()} == {"meta"}

    def test_instances_are_one_graph(self):
        graph = GraphBuilder(InstanceNodes(), KNNEdges(k=2))(features(5))
        assert graph.num_graphs == 1
        assert graph.num_nodes == 5
        assert_same_batch(graph, Batch.from_data_list([graph[0]]))

    @pytest.mark.parametrize("convolution", [GCNConv(16, 5), GATConv(16, 5, edge_dim=1), TransformerConv(16, 5, edge_dim=1)], ids=repr)
    def test_convolutions(self, convolution):
        maps = features().requires_grad_()
        graph = BUILDERS["channel-knn"](maps)
        weight = graph.edge_weight if isinstance(convolution, GCNConv) else graph.edge_weight[:, None]
        out = convolution(graph.x, graph.edge_index, weight)
        out.square().sum().backward()
        assert maps.grad.isfinite().all()
        alone = graph[2]
        weight = alone.edge_weight if isinstance(convolution, GCNConv) else alone.edge_weight[:, None]
        torch.testing.assert_close(convolution(alone.x, alone.edge_index, weight), out[graph.batch == 2])

    def test_fillers_are_nothing_to_weighted_convolutions(self):
        maps, convolution = features(), GCNConv(16, 5, add_self_loops=False)
        full, pruned = (BUILDERS["channel-knn"](maps, static=static) for static in (True, False))
        assert pruned.num_edges < full.num_edges
        torch.testing.assert_close(*(convolution(g.x, g.edge_index, g.edge_weight) for g in (full, pruned)))

    @pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 0, 4, 4), (2, 1, 4, 4), (1, 2, 4, 4)])
    @pytest.mark.parametrize("edges", [KNNEdges(k=1), RadiusEdges(9.0), CompleteEdges(), AttentionEdges(), RandomEdges(k=1)], ids=repr)
    def test_few_nodes(self, edges, shape):
        graph = GraphBuilder(ChannelNodes(), edges, encoding=Degrees())(torch.ones(shape))
        assert graph.validate()
        assert graph.num_graphs == shape[0] == len(graph.to_data_list())
        assert graph.x.shape == (shape[0] * shape[1], 16)
        if shape[1] < 2 or shape[0] == 0:
            assert graph.num_edges == 0
        assert graph.edge_weight.sum() == pytest.approx(2.0 if shape[1] == 2 else 0.0)

    def test_gradient_is_finite_where_maps_are_zero(self):
        maps = torch.zeros(2, 6, 4, 4, requires_grad=True)
        for builder in (builder for name, builder in BUILDERS.items() if name.startswith("channel")):
            graph = builder(maps)
            (gradient,) = torch.autograd.grad(graph.edge_weight.sum() + graph.x.sum(), maps)
            assert gradient.isfinite().all()

    def test_exchanged_arguments(self):
        with pytest.raises(TypeError, match=r"Expected nodes to return Nodes \(got Tensor; are nodes and edges exchanged\?\)"):
            GraphBuilder(torch.nn.Identity(), KNNEdges())(features())

    def test_encoding_of_another_size(self):
        encoding = torch.nn.Identity()
        encoding.forward = lambda graph: graph.x[:3]
        with pytest.raises(ValueError, match=r"Expected an encoding with one row for each of 18 nodes \(got \[3, 16\]\)"):
            GraphBuilder(ChannelNodes(), KNNEdges(k=2), encoding=encoding)(features())


class TestTopology:
    @each([name for name in BUILDERS if name != "patch-grid"])
    @pytest.mark.parametrize("as_graph", [True, False])
    def test_of_another_network(self, builder, as_graph):
        teacher, student = features(), features()
        graph = builder(teacher)
        shared = builder(student, topology=graph if as_graph else graph.edge_index)
        assert shared.edge_index is graph.edge_index
        assert torch.equal(shared._slice_dict["edge_index"], graph._slice_dict["edge_index"])
        torch.testing.assert_close(shared.x, builder(student).x)
        same = builder(teacher, topology=graph)
        torch.testing.assert_close(same.edge_weight, graph.edge_weight)
        assert_same_batch(same, graph)

    @pytest.mark.parametrize("as_graph", [True, False])
    @pytest.mark.parametrize(
        "edges", [KNNEdges(k=3), KNNEdges(k=3, metric="euclidean"), CompleteEdges(self_loops=True, nonnegative=True)], ids=repr
    )
    def test_ragged(self, edges, as_graph):
        (x, mask), builder = ragged(), GraphBuilder(Padded(), edges)
        graph = builder(x, mask)
        assert_same_batch(builder(x, mask, topology=graph if as_graph else graph.edge_index), graph)
        other = builder(torch.where(mask[:, :, None], 2 * x, -1e6), mask, topology=graph)
        torch.testing.assert_close(other.edge_weight, graph.edge_weight)

    def test_weights_follow_the_student(self):
        # Channels on a line: the teacher joins 0 with 1, the student's maps of these two are at 60 degrees: cos = 1/2.
        teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]).view(1, 3, 1, 2)
        student = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [1.0, 0.0]]).view(1, 3, 1, 2).requires_grad_()
        builder = GraphBuilder(ChannelNodes(), KNNEdges(k=1, symmetrize="mutual"))
        graph = builder(student, topology=builder(teacher))
        torch.testing.assert_close(to_dense(graph)[0][0], torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        assert torch.autograd.grad(graph.edge_weight.sum(), student)[0].abs().sum() > 0

    def test_factor_of_the_complete_graph_is_kept(self):
        builder, maps = BUILDERS["channel-lowrank"], features()
        graph = builder(features())
        torch.testing.assert_close(builder(maps, topology=graph).factor, builder(maps).factor)
        assert "factor" not in builder(maps, topology=BUILDERS["channel-knn"](maps))

    def test_bad_topology(self):
        builder = BUILDERS["channel-knn"]
        graph = builder(features())
        with pytest.raises(ValueError, match=r"Expected the topology of 2 graphs with 12 nodes in all \(got 3 graphs with 18 nodes\)"):
            builder(features(2), topology=graph)
        with pytest.raises(ValueError, match=r"Expected edges of 12 sources and 12 targets \(got node 17 -> node 17\)"):
            builder(features(2), topology=graph.edge_index)
        with pytest.raises(ValueError, match=r"edges of one graph after those of another \(got them mixed\)"):
            builder(features(), topology=graph.edge_index.flip(1))
        with pytest.raises(ValueError, match=r"Expected edge_index of shape \[2, E\]"):
            builder(features(), topology=graph.edge_index[0])


class TestPrune:
    def test_by_hand(self):
        edge_index = torch.tensor([[0, 1, 0, 2, 3], [1, 0, 0, 3, 3]])
        first = Data(x=torch.ones(2, 1), edge_index=edge_index[:, :3], edge_weight=torch.tensor([1.0, 2.0, 0.0]))
        second = Data(
            x=torch.ones(2, 1), edge_index=edge_index[:, 3:] - 2, edge_weight=torch.tensor([3.0, 0.0]), edge_attr=torch.ones(2, 4)
        )
        first.edge_attr = torch.zeros(3, 4)
        graph = Batch.from_data_list([first, second])
        pruned = prune(graph)
        assert pruned.edge_index.tolist() == [[0, 1, 2], [1, 0, 3]]
        assert pruned[1].edge_index.tolist() == [[0], [1]]
        assert pruned[1].edge_attr.tolist() == [[1.0] * 4]
        assert graph.num_edges == 5  # the one that was pruned is as it was
        assert graph[1].num_edges == 2
        assert_same_batch(pruned, Batch.from_data_list([prune(first), prune(second)]))

    def test_gradient(self):
        maps = features().requires_grad_()
        full, pruned = (
            torch.autograd.grad(BUILDERS["channel-knn"](maps, static=static).edge_weight.square().sum(), maps)[0]
            for static in (True, False)
        )
        torch.testing.assert_close(full, pruned)

    def test_as_many_graphs_as_edges(self):
        graph = GraphBuilder(ChannelNodes(), KNNEdges(k=1, symmetrize="mutual"))(torch.rand(3, 2, 4, 4)[:1].repeat(3, 1, 1, 1))
        assert graph.num_edges == 6
        assert graph.ptr.tolist() == [0, 2, 4, 6]

    def test_needs_weights(self):
        with pytest.raises(ValueError, match="Expected a graph with edge_weight"):
            prune(Data(x=torch.ones(1, 1)))


class TestSharedTensors:
    def test_are_shared_and_mended(self):
        builder, maps = BUILDERS["channel-lowrank"], features()
        first, second = builder(maps), builder(maps)
        assert first.edge_index is second.edge_index
        expected = first.edge_index.clone()
        first.edge_index += 1
        first.batch.zero_()
        third = builder(maps)
        assert torch.equal(third.edge_index, expected)
        assert third.batch.tolist() == [0] * 6 + [1] * 6 + [2] * 6

    def test_first_use_under_inference_mode(self):
        builder, maps = GraphBuilder(ChannelNodes(), CompleteEdges()), torch.rand(7, 5, 3, 3)  # a size that no other test has
        with torch.inference_mode():
            builder(maps)
        graph = builder(maps.requires_grad_())
        (graph.x * graph.batch[:, None]).sum().backward()
        GCNConv(9, 2)(graph.x, graph.edge_index, graph.edge_weight).sum().backward()


@pytest.mark.parametrize("name", ["channel-knn", "channel-euclidean", "channel-lowrank", "patch-grid", "instance"])
def test_compiles_in_one_graph(name):
    builder = BUILDERS.get(name, GraphBuilder(InstanceNodes(grid=1), AttentionEdges(k=2)))
    torch.compiler.reset()
    compiled = torch.compile(builder, fullgraph=True, backend="aot_eager")
    maps = features(4).requires_grad_()
    graph, expected = compiled(maps, static=True), builder(maps, static=True)
    assert_same_batch(graph, expected)
    ours, theirs = (torch.autograd.grad(g.edge_weight.square().sum(), maps)[0] for g in (graph, expected))
    torch.testing.assert_close(ours, theirs)


def test_shared_topology_compiles_in_one_graph():
    torch.compiler.reset()
    builder, teacher, student = BUILDERS["channel-knn"], features(), features()
    compiled = torch.compile(lambda s, t: builder(s, topology=builder(t, static=True)), fullgraph=True, backend="aot_eager")
    assert_same_batch(compiled(student, teacher), builder(student, topology=builder(teacher, static=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILDERS)
def test_never_waits_for_the_gpu(name):
    builder = BUILDERS[name]
    if builder.encoding is not None:
        builder = GraphBuilder(builder.nodes, builder.edges, RandomWalkEncoding(4))
    maps = features().cuda().requires_grad_()
    builder(maps, static=True).edge_weight.sum().backward()  # index tensors come to the device once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = builder(maps, static=True)
        builder(maps, topology=graph).edge_weight.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graph.x.is_cuda
    assert graph.batch.is_cuda
    assert_same_batch(graph.cpu(), builder(maps.detach().cpu(), static=True))
