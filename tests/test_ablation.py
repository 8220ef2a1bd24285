"""The shipped ablations can be configured, cell by cell; the command runs, compares and says what is wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gkd.config import ROOT, configure
from gkd.models import build_classifier

pytest.importorskip("optuna")

FILES = sorted((ROOT / "gin" / "ablation").glob("*.gin"))

BASE = """
Classification.data = @RandomImages()
RandomImages.num_train = 24
RandomImages.num_test = 12
RandomImages.num_classes = 4
Classification.batch_size = 12
Classification.student = @student/Network()
student/Network.name = 'resnet8'
Classification.trainer = @Trainer()
Trainer.tensorboard = False
Trainer.device = 'cpu'
"""
ABLATION = """
Sweep.base = 'base.gin'
Sweep.axes = {
    'Trainer.epochs': (1,),
    'rate': {'low': ('Trainer.optimizer = @SGD()', 'SGD.lr = 0.01'), 'broken': 'Trainer.clip_norm = "one"'},
}
Sweep.baseline = 'low'
Sweep.seeds = (0,)
"""


@pytest.fixture(scope="module")
def sweep_module():
    spec = importlib.util.spec_from_file_location("ablation_sweep", ROOT / "projects" / "ablation" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sweep(sweep_module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.gin").write_text(BASE)
    Path("small.gin").write_text(ABLATION)
    return lambda *options: sweep_module.main(["--gin", "small.gin", *options])


def read(file: Path):
    return configure([str(file)], modules=("gkd.engine.sweep",)).build("Sweep")


def points_of(sweep_module, file: Path, weights: Path, further=("Trainer.device = 'cpu'",)):
    """The cells of a shipped file, with an untrained teacher at `weights`; each is built, and those that are the same are one."""
    sweep = read(file)
    sweep.teacher_weights = weights
    further = [*further]
    if sweep.teacher:
        save_file(build_classifier("resnet20", num_classes=10).state_dict(), weights)
    else:
        save_file(build_classifier("resnet56", num_classes=100).state_dict(), weights)
        sweep.bindings = tuple(line for line in sweep.bindings if not line.startswith("CIFAR100"))
        further += [f"TEACHER_WEIGHTS = '{weights}'", "Classification.data = @RandomImages()", "RandomImages.num_classes = 100"]
    commands = sweep_module.Commands(sweep, further)
    return sweep_module.plan_cells(commands, None), commands


def test_the_ablations_that_the_issue_names():
    assert {file.stem for file in FILES} >= {"graph_construction", "encoding", "terms", "topology", "methods"}
    assert all(len(read(file).seeds) >= 3 and read(file).baseline for file in FILES)


def test_the_place_of_the_teacher_makes_no_difference(sweep_module, tmp_path):
    file, far = ROOT / "gin/ablation/topology.gin", tmp_path / ("a long name " * 12) / "teacher.safetensors"
    far.parent.mkdir()
    keys = [[cell.key for cell in points_of(sweep_module, file, path)[0].cells()] for path in (tmp_path / "teacher.safetensors", far)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0])


def test_every_method_is_in_methods_gin():
    used = {
        part for choices in read(ROOT / "gin/ablation/methods.gin").axes["method"].values() for part in choices if part.endswith(".gin")
    }
    detection = {"cwd", "dsig", "fgd", "mgd", "pkd"}
    assert used == {f"gin/methods/{path.name}" for path in (ROOT / "gin/methods").glob("*.gin") if path.stem not in detection}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_is_built(file, sweep_module, tmp_path):
    plan, _ = points_of(sweep_module, file, tmp_path / "teacher.safetensors")
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
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_takes_a_step(file, sweep_module, tmp_path):
    further = ["Trainer.device = 'cpu'", "Trainer.max_steps = 1", "BATCH_SIZE = 16"]
    plan, commands = points_of(sweep_module, file, tmp_path / "teacher.safetensors", further)
    for point in plan.points:
        config = configure(commands.files(point), commands.bindings(point, 0, tmp_path / "teacher.safetensors"))
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
