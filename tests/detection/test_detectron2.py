from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision import models

from gkd.detection import DetectorNetwork, detectron2_config
from gkd.detection.detectron2 import Detectron2Backend, configure
from gkd.detection.detectron2_config import INSTALL_PAGE, build_detector, is_available, read_config
from gkd.detection.detectron2_weights import config_of_weights
from gkd.errors import UserError

needs_detectron2 = pytest.mark.skipif(not is_available(), reason=f"Detectron2 is not installed: {INSTALL_PAGE}")

DATA = SimpleNamespace(num_classes=3, classes=("a", "b", "c"), category_ids=(1, 2, 3))
SMALL = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
}
DENSE = {"MODEL.FPN.OUT_CHANNELS": 16, "MODEL.RETINANET.NUM_CONVS": 1}


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes or ((64, 90), (70, 60))]


def target(*boxes: tuple[float, float, float, float]) -> dict:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.arange(len(boxes)) % 3, "image_id": 1, "size": (64, 64)}


def student(architecture: str = "faster_rcnn", backbone: str = "resnet18", options: dict | None = None, **settings: object):
    options = (SMALL if architecture == "faster_rcnn" else DENSE if architecture == "retinanet" else {}) if options is None else options
    detector = Detectron2Backend().build_student(DetectorNetwork(architecture, backbone, options=options, **settings), DATA)
    detector.model.train()
    return detector


