from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch

from gkd.graphs.attention import AttentionEdges
from gkd.graphs.builder import GraphBuilder
from gkd.graphs.edges import CompleteEdges, KNNEdges
from gkd.graphs.encodings import HeatKernelEncoding, LaplacianEncoding
from gkd.graphs.message import RelationalConv
from gkd.graphs.nodes import ChannelNodes, InstanceNodes, PatchNodes, RegionNodes
from gkd.graphs.spectral import Spectrum
from gkd.graphs.stages import StageGraph
from gkd.graphs.testing import fixture_features
from gkd.losses import EdgeLoss, EncodingLoss, GraphLoss, MessageLoss, SpectralLoss, VertexLoss

NODES = {"channels": ChannelNodes(), "patches": PatchNodes(), "instances": InstanceNodes()}


def four():
    return {"vertex": VertexLoss(0.5), "edge": EdgeLoss(guidance=0.5), "spectral": SpectralLoss(num_eig=3), "message": MessageLoss()}


def maps(seed=0, batch=5, channels=6, size=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Spy(nn.Module):
    """Keeps what a term is given."""

    matched_nodes = matched_features = False

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, student, teacher):
        self.seen.append((student, teacher))
        return student.graph.x.sum() * 0


class CountedBuilder(GraphBuilder):
    calls = 0

    def view(self, *args, **kwargs):
        self.calls += 1
        return super().view(*args, **kwargs)


@pytest.mark.parametrize("topology", ["teacher", "student", "each"])
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES.keys())
def test_zero_at_equality_and_gradient_to_the_student_only(nodes, topology):
    loss = GraphLoss(GraphBuilder(nodes, KNNEdges(k=2)), four(), topology=topology)
    student, teacher = maps(0).requires_grad_(), maps(1).requires_grad_()
    assert all(value.item() == pytest.approx(0, abs=1e-6) for value in loss(student, student).values())
    values = loss(student, teacher)
    assert list(values) == ["vertex", "edge", "spectral", "message"]
    for name, value in values.items():
        assert value.item() > 1e-3
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
    sum(values.values()).backward()
    assert teacher.grad is None


def test_every_graph_is_built_once_and_seen_by_all_terms():
    builder, spies = CountedBuilder(PatchNodes(), KNNEdges(k=2)), {"first": Spy(), "second": Spy()}
    GraphLoss(builder, spies)(maps(0), maps(1))
    assert builder.calls == 2
    assert spies["first"].seen[0] == spies["second"].seen[0]
    assert all(isinstance(view, Spectrum) for view in spies["first"].seen[0])


def test_terms_equal_those_of_graphs_built_apart():
    builder, terms = GraphBuilder(ChannelNodes(), KNNEdges(k=2)), four()
    student, teacher = maps(0), maps(1)
    values = GraphLoss(builder, terms)(student, teacher)
    other = builder(teacher, static=True)
    own = builder(student, topology=other)
    for name, term in terms.items():
        torch.testing.assert_close(values[name], term(own, other))


def test_topologies():
    def edges(topology):
        spy = Spy()
        GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2)), {"spy": spy}, topology=topology)(maps(0), maps(1))
        return tuple(view.graph for view in spy.seen[0])

    own, other = edges("each")
    assert not torch.equal(own.edge_index, other.edge_index)
    for topology, kept in (("teacher", other), ("student", own)):
        student, teacher = edges(topology)
        assert student.edge_index is teacher.edge_index
        assert torch.equal(student.edge_index, kept.edge_index)
        assert torch.equal(student.x, own.x)
        assert not torch.equal(student.edge_weight, teacher.edge_weight)


def test_teacher_builder():
    spy = Spy()
    loss = GraphLoss(
        GraphBuilder(PatchNodes(), KNNEdges(k=1)), {"spy": spy}, "each", teacher_builder=GraphBuilder(PatchNodes(), KNNEdges(k=3))
    )
    loss(maps(0), maps(1))
    assert [view.graph.num_edges for view in spy.seen[0]] == [5 * 9 * 2, 5 * 9 * 6]


