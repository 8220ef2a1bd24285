from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from gkd.distill import Distiller
from gkd.graphs import CompleteEdges, GraphBuilder, InstanceNodes, KNNEdges, PatchNodes, from_dense
from gkd.losses import EdgeLoss, GraphLoss, VertexLoss
from gkd.viz import collect_views, count_confusion, draw_attention, draw_confusion, draw_graph_pair, draw_spectra, spectral_layout
from gkd.viz.collect import unnormalize
from gkd.viz.graphs import _strongest, align

PATH = torch.tensor([[0.0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
PAIRS = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])


def patches(batch=2, channels=6):
    return GraphBuilder(PatchNodes(grid=3), KNNEdges(k=2))(torch.rand(batch, channels, 6, 6))


def network(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 5))


@pytest.fixture
def distiller():
    patch = GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2)), {"vertex": VertexLoss(), "edge": EdgeLoss()})
    instance = GraphLoss(GraphBuilder(InstanceNodes(), CompleteEdges()), {"edge": EdgeLoss()}, topology="each")
    terms = {"graph": patch, "instances": instance}
    return Distiller(
        network(4), network(8), taps={"low.1": "1", "pool": "2"}, terms=terms, stages={"instances": ["pool"]}, input_size=(3, 8, 8)
    )


def test_a_path_is_laid_out_in_its_order():
    place = spectral_layout(from_dense(PATH[None]))[0, :, 0]
    assert torch.equal(place.argsort(), torch.arange(4)) or torch.equal(place.argsort(descending=True), torch.arange(4))
    assert float(place.abs().max()) == pytest.approx(1)


def test_components_and_isolated_nodes_lie_apart():
    place = spectral_layout(from_dense(PAIRS[None]))[0]
    assert float((place[:2].mean(0) - place[2:].mean(0)).norm()) > 0.5
    lonely = spectral_layout(from_dense(torch.zeros(1, 3, 3)))
    assert lonely.isfinite().all()


def test_layout_turns_with_the_nodes():
    place, order = spectral_layout(from_dense(PATH[None]))[0], torch.tensor([2, 0, 3, 1])
    moved = spectral_layout(from_dense(PATH[order][:, order][None]))[0]
    torch.testing.assert_close(moved.abs(), place[order].abs(), atol=1e-6, rtol=0)


def test_align_undoes_a_turn_and_a_mirror():
    place = torch.randn(7, 2, dtype=torch.double)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.double)
    mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.double)
    torch.testing.assert_close(align(place @ turn @ mirror, place), place)


def test_edges_in_both_directions_are_one_stroke():
    A = torch.tensor([[5.0, 1.0, 0.0], [0.5, 0.0, 0.25], [0.0, 0.25, 0.0]])
    pairs, strength = _strongest(from_dense(A[None]))
    assert pairs.tolist() == [[1, 2], [0, 1]]  # weak ones first; (1 + 0.5) / 2 = 0.75 against 0.25
    assert strength.tolist() == pytest.approx([1 / 3, 1])


def test_graph_pair_has_a_row_for_each_image():
    student, teacher = patches(), patches(channels=9)
    figure = draw_graph_pair(student, teacher, torch.rand(2, 3, 12, 12), titles=["cat", "dog"])
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 6
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cat", "student", "teacher", "dog", "", ""]
    strokes = [collection for axes in figure.axes for collection in axes.collections if isinstance(collection, LineCollection)]
    assert len(strokes) == 4
    assert all(len(collection.get_segments()) > 0 for collection in strokes)


def test_images_become_the_nodes_of_their_graph():
    graph = GraphBuilder(InstanceNodes(), CompleteEdges())(torch.rand(5, 4))
    figure = draw_graph_pair(graph, graph, torch.rand(5, 3, 8, 8))
    assert len(figure.axes) == 2
    assert len(figure.axes[0].artists) == 5


