import pytest
import torch
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.utils import to_dense_adj

from gkd.graphs.dense import dense_adjacency, from_dense, from_padded, to_dense, to_padded
from gkd.graphs.encodings import RandomWalkEncoding
from gkd.graphs.laplacian import laplacian
from gkd.graphs.layout import layout
from gkd.graphs.spectral import eigenmaps
from gkd.graphs.testing import cycle_graph, fixture_graphs, isolated_node_graph, path_graph, zero_weight_graph


def random_graph(num_nodes: int, num_edges: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes, (2, num_edges), generator=generator)  # loops and parallel edges among them
    return Data(x=torch.rand(num_nodes, 2), edge_index=edge_index, edge_weight=torch.rand(num_edges, generator=generator))


def same_batch(actual: Batch, expected: Batch) -> None:
    assert list(actual.keys()) == list(expected.keys())
    for name in expected.keys():  # noqa: SIM118
        assert actual[name] == expected[name] if name == "num_nodes" else torch.equal(actual[name], expected[name]), name
    for table in ("_slice_dict", "_inc_dict"):
        ours, theirs = getattr(actual, table), getattr(expected, table)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert actual.num_graphs == expected.num_graphs


def test_to_dense_hand_value():
    # 0 -> 1 twice (0.5 + 0.25), 1 -> 0, a loop at 2, and an edge of weight 0 that is none.
    edge_index = torch.tensor([[0, 0, 1, 2, 2], [1, 1, 0, 2, 0]])
    A, mask = to_dense(Data(edge_index=edge_index, edge_weight=torch.tensor([0.5, 0.25, 1.0, 3.0, 0.0]), num_nodes=3))
    assert A.tolist() == [[[0.0, 0.75, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]]
    assert mask.tolist() == [[True, True, True]]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 1), (2, 0, 6)])
def test_to_dense_agrees_with_pyg(sizes):
    graphs = [random_graph(n, 3 * n if n else 0, seed) for seed, n in enumerate(sizes)] if 0 not in sizes else None
    if graphs is None:
        graphs = [
            random_graph(2, 5, 0),
            Data(x=torch.rand(0, 2), edge_index=torch.zeros(2, 0, dtype=torch.long), edge_weight=torch.rand(0)),
        ]
        graphs.append(random_graph(6, 9, 1))
    batch = Batch.from_data_list(graphs)
    A, mask = to_dense(batch)
    expected = to_dense_adj(batch.edge_index, batch.batch, batch.edge_weight, batch_size=3)
    torch.testing.assert_close(A, expected)
    assert mask.sum(1).tolist() == list(sizes)


def test_ragged_batch_without_slices_is_counted():
    batch = Batch.from_data_list([random_graph(3, 4, 0), random_graph(5, 9, 1)])
    expected, expected_mask = to_dense(batch)
    by_hand = Data(x=batch.x, edge_index=batch.edge_index, edge_weight=batch.edge_weight, batch=batch.batch)
    for graph in (by_hand, Data(**by_hand.to_dict(), ptr=batch.ptr)):
        A, mask = to_dense(graph)
        assert torch.equal(A, expected)
        assert torch.equal(mask, expected_mask)


def test_out_of_date_slices_are_not_trusted():
    batch = Batch.from_data_list([path_graph(3), path_graph(3)])
    batch.x, batch.batch, batch.ptr = batch.x[:5], batch.batch[:5], torch.tensor([0, 3, 5])
    assert to_dense_shape_and_sizes(batch) == ((2, 3), [3, 2])


def to_dense_shape_and_sizes(batch):
    mask = layout(batch).mask
    return tuple(mask.shape), mask.sum(1).tolist()


def test_subgraph_of_a_batch_is_counted_anew():
    graphs = [path_graph(4), cycle_graph(5), path_graph(3)]
    batch = Batch.from_data_list(graphs).subgraph(torch.tensor([0, 1, 4, 5, 6, 11]))  # its ptr stays [0, 4, 9, 12]
    A, mask = to_dense(batch)
    assert mask.sum(dim=1).tolist() == [2, 3, 1]
    expected = torch.zeros(3, 3, 3)
    expected[0, 0, 1] = expected[0, 1, 0] = expected[1, 0, 1] = expected[1, 1, 0] = expected[1, 1, 2] = expected[1, 2, 1] = 1
    assert torch.equal(A, expected)
    without = Batch.from_data_list(graphs).subgraph(torch.tensor([0, 11]))  # the second graph has no node left
    assert layout(without).mask.sum(dim=1).tolist() == [1, 0, 1]


def test_batch_out_of_order():
    graph = Data(x=torch.rand(3, 1), edge_index=torch.zeros(2, 0, dtype=torch.long), batch=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"Expected 'batch' in ascending order.*\(got graph 0 at node 2 after graph 1\): sort the nodes"):
        to_dense(graph)


def test_several_types_of_nodes():
    graph = HeteroData()
    graph["a"].x = torch.rand(2, 1)
    for call in (to_dense, laplacian, eigenmaps, RandomWalkEncoding()):
        with pytest.raises(ValueError, match=r"Expected a Data or Batch with one type of nodes \(got HeteroData\): take to_homogeneous"):
            call(graph)


