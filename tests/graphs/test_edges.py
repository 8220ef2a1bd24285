import itertools
import math

import networkx
import numpy as np
import pytest
import torch
from sklearn.neighbors import kneighbors_graph, radius_neighbors_graph
from torch.autograd import gradcheck

from gkd.graphs import AttentionEdges, CompleteEdges, GridEdges, KNNEdges, Nodes, PatchNodes, RadiusEdges, RandomEdges
from gkd.graphs import nearest as nearest_module
from gkd.graphs.similarity import CosineSimilarity, EuclideanSimilarity, squared_distances, unit_rows
from gkd.graphs.topology import neighbors, without_diagonal

# All that look at features alone; RadiusEdges with a radius that some pairs of random rows keep and some do not.
FREE = {
    "knn": KNNEdges(k=2),
    "knn-mutual": KNNEdges(k=2, symmetrize="mutual"),
    "knn-directed-euclidean": KNNEdges(k=2, metric="euclidean", symmetrize=None),
    "radius": RadiusEdges(0.4, metric="cosine"),
    "radius-euclidean": RadiusEdges(1.5),
    "complete": CompleteEdges(),
    "complete-euclidean": CompleteEdges("euclidean"),
    "complete-nonnegative": CompleteEdges(self_loops=True, nonnegative=True),
    "attention": AttentionEdges(heads=2),
    "attention-topk": AttentionEdges(k=2, temperature=0.5),
}
BLIND = {"random": RandomEdges(k=2, seed=3), "random-mutual": RandomEdges(k=2, symmetrize="mutual")}
EVERY = FREE | BLIND


def each(classes):
    return pytest.mark.parametrize("rule", classes.values(), ids=classes.keys())


