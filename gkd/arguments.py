"""Checks values against the annotations of the function that takes them, and says in words what an annotation allows."""

from __future__ import annotations

import collections.abc
import inspect
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import get_protocol_members, is_protocol

# No conversions: '2' is no integer, and True is none either. An integer is a number.
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
PLAIN = {bool, int, float, str, bytes, type(None), Path, dict, list, tuple, object}
WORDS = {
    bool: ("True or False", "booleans"),
    int: ("an integer", "integers"),
    float: ("a finite number", "numbers"),
    str: ("a string", "strings"),
    type(None): ("None", "None"),
    Path: ("a path", "paths"),
    dict: ("a dictionary", "dictionaries"),
}


class ArgumentError(ValueError):
    """A value that the annotation of its parameter does not allow.

    Args:
        parameter: Name of the parameter.
        expected: What the annotation allows, in words.
        value: What was given.
    """

    def __init__(self, parameter: str, expected: str, value: Any) -> None:
        super().__init__(f"Expected {parameter} to be {expected} (got {describe_value(value)})")
        self.parameter, self.expected, self.value = parameter, expected, value


class _Check(NamedTuple):
    hint: Any
    adapter: TypeAdapter[Any]


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises for the first argument whose value the annotation does not allow; a parameter without annotation takes anything.

    Raises:
        ArgumentError: With what the annotation allows.

    Examples:
        >>> def train(steps: int, lr: float = 0.1) -> None: ...
        >>> check_arguments(train, {"steps": 3, "lr": 1})
        >>> check_arguments(train, {"steps": 2.5})
        Traceback (most recent call last):
        gkd.arguments.ArgumentError: Expected steps to be an integer (got 2.5)
    """
    checks = _checks(function)
    for name, value in arguments.items():
        if name not in checks:
            continue
        hint, adapter = checks[name]
        try:
            adapter.validate_python(value)
        except ValidationError:
            raise ArgumentError(name, describe_hint(hint), value) from None


def describe_hint(hint: Any, plural: bool = False) -> str:
    """An annotation in words.

    Examples:
        >>> describe_hint(int | None)
        'an integer or None'
        >>> describe_hint(tuple[int, int])
        'a tuple of 2 integers'
        >>> describe_hint(Literal["sym", "rw"])
        "'sym' or 'rw'"
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _either([repr(choice) for choice in arguments])
    if origin in (Union, types.UnionType):
        return _either(list(dict.fromkeys(describe_hint(part, plural) for part in arguments if not (part is int and float in arguments))))
    if hint in WORDS:
        return WORDS[hint][plural]
    if origin is tuple:
        kinds = [kind for kind in arguments if kind is not Ellipsis]
        number = "" if Ellipsis in arguments else f"{len(kinds)} "
        same = describe_hint(kinds[0], plural=True) if len(set(kinds)) == 1 else "values"
        return f"tuples of {number}{same}" if plural else f"a tuple of {number}{same}"
    if origin is not None and origin is not collections.abc.Callable and issubclass(origin, collections.abc.Mapping):
        return "dictionaries" if plural else f"a dictionary of {describe_hint(arguments[1], plural=True)} by name"
    if origin is not None and origin is not collections.abc.Callable and issubclass(origin, collections.abc.Iterable):
        return "lists" if plural else f"a list or tuple of {describe_hint(arguments[0], plural=True)}"
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        returned = arguments[1] if arguments else Any
        if returned is Any or not inspect.isclass(returned):
            return "classes or functions" if plural else "a class or function"
        return f"{'callables that return' if plural else 'a callable that returns'} {returned.__name__}"
    if inspect.isclass(hint):
        return f"{hint.__name__} objects" if plural else f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__} object"
    return "values" if plural else "a value"


def describe_value(value: Any) -> str:
    """A value in a few words; of a class, that it was not called."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, bool | int | float | str | bytes | list | tuple | dict | set | None):
        return reprlib.repr(value)
    return f"a {type(value).__name__} object"


def _either(words: list[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


@cache
def _checks(function: Callable[..., Any]) -> dict[str, _Check]:
    """How each parameter of a function, or of a class's constructor, is checked."""
    construct = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    namespace = getattr(construct, "__globals__", None) or vars(sys.modules[function.__module__])
    checks = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is parameter.empty or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        try:
            holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
            hint = typing.get_type_hints(holder, namespace)[name]
            checks[name] = _Check(hint, TypeAdapter(_instances(hint), config=STRICT))
        except Exception:
            continue
    return checks


def _instances(hint: Any) -> Any:
    """The annotation with every class in it replaced by a check for its objects, however the class is made."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or hint in PLAIN:
        return hint
    if origin is collections.abc.Callable:
        return Annotated[Any, AfterValidator(_callable_to(arguments[1]))]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_instances, arguments))]  # noqa: UP007  of a tuple
    if origin is not None and arguments:
        return origin[tuple(part if part is Ellipsis else _instances(part) for part in arguments)]
    return Annotated[Any, AfterValidator(_member_of(hint))] if inspect.isclass(hint) and hint is not Any else hint


def _callable_to(returned: Any) -> Callable[[Any], Any]:
    """A check that a value can be called, and does not declare to return something else: edges are no nodes."""

    def check(value: Any) -> Any:
        if not callable(value) or not _may_be(_returned_by(value), returned):
            raise ValueError
        return value

    return check


def _returned_by(value: Any) -> Any:
    """What a class or function, or an object that is called, declares to return; Any where it says nothing."""
    if inspect.isclass(value):
        return value
    function = value if inspect.isroutine(value) else getattr(value, "forward", type(value).__call__)
    try:
        return typing.get_type_hints(inspect.unwrap(function)).get("return", Any)
    except Exception:  # an annotation of somebody else's that cannot be read
        return Any


def _may_be(declared: Any, returned: Any) -> bool:
    """Whether what is declared may be what is asked for; what is no class is not judged."""
    pair = [[hint] if get_origin(hint) not in (Union, types.UnionType) else list(get_args(hint)) for hint in (declared, returned)]
    kinds = [[float if hint is int else get_origin(hint) or hint for hint in hints] for hints in pair]
    if not all(inspect.isclass(kind) and kind is not Any and not is_protocol(kind) for side in kinds for kind in side):
        return True
    return any(issubclass(one, other) or issubclass(other, one) for one in kinds[0] for other in kinds[1])


def _member_of(hint: type) -> Callable[[Any], Any]:
    """A check that a value is an object of a class, or has what a protocol asks for."""

    def check(value: Any) -> Any:
        if is_protocol(hint):
            fits = not inspect.isclass(inspect.unwrap(value)) and all(hasattr(value, name) for name in get_protocol_members(hint))
            if fits and "__call__" in get_protocol_members(hint):
                fits = _may_be(_returned_by(value), _returned_by(hint.__call__))
        else:
            fits = isinstance(value, hint)
        if not fits:
            raise ValueError
        return value

    return check
