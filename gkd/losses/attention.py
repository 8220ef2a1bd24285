from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from gkd.graphs.precision import as_float


def node_attention(x: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    r"""Weighs the nodes of every graph by how strongly they respond.

    .. math:: w_i = n \, \mathrm{softmax}_i \Big( \frac{1}{d} \sum_k |x_{ik}| \,/\, T \Big)

    The mean over the nodes of a graph is 1, so that a weighted mean keeps its scale. Without gradient. Equivariant to permutations of the
    nodes, invariant to permutations and signs of the features. Not invariant to scale: a network with larger features is guided more
    sharply.

    Args:
        x: Node features; padded nodes are ignored, whatever they hold.
        temperature: T > 0 in units of the features. Small: the strongest node takes all; ``inf``: every weight is 1.
        mask: Which nodes exist; None for all.

    Shapes:
        - **x** [B, n, d], **mask** [B, n]; **output** [B, n], 0 where there is no node

    Raises:
        ValueError: If ``temperature`` is not positive.

    Examples:
        >>> node_attention(torch.tensor([[[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]]), temperature=float("inf"))
        tensor([[1., 1., 1.]])
    """
    size = x.size(-1)
    magnitude = as_float(x.detach()).abs().sum(dim=-1) / max(size, 1)
    return _softmax_of_mean_one(magnitude, temperature, mask)


def feature_attention(x: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    r"""Weighs the features of every graph by how strongly its nodes respond in them.

    .. math:: v_k = d \, \mathrm{softmax}_k \Big( \frac{1}{n} \sum_i |x_{ik}| \,/\, T \Big)

    The counterpart of :func:`node_attention`: mean 1 over the features, without gradient.

    Args:
        x: Node features; padded nodes are ignored, whatever they hold.
        temperature: T > 0 in units of the features; ``inf``: every weight is 1.
        mask: Which nodes exist; None for all.

    Shapes:
        - **x** [B, n, d], **mask** [B, n]; **output** [B, d]

    Raises:
        ValueError: If ``temperature`` is not positive.
    """
    magnitude = as_float(x.detach()).abs()
    if mask is None:
        magnitude = magnitude.sum(dim=1) / max(x.size(1), 1)
    else:
        total = magnitude.where(mask.unsqueeze(-1), 0.0).sum(dim=1)
        magnitude = total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return _softmax_of_mean_one(magnitude, temperature, None)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    r"""Weighs the channels of a map: :math:`M_c = C \, \mathrm{softmax}_c(\mathrm{mean}_{hw} |F| / T)`.

    Mean 1 over the channels, without gradient.

    Args:
        features: A feature map.
        temperature: T > 0 in units of the features; ``inf``: every weight is 1.

    Shapes:
        - **features** [B, C, h, w]; **output** [B, C]

    Raises:
        ValueError: If ``features`` is not a map or ``temperature`` is not positive.
    """
    _expect_map(features)
    return node_attention(features.flatten(2), temperature)


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    r"""Weighs the places of a map: :math:`M_s = hw \, \mathrm{softmax}_{hw}(\mathrm{mean}_c |F| / T)`.

    Mean 1 over the places, without gradient.

    Args:
        features: A feature map.
        temperature: T > 0 in units of the features; ``inf``: every weight is 1.

    Shapes:
        - **features** [B, C, h, w]; **output** [B, h, w]

    Raises:
        ValueError: If ``features`` is not a map or ``temperature`` is not positive.
    """
    _expect_map(features)
    return feature_attention(features.flatten(2), temperature).unflatten(1, features.shape[2:])


def check_temperature(temperature: float | None) -> None:
    """Raises ValueError unless ``temperature`` is None or positive."""
    if temperature is not None and not temperature > 0:
        raise ValueError(f"Expected a guidance temperature above 0, or None for no guidance (got {temperature})")


def guides(temperature: float | None) -> TypeGuard[float]:
    """Says whether attention at this temperature weighs anything differently."""
    return temperature is not None and temperature != float("inf")


def _softmax_of_mean_one(magnitude: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    check_temperature(temperature)
    if mask is None:
        return magnitude.size(-1) * torch.softmax(magnitude / temperature, dim=-1)
    lowest = torch.finfo(magnitude.dtype).min
    share = torch.softmax((magnitude / temperature).where(mask, lowest), dim=-1)  # finite for a graph without nodes too
    return mask.sum(dim=-1, keepdim=True) * share.where(mask, 0.0)


def _expect_map(features: Tensor) -> None:
    if features.dim() != 4:
        raise ValueError(f"Expected 'features' of shape [B, C, h, w] (got {list(features.shape)})")