def test_teacher_is_built_without_gradient_also_through_a_learned_builder():
    spy = Spy()
    builder = GraphBuilder(PatchNodes(), AttentionEdges(k=3, in_channels=6))
    loss = GraphLoss(builder, {"spy": spy, "edge": EdgeLoss()})
    loss(maps(0), maps(1).requires_grad_())["edge"].backward()
    student, teacher = (view.graph for view in spy.seen[0])
    assert student.edge_weight.requires_grad
    assert not teacher.x.requires_grad
    assert not teacher.edge_weight.requires_grad
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_parts_limit_what_is_computed():
    spies = {"first": Spy(), "second": Spy()}
    builder = CountedBuilder(PatchNodes(), KNNEdges(k=2))
    loss = GraphLoss(builder, spies)
    assert loss.parts == ("first", "second")
    assert list(loss(maps(0), maps(1), parts=["second"])) == ["second"]
    assert not spies["first"].seen
    assert loss(maps(0), maps(1), parts=[]) == {}
    assert builder.calls == 2
    with pytest.raises(ValueError, match=r"Expected 'parts' among first, second \(got 'third'\)"):
        loss(maps(0), maps(1), parts=["third"])


@pytest.mark.parametrize(
    ("nodes", "terms", "expected"),
    [
        ("channels", {"vertex": VertexLoss()}, True),
        ("channels", {"edge": EdgeLoss()}, True),
        ("channels", {"spectral": SpectralLoss("residual")}, True),
        ("channels", {"spectral": SpectralLoss("spectrum")}, False),
        ("channels", {"trace": SpectralLoss("heat", kernel="trace"), "spectrum": SpectralLoss("spectrum")}, False),
        ("channels", {"spectral": SpectralLoss("spectrum"), "edge": EdgeLoss()}, True),
        ("patches", {"vertex": VertexLoss()}, True),
        ("patches", {"edge": EdgeLoss(), "spectral": SpectralLoss("projector")}, False),
        ("patches", {"message": MessageLoss()}, True),
        ("patches", {"message": MessageLoss(RelationalConv("cosine"))}, False),
        ("instances", {"edge": EdgeLoss("kl")}, False),
        ("instances", {"unknown": nn.Identity()}, True),
    ],
)
def test_matched_channels_is_derived(nodes, terms, expected):
    builder = GraphBuilder(NODES[nodes], KNNEdges(k=2))
    assert GraphLoss(builder, terms).matched_channels is expected
    assert GraphLoss(builder, terms, matched_channels=not expected).matched_channels is not expected


@pytest.mark.parametrize("nodes", ["patches", "instances"])
def test_relations_compare_unequal_widths(nodes):
    terms = {
        "edge": EdgeLoss(),
        "heat": SpectralLoss("heat"),
        "residual": SpectralLoss(num_eig=2),
        "message": MessageLoss(RelationalConv("distance")),
    }
    loss = GraphLoss(GraphBuilder(NODES[nodes], KNNEdges(k=2)), terms)
    assert all(value.isfinite() for value in loss(maps(0, channels=4), maps(1, channels=9)).values())


def test_spectra_compare_unequal_numbers_of_channels():
    terms = {"trace": SpectralLoss("heat", kernel="trace"), "spectrum": SpectralLoss("spectrum")}
    loss = GraphLoss(GraphBuilder(ChannelNodes(grid=2), KNNEdges(k=2)), terms, topology="each")
    student = maps(0, channels=4).requires_grad_()
    values = loss(student, maps(1, channels=9, size=4))
    sum(values.values()).backward()
    assert student.grad.abs().sum() > 0


