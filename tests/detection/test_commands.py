"""The commands for COCO and Pascal VOC on real images, stopped and resumed, with both libraries; their students in the plain libraries."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import gkd.cli
from gkd.data import COCO, VOC
from gkd.detection import DetectorNetwork

STEPS, STOP = 20, 10
SPLITS = {"VOC.train": ["VOC2007/train"], "VOC.test": ["VOC2007/val"]}
RECIPES = {"coco_r101_r18": ("COCO", "coco", "resnet18", 80), "voc_r101_r50": ("VOC", "VOCdevkit", "resnet50", 20)}


@pytest.fixture
def main():
    return lambda options: gkd.cli.main(["train", *options])


def command(recipe: str, shared_data: Path, teacher: Path) -> list[str]:
    """The command of a recipe for a small part of the data, few steps and small images."""
    kind, folder, _, _ = RECIPES[recipe]
    bindings = {
        "DATA": str(shared_data / folder),
        f"{kind}.min_size": 128,
        f"{kind}.max_size": 200,
        **(SPLITS if kind == "VOC" else {}),
        "STEPS": STEPS,
        "MILESTONES": (15, 18),
        "WARMUP": 2,
        "BATCH_SIZE": 2,
        "LR": 1e-3,  # from random weights
        "student/DetectorNetwork.backbone_weights": None,
        "TEACHER_WEIGHTS": str(teacher),
        "Trainer.log_every": 5,
    }
    settings = [part for name, value in bindings.items() for part in ("--set", f"{name} = {value!r}")]
    return ["--gin", f"gin/{recipe}.gin", "--device", "cpu", *settings]


def data_of(recipe: str, shared_data: Path):
    kind, folder, _, _ = RECIPES[recipe]
    return COCO(shared_data / folder) if kind == "COCO" else VOC(shared_data / folder, train=["VOC2007/train"], test=["VOC2007/val"])


def stopped_and_resumed(main, options: list[str], output: Path, checkpoint: str) -> None:
    """Trains to the middle and, in a second call, to the end; looks at what the run folder holds."""
    assert main([*options, "--output", str(output), "--set", f"Trainer.max_steps = {STOP}"]) == 0
    assert not (output / "results.json").exists()
    assert main([*options, "--output", str(output), "--resume"]) == 0
    files = {path.name for path in output.iterdir()}
    assert {"config.gin", "metrics.jsonl", "checkpoints", "student.safetensors", checkpoint} <= files
    assert {"results.json", "report.html", "tensorboard"} <= files
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [5, 10, 15, 20]
    terms = {name.split("/")[1] for name in train[-1] if name.startswith("loss/")}
    assert terms == {"task", "channels", "patches"}
    final = json.loads((output / "results.json").read_text())["final"]
    assert final["step"] == STEPS
    assert 0 <= final["AP50"] <= 100
    assert any(name.startswith("AP50/" if "voc" in output.name else "AP/") for name in final)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_torchvision(recipe, main, shared_data, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from gkd.detection.torchvision import TorchvisionBackend

    _, _, student, classes = RECIPES[recipe]
    data = data_of(recipe, shared_data)
    TorchvisionBackend().build_student(DetectorNetwork("faster_rcnn", "resnet101"), data).save(tmp_path / "R101.pth")
    options = [*command(recipe, shared_data, tmp_path / "R101.pth"), "--set", "Detection.backend = 'torchvision'"]
    stopped_and_resumed(main, options, tmp_path / recipe, "student.pth")

    backbone = resnet_fpn_backbone(backbone_name=student, weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5)
    plain = detection.FasterRCNN(backbone, classes + 1)
    plain.load_state_dict(torch.load(tmp_path / recipe / "student.pth", weights_only=True), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_detectron2(recipe, main, shared_data, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed: https://detectron2.readthedocs.io")
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from gkd.detection.d2.config import find_config

    _, _, student, classes = RECIPES[recipe]
    config = get_cfg()
    config.merge_from_file(str(find_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")))
    config.MODEL.DEVICE = "cpu"
    config.MODEL.ROI_HEADS.NUM_CLASSES = classes
    weights = {name: tensor.numpy() for name, tensor in build_model(config).state_dict().items()}
    with open(tmp_path / "R101.pkl", "wb") as file:  # as the model zoo stores its networks
        pickle.dump({"model": weights, "__author__": "test"}, file)
    options = [*command(recipe, shared_data, tmp_path / "R101.pkl"), "--set", "Detection.backend = 'detectron2'"]
    stopped_and_resumed(main, options, tmp_path / recipe, "student.pth")

    own = get_cfg()
    own.merge_from_file(str(tmp_path / recipe / "student.yaml"))
    own.MODEL.DEVICE = "cpu"
    plain = build_model(own)
    missing = DetectionCheckpointer(plain).load(str(tmp_path / recipe / "student.pth"))
    assert not missing.get("matching_heuristics")
    state = torch.load(tmp_path / recipe / "student.pth", weights_only=True)["model"]
    plain.load_state_dict(state, strict=True)
    assert student.removeprefix("resnet") == str(own.MODEL.RESNETS.DEPTH)
