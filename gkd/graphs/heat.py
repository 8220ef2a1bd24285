from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gkd.graphs.dense import check_adjacency
from gkd.graphs.laplacian import check_finite
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.values import readable

Times = float | Sequence[float] | Tensor

# Highest matrix power that is formed, and degree of the Taylor polynomial, so that its remainder at norm 1 is below rounding.
_POLYNOMIAL = {torch.float32: (3, 9), torch.float64: (5, 20)}


def heat_kernel(L: Tensor, times: Times, mask: Tensor | None = None, bound: float | None = 2.0) -> Tensor:
    r"""Computes how heat spreads over every graph, by matrix products alone.

    .. math:: H_t = e^{-tL}

    Entry (i, j) is the heat that node j has after the time t when node i starts with one unit. No eigenvector is involved: H is a smooth
    function of L whatever eigenvalues repeat, and its gradient is bounded by t. A Taylor polynomial of a scaled-down time is squared
    until the time is reached; times that are halves of each other (1, 2, 4, ...) share the work. The error against the exact
    exponential grows with the time, as about :math:`t` times the rounding unit for a normalised Laplacian.

    Args:
        L: Laplacians.
        times: Diffusion times, not negative. Python numbers compile and never wait for a GPU; a tensor on a GPU is waited for.
        mask: True where a node exists. Rows and columns of other nodes are zero, whatever L holds there.
        bound: A number that no eigenvalue exceeds: 2 for a normalised Laplacian. None takes the largest absolute row sum
            of L, for which a GPU is waited for.

    Shapes:
        - **L** [B, N, N], **mask** [B, N]; **output** [B, T, N, N]

    Raises:
        ValueError: If the shapes disagree, a time is negative or not finite, or (checked on the CPU only) L is not finite or exceeds
            the bound.

    References:
        Kondor, Lafferty: Diffusion Kernels on Graphs and Other Discrete Input Spaces, ICML 2002.
        Moler, Van Loan: Nineteen Dubious Ways to Compute the Exponential of a Matrix, SIAM Review 2003 (scaling and squaring).

    Examples:
        >>> L = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])  # one edge: eigenvalues 0 and 2
        >>> heat_kernel(L, times=[0.0, 100.0])
        tensor([[[[1.0000, 0.0000],
                  [0.0000, 1.0000]],
        <BLANKLINE>
                 [[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    mask = check_adjacency(L, mask)
    exists = mask[:, :, None] & mask[:, None, :]
    L = as_float(L).masked_fill(~exists, 0.0)
    check_finite(L, "Laplacian")
    values = as_times(times)
    if L.numel() == 0:
        return L.new_zeros(L.size(0), len(values), *L.shape[1:])
    if bound is None:
        bound = float(L.detach().abs().sum(-1).max())
    elif readable(L):
        largest = float(L.detach().diagonal(dim1=1, dim2=2).max())
        if largest > bound * (1 + 1e-4):
            raise ValueError(f"Expected 'bound' to exceed every eigenvalue (got {bound}, and a diagonal entry of {largest:.4g})")
    with full_precision(L):
        return _exponentials(L, values, bound).masked_fill(~exists[:, None], 0.0)


def heat_diagonal(L: Tensor, times: Times, mask: Tensor | None = None, bound: float | None = 2.0) -> Tensor:
    r"""Gives the diagonal of the heat kernel at several times, for one matrix product less than the kernel itself.

    .. math:: (e^{-tL})_{ii} = \sum_j (e^{-tL/2})_{ij}^2

    Args:
        L: Symmetric Laplacians.
        times: Diffusion times, not negative.
        mask: True where a node exists.
        bound: A number that no eigenvalue exceeds, see :func:`~gkd.graphs.heat_kernel`.

    Shapes:
        - **L** [B, N, N], **mask** [B, N]; **output** [B, N, T]

    Examples:
        >>> heat_diagonal(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]), [0.0, 64.0])
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])
    """
    half = heat_kernel(L, [time / 2 for time in as_times(times)], mask, bound)
    return half.square().sum(dim=-1).mT


def heat_trace(graph: Tensor, times: Times, mask: Tensor | None = None, bound: float | None = 2.0) -> Tensor:
    r"""Computes the mean heat that stays where it started: a summary of the spectrum that compares graphs of different size.

    .. math:: h(t) = \frac{1}{n} \operatorname{tr} e^{-tL} = \frac{1}{n} \sum_k e^{-t \lambda_k}

    It does not depend on the order of the nodes.

    Args:
        graph: Laplacians, from which only matrix products lead to the trace, or all eigenvalues, ascending, the trivial ones too.
        times: Diffusion times, not negative.
        mask: True where a node exists. A graph of n nodes has n eigenvalues: what follows these is ignored.
        bound: A number that no eigenvalue exceeds, as in :func:`heat_kernel`; of no use with eigenvalues.

    Shapes:
        - **graph** [B, N, N] or [B, N], **mask** [B, N]; **output** [B, T] in [0, 1]; 0 for a graph without nodes

    Raises:
        ValueError: As :func:`heat_kernel`.

    Examples:
        >>> heat_trace(torch.tensor([[0.0, 2.0]]), times=[0.0, 100.0])
        tensor([[1.0000, 0.5000]])
    """
    values = as_times(times)
    if graph.dim() == 2:
        eigval = as_float(graph)
        if mask is None:
            mask = torch.ones_like(eigval, dtype=torch.bool)
        if mask.shape != eigval.shape:
            raise ValueError(f"Expected 'mask' of shape {list(eigval.shape)} (got {list(mask.shape)})")
        count = mask.sum(1)
        beyond = torch.arange(eigval.size(1), device=eigval.device) >= count[:, None]
        total = torch.stack([(eigval * -time).exp().masked_fill(beyond, 0.0).sum(1) for time in values], 1)
    else:
        mask = check_adjacency(graph, mask)
        count = mask.sum(1)
        half = heat_kernel(graph, [time / 2 for time in values], mask, bound)
        total = (half * half.mT).sum((-1, -2))  # tr(H_t) = tr(H_{t/2} H_{t/2}): one product less
    return total / count.clamp(min=1)[:, None]


def heat_kernel_signature(eigval: Tensor, eigvec: Tensor, times: Times) -> Tensor:
    r"""Describes every node by the heat that is still on it at several times.

    .. math:: h_i(t) = \sum_k e^{-t \lambda_k} u_k(i)^2

    Squares forget the sign of an eigenvector, and summed over a complete eigenspace its basis too. Over all the pairs, trivial ones
    included, this is the diagonal of :func:`heat_kernel`.

    Args:
        eigval: Laplacian eigenvalues, ascending, not negative.
        eigvec: Orthonormal eigenvectors as columns; rows of padded nodes are zero.
        times: Diffusion times: small ones see the neighbourhood, large ones the whole graph. A tensor may need a gradient.

    Shapes:
        - **eigval** [B, K], **eigvec** [B, N, K], **times** [T]; **output** [B, N, T] in [0, 1]

    Gradient:
        Through :func:`~gkd.graphs.spectral.eigenmaps` it is exact while eigenvalues are distinct. Inside a repeated one it leaves out
        what splits the eigenvalue, which eigenpairs cannot tell; the diagonal of :func:`heat_kernel` has the whole of it.

    Raises:
        ValueError: If eigval and eigvec disagree on K, or times are not one row.

    References:
        Sun, Ovsjanikov, Guibas: A Concise and Provably Informative Multi-Scale Signature Based on Heat Diffusion, SGP 2009.

    Examples:
        >>> eigvec = torch.tensor([[[0.5, 0.5], [0.5, -0.5]]]).mul(2**0.5)  # of one edge
        >>> heat_kernel_signature(torch.tensor([[0.0, 2.0]]), eigvec, [0.0, 100.0])
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])
    """
    if eigvec.dim() != 3 or eigval.shape != (eigvec.size(0), eigvec.size(2)):
        raise ValueError(f"Expected 'eigval' [B, K] and 'eigvec' [B, N, K] (got {list(eigval.shape)} and {list(eigvec.shape)})")
    eigval, eigvec = as_float(eigval), as_float(eigvec)
    times = torch.as_tensor(times, dtype=eigval.dtype).to(eigval.device, non_blocking=True)
    if times.dim() == 0:
        times = times[None]
    if times.dim() != 1:
        raise ValueError(f"Expected 'times' of shape [num_times] (got {list(times.shape)})")
    with full_precision(eigval):
        return eigvec.square() @ (-eigval[:, :, None] * times).exp()


def as_times(times: Times) -> list[float]:
    """Turns diffusion times into Python numbers and checks them."""
    if isinstance(times, Tensor):
        times = times.detach().flatten().tolist()
    values = [float(times)] if isinstance(times, (int, float)) else [float(time) for time in times]
    if not values or not all(0 <= time < math.inf for time in values):
        raise ValueError(f"Expected one or more finite 'times', none negative (got {values})")
    return values


def _exponentials(L: Tensor, times: list[float], bound: float) -> Tensor:
    """Computes exp(-t L) for every t, as [B, T, N, N]."""
    order, degree = _POLYNOMIAL[L.dtype]
    # Around the middle of the spectrum: half the norm, and for a normalised Laplacian a matrix without negative entries, so that the
    # terms of the polynomial do not cancel.
    eye = torch.eye(L.size(-1), dtype=L.dtype, device=L.device)
    centred = eye * (bound / 2) - L
    powers = [eye, centred]
    for _ in range(order - 1):
        powers.append(powers[-1] @ centred)
    kernels: dict[float, Tensor] = {}

    def kernel(time: float) -> Tensor:
        if time not in kernels:
            if time * bound / 2 > 1:
                half = kernel(time / 2)
                kernels[time] = half @ half
            else:
                kernels[time] = polynomial(time)
        return kernels[time]

    def polynomial(time: float) -> Tensor:
        # Horner's scheme in powers[order], whose coefficients are polynomials of degree order - 1 (Paterson and Stockmeyer).
        factor = [math.exp(-time * bound / 2) * time**k / math.factorial(k) for k in range(degree + 1)]
        result = factor[degree] * powers[order]
        for start in range(degree - order, -1, -order):
            block = sum((factor[start + k] * powers[k] for k in range(1, order)), start=factor[start] * eye)
            result = block + (result if start == degree - order else powers[order] @ result)
        return result

    return torch.stack([kernel(time) for time in times], 1)
