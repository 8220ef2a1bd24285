"""The detection task: distillation of detectors, runs, resumption, evaluation, and what a user may get wrong."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import gkd.cli
from gkd.config import configure
from gkd.detection import DetectorNetwork
from gkd.detection.torchvision import TorchvisionBackend
from gkd.losses import cwd_loss
from gkd.tasks.precision import coco_metrics, voc_metrics

OPTIONS = {"faster_rcnn": {"box_channels": 32, "anchor_sizes": (16, 24, 32, 48, 64)}, "retinanet": {}, "fcos": {}}
BASE = """
include 'gin/base/detection_distillation.gin'
include 'gin/base/graph_detection.gin'
STUDENT = 'resnet10'
TEACHER = 'resnet10'
RAMP = 0
BATCH_SIZE = 2
LR = 0.005
WEIGHT_DECAY = 1e-4
BACKGROUND = 3
GRID = 4
Detection.backend = 'torchvision'
Detection.data = @DigitScenes()
DigitScenes.size = 64
DigitScenes.num_train = 6
DigitScenes.num_test = 2
Trainer.device = 'cpu'
Trainer.loggers = ()
Trainer.check_teacher = False
"""
EVERY_TERM = ("REGION_VERTEX_WEIGHT = 1.0",)  # images of 64 pixels are too small for a graph of all levels
DIGITS = SimpleNamespace(num_classes=10, classes=tuple("0123456789"), category_ids=range(1, 11), min_size=(64,), max_size=64)
SCENES = ["Detection.data = @DigitScenes()", "DigitScenes.size = 128", "DigitScenes.num_train = 4", "DigitScenes.num_test = 2"]


def options(architecture: str) -> dict:
    return {"fpn_channels": 32, "norm": "batch", "trainable_layers": 5, **OPTIONS[architecture]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A configuration in a file, with a teacher's weights; gives the command line that uses it."""
    monkeypatch.chdir(tmp_path)

    def write(architecture="fcos", *lines: str) -> list[str]:
        weights = tmp_path / f"{architecture}.pth"
        if not weights.exists():
            network = DetectorNetwork(architecture, "resnet10", options=options(architecture))
            TorchvisionBackend().build_student(network, DIGITS).save(weights)
        text = [
            f"ARCHITECTURE = '{architecture}'",
            f"TEACHER_WEIGHTS = '{weights}'",
            f"DetectorNetwork.options = {options(architecture)}",
            *lines,
        ]
        (tmp_path / "run.gin").write_text(BASE + "\n".join(text) + "\n")
        return ["--gin", "run.gin"]

    return write


def build(*overrides):
    return configure(["run.gin"], overrides).build("Detection")


@pytest.fixture
def main():
    return lambda options: gkd.cli.main(["train", *options])


def spy(model) -> list[str]:
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.append(name.split(".")[0]))
    return called


def test_no_head_of_the_teacher_runs_unless_a_term_asks(files):
    files("faster_rcnn", *EVERY_TERM)
    for weight, heads in ((0.0, set()), (1.0, {"roi_heads"})):
        task = build(f"KD_WEIGHT = {weight}")
        called = spy(task.teacher.model)
        losses = task.distiller(*next(task.batches("train", 2)))
        assert set(called) == {"backbone"} | heads
        assert ("kd" in losses) == bool(heads)
        assert all(loss.isfinite() for loss in losses.values())
    names = {name.split("/")[0] for name in losses}
    assert names == {"task", "channels", "patches", "regions", "kd"}
    assert not any(name.startswith("teacher") for name in task.distiller.state_dict())


@pytest.mark.parametrize("term", ["channels", "patches", "regions", "kd"])
def test_each_term_reaches_every_parameter_below_it(files, term):
    files("faster_rcnn", "KD_WEIGHT = 1.0", *EVERY_TERM)
    task = build()
    task.distiller.train()
    losses = task.distiller(*next(task.batches("train", 2)))
    sum(loss for name, loss in losses.items() if name.split("/")[0] == term).backward()
    backbone = task.student.backbone
    reached = [name for name, parameter in backbone.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0]
    body = [name for name, _ in backbone.named_parameters() if name.startswith("body")]
    assert len(body) > 20
    # Every term sees p3 or p2, to which all stages contribute from above.
    assert set(body) <= set(reached)
    assert any(name.startswith("fpn.layer_blocks") for name in reached)
    if term == "kd":
        assert all(parameter.grad is not None for parameter in task.student.roi_heads.box_head.parameters())


