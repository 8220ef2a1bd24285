"""The benchmark of the methods: every one is in it, and what they are compared with does what it says. No timing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from gkd.config import configure
from gkd.losses import ATLoss, ICKDLoss, RKDLoss, SPLoss

ROOT = Path(__file__).resolve().parents[1]
FILE = "gin/benchmark/methods.gin"
LOSSES = {"AT": ATLoss, "SP": SPLoss, "RKD": RKDLoss, "ICKD": ICKDLoss}


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "projects" / "benchmark"))


def benchmark(*bindings: str):
    return configure([FILE], bindings, ("methods",)).build("MethodBenchmark")


def test_every_method_of_classifiers_has_a_row():
    shipped = benchmark()
    used = {part for recipe in shipped.recipes().values() for part in recipe if part.startswith("gin/methods/")}
    detection = {"crosskd", "cwd", "dsig", "fgd", "ld", "mask_kd", "mgd", "pkd", "sekd_detection"}
    assert used == {f"gin/methods/{path.name}" for path in (ROOT / "gin/methods").glob("*.gin") if path.stem not in detection}
    assert set(shipped.bounds) == set(LOSSES)
    names = list(shipped.recipes())
    assert all(names.index(f"{name}, bound") == names.index(name) + 1 for name in shipped.bounds)


@pytest.mark.parametrize("name", LOSSES)
def test_bounds_read_what_the_methods_read(name):
    bound, loss = getattr(importlib.import_module("bounds"), f"{name}Bound")(), LOSSES[name]()
    student, teacher = torch.randn(3, 8, 2, 2, requires_grad=True), torch.randn(3, 8, 2, 2, requires_grad=True)
    for term in (bound, loss):
        if hasattr(term, "build"):
            term.build(student.shape, teacher.shape)
    assert sum(p.numel() for p in bound.parameters()) == sum(p.numel() for p in loss.parameters())
    assert bound.level == loss.level
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = bound(student, teacher.detach())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.count_nonzero() == gradient.numel()
    assert gradient.abs().max() < 1e-6


def test_a_bound_of_nothing():
    with pytest.raises(ValueError, match=r"Expected bounds of methods among alone, .* \(got BT\)"):
        benchmark("MethodBenchmark.bounds = {'BT': 'x = 1'}").recipes()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys):
    methods = """MethodBenchmark.methods = {
        'KD': 'gin/methods/kd.gin',
        'AT': ('gin/methods/at.gin', 'ATLoss.power = 2.0'),
        'ICKD': 'gin/methods/ickd.gin',
        'SP': 'gin/methods/sp.gin',
        'RKD': 'gin/methods/rkd.gin',
    }"""
    sizes = [f"MethodBenchmark.{line}" for line in ("batch_size = 4", "repeats = 1", "num_samples = 200", "num_negatives = 50")]
    result = benchmark(methods, *sizes, f"MethodBenchmark.output = '{tmp_path / 'methods.json'}'").run()
    assert json.loads((tmp_path / "methods.json").read_text())["rows"] == result["rows"]
    assert [row["method"] for row in result["rows"]] == [
        "KD", "AT", "AT, bound", "ICKD", "ICKD, bound", "SP", "SP, bound", "RKD", "RKD, bound"
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "to bound" in printed
    assert "numpy.random.choice" in printed
