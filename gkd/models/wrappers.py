from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the network inside `torch.compile`, `DistributedDataParallel` and `DataParallel`, however nested."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model, what it wraps, what that wraps, and so on: whatever is held as `_orig_mod` or `module`.

    Wrappers of other libraries (Lightning Fabric, accelerate, Teacher here) follow the same custom.
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        yield inner
        inner = inner._modules.get("_orig_mod") or getattr(inner, "module", None)
