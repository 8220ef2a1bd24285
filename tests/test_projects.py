"""The commands as a user types them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from gkd.cli import main

RUN = """
Classification.data = @RandomImages()
RandomImages.num_train = 24
RandomImages.num_test = 12
RandomImages.num_classes = 4
Classification.batch_size = 12
Classification.student = @student/Network()
student/Network.name = 'resnet8'
Classification.trainer = @Trainer()
Trainer.epochs = 2
Trainer.loggers = ()
Trainer.check_teacher = False
Trainer.log_every = 1
"""


def load(repository: Path, name: str, project: str = "classification"):
    path = repository / "projects" / project / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{project}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train_net(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_text(RUN)
    return lambda *options: main(["train", "--gin", "run.gin", "--device", "cpu", *options])


def records(path: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(path, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def test_train_resume_evaluate_repeat(train_net, capsys, tmp_path):
    assert train_net("--seed", "3") == 0
    results = json.loads(Path("runs/run/results.json").read_text())
    assert results["seed"] == 3
    config = Path("runs/run/config.gin").read_text()
    assert "Classification.seed = 3" in config

    # Stopped and resumed: the same log and the same student.
    assert train_net("--seed", "3", "--output", "cut", "--set", "Trainer.max_steps = 1") == 0
    assert train_net("--seed", "3", "--output", "cut", "--resume") == 0
    assert "other bindings than the run had: Trainer.max_steps = None" in capsys.readouterr().out
    assert records("cut") == records("runs/run")
    assert Path("cut/student.safetensors").read_bytes() == Path("runs/run/student.safetensors").read_bytes()

    # The run folder's own configuration repeats the run.
    Path("run.gin").write_text(config)
    assert train_net("--output", "again") == 0
    assert records("again") == records("runs/run")
    assert Path("again/config.gin").read_text() == config

    assert train_net("--output", "again", "--eval-only", "--export", "torch") == 0
    printed = json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{")))
    assert printed["top1"] == results["final"]["top1"]
    assert Path("again/student.pt2").is_file()
    assert not (tmp_path / "runs" / "config").exists()


def test_a_used_folder_is_refused_and_overwritten_on_request(train_net, capsys):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/metrics.jsonl").write_text("old\n")
    assert train_net("--set", "Trainer.epochs = 1") == 2
    assert "--resume" in capsys.readouterr().err
    assert train_net("--set", "Trainer.epochs = 1", "--overwrite") == 0
    assert "old" not in Path("runs/run/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "Trainer.epoch = 1"], r"Did you mean epochs\?"),
        (["--set", "Trainr.epochs = 1"], r"Did you mean Trainer\?"),
        (["--set", "studnet/Network.name = 'vgg8'"], "which nothing reads"),
        (["--set", "student/Network.name = 'resnet7'"], r"while building Classification"),
        (["--set", "student/Network.weights = 'nowhere.pt'"], "nowhere.pt"),
        (["--set", "Classification.data = @CIFAR100()", "--set", "CIFAR100.root = 'nowhere'"], "nowhere"),
        (["--set", "Distiller.taps = {'deep': ('layer3', 'layer3')}", "--set", "Distiller.weights = {'kdd': 1.0}"], "kdd"),
        (["--gin", "nowhere.gin"], "nowhere.gin"),
        (["--eval-only"], "Expected a checkpoint"),
        (["--device", "tpu"], "--device"),
        (["--set", "Classification.batch_size = 25"], "25"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(train_net, capsys, options, message):
    assert train_net(*options) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert "In call to configurable" not in captured.err
    assert not any(Path("runs").glob("*/*"))


def test_own_networks_and_images_as_the_readme_says(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, number in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (72, 80, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / part / name / f"{index}.png")
    text = (repository / "docs" / "classification.md").read_text()
    section = re.search(r"^## Your own networks and images\n(.*?)^## ", text, re.M | re.S)[1]
    for block in re.finditer(r"^```(?:python|gin)\n(.*?)^```", section, re.M | re.S):
        name = re.findall(r"`(\w+\.(?:py|gin))`", section[: block.start()])[-1]
        (tmp_path / name).write_text(block[1])
    train = lambda options: main(["train", *options])  # noqa: E731
    short = ["--set", "EPOCHS = 1", "--set", "BATCH_SIZE = 8", "--set", "ImageFolder.num_workers = 0", "--no-report", "--device", "cpu"]
    short += ["--set", "Trainer.check_teacher = False"]  # so short a training leaves the teacher guessing
    assert train(["--gin", "photos_teacher.gin", *short]) == 0
    assert train(["--gin", "photos_small.gin", *short]) == 0
    assert train(["--gin", "photos_small.gin", "--gin", "gin/base/alone.gin", "--output", "runs/photos_alone", *short]) == 0
    results = json.loads(Path("runs/photos_small/results.json").read_text())
    assert results["student"] == "my_nets:small"
    assert results["final"]["agreement"] is not None
    losses = json.loads(Path("runs/photos_small/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/kd", "loss/graph/middle/vertex", "loss/graph/last/edge"} <= losses.keys()


def test_debug_shows_the_traceback(train_net, capsys):
    assert train_net("--set", "Trainer.epoch = 1", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def distil(train_net, tmp_path):
    from gkd.models import build_classifier

    torch.save(build_classifier("resnet8", num_classes=4).state_dict(), tmp_path / "teacher.pt")
    pair = [
        "Classification.teacher = @teacher/Network()",
        "teacher/Network.name = 'resnet8'",
        "teacher/Network.weights = 'teacher.pt'",
        "Classification.distiller = @Distiller",
    ]
    return lambda *bindings: train_net(*(option for binding in [*pair, *bindings] for option in ("--set", binding)))


def test_a_wrong_tap_names_the_stage(distil, capsys):
    assert distil("Distiller.terms = {'at': @ATLoss()}", "Distiller.taps = {'deep': ('layer4', 'layer3')}") == 2
    assert "layer4" in capsys.readouterr().err


def test_what_only_the_features_show_is_a_mistake_too(distil, capsys):
    graph = ["GraphLoss.builder = @GraphBuilder()", "GraphBuilder.nodes = @PatchNodes()", "GraphBuilder.edges = @KNNEdges()"]
    term = ["Distiller.terms = {'graph': @GraphLoss()}", "GraphLoss.terms = {'edge': @EdgeLoss()}", "Distiller.taps = {'deep': 'layer3'}"]
    assert distil(*graph, *term, "PatchNodes.grid = 2", "KNNEdges.k = 4") == 2
    error = capsys.readouterr().err
    assert "Expected k <= 3" in error
    assert "--debug" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_the_published_teacher_has_its_accuracy(repository, shared_data, cifar100_root, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    weights = shared_data / "weights" / "cifar100_resnet56-f2eff4c8.pt"
    bindings = ["--set", f"DATA = '{cifar100_root}'", "--set", f"WEIGHTS = '{weights}'"]
    options = ["--gin", "gin/classification/cifar100_resnet56_published.gin", "--eval-only", *bindings]
    assert main(["train", *options]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["top1"] == pytest.approx(72.63, abs=0.05)
    assert record["top5"] == pytest.approx(91.94, abs=0.05)


@pytest.mark.parametrize("project", ["classification", "detection"])
@pytest.mark.parametrize("program", ["train_net", "quickstart"])
def test_clients_are_thin(repository, project, program):
    lines = (repository / "projects" / project / f"{program}.py").read_text().splitlines()
    assert len(lines) < 30


def test_help_names_the_options(train_net, capsys):
    with pytest.raises(SystemExit, match="0"):
        train_net("--help")
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--gin", "--set", "--output", "--resume", "--eval-only", "--seed", "--device", "--export"))
