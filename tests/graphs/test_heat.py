import math

import pytest
import torch

from gkd.graphs.dense import dense_adjacency
from gkd.graphs.heat import heat_kernel, heat_kernel_signature, heat_trace
from gkd.graphs.laplacian import laplacian
from gkd.graphs.spectral import Spectrum, eigenmaps
from gkd.graphs.testing import check_gradients, check_permutation_equivariance, cycle_graph, fixture_graphs, grid_graph, path_graph

TIMES = (0.0, 0.1, 0.25, 0.5, 0.7, 1.0, 3.0, 10.0, 100.0)


def random_laplacian(dtype=torch.float64, normalization="sym", num_nodes=12):
    A = torch.rand(2, num_nodes, num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = (A + A.mT) * (A + A.mT > 1.2)
    return laplacian(A.to(dtype), normalization)[0]


def test_hand_value():
    # One edge: L = [[1, -1], [-1, 1]] has (1, 1) / sqrt(2) at 0 and (1, -1) / sqrt(2) at 2, so H_t = (1 +- exp(-2t)) / 2.
    H = heat_kernel(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]), 0.5)
    stay, go = (1 + math.exp(-1)) / 2, (1 - math.exp(-1)) / 2
    torch.testing.assert_close(H, torch.tensor([[[[stay, go], [go, stay]]]]))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1.2e-7), (torch.float64, 2.3e-16)])
@pytest.mark.parametrize(("normalization", "bound"), [("sym", 2.0), ("rw", 2.0), (None, None)])
def test_matrix_exponential(dtype, error, normalization, bound):
    L = random_laplacian(dtype, normalization)
    H = heat_kernel(L, TIMES, bound=bound)
    assert H.dtype == dtype
    reach = 2.0 if bound else float(L.abs().sum(-1).max())
    for index, time in enumerate(TIMES):
        expected = torch.matrix_exp(-time * L.double())
        allowed = error * (8 + 2 * time * reach)  # rounding of a product, doubled by every squaring
        assert float((H[:, index].double() - expected).abs().max()) < allowed, time


def test_order_of_times_does_not_matter():
    L = random_laplacian()
    torch.testing.assert_close(heat_kernel(L, [4.0, 1.0]).flip(1), heat_kernel(L, torch.tensor([1.0, 4.0])), rtol=0, atol=1e-13)


def test_time_zero_and_conservation():
    L, mask = laplacian(path_graph(4), "rw")
    H = heat_kernel(L, [0.0, 2.0], mask)
    torch.testing.assert_close(H[:, 0], torch.eye(4)[None])
    torch.testing.assert_close(H.sum(-1), torch.ones(1, 2, 4))  # rows of the random walk stay distributions
    assert bool((H >= 0).all())


def test_trace_from_kernel_and_from_eigenvalues():
    L = random_laplacian()
    eigval = torch.linalg.eigvalsh(L)
    expected = torch.stack([(-time * eigval).exp().mean(-1) for time in TIMES], -1)
    torch.testing.assert_close(heat_trace(L, TIMES), expected)
    torch.testing.assert_close(heat_trace(eigval, TIMES), expected)
    torch.testing.assert_close(heat_trace(random_laplacian(normalization="rw"), TIMES), expected)


def test_trace_of_cycle_in_closed_form():
    # Eigenvalues of the 8-cycle: 1 - cos(2 pi k / 8).
    expected = sum(math.exp(-1.5 * (1 - math.cos(2 * math.pi * k / 8))) for k in range(8)) / 8
    assert float(Spectrum(cycle_graph(8)).heat_trace(1.5)) == pytest.approx(expected, rel=1e-6)


def test_signature_is_the_diagonal():
    L = random_laplacian()
    eigval, eigvec = eigenmaps(L, num_eig=12, drop_trivial=False)
    signature = heat_kernel_signature(eigval, eigvec, torch.tensor(TIMES, dtype=torch.float64))
    torch.testing.assert_close(signature, heat_kernel(L, TIMES).diagonal(dim1=2, dim2=3).mT)


def test_signature_forgets_sign_and_basis():
    eigval, eigvec = eigenmaps(laplacian(cycle_graph(8, torch.float64))[0], num_eig=2)  # one eigenspace of dimension 2
    rotation = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    torch.testing.assert_close(heat_kernel_signature(eigval, eigvec @ rotation, 1.0), heat_kernel_signature(eigval, eigvec, 1.0))


def test_signature_gradient_is_that_of_the_kernel():
    gradients = []
    for way in ("pairs", "kernel"):
        L = random_laplacian().requires_grad_()
        if way == "pairs":
            value = heat_kernel_signature(*eigenmaps(L, num_eig=12, drop_trivial=False), [0.5, 3.0])
        else:
            value = heat_kernel(L, [0.5, 3.0]).diagonal(dim1=2, dim2=3).mT
        (value * torch.linspace(0, 1, value.numel(), dtype=torch.float64).view_as(value)).sum().backward()
        gradients.append((L.grad + L.grad.mT) / 2)
    torch.testing.assert_close(*gradients)


