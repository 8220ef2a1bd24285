import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "gkd" / "graphs" / "README.md"

# Everything that somebody who wants the graphs alone need not have.
ALONE = """
import sys

class Absent:
    names = {"torchvision", "detectron2", "lightning", "torchmetrics", "gin", "matplotlib", "pytest", "timm"}

    def find_spec(self, name, path=None, target=None):
        top, *rest = name.split(".")
        if top in self.names or (top == "gkd" and rest and rest[0] != "graphs"):
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
for name in ("torch_scatter", "torch_sparse", "torch_cluster", "pyg_lib"):  # PyG asks whether they exist
    sys.modules[name] = None
"""

USE = """
import pkgutil, importlib
import gkd.graphs
for module in pkgutil.iter_modules(gkd.graphs.__path__):
    importlib.import_module(f"gkd.graphs.{module.name}")
import torch
from gkd.graphs import ChannelNodes, GraphBuilder, HeatKernelEncoding, KNNEdges
graph = GraphBuilder(ChannelNodes(), KNNEdges(k=2), HeatKernelEncoding())(torch.rand(2, 6, 4, 4))
assert graph.pe.shape[0] == 12
"""


def run_python(code):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_works_alone():  # and gkd.graphs.testing without a test runner
    run_python(ALONE + USE)


def test_what_is_absent_is_absent():
    for name in ("torchvision", "gin", "gkd.losses"):
        assert "not here" in run_python(ALONE + f"\ntry:\n    import {name}\nexcept ImportError as error:\n    print(error)")


def test_imports_nothing_heavy():
    heavy = "{'torchvision', 'detectron2', 'lightning', 'gin', 'matplotlib'}"
    assert run_python(f"import sys, gkd.graphs; print(sorted({heavy} & sys.modules.keys()))").strip() == "[]"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_has_examples():
    assert len(blocks()) >= 4


@pytest.mark.parametrize("number", range(len(blocks())))
def test_readme_example_runs(number):
    exec(compile(blocks()[number], f"{README.name}, example {number}", "exec"), {"__name__": "readme"})


def test_readme_names_exist():
    import gkd.graphs

    text = README.read_text()
    missing = [name for name in gkd.graphs.__all__ if name not in text]
    assert not missing, f"not explained in the README: {missing}"


def test_readme_picture_is_there():
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README.read_text())
    assert pictures
    for picture in pictures:
        assert (README.parent / picture).stat().st_size < 300_000
