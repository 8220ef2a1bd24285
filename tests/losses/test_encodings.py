from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch_geometric.data import Batch

from gkd.graphs import ChannelNodes, GraphBuilder, HeatKernelEncoding, KNNEdges, LaplacianEncoding, PatchNodes, RandomWalkEncoding
from gkd.graphs.encodings import AddEncoding
from gkd.graphs.testing import fixture_features, fixture_graphs, path_graph
from gkd.losses import EncodingLoss, GraphLoss, SpectralLoss, encoding_loss

OPTIONS = [("standardized", "sign"), ("cosine", "sign"), ("mse", "sign"), ("cosine", "rotation"), ("mse", "rotation")]
ENCODINGS = {
    "heat": HeatKernelEncoding(),
    "walk": RandomWalkEncoding(walk_length=4),
    "random signs": LaplacianEncoding(num_eig=3),
    "solver's signs": LaplacianEncoding(num_eig=3, sign=None),
    "absolute": LaplacianEncoding(num_eig=3, sign="abs"),
}


def encodings(batch=2, n=6, t=3, seed=0):
    return torch.randn(batch, n, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(batch=2, t=3, seed=7):
    return torch.linalg.qr(encodings(batch, t, t, seed))[0]


def maps(seed=0, batch=3, channels=6, size=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def slowly(student, teacher, mask, distance, alignment):
    """One graph after the other, in NumPy and SciPy."""
    values = []
    for own, other, exists in zip(student.numpy(), teacher.numpy(), mask.numpy(), strict=True):
        own, other = own[exists], other[exists]
        if alignment == "rotation":
            own = own @ orthogonal_procrustes(own, other)[0]
        else:
            own = np.stack([min(a, -a, key=lambda c: ((c - b) ** 2).sum()) for a, b in zip(own.T, other.T, strict=True)], axis=1)
        if distance == "mse":
            values.append(((own - other) ** 2).mean())
        elif distance == "cosine":
            values.append(np.mean([1 - a @ b / math.sqrt(a @ a * (b @ b)) for a, b in zip(own, other, strict=True)]))
        else:
            values.append(np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, other.T, strict=True)]))
    return np.mean(values)


def test_by_hand():
    student, teacher = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[3.0], [2.0], [1.0]]])
    assert encoding_loss(student, teacher).item() == pytest.approx(2)  # 3 + 4 + 3 > 0: as it is, and the correlation is -1
    assert encoding_loss(student, teacher, distance="mse").item() == pytest.approx(8 / 3)  # 4, 0, 4
    # (1, 0, -1) and -(1, 1, -1): turned around, 0, 1, 0.
    assert encoding_loss(
        torch.tensor([[[1.0], [0.0], [-1.0]]]), torch.tensor([[[-1.0], [-1.0], [1.0]]]), distance="mse"
    ).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("distance", "alignment"), OPTIONS)
def test_slow_version_with_poisoned_padding(distance, alignment):
    student, teacher = encodings(3, seed=0), encodings(3, seed=1)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 5 + [False]])
    expected = slowly(student, teacher, mask, distance, alignment)
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    assert encoding_loss(student, teacher, mask, distance, alignment).item() == pytest.approx(expected)


@pytest.mark.parametrize(("distance", "alignment"), OPTIONS)
def test_invariances(distance, alignment):
    student, teacher = encodings(seed=0), encodings(seed=1)

    def loss(own, other):
        return encoding_loss(own, other, distance=distance, alignment=alignment)

    value = loss(student, teacher)
    order, signs = torch.randperm(6), torch.tensor([[[1.0, -1.0, -1.0]], [[-1.0, 1.0, -1.0]]])
    torch.testing.assert_close(loss(student[:, order], teacher[:, order]), value)
    torch.testing.assert_close(loss(student * signs, teacher), value)
    torch.testing.assert_close(loss(student, teacher * signs), value)
    assert not torch.isclose(loss(student[:, order], teacher), value)
    turned = [loss(student @ orthogonal(), teacher), loss(student, teacher @ orthogonal())]
    assert [torch.isclose(other, value).item() for other in turned] == [alignment == "rotation"] * 2
    assert loss(student @ orthogonal() if alignment == "rotation" else student * signs, student).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["heat", "walk", "absolute"])
def test_encodings_without_signs_stay_as_they_are(name):
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=ENCODINGS[name])
    own, other = builder(maps(0)), builder(maps(1))
    assert own.pe.min() >= 0
    torch.testing.assert_close(EncodingLoss(distance="mse")(own, other), (own.pe - other.pe).square().mean())
    assert EncodingLoss(distance="mse")(own, other) > 0


@pytest.mark.parametrize(("distance", "alignment"), OPTIONS)
def test_gradcheck(distance, alignment):
    student, teacher = encodings(seed=0).requires_grad_(), encodings(seed=1)
    if alignment == "rotation" and distance == "cosine":  # the rotation is that of the squares, and held fixed
        with torch.no_grad():
            left, _, right = torch.linalg.svd(student.mT @ teacher)
        expected = encoding_loss(student @ (left @ right), teacher, distance="cosine")
        gradients = [
            torch.autograd.grad(value, student)[0] for value in (expected, encoding_loss(student, teacher, None, "cosine", "rotation"))
        ]
        torch.testing.assert_close(*gradients)
    else:
        assert torch.autograd.gradcheck(lambda x: encoding_loss(x, teacher, None, distance, alignment), student)