def test_unequal_sizes_are_explained():
    builder = GraphBuilder(ChannelNodes(), KNNEdges(k=2))
    with pytest.raises(ValueError, match=r"node i being node i \(got student \[5, 4\], teacher \[5, 9\]\): .*ChannelAdapter"):
        GraphLoss(builder, {"edge": EdgeLoss()}, topology="each")(maps(0, channels=4), maps(1, channels=9))
    with pytest.raises(ValueError, match=r"Expected equal features .*student \[5, 6, 4\], teacher \[5, 6, 9\].*common grid"):
        GraphLoss(builder, {"vertex": VertexLoss()})(maps(0, size=2), maps(1))
    with pytest.raises(ValueError, match=r"Expected equally many channels .*got student 4, teacher 9.*topology='each'"):
        GraphLoss(builder, {"spectrum": SpectralLoss("spectrum")})(maps(0, channels=4), maps(1, channels=9))


def test_empty_batch():
    student = torch.zeros(0, 6, 3, 3, requires_grad=True)
    values = GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2)), four())(student, torch.zeros(0, 6, 3, 3))
    assert all(value.item() == 0 for value in values.values())
    sum(values.values()).backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("case", fixture_features())
@pytest.mark.parametrize("nodes", ["channels", "patches"])
def test_finite_gradient_at_degenerate_maps(case, nodes):
    features = fixture_features()
    terms = {
        **four(),
        "heat": SpectralLoss("heat"),
        "projector": SpectralLoss("projector"),
        "kl": EdgeLoss("kl"),
        "spectrum": SpectralLoss("spectrum"),
    }
    loss = GraphLoss(GraphBuilder(NODES[nodes], KNNEdges(k=2)), terms)
    for teacher in (features["signed"], features[case]):
        student = features[case].clone().requires_grad_()
        for value in loss(student, teacher).values():
            (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
            assert value.isfinite()
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e6


def test_float32_under_autocast():
    loss = GraphLoss(GraphBuilder(ChannelNodes(), KNNEdges(k=2)), four())
    student, teacher = maps(0).bfloat16(), maps(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = loss(student, teacher)
    expected = loss(student.float(), teacher.float())
    assert {name: value.item() for name, value in values.items()} == {name: value.item() for name, value in expected.items()}
    assert all(value.dtype == torch.float32 for value in values.values())


def corner(features, rois, output_size, spatial_scale):
    """Reads the pixel at a box's upper left corner."""
    image, x, y = rois[:, 0].long(), rois[:, 1].long(), rois[:, 2].long()
    return features[image, :, y, x][:, :, None, None].expand(-1, -1, *output_size)


def test_regions():
    loss = GraphLoss(GraphBuilder(RegionNodes(corner), CompleteEdges()), {"vertex": VertexLoss(0.5), "edge": EdgeLoss()})
    assert loss.needs_boxes
    assert not GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2)), four()).needs_boxes
    boxes = [torch.tensor([[0.0, 0, 4, 4], [8, 8, 12, 12], [4, 4, 8, 12]]), torch.zeros(0, 4), torch.tensor([[0.0, 4, 4, 8]])]
    student = maps(0, batch=3).requires_grad_()
    values = loss(student, maps(1, batch=3), boxes=boxes, image_size=(12, 12))
    single = loss(student[:1], maps(1, batch=3)[:1], boxes=boxes[:1], image_size=(12, 12))
    alone = loss(student[2:], maps(1, batch=3)[2:], boxes=boxes[2:], image_size=(12, 12))
    for name, value in values.items():  # the image without a box does not count
        torch.testing.assert_close(value, (single[name] + alone[name]) / 2)
    sum(values.values()).backward()
    assert student.grad[0].abs().sum() > 0


@pytest.mark.parametrize("topology", ["teacher", "student", "each"])
def test_no_box_in_the_whole_batch(topology):
    terms = {
        **four(),
        "kl": EdgeLoss("kl", guidance=0.5),
        "encoding": EncodingLoss(HeatKernelEncoding()),
        "eigenvectors": EncodingLoss(LaplacianEncoding(), "mse", "rotation"),
        **{form: SpectralLoss(form) for form in ("projector", "heat", "spectrum")},
    }
    loss = GraphLoss(GraphBuilder(RegionNodes(corner), CompleteEdges()), terms, topology)
    student = maps(0, batch=3).requires_grad_()
    values = loss(student, maps(1, batch=3), boxes=[torch.zeros(0, 4)] * 3, image_size=(12, 12))
    assert {name: value.item() for name, value in values.items()} == dict.fromkeys(terms, 0.0)
    sum(values.values()).backward()
    assert not student.grad.any()