def dense(edges, batch_size, num_nodes):
    """A[b, target, source]; fails if two edges join the same pair or an edge leaves its graph."""
    A = torch.zeros(batch_size, num_nodes, num_nodes, dtype=edges.edge_weight.dtype)
    seen = set()
    for (source, target), weight in zip(edges.edge_index.T.tolist(), edges.edge_weight.tolist(), strict=True):
        assert source // num_nodes == target // num_nodes
        if weight != 0:
            assert (source, target) not in seen
            seen.add((source, target))
            A[target // num_nodes, target % num_nodes, source % num_nodes] = weight
    return A


def rows(batch_size=2, num_nodes=6, channels=4, dtype=torch.float64):
    return torch.randn(batch_size, num_nodes, channels, dtype=dtype)


class TestKNN:
    # Angles 0, 10, 40 and 90 degrees. Nearest: 0 -> 1 (10), 1 -> 0 (10), 2 -> 1 (30), 3 -> 2 (50).
    angles = torch.tensor([0.0, 10.0, 40.0, 90.0], dtype=torch.float64) * math.pi / 180
    x = torch.stack((angles.cos(), angles.sin()), dim=1)[None] * torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], dtype=torch.float64)

    def pairs(self, edges):
        index = edges.edge_index[:, edges.edge_weight != 0].T.tolist()
        return {tuple(pair): weight for pair, weight in zip(index, edges.edge_weight[edges.edge_weight != 0].tolist(), strict=True)}

    def test_directed_by_hand(self):
        cos = [math.cos(math.radians(d)) for d in (10, 10, 30, 50)]
        found = self.pairs(KNNEdges(k=1, symmetrize=None)(Nodes(self.x)))
        assert found == pytest.approx({(1, 0): cos[0], (0, 1): cos[1], (1, 2): cos[2], (2, 3): cos[3]})

    def test_union_by_hand(self):
        edges = KNNEdges(k=1, symmetrize="union")(Nodes(self.x))
        assert set(self.pairs(edges)) == {(1, 0), (0, 1), (1, 2), (2, 1), (2, 3), (3, 2)}
        # 8 slots: 0 and 1 chose each other, so the second copies of their edges are fillers.
        assert edges.edge_index.shape == (2, 8)
        filler = edges.edge_weight == 0
        assert torch.equal(edges.edge_index[0] == edges.edge_index[1], filler)
        assert int(filler.sum()) == 2

    def test_mutual_by_hand(self):
        edges = KNNEdges(k=1, symmetrize="mutual")(Nodes(self.x))
        assert set(self.pairs(edges)) == {(1, 0), (0, 1)}
        assert edges.edge_index.shape == (2, 4)

    def test_euclidean_by_hand(self):
        # 0, 1 and 3 on a line, k = 1: edges of length 1, 1 and 2, and with 'union' 1 -> 0, 0 -> 1, 1 -> 2, 2 -> 1 of lengths 1, 1, 2, 2.
        x = torch.tensor([[[0.0], [1.0], [3.0]]], dtype=torch.float64)
        found = self.pairs(KNNEdges(k=1, metric="euclidean")(Nodes(x)))
        sigma = 6 / 4
        near, far = math.exp(-1 / (2 * sigma**2)), math.exp(-4 / (2 * sigma**2))
        assert found == pytest.approx({(1, 0): near, (0, 1): near, (1, 2): far, (2, 1): far})
        fixed = self.pairs(KNNEdges(k=1, metric="euclidean", sigma=2.0)(Nodes(x)))
        assert fixed[(1, 2)] == pytest.approx(math.exp(-4 / 8))

    @pytest.mark.parametrize("symmetrize", [None, "union", "mutual"])
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_agrees_with_scikit_learn(self, metric, symmetrize):
        x = torch.rand(4, 30, 5, dtype=torch.float64)
        A = dense(KNNEdges(k=7, metric=metric, symmetrize=symmetrize)(Nodes(x)), 4, 30)
        for graph, row in zip(A, x.numpy(), strict=True):
            chosen = kneighbors_graph(row, 7, metric=metric).toarray()
            expected = {None: chosen, "union": np.maximum(chosen, chosen.T), "mutual": chosen * chosen.T}[symmetrize]
            np.testing.assert_array_equal(graph.numpy() != 0, expected != 0)
            if metric == "cosine":
                distance = kneighbors_graph(row, 7, mode="distance", metric=metric).toarray()
                np.testing.assert_allclose(graph.numpy()[chosen * expected != 0], (1 - distance)[chosen * expected != 0])

    def test_symmetric_to_the_bit(self):
        for metric in ("cosine", "euclidean"):
            A = dense(KNNEdges(k=5, metric=metric)(Nodes(torch.rand(2, 40, 8))), 2, 40)
            assert torch.equal(A, A.mT)

    def test_negative_cosines_weigh_nothing(self):
        x = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]]])
        edges = KNNEdges(k=2)(Nodes(x))
        assert self.pairs(edges).keys() == {(1, 2), (2, 1)}

    def test_scale_of_rows(self):
        x = rows()
        first, second = KNNEdges(k=2)(Nodes(x)), KNNEdges(k=2)(Nodes(x * torch.rand(2, 6, 1, dtype=x.dtype).add(0.1)))
        torch.testing.assert_close(dense(first, 2, 6), dense(second, 2, 6))
        euclidean = KNNEdges(k=2, metric="euclidean")
        torch.testing.assert_close(dense(euclidean(Nodes(x)), 2, 6), dense(euclidean(Nodes(7 * x + 3)), 2, 6))
        assert not torch.allclose(dense(euclidean(Nodes(x)), 2, 6), dense(KNNEdges(k=2, metric="euclidean", sigma=1.0)(Nodes(x)), 2, 6))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("most", [2 * 36, 4 * 6])  # two graphs at a time, four rows of a graph
    def test_some_at_a_time(self, monkeypatch, masked, most):
        x = rows(5)
        mask = torch.rand(5, 6) > 0.3 if masked else None
        for metric in ("cosine", "euclidean"):
            rule = KNNEdges(k=2, metric=metric)
            expected = rule(Nodes(x, None, mask))
            with monkeypatch.context() as patch:
                patch.setattr(nearest_module, "_MOST_SCORES", {"cpu": most})
                edges = rule(Nodes(x, None, mask))
            assert torch.equal(edges.edge_index, expected.edge_index)
            torch.testing.assert_close(edges.edge_weight, expected.edge_weight)

    def test_bad_options(self):
        with pytest.raises(ValueError, match=r"Expected k to be a positive integer \(got 0\)"):
            KNNEdges(k=0)
        with pytest.raises(ValueError, match=r"Expected symmetrize 'union', 'mutual' or None \(got 'both'\)"):
            KNNEdges(symmetrize="both")
        with pytest.raises(ValueError, match=r"Expected metric 'cosine' or 'euclidean' \(got 'l1'\)"):
            KNNEdges(metric="l1")
        with pytest.raises(ValueError, match=r"Expected sigma=None with metric='cosine'.*got sigma=1.0"):
            KNNEdges(sigma=1.0)
        with pytest.raises(ValueError, match=r"Expected a positive sigma \(got 0\)"):
            KNNEdges(metric="euclidean", sigma=0)


