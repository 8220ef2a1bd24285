from __future__ import annotations

import math

import pytest
import torch
from torch_geometric.data import Batch, Data

from gkd.graphs.attention import AttentionEdges
from gkd.graphs.builder import GraphBuilder
from gkd.graphs.dense import to_dense
from gkd.graphs.edges import CompleteEdges, KNNEdges, RadiusEdges
from gkd.graphs.nodes import InstanceNodes, PatchNodes
from gkd.graphs.testing import fixture_graphs, path_graph
from gkd.losses import EdgeLoss, GraphLoss, adjacency_loss, edge_loss, node_attention

DISTANCES = ["mse", "smooth_l1", "kl"]
PAIR = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2]])  # 0 - 1 - 2
MASK = torch.ones(1, 3, dtype=torch.bool)


def reweigh(graph, seed=3):
    """The same edges, other weights."""
    other = graph.clone()
    other.edge_index = graph.edge_index
    generator = torch.Generator().manual_seed(seed)
    other.edge_weight = graph.edge_weight * torch.rand(graph.edge_weight.shape, generator=generator, dtype=graph.edge_weight.dtype).add(0.1)
    return other


def graph(seed=0, edges=None, dtype=torch.float32):
    features = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return GraphBuilder(PatchNodes(), edges or KNNEdges(k=3))(features, static=True)


def test_hand_values():
    teacher = torch.tensor([1.0, 1.0, 0.5, 0.5])
    student = torch.tensor([0.5, 0.5, 0.45, 0.45])
    # four edges with the squared differences 0.25, 0.25, 0.0025, 0.0025
    assert edge_loss(student, teacher, PAIR, MASK).item() == pytest.approx(0.505 / 4)
    # beyond 0.1 linear, |d| - 0.05; below d^2 / 0.2
    assert edge_loss(student, teacher, PAIR, MASK, distance="smooth_l1").item() == pytest.approx((2 * 0.45 + 2 * 0.0125) / 4)
    # w = (2, 1, 0): edges between 0 and 1 weigh 2, between 1 and 2 nothing
    weighted = edge_loss(student, teacher, PAIR, MASK, node_weight=torch.tensor([2.0, 1.0, 0.0]))
    assert weighted.item() == pytest.approx(2 * 0.5 / 4)


