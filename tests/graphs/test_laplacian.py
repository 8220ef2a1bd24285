import networkx as nx
import pytest
import torch
from torch_geometric.data import Batch, Data

from gkd.graphs.dense import to_dense
from gkd.graphs.laplacian import inverse_sqrt, laplacian, node_degree, sparse_laplacian
from gkd.graphs.testing import check_gradients, check_permutation_equivariance, fixture_graphs, grid_graph, isolated_node_graph, path_graph

NORMALIZATIONS = ["sym", "rw", None]


def random_adjacency(num_graphs: int = 2, num_nodes: int = 5, seed: int = 0) -> torch.Tensor:
    A = torch.rand(num_graphs, num_nodes, num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return A + A.mT


def test_hand_value():
    # Path 0 - 1 - 2 with weights 1 and 3: degrees 1, 4, 3, so l_01 = -1 / sqrt(1 * 4) = -1/2 and l_12 = -3 / sqrt(4 * 3) = -sqrt(3)/2.
    A = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 3.0], [0.0, 3.0, 0.0]]])
    root = 3**0.5 / 2
    expected = {
        "sym": [[1.0, -0.5, 0.0], [-0.5, 1.0, -root], [0.0, -root, 1.0]],
        "rw": [[1.0, -1.0, 0.0], [-0.25, 1.0, -0.75], [0.0, -1.0, 1.0]],
        None: [[1.0, -1.0, 0.0], [-1.0, 4.0, -3.0], [0.0, -3.0, 3.0]],
    }
    for normalization, value in expected.items():
        L, mask = laplacian(A, normalization)
        torch.testing.assert_close(L, torch.tensor([value]))
        assert bool(mask.all())


@pytest.mark.parametrize("name", fixture_graphs())
def test_networkx(name):
    graph = fixture_graphs(torch.float64)[name]
    A, _ = to_dense(graph)
    reference = nx.from_numpy_array(A[0].numpy())
    expected = nx.laplacian_matrix(reference).toarray()
    torch.testing.assert_close(laplacian(graph, None)[0][0], torch.as_tensor(expected, dtype=torch.float64))
    expected = nx.normalized_laplacian_matrix(reference).toarray()
    torch.testing.assert_close(laplacian(graph, "sym")[0][0], torch.as_tensor(expected))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_sparse_and_dense_ways_agree(normalization):
    # A grid is sparse enough for the way edge by edge; its adjacency goes by rows. Directed and parallel edges and a loop among them.
    grid = grid_graph(6, 6, dtype=torch.float64)
    extra = torch.tensor([[0, 0, 7, 35, 35], [20, 20, 7, 1, 2]])
    graph = Data(x=grid.x, edge_index=torch.cat([grid.edge_index, extra], 1))
    graph.edge_weight = torch.rand(graph.num_edges, dtype=torch.float64)
    batch = Batch.from_data_list([graph, path_graph(3, dtype=torch.float64)])
    batch.edge_weight.requires_grad_()
    L, mask = laplacian(batch, normalization)
    A, expected_mask = to_dense(batch)
    expected, _ = laplacian(A, normalization, expected_mask)
    torch.testing.assert_close(L, expected)
    assert torch.equal(mask, expected_mask)
    weight = torch.rand_like(L)
    gradients = [torch.autograd.grad((value * weight).sum(), batch.edge_weight)[0] for value in (L, expected)]
    torch.testing.assert_close(*gradients)


def test_directed_graph_is_made_undirected():
    A = torch.rand(1, 4, 4)
    for normalization in NORMALIZATIONS:
        assert torch.equal(laplacian(A, normalization)[0], laplacian((A + A.mT) / 2, normalization)[0])
    assert torch.equal(laplacian(A)[0], laplacian(A)[0].mT)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_isolated_node_has_a_zero_row(normalization):
    L, _ = laplacian(isolated_node_graph(), normalization)
    assert L[0, 3].abs().sum() == 0
    assert L[0, :, 3].abs().sum() == 0
    assert torch.linalg.eigvals(L[0]).real.abs().lt(1e-6).sum() == 2  # the triangle and the node