@pytest.mark.parametrize("architecture", ["fcos", "retinanet"])
def test_class_logits_of_one_stage_detectors_at_all_places(files, architecture):
    files(architecture, "KD = @DenseKDLoss()", "KD_WEIGHT = 1.0")
    task = build()
    called = spy(task.teacher.model)
    heads = spy(task.teacher.model.head)
    batch = next(task.batches("train", 2))
    losses = task.distiller(*batch)
    assert set(called) == {"backbone", "head"}
    assert set(heads) == {"classification_head"}
    losses["kd"].backward()
    head = task.student.head
    assert all(parameter.grad is not None for parameter in head.classification_head.parameters())
    assert all(parameter.grad is None for parameter in head.regression_head.parameters())
    # The scores kept from the training pass are those that the maps give, in the order of the classes.
    output = task.detector.forward(batch[0], batch[1])
    assert torch.equal(output.dense_logits, task.detector.dense_logits(output.features))
    assert output.dense_logits.shape[2] == 10
    with pytest.raises(ValueError, match="two-stage"):
        task.detector.class_logits(output.features, [], (64, 64))


@pytest.mark.parametrize("method", ["cwd", "dsig", "fgd", "mgd", "pkd"])
def test_published_methods_combine_with_a_pair(files, method):
    files("fcos")
    task = configure(["run.gin", f"gin/methods/{method}.gin"], ()).build("Detection")
    losses = task.distiller(*next(task.batches("train", 2)))
    assert {f"{method}/{level}" for level in ("p3", "p4", "p5", "p6")} <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())


def test_vertices_of_sekd_are_channel_wise_distillation(files):
    files("fcos")
    task = configure(["run.gin", "gin/methods/sekd_detection.gin"], ()).build("Detection")
    images, targets, index = next(task.batches("train", 2))
    losses = task.distiller(images, targets, index)
    assert {f"sekd/{level}/{part}" for level in ("p3", "p4", "p5", "p6") for part in ("vertex", "edge", "spectral")} <= set(losses)
    features = task.distiller.features(images, targets)
    for level in ("p3", "p5"):
        expected = 10.0 * cwd_loss(features.adapted[level], features.teacher[level])
        assert losses[f"sekd/{level}/vertex"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["faster_rcnn", "fcos"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (2, 300)])
def test_images_with_any_number_of_boxes(files, architecture, counts):
    files(architecture, "KD_WEIGHT = 1.0" if architecture == "faster_rcnn" else "KD_WEIGHT = 0.0")
    task = build()
    images, targets, index = next(task.batches("train", 2))
    for target, count in zip(targets, counts, strict=True):
        low = torch.rand(count, 2) * 40
        target.update(boxes=torch.cat((low, low + 3 + torch.rand(count, 2) * 20), dim=1), labels=torch.randint(0, 10, (count,)))
    losses = task.distiller(images, targets, index)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.student.parameters() if parameter.grad is not None)


def test_a_run_resumes_bit_for_bit_and_its_student_loads_strictly(files, main, capsys, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    command = [*files("fcos"), "--seed", "1"]
    assert main(command) == 0
    results = json.loads((tmp_path / "runs/run/results.json").read_text())
    assert results["backend"] == "torchvision"
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "split"} <= set(results["final"])
    assert main([*command, "--output", "cut", "--set", "Trainer.max_steps = 1"]) == 0
    assert main([*command, "--output", "cut", "--resume"]) == 0
    whole, cut = (torch.load(tmp_path / folder / "student.pth", weights_only=True) for folder in ("runs/run", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    network = DetectorNetwork("fcos", "resnet10", options=options("fcos"))
    plain = TorchvisionBackend().build_student(network, DIGITS).model
    plain.load_state_dict(whole, strict=True)
    capsys.readouterr()
    assert main([*command, "--eval-only"]) == 0
    evaluated = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert evaluated["AP"] == results["final"]["AP"]


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["Distiller.taps = {'p9': 'p9'}", "Distiller.stages = {}"], "levels of FCOS, p3, p4, p5, p6, p7"),
        (["TEACHER_WEIGHTS = 'nowhere.pth'"], "file of weights at nowhere.pth"),
        (["TEACHER_WEIGHTS = None"], "weights of the teacher"),
        (["Detection.data = @COCO()", "COCO.root = 'nowhere'"], "cocodataset.org"),
        (["Detection.data = @VOC()", "VOC.root = 'nowhere'"], "folder of Pascal VOC"),
        (["KD_WEIGHT = 1.0"], "DenseKDLoss for the class logits of one-stage detectors"),
        (["Detection.batch_size = 100"], "at least one batch of 100 training images (got 6 images)"),
    ],
)
def test_mistakes_end_with_code_2(files, main, capsys, bindings, message):
    settings = [part for binding in bindings for part in ("--set", binding)]
    assert main([*files("fcos"), *settings]) == 2
    assert message in capsys.readouterr().err


