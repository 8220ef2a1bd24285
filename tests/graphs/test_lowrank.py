import pytest
import torch

import gkd.graphs.spectral
from gkd.graphs import ChannelNodes, CompleteEdges, GraphBuilder, KNNEdges, LaplacianEncoding, LowRank, Spectrum, eigenmaps
from gkd.graphs.laplacian import laplacian, node_degree
from gkd.graphs.subspace import Subspace

DOUBLE = torch.float64
BOTH = pytest.mark.parametrize("self_loops", [True, False])


def factor(num_nodes=9, rank=4, seed=0, dtype=DOUBLE):
    F = torch.rand(2, num_nodes, rank, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    F[1, 2] = 0
    return F


def adjacency(F, self_loops):
    A = F @ F.mT
    return A if self_loops else A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))


@BOTH
class TestLowRank:
    def test_is_the_adjacency(self, self_loops):
        F, X = factor(), torch.randn(2, 9, 3, dtype=DOUBLE)
        lowrank, A = LowRank(F, self_loops), adjacency(F, self_loops)
        torch.testing.assert_close(lowrank.dense(), A)
        torch.testing.assert_close(lowrank.degree(), A.sum(dim=-1))
        torch.testing.assert_close(lowrank.multiply(X), A @ X)
        assert self_loops or lowrank.dense().diagonal(dim1=1, dim2=2).eq(0).all()

    @pytest.mark.parametrize("rank", [4, 6])
    def test_squared_distance(self, self_loops, rank):
        F, goal = factor(), factor(rank=rank, seed=1)
        expected = (adjacency(F, self_loops) - adjacency(goal, self_loops)).square().sum(dim=(1, 2))
        torch.testing.assert_close(LowRank(F, self_loops).squared_distance(LowRank(goal, self_loops)), expected)

    def test_distance_of_close_graphs_keeps_its_digits(self, self_loops):
        F = factor(200, 16)
        near = F + 1e-5 * factor(200, 16, seed=1)
        expected = (adjacency(F, self_loops) - adjacency(near, self_loops)).square().sum(dim=(1, 2))
        value = LowRank(F.float(), self_loops).squared_distance(LowRank(near.float(), self_loops))
        torch.testing.assert_close(value.double(), expected, rtol=0.02, atol=0)
        assert LowRank(F.float(), self_loops).squared_distance(LowRank(F.float(), self_loops)).tolist() == [0.0, 0.0]

    def test_gradients(self, self_loops):
        F, goal = (factor(5, 3) + 0.1).requires_grad_(), factor(5, 3, seed=1)

        def run(F):
            lowrank = LowRank(F, self_loops)
            return lowrank.degree(), lowrank.squared_distance(LowRank(goal, self_loops)), lowrank.multiply(goal)

        assert torch.autograd.gradcheck(run, (F,))

    def test_graphs_that_do_not_match(self, self_loops):
        for goal in (LowRank(factor(8), self_loops), LowRank(factor(), not self_loops)):
            with pytest.raises(ValueError, match="Expected graphs of equally many nodes, both with or both without self-loops"):
                LowRank(factor(), self_loops).squared_distance(goal)


def test_degree_of_nodes_without_a_common_feature():
    F = torch.tensor([[[0.1, 0.7, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 1.0]]])
    F = torch.nn.functional.normalize(F, dim=-1)
    degree = LowRank(F, self_loops=False).degree()[0]
    assert degree[2] == 0
    F[0, 0, 2] = 1e-9  # hangs on by so much
    torch.testing.assert_close(LowRank(F, self_loops=False).degree()[0, 2], torch.tensor(1e-9), rtol=1e-5, atol=0)


def scores(eigval, eigvec):
    weight = torch.arange(eigvec.size(1) ** 2, dtype=eigvec.dtype).sin().view(eigvec.size(1), -1)
    return (eigvec @ eigvec.mT * (weight + weight.T)).sum((1, 2)) + eigval.sum(1)