@pytest.mark.parametrize("nodes", [PatchNodes(), ChannelNodes()], ids=["patches", "channels"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_in_a_graph_loss(name, nodes):
    loss = GraphLoss(GraphBuilder(nodes, KNNEdges(k=2), encoding=ENCODINGS[name]), {"encoding": EncodingLoss()}, topology="each")
    assert loss.matched_channels is isinstance(nodes, ChannelNodes)
    student, teacher = maps(0).requires_grad_(), maps(1).requires_grad_()
    assert loss(student, student)["encoding"].item() == pytest.approx(0, abs=1e-6)
    value = loss(student, teacher)["encoding"]
    assert 0.05 < value.item() < 2
    value.backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["heat", "walk", "absolute"])
def test_the_loss_encodes_by_itself(name):
    plain, encoded = (GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=encoding) for encoding in (None, ENCODINGS[name]))
    student, teacher = maps(0).requires_grad_(), maps(1).requires_grad_()
    value, expected = (
        EncodingLoss(encoding)(builder(student), builder(teacher)) for encoding, builder in ((ENCODINGS[name], plain), (None, encoded))
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (value, expected)))
    assert torch.autograd.grad(EncodingLoss(ENCODINGS[name])(plain(student), plain(teacher)), teacher, allow_unused=True) == (None,)


def test_random_signs_do_not_matter():
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=LaplacianEncoding(num_eig=3))
    own, other = [builder(maps(seed)) for seed in (0, 0, 0, 0)], builder(maps(1))
    assert len({str(graph.pe.sign().tolist()) for graph in own}) > 1
    for alignment, distance in (("sign", "standardized"), ("rotation", "mse")):
        values = torch.stack([EncodingLoss(None, distance, alignment)(graph, other) for graph in own])
        torch.testing.assert_close(values, values[:1].expand(4))


def test_widths_of_the_networks_may_differ():
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=HeatKernelEncoding())
    assert EncodingLoss()(builder(maps(0, channels=4)), builder(maps(1, channels=9))).isfinite()


def test_signature_is_the_plain_square():
    """What the table of SpectralLoss calls 'signature', by the other way."""
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=HeatKernelEncoding(times=(1.0, 2.0, 4.0)))
    own, other = builder(maps(0)), builder(maps(1))
    value = EncodingLoss(distance="mse")(own, other)
    torch.testing.assert_close(value, SpectralLoss("heat", kernel="signature")(own, other), rtol=1e-4, atol=1e-7)


def test_ragged_graphs():
    encode = AddEncoding(HeatKernelEncoding())
    graphs = [encode(graph) for graph in fixture_graphs().values() if graph.num_nodes > 1]
    others = [encode(graph.__class__(edge_index=graph.edge_index.flip(1), num_nodes=graph.num_nodes)) for graph in graphs]
    singles = [EncodingLoss(distance="mse")(a, b) for a, b in zip(graphs, others, strict=True)]
    value = EncodingLoss(distance="mse")(Batch.from_data_list(graphs), Batch.from_data_list(others))
    assert value > 0
    torch.testing.assert_close(value, torch.stack(singles).mean())


@pytest.mark.parametrize(("distance", "alignment"), OPTIONS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_finite_gradient_at_degenerate_maps(name, distance, alignment):
    features = fixture_features()
    for nodes in (PatchNodes(), ChannelNodes()):
        builder = GraphBuilder(nodes, KNNEdges(k=2), encoding=ENCODINGS[name])
        loss = GraphLoss(builder, {"encoding": EncodingLoss(None, distance, alignment)})
        for student in features.values():
            student = student.clone().requires_grad_()
            value = loss(student, features["signed"])["encoding"]
            (gradient,) = torch.autograd.grad(value, student)
            assert value.isfinite()
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e6


def test_float32_under_autocast():
    loss = GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=2), encoding=HeatKernelEncoding()), {"encoding": EncodingLoss()})
    student, teacher = maps(0).bfloat16(), maps(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)["encoding"]
    assert value.dtype == torch.float32
    assert value.item() == loss(student.float(), teacher.float())["encoding"].item()


def test_mistakes():
    with pytest.raises(ValueError, match=r"Expected 'distance' to be one of standardized, cosine, mse \(got 'l1'\)"):
        EncodingLoss(distance="l1")
    with pytest.raises(ValueError, match=r"Expected 'alignment' to be one of sign, rotation \(got 'none'\)"):
        EncodingLoss(alignment="none")
    with pytest.raises(ValueError, match=r"Expected distance 'cosine' or 'mse' with alignment='rotation'"):
        EncodingLoss(alignment="rotation")
    with pytest.raises(ValueError, match=r"Expected encodings 'pe' of both graphs or of none"):
        EncodingLoss()(path_graph(4), AddEncoding(RandomWalkEncoding(2))(path_graph(4)))
    with pytest.raises(ValueError, match=r"node i being node i \(got student \[1, 4\], teacher \[1, 5\]\)"):
        EncodingLoss()(path_graph(4), path_graph(5))
    walks = [AddEncoding(RandomWalkEncoding(length))(path_graph(4)) for length in (2, 3)]
    with pytest.raises(ValueError, match=r"Expected equal encodings .*student \[1, 4, 2\], teacher \[1, 4, 3\]"):
        EncodingLoss()(*walks)


@pytest.mark.parametrize(("distance", "alignment"), OPTIONS)
def test_graphs_without_nodes(distance, alignment):
    student = torch.zeros(3, 0, 4, requires_grad=True)
    value = encoding_loss(student, torch.zeros(3, 0, 4), None, distance, alignment)
    value.backward()
    assert value.item() == 0


def test_without_an_encoding_it_is_the_heat_kernel_signature():
    builder = GraphBuilder(PatchNodes(), KNNEdges(k=3))
    graphs = builder(maps(0)), builder(maps(1))
    assert EncodingLoss()(*graphs).item() == EncodingLoss(HeatKernelEncoding())(*graphs).item()
