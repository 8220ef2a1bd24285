"""Every class of edges with its options, and what tests of edges share."""

import pytest
import torch

from gkd.graphs import AttentionEdges, CompleteEdges, KNNEdges, RadiusEdges, RandomEdges

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
