"""Ranges of settings: what is refused, and in which words."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Refuses what is no finite number within a range.

    Args:
        name: The setting, for the message.
        value: What was given.
        above: The value has to be larger.
        least: Smallest allowed value.
        most: Largest allowed value.
        below: The value has to be smaller.
        optional: Whether None is allowed.

    Raises:
        ValueError: If the value is refused.

    Examples:
        >>> check_number("clip_norm", 5.0, above=0)
        >>> check_number("clip_norm", -1.0, above=0)
        Traceback (most recent call last):
        ValueError: Expected clip_norm to be a finite number > 0 (got -1.0)
    """
    _check("a finite number", Real, name, value, {">": above, ">=": least, "<=": most, "<": below}, optional)


def check_integer(name: str, value: Any, *, least: int | None = None, optional: bool = False) -> None:
    """Refuses what is no integer, or a smaller one than `least`.

    Args:
        name: The setting, for the message.
        value: What was given.
        least: Smallest allowed value.
        optional: Whether None is allowed.

    Raises:
        ValueError: If the value is refused.

    Examples:
        >>> check_integer("steps", 2.5, least=1)
        Traceback (most recent call last):
        ValueError: Expected steps to be an integer >= 1 (got 2.5)
    """
    _check("an integer", Integral, name, value, {">=": least}, optional)


def check_flag(name: str, value: Any) -> None:
    """Refuses what is neither True nor False, such as the string ``'False'``.

    Raises:
        ValueError: If the value is refused.
    """
    if not isinstance(value, bool):
        raise ValueError(f"Expected {name} to be True or False (got {value!r})")


def _check(noun: str, kind: type, name: str, value: Any, bounds: Mapping[str, float | None], optional: bool) -> None:
    if value is None and optional:
        return
    limits = {sign: bound for sign, bound in bounds.items() if bound is not None}
    compare = {">": operator.gt, ">=": operator.ge, "<=": operator.le, "<": operator.lt}
    is_number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    if not is_number or not all(compare[sign](value, bound) for sign, bound in limits.items()):
        listed = " and".join(f" {sign} {bound:g}" for sign, bound in limits.items())
        raise ValueError(f"Expected {name} to be {noun}{listed}{' or None' if optional else ''} (got {value!r})")
