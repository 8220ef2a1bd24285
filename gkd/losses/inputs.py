from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.nn.functional as F
from torch import Tensor

from gkd.losses.precision import at_least_float32, full_precision

P = ParamSpec("P")
R = TypeVar("R")


def _lift(value: Any) -> Any:
    return at_least_float32(value) if isinstance(value, Tensor) else value


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


def gram(x: Tensor) -> Tensor:
    """Inner products of all pairs of rows.

    Shapes:
        - **x** [..., n, d]; **output** [..., n, n]
    """
    return x @ x.mT


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
