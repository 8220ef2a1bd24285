from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.precision import as_float, full_precision

P = ParamSpec("P")
R = TypeVar("R")


def _lift(value: Any) -> Any:
    return as_float(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a loss in float32 (float64 stays float64), whatever autocast says around it.

    Args:
        function: A loss whose positional or keyword arguments hold at least one tensor.

    Examples:
        >>> import torch
        >>> @in_full_precision
        ... def dot(a, b):
        ...     return a @ b
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     dot(torch.ones(2, 2), torch.ones(2, 2)).dtype
        torch.float32
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with full_precision(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))):
            return function(*map(_lift, args), **{name: _lift(value) for name, value in kwargs.items()})

    return wrapper


class _Gram(torch.autograd.Function):
    """One product backward, where autograd, which does not see that both factors are the same, takes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.mT) @ x


def gram(x: Tensor) -> Tensor:
    """Inner products of all pairs of rows.

    Shapes:
        - **x** [..., n, d]; **output** [..., n, n]
    """
    return _Gram.apply(x)


class _SumOfSquares(torch.autograd.Function):
    """No map of squares is written where memory holds the channels of a pixel side by side, and none of the gradient's factors ever."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.is_contiguous(memory_format=torch.channels_last):
            return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).square()
        return as_float(x).square().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * grad).unsqueeze(1).to(x.dtype)


def sum_of_squares(features: Tensor) -> Tensor:
    """Sum over the channels, in float32 at least, of a map that may be in half precision.

    Shapes:
        - **features** [B, C, h, w]; **output** [B, h, w]
    """
    return _SumOfSquares.apply(features)


def unit_scale(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Divides by the largest magnitude, for what depends on no scale: squares of tiny and of huge values are no floating point numbers.

    Args:
        x: Values in float32 or float64. Below the smallest normal number times 1e6 they are left as they are.
        dim: Dimensions that share a scale; None for all.

    Shapes:
        - **x** any; **output** likewise
    """
    if x.numel() == 0:
        return x
    top = x.detach().abs().amax(dim=tuple(range(x.dim())) if dim is None else dim, keepdim=True)
    return x / top.where(top > 1e6 * torch.finfo(x.dtype).tiny, 1.0)


def gather_images(*features: Tensor) -> list[Tensor]:
    """Joins the images of all processes, rank after rank, so that relations between images are those of the whole batch.

    Gradients flow back to every process. Each one then has the loss of the whole batch, and the mean of their gradients, which
    DistributedDataParallel takes, is its gradient. A single process keeps what it has.

    Args:
        *features: Values of this process's images, as many in every process.

    Shapes:
        - **features** [B, ...]; **output** [world size * B, ...]
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return list(features)
    from torch.distributed.nn.functional import all_gather  # its import takes a while

    return [torch.cat(all_gather(x.contiguous())) for x in features]


def as_input(features: Tensor, layer: nn.Module) -> Tensor:
    """Gives features the type of a layer's parameters, as autocast does where it is on."""
    parameter = next(layer.parameters(), None)
    if parameter is None or torch.is_autocast_enabled(features.device.type):
        return features
    return features.to(parameter.dtype)


def sigmoid_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence, logit by logit, of the chances that two logits stand for.

    Shapes:
        - **student**, **teacher** and **output** of one shape
    """
    chance = teacher.sigmoid()
    return chance * (F.logsigmoid(teacher) - F.logsigmoid(student)) + (1 - chance) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def vectors(features: Tensor) -> Tensor:
    """Every image as one vector, in the order in which memory holds it: no inner product of two images depends on it.

    Shapes:
        - **features** [B, ...]; **output** [B, D]
    """
    if features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last):
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1)


def pool(features: Tensor) -> Tensor:
    """The penultimate vector of every image: the spatial mean of a map; a vector stays as it is.

    Shapes:
        - **features** [B, C, h, w] or [B, C]; **output** [B, C]

    Raises:
        ValueError: If features has another rank.
    """
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 2:
        return features
    raise ValueError(f"Expected features [B, C, h, w] or [B, C] (got {tuple(features.shape)})")


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pools the larger map to the height and width of the smaller one.

    Shapes:
        - **student** [B, C, h, w], **teacher** [B, D, h', w']; **output** [B, C, m, n] and [B, D, m, n] with m = min(h, h'), n = min(w, w')
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    student, teacher = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    return student, teacher


def check_batch(student: Tensor, teacher: Tensor, at_least: int = 1) -> None:
    """Asks for equally many, and enough, images in both."""
    if student.shape[:1] != teacher.shape[:1]:
        raise ValueError(f"Expected one batch size for student and teacher (got {tuple(student.shape)} and {tuple(teacher.shape)})")
    if student.dim() == 0 or student.shape[0] < at_least:
        raise ValueError(f"Expected a batch of at least {at_least} (got {tuple(student.shape)})")


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Asks for two feature maps [B, C, h, w] of one batch size, with at least one image, channel and pixel."""
    if student.dim() != 4 or teacher.dim() != 4 or student.numel() == 0 or teacher.numel() == 0:
        raise ValueError(f"Expected feature maps [B, C, h, w] that are not empty (got {tuple(student.shape)} and {tuple(teacher.shape)})")
    check_batch(student, teacher)


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Asks for one shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"Expected one shape for student and teacher (got {tuple(student.shape)} and {tuple(teacher.shape)})")


def nan_if_diverged(error: ValueError, *features: Tensor) -> Tensor:
    """Returns NaN, on which a training stops and names the loss, where features are not finite.

    Args:
        error: What was raised because of them.
        *features: The student's features.

    Raises:
        ValueError: The error, if the features are finite.
    """
    if all(bool(x.isfinite().all()) for x in features):
        raise error
    return torch.stack([x.float().sum() for x in features]).sum() * torch.nan