def test_node_with_a_loop_only_has_a_zero_row():
    L, _ = laplacian(torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]))
    assert L.abs().sum() < 1e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients(normalization):
    zero, lonely = torch.zeros(1, 3, 3), random_adjacency(1, 3).float()
    lonely[0, 2] = lonely[0, :, 2] = 0
    tiny = torch.full((1, 3, 3), 1e-30)
    check_gradients(lambda A: laplacian(A, normalization)[0], random_adjacency(), degenerate=[zero, lonely, tiny, tiny * 1e14])


def test_inverse_sqrt():
    degree = torch.tensor([0.0, 4.0, -1.0, 1e-38], requires_grad=True)
    value = inverse_sqrt(degree)
    assert value.tolist() == [0.0, 0.5, 0.0, 0.0]
    value.sum().backward()
    assert degree.grad.tolist() == [0.0, -0.0625, 0.0, 0.0]  # -1/2 * 4 ** -1.5


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("poison", [1e6, float("nan")])
def test_padding_has_no_influence(normalization, poison):
    A = random_adjacency(1, 4)
    padded = torch.full((1, 6, 6), poison, dtype=torch.float64)
    place = torch.tensor([0, 2, 3, 5])  # holes too
    padded[:, place[:, None], place] = A
    mask = torch.zeros(1, 6, dtype=torch.bool).index_fill(1, place, True)
    padded.requires_grad_()
    L, _ = laplacian(padded, normalization, mask)
    assert torch.equal(L, laplacian(padded.detach().masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0), normalization)[0])
    torch.testing.assert_close(L[:, place[:, None], place], laplacian(A, normalization)[0])
    assert L[~mask].abs().sum() == 0
    (L * torch.rand_like(L)).sum().backward()
    assert bool(padded.grad.isfinite().all())
    assert padded.grad[~mask].abs().sum() == 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permutation_and_scale(normalization):
    graph = grid_graph(3, 4)
    graph.edge_weight = 1 + to_dense(graph)[0].new_tensor(range(graph.num_edges)).sin() / 2
    check_permutation_equivariance(lambda g: laplacian(g, normalization)[0][0].sort(-1).values, graph)
    if normalization is not None:
        A = random_adjacency()
        torch.testing.assert_close(laplacian(A * 1e-6, normalization)[0], laplacian(A, normalization)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_type_under_autocast(dtype):
    A = random_adjacency().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        L, _ = laplacian(A)
    assert L.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(L, laplacian(A)[0])


def test_sparse_laplacian_and_degree():
    batch = Batch.from_data_list([path_graph(3), path_graph(2)])
    degree, mask = node_degree(batch)
    assert degree.tolist() == [[1.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    torch.testing.assert_close(sparse_laplacian(batch).to_dense(), laplacian(to_dense(batch)[0])[0])
    with pytest.raises(ValueError, match="Expected normalization to be 'sym' or None"):
        sparse_laplacian(batch, "rw")


def test_nothing():
    assert laplacian(torch.zeros(2, 0, 0))[0].shape == (2, 0, 0)
    assert laplacian(torch.zeros(0, 3, 3))[0].shape == (0, 3, 3)
    assert laplacian(torch.ones(1, 1, 1))[0].tolist() == [[[0.0]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laplacian(torch.ones(1, 2, 2), "left"), "Expected normalization to be 'sym', 'rw' or None"),
        (lambda: laplacian(torch.ones(2, 2)), "Expected square matrices"),
        (lambda: laplacian(torch.ones(1, 2, 2), mask=torch.ones(1, 3, dtype=torch.bool)), "Expected a boolean 'mask' of shape"),
        (lambda: laplacian(path_graph(2), mask=torch.ones(1, 2, dtype=torch.bool)), "Expected 'mask' with dense adjacencies only"),
        (
            lambda: laplacian(torch.full((1, 2, 2), float("nan"))),
            r"Expected finite edge weights that are not negative \(got 4 others, such as n",
        ),
        (lambda: laplacian(torch.full((1, 2, 2), float("inf"))), "Expected finite edge weights"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
