import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch_geometric.data import Batch

from gkd.graphs.dense import from_padded
from gkd.graphs.message import RelationalConv
from gkd.graphs.spectral import Spectrum
from gkd.graphs.testing import (
    check_batch_equals_singles,
    check_gradients,
    check_permutation_equivariance,
    cycle_graph,
    fixture_graphs,
    identical_nodes_graph,
    isolated_node_graph,
    path_graph,
    star_graph,
)

RELATIONS = ["difference", "distance", "cosine", "feature"]


def conv_on(conv):
    return lambda graph: conv(graph.x, graph.edge_index, graph.edge_weight)


def slow_messages(x, edge_index, edge_weight, relation, hops):
    """One edge after the other, in float64."""
    x, weight = x.double(), edge_weight.double()
    total = [0.0] * len(x)
    for (_, i), w in zip(edge_index.t().tolist(), weight.tolist(), strict=True):
        total[i] += w

    def say(i, j):
        if relation == "difference":
            return (x[j] - x[i]).abs()
        if relation == "distance":
            return torch.linalg.vector_norm(x[j] - x[i]).view(1)
        if relation == "cosine":
            return torch.nn.functional.cosine_similarity(x[i], x[j], dim=0).view(1)
        return x[j]

    heard = None
    for _ in range(hops):
        said = [say(i, j) if heard is None else heard[j] for j, i in edge_index.t().tolist()]
        now = torch.zeros(len(x), said[0].numel(), dtype=torch.float64)
        for (_, i), w, content in zip(edge_index.t().tolist(), weight.tolist(), said, strict=True):
            if w > 0:
                now[i] += w / total[i] * content
        heard = now
    return heard


