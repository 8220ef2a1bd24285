from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def watched(modules: Mapping[str, nn.Module], seen: dict[str, Any]) -> Iterator[None]:
    """Keeps what modules return while the context lasts.

    Examples:
        >>> import torch
        >>> seen = {}
        >>> layer = nn.Identity()
        >>> with watched({"layer": layer}, seen):
        ...     _ = layer(torch.ones(1))
        >>> seen
        {'layer': tensor([1.])}
    """

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
