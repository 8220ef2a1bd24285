import networkx
import pytest
import torch

from gkd.graphs import CompleteEdges, GridEdges, Nodes, PatchNodes, RandomEdges
from gkd.graphs.edge_index import without_diagonal
from tests.graphs.edge_rules import dense, rows


class TestComplete:
    def test_cosines_of_all_pairs(self):
        x = rows()
        cosine = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1).clamp(min=0)
        edges = CompleteEdges()(Nodes(x))
        torch.testing.assert_close(dense(edges, 2, 6), cosine - torch.diag_embed(torch.ones(2, 6, dtype=x.dtype)))
        assert edges.edge_index.shape == (2, 60)
        assert edges.lowrank is None  # some features are negative

    @pytest.mark.parametrize("self_loops", [False, True])
    @pytest.mark.parametrize("nonnegative", [None, True])
    def test_factor(self, self_loops, nonnegative):
        x = torch.cat((rows(), torch.ones(2, 6, 1, dtype=torch.float64)), dim=2).index_fill(1, torch.tensor([2]), 0.0)
        x = x.abs() if nonnegative is None else x
        nodes, rule = Nodes(x), CompleteEdges(self_loops=self_loops, nonnegative=nonnegative)
        edges = rule(nodes)
        A = edges.lowrank.dense()
        torch.testing.assert_close(rule.lowrank(nodes).factor, edges.lowrank.factor)
        assert edges.lowrank.self_loops == self_loops
        torch.testing.assert_close(edges.edge_weight.view(2, 6, -1), A if self_loops else without_diagonal(A))
        loops = torch.full((2, 5), float(self_loops), dtype=x.dtype)
        torch.testing.assert_close(A.diagonal(dim1=1, dim2=2)[:, [0, 1, 3, 4, 5]], loops)
        assert A[:, 2].abs().sum() == 0  # a zero row has no edge, not even to itself
        clipped = x.relu()
        torch.testing.assert_close(A[:, 0, 1], torch.nn.functional.cosine_similarity(clipped[:, 0], clipped[:, 1], dim=-1))

    def test_no_factor_where_it_is_not_the_adjacency(self):
        for rule in (CompleteEdges(), CompleteEdges(self_loops=True), CompleteEdges(nonnegative=False), CompleteEdges("euclidean")):
            assert rule(Nodes(rows())).lowrank is None
            assert rule.lowrank(Nodes(rows())) is None
        assert CompleteEdges(nonnegative=False).lowrank(Nodes(rows().abs())) is None
        full = CompleteEdges(nonnegative=True)
        assert full(Nodes(rows()), full(Nodes(rows())).edge_index).lowrank is None  # the edges may be any

    def test_euclidean(self):
        x = rows(1, 3)
        distance = torch.cdist(x, x)[0]
        sigma = distance.sum() / 6
        expected = (-(distance**2) / (2 * sigma**2)).exp().fill_diagonal_(0)
        torch.testing.assert_close(dense(CompleteEdges("euclidean")(Nodes(x)), 1, 3)[0], expected)

    def test_nonnegative_needs_cosines(self):
        with pytest.raises(ValueError, match=r"Expected metric 'cosine' with nonnegative=True \(got 'euclidean'\)"):
            CompleteEdges("euclidean", nonnegative=True)

    def test_without_diagonal(self):
        assert without_diagonal(torch.arange(9).view(1, 3, 3)).tolist() == [[[1, 2], [3, 5], [6, 7]]]
        assert without_diagonal(torch.ones(2, 1, 1)).shape == (2, 1, 0)