def test_kl_by_hand():
    teacher = torch.tensor([1.0, 0.1, 0.2, 1.0])
    student = torch.tensor([0.3, 0.1, 0.2, 0.9])
    # nodes 0 and 2 hear one neighbour each, which has all their attention; node 1 hears 0 by 1.0 against 0.3 and 2 by 0.2
    p, q = (1 / (1 + math.exp(-(a - 0.2) / 0.5)) for a in (1.0, 0.3))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert edge_loss(student, teacher, PAIR, MASK, distance="kl", temperature=0.5).item() == pytest.approx(divergence / 3, rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
class TestEveryDistance:
    def test_zero_at_equality(self, distance):
        assert EdgeLoss(distance)(graph(), graph()).item() == pytest.approx(0, abs=1e-7)
        same = graph()
        assert EdgeLoss(distance)(same, same).item() == 0

    def test_complete_graphs_agree_edge_by_edge_and_dense(self, distance):
        teacher = graph(0, CompleteEdges())
        student = reweigh(teacher)
        shared = EdgeLoss(distance, guidance=0.7)(student, teacher)
        student.edge_index = student.edge_index.clone()
        torch.testing.assert_close(EdgeLoss(distance, guidance=0.7)(student, teacher), shared)

    def test_fillers_and_the_order_of_edges_have_no_influence(self, distance):
        teacher = graph(0, KNNEdges(k=3, symmetrize="mutual"))
        student = reweigh(teacher)
        assert (teacher.edge_index[0] == teacher.edge_index[1]).any()
        mask = torch.ones(3, 9, dtype=torch.bool)
        batch = teacher.batch
        real = teacher.edge_index[0] != teacher.edge_index[1]
        value = EdgeLoss(distance)(student, teacher)
        short = edge_loss(student.edge_weight[real], teacher.edge_weight[real], teacher.edge_index[:, real], mask, batch, distance)
        torch.testing.assert_close(value, short)
        poisoned = student.edge_weight.masked_fill(~real, 1e6)
        torch.testing.assert_close(edge_loss(poisoned, teacher.edge_weight, teacher.edge_index, mask, None, distance), value)
        order = torch.randperm(len(real))
        shuffled = (student.edge_weight[order], teacher.edge_weight[order], teacher.edge_index[:, order])
        torch.testing.assert_close(edge_loss(*shuffled, mask, batch, distance), value)

    def test_permuting_both_changes_nothing_and_one_does(self, distance):
        A, mask = to_dense(graph(0, CompleteEdges()))
        other, _ = to_dense(graph(1, CompleteEdges()))
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        value = adjacency_loss(A, other, mask, distance)
        torch.testing.assert_close(adjacency_loss(A[:, order][:, :, order], other[:, order][:, :, order], mask, distance), value)
        assert adjacency_loss(A[:, order][:, :, order], other, mask, distance).item() != pytest.approx(value.item(), rel=1e-3)

    def test_ragged_is_the_mean_of_singles(self, distance):
        teachers = list(fixture_graphs().values())
        students = [reweigh(teacher) for teacher in teachers]
        singles = [EdgeLoss(distance, guidance=0.5)(a, b) for a, b in zip(students, teachers, strict=True)]
        student, teacher = Batch.from_data_list(students), Batch.from_data_list(teachers)
        apart = EdgeLoss("mse", guidance=0.5)(student, teacher)  # two edge lists: dense
        student.edge_index = teacher.edge_index
        shared = EdgeLoss(distance, guidance=0.5)(student, teacher)
        torch.testing.assert_close(shared, torch.stack(singles).mean())
        if distance == "mse":
            torch.testing.assert_close(apart, shared)

    def test_value_does_not_grow(self, distance):
        teacher = path_graph(6)
        student = reweigh(teacher)
        doubled = [Batch.from_data_list([g, g]) for g in (student, teacher)]
        A, mask = to_dense(doubled[0])
        B, _ = to_dense(doubled[1])
        torch.testing.assert_close(adjacency_loss(A, B, mask, distance), adjacency_loss(A[:1], B[:1], mask[:1], distance))

    def test_gradients(self, distance):
        teacher = graph(0, dtype=torch.float64)
        mask = torch.ones(3, 9, dtype=torch.bool)
        weight = reweigh(teacher).edge_weight.requires_grad_()
        other = teacher.edge_weight.clone().requires_grad_()
        index = teacher.edge_index
        torch.autograd.gradcheck(lambda a: edge_loss(a, other, index, mask, None, distance, 0.3), weight)
        A, B = (torch.rand(2, 3, 3, dtype=torch.float64) for _ in range(2))
        torch.autograd.gradcheck(lambda a: adjacency_loss(a, B, mask[:2, :3], distance, 0.3), A.requires_grad_())
        edge_loss(weight, other, index, mask, None, distance).backward()
        assert other.grad is None
        assert weight.grad.abs().sum() > 0

    def test_graphs_without_edges_or_nodes(self, distance):
        weight = torch.zeros(0, requires_grad=True)
        value = edge_loss(weight, torch.zeros(0), torch.zeros(2, 0, dtype=torch.long), MASK, torch.zeros(3, dtype=torch.long), distance)
        assert value.item() == 0
        value.backward()
        A = torch.zeros(2, 3, 3, requires_grad=True)
        value = adjacency_loss(A, torch.zeros(2, 3, 3), torch.tensor([[True] * 3, [False] * 3]), distance)
        value.backward()
        assert value.item() == 0
        assert A.grad.isfinite().all()

    def test_float32_under_autocast(self, distance):
        student, teacher = graph(0), graph(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = EdgeLoss(distance, guidance=0.5)(student, teacher)
        assert torch.equal(value, EdgeLoss(distance, guidance=0.5)(student, teacher))


def one_edge(n):
    """A teacher with the edge 0 - 1 alone, and a student that relates all pairs."""
    teacher = torch.zeros(1, n, n)
    teacher[0, 0, 1] = teacher[0, 1, 0] = 0.5
    return torch.ones(1, n, n), teacher, torch.ones(1, n, dtype=torch.bool)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_value_is_bounded_whatever_the_number_of_nodes(distance, n):
    student, teacher, mask = one_edge(n)
    expected = 0.25 if distance == "mse" else 0.45
    assert adjacency_loss(student, teacher, mask, distance).item() == pytest.approx(expected)
    edge_index = torch.ones(n, n).nonzero().T
    source, target = edge_index
    slots = edge_loss(student[0, source, target], teacher[0, source, target], edge_index, mask, None, distance)
    assert slots.item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
@pytest.mark.parametrize("edges", [KNNEdges(k=5), CompleteEdges(), CompleteEdges(self_loops=True), RadiusEdges(1.0, "cosine")])
def test_slots_of_weight_0_have_no_influence(distance, edges):
    """Half of these cosines are negative, and so are clipped to 0."""
    student, teacher = (torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student[:, :, 0, 0] = 0  # a zero row, whose self-loop weighs 0
    builder, term = GraphBuilder(PatchNodes(), edges), EdgeLoss(distance, guidance=0.5)
    values = []
    for static in (False, True):
        goal = builder(teacher, static=static)
        assert (goal.edge_weight == 0).any() == static
        values.append(term(builder(student, topology=goal), goal))
    torch.testing.assert_close(*values)
    graphs = GraphLoss(builder, {"edge": term}).graphs(student, teacher)
    torch.testing.assert_close(term(*graphs), values[0])
    graphs[0].edge_index = graphs[0].edge_index.clone()  # no longer the same edge list: compared densely
    torch.testing.assert_close(term(*graphs), values[0])


@pytest.mark.parametrize("topology", ["teacher", "each"])
@pytest.mark.parametrize("edges", [CompleteEdges(), KNNEdges(k=3)])
def test_attention_over_instances_does_not_clip_cosines(topology, edges):
    """Around their mean, six images have negative cosines nearly all."""
    student, teacher = (torch.randn(6, 16, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student.requires_grad_()
    loss = GraphLoss(GraphBuilder(InstanceNodes(center=True), edges), {"edge": EdgeLoss("kl")}, topology=topology)
    value = loss(student, teacher)["edge"]
    value.backward()
    assert value.item() > 0.05
    assert (student.grad.flatten(1).abs().sum(1) > 0).all()
    if isinstance(edges, CompleteEdges):
        student_x, teacher_x = ((x - x.mean(0)).flatten(1) for x in (student.detach(), teacher))
        logits = [torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T / 0.1 for x in (student_x, teacher_x)]
        student_log, teacher_log = (z.fill_diagonal_(float("-inf")).log_softmax(1) for z in logits)
        expected = (teacher_log.exp() * (teacher_log - student_log)).nan_to_num().sum() / 6
        torch.testing.assert_close(value.detach(), expected)


def test_other_weights_than_cosines_are_taken_as_they_are():
    student, teacher = (torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for edges in (CompleteEdges("euclidean"), AttentionEdges()):
        loss = GraphLoss(GraphBuilder(PatchNodes(), edges), {"edge": EdgeLoss("kl")})
        torch.testing.assert_close(loss(student, teacher)["edge"], EdgeLoss("kl")(*loss.graphs(student, teacher)))


def test_constant_added_to_the_weights_at_a_node_is_not_attention():
    teacher = graph(0, CompleteEdges())
    student = teacher.clone()
    student.edge_index = teacher.edge_index
    student.edge_weight = teacher.edge_weight + torch.rand(27)[teacher.edge_index[1]]
    assert EdgeLoss("kl")(student, teacher).item() == pytest.approx(0, abs=1e-6)
    assert EdgeLoss("mse")(student, teacher).item() > 0.01


def test_guidance():
    student, teacher = graph(0), graph(1)
    student.edge_index = teacher.edge_index
    weight = node_attention(teacher.x.view(3, 9, 4), 0.5).flatten()
    mask = torch.ones(3, 9, dtype=torch.bool)
    expected = edge_loss(student.edge_weight, teacher.edge_weight, teacher.edge_index, mask, node_weight=weight)
    torch.testing.assert_close(EdgeLoss(guidance=0.5)(student, teacher), expected)
    assert torch.equal(EdgeLoss(guidance=float("inf"))(student, teacher), EdgeLoss()(student, teacher))
    assert expected.item() != pytest.approx(EdgeLoss()(student, teacher).item(), rel=1e-3)


def test_edges_without_weights_weigh_one():
    first, second = path_graph(4), Data(edge_index=path_graph(4).edge_index, num_nodes=4)
    assert EdgeLoss()(first, second).item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l1"}, "'distance' to be one of mse, smooth_l1, kl"),
        ({"temperature": 0}, "a temperature above 0"),
        ({"guidance": -1}, "a guidance temperature above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        EdgeLoss(**options)


def test_mismatch_is_explained():
    with pytest.raises(ValueError, match="node i being node i"):
        EdgeLoss()(path_graph(4), path_graph(5))
    with pytest.raises(ValueError, match="Expected one weight for each of 4 edges"):
        edge_loss(torch.ones(3), torch.ones(3), PAIR, MASK)
    with pytest.raises(ValueError, match="Expected adjacencies"):
        adjacency_loss(torch.ones(1, 4, 4), torch.ones(1, 4, 4), MASK)