def test_a_batch_is_the_mean_of_its_graphs():
    loss = GraphLoss(GraphBuilder(ChannelNodes(), KNNEdges(k=2)), four())
    student, teacher = maps(0), maps(1)
    singles = [loss(student[b : b + 1], teacher[b : b + 1]) for b in range(5)]
    for name, value in loss(student, teacher).items():
        torch.testing.assert_close(value, torch.stack([single[name] for single in singles]).mean(), rtol=1e-4, atol=1e-6)


def test_graphs_are_batches_of_pyg():
    loss = GraphLoss(GraphBuilder(ChannelNodes(), KNNEdges(k=2)), four())
    assert all(isinstance(graph, Batch) for graph in loss.graphs(maps(0), maps(1)))


def test_bad_options():
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=2))
    with pytest.raises(ValueError, match=r"Expected 'topology' to be one of teacher, student, each \(got 'both'\)"):
        GraphLoss(builder, four(), topology="both")
    with pytest.raises(ValueError, match="Expected at least one term"):
        GraphLoss(builder, {})


@pytest.mark.parametrize("topology", ["teacher", "student", "each"])
def test_stages_as_one_graph(topology):
    builders = {stage: GraphBuilder(ChannelNodes(grid=2), KNNEdges(k=2)) for stage in ("low", "high")}
    loss = GraphLoss(StageGraph(builders), {**four(), "kl": EdgeLoss("kl")}, topology)
    assert loss.level == "stages"
    assert loss.matched_channels
    assert loss.map_size is None
    student = {"low": maps(0).requires_grad_(), "high": maps(1, size=2).requires_grad_()}
    teacher = {"low": maps(2), "high": maps(3, size=2)}
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in loss(student, student).values())
    values = loss(student, teacher)
    assert list(values) == ["vertex", "edge", "spectral", "message", "kl"]
    sum(values.values()).backward()
    assert all(features.grad.abs().sum() > 0 for features in student.values())
    graph, _ = loss.graphs(student, teacher)
    assert graph.stage[:12].tolist() == [0] * 6 + [1] * 6
    if topology != "each":
        with pytest.raises(ValueError, match=r"Expected equally many channels .*got student 6, teacher 9"):
            loss(student, {"low": maps(2), "high": maps(3, channels=9, size=2)})


def test_stages_of_relations_need_no_equal_channels():
    builders = {stage: GraphBuilder(PatchNodes(), KNNEdges(k=2)) for stage in ("low", "high")}
    loss = GraphLoss(StageGraph(builders), {"edge": EdgeLoss()})
    assert not loss.matched_channels
    values = loss({"low": maps(0), "high": maps(1, size=2)}, {"low": maps(2, channels=9), "high": maps(3, channels=9, size=2)})
    assert values["edge"].isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("nodes", ["channels", "patches", "instances"])
def test_diverged_features_give_nan(nodes, bad):
    """A training stops on NaN with the step, the loss and advice; a ValueError of the graphs would say none of it."""
    loss = GraphLoss(GraphBuilder(NODES[nodes], KNNEdges(k=2)), four())
    student = maps(0)
    student[0, 0, 0, 0] = bad
    values = loss(student.requires_grad_(), maps(1), parts=["edge", "spectral"])
    assert list(values) == ["edge", "spectral"]
    assert all(value.isnan() and value.requires_grad for value in values.values())


def test_what_is_wrong_with_the_teacher_is_an_error():
    teacher = maps(1)
    teacher[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected finite features"):
        GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2)), four())(maps(0), teacher)