class TestGrid:
    @pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (3, 4), (2, 2)])
    def test_agrees_with_networkx(self, size):
        nodes = PatchNodes()(torch.ones(2, 3, *size, dtype=torch.float64))
        num_nodes = size[0] * size[1]
        A = dense(GridEdges()(nodes), 2, num_nodes)
        expected = torch.tensor(networkx.to_numpy_array(networkx.grid_2d_graph(*size)))
        torch.testing.assert_close(A, expected.expand(2, -1, -1))

    def test_corners(self):
        A = dense(GridEdges(8)(PatchNodes()(torch.ones(1, 3, 3, 3))), 1, 9)[0]
        # Corner, side and middle of a 3 x 3 grid have 3, 5 and 8 neighbours.
        torch.testing.assert_close(A.sum(dim=1), torch.tensor([3.0, 5, 3, 5, 8, 5, 3, 5, 3]))

    def test_nodes_in_any_order(self):
        x, pos, _ = PatchNodes()(torch.rand(2, 3, 3, 4, dtype=torch.float64))
        order = torch.randperm(12)
        A, permuted = (dense(GridEdges()(nodes), 2, 12) for nodes in (Nodes(x, pos), Nodes(x[:, order], pos[:, order])))
        torch.testing.assert_close(permuted, A[:, order][:, :, order])

    def test_weights_are_similarities(self):
        nodes = PatchNodes()(torch.rand(1, 3, 1, 2))
        weight = GridEdges(metric="euclidean", sigma=0.5)(nodes).edge_weight.max()
        torch.testing.assert_close(weight, (-(nodes.x[0, 0] - nodes.x[0, 1]).square().sum() / 0.5).exp())

    def test_needs_a_grid(self):
        x = torch.rand(1, 4, 3)
        with pytest.raises(ValueError, match=r"as PatchNodes makes them \(got no positions\)"):
            GridEdges()(Nodes(x))
        with pytest.raises(ValueError, match=r"as PatchNodes makes them \(got padded nodes\)"):
            GridEdges()(Nodes(x, torch.rand(1, 4, 4), torch.ones(1, 4, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"as PatchNodes makes them \(got positions \[1, 4, 3\]\)"):
            GridEdges()(Nodes(x, torch.rand(1, 4, 3)))
        with pytest.raises(ValueError, match=r"one in the centre of each cell.*got other positions"):
            GridEdges()(Nodes(x, torch.rand(1, 4, 2)))
        with pytest.raises(ValueError, match=r"got other positions"):
            GridEdges()(Nodes(x, torch.tensor([[[0.25, 0.25]] * 4])))
        with pytest.raises(ValueError, match=r"Expected 4 or 8 neighbors \(got 6\)"):
            GridEdges(6)


class TestRandom:
    def test_k_others(self):
        edges = RandomEdges(k=3, symmetrize=None)(Nodes(torch.rand(2, 10, 4)))
        source, target = edges.edge_index
        assert torch.equal(target.bincount(), torch.full((20,), 3))
        assert (source != target).all()
        assert len({*zip(source.tolist(), target.tolist(), strict=True)}) == 60

    def test_seed(self):
        nodes = Nodes(torch.rand(1, 20, 4))
        first, again, other = (RandomEdges(k=3, seed=seed)(nodes).edge_index for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_features_and_global_generator_play_no_part(self):
        rule = RandomEdges(k=3)
        first = rule(Nodes(torch.rand(1, 20, 4))).edge_index
        state = torch.get_rng_state()
        assert torch.equal(rule(Nodes(torch.rand(1, 20, 4))).edge_index, first)
        torch.set_rng_state(state)
        rule(Nodes(torch.ones(1, 20, 4)))
        assert torch.equal(torch.get_rng_state(), state)

    def test_all_pairs_are_equally_likely(self):
        # 200 seeds x 2 of 9 neighbours: each of the 90 ordered pairs is expected 44.4 times, with a deviation of 5.9.
        count = torch.zeros(10, 10)
        for seed in range(200):
            source, target = RandomEdges(k=2, seed=seed, symmetrize=None)(Nodes(torch.ones(1, 10, 1))).edge_index
            count[target, source] += 1
        assert count.diagonal().sum() == 0
        assert without_diagonal(count).sub(400 / 9).abs().max() < 5 * 5.9

    def test_weights_are_similarities(self):
        x = rows(1)
        edges = RandomEdges(k=2)(Nodes(x))
        complete = dense(CompleteEdges()(Nodes(x)), 1, 6)
        A = dense(edges, 1, 6)
        torch.testing.assert_close(A[A != 0], complete[A != 0])

    def test_bad_k(self):
        with pytest.raises(ValueError, match=r"Expected k to be a positive integer \(got None\)"):
            RandomEdges(k=None)
