from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def as_float(value: Tensor) -> Tensor:
    """Returns float64 as it is and everything else, half precision above all, as float32: what similarities and spectra are computed in."""
    return value if value.dtype == torch.float64 else value.float()


def full_precision(value: Tensor) -> torch.autocast:
    """Context in which products stay in the precision of their operands: half of it loses the small differences that graphs are made of."""
    return torch.autocast(value.device.type, enabled=False)


def backward_in_full_precision(backward: Callable[..., Gradients]) -> Callable[[Any, Tensor, Tensor], Gradients]:
    """Switches autocast off in the backward pass of eigenpairs too, which runs under it when ``backward()`` is called there."""

    @wraps(backward)
    def run(ctx: Any, grad_eigval: Tensor, grad_eigvec: Tensor) -> Gradients:
        with full_precision(grad_eigval):
            return backward(ctx, grad_eigval, grad_eigvec)

    return run
