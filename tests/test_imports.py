from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "gkd").rglob("*.py"))

# Part of gkd: the parts that it may import. Everything may import errors and files.
LAYERS: dict[str, set[str]] = {
    "graphs": set(),
    "losses": {"graphs"},
    "models": set(),
    "data": set(),
    "engine": set(),
    "distill": {"losses", "models"},
    "detection": {"graphs", "distill", "losses", "models", "data", "engine"},
    "tasks": {"engine", "distill", "models", "data", "detection", "viz"},  # viz when a report is drawn
    "viz": {"graphs", "engine", "models"},
    "sweep": {"engine", "viz"},
    "arguments": set(),
    "sources": set(),
    "errors": set(),
    "files": set(),
    "__init__": set(),
}
COMMON = {"arguments", "errors", "files"}
UNRESTRICTED = {"config", "cli", "__main__"}
# Absent in an ordinary installation, or left to an extra.
OPTIONAL = {"detectron2", "matplotlib", "onnx", "onnxruntime", "onnxscript", "optuna", "pycocotools", "timm", "transformers"}
HEAVY = ("torchvision", "detectron2", "lightning", "matplotlib")


class Imported(NamedTuple):
    """One module that a source file imports, and how."""

    name: str
    line: int
    on_loading: bool  # Not inside a function, nor for the type checker alone.


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(source: str, package: str = "") -> Iterator[Imported]:
    """Yields what a source imports; `package` resolves relative imports."""

    def visit(node: ast.AST, on_loading: bool) -> Iterator[Imported]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(alias.name, node.lineno, on_loading)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Imported(full if base.split(".")[0] == "gkd" and is_module(full) else base, node.lineno, on_loading)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child not in node.orelse
            yield from visit(child, on_loading and not lazy and not typing_only)

    yield from visit(ast.parse(source), True)


def imports_of(path: Path) -> list[Imported]:
    name = module_name(path)
    return list(imports(path.read_text(), name if path.name == "__init__.py" else name.rpartition(".")[0]))


def part(name: str) -> str:
    """`graphs` of gkd.graphs.edges, `__init__` of gkd."""
    return name.split(".")[1] if "." in name else "__init__"


def where(path: Path, imported: Imported) -> str:
    return f"{path.relative_to(ROOT)}:{imported.line} imports {imported.name}"


def test_the_reader_of_imports():
    source = """
import a.b, c
from gkd.data import epochs, CropFlip
from . import augment
from .augment import shift
def f():
    import lazy
if TYPE_CHECKING:
    import typed
else:
    import real
"""
    found = {(name, on_loading) for name, _, on_loading in imports(source, "gkd.data")}
    gkd = {("gkd.data.epochs", True), ("gkd.data", True), ("gkd.data.augment", True)}
    assert found == {("a.b", True), ("c", True), ("lazy", False), ("typed", False), ("real", True)} | gkd


def test_every_part_has_a_rule():
    parts = {part(module_name(path)) for path in SOURCES}
    assert {"graphs", "losses", "models", "data", "distill", "engine", "tasks", "detection", "viz", "sweep"} <= parts
    assert parts <= LAYERS.keys() | UNRESTRICTED


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    wrong = [
        where(path, imported)
        for path in SOURCES
        if part(module_name(path)) == layer
        for imported in imports_of(path)
        if imported.name.split(".")[0] == "gkd"
        and part(imported.name) not in LAYERS[layer] | COMMON | {layer}
        and imported.name != "gkd"  # The package itself holds its version only.
    ]
    assert not wrong


def test_gkd_graphs_needs_torch_and_torch_geometric_only():
    wrong = [
        where(path, imported)
        for path in SOURCES
        if part(module_name(path)) == "graphs"
        for imported in imports_of(path)
        if imported.name.split(".")[0] not in sys.stdlib_module_names | {"torch", "torch_geometric", "gkd"}
    ]
    assert not wrong


@pytest.mark.parametrize(("library", "home"), [("gin", "gkd.config"), ("detectron2", "gkd.detection")])
def test_one_home_for(library, home):
    wrong = [
        where(path, imported)
        for path in SOURCES
        if not f"{module_name(path)}.".startswith(f"{home}.")
        for imported in imports_of(path)
        if imported.name.split(".")[0] == library
    ]
    assert not wrong


def test_projects_are_clients():
    wrong = [where(path, imported) for path in SOURCES for imported in imports_of(path) if imported.name.split(".")[0] == "projects"]
    assert not wrong
    clients = sorted((ROOT / "projects").rglob("*.py"))
    assert clients
    assert not [where(path, imported) for path in clients for imported in imports_of(path) if imported.name.split(".")[0] == "gin"]


def test_no_cycles():
    names = {module_name(path) for path in SOURCES}
    graph = {module_name(path): {entry.name for entry in imports_of(path) if entry.on_loading and entry.name in names} for path in SOURCES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # A CycleError names the modules of the cycle.
    assert set(order) == names


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_imports(path):
    try:
        module = importlib.import_module(module_name(path))
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in OPTIONAL:
            raise
        pytest.skip(f"{missing} is not installed")
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert not [name for name in names if not hasattr(module, name)]


@pytest.mark.parametrize("statement", ["import gkd", "import gkd.graphs"])
def test_light_imports(statement):
    # What torch and torch_geometric load by themselves is theirs.
    script = f"""
import sys
import torch, torch_geometric
import torch_geometric.data, torch_geometric.nn, torch_geometric.transforms, torch_geometric.utils
before = set(sys.modules)
{statement}
print(*(name for name in {HEAVY!r} if name in set(sys.modules) - before))
print(*sorted(name for name in set(sys.modules) - before if name.startswith('gkd.') and not name.startswith('gkd.graphs')))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
