"""Configuration by gin: the only file that imports it. gin acts while objects are built, and never after."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By their full names: the folder gin of this repository looks like a package to type checkers.
import gin.config as gin_config
import gin.config_parser as config_parser

from gkd.arguments import ArgumentError, check_arguments, describe_value
from gkd.errors import UserError, did_you_mean
from gkd.sources import find_source, read_source

PARTS = ("graphs", "losses", "models", "distill", "data", "engine", "tasks", "detection", "detection.d2", "sweep")
MODULES = tuple(f"gkd.{part}" for part in PARTS)
MACRO = "gin.macro"

# What a wrong value may raise in a constructor. Anything else is a defect of the code and keeps its traceback.
BUILD_ERRORS = (ValueError, OSError, ImportError)

Key = tuple[str, str, str]  # scope, complete selector, parameter

_registered: dict[str, Any] = {}


@dataclass(frozen=True)
class Binding:
    """One statement ``scope/Name.parameter = value``, in the order of reading."""

    key: Key
    value: Any
    place: str
    order: int

    @property
    def name(self) -> str:
        """As a person writes it."""
        scope, selector, parameter = self.key
        if selector == MACRO:
            return scope
        return _name(scope, selector, parameter)

    @property
    def references(self) -> list[tuple[str, str]]:
        """Scope and selector of everything that the value refers to."""
        return [reference.config_key for reference in gin_config.iterate_references({"": {"": self.value}})]

    @property
    def called(self) -> list[tuple[str, str]]:
        """Of these, what is built or looked up for the value, and not handed over as it is."""
        references = gin_config.iterate_references({"": {"": self.value}})
        return [reference.config_key for reference in references if reference.evaluate]


class Config:
    """A configuration that was read, and what is built from it.

    gin keeps its state in one place for the whole process, so a new configuration ends the one before.

    Args:
        files: Files to read, one after the other; later bindings win. Looked for in the current folder and among the recipes of gkd.
        overrides: Further bindings, such as ``'KNNEdges.k = 16'``.
        modules: Packages whose ``__all__`` can be bound.

    Raises:
        UserError: If something is misspelled or absent.
    """

    def __init__(self, files: Iterable[str | Path], overrides: Sequence[str] = (), modules: Sequence[str] = MODULES) -> None:
        for module in modules:
            register(module)
        gin_config.clear_config()
        self._history: list[Binding] = []
        self._open: list[Path] = []
        self._imports: list[str] = []
        for file in files:
            self._read_file(str(file), "the command line")
        for override in overrides:
            self._read(override, f"--set {override!r}")
        self._check_macros()
        self._check_circles()
        try:
            gin_config.finalize()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"Expected a complete configuration (got: {_first_line(error)})") from error

    def root(self, base: type) -> str:
        """Name of the one class derived from `base` that the configuration binds something of, such as the task to train.

        Raises:
            UserError: If there is none, or more than one.
        """
        derived = {name for name, listed in _registered.items() if inspect.isclass(listed) and issubclass(listed, base)}
        bound = sorted({selector.rsplit(".", 1)[-1] for _, selector, _ in self._live} & derived)
        if len(bound) != 1:
            raise UserError(
                f"Expected bindings of one of {', '.join(sorted(derived))} (got {' and '.join(bound) or 'none'}). "
                "Include a file of gin/base, such as include 'gin/base/classification.gin'."
            )
        return bound[0]

    def build(self, root: str) -> Any:
        """Builds the object at the root of the configuration and all that it refers to.

        Raises:
            UserError: If a constructor refuses its arguments, or if a binding reached nothing.
        """
        try:
            built = gin_config.get_configurable(root)()
        except _WrongValueError as error:
            raise UserError(self._explain_value(error)) from error
        except BUILD_ERRORS as error:
            raise UserError(_explain(error)) from error
        self._check_reached(root)
        return built

    @property
    def text(self) -> str:
        """The operative configuration: every parameter of every object that was built, in a form that can be read again."""
        imports = "".join(f"import {module}\n" for module in dict.fromkeys(self._imports))
        return imports + gin_config.operative_config_str(max_line_length=140)

    @property
    def operative_keys(self) -> list[Key]:
        """Scope, complete selector and name of every parameter of every object that was built."""
        return _operative_keys()

    # ---------------------------------------------------------------- reading

    def _read_file(self, name: str, asked_by: str) -> None:
        path = find_source(name, asked_by, self._open[-1] if self._open else None)
        if path in self._open:
            raise UserError(f"Expected includes without a circle (got {' -> '.join(file.name for file in [*self._open, path])})")
        self._open.append(path)
        self._read(read_source(path), name)
        self._open.pop()

    def _read(self, text: str, source: str) -> None:
        statements = iter(config_parser.ConfigParser(text, _Delegate()))
        while True:
            try:
                statement = next(statements, None)
            except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
                line = error.args[1][1] if len(error.args) > 1 and isinstance(error.args[1], tuple) else "?"
                raise UserError(
                    f"Expected bindings such as Name.parameter = value in {source}, line {line} (got: {_first_line(error)}). "
                    "Strings need quotes: Name.path = 'folder/file'."
                ) from error
            if statement is None:
                return
            self._take(statement, f"{source}:{statement.location.line_num}" if self._open else source)

    def _take(self, statement: Any, place: str) -> None:
        if isinstance(statement, config_parser.IncludeStatement):
            self._read_file(statement.filename, place)
        elif isinstance(statement, config_parser.ImportStatement):
            _import(statement.module, place)
            self._imports.append(statement.module)
        elif isinstance(statement, config_parser.BlockDeclaration):
            _check_name(statement.selector, place)
        else:
            self._bind(statement, place)

    def _bind(self, statement: config_parser.BindingStatement, place: str) -> None:
        scope, selector, parameter, value, _ = statement
        if not parameter:  # NAME = value
            scope, selector, parameter = (f"{scope}/{selector}" if scope else selector), MACRO, "value"
        else:
            _check_name(selector, place)
        for unknown in _unknown_references(value):
            _check_name(unknown, place)
        try:
            gin_config.bind_parameter((scope, selector, parameter), value)
        except ValueError as error:
            known = _parameters(selector)
            raise UserError(
                f"Expected a parameter of {selector} in {place} (got {parameter!r}; it has {', '.join(known) or 'none'})."
                f"{did_you_mean(difflib.get_close_matches(parameter, known))}"
            ) from error
        complete = gin_config.ParsedBindingKey.parse((scope, selector, parameter)).complete_selector
        self._history.append(Binding((scope, complete, parameter), value, place, len(self._history)))

    # ---------------------------------------------------------------- checks

    @property
    def _live(self) -> dict[Key, Binding]:
        """The bindings that were not bound again."""
        return {binding.key: binding for binding in self._history}

    def _check_macros(self) -> None:
        macros = {scope for scope, selector, _ in self._live if selector == MACRO}
        for binding in self._live.values():
            for scope, selector in binding.references:
                if selector == MACRO and scope not in macros:
                    raise UserError(
                        f"Expected a value for %{scope}, which {binding.name} in {binding.place} uses (got none)."
                        f"{did_you_mean('%' + name for name in difflib.get_close_matches(scope, macros))}"
                    )

    def _check_circles(self) -> None:
        """Raises where a value is needed to make itself."""
        live = self._live
        parameters: dict[str, set[str]] = {}
        for _, selector, parameter in live:
            parameters.setdefault(selector, set()).add(parameter)
        finished: set[tuple[str, str]] = set()

        def visit(scope: str, selector: str, path: list[tuple[str, str]]) -> None:
            node = (scope, selector)
            if node in path:
                names = [f"%{part[0]}" if part[1] == MACRO else _object_name(*part) for part in [*path[path.index(node) :], node]]
                raise UserError(f"Expected values without a circle (got {' -> '.join(names)})")
            if node in finished:
                return
            for parameter in parameters.get(selector, ()):
                key = _effective((scope, selector, parameter), live)
                for called_scope, called in live[key].called if key else ():
                    visit(called_scope or scope, called, [*path, node])
            finished.add(node)

        for scope, selector, _ in live:
            visit(scope, selector, [])

    def _check_reached(self, root: str) -> None:
        """Raises for bindings that no constructor read.

        Those are forgiven that could not be read because a later binding replaced what they belong to: an ablation that replaces the
        edges of its base leaves the base's `KNNEdges.k` without an owner, and that is what it is for.
        """
        live, read = self._live, _operative_keys()
        reached = {_effective(key, live) for key in read}
        lost = [binding for key, binding in live.items() if key not in reached]
        replaced = list(self._replaced())
        excused: set[Key] = set()
        while replaced:
            (scope, selector), time = replaced.pop()
            for binding in lost:
                own_scope, own_selector, _ = binding.key
                belongs = own_selector == selector and (_is_prefix(own_scope, scope) if selector != MACRO else own_scope == scope)
                if belongs and binding.order < time and binding.key not in excused:
                    excused.add(binding.key)
                    replaced += [(reference, time) for reference in binding.references]
        lost = [binding for binding in lost if binding.key not in excused]
        if lost:
            names = [_name(*key) for key in read] + [scope for scope, selector, _ in live if selector == MACRO]
            known = sorted(set(names) - {binding.name for binding in lost})
            listed = ", ".join(f"{binding.name} ({binding.place})" for binding in lost)
            near = [name for binding in lost for name in difflib.get_close_matches(binding.name, known, n=2)]
            raise UserError(
                f"Expected every binding to reach an object that {root} is built from (got {listed}, which nothing reads)."
                f"{did_you_mean(near)} Correct the name or the scope, or remove the binding."
            )

    def _explain_value(self, error: _WrongValueError) -> str:
        """What a value should have been, and where it comes from, through all macros."""
        live = self._live
        key = _effective(error.key, live)
        assert key is not None, "only bound values are checked"
        binding = first = live[key]
        while isinstance(binding.value, gin_config.ConfigurableReference) and binding.value.config_key[1] == MACRO:
            binding = live[(binding.value.config_key[0], MACRO, "value")]
        got = repr(binding.value) if binding.references else describe_value(error.value)
        text = f"Expected {first.name} to be {error.expected} (got {got}) in {binding.place}"
        if binding is not first:
            text += f", by {binding.name}"
        uncalled = [repr(reference) for reference in gin_config.iterate_references({"": {"": binding.value}}) if not reference.evaluate]
        return f"{text}. Write {uncalled[0]}(), with brackets, for an object of the class." if uncalled else text

    def _replaced(self) -> Iterator[tuple[tuple[str, str], int]]:
        """What values referred to that were bound again later, and when that was."""
        current: dict[Key, Binding] = {}
        for binding in self._history:
            before = current.get(binding.key)
            if before is not None:
                for reference in before.references:
                    yield reference, binding.order
            current[binding.key] = binding


def configure(files: Iterable[str | Path], overrides: Sequence[str] = (), modules: Sequence[str] = MODULES) -> Config:
    """Reads configuration files; see `Config`."""
    return Config(files, overrides, modules)


def register(module: str) -> None:
    """Makes what a package lists in ``__all__`` known to gin: every class and function of its own, by its bare name.

    Raises:
        ValueError: If another package has the name already.
    """
    package = importlib.import_module(module)
    for name in package.__all__:
        listed = getattr(package, name)
        is_buildable = inspect.isfunction(listed) or (inspect.isclass(listed) and not issubclass(listed, BaseException))
        if not is_buildable or _registered.get(name) is listed:
            continue
        if name in _registered:
            raise ValueError(f"Expected one object named {name} in all packages (got {_registered[name]!r} and {listed!r})")
        with gin_config.unlock_config():
            gin_config.external_configurable(_checked(listed, f"{module}.{name}"), name=name, module=module)
        _registered[name] = listed


class _WrongValueError(ValueError):
    """A bound value that the annotation of its parameter does not allow."""

    def __init__(self, key: Key, error: ArgumentError) -> None:
        super().__init__(str(error))
        self.key, self.expected, self.value = key, error.expected, error.value


def _checked(listed: Callable[..., Any], selector: str) -> Callable[..., Any]:
    """The class or function itself, but what gin binds is checked against the annotations, and ``~`` is the home folder."""
    signature = inspect.signature(listed)
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty and parameter.kind not in open_ended}

    @functools.wraps(listed, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        missing = sorted(required - signature.bind_partial(*args, **kwargs).arguments.keys())
        if missing:
            raise ValueError(f"Expected a value for {', '.join(map(repr, missing))} (got none)")
        bound = {name: kwargs[name] for name in gin_config.get_bindings(selector, resolve_references=False) if name in kwargs}
        try:
            check_arguments(listed, bound)
        except ArgumentError as error:
            raise _WrongValueError((gin_config.current_scope_str(), selector, error.parameter), error) from None
        return listed(*args, **{**kwargs, **{name: _at_home(value) for name, value in bound.items()}})

    build.__signature__ = signature  # type: ignore[attr-defined]
    return build


def _at_home(value: Any) -> Any:
    """The value with the home folder for ``~`` in paths."""
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return os.path.expanduser(value)
    return type(value)(map(_at_home, value)) if type(value) in (list, tuple) else value


def _import(module: str, place: str) -> None:
    """Imports what a configuration file asks for and registers what it lists."""
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"Expected a module to import in {place} (got {module}: {error})") from error
    if hasattr(imported, "__all__"):
        try:
            register(module)
        except ValueError as error:
            raise UserError(f"{error}, imported in {place}. Rename yours.") from error


class _Delegate(gin_config.ParserDelegate):
    """Lets unknown references pass, so that they can be reported with their place and their near names."""

    def __init__(self) -> None:
        super().__init__(skip_unknown=True)


def _unknown_references(value: Any) -> Iterator[str]:
    for nested in gin_config._iterate_flattened_values(value):
        if isinstance(nested, gin_config._UnknownConfigurableReference):
            yield nested.selector


def _check_name(selector: str, place: str) -> None:
    matches = gin_config._REGISTRY.matching_selectors(selector)
    if len(matches) == 1:
        return
    if matches:
        raise UserError(f"Expected one object named {selector} in {place} (got {', '.join(matches)}). Write more of the name.")
    near = difflib.get_close_matches(selector, _registered)
    raise UserError(f"Expected the name of a class or function in {place} (got {selector!r}).{did_you_mean(near)}")


def _parameters(selector: str) -> list[str]:
    listed = _registered.get(selector.rsplit(".", 1)[-1])
    return [] if listed is None else [name for name in inspect.signature(listed).parameters if name != "self"]


def _operative_keys() -> list[Key]:
    # gin has no public view of this but the text that it prints.
    return [(scope, selector, name) for (scope, selector), values in gin_config._OPERATIVE_CONFIG.items() for name in values]


def _effective(key: Key, live: dict[Key, Binding]) -> Key | None:
    """The binding that gives a parameter its value: the one with the longest scope that fits."""
    scope, selector, parameter = key
    parts = scope.split("/") if scope else []
    candidates = (("/".join(parts[:length]), selector, parameter) for length in range(len(parts), -1, -1))
    return next((candidate for candidate in candidates if candidate in live), None)


def _is_prefix(scope: str, other: str) -> bool:
    return not scope or other == scope or other.startswith(scope + "/")


def _object_name(scope: str, selector: str) -> str:
    return f"{scope + '/' if scope else ''}{selector.rsplit('.', 1)[-1]}"


def _name(scope: str, selector: str, parameter: str) -> str:
    return f"{_object_name(scope, selector)}.{parameter}"


def _explain(error: Exception) -> str:
    """The message of a constructor, and where in the configuration that was; gin appends a line for each object around it."""
    message, *_ = re.split(r"\n  (?:In call to configurable|No values supplied by Gin)", str(error), maxsplit=1)
    calls = re.findall(r"In call to configurable '([^']+)' \(.*\)(?: in scope '([^']+)')?", str(error))
    place = " of ".join(_object_name(scope, name) for name, scope in calls)
    return f"{message}\n  while building {place}" if place else message


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