class TestRadius:
    def test_agrees_with_scikit_learn(self):
        x = torch.rand(3, 20, 3, dtype=torch.float64)
        for metric, radius in (("euclidean", 0.5), ("cosine", 0.05)):
            edges = RadiusEdges(radius, metric)(Nodes(x))
            assert edges.edge_index.shape == (2, 3 * 20 * 19)
            for A, row in zip(dense(edges, 3, 20), x.numpy(), strict=True):
                expected = radius_neighbors_graph(row, radius, metric=metric).toarray()
                assert 0 < expected.sum() < 380
                np.testing.assert_array_equal(A.numpy() != 0, expected != 0)

    def test_the_radius_itself_is_inside(self):
        A = dense(RadiusEdges(5.0, sigma=1.0)(Nodes(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 4.1]]]))), 1, 3)[0]
        assert (A != 0).tolist() == [[False, True, False], [True, False, True], [False, True, False]]

    def test_bad_radius(self):
        with pytest.raises(ValueError, match=r"Expected a positive radius \(got -1\)"):
            RadiusEdges(-1)


class TestComplete:
    def test_cosines_of_all_pairs(self):
        x = rows()
        cosine = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1).clamp(min=0)
        edges = CompleteEdges()(Nodes(x))
        torch.testing.assert_close(dense(edges, 2, 6), cosine - torch.diag_embed(torch.ones(2, 6, dtype=x.dtype)))
        assert edges.edge_index.shape == (2, 60)
        assert edges.factor is None

    def test_factor(self):
        x = torch.cat((rows(), torch.ones(2, 6, 1, dtype=torch.float64)), dim=2).index_fill(1, torch.tensor([2]), 0.0)
        edges = CompleteEdges(self_loops=True, nonnegative=True)(Nodes(x))
        A = edges.edge_weight.view(2, 6, 6)
        torch.testing.assert_close(A, edges.factor @ edges.factor.mT)
        torch.testing.assert_close(A.diagonal(dim1=1, dim2=2)[:, [0, 1, 3, 4, 5]], torch.ones(2, 5, dtype=x.dtype))
        assert A[:, 2].abs().sum() == 0  # a zero row has no edge, not even to itself
        clipped = x.relu()
        torch.testing.assert_close(A[:, 0, 1], torch.nn.functional.cosine_similarity(clipped[:, 0], clipped[:, 1], dim=-1))

    def test_no_factor_where_it_is_not_the_adjacency(self):
        x = Nodes(rows())
        full = CompleteEdges(self_loops=True, nonnegative=True)
        own = full(x)
        assert CompleteEdges(nonnegative=True)(x).factor is None
        assert CompleteEdges(self_loops=True)(x).factor is None
        assert full(x, own.edge_index[:, :-1]).factor is None
        torch.testing.assert_close(full(x, own.edge_index.flip(1)).factor, own.factor)

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


