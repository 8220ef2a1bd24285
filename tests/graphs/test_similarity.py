import math

import pytest
import torch

from gkd.graphs import AttentionEdges, CompleteEdges, KNNEdges, Nodes, RadiusEdges, RandomEdges
from gkd.graphs.similarity import CosineSimilarity, EuclideanSimilarity, squared_distances, unit_rows
from tests.graphs.edge_rules import rows

# Edges whose weights do not change with the unit of the features.
SCALE_FREE = (KNNEdges(2), KNNEdges(2, "euclidean"), CompleteEdges(), CompleteEdges(nonnegative=True), RandomEdges(2, metric="euclidean"))


class TestSimilarity:
    def test_unit_rows(self):
        x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], requires_grad=True)
        unit = unit_rows(x)
        torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
        (gradient,) = torch.autograd.grad(unit[:, 0].sum(), x)
        # d(x / |x|)_0 / dx = (1 - 0.36, -0.48) / 5; nothing comes back to the rows that count as zero.
        torch.testing.assert_close(gradient, torch.tensor([[0.128, -0.096], [0.0, 0.0], [0.0, 0.0]]))

    def test_distances_far_from_the_origin(self):
        x = torch.rand(1, 20, 5) + 1000
        expected = torch.cdist(x.double(), x.double()).square()
        rows, _, unit = EuclideanSimilarity().prepare(x)
        torch.testing.assert_close(squared_distances(rows, rows).double() * unit**2, expected, rtol=1e-4, atol=1e-5)

    def test_equal_rows_have_distance_zero(self):
        x = torch.rand(1, 1, 300).expand(1, 9, 300)
        assert squared_distances(x, x).max() == 0
        x = torch.cat((x, torch.rand(1, 9, 300)), dim=1)
        assert squared_distances(x, x)[:, :9, :9].max() == 0
        assert squared_distances(x, x).diagonal(dim1=1, dim2=2).max() == 0

    @pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-14, 1e14, 1e18, 1e30])
    @pytest.mark.parametrize(
        "rule", [*SCALE_FREE, RadiusEdges(9.0, "euclidean"), KNNEdges(2, "euclidean", sigma=3.0), AttentionEdges(k=2)], ids=repr
    )
    def test_any_unit_of_the_features(self, rule, scale):
        x = rows(2, 6, 4, torch.float32)
        scaled = (scale * x).requires_grad_()
        edges = rule(Nodes(scaled))
        given = rule(Nodes(scaled), rule(Nodes(x)).edge_index)
        if rule in SCALE_FREE:
            expected = rule(Nodes(x))
            assert torch.equal(edges.edge_index, expected.edge_index)
            torch.testing.assert_close(edges.edge_weight, expected.edge_weight)
            torch.testing.assert_close(given.edge_weight, expected.edge_weight)
        for weight in (edges.edge_weight, given.edge_weight):
            assert weight.isfinite().all()
            assert torch.autograd.grad(weight.sum(), scaled, retain_graph=True)[0].isfinite().all()

    def test_bandwidth_and_radius_have_the_unit_of_the_features(self):
        x = rows(2, 6, 4, torch.float64)
        for scale in (1e-8, 1e8):
            for rule in (lambda s: KNNEdges(2, "euclidean", sigma=s), lambda s: RadiusEdges(2 * s, sigma=s)):
                torch.testing.assert_close(rule(scale)(Nodes(scale * x)).edge_weight, rule(1.0)(Nodes(x)).edge_weight)

    @pytest.mark.parametrize("similarity", [CosineSimilarity(), EuclideanSimilarity()], ids=["cosine", "euclidean"])
    def test_edge_scores_are_entries_of_scores(self, similarity):
        x, y = rows(2, 5), rows(2, 7)
        x, y, _ = similarity.prepare(x, y)
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
        torch.testing.assert_close(similarity.weights(score, exists, graph, 2, None), expected)
        torch.testing.assert_close(similarity.weights(score, exists, None, 2, None), expected)
