from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from gkd.models.maps import Size, channels_last, probe, probe_other_size, token_grid


class TapShape(NamedTuple):
    """A place in a network that can be tapped."""

    path: str
    """As :class:`~gkd.models.FeatureTaps` takes it; of tokens with `@auto`."""
    shape: tuple[int, ...]
    """Of what a tap gives for one image: [C, h, w] of a map, [C] of a vector."""


def list_taps(model: nn.Module, input_size: Sequence[int]) -> list[TapShape]:
    """Lists every module of a network that returns a map or a vector, in the order of the calls.

    Left out are modules that are not called for an image, that return several tensors, or whose tensors cannot be read as a map.

    Args:
        model: The network.
        input_size: [C, H, W] of an image.

    Examples:
        >>> list_taps(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten()), (3, 4, 4))
        [TapShape(path='0', shape=(8, 2, 2)), TapShape(path='1', shape=(32,))]
    """
    modules = {name: module for name, module in model.named_modules() if name}
    shapes = probe(model, modules, input_size)
    image_size: Size = (input_size[1], input_size[2])
    resized: dict[str, torch.Size] | None = None

    def reshape(name: str) -> torch.Size | None:
        nonlocal resized
        if resized is None:
            resized = probe_other_size(model, modules, input_size)
        return resized.get(name)

    taps = []
    for name, (batch, *sizes) in shapes.items():
        if batch != 1:  # windows, say
            continue
        if len(sizes) == 3:
            last = channels_last(shapes[name], image_size, modules[name], partial(reshape, name))
            if last is not None:
                taps.append(TapShape(name, (sizes[2], sizes[0], sizes[1]) if last else tuple(sizes)))
        elif len(sizes) == 2:
            grid = token_grid(model, sizes[0], image_size)
            if grid is not None:
                taps.append(TapShape(f"{name}@auto", (sizes[1], *grid)))
        elif len(sizes) == 1:
            taps.append(TapShape(name, tuple(sizes)))
    return taps