def test_graphs_of_unequal_size_and_without_edges():
    small, large = from_dense(PATH[None]), from_dense(torch.rand(1, 6, 6))
    assert len(draw_graph_pair(small, large).axes) == 2
    empty = from_dense(torch.zeros(1, 3, 3))
    assert len(draw_graph_pair(empty, empty).axes) == 2


def test_spectra_are_the_eigenvalues():
    (axes,) = draw_spectra(from_dense(PAIRS[None]), from_dense(PATH[None])).axes
    student, teacher = (line.get_ydata() for line in axes.lines)
    assert student == pytest.approx([0, 0, 2, 2], abs=1e-5)  # two components of two nodes
    assert teacher == pytest.approx([0, 0.5, 1.5, 2], abs=1e-5)  # 1 - cos(pi k / 3)


def test_attention():
    masks = {"student · a": torch.rand(4, 2, 2), "teacher · a": torch.ones(4, 8, 8)}
    figure = draw_attention(torch.rand(4, 3, 10, 12), masks, number=2)
    assert len(figure.axes) == 6
    with pytest.raises(ValueError, match=r"Expected masks \[4, h, w\] \(got \[\[3, 2, 2\]\]\)"):
        draw_attention(torch.rand(4, 3, 8, 8), {"a": torch.rand(3, 2, 2)})


def test_confusion():
    matrix = torch.tensor([[8, 2], [0, 5]])
    (axes,) = draw_confusion(matrix, ["cat", "dog"]).axes
    assert [text.get_text() for text in axes.texts] == ["8", "2", "5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]
    assert draw_confusion(torch.zeros(40, 40)).axes[0].get_xticks().size == 0
    with pytest.raises(ValueError, match=r"Expected a square matrix, and a name for each class \(got \(2, 2\) and 1 names\)"):
        draw_confusion(matrix, ["cat"])


def test_views_of_a_distiller(distiller):
    images, targets = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    distiller.train()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    views = collect_views(distiller, (images, targets, torch.arange(6)), [0.5] * 3, [0.25] * 3, list("abcde"))
    assert [pair.name for pair in views.pairs] == ["graph/low.1", "graph/pool", "instances/pool"]
    patch, _, instance = views.pairs
    assert (patch.nodes, patch.edges, patch.topology) == ("PatchNodes", "KNNEdges", "teacher")
    assert instance.topology == "each"
    assert patch.student.num_graphs == 6
    assert patch.student.num_nodes == 6 * 64
    assert instance.student.num_nodes == 6
    assert torch.equal(patch.student.edge_index, patch.teacher.edge_index)  # topology='teacher'
    assert not patch.student.x.requires_grad
    assert list(views.attention) == [f"{who} · {stage}" for stage in ("low.1", "pool") for who in ("student", "teacher")]
    # What the networks give, seen at the pooling.
    torch.testing.assert_close(views.attention["student · pool"], distiller.student[:3](images).abs().mean(1).detach())
    assert torch.equal(views.answers, distiller.student(images).argmax(1))
    torch.testing.assert_close(views.images, (images * 0.25 + 0.5).clamp(0, 1))
    assert distiller.training
    assert distiller.student[0].training
    assert distiller.student_logits is None
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


def test_views_without_stages():
    views = collect_views(Distiller(network(4)), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))
    assert not views.pairs
    assert not views.attention
    assert views.answers.shape == (2,)


def test_confusion_is_counted_in_eval_mode():
    class Answers(nn.Module):
        def forward(self, images):
            assert not self.training
            return nn.functional.one_hot(images.long(), 3)

    model = Answers().train()
    batches = [
        (torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])),
        (torch.tensor([0]), torch.tensor([1])),
        (torch.tensor([2]), torch.tensor([0])),
    ]
    assert count_confusion(model, batches, 3, max_batches=2).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert model.training


def test_images_without_statistics_are_stretched():
    shown = unnormalize(torch.tensor([-3.0, 0.0, 1.0]).view(1, 1, 1, 3))
    torch.testing.assert_close(shown.flatten(), torch.tensor([0.0, 0.75, 1.0]))