def test_detectron2_demanded_but_absent(files, main, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert main([*files("fcos"), "--set", "Detection.backend = 'detectron2'"]) == 2
    assert "install.html" in capsys.readouterr().err


RECIPES = ["coco_r101_r18", "coco_r101_r50", "coco_r50_mv2", "coco_retinanet_r101_r50", "voc_r101_r50"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_take_a_step(name, files, tmp_path):
    architecture = "retinanet" if "retinanet" in name else "faster_rcnn"
    files(architecture)
    bindings = [
        *("STUDENT = 'resnet10'", "TEACHER = 'resnet10'", f"TEACHER_WEIGHTS = '{architecture}.pth'", "BATCH_SIZE = 2"),
        *("Detection.backend = 'torchvision'", "Trainer.device = 'cpu'", "student/DetectorNetwork.backbone_weights = None"),
        *(f"DetectorNetwork.options = {options(architecture)}", *SCENES),
    ]
    task = configure([f"gin/{name}.gin"], bindings).build("Detection")
    steps = 36000 if name.startswith("voc") else 180000
    assert task.trainer.total_steps(task.steps_per_epoch) == steps
    assert task.trainer.optimizer.lr == (0.005 if architecture == "retinanet" else 0.01)
    factors = [task.trainer.schedule(step, steps, 2) for step in (0, 1000, steps * 2 // 3, steps * 8 // 9)]
    assert factors == pytest.approx([0.001, 1, 0.1, 0.01])
    task.distiller.progress(2.0)
    losses = task.distiller(*next(task.batches("train", 2)))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "name",
    [
        "quickstart_detection",
        "detection/digit_scenes_teacher",
        "detection/voc_cpu",
        "detection/voc_cpu_teacher",
        "detection/raccoon",
        "detection/raccoon_teacher",
    ],
)
def test_small_recipes_build_and_take_a_step(name, files, tmp_path):
    bindings = [*SCENES, "BATCH_SIZE = 2", "STUDENT = 'resnet10'", "Trainer.device = 'cpu'", f"DetectorNetwork.options = {options('fcos')}"]
    if not name.endswith("teacher"):
        files("fcos")
        bindings += ["TEACHER = 'resnet10'", "TEACHER_WEIGHTS = 'fcos.pth'"]
    task = configure([f"gin/{name}.gin"], bindings).build("Detection")
    task.distiller.progress(2.0)
    losses = task.distiller(*next(task.batches("train", 2)))
    assert all(loss.isfinite() for loss in losses.values())
    terms = {loss.split("/")[0] for loss in losses}
    assert terms == ({"task"} if name.endswith("teacher") else {"task", "kd", "channels", "patches"})


def truth(*boxes, difficult=()):
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "difficult": int(i in difficult)}
        for i, box in enumerate(boxes)
    ]
    images = [{"id": 1, "height": 100, "width": 100}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}


def found(*boxes):
    return [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": 1 - i / 10} for i, box in enumerate(boxes)]


A, B, C, ELSEWHERE = [0, 0, 20, 20], [30, 0, 20, 20], [60, 0, 20, 20], [0, 70, 20, 20]


def test_voc_by_hand():
    # Found, wrong, found, of 2: precision 1 up to recall 1/2, then 2/3: (1 + 2/3) / 2.
    record = voc_metrics(truth(A, B), found(A, ELSEWHERE, B))
    assert record["AP50/a"] == pytest.approx(100 * 5 / 6)
    assert record["AP50/b"] is None
    assert record["AP50"] == record["AP50/a"]
    # A second detection of the same object is wrong: found, wrong, of 2.
    assert voc_metrics(truth(A, B), found(A, A))["AP50"] == pytest.approx(50)
    # What is found of a difficult object counts as nothing, and it is not missed.
    assert voc_metrics(truth(A, C, difficult=[1]), found(C, A))["AP50"] == 100
    assert voc_metrics(truth(A), [])["AP50"] == 0


def test_coco():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    record = coco_metrics(truth(A, B), found(A, B))
    assert record["AP"] == record["AP50"] == record["APs"] == record["AP/a"] == pytest.approx(100)
    assert record["APl"] is record["AP/b"] is None
    # Half the width: IoU 1/2, which counts at .5 alone of the ten.
    assert coco_metrics(truth(A), found([0, 0, 10, 20]))["AP"] == pytest.approx(10)
    assert coco_metrics(truth(A), []) == {**dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AP/a"), 0.0), "AP/b": None}


def test_pycocotools_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=r"pip install 'gkd\[detection\]'"):
        coco_metrics(truth(A), found(A))
