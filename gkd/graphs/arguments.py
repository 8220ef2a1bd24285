"""Checks of what constructors are given, so that a wrong value is an error there and not a strange graph later."""

from __future__ import annotations

import math
from collections.abc import Sequence


def positive_integer(value: int, name: str) -> int:
    """Returns a whole number above 0, or raises a ValueError that names the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected {name} to be a positive integer (got {value!r})")
    return value


def positive_number(value: float, name: str) -> float:
    """Returns a finite number above 0, or raises a ValueError that names the argument."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"Expected {name} to be a positive number (got {value!r})")
    return value


def flag(value: bool, name: str) -> bool:
    """Returns True or False, or raises a ValueError that names the argument: any string would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"Expected {name} to be True or False (got {value!r})")
    return value


def one_of(value: str | None, choices: Sequence[str | None], name: str) -> None:
    """Raises a ValueError that names the argument and the choices if the value is none of them."""
    if value not in choices:
        *some, last = [repr(choice) for choice in choices]
        raise ValueError(f"Expected {name} to be {', '.join(some)} or {last} (got {value!r})")