class TestAttention:
    def reference(self, query, key, heads, temperature):
        """One pair of nodes after the other, self excluded."""
        num_nodes, width = query.shape
        A = torch.zeros(num_nodes, num_nodes, dtype=query.dtype)
        size = width // heads
        for h, i in itertools.product(range(heads), range(num_nodes)):
            part = slice(h * size, (h + 1) * size)
            score = torch.stack([query[i, part] @ key[j, part] / (temperature * size**0.5) for j in range(num_nodes)])
            score[i] = -math.inf
            A[i] += score.softmax(0) / heads
        return A

    @pytest.mark.parametrize(("heads", "temperature"), [(1, 1.0), (2, 0.3)])
    def test_agrees_with_a_loop(self, heads, temperature):
        x = rows()
        A = dense(AttentionEdges(heads=heads, temperature=temperature)(Nodes(x)), 2, 6)
        torch.testing.assert_close(A, torch.stack([self.reference(row, row, heads, temperature) for row in x]))

    def test_by_hand(self):
        # q_0.k_1 = 0 and q_0.k_2 = ln 3 with d = 1: the softmax over nodes 1 and 2 is (1/4, 3/4).
        x = torch.tensor([[[1.0], [0.0], [math.log(3)]]])
        torch.testing.assert_close(dense(AttentionEdges()(Nodes(x)), 1, 3)[0, 0], torch.tensor([0.0, 0.25, 0.75]))

    def test_strongest_are_kept_as_they_are(self):
        x = rows()
        everything = dense(AttentionEdges()(Nodes(x)), 2, 6)
        kept = dense(AttentionEdges(k=2)(Nodes(x)), 2, 6)
        best = everything.topk(2, dim=-1)
        torch.testing.assert_close(kept, torch.zeros_like(kept).scatter(2, best.indices, best.values))

    def test_learned(self):
        torch.manual_seed(1)
        rule = AttentionEdges(in_channels=4, heads=2).double()
        x = rows()
        edges = rule(Nodes(x))
        expected = torch.stack([self.reference(rule.query(row), rule.key(row), 2, 1.0) for row in x])
        torch.testing.assert_close(dense(edges, 2, 6), expected.detach())
        edges.edge_weight.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in rule.parameters())
        assert not list(AttentionEdges().parameters())

    def test_two_nodes_attend_to_each_other_alone(self):
        assert AttentionEdges(k=1)(Nodes(rows(3, 2))).edge_weight.tolist() == [1.0] * 6

    def test_large_scores(self):
        x = (1e4 * rows()).requires_grad_()
        weight = AttentionEdges()(Nodes(x)).edge_weight
        (gradient,) = torch.autograd.grad(weight.square().sum(), x)
        assert weight.isfinite().all()
        assert gradient.isfinite().all()

    def test_bad_options(self):
        with pytest.raises(ValueError, match=r"Expected rows of length a multiple of 3 heads \(got 4\)"):
            AttentionEdges(heads=3)(Nodes(rows()))
        with pytest.raises(ValueError, match=r"Expected rows of length in_channels=8 \(got 4\)"):
            AttentionEdges(in_channels=8)(Nodes(rows(dtype=torch.float32)))
        with pytest.raises(ValueError, match=r"multiple of heads \(got in_channels=8, heads=3\)"):
            AttentionEdges(in_channels=8, heads=3)
        with pytest.raises(ValueError, match=r"Expected a positive temperature \(got 0\)"):
            AttentionEdges(temperature=0)
        with pytest.raises(ValueError, match=r"Expected k to be a positive integer or None \(got 0\)"):
            AttentionEdges(k=0)


