from __future__ import annotations

import math

import pytest
import torch
from torch_geometric.data import Batch, Data

from gkd.graphs.builder import GraphBuilder
from gkd.graphs.edges import CompleteEdges, KNNEdges
from gkd.graphs.message import RelationalConv
from gkd.graphs.nodes import ChannelNodes, PatchNodes
from gkd.graphs.testing import fixture_graphs, path_graph
from gkd.losses import CWDLoss, MessageLoss, VertexLoss, feature_attention, node_attention, vertex_loss

DISTANCES = ["cosine", "standardized", "mse", "kl"]
MESSAGE_DISTANCES = DISTANCES[:3]


def nodes(batch=2, n=5, d=4, dtype=torch.float64, seed=0):
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_cosine_by_hand():
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]])
    teacher = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    # 1 - cos: 0, 1 - 1/sqrt(2), 2
    assert vertex_loss(student, teacher).item() == pytest.approx((3 - math.sqrt(0.5)) / 3)
    # with v = (0.5, 1.5) the middle one has cos = 1.5 / sqrt(2 * 1.5)
    weighted = vertex_loss(student, teacher, feature_weight=torch.tensor([[0.5, 1.5]]), node_weight=torch.tensor([[0.0, 3.0, 0.0]]))
    assert weighted.item() == pytest.approx(1 - 1.5 / math.sqrt(3))


def test_standardized_is_one_minus_correlation():
    student, teacher = nodes(1, seed=1), nodes(1, seed=2)
    correlation = torch.corrcoef(torch.stack([student.flatten(), teacher.flatten()]))[0, 1]
    assert vertex_loss(student, teacher, distance="standardized").item() == pytest.approx(1 - correlation.item())


def test_mse_is_the_mean():
    student, teacher = nodes(seed=1), nodes(seed=2)
    torch.testing.assert_close(vertex_loss(student, teacher, distance="mse"), torch.nn.functional.mse_loss(student, teacher))


@pytest.mark.parametrize("distance", DISTANCES)
class TestEveryDistance:
    def test_zero_at_equality(self, distance):
        x = nodes()
        x[0, 1] = 0
        assert vertex_loss(x, x, distance=distance).item() == 0

    def test_claimed_scales_change_nothing_and_others_do(self, distance):
        student, teacher = nodes(seed=1), nodes(seed=2)
        value = vertex_loss(student, teacher, distance=distance).item()
        per_node = vertex_loss(student * torch.rand(2, 5, 1, dtype=torch.float64).add(0.1), teacher, distance=distance).item()
        whole = vertex_loss(3 * student + 2, teacher, distance=distance).item()
        assert (per_node == pytest.approx(value)) == (distance == "cosine")
        assert (whole == pytest.approx(value)) == (distance == "standardized")
        shifted = vertex_loss(student + torch.rand(2, 5, 1, dtype=torch.float64), teacher, distance=distance).item()
        assert (shifted == pytest.approx(value)) == (distance == "kl")

    def test_permutations(self, distance):
        student, teacher = nodes(seed=1), nodes(seed=2)
        value = vertex_loss(student, teacher, distance=distance)
        order, features = torch.randperm(5), torch.randperm(4)
        both = vertex_loss(student[:, order][..., features], teacher[:, order][..., features], distance=distance)
        torch.testing.assert_close(both, value)
        one = vertex_loss(student.roll(1, 1), teacher, distance=distance)
        assert one.item() != pytest.approx(value.item())

    def test_ragged_is_the_mean_of_singles_and_padding_is_ignored(self, distance):
        student, teacher = nodes(3, seed=1), nodes(3, seed=2)
        mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
        weight = torch.rand(3, 5, dtype=torch.float64)
        singles = [
            vertex_loss(student[b : b + 1, :n], teacher[b : b + 1, :n], distance=distance, node_weight=weight[b : b + 1, :n])
            for b, n in ((0, 5), (1, 2))
        ]
        student, teacher = (x.masked_fill(~mask[..., None], 1e6).requires_grad_() for x in (student, 2 * teacher / 2))
        value = vertex_loss(student, teacher, mask, distance, node_weight=weight)
        torch.testing.assert_close(value, sum(singles) / 2)
        value.backward()
        assert not student.grad[~mask].any()
        assert teacher.grad is None

    def test_gradient(self, distance):
        weight = None if distance == "kl" else torch.rand(2, 4, dtype=torch.float64) + 0.5
        teacher = nodes(seed=2)
        torch.autograd.gradcheck(
            lambda x: vertex_loss(x, teacher, distance=distance, feature_weight=weight), nodes(seed=1).requires_grad_()
        )

    @pytest.mark.parametrize("degenerate", [torch.zeros(2, 5, 4), torch.full((2, 5, 4), 0.1), torch.full((2, 5, 4), 3e4)])
    def test_finite_gradient_where_nothing_varies(self, distance, degenerate):
        student = degenerate.clone().requires_grad_()
        vertex_loss(student, nodes(dtype=torch.float32), distance=distance).backward()
        assert student.grad.abs().max() < 1e5

    def test_empty_graph(self, distance):
        student = torch.zeros(2, 0, 4, requires_grad=True)
        value = vertex_loss(student, torch.zeros(2, 0, 4), distance=distance)
        assert value.item() == 0
        value.backward()

    def test_float32_under_autocast(self, distance):
        student, teacher = nodes(dtype=torch.float32, seed=1), nodes(dtype=torch.float32, seed=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = vertex_loss(student, teacher, distance=distance)
        assert torch.equal(value, vertex_loss(student, teacher, distance=distance))
        assert vertex_loss(student.bfloat16(), teacher.bfloat16(), distance=distance).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-18, 1e-14, 1e-6, 1e18, 1e30])
