"""The benchmark of a GPU day, rehearsed on the CPU: order, resumption, time, and the commands themselves. No timing."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from gkd.config import configure
from gkd.errors import UserError


@pytest.fixture(autouse=True)
def _import_path(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "projects" / "benchmark"))
    monkeypatch.delenv("MDISTILLER", raising=False)


def benchmark(tmp_path, *bindings: str):
    settings = ["GPU.device = 'cpu'", f"GPU.folder = '{tmp_path}'", f"GPU.output = '{tmp_path / 'gpu.json'}'", *bindings]
    return configure(["gin/benchmark/gpu.gin"], settings, ("gpu",)).build("GPU")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_the_most_worthwhile_comes_first(tmp_path, monkeypatch):
    assert [part.name for part in benchmark(tmp_path).parts()][:5] == ["tests", "sync", "steps", "graphs", "methods"]
    monkeypatch.setenv("MDISTILLER", "/a/checkout")
    names = [part.name for part in benchmark(tmp_path).parts()]
    assert names[5:7] == ["rival", "resnet56_resnet20_graph_kd"]
    training = list(benchmark(tmp_path, "GPU.seeds = (0, 7)").parts())[-1]
    assert list(training.commands) == ["seed0", "seed7"]
    command = training.commands["seed7"]
    assert command[command.index("--seed") + 1] == "7"
    assert {"--resume", "gin/base/alone.gin"} < set(command)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"Expected GPU.tables among sync, .* \(got speed\)"):
        list(benchmark(tmp_path, "GPU.tables = {'speed': ()}").parts())


def test_parts_end_in_time_and_go_on(tmp_path, monkeypatch):
    gpu = importlib.import_module("gpu")
    count, wait = tmp_path / "count", tmp_path / "wait"
    wait.touch()
    counts = f"open({str(count)!r}, 'a').write('x'); open({str(tmp_path / 'a.json')!r}, 'w').write('[1]'); print('table')"
    waits = f"import os, time\nwhile os.path.exists({str(wait)!r}): time.sleep(0.05)"
    parts = [
        gpu.Part("counts", {"a": python(counts)}, {"a": tmp_path / "a.json"}),
        gpu.Part("fails", {"a": python("raise SystemExit('no device')"), "b": python("pass")}),
        gpu.Part("waits", {"a": python(waits)}),
        gpu.Part("late", {"a": python("pass")}),
    ]
    monkeypatch.setattr(gpu.GPU, "parts", lambda self: iter(parts))
    first = benchmark(tmp_path)
    monkeypatch.setattr(gpu, "finish", lambda process, end: None if process.args == python(waits) else process.wait())
    records = first.run()["parts"]
    assert {name: record["state"] for name, record in records.items()} == {
        "counts": "done", "fails": "failed", "waits": "stopped", "late": "done"
    }  # fmt: skip
    assert records["counts"]["results"] == {"a": [1]}
    assert records["counts"]["last_lines"] == {"a": ["table"]}
    assert records["fails"]["last_lines"]["a"] == ["no device"]
    wait.unlink()
    monkeypatch.setattr(gpu, "finish", lambda process, end: process.wait())
    assert first.run()["parts"]["waits"]["state"] == "done"
    assert count.read_text() == "x"  # what is done is not done again
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == {"counts", "fails", "waits", "late"}


def test_a_process_is_ended_when_its_time_is_over(monkeypatch):
    gpu = importlib.import_module("gpu")
    process = gpu.subprocess.Popen(python("import time; time.sleep(600)"))
    assert gpu.finish(process, end=0.0) is None
    assert process.poll() is not None
    assert gpu.finish(gpu.subprocess.Popen(python("raise SystemExit(3)")), end=float("inf")) == 3


def test_nothing_starts_without_time(tmp_path, capsys):
    assert benchmark(tmp_path, "GPU.minutes = 0").run()["parts"] == {}
    assert "tests: no time left; give the command once more" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    small = ("batch_size = 8", "repeats = 1", "precision = '32-true'")
    tables = {
        "sync": [f"SyncCheck.{line}" for line in small] + ["SyncCheck.methods = {'KD': 'gin/methods/kd.gin'}"],
        "steps": [f"StepBenchmark.{line}" for line in small],
        "graphs": [f"GraphBenchmark.{line}" for line in ("batch_size = 2", "channels = (32,)", "repeats = 1", "grid = 4")],
    }
    result = benchmark(
        tmp_path,
        "GPU.tests = ('tests/engine/test_window.py',)",
        f"GPU.tables = {tables!r}",
        "GPU.pairs = {'digits': ('gin/classification/digits_teacher.gin', 'EPOCHS = 1')}",
        "GPU.seeds = (0,)",
    ).run()
    assert {name: record["state"] for name, record in result["parts"].items()} == dict.fromkeys(
        ("tests", "sync", "steps", "graphs", "digits"), "done"
    )
    assert [row["method"] for row in result["parts"]["steps"]["results"]["steps"]["rows"]][-2:] == ["channel graph + KD", "limit"]
    assert "final" in result["parts"]["digits"]["results"]["seed0"]