class TestBetween:
    @pytest.mark.parametrize(
        "rule", [AttentionEdges(), AttentionEdges(k=2, heads=2), KNNEdges(k=2), KNNEdges(k=2, metric="euclidean")], ids=repr
    )
    def test_given_edges_have_the_same_weights(self, rule):
        targets, sources = Nodes(rows(2, 3).abs()), Nodes(rows(2, 5).abs())
        own = rule.between(targets, sources)
        order = torch.randperm(own.edge_index.shape[1])
        torch.testing.assert_close(rule.between(targets, sources, own.edge_index[:, order]).edge_weight, own.edge_weight[order])
        none = own.edge_index.masked_fill(order % 2 == 0, -1)
        assert torch.equal(rule.between(targets, sources, none).edge_weight == 0, order % 2 == 0)

    def test_knn_agrees_with_a_loop(self):
        x, y = rows(2, 3), rows(2, 5)
        edges = KNNEdges(k=2, metric="euclidean", sigma=1.0).between(Nodes(x), Nodes(y))
        found = {tuple(pair): weight for pair, weight in zip(edges.edge_index.T.tolist(), edges.edge_weight.tolist(), strict=True)}
        expected = {}
        for b, i in itertools.product(range(2), range(3)):
            distance = (y[b] - x[b, i]).norm(dim=1)
            for j in distance.argsort()[:2].tolist():
                expected[(b * 5 + j, b * 3 + i)] = math.exp(-(distance[j] ** 2) / 2)
        assert found == pytest.approx(expected)

    def test_attention_sums_to_one(self):
        edges = AttentionEdges().between(Nodes(rows(2, 3)), Nodes(rows(2, 5)))
        torch.testing.assert_close(
            torch.zeros(6, dtype=torch.float64).index_add(0, edges.edge_index[1], edges.edge_weight), torch.ones(6).double()
        )

    @pytest.mark.parametrize("rule", [AttentionEdges(), AttentionEdges(k=3), KNNEdges(k=3), KNNEdges(k=3, metric="euclidean")], ids=repr)
    def test_padding_is_neither_source_nor_target(self, rule):
        x, y = rows(1, 4), rows(1, 5)
        x[:, 3], y[:, 2:] = 1e6, 1e6
        targets = Nodes(x, None, torch.tensor([[True, True, True, False]]))
        sources = Nodes(y, None, torch.tensor([[True, True, False, False, False]]))
        edges = rule.between(targets, sources)
        found = torch.zeros(4, 5, dtype=x.dtype).index_put((edges.edge_index[1], edges.edge_index[0]), edges.edge_weight, accumulate=True)
        alone = (AttentionEdges() if isinstance(rule, AttentionEdges) else KNNEdges(k=2, metric=rule.metric)).between(
            Nodes(x[:, :3]), Nodes(y[:, :2])
        )
        expected = torch.zeros(3, 2, dtype=x.dtype).index_put((alone.edge_index[1], alone.edge_index[0]), alone.edge_weight)
        torch.testing.assert_close(found[:3, :2], expected)
        assert found[3].abs().sum() + found[:, 2:].abs().sum() == 0

    def test_unequal_rows(self):
        with pytest.raises(ValueError, match=r"rows of equal length \(got 4 and 3\)"):
            AttentionEdges().between(Nodes(rows(1, 3)), Nodes(rows(1, 3, 3)))
        with pytest.raises(ValueError, match=r"Expected k <= 2, the number of nodes to choose from \(got k=3\)"):
            AttentionEdges(k=3).between(Nodes(rows(1, 3)), Nodes(rows(1, 2)))


