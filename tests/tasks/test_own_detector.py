"""The page about one's own detector: its gin file trains on a fresh folder of images, and its program reads the student."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import gkd.cli
from tests.detection.shapes import write_shapes

FAST = {
    "STUDENT": "resnet10",
    "BATCH_SIZE": 2,
    "COCO.min_size": 64,
    "COCO.max_size": 64,
    "COCO.num_workers": 0,
    "Trainer.epochs": 1,
    "Trainer.device": "cpu",
    "Trainer.loggers": (),
    "Trainer.check_teacher": False,
    "DetectorNetwork.options": {"fpn_channels": 64, "norm": "batch", "score_thresh": 0.0},
}


def test_the_page(repository, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    page = (repository / "docs/detection.md").read_text()
    (gin,), (program,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("gin", "python"))
    monkeypatch.chdir(tmp_path)
    shapes = write_shapes(tmp_path / "shapes", num_train=8)
    (tmp_path / "mine").mkdir()
    shutil.copytree(shapes / "train2017", tmp_path / "mine/images")
    shutil.copy(shapes / "annotations/instances_train2017.json", tmp_path / "mine/labels.json")
    shutil.copy(shapes / "val2017/1.png", tmp_path / "photo.jpg")
    (tmp_path / "mine.gin").write_text(gin)
    settings = [part for name, value in FAST.items() for part in ("--set", f"{name} = {value!r}")]

    alone = ["--gin", "mine.gin", "--gin", "gin/base/alone.gin", "--set", "Detection.teacher = None", *settings, "--no-report"]
    assert gkd.cli.main(["train", *alone, "--output", "runs/mine_teacher"]) == 0
    assert (
        gkd.cli.main(
            ["train", "--gin", "mine.gin", *settings, "--set", "TEACHER = 'resnet10'", "--set", "GRID = 2", "--output", "runs/mine"]
        )
        == 0
    )
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert results["chosen_on"] == "val"
    assert results["final"]["split"] == "test"
    assert {"AP", "AP50", "AP75"} <= set(results["final"])
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 0
    capsys.readouterr()
    exec(compile(program, "detection.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")