def test_gradients():
    def run(A):
        L = laplacian(A)[0]
        return heat_kernel(L, [0.3, 5.0]), heat_trace(L, 2.0)

    degenerate = [laplacian_free(graph) for graph in fixture_graphs().values()] + [torch.zeros(1, 3, 3), torch.ones(1, 4, 4)]
    check_gradients(run, torch.rand(1, 4, 4), degenerate=degenerate)
    times = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    eigval, eigvec = eigenmaps(random_laplacian(), num_eig=3)
    assert torch.autograd.gradcheck(lambda t: heat_kernel_signature(eigval, eigvec, t), (times,))


def laplacian_free(graph):
    return dense_adjacency(graph.edge_index, graph.edge_weight, 1, graph.num_nodes)


def test_gradient_is_bounded_by_time_where_eigenvalues_repeat():
    L = laplacian(torch.ones(1, 6, 6, dtype=torch.float64))[0].requires_grad_()
    heat_kernel(L, 3.0)[0, 0, 0, 1].backward()
    assert float(L.grad.norm()) <= 3.0


@pytest.mark.parametrize("poison", [1e6, float("inf")])
def test_padding_has_no_influence(poison):
    L = random_laplacian()
    padded = torch.full((2, 15, 15), poison, dtype=torch.float64)
    padded[:, :12, :12] = L
    padded.requires_grad_()
    mask = (torch.arange(15) < 12).expand(2, -1)
    H = heat_kernel(padded, TIMES, mask)
    torch.testing.assert_close(H[:, :, :12, :12], heat_kernel(L, TIMES))
    assert H[:, :, 12:].abs().sum() + H[:, :, :, 12:].abs().sum() == 0
    trace = heat_trace(padded, TIMES, mask)
    torch.testing.assert_close(trace, heat_trace(L, TIMES))
    eigval, _ = eigenmaps(padded.detach(), 15, mask, drop_trivial=False)
    torch.testing.assert_close(heat_trace(eigval, TIMES, mask), trace)
    trace.sum().backward()
    assert bool(padded.grad.isfinite().all())


def test_permutation():
    check_permutation_equivariance(lambda g: heat_kernel(laplacian(g)[0], TIMES)[0].sort(-1).values.permute(1, 0, 2), grid_graph())
    check_permutation_equivariance(lambda g: Spectrum(g).heat_trace(TIMES), grid_graph(), invariant=True)


def test_type_under_autocast():
    L = random_laplacian(torch.float32)
    eigval, eigvec = eigenmaps(L, num_eig=3)
    with torch.autocast("cpu", torch.bfloat16):
        values = heat_kernel(L, 1.0), heat_trace(L, 1.0), heat_kernel_signature(eigval, eigvec, 1.0)
    expected = heat_kernel(L, 1.0), heat_trace(L, 1.0), heat_kernel_signature(eigval, eigvec, 1.0)
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, reference)


def test_compiles_from_edges_to_heat():
    def run(edge_index, edge_weight):
        L, mask = laplacian(dense_adjacency(edge_index, edge_weight, 2, 4))
        return heat_kernel(L, (0.5, 1.0, 2.0), mask).diagonal(dim1=2, dim2=3)

    torch._dynamo.reset()
    edge_index = torch.tensor([[0, 1, 2, 4, 5], [1, 2, 3, 6, 7]])
    edge_weight = torch.rand(5, requires_grad=True)
    value = torch.compile(run, fullgraph=True, backend="aot_eager")(edge_index, edge_weight)
    torch.testing.assert_close(value, run(edge_index, edge_weight))
    gradients = [torch.autograd.grad(output.square().sum(), edge_weight)[0] for output in (value, run(edge_index, edge_weight))]
    torch.testing.assert_close(*gradients)


def test_nothing():
    assert heat_kernel(torch.zeros(2, 0, 0), [1.0, 2.0]).shape == (2, 2, 0, 0)
    assert heat_trace(torch.zeros(2, 0, 0), 1.0).tolist() == [[0.0], [0.0]]
    assert heat_trace(torch.zeros(2, 0), 1.0).tolist() == [[0.0], [0.0]]
    assert heat_kernel(torch.zeros(1, 1, 1), 5.0).tolist() == [[[[pytest.approx(1.0)]]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heat_kernel(torch.zeros(3, 3), 1.0), "Expected square matrices"),
        (lambda: heat_kernel(torch.zeros(1, 3, 3), -1.0), "Expected one or more finite 'times', none negative"),
        (lambda: heat_kernel(torch.zeros(1, 3, 3), []), "Expected one or more finite 'times'"),
        (lambda: heat_kernel(torch.eye(3)[None] * 5, 1.0), r"Expected 'bound' to exceed every eigenvalue \(got 2.0"),
        (lambda: heat_kernel(torch.full((1, 2, 2), float("nan")), 1.0), "Expected finite Laplacian"),
        (lambda: heat_trace(torch.zeros(1, 3), 1.0, torch.ones(1, 2, dtype=torch.bool)), "Expected 'mask' of shape"),
        (lambda: heat_kernel_signature(torch.zeros(1, 2), torch.zeros(1, 4, 3), 1.0), r"Expected 'eigval' \[B, K\]"),
        (lambda: heat_kernel_signature(torch.zeros(1, 2), torch.zeros(1, 4, 2), torch.ones(1, 1)), "Expected 'times' of shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
