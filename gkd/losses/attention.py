from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from gkd.graphs.precision import as_float
from gkd.losses.inputs import unit_scale


def node_attention(x: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    r"""Weighs the nodes of every graph by how strongly they respond.

    .. math:: w_i = n \, \mathrm{softmax}_i \Big( \frac{r_i}{T \, \bar r} \Big), \qquad r_i = \frac{1}{d} \sum_k |x_{ik}|

    with the mean response :math:`\bar r` of the graph. The weights have mean 1 over the nodes of a graph, so that a weighted mean keeps its
    scale. Without gradient. Equivariant to permutations of the nodes, invariant to permutations and signs of the features and to the
    scale of a whole graph, so that one temperature suits every stage and network.

    Args:
        x: Node features; padded nodes are ignored, whatever they hold.
        temperature: T > 0, in units of the mean response. Small: the strongest node takes all; ``inf``: every weight is 1.
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

    .. math:: v_k = d \, \mathrm{softmax}_k \Big( \frac{r_k}{T \, \bar r} \Big), \qquad r_k = \frac{1}{n} \sum_i |x_{ik}|

    The counterpart of :func:`node_attention`: mean 1 over the features, without gradient, invariant to the scale of a whole graph.

    Args:
        x: Node features; padded nodes are ignored, whatever they hold.
        temperature: T > 0, in units of the mean response; ``inf``: every weight is 1.
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
    r"""Weighs the channels of a map: :func:`node_attention` of channel nodes.

    .. math:: M_c = C \, \mathrm{softmax}_c \Big( \frac{\mathrm{mean}_{hw} |F|}{T \, \mathrm{mean}_{chw} |F|} \Big)

    Args:
        features: A feature map.
        temperature: T > 0, in units of the mean response; ``inf``: every weight is 1.

    Shapes:
        - **features** [B, C, h, w]; **output** [B, C]

    Raises:
        ValueError: If ``features`` is not a map or ``temperature`` is not positive.
    """
    _expect_map(features)
    return node_attention(features.flatten(2), temperature)


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    r"""Weighs the places of a map: :func:`feature_attention` of channel nodes.

    .. math:: M_s = hw \, \mathrm{softmax}_{hw} \Big( \frac{\mathrm{mean}_c |F|}{T \, \mathrm{mean}_{chw} |F|} \Big)

    Args:
        features: A feature map.
        temperature: T > 0, in units of the mean response; ``inf``: every weight is 1.

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


def _softmax_of_mean_one(response: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    check_temperature(temperature)
    mask = torch.ones_like(response, dtype=torch.bool) if mask is None else mask
    response = response.where(mask, 0.0)
    count = mask.sum(dim=-1, keepdim=True)
    share = unit_scale(response, (-1,))
    mean = share.sum(dim=-1, keepdim=True) / count.clamp(min=1)
    logits = share / (mean.where(mean > 0, 1.0) * temperature)
    lowest = torch.finfo(logits.dtype).min  # finite for a graph without nodes too
    return count * logits.where(mask, lowest).softmax(dim=-1).where(mask, 0.0)


def _expect_map(features: Tensor) -> None:
    if features.dim() != 4:
        raise ValueError(f"Expected 'features' of shape [B, C, h, w] (got {list(features.shape)})")