@BOTH
@pytest.mark.parametrize("drop_trivial", [True, False])
@pytest.mark.parametrize("gauge", ["block", "eigenspace"])
def test_eigenpairs_are_exact(self_loops, drop_trivial, gauge):
    mask = torch.ones(3, 64, dtype=torch.bool)
    mask[2, 50:] = False
    results = []
    for method in ("lowrank", "exact"):
        F = torch.nn.functional.normalize(torch.rand(3, 64, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) ** 6, dim=-1)
        F[1, 5] = 0  # isolated
        F[2, 50:] = 1e6  # not there
        F.requires_grad_()
        if method == "exact" or self_loops:
            A = adjacency(F, self_loops)
            solver = gkd.graphs.spectral.Exact(laplacian(A.masked_fill(~(mask[:, :, None] & mask[:, None]), 0.0))[0], mask)
            solver = gkd.graphs.spectral.Factored(F, mask) if method == "lowrank" else solver
        else:
            solver = Subspace(LowRank(F, self_loops), mask)
        eigval, eigvec = solver.lowest(4, drop_trivial, gauge)
        assert getattr(solver, "exact", None) is None
        projector = eigvec @ eigvec.mT
        results.append((eigval, projector, torch.autograd.grad(scores(eigval, eigvec).sum(), F)[0]))
    for value, expected, tolerance in zip(*results, (1e-9, 1e-7, 1e-5), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("normalization", ["sym", "rw", None])
def test_view_is_the_graph(self_loops, normalization):
    features = torch.rand(2, 20, 3, 3, dtype=DOUBLE)
    features[0, 4] = 0
    graph = GraphBuilder(ChannelNodes(), CompleteEdges(self_loops=self_loops))(features)
    with_factor, without = Spectrum(graph, normalization), graph.clone()
    del without["factor" if self_loops else "loopless_factor"]
    reference = Spectrum(without, normalization)
    assert reference.lowrank is None
    X = torch.randn(2, 20, 3, dtype=DOUBLE)
    for value, expected in (
        (with_factor.lowrank.dense(), reference.adjacency),
        (with_factor.degree, reference.degree),
        (reference.degree, node_degree(graph)[0]),
        (with_factor.propagate(X), reference.propagate(X)),
        (with_factor.propagate(X), reference.adjacency.mT @ X),
        (with_factor.laplacian_product(X), reference.laplacian_product(X)),
        (with_factor.laplacian_product(X), reference.laplacian @ X),
        (with_factor.eigenmaps(5)[0], reference.eigenmaps(5)[0]),
    ):
        torch.testing.assert_close(value, expected)


@BOTH
def test_builder_view_writes_nothing_down(self_loops, monkeypatch):
    builder = GraphBuilder(ChannelNodes(grid=2), CompleteEdges(self_loops=self_loops))
    student, teacher = (torch.rand(2, 400, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = [Spectrum(builder(student)), Spectrum(builder(teacher))]
    U = expected[1].eigenmaps(3)[1]

    def fail(*_, **__):
        raise AssertionError("the adjacency was written down")

    def view():
        goal = builder.view(teacher)
        return builder.view(student, topology=goal), goal

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "dense", fail)
        patch.setattr(GraphBuilder, "_build", fail)
        own, goal = view()
        values = own.squared_distance(goal), own.laplacian_product(U), own.propagate(U), own.degree, own.eigenmaps(3)[0]
        with pytest.raises(AssertionError, match="written down"):
            view()[0].adjacency  # noqa: B018
    own = expected[0]
    wanted = (
        (own.adjacency - expected[1].adjacency).square().sum(dim=(1, 2)),
        own.laplacian @ U,
        own.adjacency @ U,
        own.degree,
        eigenmaps(own.graph, 3)[0],
    )
    for value, reference in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)
    own, goal = view()
    assert torch.equal(own.graph.edge_index, goal.graph.edge_index)
    torch.testing.assert_close(own.graph.edge_weight, expected[0].graph.edge_weight)
    torch.testing.assert_close(own.x, expected[0].x)


def test_view_of_other_graphs():
    features = torch.rand(2, 8, 4, 4)
    builder = GraphBuilder(ChannelNodes(), KNNEdges(k=2), LaplacianEncoding(2, sign=None))
    goal = builder.view(features)
    assert goal.lowrank is None
    assert torch.equal(goal.graph.pe, builder(features, static=True).pe)
    own = builder.view(2 * features.flip(0), topology=goal)
    assert own.graph.edge_index is goal.graph.edge_index
    complete = GraphBuilder(ChannelNodes(grid=2), CompleteEdges())
    goal = complete.view(torch.randn(2, 8, 4, 4))  # negative features: clipped cosines have no factor
    assert goal.lowrank is None
    own = complete.view(features, topology=goal)
    assert own.graph.edge_index is goal.graph.edge_index
    torch.testing.assert_close(own.adjacency, complete.view(features).adjacency)


@BOTH
def test_neighbours_that_are_as_many_as_pairs_have_no_factor(self_loops):
    """'union' of n / 2 neighbours has n * n slots, like the complete graph with self-loops."""
    features = torch.rand(2, 16, 3, 3)
    knn = GraphBuilder(ChannelNodes(), KNNEdges(k=8))(features, static=True)
    complete = GraphBuilder(ChannelNodes(), CompleteEdges(self_loops=self_loops, nonnegative=True))
    for topology in (knn, knn.edge_index):
        graph = complete(features, topology=topology)
        assert Spectrum(graph).lowrank is None
        pairs = Spectrum(graph)
        expected = laplacian(pairs.adjacency)[0]
        torch.testing.assert_close(pairs.laplacian, expected)
