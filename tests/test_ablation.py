"""The shipped ablations can be configured, cell by cell; the command runs, compares and says what is wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gkd.cli import main
from gkd.cli.sweep import plan_cells
from gkd.config import configure
from gkd.models import build_classifier
from gkd.sweep.commands import Commands
from gkd.sweep.points import Plan, Sweep
from gkd.sweep.report import write_report
from gkd.sweep.study import Outcome
from gkd.tasks import SegmentationNetwork

pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "gin" / "ablation").glob("*.gin"))
CLASSIFIERS = [file for file in FILES if file.stem != "segmentation"]

BASE = """
Classification.data = @RandomImages()
RandomImages.num_train = 24
RandomImages.num_test = 12
RandomImages.num_classes = 4
Classification.batch_size = 12
Classification.student = @student/Network()
student/Network.name = 'resnet8'
Classification.trainer = @Trainer()
Trainer.loggers = ()
Trainer.check_teacher = False
Trainer.device = 'cpu'
"""
ABLATION = """
Sweep.base = 'base.gin'
Sweep.axes = {
    'Trainer.epochs': (1,),
    'rate': {'low': ('Trainer.optimizer = @SGD()', 'SGD.lr = 0.01'), 'broken': ('Trainer.optimizer = @SGD()', 'SGD.lr = 1e30')},
}
Sweep.baseline = 'low'
Sweep.seeds = (0,)
"""


def load(name: str, path: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.gin").write_text(BASE)
    Path("small.gin").write_text(ABLATION)
    return lambda *options: main(["sweep", "--gin", "small.gin", *options])


def read(file: Path):
    return configure([str(file)]).build("Sweep")


def points_of(file: Path, weights: Path, further=("Trainer.device = 'cpu'",)):
    """The cells of a shipped file, with an untrained teacher at `weights`; each is built, and those that are the same are one."""
    sweep = read(file)
    sweep.teacher_weights = weights
    further = [*further]
    if file.stem == "segmentation":
        save_file(SegmentationNetwork("deeplabv3_mobilenet_v3_large").build(11).state_dict(), weights)
    elif sweep.teacher:
        save_file(build_classifier("resnet20", num_classes=10).state_dict(), weights)
    else:
        save_file(build_classifier("resnet56", num_classes=100).state_dict(), weights)
        sweep.bindings = tuple(line for line in sweep.bindings if not line.startswith("CIFAR100"))
        further += [f"TEACHER_WEIGHTS = '{weights}'", "Classification.data = @RandomImages()", "RandomImages.num_classes = 100"]
    commands = Commands(sweep, further)
    return plan_cells(commands, None), commands


def test_the_ablations_that_the_issue_names():
    assert {file.stem for file in FILES} >= {"graph_construction", "encoding", "terms", "topology", "methods"}
    assert all(len(read(file).seeds) >= 3 and read(file).baseline for file in FILES)


def test_the_place_of_the_teacher_makes_no_difference(tmp_path):
    file, far = ROOT / "gin/ablation/topology.gin", tmp_path / ("a long name " * 12) / "teacher.safetensors"
    far.parent.mkdir()
    keys = [[cell.key for cell in points_of(file, path)[0].cells()] for path in (tmp_path / "teacher.safetensors", far)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0])


def test_every_method_is_in_methods_gin():
    used = {
        part for choices in read(ROOT / "gin/ablation/methods.gin").axes["method"].values() for part in choices if part.endswith(".gin")
    }
    detection = {"crosskd", "cwd", "dsig", "fgd", "ld", "mask_kd", "mgd", "pkd", "sekd_detection"}
    assert used == {f"gin/methods/{path.name}" for path in (ROOT / "gin/methods").glob("*.gin") if path.stem not in detection}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_is_built(file, tmp_path):
    plan, _ = points_of(file, tmp_path / "teacher.safetensors")
    labels = [point.label for point in plan.points]
    assert len(set(labels)) == len(labels)
    assert len({cell.name for cell in plan.cells()}) == len(plan.cells()) == len(labels) * len(plan.sweep.seeds)
    if file.stem == "graph_construction":
        strategies = [point for point in plan.points if point.values]
        assert len(strategies) == 15  # 3 kinds of nodes x (2 kinds of edges x 2 k + the complete graph)
        assert sum("k" not in point.values for point in strategies) == 3
    if file.stem == "encoding":
        assert sum(bool(point.values) for point in plan.points) == 18  # 6 encodings x 3 spectra: none makes no difference


@pytest.mark.slow
@pytest.mark.parametrize("file", CLASSIFIERS, ids=lambda file: file.stem)
def test_every_cell_takes_a_step(file, tmp_path):
    further = ["Trainer.device = 'cpu'", "Trainer.max_steps = 1", "BATCH_SIZE = 16"]
    plan, commands = points_of(file, tmp_path / "teacher.safetensors", further)
    for point in plan.points:
        config = configure(commands.files(point), commands.bindings(point, tmp_path / "teacher.safetensors"))
        task = config.build("Classification")
        task.distiller.progress(3.0)
        images, targets, index = next(iter(task.data.batches("train", 16)))
        losses = task.distiller(images, targets, index)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values()), point.label


def test_a_sweep_with_a_cell_that_fails(sweep, capsys):
    assert sweep() == 1
    printed = capsys.readouterr().out
    assert "failed: broken, seed 0: " in printed
    assert "low" in printed
    folder = Path("runs/ablation/small")
    assert {"table.csv", "table.md", "results.json", "report.html", "sweep.db", "cells"} <= {path.name for path in folder.iterdir()}
    rows = {row["method"]: row for row in csv.DictReader((folder / "table.csv").read_text().splitlines())}
    run = folder / "cells/low/seed0"
    assert float(rows["low"]["last_mean"]) == json.loads((run / "results.json").read_text())["final"]["top1"]
    assert rows["broken"]["last_mean"] == ""
    assert "SGD.lr = 0.01" in (run / "config.gin").read_text()
    error = next(cell["error"] for cell in json.loads((folder / "results.json").read_text()) if cell["label"] == "broken")
    assert error
    assert error in (folder / "table.md").read_text()
    assert "Failed cells" in (folder / "report.html").read_text()

    # Once more: nothing runs, the table is the same.
    before = {name: (folder / name).read_bytes() for name in ("table.csv", "table.md", "results.json")}
    changed = run.joinpath("cell.json").stat().st_mtime_ns
    assert sweep() == 1
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert run.joinpath("cell.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "Sweep.axes = {'Trainer.epoch': (1, 2)}"], r"In the cell 'epoch 1' .*Did you mean epochs\?"),
        (["--set", "Sweep.axes = {'studnet/Network.name': ('vgg8',)}"], r"studnet/Network.name.*nothing reads"),
        (["--set", "Sweep.axes = {'method': {'KD': 'gin/methods/kdd.gin'}}"], r"gin/methods/kdd\.gin.*Did you mean"),
        (["--set", "Sweep.axes = {'loss': {'KDD': 'Distiller.terms = {\"kd\": @KDDLoss()}'}}"], "KDDLoss"),
        (["--set", "Sweep.baseline = 'KD'"], "Sweep.baseline"),
        (["--set", "Sweep.sampler = 'tpe'", "--set", "Sweep.trials = 2"], r"Expected held-out images to choose on.*'tpe' \(got none\)"),
        (["--set", "Sweep.base = 'nowhere.gin'"], "nowhere.gin"),
        (["--set", "Sweep.seed = 1"], r"Did you mean seeds\?"),
        (["--set", "Trainr.epochs = 1"], r"Did you mean Trainer\?"),
        (["--storage", "sqlite:////nowhere/at/all/sweep.db"], r"storage that can be reached \(got sqlite:////nowhere"),
        (["--gin", "nowhere.gin"], "nowhere.gin"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message_before_anything_is_trained(sweep, capsys, options, message):
    assert sweep(*options) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert not list(Path("runs").rglob("cells"))


# ---------------------------------------------------------------- the command, in processes of its own

GRID = """
Sweep.base = 'base.gin'
Sweep.bindings = ('Trainer.epochs = 3', 'Trainer.optimizer = @SGD()')
Sweep.axes = {'SGD.lr': (0.1, 0.01), 'gradient': {'whole': (), 'clipped': 'Trainer.clip_norm = 0.5'}}
Sweep.baseline = 'lr 0.1, whole'
Sweep.seeds = (0,)
Sweep.workers = 1
"""


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "base.gin").write_text(BASE)
    (folder / "grid.gin").write_text(GRID)
    command = [sys.executable, "-m", "gkd", "sweep", "--gin", "grid.gin", "--device", "cpu"]
    with (folder / f"output{len(list(folder.glob('output*')))}.txt").open("w") as output:
        return subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        )


def told(folder: Path, number: int) -> list[str]:
    """The cells of which a process says that it has done them."""
    return re.findall(r"(?m)^\d/4  (.*), seed 0: top1 ", (folder / f"output{number}.txt").read_text())


def accuracies(folder: Path) -> dict[str, tuple[str, str]]:
    """The columns of the table that are no timings, and the bits of the students behind them."""
    output = folder / "runs/ablation/grid"
    rows = csv.DictReader((output / "table.csv").read_text().splitlines())
    students = {path.parent.parent.name: path.read_bytes() for path in output.glob("cells/*/seed0/student.safetensors")}
    assert len(students) == 4
    return {**students, **{row["method"]: (row["last_mean"], row["best_mean"]) for row in rows}}


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_a_killed_one_ends_with_the_same_table(tmp_path):
    shared, killed = tmp_path / "shared", tmp_path / "killed"
    both = [start(shared), start(shared)]
    assert [process.wait(600) for process in both] == [0, 0], "".join(path.read_text() for path in shared.glob("output*"))
    done = [told(shared, 0), told(shared, 1)]
    assert all(done)  # both worked
    assert sorted(done[0] + done[1]) == sorted({*done[0], *done[1]})  # and on no cell twice
    assert len(done[0] + done[1]) == 4

    process = start(killed)
    deadline = time.monotonic() + 300
    while not (first := told(killed, 0)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    known = {path: path.stat().st_mtime_ns for path in killed.glob("runs/ablation/grid/cells/*/seed0/results.json")}
    assert 1 <= len(known) < 4
    assert start(killed).wait(600) == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in known.items())
    assert not set(first) & set(told(killed, 1))
    assert accuracies(killed) == accuracies(shared)


def test_the_report_opens_in_chromium_without_errors_or_requests(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pages = load("pages", "tests/viz/test_pages.py")
    if pages.CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    sweep = Sweep("run.gin", axes={"k": (2, 4, 8), "edges": {"kNN": (), "complete": "x = 1"}}, baseline="k 2, kNN", seeds=(0, 1))
    plan = Plan(sweep, None, repr)
    records = {}
    for number, cell in enumerate(plan.cells()):
        results = {**pages.RESULTS, "final": {**pages.RESULTS["final"], "top1": 70.0 + number}, "seed": cell.seed}
        records[cell.key] = Outcome(results, None, number)
        run = tmp_path / "cells" / cell.name
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pages.metrics()))
    assert write_report(plan, records, tmp_path, "grid") == 0
    assert "k 8, complete" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert "Mean over the seeds" in text  # the heat map of the axes
    opened = pages.open_in_chromium(tmp_path / "report.html", tmp_path)
    assert (opened.console, opened.requests) == ([], [])
    assert pages.colors_of(opened.screenshot) > 200


def test_cells_without_reports():
    for reports in (True, False):
        commands = Commands(Sweep("run.gin", axes={"k": (2,)}, reports=reports), [])
        assert ("--no-report" in commands.train(commands.sweep.grid()[0], 0)) is not reports