def test_missing_weights_are_ones_in_the_type_of_the_features():
    graph = path_graph(3, dtype=torch.float64)
    del graph.edge_weight
    A, _ = to_dense(graph)
    assert A.dtype == torch.float64
    assert A.sum() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float32, torch.float64])
def test_type_is_float32_or_float64(dtype):
    graph = path_graph(3)
    graph.edge_weight = graph.edge_weight.to(dtype)
    assert to_dense(graph)[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_column_of_weights():
    graph = path_graph(3)
    graph.edge_weight = graph.edge_weight[:, None]
    assert torch.equal(to_dense(graph)[0], to_dense(path_graph(3))[0])


def test_gradient_reaches_every_weight():
    graph = random_graph(4, 7, 0)
    weight = graph.edge_weight.double().requires_grad_()

    def run(value):
        return to_dense(Data(x=graph.x, edge_index=graph.edge_index, edge_weight=value))[0]

    assert torch.autograd.gradcheck(run, (weight,))


@pytest.mark.parametrize("name", fixture_graphs())
def test_round_trip(name):
    graph = fixture_graphs()[name]
    A, mask = to_dense(graph)
    assert torch.equal(to_dense(from_dense(A, mask))[0], A)


def test_from_dense_is_from_data_list():
    A = torch.rand(3, 4, 4) * (torch.rand(3, 4, 4) > 0.4)
    x = torch.rand(3, 4, 2)
    mask = torch.tensor([[True, True, True, True], [True, False, True, True], [False, False, False, False]])
    singles, bare = [], []
    for b in range(3):
        keep = mask[b]
        small = A[b][keep][:, keep]
        edge_index = small.nonzero().t()
        weight = small[edge_index[0], edge_index[1]]
        singles.append(Data(x=x[b][keep], edge_index=edge_index, edge_weight=weight))
        bare.append(Data(edge_index=edge_index, edge_weight=weight, num_nodes=int(keep.sum())))
    same_batch(from_dense(A, mask, x), Batch.from_data_list(singles))
    result = from_dense(A, mask)
    same_batch(result, Batch.from_data_list(bare))
    assert result[1].num_nodes == 3
    assert [graph.num_edges for graph in result.to_data_list()] == [graph.num_edges for graph in bare]
    assert result.validate()


def test_from_dense_is_differentiable_and_ignores_what_is_masked():
    A = torch.rand(1, 3, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    from_dense(A, mask).edge_weight.sum().backward()
    assert A.grad.tolist() == [[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]]


@pytest.mark.parametrize("graphs", [[path_graph(3), path_graph(3)], [path_graph(4), isolated_node_graph(), path_graph(2)]])
def test_padding_and_back(graphs):
    batch = Batch.from_data_list(graphs)
    x = torch.rand(batch.num_nodes, 2, 3, dtype=torch.float64, requires_grad=True)
    padded = to_padded(x, batch)
    assert padded.shape == (len(graphs), max(graph.num_nodes for graph in graphs), 2, 3)
    assert torch.equal(from_padded(padded, batch), x)
    mask = layout(batch).mask
    assert torch.equal(padded[mask], x)
    assert padded[~mask].abs().sum() == 0
    assert torch.autograd.gradcheck(lambda value: from_padded(to_padded(value, batch) ** 2, batch), (x,))


def test_no_edges_no_nodes():
    assert torch.equal(to_dense(zero_weight_graph())[0], torch.zeros(1, 4, 4))
    nothing = Data(x=torch.zeros(0, 3), edge_index=torch.zeros(2, 0, dtype=torch.long))
    A, mask = to_dense(nothing)
    assert A.shape == (1, 0, 0)
    assert mask.shape == (1, 0)
    assert to_padded(nothing.x, nothing).shape == (1, 0, 3)
    assert dense_adjacency(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), 0, 5).shape == (0, 5, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_adjacency(torch.tensor([[0], [3]]), torch.ones(1), 2, 2), "join two nodes of one graph"),
        (lambda: dense_adjacency(torch.tensor([0, 1]), torch.ones(1), 1, 2), r"Expected 'edge_index' of shape \[2, num_edges\]"),
        (lambda: dense_adjacency(torch.tensor([[0], [1]]), torch.ones(2), 1, 2), r"Expected 'edge_weight' of shape \[1\] \(got \[2\]\)"),
        (lambda: to_dense(Data(x=torch.ones(2, 1))), "Expected a graph with 'edge_index'"),
        (lambda: to_padded(torch.ones(3, 1), path_graph(2)), "Expected one row for each of 2 nodes"),
        (lambda: from_padded(torch.ones(2, 2, 1), path_graph(2)), r"Expected 'x' of shape \[1, 2, ...\]"),
        (lambda: from_dense(torch.ones(2, 3)), "Expected square matrices"),
        (lambda: from_dense(torch.ones(1, 3, 2)), "Expected square matrices"),
        (lambda: from_dense(torch.ones(1, 3, 3), torch.ones(1, 3)), "Expected a boolean 'mask'"),
        (lambda: from_dense(torch.ones(1, 3, 3), x=torch.ones(1, 2, 3)), "Expected 'x' of shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
