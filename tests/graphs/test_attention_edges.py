import itertools
import math

import pytest
import torch

from gkd.graphs import AttentionEdges, Nodes
from tests.graphs.edge_rules import dense, rows


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
        with pytest.raises(ValueError, match=r"Expected temperature to be a positive number \(got 0\)"):
            AttentionEdges(temperature=0)
        with pytest.raises(ValueError, match=r"Expected k to be a positive integer \(got 0\)"):
            AttentionEdges(k=0)