def draw_statistics(model: torch.nn.Module) -> None:
    """Gives batch norms what a training would leave, so that a map of wrong names is seen."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert set(theirs) <= set(ours)
    assert theirs
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_absent(monkeypatch):
    monkeypatch.setattr(detectron2_config, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"Expected Detectron2 .* Install it as https://detectron2\.readthedocs\.io.*install\.html"):
        Detectron2Backend()


# ---------------------------------------------------------------- networks


@needs_detectron2
@pytest.mark.parametrize(
    ("architecture", "backbone", "options", "levels", "two_stage"),
    [
        ("faster_rcnn", "resnet18", {**SMALL, "MODEL.RESNETS.NORM": "SyncBN"}, "p2 p3 p4 p5 p6", True),
        ("faster_rcnn", "mobilenet_v2", SMALL, "p2 p3 p4 p5 p6", True),
        ("retinanet", "mobilenet_v3_large", DENSE, "p3 p4 p5 p6 p7", False),
        ("fcos", "resnet18", {}, "p3 p4 p5 p6 p7", False),
    ],
)
def test_a_pass_of_a_student(architecture, backbone, options, levels, two_stage):
    detector = student(architecture, backbone, options)
    assert (detector.levels, detector.two_stage) == (tuple(levels.split()), two_stage)
    images = pictures()
    output = detector.forward(images, [target((4, 5, 40, 50), (10, 10, 60, 30)), target((3, 3, 50, 60))])
    # 64 x 90 and 70 x 60 together are 70 x 90, and 96 x 96 is the next that 32 divides.
    assert output.image_size == detector.image_size(images) == (96, 96)
    assert detector.image_size(images[:1]) == (64, 96)
    for level in detector.levels:
        side = -(-96 // 2 ** int(level[1]))
        assert output.features[level].shape[2:] == (side, side)
    assert list(output.features) == list(detector.levels)
    assert (output.proposals is not None) == two_stage
    if output.proposals is not None:
        assert [box.shape[1] for box in output.proposals] == [4, 4]
        assert not any(box.requires_grad for box in output.proposals)

    sum(output.losses.values()).backward()
    lacking = [name for name, parameter in detector.model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not lacking
    # Maps are what the losses came from: a term on them alone reaches the backbone too.
    detector.model.zero_grad()
    again = detector.forward(images, [target(), target()])
    sum(feature.square().mean() for feature in again.features.values()).backward()
    backbone_parameters = [p for p in detector.model.backbone.parameters() if p.requires_grad]
    assert backbone_parameters
    assert all(parameter.grad is not None for parameter in backbone_parameters)

    detections = detector.detect(images)
    assert detector.model.training
    assert len(detections) == 2
    assert all((found.scores.diff() <= 0).all() for found in detections)


@needs_detectron2
@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet", "fcos"])
def test_degenerate_batches_have_finite_losses(architecture):
    detector = student(architecture)
    corner = torch.rand(300, 2) * 40
    crowded = {**target(), "boxes": torch.cat([corner, corner + 2 + torch.rand(300, 2) * 20], 1), "labels": torch.arange(300) % 3}
    for targets in ([target(), target()], [target((1, 1, 30, 30)), target()], [crowded, target()]):
        detector.model.zero_grad()
        losses = detector.forward(pictures(), targets).losses
        assert losses
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in detector.model.parameters())


@needs_detectron2
def test_norms_and_frozen_stages():
    """At random nothing is frozen; with weights the stem and res2 are, as Detectron2 has it."""
    from detectron2.layers import FrozenBatchNorm2d

    def frozen(config):
        model = build_detector(config)
        count = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
        return count, [name for name, p in model.backbone.bottom_up.named_parameters() if not p.requires_grad]

    for backbone in ("resnet18", "mobilenet_v2"):
        network = DetectorNetwork(backbone=backbone, options=SMALL)
        assert frozen(configure(network, None, None, 3)) == (0, [])
        count, names = frozen(configure(network, None, "file.pth", 3))
        assert count > 0
        start = ("stem.", "res2.") if backbone == "resnet18" else tuple(f"features.{number}." for number in range(4))
        assert names
        assert all(name.startswith(start) for name in names)


@needs_detectron2
def test_one_stage_normalizer_is_kept():
    detector = student("retinanet")
    before = detector.model.loss_normalizer.clone()
    detector.forward(pictures(), [target((4, 5, 40, 50)), target()])
    assert detector.model.loss_normalizer != before
    whole = torch.nn.ModuleDict({"student": detector.model})
    assert whole.state_dict()["student.loss_normalizer"] == detector.model.loss_normalizer
    state = detector.model.state_dict()
    assert "loss_normalizer" not in state  # the model alone is Detectron2's
    detector.model.load_state_dict(state, strict=True)
    plain = copy.deepcopy(detector.model)
    del plain.loss_normalizer  # Detectron2's own keeps a plain number, from 100 on
    del detector.model.loss_normalizer
    detector.model.register_buffer("loss_normalizer", torch.tensor(100.0))
    images, targets = pictures(), [target((4, 5, 40, 50)), target()]
    ours = detector.forward(images, targets).losses
    detector.model = plain
    theirs = detector.forward(images, targets).losses
    assert isinstance(plain.loss_normalizer, float)
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory) -> Path:
    """A network of the model zoo's layout with weights drawn at random, in the model zoo's format."""
    if not is_available():
        pytest.skip(f"Detectron2 is not installed: {INSTALL_PAGE}")
    torch.manual_seed(0)
    model = plain_teacher()
    draw_statistics(model)
    path = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "a test"}))
    return path


def plain_teacher(weights: Path | None = None) -> torch.nn.Module:
    """The same by Detectron2 alone."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.merge_from_file(str(detectron2_config.find_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")))
    config.merge_from_list([entry for pair in SMALL.items() for entry in pair])
    config.MODEL.DEVICE = "cpu"
    config.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model = build_model(config).eval()
    if weights is not None:
        DetectionCheckpointer(model).load(str(weights))
    return model


TEACHER = DetectorNetwork(config="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", options=SMALL)