def test_standardized_features_may_be_tiny_or_huge(scale):
    student, teacher = nodes(dtype=torch.float32, seed=1), nodes(dtype=torch.float32, seed=2)
    value = vertex_loss(student, teacher, distance="standardized")
    scaled = (scale * student).requires_grad_()
    outcome = vertex_loss(scaled, teacher, distance="standardized")
    outcome.backward()
    torch.testing.assert_close(outcome, value)
    assert scaled.grad.isfinite().all()
    assert scaled.grad.abs().sum() > 0
    torch.testing.assert_close(vertex_loss(student, scale * teacher, distance="standardized"), value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_of_channel_nodes_is_channel_wise_distillation(temperature):
    student, teacher = (torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    build = GraphBuilder(ChannelNodes(), KNNEdges(k=2))
    student.requires_grad_()
    value = VertexLoss(distance="kl", temperature=temperature)(build(student), build(teacher))
    expected = CWDLoss(temperature)(student, teacher)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (value, expected)]
    torch.testing.assert_close(*gradients)


def test_kl_is_guided_by_nodes_alone():
    student, teacher = graph(0), graph(1)
    x, y = student.x.view(3, 9, 4), teacher.x.view(3, 9, 4)
    expected = vertex_loss(x, y, distance="kl", node_weight=node_attention(y, 0.5), temperature=2.0)
    torch.testing.assert_close(VertexLoss(0.5, "kl", temperature=2.0)(student, teacher), expected)
    with pytest.raises(ValueError, match="Expected feature_weight=None with distance='kl'"):
        vertex_loss(x, y, distance="kl", feature_weight=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"Expected a temperature above 0 \(got 0\)"):
        VertexLoss(distance="kl", temperature=0)


def graph(seed=0, k=2):
    features = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    return GraphBuilder(PatchNodes(), KNNEdges(k=k))(features)


def test_guidance_is_the_attention_of_the_teacher():
    student, teacher = graph(0), graph(1)
    other = teacher.x.view(3, 9, 4)
    expected = vertex_loss(
        student.x.view(3, 9, 4), other, node_weight=node_attention(other, 0.5), feature_weight=feature_attention(other, 0.5)
    )
    torch.testing.assert_close(VertexLoss(guidance=0.5)(student, teacher), expected)
    assert VertexLoss(guidance=0.5)(student, teacher).item() != pytest.approx(VertexLoss()(student, teacher).item(), rel=1e-3)


def test_infinite_guidance_is_none():
    student, teacher = graph(0), graph(1)
    assert torch.equal(VertexLoss(guidance=float("inf"))(student, teacher), VertexLoss()(student, teacher))
    torch.testing.assert_close(VertexLoss(guidance=1e6)(student, teacher), VertexLoss()(student, teacher))


def test_ragged_graphs():
    graphs = list(fixture_graphs().values())
    others = [graph.clone() for graph in graphs]
    for other in others:
        other.x = other.x.flip(0) + 0.1
    singles = [VertexLoss(0.5)(a, b) for a, b in zip(graphs, others, strict=True)]
    value = VertexLoss(0.5)(Batch.from_data_list(graphs), Batch.from_data_list(others))
    torch.testing.assert_close(value, torch.stack(singles).mean())


@pytest.mark.parametrize(
    "conv", [RelationalConv("feature"), RelationalConv("difference", hops=2), RelationalConv("distance"), RelationalConv("cosine")]
)
@pytest.mark.parametrize("distance", MESSAGE_DISTANCES)
def test_messages_are_those_of_the_convolution(conv, distance):
    student, teacher = graph(0), graph(1)
    heard = [conv(g.x, g.edge_index, g.edge_weight).view(3, 9, -1) for g in (student, teacher)]
    torch.testing.assert_close(MessageLoss(conv, distance)(student, teacher), vertex_loss(*heard, distance=distance))
    assert MessageLoss(conv, distance)(student, student).item() == 0


@pytest.mark.parametrize(
    "conv",
    [
        RelationalConv("feature", hops=3),
        RelationalConv("feature", normalize=False),
        RelationalConv("feature", in_channels=4, out_channels=6),
        RelationalConv("feature", hops=2, in_channels=4, out_channels=2, normalize=False),
    ],
)
@pytest.mark.parametrize("edges", [KNNEdges(k=2, symmetrize=None), CompleteEdges(self_loops=True, nonnegative=True)])
def test_dense_messages_equal_sparse_ones(conv, edges):
    features = torch.randn(2, 4, 3, 3)
    features[0, :, 0, 0] = -1  # a node without an edge, once clipped
    student, teacher = (GraphBuilder(PatchNodes(), edges)(x) for x in (features, features.flip(0)))
    heard = [conv(g.x, g.edge_index, g.edge_weight).view(2, 9, -1) for g in (student, teacher)]
    torch.testing.assert_close(MessageLoss(conv, "mse")(student, teacher), vertex_loss(*heard, distance="mse"))


def test_large_graphs_go_by_the_convolution(monkeypatch):
    monkeypatch.setattr("gkd.losses.vertices.LARGEST_DENSE", 4)
    monkeypatch.setattr(RelationalConv, "dense", None)
    assert MessageLoss()(graph(0), graph(0)).item() == 0


def test_messages_without_width_compare_unequal_widths():
    student, teacher = path_graph(5), path_graph(5)
    teacher.x = torch.randn(5, 7)
    for relation in ("distance", "cosine"):
        loss = MessageLoss(RelationalConv(relation))
        assert not loss.matched_features
        assert torch.isfinite(loss(student, teacher))
    assert MessageLoss().matched_features
    with pytest.raises(ValueError, match=r"Expected equal features .* send the student's map through a ChannelAdapter"):
        MessageLoss()(student, teacher)
    with pytest.raises(ValueError, match=r"Expected equal features .*student \[1, 5, 3\], teacher \[1, 5, 7\]"):
        VertexLoss()(student, teacher)


def test_learned_messages_get_a_gradient_and_the_teacher_none():
    loss = MessageLoss(RelationalConv("feature", in_channels=4, out_channels=3))
    student, teacher = graph(0), graph(1)
    teacher.x.requires_grad_()
    teacher.edge_weight.requires_grad_()
    student.x.requires_grad_()
    student.edge_weight.requires_grad_()
    loss(student, teacher).backward()
    assert loss.conv.lin.weight.grad.abs().sum() > 0
    assert student.x.grad.abs().sum() > 0
    assert student.edge_weight.grad.abs().sum() > 0
    assert teacher.x.grad is None
    assert teacher.edge_weight.grad is None


@pytest.mark.parametrize("loss", [VertexLoss(0.5), MessageLoss(), MessageLoss(RelationalConv())])
def test_unmatched_nodes_are_an_error(loss):
    with pytest.raises(ValueError, match=r"node i being node i \(got student \[1, 4\], teacher \[1, 5\]\): .*ChannelAdapter"):
        loss(path_graph(4), path_graph(5))


@pytest.mark.parametrize("loss", [VertexLoss(), MessageLoss()])
def test_one_graph_is_a_batch_of_one(loss):
    first, second = path_graph(4), path_graph(4)
    second.x = second.x.flip(0)
    batches = [Batch.from_data_list([g]) for g in (first, second)]
    torch.testing.assert_close(loss(first, second), loss(*batches))
    assert isinstance(first, Data)


def test_unknown_distance():
    with pytest.raises(ValueError, match=r"Expected 'distance' to be one of cosine, standardized, mse, kl \(got 'l1'\)"):
        VertexLoss(distance="l1")
    with pytest.raises(ValueError, match=r"Expected 'distance' to be one of cosine, standardized, mse \(got 'kl'\)"):
        MessageLoss(distance="kl")
    with pytest.raises(ValueError, match="Expected 'distance'"):
        vertex_loss(nodes(), nodes(), distance="l1")


@pytest.mark.parametrize("hops", [1, 2])
def test_weights_that_all_but_vanish_are_heard_as_nothing(hops):
    """1 / 1e-42 is infinite in float32, and an infinity times a message that underflowed is NaN."""
    graph = Batch.from_data_list([path_graph(4)])
    graph.x = torch.rand(4, 3, requires_grad=True)
    graph.edge_weight = torch.full((graph.num_edges,), 1e-42)
    teacher = Batch.from_data_list([path_graph(4)])
    teacher.x = torch.rand(4, 3)
    loss = MessageLoss(RelationalConv("feature", hops=hops))(graph, teacher)
    loss.backward()
    assert loss.isfinite()
    assert graph.x.grad.isfinite().all()
