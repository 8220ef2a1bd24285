import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import kneighbors_graph, radius_neighbors_graph
from torch.autograd import gradcheck

from gkd.graphs import AttentionEdges, CompleteEdges, KNNEdges, Nodes, RadiusEdges, RandomEdges
from gkd.graphs import nearest as nearest_module
from gkd.graphs.nearest import neighbors
from tests.graphs.edge_rules import EVERY, FREE, dense, each, rows


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
        with pytest.raises(ValueError, match=r"Expected symmetrize to be 'union', 'mutual' or None \(got 'both'\)"):
            KNNEdges(symmetrize="both")
        with pytest.raises(ValueError, match=r"Expected metric to be 'cosine' or 'euclidean' \(got 'l1'\)"):
            KNNEdges(metric="l1")
        with pytest.raises(ValueError, match=r"Expected sigma=None with metric='cosine'.*got sigma=1.0"):
            KNNEdges(sigma=1.0)
        with pytest.raises(ValueError, match=r"Expected sigma to be a positive number \(got 0\)"):
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
        with pytest.raises(ValueError, match=r"Expected radius to be a positive number \(got -1\)"):
            RadiusEdges(-1)


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


def test_neighbors_of_long_rows_are_the_nearest():
    scores = torch.rand(2, 40, 256, generator=torch.Generator().manual_seed(0))
    found, exists = neighbors(scores, 8, None)
    assert exists is None
    assert torch.equal(found, scores.topk(8).indices)
    ties = scores.mul(8).round()  # which of the equal ones is open
    torch.testing.assert_close(ties.gather(2, neighbors(ties, 8, None)[0]), ties.topk(8).values)