@needs_detectron2
def test_a_bgr_teacher_of_an_rgb_student_sees_what_it_sees_alone(zoo_file, tmp_path):
    from detectron2.data.dataset_mapper import DatasetMapper
    from PIL import Image

    teacher = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), config=TEACHER.config, options=SMALL), DATA)
    assert (student().reverses_channels, teacher.reverses_channels) == (False, True)
    assert student().model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert teacher.model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])

    images = pictures()
    entries = []
    for number, image in enumerate(images):
        file = tmp_path / f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        entries.append(DatasetMapper(is_train=False, augmentations=[], image_format="BGR")({"file_name": str(file)}))
    alone = plain_teacher(zoo_file)
    with torch.no_grad():
        theirs = alone.backbone(alone.preprocess_image(entries).tensor)
        ours = teacher.features(images)
        # The public code that subtracts one network's means from the other's channels would be seen here.
        wrong = teacher.features([image.flip(0) for image in images])
    assert difference(ours, theirs) < 1e-5
    assert difference(wrong, theirs) > 1e-3


@needs_detectron2
@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_no_head_is_called_for_features(architecture):
    detector = student(architecture)
    detector.model.eval()
    heads = [detector.model.proposal_generator, detector.model.roi_heads] if detector.two_stage else [detector.model.head]
    called = []
    for part in [module for head in heads for module in head.modules()]:
        part.register_forward_hook(lambda module, inputs, output: called.append(type(module).__name__))
    detector.features(pictures())
    assert not called
    detector.detect(pictures())
    assert called


@needs_detectron2
def test_a_teacher_is_frozen_and_needs_weights(zoo_file):
    with pytest.raises(UserError, match=r"Expected weights of the teacher \(got none\)"):
        Detectron2Backend().build_teacher(TEACHER, DATA)
    teacher = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL), DATA)  # by the layout of a .pkl
    assert teacher.reverses_channels
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    others = SimpleNamespace(num_classes=4)
    with pytest.raises(UserError, match=r"cls_score.*num_classes"):
        Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL), others)
    kept = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL, num_classes=3), others)
    images = pictures()
    with pytest.raises(UserError, match="the classes of the data"):
        kept.class_logits(kept.features(images), [torch.tensor([[0.0, 0, 9, 9]])] * 2, kept.image_size(images))
    with pytest.warns(UserWarning, match="cls_score"):
        Detectron2Backend().build_student(DetectorNetwork(weights=str(zoo_file), options=SMALL), others)


@needs_detectron2
def test_class_logits_on_shared_proposals():
    detector = student()
    detector.model.eval()
    images = pictures()
    features = detector.features(images)
    boxes = [torch.tensor([[0.0, 0, 30, 40], [5, 5, 60, 60]]), torch.zeros(0, 4)]
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.cls_score.bias[-1] = 50  # Detectron2's background
    logits = detector.class_logits(features, boxes, detector.image_size(images))
    assert logits.shape == (2, 4)
    assert (logits.argmax(1) == 3).all()
    # The library's own head on the same boxes: its scores are the softmax of ours.
    from detectron2.structures import Boxes, Instances

    given = [Instances((96, 96), proposal_boxes=Boxes(box)) for box in boxes]
    pooled = detector.model.roi_heads.box_pooler(
        [features[level] for level in ("p2", "p3", "p4", "p5")], [one.proposal_boxes for one in given]
    )
    predictions = detector.model.roi_heads.box_predictor(detector.model.roi_heads.box_head(pooled))
    theirs = detector.model.roi_heads.box_predictor.predict_probs(predictions, given)
    torch.testing.assert_close(logits.softmax(1), torch.cat(theirs))
    one_stage = student("retinanet")
    with pytest.raises(UserError, match="two-stage"):
        one_stage.class_logits({}, boxes, (96, 96))


# ---------------------------------------------------------------- weights


