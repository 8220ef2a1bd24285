from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gkd.cli import main
from gkd.data import DigitSceneMasks
from gkd.engine import Trainer
from gkd.errors import UserError
from gkd.losses import KDLoss
from gkd.tasks import Segmentation, SegmentationNetwork, load_segmenter
from gkd.tasks.segmentation import PixelLoss, SegmentationPair

IGNORED = 255
SMALL = [
    "DigitSceneMasks.size = 32",
    "DigitSceneMasks.num_train = 8",
    "DigitSceneMasks.num_test = 4",
    "BATCH_SIZE = 4",
    "Trainer.precision = '32-true'",
    "Trainer.device = 'cpu'",
    "EPOCHS = 1",
]


def options(bindings: list[str]) -> list[str]:
    return [option for binding in bindings for option in ("--set", binding)]


class Oracle(nn.Module):
    """Knows the masks by heart, by the images' first pixel row."""

    def __init__(self, data: DigitSceneMasks) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        images, targets, _ = next(data.batches("test", 4))
        self.images, self.targets, self.num_classes = images, targets, data.num_classes

    def forward(self, images):
        nearest = torch.cdist(images.flatten(1), self.images.flatten(1)).argmin(1)
        return {"out": self.scale * F.one_hot(self.targets[nearest], self.num_classes).movedim(-1, 1).float()}


def oracle(num_classes: int) -> nn.Module:
    return Oracle(DigitSceneMasks(size=32, num_train=4, num_test=4))


@pytest.fixture
def task():
    data = DigitSceneMasks(size=32, num_train=4, num_test=4)
    return Segmentation(SegmentationNetwork(f"{__name__}:oracle"), data=data, batch_size=4, trainer=Trainer(device="cpu"))


def test_perfect_masks_have_100_percent(task):
    record = task.evaluate("test")
    assert record["mIoU"] == record["pixels"] == 100.0
    occurring = set(task.student.targets.unique().tolist())
    for number, name in enumerate(task.data.classes):
        assert record[f"IoU/{name}"] == (100.0 if number in occurring else None)


def test_mean_iou_by_hand(task):
    # The first image is called background altogether: the IoU of a class is what is right over what is right, missed or invented.
    wrong = task.student.targets.clone()
    wrong[0] = 0
    truth, task.student.targets = task.student.targets, wrong
    record = task.evaluate("test")
    shares = []
    for number in truth.unique().tolist():
        right = ((truth == number) & (wrong == number)).sum()
        shares.append(100 * float(right / ((truth == number) | (wrong == number)).sum()))
    assert record["mIoU"] == pytest.approx(sum(shares) / len(shares))
    assert record["pixels"] == pytest.approx(100 * float((truth == wrong).float().mean()))


def test_ignored_pixels_have_no_loss_and_no_gradient():
    student = torch.randn(2, 5, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 5, 8, 8)
    targets = torch.randint(5, (2, 4, 4))
    targets[:, :2] = IGNORED
    pair = SegmentationPair(IGNORED)
    own, goal, classes = pair.logits({"out": student}, {"out": teacher}, targets)
    assert own.shape == goal.shape == (32, 5)
    assert classes.max() < 5
    losses = PixelLoss(IGNORED)({"out": student, "aux": student}, targets)
    assert losses["auxiliary"] == 0.5 * losses["pixels"]
    torch.testing.assert_close(losses["pixels"], F.cross_entropy(student, targets, ignore_index=IGNORED))
    (losses["pixels"] + KDLoss()(own, goal, classes)).backward()
    assert (student.grad[:, :, :2] == 0).all()
    assert (student.grad[:, :, 2:] != 0).any()
    nothing = PixelLoss(IGNORED)(student.detach(), torch.full_like(targets, IGNORED))
    assert nothing["pixels"] == 0


def test_train_resume_report_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = ["train", "--gin", "gin/segmentation/digit_scenes_teacher.gin", "--output", "runs/quickstart/segmentation/teacher"]
    assert main([*teacher, *options(SMALL), "--no-report"]) == 0
    command = ["train", "--gin", "gin/quickstart_segmentation.gin", *options([*SMALL, "GRID = 2"])]
    assert main([*command, "--output", "whole"]) == 0
    assert main([*command, "--output", "cut", "--set", "Trainer.max_steps = 1", "--no-report"]) == 0
    assert main([*command, "--output", "cut", "--resume", "--no-report"]) == 0
    assert Path("whole/student.safetensors").read_bytes() == Path("cut/student.safetensors").read_bytes()
    results = json.loads(Path("whole/results.json").read_text())
    assert results["score"] == "mIoU"
    assert 0 <= results["final"]["mIoU"] <= 100
    losses = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/task/pixels", "loss/kd", "loss/cwd/low", "loss/graph/high/edge"} <= losses.keys()
    report = Path("whole/report.html").read_text()
    assert "True and predicted masks" in report
    assert "Graphs of student and teacher" in report

    model, description = load_segmenter("whole/student.safetensors")
    assert not model.training
    assert description["classes"][:2] == ["background", "0"]
    with pytest.raises(UserError, match="segmentation network of torchvision"):
        load_segmenter("nowhere.safetensors")


def test_a_teacher_of_other_classes_is_refused(tmp_path, monkeypatch):
    from gkd.engine.folder import save_student

    monkeypatch.chdir(tmp_path)
    network = SegmentationNetwork("lraspp_mobilenet_v3_large")
    save_student(Path("teacher.safetensors"), network.build(11), {"classes": [*map(str, range(10)), "background"]})
    data = DigitSceneMasks(size=32, num_train=4, num_test=4)
    with pytest.raises(UserError, match=r"classes of the data in their order, background, 0, 1, ... \(got 0, 1, 2"):
        Segmentation(
            network, SegmentationNetwork(network.name, "teacher.safetensors"), data=data, batch_size=4, trainer=Trainer(device="cpu")
        )


def test_unknown_networks_are_named():
    with pytest.raises(ValueError, match="fcn_resnet50"):
        SegmentationNetwork("fcn_resnet5").build(3)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_places_of_the_shipped_pairs_exist_in_residual_networks(name):
    network = SegmentationNetwork(name, options={"aux_loss": True}).build(3)
    assert {"backbone.layer2", "backbone.layer4"} <= {path for path, _ in network.named_modules()}