def weighted(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    graph.edge_weight = torch.rand(graph.num_edges, generator=generator, dtype=graph.x.dtype) + 0.1
    return graph


def test_hand_values():
    # Node 0 hears nodes 1 (weight 3) and 2 (weight 1); nobody speaks to the others.
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    edge_index, weight = torch.tensor([[1, 2], [0, 0]]), torch.tensor([3.0, 1.0])
    # |x1 - x0| = (1, 2), |x2 - x0| = (2, 0): 3/4 (1, 2) + 1/4 (2, 0)
    expected = {"difference": [1.25, 1.5]}
    # norms sqrt(5) and 2
    expected["distance"] = [0.75 * 5**0.5 + 0.25 * 2]
    # orthogonal, and parallel
    expected["cosine"] = [0.25]
    # 3/4 (0, 2) + 1/4 (3, 0)
    expected["feature"] = [0.75, 1.5]
    for relation, value in expected.items():
        heard = RelationalConv(relation)(x, edge_index, weight)
        torch.testing.assert_close(heard[0], torch.tensor(value))
        assert heard[1:].eq(0).all()
    torch.testing.assert_close(RelationalConv("difference", normalize=False)(x, edge_index, weight)[0], torch.tensor([5.0, 6.0]))
    torch.testing.assert_close(RelationalConv("difference")(x, edge_index)[0], torch.tensor([1.5, 1.0]))


def test_second_hop_passes_on_what_was_heard():
    # Path 0 - 1 - 2 at heights 0, 1, 3: the first hop gives 1, (1 + 2) / 2, 2; the second 1.5, (1 + 2) / 2, 1.5.
    graph = path_graph(3)
    x = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(RelationalConv(hops=1)(x, graph.edge_index), torch.tensor([[1.0], [1.5], [2.0]]))
    torch.testing.assert_close(RelationalConv(hops=2)(x, graph.edge_index), torch.tensor([[1.5], [1.5], [1.5]]))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("name", list(fixture_graphs()))
def test_agrees_with_a_loop_over_edges(relation, hops, name):
    graph = fixture_graphs()[name]
    graph = graph if name == "zero_weight" else weighted(graph)
    expected = slow_messages(graph.x, graph.edge_index, graph.edge_weight, relation, hops)
    torch.testing.assert_close(conv_on(RelationalConv(relation, hops))(graph).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("relation", RELATIONS)
def test_permutation_and_batch(relation):
    graphs = [weighted(graph, seed) for seed, graph in enumerate(fixture_graphs().values())]
    conv = conv_on(RelationalConv(relation, hops=2))
    for graph in graphs:
        check_permutation_equivariance(conv, graph)
    check_batch_equals_singles(conv, graphs)


@pytest.mark.parametrize("relation", RELATIONS)
def test_edge_of_weight_zero_sends_nothing(relation):
    graph = weighted(path_graph(4))
    conv = RelationalConv(relation)
    filled_index = torch.cat([graph.edge_index, torch.tensor([[3, 1, 0], [0, 1, 3]])], dim=1)
    filled_weight = torch.cat([graph.edge_weight, torch.zeros(3)])
    torch.testing.assert_close(conv(graph.x, filled_index, filled_weight), conv_on(conv)(graph), rtol=0, atol=0)


def test_invariances_of_the_relations():
    graph = weighted(star_graph(5))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    changed = {"translation": graph.x + 2, "rotation": graph.x @ rotation, "scale": graph.x * torch.arange(1.0, 6).view(-1, 1)}
    holds = {
        "difference": {"translation"},
        "distance": {"translation", "rotation"},
        "cosine": {"rotation", "scale"},
        "feature": set(),
    }
    for relation, invariances in holds.items():
        conv = RelationalConv(relation)
        before = conv(graph.x, graph.edge_index, graph.edge_weight)
        kept = {n for n, x in changed.items() if torch.allclose(conv(x, graph.edge_index, graph.edge_weight), before, atol=1e-5)}
        assert kept == invariances, relation


@pytest.mark.parametrize("relation", RELATIONS)
def test_gradients(relation):
    graph = weighted(isolated_node_graph(torch.float64))
    flat, zero_row = identical_nodes_graph().x[:4], graph.x.float().clone()
    zero_row[1] = 0
    weight = graph.edge_weight.float()
    check_gradients(
        lambda x, w: RelationalConv(relation, hops=2)(x, graph.edge_index, w),
        graph.x,
        graph.edge_weight,
        degenerate=[(flat, weight), (zero_row, weight), (torch.zeros(4, 3), weight), (graph.x.float(), torch.zeros(6))],
    )


def test_learned_features():
    conv = RelationalConv("feature", hops=2, in_channels=3, out_channels=5)
    graph = weighted(cycle_graph(6))
    heard = conv_on(conv)(graph)
    plain = conv_on(RelationalConv("feature", hops=2))(graph)
    torch.testing.assert_close(heard, plain @ conv.lin.weight.t())
    heard.sum().backward()
    assert conv.lin.weight.grad.abs().sum() > 0
    before = conv.lin.weight.detach().clone()
    conv.reset_parameters()
    assert not torch.equal(conv.lin.weight, before)
    assert str(conv) == "RelationalConv(feature, hops=2, 3 -> 5)"
    assert not list(RelationalConv().parameters())


def test_no_node_and_no_edge():
    none = torch.empty(2, 0, dtype=torch.long)
    assert RelationalConv()(torch.randn(3, 2), none).eq(0).all()
    assert RelationalConv()(torch.randn(0, 2), none).shape == (0, 2)
    assert RelationalConv("cosine")(torch.randn(0, 2), none).shape == (0, 1)


def test_autocast_keeps_float32():
    graph = weighted(cycle_graph(6))
    for relation in RELATIONS:
        conv = conv_on(RelationalConv(relation))
        with torch.autocast("cpu", torch.bfloat16):
            heard = conv(graph)
        assert heard.dtype == torch.float32
        assert torch.equal(heard, conv(graph))


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_sets_of_nodes(relation):
    sources, targets = torch.randn(5, 3), torch.randn(2, 3)
    edge_index, weight = torch.tensor([[0, 3, 4, 1], [0, 0, 1, 1]]), torch.rand(4)
    together = RelationalConv(relation)(torch.cat([sources, targets]), torch.stack([edge_index[0], edge_index[1] + 5]), weight)
    torch.testing.assert_close(RelationalConv(relation)((sources, targets), edge_index, weight), together[5:])


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("hops", [1, 2])
def test_sparse_adjacency(relation, hops):
    graph = weighted(fixture_graphs()["grid"])
    size = (graph.num_nodes, graph.num_nodes)
    expected = RelationalConv(relation, hops)(graph.x, graph.edge_index, graph.edge_weight)
    adj_t = torch.sparse_coo_tensor(graph.edge_index.flip(0), graph.edge_weight, size).coalesce()
    for adjacency in (adj_t, adj_t.to_sparse_csr()):
        torch.testing.assert_close(RelationalConv(relation, hops)(graph.x, adjacency), expected)


def test_arguments_of_message_passing():
    graph = weighted(fixture_graphs()["grid"])
    largest = RelationalConv(aggr="max", normalize=False)(graph.x, graph.edge_index)
    assert (largest >= RelationalConv(aggr="min", normalize=False)(graph.x, graph.edge_index)).all()
    turned = RelationalConv(flow="target_to_source")(graph.x, graph.edge_index, graph.edge_weight)
    torch.testing.assert_close(turned, RelationalConv()(graph.x, graph.edge_index.flip(0), graph.edge_weight))


@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_dense_messages(hops, normalize):
    conv = RelationalConv("feature", hops, 3, 4, normalize)
    for graph in (weighted(fixture_graphs()["grid"]), Batch.from_data_list(list(fixture_graphs().values()))):
        spectrum = Spectrum(graph)
        torch.testing.assert_close(from_padded(conv.dense(spectrum.x, spectrum), graph), conv(graph.x, graph.edge_index, graph.edge_weight))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_any_unit_of_features_and_weights(relation, scale):
    graph = weighted(fixture_graphs()["grid"])
    expected = RelationalConv(relation)(graph.x, graph.edge_index, graph.edge_weight)
    heard = RelationalConv(relation)(graph.x, graph.edge_index, scale * graph.edge_weight)
    torch.testing.assert_close(heard, expected)
    x = (scale * graph.x).requires_grad_()
    heard = RelationalConv(relation)(x, graph.edge_index, graph.edge_weight)
    torch.testing.assert_close(heard / (1 if relation == "cosine" else scale), expected)
    assert torch.autograd.grad(heard.sum(), x)[0].isfinite().all()


def test_errors():
    x, edge_index = torch.randn(3, 2), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"relation to be 'difference', 'distance', 'cosine' or 'feature' \(got 'sum'\)"):
        RelationalConv("sum")
    with pytest.raises(ValueError, match=r"hops to be a positive integer \(got 0\)"):
        RelationalConv(hops=0)
    with pytest.raises(ValueError, match=r"together \(got 3 and None\)"):
        RelationalConv("feature", in_channels=3)
    with pytest.raises(ValueError, match="relation='feature' only"):
        RelationalConv("cosine", in_channels=3, out_channels=3)
    with pytest.raises(ValueError, match=r"'x' of shape \[num_nodes, channels\]"):
        RelationalConv()(x[0], edge_index)
    with pytest.raises(ValueError, match=r"'edge_index' of shape \[2, num_edges\] \(got \[2\]\)"):
        RelationalConv()(x, edge_index[0])
    with pytest.raises(ValueError, match=r"'edge_weight' of shape \[2\] \(got \[3\]\)"):
        RelationalConv()(x, edge_index, torch.ones(3))
    with pytest.raises(ValueError, match=r"3 channels \(got 2\)"):
        RelationalConv("feature", in_channels=3, out_channels=3)(x, edge_index)
    with pytest.raises(ValueError, match=r"finite edge weights that are not negative \(got 1 others, such as -1\)"):
        RelationalConv()(x, edge_index, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"finite edge weights that are not negative \(got 1 others, such as nan\)"):
        RelationalConv()(x, edge_index, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"hops=1 between two sets of nodes.* \(got hops=2\)"):
        RelationalConv(hops=2)((x, x), edge_index)
    with pytest.raises(ValueError, match=r"normalize to be True or False \(got 'False'\)"):
        RelationalConv(normalize="False")
    with pytest.raises(ValueError, match=r"relation='feature' for dense messages \(got 'cosine'\)"):
        RelationalConv("cosine").dense(x[None], None)
    assert RelationalConv(normalize=False)(x, edge_index, torch.tensor([1.0, -1.0])).shape == (3, 2)


NUMBERS = """
import json, sys
if "--without" in sys.argv:
    sys.modules["torch_scatter"] = None  # makes the import fail
import torch, torch_geometric.typing
from torch_geometric.data import Batch

from gkd.graphs.dense import from_padded
from gkd.graphs.message import RelationalConv
from gkd.graphs.spectral import Spectrum
from gkd.graphs.testing import fixture_graphs
assert "--without" not in sys.argv or not torch_geometric.typing.WITH_TORCH_SCATTER
numbers = []
for graph in fixture_graphs().values():
    for relation in ("difference", "distance", "cosine", "feature"):
        x = graph.x.clone().requires_grad_()
        heard = RelationalConv(relation, hops=2)(x, graph.edge_index, graph.edge_weight)
        numbers += heard.flatten().tolist() + torch.autograd.grad(heard.square().sum(), x)[0].flatten().tolist()
print(json.dumps(numbers))
"""


def numbers(*options):
    command = [sys.executable, "-W", "ignore", "-c", NUMBERS, *options]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return torch.tensor(json.loads(result.stdout))


def test_same_numbers_without_torch_scatter():
    if importlib.util.find_spec("torch_scatter") is None:
        pytest.skip("torch_scatter is not installed: every other test already runs without it")
    torch.testing.assert_close(numbers(), numbers("--without"))


def test_compiles():
    graph = weighted(cycle_graph(6))
    conv = RelationalConv("distance", hops=2)
    torch.testing.assert_close(conv_on(torch.compile(conv, fullgraph=True))(graph), conv_on(conv)(graph))