@needs_detectron2
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"])
def test_imagenet_weights_of_torchvision(name, tmp_path):
    reference = models.get_model(name, weights=None).eval()
    draw_statistics(reference)
    torch.save(reference.state_dict(), tmp_path / "imagenet.pth")
    detector = student(backbone=name, backbone_weights=str(tmp_path / "imagenet.pth"))
    detector.model.eval()
    images = pictures((64, 96))
    # What torchvision's transforms would do.
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = ((images[0] / 255 - mean) / std)[None]
    with torch.no_grad():
        ours = detector.model.backbone.bottom_up(detector.model.preprocess_image([{"image": images[0]}]).tensor)
        theirs = {}
        if name.startswith("resnet"):
            x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
            for number in range(1, 5):
                x = theirs[f"res{number + 1}"] = getattr(reference, f"layer{number}")(x)
        else:
            for layer in reference.features:
                x = layer(x)
                side = x.shape[-1]
                if 3 <= side <= 24 and x.shape[1] in (24, 32, 40, 96, 112, 160, 320):
                    theirs[{24: "res2", 12: "res3", 6: "res4", 3: "res5"}[side]] = x
    assert set(ours) == set(theirs) == {"res2", "res3", "res4", "res5"}
    assert difference(ours, theirs) < 1e-4 * max(float(value.abs().max()) for value in theirs.values())
    other = "resnet34" if name == "resnet18" else "resnet18"
    with pytest.raises(UserError, match=r"Expected the weights of .* \(got"):
        student(backbone=other, backbone_weights=str(tmp_path / "imagenet.pth"))


@needs_detectron2
@pytest.mark.parametrize(("architecture", "backbone"), [("faster_rcnn", "resnet18"), ("retinanet", "mobilenet_v2"), ("fcos", "resnet18")])
def test_plain_detectron2_loads_a_student(architecture, backbone, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, get_cfg, instantiate
    from detectron2.modeling import build_model

    detector = student(architecture, backbone)
    draw_statistics(detector.model)
    path = tmp_path / "student.pth"
    detector.save(path)
    if architecture == "fcos":
        plain = instantiate(LazyConfig.load(str(path.with_suffix(".yaml"))).model)
    else:
        config = get_cfg()
        config.merge_from_file(str(path.with_suffix(".yaml")))
        config.MODEL.DEVICE = "cpu"
        plain = build_model(config)
    plain.load_state_dict(torch.load(path, weights_only=True)["model"], strict=True)
    plain.apply(lambda module: module.reset_parameters() if isinstance(module, torch.nn.Linear) else None)
    DetectionCheckpointer(plain).load(str(path))
    detector.model.eval()
    plain.eval()
    images = pictures()
    with torch.no_grad():
        theirs = plain([{"image": image} for image in images])
    ours = detector.detect(images)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.scores, other["instances"].scores)
        torch.testing.assert_close(own.boxes, other["instances"].pred_boxes.tensor)

    # As a teacher it needs no more than the file: the configuration lies beside it.
    teacher = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(path)), DATA)
    assert teacher.levels == detector.levels
    with torch.no_grad():
        assert difference(teacher.features(images), detector.features(images)) == 0


@needs_detectron2
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": "COCO-Detection/faster_rcnn_R_5_FPN_1x.yaml"}, r"Did you mean COCO-Detection/faster_rcnn_R_50_FPN_[13]x"),
        ({"backbone": "vgg16"}, "Expected the backbone resnet18"),
        ({"backbone": "resnet18", "options": {"MODEL.FNP.OUT_CHANNELS": 3}}, "MODEL.FNP.OUT_CHANNELS"),
        ({"backbone": "resnet18", "weights": "absent.pth"}, "absent.pth"),
        ({"weights": "absent.pkl"}, "absent.pkl"),
        ({"backbone": "resnet18", "weights": "DEFAULT"}, "Expected a network that Detectron2 publishes"),
        ({"backbone": "resnet18", "weights": "http://127.0.0.1:9/model.pkl"}, "Where this machine has no access, download the file"),
        ({"architecture": "fcos", "options": {"model.num_class": 3}}, "model.num_class"),
    ],
)
def test_bad_networks(settings, message):
    with pytest.raises(UserError, match=message):
        Detectron2Backend().build_student(DetectorNetwork(**{"options": SMALL, **settings}), DATA)


