"""Every node class, edge class and encoding on features that no network should make: finite, or a ValueError that says what is wrong."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    GridEdges,
    HeatKernelEncoding,
    InstanceNodes,
    KNNEdges,
    LaplacianEncoding,
    PatchNodes,
    RadiusEdges,
    RandomEdges,
    RandomWalkEncoding,
    RelationalConv,
    Spectrum,
    StageGraph,
    from_dense,
)

NODES = {"channel": ChannelNodes, "patch": PatchNodes, "instance": InstanceNodes}
EDGES = {
    "knn": lambda k: KNNEdges(k),
    "knn mutual": lambda k: KNNEdges(k, symmetrize="mutual"),
    "knn directed euclidean": lambda k: KNNEdges(k, "euclidean", symmetrize=None),
    "knn sigma": lambda k: KNNEdges(k, "euclidean", sigma=0.5),
    "radius": lambda k: RadiusEdges(1.5),
    "radius cosine": lambda k: RadiusEdges(0.3, "cosine"),
    "complete": lambda k: CompleteEdges(),
    "complete loops": lambda k: CompleteEdges(self_loops=True),
    "complete clipped": lambda k: CompleteEdges(nonnegative=True),
    "complete euclidean": lambda k: CompleteEdges("euclidean"),
    "grid": lambda k: GridEdges(4),
    "attention": lambda k: AttentionEdges(),
    "attention k": lambda k: AttentionEdges(k, temperature=0.1),
    "random": lambda k: RandomEdges(k),
}
ENCODINGS = {
    "none": lambda: None,
    "laplacian": partial(LaplacianEncoding, num_eig=2),
    "laplacian plain": partial(LaplacianEncoding, num_eig=3, normalization=None, sign="abs"),
    "laplacian subspace": partial(LaplacianEncoding, num_eig=1, method="subspace"),
    "heat": partial(HeatKernelEncoding, times=(0.5, 32.0)),
    "heat lowest": partial(HeatKernelEncoding, num_eig=2, times=(1.0,)),
    "walk": partial(RandomWalkEncoding, walk_length=3),
}
LARGEST = {torch.float16: 4, torch.bfloat16: 18, torch.float32: 18, torch.float64: 18}  # powers of ten


@st.composite
def features(draw, batch_size=None):
    """Feature maps [B, C, h, w] of any size from 0, type, scale, pattern and memory layout."""
    shape = (
        draw(st.integers(0, 3)) if batch_size is None else batch_size,
        draw(st.integers(0, 6)),
        *draw(st.tuples(*[st.integers(1, 4)] * 2)),
    )
    dtype = draw(st.sampled_from(list(LARGEST)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    pattern = draw(st.sampled_from(["signed", "relu", "zero", "dead", "identical", "constant", "sparse", "mixed units", "near"]))
    if pattern == "relu":
        x = x.relu()
    elif pattern == "zero":
        x = 0 * x
    elif pattern == "dead":
        x = x.relu() * (torch.rand(shape[1], 1, 1, generator=generator) < 0.4)
    elif pattern == "identical":
        x = x[:, :1].repeat(1, shape[1], 1, 1)
    elif pattern == "constant":
        x = torch.ones(shape, dtype=torch.float64)
    elif pattern == "sparse":
        x = x.abs() * (torch.rand(shape, generator=generator) < 0.15)
    elif pattern == "mixed units":
        x = x * 10.0 ** torch.randint(-20, 1, (1, shape[1], 1, 1), generator=generator)
    elif pattern == "near":
        x = 1 + 1e-7 * x
    x = x / x.abs().max().clamp(min=1e-300) if x.numel() else x
    x = (x * 10.0 ** draw(st.integers(-20, LARGEST[dtype]))).to(dtype)
    strided = draw(st.sampled_from(["contiguous", "transposed", "channels last", "expanded", "step"]))
    if strided == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif strided == "channels last" and x.numel():
        x = x.contiguous(memory_format=torch.channels_last)
    elif strided == "expanded":
        x = x[:, :, :1].expand(shape)
    elif strided == "step":
        x = torch.stack([x, x], dim=-1)[..., 0]
    note(f"{pattern}, {strided}, {dtype}, {list(shape)}, largest {float(x.abs().max()) if x.numel() else 0:g}")
    return x


def check_finite(maps, outputs):
    outputs = [value for value in outputs if value is not None]
    for value in outputs:
        assert value.isfinite().all()
    # The gradient of a direction is 1/|x|, which half precision holds only of a loss that is scaled down.
    scale = 2.0**-12 if any(x.dtype == torch.float16 for x in maps) else 1.0
    total = sum(scale * (value * torch.linspace(0.5, 1.5, value.numel()).view_as(value)).sum() for value in outputs)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        for gradient in torch.autograd.grad(total, maps, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def attempt(build):
    """Returns what is built, or None for input that is refused with a message; nothing else may happen."""
    try:
        return build()
    except ValueError as error:
        message = str(error)
    assert re.match(r"Expected .*\(got ", message), message
    return None


@pytest.mark.parametrize("edges", EDGES)
@given(maps=features(), data=st.data())
def test_graphs(edges, maps, data):
    nodes = NODES[data.draw(st.sampled_from(list(NODES)))](grid=data.draw(st.sampled_from([None, 1, 2])), center=data.draw(st.booleans()))
    encoding = data.draw(st.sampled_from(list(ENCODINGS)))
    builder = GraphBuilder(nodes, EDGES[edges](data.draw(st.integers(1, 3))), ENCODINGS[encoding]())
    static = data.draw(st.booleans())
    note(f"{encoding}, static={static}")
    maps.requires_grad_()
    graph = attempt(lambda: builder(maps, static=static))
    if graph is not None:
        assert graph.validate()
        assert graph.num_graphs == (1 if isinstance(nodes, InstanceNodes) else maps.shape[0])
        assert (graph.edge_weight >= 0).all()
        check_finite([maps], [graph.edge_weight, graph.get("pe")])
        again = builder(2 * maps.detach(), topology=graph)
        check_finite([maps], [again.edge_weight])


@given(maps=features(), relation=st.sampled_from(["difference", "distance", "cosine", "feature"]), hops=st.integers(1, 3))
def test_messages(maps, relation, hops):
    maps.requires_grad_()
    graph = attempt(lambda: GraphBuilder(ChannelNodes(), KNNEdges(k=1))(maps))
    if graph is not None:
        unit = graph.x.detach().abs().max().clamp(min=1.0) if graph.x.numel() else 1.0
        check_finite([maps], [RelationalConv(relation, hops)(graph.x, graph.edge_index, graph.edge_weight) / unit])


@given(maps=features(), num_eig=st.integers(1, 5), drop_trivial=st.booleans(), edges=st.sampled_from(["knn", "complete", "complete loops"]))
def test_views(maps, num_eig, drop_trivial, edges):
    maps.requires_grad_()
    builder = GraphBuilder(ChannelNodes(), EDGES[edges](1))
    view = attempt(lambda: builder.view(maps))
    if view is not None:
        teacher = builder.view(maps.detach().flip(0), topology=view)
        eigval, eigvec = view.eigenmaps(num_eig, drop_trivial)
        outputs = [eigval, eigvec, view.degree, view.laplacian_product(torch.ones_like(eigvec)), view.heat_diagonal([1.0, 8.0])]
        assert (eigval[:, 1:] >= eigval[:, :-1] - 1e-4).all()
        check_finite([maps], [*outputs, view.squared_distance(teacher), view.propagate(torch.ones_like(eigvec))])


@given(data=st.data(), cross=st.sampled_from([AttentionEdges(k=1), KNNEdges(k=1), KNNEdges(k=1, metric="euclidean")]))
def test_stages(data, cross):
    size = data.draw(st.integers(1, 2))
    maps = {stage: data.draw(features(batch_size=size)).requires_grad_() for stage in ("a", "b")}
    builders = {stage: GraphBuilder(ChannelNodes(grid=1), KNNEdges(k=1)) for stage in maps}
    graph = attempt(lambda: StageGraph(builders, cross)(maps))
    if graph is not None:
        assert graph.validate()
        check_finite(list(maps.values()), [graph.edge_weight])


@given(
    num_nodes=st.integers(0, 6),
    exponent=st.integers(-20, 18),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(["auto", "exact", "subspace"]),
    normalization=st.sampled_from(["sym", "rw", None]),
    seed=st.integers(0, 2**31),
)
def test_weights_of_any_unit(num_nodes, exponent, dtype, method, normalization, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(1, num_nodes, num_nodes, generator=generator, dtype=dtype) * (
        torch.rand(num_nodes, num_nodes, generator=generator) < 0.5
    )
    features = torch.zeros(1, num_nodes, 1, dtype=dtype)
    graph = from_dense(10.0**exponent * (A + A.mT), x=features)
    graph.edge_weight = graph.edge_weight.detach().requires_grad_()
    spectrum = Spectrum(graph, normalization, method)
    eigval, eigvec = spectrum.eigenmaps(3)
    unit = 10.0**exponent if normalization is None else 1.0
    check_finite([graph.edge_weight], [eigval / unit, eigvec if normalization != "rw" else None, RandomWalkEncoding(3)(graph)])
