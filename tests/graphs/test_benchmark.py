import importlib.util
import json

import pytest
import torch


@pytest.fixture
def benchmark(repository, monkeypatch):
    folder = repository / "projects" / "benchmark"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_graphs", folder / "graphs.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.import_module("sys").modules, "benchmark_graphs", module)
    spec.loader.exec_module(module)
    return module


def test_every_side_has_its_row(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "in_child", lambda *_, **__: 0.0)
    threads = torch.get_num_threads()
    result = benchmark.GraphBenchmark(
        batch_size=2, channels=(40,), grid=3, num_eig=3, k=4, repeats=1, threads=threads, output=str(tmp_path / "graphs.json")
    ).run()
    assert json.loads((tmp_path / "graphs.json").read_text())["rows"] == result["rows"]
    assert [row["task"] for row in result["rows"]] == list(benchmark.TASKS)
    for row in result["rows"]:
        sides = ["gkd", "PyG", "PyG, symmetric"] if "eigenpairs" in row["task"] else ["gkd", "PyG"]
        assert list(row["ms_per_image"]) == sides
        for side, ratio in row["ratio"].items():
            assert ratio == row["ms_per_image"][side] / row["ms_per_image"]["gkd"] > 0
    printed = capsys.readouterr().out
    assert "PyG: AddLaplacianEigenvectorPE as it is by default" in printed
    assert sum(line.startswith("kNN + eigenpairs") for line in printed.splitlines()) == 2


def test_pyg_is_called_as_its_column_says(benchmark):
    setting = benchmark.Setting(1, 40, 3, 3, 4, "cpu")
    called = []

    class Transform:
        def __init__(self, k, attr_name, is_undirected):
            called.append((k, is_undirected))

    benchmark.AddLaplacianEigenvectorPE = Transform
    for side in ("PyG", "PyG, symmetric"):
        benchmark.TASKS["kNN + eigenpairs"][side](setting)
    assert called == [(3, False), (3, True)]
