from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor

from gkd.graphs.arguments import one_of, positive_integer
from gkd.graphs.precision import full_precision

Gauge = Literal["eigenspace", "block"]
Gradients = tuple[Tensor | None, ...]


def check_options(num_eig: int, gauge: str, damping: float | None) -> None:
    """Raises a ValueError for options that no method takes."""
    positive_integer(num_eig, "num_eig")
    one_of(gauge, ("eigenspace", "block"), "gauge")
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"Expected damping to be a number that is not negative (got {damping})")


def rounding(scale: Tensor, num_nodes: int) -> Tensor:
    """Bounds the error of computed eigenvalues whose largest is ``scale``: what differs by less is one eigenspace, or the kernel."""
    info = torch.finfo(scale.dtype)
    return 8 * info.eps * num_nodes**0.25 * scale + info.tiny  # some five times what LAPACK was seen to miss, 16 to 1024 nodes


def keep(eigval: Tensor, count: Tensor, skip: Tensor | int, tolerance: Tensor, num_eig: int, drop_trivial: bool) -> tuple[Tensor, Tensor]:
    """Says at which positions of the ascending eigenvalues the kept pairs lie, and below which position everything is kernel.

    ``count`` of the eigenvalues are real, and ``skip`` zero eigenvalues more lie before the first one.
    """
    position = torch.arange(eigval.size(1), device=eigval.device)
    kernel = ((eigval <= tolerance[:, None]) & (position < count[:, None])).sum(1)
    start = kernel if drop_trivial else torch.zeros_like(kernel)
    first = start if drop_trivial else start - skip
    return first[:, None] + torch.arange(num_eig, device=eigval.device), start


def inverse_gaps(eigval: Tensor, at: Tensor, block: Tensor | None, tolerance: Tensor, damping: Tensor) -> Tensor:
    r"""Computes the damped :math:`1 / (\lambda_i - \lambda_j)` of perturbation theory, 0 where it is undetermined or cancels.

    Args:
        eigval: All eigenvalues :math:`\lambda_j`, ``[B, K]``.
        at: The kept ones :math:`\lambda_i`, ``[B, Q]``.
        block: True for those j that are kept themselves and turn into each other freely, ``[B, K]``.
        tolerance: Eigenvalues that are no farther apart are one, ``[B]``.
        damping: The :math:`\epsilon` of :math:`\delta / (\delta^2 + \epsilon^2)`, ``[B]``.

    Shapes:
        - **output** [B, K, Q]
    """
    delta = at[:, None, :] - eigval[:, :, None]
    apart = delta.abs() > tolerance[:, None, None]
    if block is not None:
        apart = apart & ~block[:, :, None]
    delta = torch.where(apart, delta, 1.0)
    return torch.where(apart, delta / (delta.square() + damping.square()[:, None, None]), 0.0)


def damping_of(damping: float | None, scale: Tensor) -> Tensor:
    """Turns the relative damping into an absolute one; the default is what rounding makes uncertain anyway."""
    return scale * ((1e-4 if scale.dtype == torch.float32 else 1e-8) if damping is None else damping)


def symmetric_product(X: Tensor, U: Tensor) -> Tensor:
    """Computes (X U^T + U X^T) / 2 in one product, symmetric bit for bit."""
    return torch.cat([X, U], -1) @ torch.cat([U, X], -1).mT / 2


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Is ``torch.linalg.eigh``, in float64 where float32 did not converge, and with a failure that says what is wrong."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        bad = int((~matrix.isfinite()).sum())
        if bad > 0:
            raise ValueError(f"Expected a finite Laplacian (got {bad} NaN or infinite of {matrix.numel()} values)") from error
        if matrix.dtype == torch.float64:
            raise
    eigval, eigvec = torch.linalg.eigh(matrix.double())
    return eigval.to(matrix.dtype), eigvec.to(matrix.dtype)


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Makes a backward pass of eigenpairs that has no derivative itself, and says so to whoever asks for one.

    ``once_differentiable`` of PyTorch is silent where the gradient that comes in is a constant, as that of a sum: the second derivative
    would lack a part. The pass runs in full precision, also where ``backward()`` is called under autocast.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Gradients:
        with torch.no_grad(), full_precision(gradients[0]):
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        return tuple(None if value is None else _FirstOrder.apply(value.requires_grad_()) for value in results)

    return run


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "Expected first derivatives of eigenpairs only (got a second one, which is not computed): "
            "take heat_kernel, which has all of them"
        )
