import pytest
import torch
from torch_geometric.data import Data

import gkd.graphs.subspace
from gkd.graphs import ChannelNodes, CompleteEdges, GraphBuilder, KNNEdges, LowRank
from gkd.graphs.dense import from_dense
from gkd.graphs.eigen import Exact, Factored, exact_eigenmaps, lowrank_eigenmaps
from gkd.graphs.laplacian import laplacian
from gkd.graphs.spectral import Spectrum, eigenmaps
from gkd.graphs.subspace import Subspace
from gkd.graphs.testing import graph_from_edges, grid_graph

DOUBLE = torch.float64


def projector(eigvec):
    return eigvec @ eigvec.mT


def knn_adjacency(num_graphs=2, num_nodes=96, k=6, components=1, dtype=DOUBLE, seed=0):
    x = torch.randn(num_graphs, num_nodes, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    A = torch.nn.functional.normalize(x, dim=-1)
    A = (A @ A.mT).clamp(min=0)
    component = torch.arange(num_nodes) % components
    A = (A * (component[:, None] == component)).masked_fill(torch.eye(num_nodes, dtype=torch.bool), 0)
    value, index = A.topk(k, -1)
    A = torch.zeros_like(A).scatter(-1, index, value)
    return torch.maximum(A, A.mT).to(dtype)


def random_factor(num_graphs=2, num_nodes=9, rank=5, seed=0):
    F = torch.rand(num_graphs, num_nodes, rank, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(F**3, dim=-1)


def scores(eigval, eigvec):
    """Numbers that depend on neither sign nor basis of the block, and on every entry of its projector."""
    weight = torch.arange(eigvec.size(1) ** 2, dtype=eigvec.dtype).sin().view(eigvec.size(1), -1)
    return (projector(eigvec) * (weight + weight.T)).sum((1, 2)) + eigval.sum(1)


@pytest.mark.parametrize("gauge", ["eigenspace", "block"])
@pytest.mark.parametrize("drop_trivial", [True, False])
def test_lowrank_is_exact(gauge, drop_trivial):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[2, 6:] = False
    results = []
    for method in ("lowrank", "exact"):
        F = random_factor(3)
        F[1, 2] = 0  # an isolated node
        F[2, 6:] = 1e6
        F.requires_grad_()
        if method == "lowrank":
            eigval, eigvec = lowrank_eigenmaps(F, 4, mask, drop_trivial, gauge)
        else:
            eigval, eigvec = exact_eigenmaps(laplacian(F @ F.mT, mask=mask)[0], 4, mask, drop_trivial, gauge)
        results.append((eigval, projector(eigvec), torch.autograd.grad(scores(eigval, eigvec).sum(), F)[0]))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_lowrank_graph_chooses_itself():
    F = random_factor()
    graph = from_dense(F @ F.mT)
    graph.factor = F.flatten(0, 1)
    assert Spectrum(graph).choose_method(4) == "lowrank"
    assert Spectrum(graph).choose_method(5) == "exact"  # beyond what the factor surely has
    assert Spectrum(graph, None).choose_method(4) == "exact"
    for normalization in ("sym", "rw"):
        automatic = eigenmaps(graph, 4, normalization=normalization)
        expected = eigenmaps(graph, 4, normalization=normalization, method="exact")
        torch.testing.assert_close(automatic[0], expected[0])
        torch.testing.assert_close(projector(automatic[1]), projector(expected[1]))


def test_lowrank_beyond_the_rank():
    # Two identical columns: rank 4 of 5. One pair is trivial, so 3 have vectors; 9 nodes have 5 eigenvalues 1 more.
    F = random_factor()
    F[:, :, 1] = F[:, :, 0]
    eigval, eigvec = lowrank_eigenmaps(F, 9)
    expected, _ = exact_eigenmaps(laplacian(F @ F.mT)[0], 9)
    torch.testing.assert_close(eigval, expected)
    torch.testing.assert_close(eigvec.norm(dim=1), (torch.arange(9) < 3).to(DOUBLE).expand(2, -1))
    assert lowrank_eigenmaps(torch.zeros(1, 3, 2), 2)[0].tolist() == [[0.0, 0.0]]
    assert lowrank_eigenmaps(torch.zeros(1, 3, 2), 4, drop_trivial=False)[1].tolist() == [torch.eye(3, 4).tolist()]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("normalization", ["sym", None])
@pytest.mark.parametrize("components", [1, 3])
def test_subspace_is_exact(dtype, normalization, components):
    mask = torch.ones(2, 96, dtype=torch.bool)
    mask[1, 80:] = False
    A = knn_adjacency(components=components, dtype=dtype)
    results = []
    for way in ("sparse", "dense", "exact"):
        graph = from_dense(A, mask)
        graph.edge_weight.requires_grad_()
        if way == "dense":
            eigval, eigvec = eigenmaps(*(laplacian(graph, normalization)[0], 4, mask), method="subspace", gauge="block")
        else:
            method = "subspace" if way == "sparse" else "exact"
            eigval, eigvec = eigenmaps(graph, 4, method=method, normalization=normalization, gauge="block")
        gradient = torch.autograd.grad(scores(eigval, eigvec).sum(), graph.edge_weight)[0]
        results.append((eigval, projector(eigvec), gradient))
    for other in results[:2]:
        for value, expected, tolerance in zip(other, results[2], [1e-5, 1e-3, 2e-2], strict=True):
            # The damping, 1e-4 in float32, is not quite the same in the two.
            assert float((value - expected).detach().norm()) <= (1e-7 if dtype == DOUBLE else tolerance) * float(expected.detach().norm())


def test_subspace_did_not_hand_over(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the exact method was called")

    monkeypatch.setattr(gkd.graphs.subspace, "Exact", fail)
    graph = from_dense(knn_adjacency())
    Subspace(graph).lowest(4)
    with pytest.raises(AssertionError, match="was called"):
        Subspace(graph).lowest(40)


@pytest.mark.parametrize("components", [12, 60])  # the block grows; the exact method takes over
def test_subspace_with_many_components(components):
    edges = [(8 * c + i, 8 * c + (i + 1) % 8) for c in range(components) for i in range(8)]
    graph = graph_from_edges(edges, 8 * components, dtype=DOUBLE)
    graph.edge_weight = (graph.edge_index[0] + graph.edge_index[1]).to(DOUBLE).sin().add(1.5)
    for drop_trivial in (True, False):
        eigval, eigvec = eigenmaps(graph, 3, method="subspace", drop_trivial=drop_trivial)
        expected, expected_vectors = eigenmaps(graph, 3, method="exact", drop_trivial=drop_trivial)
        torch.testing.assert_close(eigval, expected, rtol=1e-6, atol=1e-9)
        if drop_trivial:
            torch.testing.assert_close(projector(eigvec), projector(expected_vectors), rtol=1e-5, atol=1e-6)


def test_subspace_of_a_directed_graph():
    A = knn_adjacency() * torch.rand(2, 96, 96, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    graph = from_dense(A)
    for value, expected in zip(eigenmaps(graph, 3, method="subspace"), eigenmaps(graph, 3, method="exact"), strict=True):
        torch.testing.assert_close(value.abs(), expected.abs(), rtol=1e-5, atol=1e-6)


def test_subspace_sees_one_directed_graph_among_many():
    A = knn_adjacency(16, 64, dtype=torch.float32)
    A[5, 3, :] *= 0.5  # rows of node 3 halved, its columns not
    eigval, _ = eigenmaps(from_dense(A), 3, method="subspace")
    torch.testing.assert_close(eigval, eigenmaps(from_dense(A), 3, method="exact")[0], rtol=1e-4, atol=1e-5)


def test_subspace_start(monkeypatch):
    rounds = []
    step = gkd.graphs.subspace._rayleigh_ritz
    monkeypatch.setattr(gkd.graphs.subspace, "_rayleigh_ritz", lambda *args: rounds.append(1) or step(*args))
    graph = from_dense(knn_adjacency(1, 200))
    first = eigenmaps(graph, 4, method="subspace", tolerance=1e-5)
    cold = len(rounds)
    assert torch.equal(eigenmaps(graph, 4, method="subspace", tolerance=1e-5)[1], first[1])  # deterministic
    graph.edge_weight = graph.edge_weight * (1 + 1e-4 * graph.edge_weight.sin())
    rounds.clear()
    warm = eigenmaps(graph, 4, method="subspace", init=first[1], tolerance=1e-5)
    assert len(rounds) < cold
    torch.testing.assert_close(warm[0], eigenmaps(graph, 4)[0])
    zero_start = eigenmaps(graph, 4, method="subspace", init=torch.zeros(1, 200, 2))
    torch.testing.assert_close(zero_start[0], warm[0])
    with pytest.warns(UserWarning, match="stopped after 1 rounds"):
        eigenmaps(graph, 4, method="subspace", max_iter=1)


def test_gradcheck_of_lowrank():
    F = random_factor().requires_grad_()
    assert torch.autograd.gradcheck(lambda F: scores(*lowrank_eigenmaps(F, 3, gauge="block")), (F,))


def test_gradcheck_of_subspace():
    graph = from_dense(knn_adjacency(1, 40, 4))
    weight = graph.edge_weight[:12].clone().requires_grad_()

    def run(part):
        graph.edge_weight = torch.cat([part, graph.edge_weight.detach()[12:]])
        return scores(*Subspace(graph).lowest(2, gauge="block"))

    assert torch.autograd.gradcheck(run, (weight,), atol=1e-4)


@pytest.mark.parametrize(
    "factor", [torch.zeros(1, 4, 3), torch.ones(1, 4, 3), torch.eye(4, 3)[None], torch.eye(3)[None], torch.ones(1, 1, 2)]
)
def test_lowrank_gradient_is_finite_everywhere(factor):
    for gauge in ("eigenspace", "block"):
        F = factor.clone().requires_grad_()
        eigval, eigvec = lowrank_eigenmaps(F, 3, gauge=gauge)
        (eigvec * torch.arange(eigvec.numel()).sin().view_as(eigvec)).sum().add(eigval.sum()).backward()
        assert bool(eigvec.isfinite().all())
        assert bool(F.grad.isfinite().all())


def test_subspace_gradient_at_a_cut_through_an_eigenspace():
    graph = grid_graph(8, 8)  # a square: eigenvalues 1 and 2 are one
    weight = graph.edge_weight.clone().requires_grad_()
    eigval, eigvec = Subspace(Data(edge_index=graph.edge_index, edge_weight=weight, num_nodes=64)).lowest(1)
    (eigvec.sin().sum() + eigval.sum()).backward()
    assert bool(weight.grad.isfinite().all())
    assert float(weight.grad.abs().max()) < 1e5


def dead_channels(share, dtype=torch.float32):
    """Laplacians of kNN graphs of 256 channels, most of which are dead."""
    features = torch.rand(4, 256, 64, dtype=DOUBLE)
    for image in features:
        image[torch.randperm(256)[: int(256 * share)]] = 0
    return GraphBuilder(ChannelNodes(), KNNEdges(k=8))(features.view(4, 256, 8, 8).to(dtype))


@pytest.mark.parametrize("share", [0.7, 0.9])
@pytest.mark.parametrize("drop_trivial", [True, False])
def test_most_nodes_are_isolated(share, drop_trivial):
    """LAPACK does not converge in float32 on such a matrix as it stands."""
    graph = dead_channels(share)
    eigval, eigvec = eigenmaps(graph, 12, method="exact", drop_trivial=drop_trivial)
    L, mask = laplacian(graph)
    expected = torch.linalg.eigvalsh(L.double())
    kernel = (expected < 1e-5).sum(1) if drop_trivial else torch.zeros(4, dtype=torch.long)
    expected = expected.gather(1, kernel[:, None] + torch.arange(12))
    torch.testing.assert_close(eigval.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(L @ eigvec, eigvec * eigval[:, None, :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eigvec.mT @ eigvec, torch.eye(12).expand(4, -1, -1), rtol=1e-4, atol=1e-5)
    for value, reference in zip(eigenmaps(L, 12, mask, drop_trivial=drop_trivial), (eigval, eigvec), strict=True):
        torch.testing.assert_close(value.abs(), reference.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["exact", "subspace"])
@pytest.mark.parametrize("normalization", ["sym", None])
def test_isolated_nodes_come_first(method, normalization):
    """Two of 72 nodes are isolated and two are missing; the kernel of the rest is one vector."""
    A = knn_adjacency(1, 72, 5)[0]
    A[[4, 9]] = 0
    A[:, [4, 9]] = 0
    mask = torch.ones(1, 72, dtype=torch.bool)
    mask[0, 70:] = False
    graph = from_dense((A * mask[0] * mask[0][:, None])[None], mask)
    eigval, eigvec = eigenmaps(graph, 5, method=method, normalization=normalization, drop_trivial=False)
    L = laplacian(graph, normalization)[0]
    torch.testing.assert_close(L @ eigvec, eigvec * eigval[:, None, :], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(eigval[0], torch.linalg.eigvalsh(L[0])[:5], rtol=1e-6, atol=1e-7)
    assert eigval[0, :3].tolist() == [0.0] * 3
    assert torch.equal(eigvec[0, :, :2], torch.eye(70, dtype=DOUBLE)[:, [4, 9]])
    dropped = eigenmaps(graph, 2, method=method, normalization=normalization)
    torch.testing.assert_close(dropped[0], eigval[:, 3:])


def test_isolated_nodes_have_their_part_in_the_gradient():
    """An edge that grows from 0 to an isolated node turns every vector, as perturbation theory says: (e_j . g) / lambda."""
    A = torch.zeros(1, 5, 5, dtype=DOUBLE)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        A[0, i, j] = A[0, j, i] = 1 + i / 4
    gradients = []
    for method in ("exact", "subspace", "whole"):
        leaf = A.clone().requires_grad_()
        L = torch.diag_embed(leaf.sum(-1)) - leaf
        eigvec = torch.linalg.eigh(L)[1][:, :, 2:4] if method == "whole" else eigenmaps(L, 2, method=method)[1]
        eigvec = eigvec * eigvec[:, :1].sign()
        (eigvec * torch.arange(10, dtype=DOUBLE).cos().view(5, 2)).sum().backward()
        gradients.append((leaf.grad + leaf.grad.mT)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_float64_where_float32_does_not_converge(monkeypatch):
    solve = torch.linalg.eigh

    def eigh(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return solve(matrix)

    graph = grid_graph(3, 4)
    expected = eigenmaps(graph, 3)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    value = eigenmaps(graph, 3)
    assert value[0].dtype == torch.float32
    torch.testing.assert_close(value[0], expected[0])
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: eigh(matrix.float()))
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        eigenmaps(graph, 3)


@pytest.mark.parametrize("method", ["exact", "lowrank", "loopless", "subspace"])
@pytest.mark.parametrize("linear", [True, False])
def test_second_derivatives_are_an_error(method, linear):
    """Also where the first gradient comes in as a constant."""
    leaf = torch.rand(1, 60, 6, dtype=DOUBLE, requires_grad=True)
    solver = {
        "exact": lambda: Exact(laplacian(leaf @ leaf.mT)[0]),
        "lowrank": lambda: Factored(leaf),
        "loopless": lambda: Subspace(LowRank(leaf, self_loops=False)),
        "subspace": lambda: Subspace(laplacian(leaf @ leaf.mT)[0]),
    }[method]()
    eigval, _ = solver.lowest(3)
    (gradient,) = torch.autograd.grad(eigval.sum() if linear else eigval.square().sum(), leaf, create_graph=True)
    assert torch.autograd.grad(eigval.sum(), leaf, retain_graph=True)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="Expected first derivatives of eigenpairs only"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("scale", [1e-20, 1e18])
@pytest.mark.parametrize("normalization", ["sym", None])
@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_any_unit_of_the_weights(method, normalization, scale):
    graph = from_dense(knn_adjacency(dtype=torch.float32))
    expected = eigenmaps(graph, 3, method=method, normalization=normalization)
    unit = 1.0 if normalization == "sym" else scale
    graph.edge_weight = (scale * graph.edge_weight).requires_grad_()
    eigval, eigvec = eigenmaps(graph, 3, method=method, normalization=normalization)
    torch.testing.assert_close(eigval / unit, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(projector(eigvec), projector(expected[1]), rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad((eigval / unit).sum() + eigvec.square().cos().sum(), graph.edge_weight)
    assert gradient.isfinite().all()


def test_all_pairs_of_a_method_come_from_one_decomposition(monkeypatch):
    calls = []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or solve(matrix))
    features = torch.rand(2, 40, 3, 3)
    for edges in (KNNEdges(k=4), CompleteEdges(self_loops=True)):
        calls.clear()
        spectrum = GraphBuilder(ChannelNodes(), edges).view(features)
        expected = eigenmaps(spectrum.graph, 6, drop_trivial=False)
        calls.clear()
        for num_eig, drop_trivial, gauge in ((4, True, "eigenspace"), (5, True, "block"), (6, False, "eigenspace"), (2, True, "block")):
            spectrum.eigenmaps(num_eig, drop_trivial, gauge)
        assert len(calls) == 1
        torch.testing.assert_close(spectrum.eigenmaps(6, drop_trivial=False)[0], expected[0])


def test_fewer_pairs_come_from_the_same_block(monkeypatch):
    rounds = []
    step = gkd.graphs.subspace._rayleigh_ritz
    monkeypatch.setattr(gkd.graphs.subspace, "_rayleigh_ritz", lambda *args: rounds.append(1) or step(*args))
    solver = Subspace(from_dense(knn_adjacency(1, 200)))
    eigval, eigvec = solver.lowest(6)
    rounds.clear()
    torch.testing.assert_close(solver.lowest(4)[0], eigval[:, :4])
    torch.testing.assert_close(solver.lowest(4, gauge="block")[1], eigvec[:, :, :4])
    assert not rounds
    solver.lowest(7)
    assert rounds
