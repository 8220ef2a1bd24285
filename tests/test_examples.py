"""Every script in examples/ runs, in a folder of its own, and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRINTED = {
    "ablation": "attention",
    "graphs_alone": "out of a GCN layer: (196, 16)",
    "own_detector_data": "classes ['square', 'disc']",
    "own_graph": "FullGaussianEdges",
    "two_classifiers": "student, graphs + KD",
    "vit_to_cnn": "graph/last/edge",
}
NEEDS = {"ablation": "optuna", "own_detector_data": "pycocotools", "vit_to_cnn": "timm"}


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "ablation" else name for name in PRINTED])
def test_example(name, tmp_path):
    if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    script = ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert PRINTED[name] in done.stdout