class TestEveryClass:
    @each(FREE)
    def test_node_permutation(self, rule):
        x, order = rows(), torch.randperm(6)
        torch.testing.assert_close(dense(rule(Nodes(x[:, order])), 2, 6), dense(rule(Nodes(x)), 2, 6)[:, order][:, :, order])

    @each(EVERY)
    def test_batch_equals_singles(self, rule):
        x = rows(3)
        A = dense(rule(Nodes(x)), 3, 6)
        for graph, row in zip(A, x, strict=True):
            torch.testing.assert_close(graph, dense(rule(Nodes(row[None])), 1, 6)[0])

    @each(EVERY)
    def test_slots(self, rule):
        for batch_size, num_nodes in ((3, 6), (2, 3), (2, 1), (2, 0), (0, 6)):
            edges = rule(Nodes(rows(batch_size, num_nodes)))
            assert edges.edge_index.shape == (2, batch_size * rule.slots(num_nodes))
            assert edges.edge_weight.shape == (batch_size * rule.slots(num_nodes),)
            graph = edges.edge_index // max(num_nodes, 1)
            assert torch.equal(graph, torch.arange(batch_size).repeat_interleave(rule.slots(num_nodes)).expand(2, -1))

    @each(EVERY)
    @pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
    def test_padding_changes_nothing(self, rule, poison):
        x = rows(4)
        sizes = [6, 3, 1, 0]
        mask = torch.arange(6) < torch.tensor(sizes)[:, None]
        edges = rule(Nodes(torch.where(mask[:, :, None], x, poison), None, mask))
        assert edges.edge_index.shape == (2, 4 * rule.slots(6))
        A = dense(edges, 4, 6)
        for graph, row, size in zip(A, x, sizes, strict=True):
            torch.testing.assert_close(graph[:size, :size], dense(rule(Nodes(row[None, :size])), 1, size)[0])
            assert graph[size:].abs().sum() + graph[:, size:].abs().sum() == 0

    @each(FREE)  # random neighbours depend on the numbers of the nodes
    def test_padding_may_have_holes(self, rule):
        x, mask = rows(1), torch.tensor([[True, False, True, True, False, True]])
        A = dense(rule(Nodes(x, None, mask)), 1, 6)
        torch.testing.assert_close(A[:, mask[0]][:, :, mask[0]], dense(rule(Nodes(x[:, mask[0]])), 1, 4))

    @each(EVERY)
    def test_small_graphs_take_the_neighbours_they_have(self, rule):
        x = rows(1, 6)
        if isinstance(rule, AttentionEdges | RandomEdges | KNNEdges) and getattr(rule, "k", None):
            with pytest.raises(ValueError, match=r"Expected k <= 1, the number of nodes to choose from \(got k=2\)"):
                rule(Nodes(x[:, :2]))
        mask = torch.arange(6) < 2
        A = dense(rule(Nodes(x, None, mask[None])), 1, 6)
        assert A[:, 2:].abs().sum() == 0

    @each(EVERY)
    def test_weights_on_its_own_edges(self, rule):
        nodes = Nodes(rows())
        own = rule(nodes)
        for edge_index in (own.edge_index, own.edge_index.clone()):
            given = rule(nodes, edge_index)
            torch.testing.assert_close(given.edge_weight, own.edge_weight)
            assert given.edge_index is edge_index
        order = torch.randperm(own.edge_index.shape[1])
        torch.testing.assert_close(rule(nodes, own.edge_index[:, order]).edge_weight, own.edge_weight[order])

    @each(EVERY)
    def test_weights_on_edges_of_another_network(self, rule):
        teacher, student = Nodes(rows()), Nodes(rows(channels=8))
        edge_index = KNNEdges(k=3)(teacher).edge_index
        edges = rule(student, edge_index)
        loop = edge_index[0] == edge_index[1]
        assert loop.any()
        if not getattr(rule, "self_loops", False):
            assert edges.edge_weight[loop].abs().sum() == 0
        if getattr(rule, "metric", None) == "euclidean" or isinstance(rule, RadiusEdges):
            return  # the bandwidth follows the edges; a radius chooses, and weighs nothing
        everything = dense(
            (
                AttentionEdges(None, rule.heads, rule.temperature)
                if isinstance(rule, AttentionEdges)
                else CompleteEdges(nonnegative=getattr(rule, "nonnegative", False))
            )(student),
            2,
            6,
        )
        expected = everything.view(-1)[edge_index[1] * 6 + edge_index[0] % 6]
        torch.testing.assert_close(edges.edge_weight[~loop], expected[~loop])

    @each(EVERY)
    def test_gradient(self, rule):
        x = rows(2, 5).abs().add(0.1).requires_grad_()
        # The bandwidth is detached, so its own change must not show: fix it.
        if getattr(rule, "metric", None) == "euclidean":
            options = {"k": rule.k, "symmetrize": rule.symmetrize} if isinstance(rule, KNNEdges) else {}
            options |= {"radius": rule.radius} if isinstance(rule, RadiusEdges) else {}
            rule = type(rule)(metric="euclidean", sigma=1.3, **options)
        edge_index = rule(Nodes(x)).edge_index
        assert gradcheck(lambda x: rule(Nodes(x)).edge_weight, x)
        assert gradcheck(lambda x: rule(Nodes(x), edge_index).edge_weight, x)

    @each(EVERY)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_degenerate_rows(self, rule, dtype):
        generic, zero, identical = rows(1, dtype=dtype), torch.zeros(1, 6, 4, dtype=dtype), rows(1, 1, dtype=dtype).expand(1, 6, 4)
        some_zero, tiny, huge = generic.index_fill(1, torch.tensor([1, 4]), 0.0), generic * 1e-30, generic * 1e15
        x = torch.cat((zero, identical, some_zero, tiny, huge)).requires_grad_()
        for edge_index in (None, rule(Nodes(x)).edge_index):
            weight = rule(Nodes(x), edge_index).edge_weight
            (gradient,) = torch.autograd.grad((weight * torch.rand_like(weight)).sum(), x)
            assert weight.isfinite().all()
            assert gradient.isfinite().all()
            assert weight.min() >= 0

    @each(EVERY)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_precision_under_autocast(self, rule, dtype):
        x = rows(channels=64).to(dtype)
        nodes = Nodes(x)
        expected = rule(Nodes(x if dtype == torch.float64 else x.float()))
        with torch.autocast("cpu", torch.bfloat16):
            edges = rule(nodes)
            given = rule(nodes, edges.edge_index)
        assert edges.edge_weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(edges.edge_index, expected.edge_index)
        assert torch.equal(edges.edge_weight, expected.edge_weight)
        torch.testing.assert_close(given.edge_weight, expected.edge_weight)

    @each(EVERY)
    def test_bad_nodes(self, rule):
        with pytest.raises(ValueError, match=r"Expected nodes.x of shape \[B, n, d\] \(got \[6, 4\]\)"):
            rule(Nodes(torch.rand(6, 4)))
        with pytest.raises(ValueError, match=r"Expected nodes.mask of shape \[1, 6\] and type torch.bool \(got \[6\], torch.bool\)"):
            rule(Nodes(torch.rand(1, 6, 4), None, torch.ones(6, dtype=torch.bool)))
        nodes = Nodes(torch.rand(1, 6, 4))
        with pytest.raises(ValueError, match=r"Expected edge_index of shape \[2, E\] and type torch.int64 \(got \[5\], torch.int64\)"):
            rule(nodes, torch.arange(5))
        with pytest.raises(ValueError, match=r"Expected edges of 6 sources and 6 targets \(got node 6 -> node 1\)"):
            rule(nodes, torch.tensor([[6], [1]]))

    @each(EVERY)
    def test_printing(self, rule):
        assert type(rule).__name__ in repr(rule)
        assert "=" in repr(rule)


