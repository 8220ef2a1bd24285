import threading

import torch
from torch._subclasses import FakeTensorMode

from gkd.graphs import ChannelNodes, CompleteEdges, GraphBuilder
from gkd.graphs.cache import _Cache, static_tensors


def built(size, device):
    return (torch.arange(size, device=device),)


def plain(graph):
    return all(type(value) is torch.Tensor for value in (graph.edge_index, graph.batch, graph.ptr, *graph._slice_dict.values()))


def test_fake_tensors_stay_in_their_mode():
    builder = GraphBuilder(ChannelNodes(), CompleteEdges())
    with FakeTensorMode():
        graph = builder(torch.rand(3, 11, 2, 2), static=True)  # a size that no other test has
        assert not plain(graph)
    graph = builder(torch.rand(3, 11, 2, 2), static=True)
    assert plain(graph)
    assert [single.num_nodes for single in graph.to_data_list()] == [11, 11, 11]
    with FakeTensorMode():
        builder(torch.rand(3, 11, 2, 2), static=True)  # nor do ordinary ones come into it


def test_tensors_of_a_transform_stay_in_it():
    builder = GraphBuilder(ChannelNodes(), CompleteEdges(nonnegative=True))

    def total(features):
        return builder(features, static=True).edge_weight.sum()

    features = torch.rand(2, 13, 2, 2)
    gradient = torch.func.grad(total)(features)
    assert plain(builder(features, static=True))
    leaf = features.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(total(leaf), leaf)[0])


def test_default_device_has_no_part():
    with torch.device("meta"):
        (index,) = static_tensors(built, 29, torch.device("cpu"))
        builder = GraphBuilder(ChannelNodes(), CompleteEdges())
        graph = builder(torch.rand(2, 17, 2, 2, device="cpu"), static=True)
    assert index.device.type == "cpu"
    assert {value.device.type for value in graph._slice_dict.values()} == {"cpu"}
    assert static_tensors(built, 29, torch.device("meta"))[0].device.type == "meta"


def test_devices_are_kept_apart():
    cache = _Cache(1000)
    first = cache.get(built, 4, torch.device("cpu"))[0]
    assert cache.get(built, 4, torch.device("meta"))[0].device.type == "meta"
    assert cache.get(built, 4, torch.device("cpu"))[0] is first


def test_is_bounded_by_bytes():
    cache, cpu = _Cache(100 * 8), torch.device("cpu")
    first = cache.get(built, 40, cpu)[0]
    cache.get(built, 41, cpu)
    assert cache.get(built, 40, cpu)[0] is first  # now used later than the other
    cache.get(built, 42, cpu)  # 40 + 42 <= 100: that of 41 goes
    assert [key[1] for key in cache.entries] == [40, 42]
    assert cache.get(built, 40, cpu)[0] is first
    large = cache.get(built, 101, cpu)[0]
    assert large.numel() == 101
    assert cache.get(built, 101, cpu)[0] is not large
    assert [key[1] for key in cache.entries] == [42, 40]


def test_several_threads():
    cache, cpu, errors = _Cache(64 * 8), torch.device("cpu"), []

    def work():
        for size in range(60):
            if cache.get(built, size, cpu)[0].numel() != size:
                errors.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
