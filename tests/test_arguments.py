from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest
from torch import nn

from gkd.arguments import ArgumentError, check_arguments

if TYPE_CHECKING:
    from nowhere import Absent


class Rule(Protocol):
    def __call__(self, step: int) -> float: ...


@dataclass
class Part:
    module: nn.Module


def counted(step: int) -> int:
    return step


def takes(
    count: int = 0,
    amount: float = 0,
    flag: bool = False,
    limit: int | None = None,
    sizes: Sequence[float] = (),
    counts: Sequence[int] = (),
    form: Literal["sym", "rw"] = "sym",
    terms: Mapping[str, nn.Module] | None = None,
    weights: Mapping[str, float | Callable[[float], float]] | None = None,
    factory: Callable[..., nn.Module] | None = None,
    grid: int | tuple[int, int] = 1,
    path: str | Path = "",
    names: Sequence[str] = (),
    paths: str | Iterable[str] = "",
    share: float | int | None = None,
    part: Part | None = None,
    whole: Part = None,
    settings: Mapping[str, Any] | None = None,
    anything: Any = None,
    rule: Rule | None = None,
    absent: Absent | None = None,
    free=None,
    **options: int,
): ...


VALID = {
    "count": [0, -1, 10**30],
    "amount": [1, 2.5],
    "flag": [True],
    "limit": [None, 3],
    "sizes": [(1, 2.5), [1.0], ()],
    "counts": [(1, 2)],
    "form": ["rw"],
    "terms": [None, {}, {"a": nn.ReLU()}],
    "weights": [{"a": 1, "b": abs, "c": counted}],
    "factory": [nn.ReLU, nn.Module, lambda: None, None],
    "grid": [2, (2, 3)],
    "path": ["a", Path("a")],
    "names": [["a"], ("a", "b")],
    "paths": ["a", ["a"]],
    "share": [0.5, 3, None],
    "part": [Part(nn.ReLU())],
    "whole": [Part(nn.ReLU())],
    "settings": [{"a": 1}, None],
    "anything": [object(), nn.ReLU, 3],
    "rule": [abs, None, counted],
    "absent": [3],
    "free": [3],
    "options": [3],
}
INVALID = [
    ("count", 2.0, "an integer"),
    ("count", True, "an integer"),
    ("count", "1", "an integer"),
    ("count", None, "an integer"),
    ("amount", "1", "a finite number"),
    ("amount", True, "a finite number"),
    ("amount", float("nan"), "a finite number"),
    ("amount", float("inf"), "a finite number"),
    ("flag", "False", "True or False"),
    ("flag", 1, "True or False"),
    ("limit", 2.5, "an integer or None"),
    ("sizes", 3, "a list or tuple of numbers"),
    ("sizes", "12", "a list or tuple of numbers"),
    ("sizes", [1, "2"], "a list or tuple of numbers"),
    ("counts", (1, 2.5), "a list or tuple of integers"),
    ("form", "both", "'sym' or 'rw'"),
    ("form", None, "'sym' or 'rw'"),
    ("terms", {"a": 1}, "a dictionary of Module objects by name or None"),
    ("terms", {"a": nn.ReLU}, "a dictionary of Module objects by name or None"),
    ("weights", {"a": "1"}, "a dictionary"),
    ("weights", {"a": nn.ReLU()}, "a dictionary"),
    ("factory", 3, "a callable that returns Module or None"),
    ("factory", counted, "a callable that returns Module or None"),
    ("factory", nn.ReLU(), "a callable that returns Module or None"),
    ("grid", (2, 3, 4), "an integer or a tuple of 2 integers"),
    ("grid", 2.5, "an integer or a tuple of 2 integers"),
    ("path", 3, "a string or a path"),
    ("names", "abc", "a list or tuple of strings"),
    ("share", "all", "a finite number or None"),
    ("part", nn.ReLU(), "a Part object or None"),
    ("whole", None, "a Part object"),
    ("whole", "x", "a Part object"),
    ("settings", 3, "a dictionary"),
    ("settings", {3: 1}, "a dictionary"),
    ("rule", 3, "a Rule object or None"),
    ("rule", nn.ReLU, "a Rule object or None"),
    ("rule", nn.ReLU(), "a Rule object or None"),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_what_is_allowed(name, value):
    check_arguments(takes, {name: value})


@pytest.mark.parametrize(("name", "value", "expected"), INVALID)
def test_what_is_not(name, value, expected):
    with pytest.raises(ArgumentError, match=rf"^Expected {name} to be .*\(got ") as caught:
        check_arguments(takes, {name: value})
    assert caught.value.expected.startswith(expected)
    assert len(str(caught.value)) < 200


def test_every_parameter_has_a_valid_value_here():
    assert VALID.keys() == takes.__annotations__.keys() | {"free"}


def test_constructors_are_checked_too():
    check_arguments(Part, {"module": nn.ReLU()})
    with pytest.raises(ArgumentError, match=r"Expected module to be a Module object \(got the class ReLU\)"):
        check_arguments(Part, {"module": nn.ReLU})