@needs_detectron2
def test_addresses_of_the_model_zoo_bring_their_configuration():
    address = "detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl"
    assert config_of_weights(address) == "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    config = configure(DetectorNetwork(weights=address), address, None, 7)
    assert (config.MODEL.META_ARCHITECTURE, config.MODEL.RESNETS.DEPTH, config.MODEL.RETINANET.NUM_CLASSES) == ("RetinaNet", 101, 7)
    assert (config.INPUT.FORMAT, config.MODEL.RESNETS.STRIDE_IN_1X1) == ("BGR", True)
    backbone = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    config = configure(DetectorNetwork(), None, backbone, 3)
    assert (config.INPUT.FORMAT, config.MODEL.RESNETS.STRIDE_IN_1X1) == ("BGR", True)
    config = configure(DetectorNetwork(), None, "DEFAULT", 3)
    assert (config.INPUT.FORMAT, config.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)


# ---------------------------------------------------------------- solver


@needs_detectron2
def test_solver_is_that_of_detectron2():
    from detectron2.solver import build_lr_scheduler, build_optimizer

    from gkd.detection.detectron2_solver import Detectron2Optimizer, Detectron2Schedule

    options = {"SOLVER.STEPS": (60, 80), "SOLVER.MAX_ITER": 100, "SOLVER.WARMUP_ITERS": 10, "SOLVER.BASE_LR": 0.02}
    module = torch.nn.Linear(2, 2)
    config = read_config("faster_rcnn")
    detectron2_config.update_config(config, options)
    optimizer = build_optimizer(config, module)
    scheduler = build_lr_scheduler(config, optimizer)
    schedule = Detectron2Schedule(options=options)
    for step in range(100):
        assert 0.02 * schedule(step, 100, 10) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()
    # Half the length: the milestones at their share of it, 30 and 40.
    half = [schedule(step, 50, 10) for step in (29, 30, 39, 40)]
    assert half == pytest.approx([1, 0.1, 0.1, 0.01])

    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0}
    clipped = Detectron2Optimizer(options={**clip, "SOLVER.BASE_LR": 1.0, "SOLVER.WEIGHT_DECAY": 0.0})(module)
    before = module.weight.detach().clone()
    module.weight.grad = torch.full_like(module.weight, 100.0)
    clipped.step()
    assert float((before - module.weight).norm().detach()) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(UserError, match="YAML"):
        Detectron2Optimizer(config="fcos")(module)


# ---------------------------------------------------------------- training


class TaskOnly(torch.nn.Module):
    """The library's losses of a detector, as the trainer wants them."""

    def __init__(self, detector) -> None:
        super().__init__()
        self.detector, self.student = detector, detector.model

    def forward(self, images, targets, index):
        return self.detector.forward(images, targets).losses


@needs_detectron2
@pytest.mark.parametrize(("architecture", "precision"), [("retinanet", "32-true"), ("faster_rcnn", "bf16-mixed")])
def test_a_resumed_training_is_the_uninterrupted_one(architecture, precision, tmp_path):
    from gkd.data import DigitScenes
    from gkd.detection.detectron2_solver import Detectron2Optimizer, Detectron2Schedule
    from gkd.engine import RunFolder, Trainer

    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True}
    data = DigitScenes(size=64, num_train=8, num_test=2)
    network = DetectorNetwork(architecture, "mobilenet_v2", options=SMALL if architecture == "faster_rcnn" else DENSE)

    def run(name: str, max_steps: int | None = None, resume: bool = False):
        torch.manual_seed(0)
        detector = Detectron2Backend().build_student(network, data)
        trainer = Trainer(
            steps=4,
            optimizer=Detectron2Optimizer(options=clip),
            schedule=Detectron2Schedule(options=clip),
            precision=precision,
            device="cpu",
            max_steps=max_steps,
            tensorboard=False,
            log_every=1,
        )
        folder = RunFolder(tmp_path / name)
        folder.prepare(resume=resume)
        fit = {"steps_per_epoch": 4, "samples_per_step": 2, "folder": folder, "resume": resume}
        trainer.fit(TaskOnly(detector), lambda epoch, start: data.batches("train", 2, epoch=epoch, start=start), **fit)
        return detector.model.state_dict()

    whole = run("whole")
    run("parts", max_steps=2)
    parts = run("parts", resume=True)
    # The gradient of a bias is a sum whose order depends on where the tensor lies in memory: two uninterrupted runs differ by 1e-17 too.
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)
    assert (tmp_path / "whole/metrics.jsonl").read_text().count('"kind": "train"') == 4


