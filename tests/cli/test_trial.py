from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from gkd.cli import main, trial
from gkd.sweep import cells
from gkd.sweep.study import Outcome

LINES = ["epoch 1/2  step 4/8  loss 1.0", "epoch 2/2  step 8/8  test  top1 90.00"]


class Job:
    """A training that takes two looks, and whose accuracy follows from its folder."""

    commands: ClassVar[list[list[str]]] = []
    fails = ""

    def __init__(self, command, path, key, threads):
        self.commands.append([*command])
        self.path, self.looks = path, 0

    def last_line(self):
        return LINES[min(self.looks, 1)]

    def outcome(self):
        self.looks += 1
        if self.looks < 2:
            return None
        if self.fails and self.fails in str(self.path):
            return Outcome(None, "a defect", -1)
        names = {"teacher": 99.0, "KD": 92.0, "alone": 90.0, "graph_KD": 94.0}
        seeded = self.path.name.startswith("seed")
        top1 = names[self.path.parent.name] + int(self.path.name[-1]) if seeded else names[self.path.name]
        results = {"student": "resnet8", "score": "top1", "final": {"top1": top1}, "best": {"top1": top1}, "seconds": 2.0}
        self.path.mkdir(parents=True)
        (self.path / "results.json").write_text(json.dumps(results))
        return Outcome(results, None, -1)

    def stop(self):
        self.stopped = True


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "Job", Job)
    monkeypatch.setattr(cells, "POLL", 0.0)
    monkeypatch.setattr(trial, "_pictures", lambda *_: ["<p>pictures</p>"])
    monkeypatch.setattr(Job, "commands", [])
    methods = ("KD=gin/methods/kd.gin", "alone=gin/base/alone.gin", "graph + KD=GRID = 2; RAMP = 1")
    given = ["trial", "--gin", "pair.gin", "--teacher", "teacher.gin", *(part for method in methods for part in ("--method", method))]
    return lambda *options: main([*given, *options])


def test_the_table_of_all_methods_and_seeds(run, capsys):
    assert run("--set", "EPOCHS = 1", "--set-all", "BATCH_SIZE = 8", "--device", "cpu") == 0
    teacher, *students = Job.commands
    assert teacher[4:] == ["--gin", "teacher.gin", "--set", "BATCH_SIZE = 8", "--set", "Trainer.device = 'cpu'"]
    assert len(students) == 9
    graph = next(command for command in students if "GRID = 2" in command)
    assert [part for part in graph[4:] if part not in ("--gin", "--set")] == [
        "pair.gin",
        "BATCH_SIZE = 8",
        "Trainer.device = 'cpu'",
        "EPOCHS = 1",
        "TEACHER_WEIGHTS = 'runs/pair/teacher/student.safetensors'",
        "GRID = 2",
        "RAMP = 1",
        "--seed",
        "0",
    ]
    printed = capsys.readouterr().out
    assert "Teacher resnet8: 99.00 top1" in printed
    assert "91.00 ± 1.00" in printed  # seeds 0, 1, 2 add 0, 1, 2
    assert "alone, seed 2: epoch 1/2" in printed
    assert "93.00 ± 1.00" in Path("runs/pair/table.md").read_text()
    assert "pictures" in Path("runs/pair/report.html").read_text()


def test_a_failure_ends_the_trial_with_its_reason(run, capsys, monkeypatch):
    monkeypatch.setattr(Job, "fails", "alone")
    assert run() == 2
    assert "training of alone, seed 0 to end well (got: a defect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [(["--seeds", "0"], "--seeds"), (["--workers", "0"], "--workers"), (["--method", "KD"], "NAME=")]
)
def test_mistakes(run, capsys, options, message):
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not Job.commands


def test_detectors_from_end_to_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    monkeypatch.chdir(tmp_path)
    small = ["DigitScenes.size = 64", "DigitScenes.num_train = 4", "DigitScenes.num_test = 2", "DigitScenes.scale = (0.4, 0.8)"]
    small += ["EPOCHS = 1", "BATCH_SIZE = 2", "DetectorNetwork.options = {'fpn_channels': 32, 'norm': 'batch', 'trainable_layers': 5}"]
    small += ["Trainer.check_teacher = False"]  # so short a training leaves the teacher guessing
    bindings = [part for binding in small for part in ("--set-all", binding)]
    files = ["--gin", "gin/quickstart_detection.gin", "--teacher", "gin/detection/digit_scenes_teacher.gin"]
    assert main(["trial", *files, "--output", "out", "--device", "cpu", "--seeds", "1", *bindings]) == 0
    assert "AP last" in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in Path("out/table.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == ["alone", "distilled"]
    assert "True and detected boxes" in Path("out/report.html").read_text()
    losses = json.loads(Path("out/distilled/seed0/metrics.jsonl").read_text().splitlines()[0])
    assert any(name.startswith("loss/") and not name.startswith("loss/task") for name in losses)
    assert "<h2>Graphs" not in Path("out/alone/seed0/report.html").read_text()