class TestSimilarity:
    def test_unit_rows(self):
        x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
        unit = unit_rows(x)
        torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
        (gradient,) = torch.autograd.grad(unit[:, 0].sum(), x)
        # d(x / |x|)_0 / dx = (1 - 0.36, -0.48) / 5; nothing comes back to the rows that count as zero.
        torch.testing.assert_close(gradient, torch.tensor([[0.128, -0.096], [0.0, 0.0], [0.0, 0.0]]))

    def test_distances_far_from_the_origin(self):
        x = torch.rand(1, 20, 5) + 1000
        expected = torch.cdist(x.double(), x.double()).square().float()
        torch.testing.assert_close(squared_distances(x, x), expected, rtol=1e-4, atol=1e-5)

    def test_equal_rows_have_distance_zero(self):
        x = torch.rand(1, 1, 300).expand(1, 9, 300)
        assert squared_distances(x, x).max() == 0
        x = torch.cat((x, torch.rand(1, 9, 300)), dim=1)
        assert squared_distances(x, x)[:, :9, :9].max() == 0
        assert squared_distances(x, x).diagonal(dim1=1, dim2=2).max() == 0

    @pytest.mark.parametrize("similarity", [CosineSimilarity(), EuclideanSimilarity()], ids=["cosine", "euclidean"])
    def test_edge_scores_are_entries_of_scores(self, similarity):
        x, y = rows(2, 5), rows(2, 7)
        few = torch.tensor([[0, 6, 7, 13], [4, 0, 5, 9]])  # one gathered pair of rows an edge
        many = few.repeat(1, 40)  # one product of all
        scores = similarity.scores(x, y)
        expected = torch.stack([scores[0, 4, 0], scores[0, 0, 6], scores[1, 0, 0], scores[1, 4, 6]])
        torch.testing.assert_close(similarity.edge_scores(x, y, few), expected)
        torch.testing.assert_close(similarity.edge_scores(x, y, many), expected.repeat(40))

    def test_bandwidth_of_each_graph(self):
        # Edges of lengths 1, 3 and, in the other graph, 10, with or without counting where they belong.
        score, similarity = -torch.tensor([1.0, 9.0, 100.0, 0.0]), EuclideanSimilarity()
        exists, graph = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1])
        expected = torch.tensor([-1 / 8, -9 / 8, -1 / 2, -math.inf]).exp()
        torch.testing.assert_close(similarity.weights(score, exists, graph, 2), expected)
        torch.testing.assert_close(similarity.weights(score, exists, None, 2), expected)


def test_neighbors_of_long_rows_are_the_nearest():
    scores = torch.rand(2, 40, 256, generator=torch.Generator().manual_seed(0))
    found, exists = neighbors(scores, 8, None)
    assert exists is None
    assert torch.equal(found, scores.topk(8).indices)
    ties = scores.mul(8).round()  # which of the equal ones is open
    torch.testing.assert_close(ties.gather(2, neighbors(ties, 8, None)[0]), ties.topk(8).values)
