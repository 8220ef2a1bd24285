import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_networkx

from gkd.graphs.testing import (
    check_batch_equals_singles,
    check_gradients,
    check_permutation_equivariance,
    complete_graph,
    cycle_graph,
    fixture_features,
    fixture_graphs,
    grid_graph,
    path_graph,
    permute_graph,
    star_graph,
)

EXPECTED = {
    "path": nx.path_graph(4),
    "cycle": nx.cycle_graph(8),
    "star": nx.star_graph(4),
    "complete": nx.complete_graph(5),
    "grid": nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 4)),
    "two_components": nx.disjoint_union(nx.complete_graph(3), nx.complete_graph(3)),
    "isolated_node": nx.disjoint_union(nx.complete_graph(3), nx.empty_graph(1)),
    "zero_weight": nx.cycle_graph(4),
    "identical_nodes": nx.complete_graph(4),
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_graphs_are_those_of_networkx(name):
    graph = fixture_graphs(torch.float64)[name]
    graph.validate()
    assert graph.x.dtype == graph.edge_weight.dtype == torch.float64
    mine = to_networkx(graph, to_undirected=True)
    np.testing.assert_array_equal(nx.to_numpy_array(mine, nodelist=range(graph.num_nodes)), nx.to_numpy_array(EXPECTED[name]))
    assert graph.is_undirected()


def test_every_graph_is_expected():
    assert list(fixture_graphs()) == list(EXPECTED)


@pytest.mark.parametrize(
    ("graph", "eigval"),
    [
        (path_graph(5), 1 - np.cos(np.pi * np.arange(5) / 4)),
        (cycle_graph(8), 1 - np.cos(2 * np.pi * np.arange(8) / 8)),
        (star_graph(5), [0, 1, 1, 1, 2]),
        (complete_graph(5), [0, 1.25, 1.25, 1.25, 1.25]),
    ],
)
def test_documented_eigenvalues(graph, eigval):
    nxgraph = to_networkx(graph, to_undirected=True)
    np.testing.assert_allclose(nx.normalized_laplacian_spectrum(nxgraph), np.sort(eigval), atol=1e-12)


def test_features_are_what_they_are_called():
    maps = fixture_features(batch_size=3, channels=4, height=2, width=3, dtype=torch.float64)
    assert all(value.shape == (3, 4, 2, 3) and value.dtype == torch.float64 for value in maps.values())
    assert maps["random"].min() >= 0 > maps["signed"].min()
    assert maps["all_zero"].eq(0).all()
    assert maps["zero_channel"][:, 0].eq(0).all()
    assert maps["zero_channel"][:, 1:].ne(0).any()
    assert maps["identical_channels"].std(dim=1).eq(0).all()
    assert maps["identical_patches"].flatten(2).std(dim=2).eq(0).all()
    rows = maps["two_groups"].flatten(2)
    assert (rows[:, :2] @ rows[:, 2:].transpose(1, 2)).eq(0).all()
    assert rows.ne(0).any(dim=2).all()


def test_permute_graph_renames_nodes():
    graph = path_graph(3)
    graph.edge_weight = torch.tensor([1.0, 1.0, 5.0, 5.0])  # 0-1 of weight 1, 1-2 of weight 5
    permuted = permute_graph(graph, torch.tensor([2, 0, 1]), torch.tensor([3, 2, 1, 0]))
    torch.testing.assert_close(permuted.x, graph.x[[2, 0, 1]])
    A = torch.zeros(3, 3)
    A[permuted.edge_index[0], permuted.edge_index[1]] = permuted.edge_weight
    # old nodes 0, 1, 2 are now called 1, 2, 0
    torch.testing.assert_close(A, torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 1.0], [5.0, 1.0, 0.0]]))
    assert graph.edge_index.tolist() == path_graph(3).edge_index.tolist()


def degree(graph: Data) -> torch.Tensor:
    return torch.zeros(graph.num_nodes).index_add(0, graph.edge_index[0], graph.edge_weight)


def test_permutation_checker():
    for graph in [grid_graph(), Batch.from_data_list([grid_graph(), path_graph(3)])]:
        check_permutation_equivariance(degree, graph)
        check_permutation_equivariance(lambda graph: {"sum": graph.x.sum(0)}, graph, invariant=True)
        with pytest.raises(AssertionError, match="output 0 to follow a permutation"):
            check_permutation_equivariance(lambda graph: torch.arange(float(graph.num_nodes)), graph)
        with pytest.raises(AssertionError, match="output first to stay the same"):
            check_permutation_equivariance(lambda graph: {"first": graph.x[0]}, graph, invariant=True, seed=1)
    with pytest.raises(AssertionError, match="to follow a permutation"):
        check_permutation_equivariance(lambda graph: graph.edge_index[0].float()[: graph.num_nodes], grid_graph())


def test_batch_checker():
    graphs = list(fixture_graphs().values())
    check_batch_equals_singles(degree, graphs)
    check_batch_equals_singles(lambda batch: (degree(batch), batch.x), graphs)
    with pytest.raises(AssertionError, match="output 1 of a batch"):
        check_batch_equals_singles(lambda batch: (batch.x, batch.x / batch.x.max()), graphs)
    with pytest.raises(AssertionError, match=r"got shapes \[1\] and \[9\]"):
        check_batch_equals_singles(lambda batch: batch.x.sum().view(1), graphs)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_gradient_checker():
    check_gradients(lambda x, y: (x * y, x + y), torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="agree with finite differences"):
        check_gradients(WrongGradient.apply, torch.ones(2))
    with pytest.raises(AssertionError, match=r"finite gradient to input 0 at degenerate case 1 \(got inf\)"):
        check_gradients(torch.sqrt, torch.ones(2), degenerate=[torch.ones(2), torch.zeros(2)])
    with pytest.raises(AssertionError, match=r"finite output 0 at degenerate case 0 \(got inf\)"):
        check_gradients(torch.reciprocal, degenerate=[torch.zeros(2)])
    with pytest.raises(AssertionError, match="gradient to reach an input at degenerate case 0"):
        check_gradients(lambda x: x.detach(), degenerate=[torch.zeros(2)])
