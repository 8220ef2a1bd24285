import copy
import pickle

import pytest
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.loader import DataLoader

from gkd.graphs.encodings import AddEncoding, HeatKernelEncoding, LaplacianEncoding, RandomWalkEncoding, return_probabilities
from gkd.graphs.testing import (
    check_batch_equals_singles,
    check_gradients,
    check_permutation_equivariance,
    complete_graph,
    cycle_graph,
    fixture_graphs,
    grid_graph,
    path_graph,
    star_graph,
    two_components_graph,
)

ENCODINGS = {
    "laplacian": LaplacianEncoding(num_eig=3, sign="abs"),
    "heat": HeatKernelEncoding(times=(0.1, 1.0, 10.0)),
    "walk": RandomWalkEncoding(walk_length=5),
}


def weighted(graph: Data, seed: int = 0) -> Data:
    """Random symmetric weights: every eigenvalue simple, every gap real."""
    A = torch.rand(graph.num_nodes, graph.num_nodes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    graph.edge_weight = (A + A.t())[graph.edge_index[0], graph.edge_index[1]].to(graph.x.dtype)
    return graph


def dense(graph: Data) -> torch.Tensor:
    A = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    return A.index_put((graph.edge_index[0], graph.edge_index[1]), graph.edge_weight.double(), accumulate=True)


def sym_laplacian(graph: Data) -> torch.Tensor:
    A = dense(graph)
    scale = A.sum(1).clamp(min=1e-30).rsqrt() * (A.sum(1) > 0)
    return torch.diag((A.sum(1) > 0).double()) - scale[:, None] * A * scale[None]


def encode_weights(encoding, graph, symmetric=True):
    """The encoding as a function of the edge weights, which stay symmetric under finite differences."""
    place = {tuple(edge): number for number, edge in enumerate(graph.edge_index.t().tolist())}
    back = torch.tensor([place[(j, i)] for i, j in graph.edge_index.t().tolist()])

    def fn(weight):
        weight = (weight + weight[back]) / 2 if symmetric else weight
        return encoding(Data(edge_index=graph.edge_index, edge_weight=weight, num_nodes=graph.num_nodes))

    return fn


# Values.


def test_walk_hand_values():
    # Path 0 - 1 - 2 with weights 1 and 3: from 1 the walk goes to 0 with 1/4 and to 2 with 3/4, from the ends back to 1.
    graph = path_graph(3)
    graph.edge_weight = torch.tensor([1.0, 1.0, 3.0, 3.0])
    expected = torch.tensor([[0, 0.25, 0, 0.25], [0, 1, 0, 1], [0, 0.75, 0, 0.75]])
    torch.testing.assert_close(RandomWalkEncoding(walk_length=4)(graph), expected)


@pytest.mark.parametrize("walk_length", [1, 2, 3, 6, 9])
def test_walk_against_powers(walk_length):
    A = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P = A / A.sum(-1, keepdim=True)
    expected = torch.stack([torch.linalg.matrix_power(P, k).diagonal(dim1=1, dim2=2) for k in range(1, walk_length + 1)], -1)
    torch.testing.assert_close(return_probabilities(A, walk_length), expected)


@pytest.mark.parametrize("name", list(fixture_graphs()))
def test_walk_equals_pyg(name):
    graph = fixture_graphs()[name]
    if name == "zero_weight":  # edges of weight 0 are none, which PyG cannot know
        graph.edge_index, graph.edge_weight = graph.edge_index[:, :0], graph.edge_weight[:0]
    expected = T.AddRandomWalkPE(8, attr_name="pe")(graph).pe
    torch.testing.assert_close(AddEncoding(RandomWalkEncoding(8))(graph).pe, expected)


@pytest.mark.parametrize("name", list(fixture_graphs()))
def test_heat_equals_matrix_exponential(name):
    graph = fixture_graphs()[name]
    graph = graph if name == "zero_weight" else weighted(graph)
    times = (0.0, 0.3, 2.0, 30.0)
    expected = torch.stack([torch.matrix_exp(-t * sym_laplacian(graph)).diagonal() for t in times], -1)
    heat = HeatKernelEncoding(times=times)(graph)
    torch.testing.assert_close(heat.double(), expected, rtol=1e-4, atol=1e-5)
    assert heat.min() >= 0
    assert heat.max() <= 1 + 1e-5


def test_heat_of_the_lowest_pairs():
    # The complete graph has the kernel vector (1, 1, 1, 1) / 2 alone below its eigenspace: each node keeps 1/4 of it.
    torch.testing.assert_close(HeatKernelEncoding(num_eig=1, times=(1.0,))(complete_graph(4)), torch.full((4, 1), 0.25))
    graph = weighted(grid_graph())
    eigval, eigvec = torch.linalg.eigh(sym_laplacian(graph))
    expected = (eigvec[:, :5].square() * (-2.0 * eigval[:5]).exp()).sum(1, keepdim=True)
    torch.testing.assert_close(HeatKernelEncoding(num_eig=5, times=(2.0,))(graph).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_channels", [5, 40])
def test_heat_of_a_graph_with_factor_is_exact(num_channels):
    # One node without an edge beside those that the factor joins.
    factor = torch.rand(num_channels, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor[2] = 0
    A = factor @ factor.t()
    edge_index = (A > 0).nonzero().t()
    graph = Data(x=factor, edge_index=edge_index, edge_weight=A[edge_index[0], edge_index[1]], factor=factor)
    expected = torch.stack([torch.matrix_exp(-t * sym_laplacian(graph)).diagonal() for t in (0.5, 5.0)], -1)
    torch.testing.assert_close(HeatKernelEncoding(times=(0.5, 5.0))(graph), expected, rtol=1e-6, atol=1e-7)


def test_laplacian_against_eigh():
    graph = weighted(grid_graph())
    expected = torch.linalg.eigh(sym_laplacian(graph))[1][:, 1:5]
    pe = LaplacianEncoding(num_eig=4, sign=None)(graph).double()
    torch.testing.assert_close((pe.t() @ expected).abs(), torch.eye(4, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", [path_graph(6), weighted(grid_graph()), weighted(cycle_graph(7))])
def test_laplacian_equals_pyg_up_to_sign(graph):
    expected = T.AddLaplacianEigenvectorPE(3, attr_name="pe", is_undirected=True)(graph).pe
    pe = AddEncoding(LaplacianEncoding(3))(graph).pe
    torch.testing.assert_close(pe.abs(), expected.to(pe).abs(), rtol=1e-3, atol=1e-4)


def test_laplacian_drops_the_whole_kernel_and_fills_with_zeros():
    pe = LaplacianEncoding(num_eig=6, sign=None)(two_components_graph())
    assert pe.shape == (6, 6)
    torch.testing.assert_close(pe.t() @ pe, torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([pe[:3].sum(0), pe[3:].sum(0)]), torch.zeros(2, 6), rtol=0, atol=1e-5)


# Signs.


def test_random_signs_in_training_alone():
    encoding, graph = LaplacianEncoding(num_eig=3), weighted(path_graph(5))
    batch = Batch.from_data_list([graph, graph, graph])
    plain = LaplacianEncoding(num_eig=3, sign=None)(batch)
    signs = (encoding(batch) / plain).view(3, 5, 3)
    torch.testing.assert_close(signs, signs[:, :1].expand_as(signs).sign())
    assert len(signs[:, 0].unique(dim=0)) > 1, "every graph draws for itself"
    encoding.eval()
    torch.testing.assert_close(encoding(batch), plain)
    assert (LaplacianEncoding(num_eig=3, sign="abs")(batch) >= 0).all()


def test_signs_leave_the_global_generator_alone_and_resume():
    encoding, graph = LaplacianEncoding(num_eig=8, seed=3), weighted(grid_graph())
    before = torch.get_rng_state()
    first = encoding(graph)
    assert torch.equal(torch.get_rng_state(), before)
    resumed = LaplacianEncoding(num_eig=8, seed=4)
    resumed.load_state_dict(encoding.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(encoding)))
    second = encoding(graph)
    torch.testing.assert_close(resumed(graph), second, rtol=0, atol=0)
    torch.testing.assert_close(copied(graph), second, rtol=0, atol=0)
    assert not torch.equal(first, second)
    torch.testing.assert_close(LaplacianEncoding(num_eig=8, seed=3)(graph), first, rtol=0, atol=0)


class Paths(InMemoryDataset):
    def __init__(self, transform):
        super().__init__(None, transform)
        self.data, self.slices = self.collate([weighted(path_graph(6)) for _ in range(8)])


def test_workers_draw_unlike_signs():
    loader = DataLoader(Paths(AddEncoding(LaplacianEncoding(num_eig=5, sign="random"))), batch_size=4, num_workers=2)
    torch.manual_seed(0)
    first, second = (batch.pe for batch in loader)
    again, _ = (batch.pe for batch in loader)
    assert not torch.equal(first, second)
    assert not torch.equal(first, again), "nor do they repeat themselves from epoch to epoch"


# What holds for all of them.


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_permutation_and_batch(encoding):
    fixtures = fixture_graphs()
    fixtures.pop("star")  # whatever its weights, its eigenvalue 1 repeats; eigenvectors of it are anybody's choice
    graphs = [weighted(graph, seed) for seed, graph in enumerate(fixtures.values())]
    for graph in graphs:
        check_permutation_equivariance(encoding, graph, atol=1e-4)
    check_permutation_equivariance(encoding, Batch.from_data_list(graphs), atol=1e-4)
    check_batch_equals_singles(encoding, graphs, atol=1e-4)


def test_walk_and_heat_know_no_basis():
    for encoding in (ENCODINGS["heat"], ENCODINGS["walk"]):
        for graph in fixture_graphs().values():
            check_permutation_equivariance(encoding, graph)


@pytest.mark.parametrize("name", ENCODINGS)
def test_gradients(name):
    encoding = ENCODINGS[name]
    graph = weighted(path_graph(5, torch.float64))
    check_gradients(encode_weights(encoding, graph), graph.edge_weight)
    for graph in fixture_graphs().values():
        check_gradients(encode_weights(encoding, graph), degenerate=[graph.edge_weight, torch.zeros(graph.num_edges)])


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_float32_under_autocast_and_float64_kept(encoding):
    graph = weighted(grid_graph())
    expected = encoding(graph)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoding(graph), expected, rtol=0, atol=0)
    half = graph.clone()
    half.edge_weight = graph.edge_weight.bfloat16()
    assert encoding(half).dtype == torch.float32
    assert encoding(weighted(grid_graph(dtype=torch.float64))).dtype == torch.float64


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_graphs_of_one_node_and_of_none(encoding):
    none = torch.empty(2, 0, dtype=torch.long)
    one = Data(x=torch.ones(1, 3), edge_index=none, edge_weight=torch.ones(0))
    width = encoding(path_graph(6)).size(1)
    expected = torch.ones(1, width) if isinstance(encoding, HeatKernelEncoding) else torch.zeros(1, width)
    torch.testing.assert_close(encoding(one), expected)
    torch.testing.assert_close(encoding(Batch.from_data_list([path_graph(3), one]))[3:], expected)
    assert encoding(Data(x=torch.ones(0, 2), edge_index=none)).shape == (0, width)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_on_the_gpu(encoding):
    batch = Batch.from_data_list([weighted(graph) for graph in fixture_graphs().values()])
    on_gpu = copy.deepcopy(encoding).cuda()(batch.clone().cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), encoding(batch), rtol=1e-3, atol=1e-3)


# The transform.


def test_transform_of_a_batch_comes_apart_again():
    graphs = list(fixture_graphs().values())
    batch = Batch.from_data_list(graphs)
    names = set(batch._slice_dict)
    encoded = AddEncoding(HeatKernelEncoding())(batch)
    expected = Batch.from_data_list([AddEncoding(HeatKernelEncoding())(graph) for graph in graphs])
    torch.testing.assert_close(encoded.pe, expected.pe)
    assert encoded._slice_dict.keys() == expected._slice_dict.keys()
    assert all(torch.equal(encoded._slice_dict[name], value) for name, value in expected._slice_dict.items())
    assert all(torch.equal(encoded._inc_dict[name], value) for name, value in expected._inc_dict.items())
    for mine, single in zip(encoded.to_data_list(), expected.to_data_list(), strict=True):
        torch.testing.assert_close(mine.pe, single.pe)
    assert "pe" not in batch
    assert set(batch._slice_dict) == names, "the batch that was passed in is as it was"
    assert batch[0].keys() == graphs[0].keys()


def test_transform_of_a_batch_without_features():
    graphs = [Data(edge_index=graph.edge_index, num_nodes=graph.num_nodes) for graph in (path_graph(3), star_graph(5))]
    encoded = AddEncoding(RandomWalkEncoding(4))(Batch.from_data_list(graphs))
    assert [graph.pe.shape for graph in encoded.to_data_list()] == [(3, 4), (5, 4)]


def test_transform_appends_to_x():
    graph = path_graph(4)
    transform = AddEncoding(RandomWalkEncoding(4), attr_name=None)
    torch.testing.assert_close(transform(graph).x, torch.cat([graph.x, RandomWalkEncoding(4)(graph)], 1))
    batch = Batch.from_data_list([graph, star_graph(5)])
    assert [single.x.shape for single in transform(batch).to_data_list()] == [(4, 7), (5, 7)]
    bare = Data(edge_index=graph.edge_index, num_nodes=4)
    assert transform(bare).x.shape == (4, 4)
    narrow = Data(x=torch.ones(4), edge_index=graph.edge_index)
    assert transform(narrow).x.shape == (4, 5)


def test_transform_in_a_pipeline():
    transform = T.Compose([T.AddSelfLoops("edge_weight"), AddEncoding(LaplacianEncoding(2), "lap"), AddEncoding(RandomWalkEncoding(3))])
    batch = next(iter(DataLoader(Paths(transform), batch_size=4)))
    assert batch.lap.shape == (24, 2)
    assert batch.pe.shape == (24, 3)
    assert str(AddEncoding(RandomWalkEncoding(3))) == "AddEncoding(RandomWalkEncoding(walk_length=3), attr_name='pe')"


def test_transform_is_differentiable():
    graph = weighted(path_graph(5))
    graph.edge_weight.requires_grad_()
    (gradient,) = torch.autograd.grad(AddEncoding(HeatKernelEncoding())(graph).pe.square().sum(), graph.edge_weight)
    assert gradient.abs().sum() > 0


def test_integer_features_take_the_type_of_the_encoding():
    graph = path_graph(3)
    graph.x = torch.tensor([1, 2, 3])
    pe = RandomWalkEncoding(walk_length=2)
    assert AddEncoding(pe, attr_name=None)(graph).x.tolist() == [[1.0, 0.0, 0.5], [2.0, 0.0, 1.0], [3.0, 0.0, 0.5]]
    graph.x = torch.ones(3, 1, dtype=torch.float16)
    assert AddEncoding(pe, attr_name=None)(graph).x.dtype == torch.float16


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(bad):
    graph = path_graph(4)
    graph.edge_weight[2] = bad
    for encoding in (RandomWalkEncoding(2), LaplacianEncoding(1), HeatKernelEncoding(), HeatKernelEncoding(2)):
        with pytest.raises(ValueError, match=r"finite edge weights that are not negative \(got 1 others, such as"):
            encoding(graph)


@pytest.mark.parametrize("encoding", [RandomWalkEncoding(3), HeatKernelEncoding(), LaplacianEncoding(2, sign="abs")], ids=repr)
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_any_unit_of_the_weights(encoding, scale):
    graph = weighted(path_graph(5))
    expected = encoding(graph)
    graph.edge_weight = (scale * graph.edge_weight).requires_grad_()
    pe = encoding(graph)
    torch.testing.assert_close(pe, expected)
    assert torch.autograd.grad(pe.square().sum(), graph.edge_weight)[0].isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"num_eig to be a positive integer \(got 0\)"):
        LaplacianEncoding(num_eig=0)
    with pytest.raises(ValueError, match=r"sign to be 'random', 'abs' or None \(got 'flip'\)"):
        LaplacianEncoding(sign="flip")
    with pytest.raises(ValueError, match=r"num_eig to be a positive integer \(got 0\)"):
        HeatKernelEncoding(num_eig=0)
    for encoding in (LaplacianEncoding, HeatKernelEncoding):
        with pytest.raises(ValueError, match=r"method to be 'auto', .* \(got 'nonsense'\)"):
            encoding(method="nonsense")
        with pytest.raises(ValueError, match=r"normalization to be 'sym', 'rw' or None \(got 'nonsense'\)"):
            encoding(normalization="nonsense")
    for times in [(), (1.0, -1.0), (float("inf"),), (float("nan"),)]:
        with pytest.raises(ValueError, match=r"Expected .*finite 'times'.* \(got"):
            HeatKernelEncoding(times=times)
    with pytest.raises(ValueError, match=r"walk_length to be a positive integer \(got 0\)"):
        RandomWalkEncoding(0)
    with pytest.raises(ValueError, match=r"encoding of shape \[4, num_features\] \(got \[3, 3\]\)"):
        AddEncoding(lambda graph: graph.x[:3])(path_graph(4))