@needs_detectron2
def test_a_network_without_a_pyramid(tmp_path):
    reference = models.resnet50(weights=None)
    torch.save(reference.state_dict(), tmp_path / "imagenet.pth")
    options = {key: value for key, value in SMALL.items() if "RPN" in key}
    detector = student(
        options=options, config="COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", backbone_weights=str(tmp_path / "imagenet.pth")
    )
    assert (detector.levels, detector.two_stage) == (("res4",), True)
    assert torch.equal(detector.model.roi_heads.res5[0].conv1.weight, reference.layer4[0].conv1.weight)
    detector.model.eval()
    images = pictures((64, 64))
    with torch.no_grad():
        logits = detector.class_logits(detector.features(images), [torch.tensor([[0.0, 0, 30, 40]])], detector.image_size(images))
    assert logits.shape == (1, 4)


@needs_detectron2
def test_distillation_through_the_task(tmp_path):
    """From the interface to the run folder; the teacher's heads are asked for class logits only."""
    from functools import partial

    from gkd.data import DigitScenes
    from gkd.detection.task import Detection
    from gkd.distill import Distiller
    from gkd.engine import RunFolder, Trainer
    from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
    from gkd.losses import EdgeLoss, GraphLoss, KDLoss

    data = DigitScenes(size=64, num_train=4, num_test=2)
    teacher = Detectron2Backend().build_student(DetectorNetwork(backbone="resnet18", options={**SMALL, "MODEL.FPN.OUT_CHANNELS": 32}), data)
    teacher.save(tmp_path / "teacher.pth")
    called = []
    for weight in (0, 1):
        task = Detection(
            student=DetectorNetwork(backbone="mobilenet_v2", options=SMALL),
            teacher=DetectorNetwork(weights=str(tmp_path / "teacher.pth")),
            data=data,
            backend=Detectron2Backend(evaluator="detectron2"),
            distiller=partial(
                Distiller,
                taps={"p4": "p4"},
                terms={"edge": GraphLoss(GraphBuilder(PatchNodes(grid=4), KNNEdges(k=2)), {"edge": EdgeLoss()}), "kd": KDLoss()},
                weights={"kd": weight},
            ),
            trainer=Trainer(steps=1, device="cpu", tensorboard=False),
            batch_size=2,
        )
        called.clear()
        heads = [task.teacher.model.proposal_generator, task.teacher.model.roi_heads.box_head]
        for head in heads:
            head.register_forward_hook(lambda module, inputs, output: called.append(type(module).__name__))
        folder = RunFolder(tmp_path / str(weight))
        folder.prepare()
        results = task.train(folder)
        assert called == ["FastRCNNConvFCHead"] * weight
        record = (folder.path / "metrics.jsonl").read_text()
        assert ('"loss/kd"' in record, '"loss/edge/p4/edge"' in record) == (bool(weight), True)
        assert results["backend"] == "detectron2"
        assert "AP" in results["final"]
        assert {"student.pth", "student.yaml", "student.safetensors"} <= {file.name for file in folder.path.iterdir()}
        assert not any("normalizer" in name or "teacher" in name for name in torch.load(folder.path / "student.pth")["model"])