class TestEncodingsThatNobodyReads:
    def loss(self, encoding=None, own=None):
        builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=encoding)
        return GraphLoss(builder, {"edge": EdgeLoss(), "encoding": EncodingLoss(own)})

    def test_of_the_builder(self):
        self.loss(HeatKernelEncoding()).check_parts(["edge", "encoding"])
        self.loss().check_parts(["edge"])
        message = r"Expected an EncodingLoss without an encoding of its own .* \(got HeatKernelEncoding, and terms edge"
        with pytest.raises(ValueError, match=message):
            self.loss(HeatKernelEncoding()).check_parts(["edge"])
        with pytest.raises(ValueError, match=message):
            self.loss(HeatKernelEncoding(), LaplacianEncoding()).check_parts(["edge", "encoding"])

    def test_of_the_loss(self):
        self.loss(own=HeatKernelEncoding()).check_parts(["encoding"])
        with pytest.raises(ValueError, match=r"Expected a weight above 0 of 'encoding', whose EncodingLoss is given an encoding \(got 0\)"):
            self.loss(own=HeatKernelEncoding()).check_parts(["edge"])

    def test_of_a_builder_whose_reader_is_unknown(self):
        builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=HeatKernelEncoding())
        GraphLoss(builder, {"mine": nn.Identity()}).check_parts(["mine"])


class Shapes(TorchDispatchMode):
    """Collects the shapes of all that is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.seen.update(tuple(x.shape) for x in (output if isinstance(output, tuple) else [output]) if isinstance(x, torch.Tensor))
        return output


class TestCompleteChannelGraphs:
    """24 channels of 3 x 3 pixels: their adjacencies have a factor of 9 columns."""

    def maps(self, seed):
        return torch.rand(2, 24, 3, 3, generator=torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize(("self_loops", "dense_terms"), [(True, set()), (False, {"spectral"})])
    @pytest.mark.parametrize("name", ["vertex", "edge", "spectral", "message"])
    def test_no_adjacency_and_no_edge_is_written_down(self, name, self_loops, dense_terms):
        edges = CompleteEdges(self_loops=self_loops, nonnegative=True)  # no value is looked at while shapes are watched
        loss = GraphLoss(GraphBuilder(ChannelNodes(), edges), four())
        student = self.maps(0).requires_grad_()
        with Shapes() as shapes:
            loss(student, self.maps(1), parts=[name])[name].backward()
        assert student.grad.abs().sum() > 0
        # only the exact eigenpairs of the teacher's small graphs need their Laplacian
        assert any(shape[-2:] == (24, 24) for shape in shapes.seen) == (name in dense_terms)
        assert not any(2 * 24 * 23 in shape or 2 * 24 * 24 in shape for shape in shapes.seen)

    @pytest.mark.parametrize("self_loops", [True, False])
    @pytest.mark.parametrize("topology", ["teacher", "each"])
    def test_values_are_those_of_the_written_graphs(self, self_loops, topology):
        terms = {**four(), "kl": EdgeLoss("kl", guidance=0.5), "smooth": EdgeLoss("smooth_l1"), "plain": EdgeLoss()}
        loss = GraphLoss(GraphBuilder(ChannelNodes(), CompleteEdges(self_loops=self_loops)), terms, topology)
        student, teacher = self.maps(0), self.maps(1)
        student[0, 3], teacher[0, 5], teacher[1, :2] = 0, 0, 0  # dead channels
        student.requires_grad_()
        values = loss(student, teacher)
        graphs = [graph.clone() for graph in loss.graphs(student, teacher)]
        for graph in graphs:
            for attribute in ("factor", "loopless_factor"):
                if attribute in graph:
                    del graph[attribute]
        views = [Spectrum(graph, edges=loss.builder.edges) for graph in graphs]
        assert all(view.lowrank is None for view in views)
        for name, term in loss.terms.items():
            expected = term(*views)
            torch.testing.assert_close(values[name], expected, rtol=1e-4, atol=1e-6, msg=name)
            gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (values[name], expected)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6, msg=name)
