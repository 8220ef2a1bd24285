"""Small graphs with known answers, and checkers for what every graph operator promises. Needs no test runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch_geometric.data import Batch, Data
from torch_geometric.utils import sort_edge_index

Outputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def graph_from_edges(edges: Sequence[tuple[int, int]], num_nodes: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> Data:
    """Builds an undirected graph of unit weights whose features tell its nodes apart.

    Args:
        edges: Each undirected edge once.
        num_nodes: Number of nodes, isolated ones included.
        channels: Width of the features.
        dtype: Type of features and weights.

    Examples:
        >>> graph_from_edges([(0, 1), (1, 2)], num_nodes=3)
        Data(x=[3, 3], edge_index=[2, 4], edge_weight=[4])
    """
    pairs = torch.tensor(edges, dtype=torch.long).view(-1, 2).t()
    edge_index = sort_edge_index(torch.cat([pairs, pairs.flip(0)], dim=1), num_nodes=num_nodes)
    grid = torch.arange(num_nodes * channels, dtype=torch.float64).view(num_nodes, channels)
    return Data(x=grid.mul(1.7).add(0.3).sin().to(dtype), edge_index=edge_index, edge_weight=torch.ones(edge_index.size(1), dtype=dtype))


def path_graph(num_nodes: int = 4, dtype: torch.dtype = torch.float32) -> Data:
    r"""Nodes in a row; eigenvalues :math:`1 - \cos(\pi k / (n - 1))` of the ``'sym'`` Laplacian, all simple."""
    return graph_from_edges([(i, i + 1) for i in range(num_nodes - 1)], num_nodes, dtype=dtype)


def cycle_graph(num_nodes: int = 8, dtype: torch.dtype = torch.float32) -> Data:
    r"""Nodes in a ring; eigenvalues :math:`1 - \cos(2 \pi k / n)` of the ``'sym'`` Laplacian, nearly all of them twice."""
    return graph_from_edges([(i, (i + 1) % num_nodes) for i in range(num_nodes)], num_nodes, dtype=dtype)


def star_graph(num_nodes: int = 5, dtype: torch.dtype = torch.float32) -> Data:
    r"""Node 0 joined to all others; eigenvalues 0, 1 (n - 2 times) and 2 of the ``'sym'`` Laplacian."""
    return graph_from_edges([(0, i) for i in range(1, num_nodes)], num_nodes, dtype=dtype)


def complete_graph(num_nodes: int = 5, dtype: torch.dtype = torch.float32) -> Data:
    r"""All pairs; eigenvalues 0 and :math:`n / (n - 1)` (n - 1 times) of the ``'sym'`` Laplacian."""
    return graph_from_edges([(i, j) for i in range(num_nodes) for j in range(i + 1, num_nodes)], num_nodes, dtype=dtype)


def grid_graph(height: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> Data:
    """A rectangle of nodes, row by row, each joined to its up to 4 neighbours."""
    right = [(r * width + c, r * width + c + 1) for r in range(height) for c in range(width - 1)]
    down = [(r * width + c, (r + 1) * width + c) for r in range(height - 1) for c in range(width)]
    return graph_from_edges(right + down, height * width, dtype=dtype)


def two_components_graph(dtype: torch.dtype = torch.float32) -> Data:
    """Two equal triangles: eigenvalue 0 twice, and every other eigenvalue in both."""
    return graph_from_edges([(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)], 6, dtype=dtype)


def isolated_node_graph(dtype: torch.dtype = torch.float32) -> Data:
    """A triangle and a node of degree 0, the last one."""
    return graph_from_edges([(0, 1), (1, 2), (0, 2)], 4, dtype=dtype)


def zero_weight_graph(dtype: torch.dtype = torch.float32) -> Data:
    """A cycle whose edges all have weight 0, that is: nodes without an edge."""
    graph = cycle_graph(4, dtype=dtype)
    graph.edge_weight = torch.zeros_like(graph.edge_weight)
    return graph


def identical_nodes_graph(dtype: torch.dtype = torch.float32) -> Data:
    """A complete graph whose nodes have the same features: every difference is 0."""
    graph = complete_graph(4, dtype=dtype)
    graph.x = graph.x[:1].repeat(4, 1)
    return graph


def fixture_graphs(dtype: torch.dtype = torch.float32) -> dict[str, Data]:
    """Names one small graph for every case in which graph code tends to break.

    Examples:
        >>> from torch_geometric.data import Batch
        >>> Batch.from_data_list(list(fixture_graphs().values())).num_graphs
        9
    """
    builders = (
        path_graph,
        cycle_graph,
        star_graph,
        complete_graph,
        grid_graph,
        two_components_graph,
        isolated_node_graph,
        zero_weight_graph,
        identical_nodes_graph,
    )
    return {builder.__name__.removesuffix("_graph"): builder(dtype=dtype) for builder in builders}


def fixture_features(
    batch_size: int = 2, channels: int = 6, height: int = 3, width: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Names feature maps for every case in which building a graph tends to break.

    Returns:
        ``random`` (not negative, as after a ReLU), ``signed``, ``all_zero``, ``zero_channel`` (the first is 0 everywhere),
        ``identical_channels``, ``identical_patches`` and ``two_groups`` (two sets of channels with nothing in common).

    Shapes:
        - each [batch_size, channels, height, width]
    """
    signed = torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = signed.abs()
    zero_channel = random.clone()
    zero_channel[:, 0] = 0
    two_groups = random.clone()
    two_groups[:, : channels // 2, : (height + 1) // 2] = 0
    two_groups[:, channels // 2 :, (height + 1) // 2 :] = 0
    maps = {
        "random": random,
        "signed": signed,
        "all_zero": torch.zeros_like(random),
        "zero_channel": zero_channel,
        "identical_channels": random[:, :1].repeat(1, channels, 1, 1),
        "identical_patches": random[:, :, :1, :1].repeat(1, 1, height, width),
        "two_groups": two_groups,
    }
    return {name: value.to(dtype) for name, value in maps.items()}


def permute_graph(graph: Data, permutation: Tensor, edge_order: Tensor | None = None) -> Data:
    """Renames the nodes of one graph: new node i is old node ``permutation[i]``.

    Args:
        graph: A single graph.
        permutation: A permutation of its nodes.
        edge_order: A permutation of its edges; None keeps their order.

    Shapes:
        - **permutation** [N], **edge_order** [E]
    """
    place = torch.empty_like(permutation)
    place[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    permuted = graph.clone()
    for name in graph.node_attrs():
        permuted[name] = graph[name][permutation]
    permuted.edge_index = place[graph.edge_index]
    if edge_order is not None:
        for name in graph.edge_attrs():
            permuted[name] = permuted[name][:, edge_order] if name == "edge_index" else graph[name][edge_order]
    return permuted


def check_permutation_equivariance(
    fn: Callable[[Data], Outputs], graph: Data, invariant: bool = False, seed: int = 0, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Checks that renaming nodes, and listing edges in another order, only renames the rows of the output.

    Args:
        fn: Takes a graph, gives one or several tensors with a row for every node.
        graph: One graph, or a Batch, whose graphs are each permuted.
        invariant: Whether the output has no row for every node and has to stay as it is.
        seed: Seed of the permutation.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        AssertionError: If the outputs differ, with the largest difference.

    Examples:
        >>> check_permutation_equivariance(lambda graph: graph.x.exp(), path_graph())
        >>> check_permutation_equivariance(lambda graph: graph.x.cumsum(0), path_graph())
        Traceback (most recent call last):
        ...
        AssertionError: Expected output 0 to follow a permutation of the nodes (got a difference of 1)
    """
    generator = torch.Generator().manual_seed(seed)
    singles = graph.to_data_list() if isinstance(graph, Batch) else [graph]
    permuted, order, offset = [], [], 0
    for single in singles:
        permutation = torch.randperm(_num_nodes(single), generator=generator)
        edge_order = torch.randperm(single.num_edges, generator=generator)
        permuted.append(permute_graph(single, permutation, edge_order))
        order.append(permutation + offset)
        offset += permutation.numel()
    after = fn(Batch.from_data_list(permuted) if isinstance(graph, Batch) else permuted[0])
    rows = torch.cat(order)
    for name, before, now in _pairs(fn(graph), after):
        expected = before if invariant else before[rows]
        change = "stay the same under" if invariant else "follow"
        _assert_close(now, expected, f"Expected output {name} to {change} a permutation of the nodes", rtol, atol)


def check_batch_equals_singles(fn: Callable[[Batch], Outputs], graphs: Sequence[Data], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Checks that a graph gets the same answer alone as among others.

    Args:
        fn: Takes a Batch, gives one or several tensors whose first dimension runs over nodes (or graphs).
        graphs: Graphs of unequal size: what leaks from one into the next, or from padding, shows then.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        AssertionError: If the outputs differ, with the largest difference.

    Examples:
        >>> check_batch_equals_singles(lambda batch: batch.x - batch.x.mean(0), [path_graph(3), cycle_graph(5)])
        Traceback (most recent call last):
        ...
        AssertionError: Expected output 0 of a batch to equal those of its graphs alone (got a difference of 0.281)
    """
    alone = [_named(fn(Batch.from_data_list([graph]))) for graph in graphs]
    together = _named(fn(Batch.from_data_list(list(graphs))))
    for name, value in together.items():
        expected = torch.cat([outputs[name] for outputs in alone])
        _assert_close(value, expected, f"Expected output {name} of a batch to equal those of its graphs alone", rtol, atol)


def check_gradients(
    fn: Callable[..., Outputs],
    *inputs: Tensor,
    degenerate: Iterable[Tensor | tuple[Tensor, ...]] = (),
    eps: float = 1e-6,
    atol: float = 1e-5,
) -> None:
    """Checks gradients against finite differences, and that they stay finite where finite differences do not exist.

    Args:
        fn: Takes as many tensors as there are inputs, gives one or several tensors.
        inputs: Where the function is smooth; taken to float64. None of them: only the degenerate ones are looked at.
        degenerate: Further inputs (equal features, zero rows, ...) at which value and gradient only have to be finite.
        eps: Step of the finite differences.
        atol: Absolute tolerance of the comparison.

    Raises:
        AssertionError: If a gradient is wrong, or a value or gradient is not finite.

    Examples:
        >>> check_gradients(torch.sin, torch.ones(2), degenerate=[torch.zeros(2)])
        >>> check_gradients(lambda x: x.norm() ** 0.5, degenerate=[torch.zeros(2)])
        Traceback (most recent call last):
        ...
        AssertionError: Expected a finite gradient to input 0 at degenerate case 0 (got nan)
    """
    if inputs:
        leaves = tuple(value.detach().double().requires_grad_() for value in inputs)
        try:
            torch.autograd.gradcheck(lambda *values: tuple(_named(fn(*values)).values()), leaves, eps=eps, atol=atol)
        except GradcheckError as error:
            raise AssertionError(f"Expected gradients to agree with finite differences (got: {error})") from error
    for case, values in enumerate(degenerate):
        leaves = tuple(value.detach().clone().requires_grad_() for value in ((values,) if isinstance(values, Tensor) else values))
        total = torch.zeros(())
        for name, output in _named(fn(*leaves)).items():
            _assert_finite(output, f"Expected a finite output {name} at degenerate case {case}")
            total = total + (output * torch.linspace(0.5, 1.5, output.numel(), device=output.device).view_as(output)).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
        if all(gradient is None for gradient in gradients):
            raise AssertionError(f"Expected a gradient to reach an input at degenerate case {case} (got none)")
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                _assert_finite(gradient, f"Expected a finite gradient to input {place} at degenerate case {case}")


def _num_nodes(graph: Data) -> int:
    return int(graph.num_nodes or 0)


def _named(outputs: Outputs) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"0": outputs}
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return {str(place): value for place, value in enumerate(outputs)}


def _pairs(first: Outputs, second: Outputs) -> list[tuple[str, Tensor, Tensor]]:
    second_named = _named(second)
    return [(name, value, second_named[name]) for name, value in _named(first).items()]


def _assert_close(actual: Tensor, expected: Tensor, message: str, rtol: float, atol: float) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{message} (got shapes {list(actual.shape)} and {list(expected.shape)})")
    if not torch.allclose(actual, expected, rtol=rtol, atol=atol):
        raise AssertionError(f"{message} (got a difference of {float((actual - expected).abs().max()):.3g})")


def _assert_finite(value: Tensor, message: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise AssertionError(f"{message} (got {float(value[~torch.isfinite(value)].flatten()[0])})")
