from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from gkd.graphs.values import under_a_mode

Build = Callable[..., tuple[Tensor, ...]]

_MOST_BYTES = 3 * 2**25  # of all the tensors that are kept


def static_tensors(build: Build, *key: object) -> tuple[Tensor, ...]:
    """Index tensors that depend on sizes and devices only, from a small cache.

    They are shared between graphs. Should somebody write into one of them all the same, it is built anew. The cache is bounded by bytes
    and drops what was not used for the longest time; what is larger than all of it is never kept. Under torch.compile, torch.func,
    a FakeTensorMode or another mode, whose tensors mean nothing outside it, they are built where they are asked for; under inference mode
    they are built as ordinary tensors, since autograd may meet them later.

    Args:
        build: Makes the tensors from the key, each on a device that the key names.
        *key: Sizes, options and devices.
    """
    if torch.compiler.is_compiling() or under_a_mode():
        return build(*key)
    return _CACHE.get(build, *key)


class _Cache:
    """Tensors by how they were built, with the versions that they had then."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.entries: OrderedDict[tuple[object, ...], tuple[tuple[Tensor, ...], tuple[int, ...]]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, build: Build, *key: object) -> tuple[Tensor, ...]:
        with self.lock:
            tensors, versions = self.entries.pop((build, *key), ((), ()))
            if not tensors or _versions(tensors) != versions:
                with torch.inference_mode(False):
                    tensors = build(*key)
            if _num_bytes(tensors) <= self.most_bytes:
                self.entries[(build, *key)] = tensors, _versions(tensors)
            while sum(_num_bytes(kept) for kept, _ in self.entries.values()) > self.most_bytes:
                self.entries.popitem(last=False)
            return tensors


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


_CACHE = _Cache(_MOST_BYTES)
