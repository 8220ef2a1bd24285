import math

import networkx as nx
import pytest
import torch
from sklearn.manifold import SpectralEmbedding
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE

import gkd.graphs.perturbation
import gkd.graphs.subspace
from gkd.graphs.builder import GraphBuilder
from gkd.graphs.dense import from_dense, from_padded, to_dense
from gkd.graphs.edges import KNNEdges
from gkd.graphs.eigen import lowrank_eigenmaps
from gkd.graphs.laplacian import laplacian
from gkd.graphs.nodes import ChannelNodes
from gkd.graphs.spectral import Spectrum, eigengap, eigenmaps
from gkd.graphs.testing import (
    check_batch_equals_singles,
    check_permutation_equivariance,
    complete_graph,
    cycle_graph,
    fixture_graphs,
    graph_from_edges,
    grid_graph,
    identical_nodes_graph,
    isolated_node_graph,
    path_graph,
    star_graph,
    two_components_graph,
    zero_weight_graph,
)

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


def random_adjacency(num_graphs=2, num_nodes=6, seed=0):
    A = torch.rand(num_graphs, num_nodes, num_nodes, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return (A + A.mT).masked_fill(torch.eye(num_nodes, dtype=torch.bool), 0)


def random_factor(num_graphs=2, num_nodes=9, rank=5, seed=0):
    F = torch.rand(num_graphs, num_nodes, rank, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(F**3, dim=-1)


# Closed forms and references.


def test_hand_value():
    # Path 0 - 1 - 2: L = I - [[0, s, 0], [s, 0, s], [0, s, 0]] with s = 1 / sqrt(2). (1, 0, -1) is mapped to itself, eigenvalue 1;
    # (1, -sqrt(2), 1) to twice itself: 1 + s sqrt(2) = 2; and (1, sqrt(2), 1), the root of the degrees, to 0.
    eigval, eigvec = eigenmaps(path_graph(3), num_eig=2)
    torch.testing.assert_close(eigval, torch.tensor([[1.0, 2.0]]))
    root = 2**0.5
    expected = torch.tensor([[1 / root, 0.0, -1 / root], [0.5, -root / 2, 0.5]])
    torch.testing.assert_close(projector(eigvec)[0], expected.T @ expected)
    eigval, eigvec = eigenmaps(path_graph(3), num_eig=1, drop_trivial=False)
    assert eigval.tolist() == [[0.0]]
    torch.testing.assert_close(eigvec[0, :, 0].abs(), torch.tensor([0.5, root / 2, 0.5]))


@pytest.mark.parametrize(
    ("graph", "normalization", "expected"),
    [
        (path_graph(7), "sym", [1 - math.cos(math.pi * k / 6) for k in range(7)]),
        (path_graph(7), None, [2 - 2 * math.cos(math.pi * k / 7) for k in range(7)]),
        (cycle_graph(8), "sym", [1 - math.cos(2 * math.pi * k / 8) for k in range(8)]),
        (star_graph(6), "sym", [0, 1, 1, 1, 1, 2]),
        (star_graph(6), None, [0, 1, 1, 1, 1, 6]),
        (complete_graph(5), "sym", [0, 1.25, 1.25, 1.25, 1.25]),
        (grid_graph(3, 4), None, [4 - 2 * math.cos(math.pi * i / 3) - 2 * math.cos(math.pi * j / 4) for i in range(3) for j in range(4)]),
        (two_components_graph(), "sym", [0, 0, 1.5, 1.5, 1.5, 1.5]),
        (isolated_node_graph(), "sym", [0, 0, 1.5, 1.5]),
        (zero_weight_graph(), "sym", [0, 0, 0, 0]),
    ],
)
def test_closed_forms(graph, normalization, expected):
    expected = torch.tensor(sorted(expected), dtype=torch.float32)
    everything = eigenmaps(graph, graph.num_nodes, normalization=normalization, drop_trivial=False)
    torch.testing.assert_close(everything[0][0], expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(projector(everything[1])[0], torch.eye(graph.num_nodes))
    left = expected[expected > 1e-6]
    eigval, eigvec = eigenmaps(graph, graph.num_nodes, normalization=normalization)  # the whole kernel dropped, zeros at the end
    torch.testing.assert_close(eigval[0, : len(left)], left, rtol=1e-5, atol=2e-6)
    assert torch.equal(
        eigval[0, len(left) :], (eigval[0, len(left) - 1] if len(left) else torch.zeros(())).expand(graph.num_nodes - len(left))
    )
    torch.testing.assert_close(eigvec[0].norm(dim=0), (torch.arange(graph.num_nodes) < len(left)).float())


@pytest.mark.parametrize("normalization", ["sym", None])
def test_networkx(normalization):
    A = knn_adjacency(1, 24)
    reference = nx.from_numpy_array(A[0].numpy())
    spectrum = nx.normalized_laplacian_spectrum(reference) if normalization else nx.laplacian_spectrum(reference)
    eigval, _ = eigenmaps(from_dense(A), 24, normalization=normalization, drop_trivial=False)
    torch.testing.assert_close(eigval[0], torch.as_tensor(spectrum).sort().values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_scikit_learn(method):
    A = knn_adjacency(1, 60)
    expected = torch.as_tensor(SpectralEmbedding(3, affinity="precomputed", random_state=0).fit_transform(A[0].numpy()))
    _, eigvec = eigenmaps(from_dense(A), 3, normalization="rw", method=method)
    torch.testing.assert_close(eigvec[0].abs(), expected.abs(), rtol=1e-5, atol=1e-6)
    agreement = (eigvec[0] * expected).sum(0).abs() / (eigvec[0].norm(dim=0) * expected.norm(dim=0))
    torch.testing.assert_close(agreement, torch.ones(3, dtype=DOUBLE))


def test_random_walk_vectors_solve_the_generalised_problem():
    graph = from_dense(random_adjacency())
    eigval, V = eigenmaps(graph, 3, normalization="rw")
    L, _ = laplacian(graph, "rw")
    torch.testing.assert_close(L @ V, V * eigval[:, None, :])
    D = to_dense(graph)[0].sum(-1)
    torch.testing.assert_close(V.mT @ (D[:, :, None] * V), torch.eye(3, dtype=DOUBLE).expand(2, -1, -1))


def test_pyg_transform():
    graph = from_dense(knn_adjacency(1, 20))[0]
    # The transform leaves the weights out of account.
    del graph.edge_weight
    graph.x = torch.zeros(20, 1, dtype=DOUBLE)
    expected = AddLaplacianEigenvectorPE(k=4, attr_name="pe")(graph).pe.to(DOUBLE)
    _, eigvec = eigenmaps(graph, 4)
    torch.testing.assert_close((eigvec[0] * expected).sum(0).abs(), torch.ones(4, dtype=DOUBLE), rtol=1e-5, atol=1e-5)


# Gradients.


@pytest.mark.parametrize("gauge", ["eigenspace", "block"])
@pytest.mark.parametrize("drop_trivial", [True, False])
@pytest.mark.parametrize("normalization", ["sym", "rw", None])
def test_gradcheck(gauge, drop_trivial, normalization):
    graph = from_dense(random_adjacency(1))
    edge_index = graph.edge_index

    def run(weight):
        data = graph.clone()
        data.edge_index, data.edge_weight = edge_index, weight
        eigval, eigvec = eigenmaps(data, 3, normalization=normalization, drop_trivial=drop_trivial, gauge=gauge)
        return eigval, projector(eigvec)

    assert torch.autograd.gradcheck(run, (graph.edge_weight.requires_grad_(),))


def test_gradcheck_of_single_pairs():
    L = laplacian(random_adjacency())[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda L: eigenmaps((L + L.mT) / 2, 3, drop_trivial=False)[1].square(), (L,))
    F = random_factor().requires_grad_()
    assert torch.autograd.gradcheck(lambda F: lowrank_eigenmaps(F, 3)[1].square(), (F,))


@pytest.mark.parametrize("gauge", ["eigenspace", "block"])
def test_projector_of_a_double_eigenvalue_has_its_true_gradient(gauge):
    # Eigenvalues 2 and 3 of the 8-cycle are one: the pair's projector is a smooth function of the weights though its vectors are not.
    graph = cycle_graph(8, dtype=DOUBLE)
    weight = torch.arange(64, dtype=DOUBLE).sin().view(8, 8)

    def run(edge_weight):
        data = Data(edge_index=graph.edge_index, edge_weight=edge_weight, num_nodes=8)
        return (projector(eigenmaps(data, 2, gauge=gauge)[1]) * weight).sum()

    assert torch.autograd.gradcheck(run, (graph.edge_weight.requires_grad_(),), atol=1e-6)


def test_pytorch_fails_where_we_do_not():
    # The contrast to the test above: the eigenvalues of an 8-cycle come out equal, or apart by rounding, and PyTorch divides by that.
    A = to_dense(cycle_graph(8, DOUBLE))[0]
    weight = torch.arange(64, dtype=DOUBLE).sin().view(8, 8)
    gradients = []
    for solve in (lambda L: torch.linalg.eigh(L)[1][:, :, 1:5], lambda L: eigenmaps(L, 4)[1]):
        leaf = A.clone().requires_grad_()
        (projector(solve(laplacian(leaf, None)[0])) * weight).sum().backward()
        gradients.append(leaf.grad)
    assert bool(gradients[1].isfinite().all())
    assert not torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", fixture_graphs())
@pytest.mark.parametrize("method", ["exact", "subspace"])
@pytest.mark.parametrize("gauge", ["eigenspace", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradient_is_finite_everywhere(name, method, gauge, dtype):
    graph = fixture_graphs(dtype)[name]
    for num_eig in (1, 2, 3, 20):
        for drop_trivial in (True, False):
            weight = graph.edge_weight.clone().requires_grad_()
            data = Data(edge_index=graph.edge_index, edge_weight=weight, num_nodes=graph.num_nodes)
            eigval, eigvec = eigenmaps(data, num_eig, method=method, gauge=gauge, drop_trivial=drop_trivial)
            assert eigvec.shape == (1, graph.num_nodes, num_eig)
            (eigvec * torch.arange(eigvec.numel()).sin().view_as(eigvec)).sum().add(eigval.sum()).backward()  # not gauge-invariant
            assert bool(weight.grad.isfinite().all())
            assert float(weight.grad.abs().max()) < (1e6 if dtype == torch.float32 else 1e10)


def test_damping_bounds_the_gradient():
    # Two almost separate edges: eigenvalues 2 and nearly 2 with the cut between them.
    gradients = []
    for damping in (1e-8, 1e-1):
        A = torch.zeros(1, 4, 4, dtype=DOUBLE)
        A[0, 0, 1] = A[0, 1, 0] = A[0, 2, 3] = A[0, 3, 2] = 1
        A[0, 1, 2] = A[0, 2, 1] = 1e-4
        A.requires_grad_()
        _, eigvec = eigenmaps(laplacian(A)[0], 2, damping=damping, gauge="block")
        projector(eigvec)[0, 0, 2].backward()
        gradients.append(float(A.grad.abs().max()))
    assert gradients[0] > 100 * gradients[1]


# Batches, padding, order, types.


def test_ragged_batch_with_poisoned_padding():
    graphs = list(fixture_graphs(DOUBLE).values())
    batch = Batch.from_data_list(graphs)
    L, mask = laplacian(batch)
    poisoned = L.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 1e6).requires_grad_()
    eigval, eigvec = eigenmaps(poisoned, 5, mask)
    for index, graph in enumerate(graphs):
        expected = eigenmaps(graph, 5)
        torch.testing.assert_close(eigval[index : index + 1], expected[0])
        heat = (eigvec[index, : graph.num_nodes] * (-eigval[index]).exp()) @ eigvec[index, : graph.num_nodes].T
        if graph.num_nodes <= 6:  # all the pairs of the small ones, so that no eigenspace is cut
            torch.testing.assert_close(heat, (expected[1][0] * (-expected[0][0]).exp()) @ expected[1][0].T)
    assert eigvec[~mask].abs().sum() == 0
    (eigvec.sin().sum() + eigval.sum()).backward()
    assert bool(poisoned.grad.isfinite().all())
    assert poisoned.grad[~mask].abs().sum() == 0


def test_batch_equals_singles_and_permutation():
    generator = torch.Generator().manual_seed(0)
    graphs = [path_graph(5, DOUBLE), grid_graph(3, 4, DOUBLE), complete_graph(5, DOUBLE)]
    for graph in graphs:
        A = torch.rand(graph.num_nodes, graph.num_nodes, dtype=DOUBLE, generator=generator) + 0.2
        graph.edge_weight = (A + A.T)[graph.edge_index[0], graph.edge_index[1]]
    for method in ("exact", "subspace"):
        check_batch_equals_singles(lambda b, m=method: from_padded(eigenmaps(b, 3, method=m)[1], b).abs(), graphs)
        check_permutation_equivariance(lambda g, m=method: from_padded(eigenmaps(g, 3, method=m)[1], g).abs(), Batch.from_data_list(graphs))
        check_permutation_equivariance(lambda g, m=method: eigenmaps(g, 3, method=m)[0], Batch.from_data_list(graphs), invariant=True)


@pytest.mark.parametrize("method", ["exact", "lowrank", "subspace"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, DOUBLE])
def test_type_under_autocast(method, dtype):
    F = random_factor(1, 60, 40)
    graph = from_dense(F @ F.mT)
    graph.edge_weight = graph.edge_weight.to(dtype).requires_grad_()
    graph.factor = F[0].to(dtype).requires_grad_()
    expected = eigenmaps(graph, 3, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        eigval, eigvec = eigenmaps(graph, 3, method=method)
        (eigval.sum() + projector(eigvec)[0, 0, 1]).backward()
    assert eigval.dtype == eigvec.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert torch.equal(eigval, expected[0])
    assert torch.equal(eigvec, expected[1])
    leaf = graph.factor if method == "lowrank" else graph.edge_weight
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_nothing(method):
    for shape in ((2, 0, 0), (0, 4, 4)):
        eigval, eigvec = eigenmaps(torch.zeros(*shape), 3, method=method)
        assert eigval.shape == (shape[0], 3)
        assert eigvec.shape == (*shape[:2], 3)
    eigval, eigvec = eigenmaps(torch.zeros(1, 1, 1), 2, method=method)
    assert eigval.tolist() == [[0.0, 0.0]]
    assert eigvec.tolist() == [[[0.0, 0.0]]]
    assert eigenmaps(torch.zeros(1, 2, 2), 1, torch.zeros(1, 2, dtype=torch.bool), method=method)[1].abs().sum() == 0
    assert lowrank_eigenmaps(torch.zeros(2, 0, 3), 2)[1].shape == (2, 0, 2)


# The view, the cut, the errors.


def test_spectrum_computes_once(monkeypatch):
    graph = identical_nodes_graph()
    spectrum = Spectrum.of(graph)
    assert Spectrum.of(spectrum) is spectrum
    assert spectrum.laplacian is spectrum.laplacian
    assert spectrum.eigenmaps(2) is spectrum.eigenmaps(2)
    assert spectrum.eigenmaps(2) is not spectrum.eigenmaps(2, gauge="block")
    assert torch.equal(spectrum.adjacency, to_dense(graph)[0])
    assert torch.equal(spectrum.mask, to_dense(graph)[1])
    assert torch.equal(spectrum.eigenmaps(2)[0], eigenmaps(graph, 2)[0])
    assert spectrum.heat_kernel([1.0, 2.0]).shape == (1, 2, 4, 4)
    assert spectrum.heat_trace([1.0, 2.0]).shape == (1, 2)


def test_spectrum_compiles():
    builder = GraphBuilder(ChannelNodes(), KNNEdges(k=3))

    def run(features):
        spectrum = Spectrum.of(builder(features, static=True))
        return spectrum.heat_trace([1.0, 2.0]).sum() + (spectrum.laplacian * spectrum.adjacency).sum() + spectrum.mask.sum()

    torch.compiler.reset()
    features = torch.rand(2, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(features), run(features))


@pytest.mark.parametrize("normalization", ["sym", "rw", None])
def test_spectrum_is_the_functions(normalization):
    graph = from_dense(random_adjacency())
    spectrum = Spectrum(graph, normalization=normalization)
    torch.testing.assert_close(spectrum.laplacian, laplacian(graph, normalization)[0])
    for value, expected in zip(spectrum.eigenmaps(3), eigenmaps(graph, 3, normalization=normalization), strict=True):
        torch.testing.assert_close(value, expected)
    expected = torch.matrix_exp(-0.5 * spectrum.laplacian)
    torch.testing.assert_close(spectrum.heat_kernel(0.5)[:, 0], expected)


def test_method_by_size():
    edges = [(i, i + 1) for i in range(599)]
    assert Spectrum(graph_from_edges(edges, 600)).choose_method(8) == "subspace"
    assert Spectrum(graph_from_edges(edges, 600)).choose_method(80) == "exact"
    assert Spectrum(path_graph(8)).choose_method(2) == "exact"


def test_eigengap():
    eigval = torch.tensor([[0.1, 0.2, 0.9, 1.0], [0.1, 0.6, 0.7, 1.1]], requires_grad=True)
    cut, gap = eigengap(eigval)
    assert cut.tolist() == [2, 1]
    torch.testing.assert_close(gap, torch.tensor([0.7, 0.5]))
    gap.sum().backward()
    assert eigval.grad.tolist() == [[0.0, -1.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]
    cut, gap = eigengap(eigval, min_eig=2, max_eig=3)
    assert cut.tolist() == [2, 3]
    # A pair that repeats because there is none leaves no gap behind it.
    assert eigengap(eigenmaps(cycle_graph(5), 7)[0])[0].tolist() == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eigenmaps(path_graph(3), method="fast"), "Expected method to be"),
        (lambda: eigenmaps(path_graph(3), num_eig=0), "Expected num_eig to be a positive integer"),
        (lambda: eigenmaps(path_graph(3), gauge="sign"), "Expected gauge to be 'eigenspace' or 'block'"),
        (lambda: eigenmaps(path_graph(3), damping=-1.0), "Expected damping to be a number that is not negative"),
        (lambda: eigenmaps(path_graph(3), method="lowrank"), "Expected a node attribute 'factor'"),
        (lambda: eigenmaps(path_graph(3), mask=torch.ones(1, 3, dtype=torch.bool)), "Expected 'mask' with Laplacians only"),
        (lambda: eigenmaps(path_graph(3), normalization="left"), "Expected normalization to be"),
        (lambda: eigenmaps(torch.zeros(1, 3, 3), method="lowrank"), "Expected a graph with a node attribute 'factor'"),
        (lambda: eigenmaps(torch.zeros(1, 3, 3), normalization="rw"), "Expected a graph for normalization='rw'"),
        (lambda: eigenmaps(torch.zeros(3, 3)), "Expected square matrices"),
        (lambda: eigenmaps(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])), "Expected symmetric Laplacians"),
        (lambda: eigenmaps(torch.zeros(1, 3, 3), method="subspace", init=torch.zeros(1, 2, 1)), "Expected 'init' of shape"),
        (lambda: eigenmaps(torch.full((1, 3, 3), float("nan"))), "Expected finite Laplacian"),
        (lambda: eigenmaps(torch.full((1, 3, 3), float("inf")), method="subspace"), "Expected finite Laplacian"),
        (lambda: lowrank_eigenmaps(torch.full((1, 3, 3), float("nan"))), "Expected finite factor"),
        (lambda: lowrank_eigenmaps(torch.zeros(3, 3)), "Expected 'factor' of shape"),
        (lambda: lowrank_eigenmaps(torch.zeros(1, 3, 3), mask=torch.ones(1, 2, dtype=torch.bool)), "Expected a boolean 'mask'"),
        (lambda: gkd.graphs.perturbation.decompose(torch.full((2, 3, 3), float("nan"))), "Expected a finite Laplacian"),
        (lambda: eigengap(torch.zeros(1, 3), 2, 3), "Expected 1 <= min_eig <= max_eig < 3"),
        (lambda: eigengap(torch.zeros(3)), "Expected 'eigval' of shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
