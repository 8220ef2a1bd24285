"""Configuration by gin: the only file that imports it. gin acts while objects are built, and never after."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By their full names: the folder gin of this repository looks like a package to type checkers.
import gin.config as gin_config
import gin.config_parser as config_parser

from gkd.errors import UserError

PARTS = ("graphs", "losses", "models", "distill", "data", "engine", "tasks", "detection", "detection.d2", "sweep")
MODULES = tuple(f"gkd.{part}" for part in PARTS)
ROOT = Path(__file__).resolve().parents[1]  # include paths are written from the repository root
MACRO = "gin.macro"

# What a wrong value may raise in a constructor. Anything else is a defect of the code and keeps its traceback.
BUILD_ERRORS = (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError)

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
        return f"{scope + '/' if scope else ''}{selector.rsplit('.', 1)[-1]}.{parameter}"

    @property
    def references(self) -> list[tuple[str, str]]:
        """Scope and selector of everything that the value refers to."""
        return [(reference.config_key[0], reference.config_key[1]) for reference in gin_config.iterate_references({"": {"": self.value}})]


class Config:
    """A configuration that was read, and what is built from it.

    gin keeps its state in one place for the whole process, so a new configuration ends the one before.

    Args:
        files: Files to read, one after the other; later bindings win. Searched for from the working directory and from the repository root.
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
        except BUILD_ERRORS as error:
            raise UserError(_explain(error)) from error
        self._check_reached(root)
        return built

    @property
    def text(self) -> str:
        """The operative configuration: every parameter of every object that was built, in a form that can be read again."""
        imports = "".join(f"import {module}\n" for module in self._imports)
        return imports + gin_config.operative_config_str(max_line_length=140)

    # ---------------------------------------------------------------- reading

    def _read_file(self, name: str, asked_by: str) -> None:
        path = next((place / name for place in (Path.cwd(), ROOT) if (place / name).is_file()), None)
        if path is None:
            folder = (ROOT / name).parent
            near = difflib.get_close_matches(Path(name).name, [file.name for file in folder.glob("*.gin")] if folder.is_dir() else [])
            raise UserError(
                f"Expected the configuration file {name}, asked for by {asked_by} (got no such file in {Path.cwd()} or {ROOT})."
                f"{_did_you_mean(str(Path(name).parent / file) for file in near)}"
            )
        path = path.resolve()
        if path in self._open:
            raise UserError(f"Expected includes without a circle (got {' -> '.join(file.name for file in [*self._open, path])})")
        self._open.append(path)
        self._read(path.read_text(), name)
        self._open.pop()

    def _read(self, text: str, source: str) -> None:
        try:
            parser = config_parser.ConfigParser(text, _Delegate())
            for statement in parser:
                place = f"{source}:{statement.location.line_num}" if self._open else source
                self._take(statement, place)
        except (SyntaxError, tokenize.TokenError) as error:
            line = error.args[1][1] if len(error.args) > 1 and isinstance(error.args[1], tuple) else "?"
            raise UserError(
                f"Expected bindings such as Name.parameter = value in {source}, line {line} (got: {error.args[0]}). "
                "Strings need quotes: Name.path = 'folder/file'."
            ) from error

    def _take(self, statement: Any, place: str) -> None:
        if isinstance(statement, config_parser.IncludeStatement):
            self._read_file(statement.filename, place)
        elif isinstance(statement, config_parser.ImportStatement):
            try:
                importlib.import_module(statement.module)
            except ImportError as error:
                raise UserError(f"Expected a module to import in {place} (got {statement.module}: {error})") from error
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
                f"{_did_you_mean(difflib.get_close_matches(parameter, known))}"
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
                        f"{_did_you_mean('%' + name for name in difflib.get_close_matches(scope, macros))}"
                    )

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
                f"{_did_you_mean(near)} Correct the name or the scope, or remove the binding."
            )

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
        if not (inspect.isclass(listed) or inspect.isfunction(listed)) or _registered.get(name) is listed:
            continue
        if name in _registered:
            raise ValueError(f"Expected one object named {name} in all packages (got {_registered[name]!r} and {listed!r})")
        with gin_config.unlock_config():
            gin_config.external_configurable(listed, name=name, module=module)
        _registered[name] = listed


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
    raise UserError(f"Expected the name of a class or function in {place} (got {selector!r}).{_did_you_mean(near)}")


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


def _name(scope: str, selector: str, parameter: str) -> str:
    return f"{scope + '/' if scope else ''}{selector.rsplit('.', 1)[-1]}.{parameter}"


def _explain(error: Exception) -> str:
    """The message of a constructor, and where in the configuration that was; gin appends a line for each object around it."""
    message, *_ = re.split(r"\n  (?:In call to configurable|No values supplied by Gin)", str(error), maxsplit=1)
    if isinstance(error, TypeError):
        missing = re.search(r"No values supplied by Gin or caller for arguments: \[([^]]*)\]", str(error))
        if missing and "missing" in message:
            message = f"Expected a value for {missing.group(1)} (got none)"
    calls = re.findall(r"In call to configurable '([^']+)' \(.*\)(?: in scope '([^']+)')?", str(error))
    place = " of ".join(f"{scope + '/' if scope else ''}{name}" for name, scope in calls)
    return f"{message}\n  while building {place}" if place else message


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _did_you_mean(names: Iterable[str]) -> str:
    listed = list(dict.fromkeys(names))
    return f" Did you mean {' or '.join(listed)}?" if listed else ""
