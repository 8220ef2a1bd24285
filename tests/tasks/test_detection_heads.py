"""Masks, keypoints, boxes and crossed heads through the task: learned, distilled, judged, resumed, and loaded by the plain library."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gkd.data import COCO, DigitScenes
from gkd.detection import DetectorNetwork, Regions, load_detector
from gkd.detection.torchvision import TorchvisionBackend
from gkd.distill import Distiller
from gkd.engine import RunFolder, Trainer
from gkd.errors import UserError
from gkd.losses import CrossKDLoss, DenseKDLoss, KDLoss, LDLoss, MaskKDLoss
from gkd.tasks.detection import Detection
from tests.detection.shapes import write_shapes

SMALL = {"fpn_channels": 32, "norm": "batch", "trainable_layers": 5}
HEADS = {
    "faster_rcnn": {"box_channels": 16},
    "mask_rcnn": {"box_channels": 16, "mask_channels": 8, "box_score_thresh": 0.0, "box_detections_per_img": 4},
    "keypoint_rcnn": {"box_channels": 16, "keypoint_channels": 8, "box_score_thresh": 0.0, "box_detections_per_img": 4},
}


def network(architecture: str, weights=None, **options) -> DetectorNetwork:
    return DetectorNetwork(architecture, "resnet10", weights=weights, options={**SMALL, **HEADS.get(architecture, {}), **options})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def data_of(shapes, **options) -> COCO:
    return COCO(shapes, min_size=64, max_size=64, num_workers=0, **options)


def task_of(data, student, teacher=None, terms=None, steps=2, **settings) -> Detection:
    return Detection(
        student=student,
        teacher=teacher,
        data=data,
        backend="torchvision",
        regions=Regions(background=2, proposals=16),
        distiller=partial(Distiller, terms=terms or {}),
        trainer=Trainer(steps=steps, device="cpu", loggers=(), log_every=1, check_teacher=False, **settings),
        batch_size=2,
        eval_batch_size=2,
    )


def teacher_file(architecture, data, folder, **options):
    TorchvisionBackend().build_student(network(architecture, **options), data).save(folder / f"{architecture}.pth")
    return str(folder / f"{architecture}.pth")


@pytest.mark.parametrize(
    ("architecture", "what", "number"), [("mask_rcnn", "masks", "segm_AP"), ("keypoint_rcnn", "keypoints", "keypoint_AP")]
)
def test_masks_and_keypoints_are_learned_judged_and_resumed(architecture, what, number, shapes, tmp_path):
    data = data_of(shapes, **{what: True})
    teacher = network(architecture, teacher_file(architecture, data, tmp_path))
    terms = {"kd": KDLoss(), **({"masks": MaskKDLoss()} if what == "masks" else {})}
    states = {}
    for name, stops in (("whole", [None]), ("parts", [1, None])):
        folder = RunFolder(tmp_path / name)
        for stop in stops:
            folder.prepare(resume=stop is None and len(stops) > 1)
            task = task_of(data, network(architecture), teacher, terms, max_steps=stop)
            results = task.train(folder, resume=stop is None and len(stops) > 1)
        states[name] = torch.load(folder.path / "student.pth", weights_only=True)
    assert all(torch.equal(tensor, states["whole"][name]) for name, tensor in states["parts"].items())
    assert 0 <= results["final"][number] <= 100
    assert f"loss/task/loss_{what.rstrip('s')}" in (folder.path / "metrics.jsonl").read_text()
    # The plain library, told nothing but what the file says, gives the same.
    model, _ = load_detector(folder.path)
    model.load_state_dict(states["whole"], strict=True)
    images, _, _ = next(iter(task.eval_batches("test")))
    with torch.no_grad():
        plain = model([image / 255 for image in images])
    for theirs, ours in zip(plain, task.detector.detect(images), strict=True):
        assert len(ours.boxes) > 0
        torch.testing.assert_close(theirs["boxes"], ours.boxes, atol=1e-4, rtol=0)
        if what == "masks":
            assert torch.equal(theirs["masks"][:, 0] >= 0.5, ours.masks)


@pytest.mark.parametrize("architecture", ["mask_rcnn", "keypoint_rcnn"])
def test_data_without_what_the_network_learns(architecture, shapes):
    with pytest.raises(UserError, match=r"Expected (masks|keypoints) in the data for .* with COCO\.\1 = True"):
        task_of(data_of(shapes), network(architecture))


def scenes() -> DigitScenes:
    return DigitScenes(size=64, num_train=4, num_test=2)


@pytest.mark.parametrize("architecture", ["fcos", "retinanet"])
def test_boxes_of_one_stage_detectors(architecture, tmp_path):
    data = scenes()
    task = task_of(data, network(architecture), network(architecture, teacher_file(architecture, data, tmp_path)), {"ld": LDLoss()})
    losses = task.distiller(*next(task.batches("train", 2)))
    losses["ld"].backward()
    head = task.student.head
    assert all(parameter.grad is None for parameter in head.classification_head.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in head.regression_head.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [("fcos", "faster_rcnn", KDLoss()), ("faster_rcnn", "fcos", DenseKDLoss()), ("fcos", "fcos", DenseKDLoss())],
)
def test_the_teachers_head_reads_the_students_maps(student, teacher, loss, tmp_path):
    """Also where one has proposals and the other has not: levels of the same stride are the same."""
    data = scenes()
    task = task_of(data, network(student), network(teacher, teacher_file(teacher, data, tmp_path)), {"cross": CrossKDLoss(loss)})
    losses = task.distiller(*next(task.batches("train", 2)))
    assert losses["cross"].item() > 0
    losses["cross"].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in task.student.backbone.parameters())
    heads = task.student.roi_heads if student == "faster_rcnn" else task.student.head
    assert all(parameter.grad is None for parameter in [*heads.parameters(), *task.teacher.parameters()])


def test_what_unlike_detectors_cannot_compare(tmp_path):
    data = scenes()
    teacher = network("faster_rcnn", teacher_file("faster_rcnn", data, tmp_path))
    with pytest.raises(UserError, match="compare unlike detectors by CrossKDLoss"):
        task_of(data, network("fcos"), teacher, {"kd": KDLoss()})
    task = task_of(data, network("fcos", fpn_channels=16 * 4), teacher, {"cross": CrossKDLoss(KDLoss())})
    with pytest.raises(UserError, match="Give the student's pyramid the teacher's channels"):
        task.distiller(*next(task.batches("train", 2)))


def test_stages_of_the_backbone_may_be_tapped(tmp_path):
    data = scenes()
    task = task_of(data, network("fcos"), network("fcos", teacher_file("fcos", data, tmp_path)))
    taps = task.distiller.networks.student_taps(task.student, ["p3", "backbone.body.layer3"])
    _, maps = taps(*next(task.batches("train", 2))[:2])
    assert maps["backbone.body.layer3"].shape[1:] == (256, 4, 4)
    assert taps.shapes((3, 64, 64))["backbone.body.layer3"] == maps["backbone.body.layer3"].shape
    with pytest.raises(ValueError, match=r"backbone\.body\.layer3"):
        task.distiller.networks.student_taps(task.student, ["backbone.body.layer33"])
