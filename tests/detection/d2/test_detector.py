from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gkd.detection import DetectorNetwork
from gkd.detection.d2 import Detectron2Backend
from gkd.detection.d2 import config as d2_config
from gkd.detection.d2.backend import configure
from gkd.detection.d2.config import INSTALL_PAGE, build_detector, is_available
from gkd.errors import UserError
from tests.detection.d2.toy import DATA, DENSE, SMALL, difference, draw_statistics, pictures, student, target

needs_detectron2 = pytest.mark.skipif(not is_available(), reason=f"Detectron2 is not installed: {INSTALL_PAGE}")


def test_absent(monkeypatch):
    monkeypatch.setattr(d2_config, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"Expected Detectron2 .* Install it as https://detectron2\.readthedocs\.io.*install\.html"):
        Detectron2Backend()


def test_built_for_another_torch(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(d2_config, "is_available", lambda: True)
    monkeypatch.setattr(d2_config.importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"got one that does not import: undefined symbol.*install\.html"):
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
@pytest.mark.parametrize("architecture", ["retinanet", "fcos"])
def test_class_logits_of_one_stage_detectors_at_all_places(architecture):
    detector = student(architecture)
    images = pictures()
    output = detector.forward(images, [target((4, 5, 40, 50)), target()])
    logits = detector.dense_logits(output.features)
    assert torch.equal(logits, output.dense_logits)
    head = detector.model.head([output.features[name] for name in detector.model.head_in_features])
    (library,) = [torch.cat(levels, dim=1) for levels in detector.model._transpose_dense_predictions([head[0]], [3])]
    assert torch.equal(logits, library)
    with pytest.raises(UserError, match="two-stage"):
        detector.class_logits(output.features, [], (64, 64))
    with pytest.raises(UserError, match="one-stage"):
        student("faster_rcnn").dense_logits(output.features)


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
    config.merge_from_file(str(d2_config.find_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")))
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
def test_a_teacher_is_frozen_and_needs_weights(zoo_file, caplog):
    with pytest.raises(UserError, match=r"Expected weights of the teacher \(got none\)"):
        Detectron2Backend().build_teacher(TEACHER, DATA)
    teacher = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL), DATA)  # by the layout of a .pkl
    assert teacher.reverses_channels
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    others = SimpleNamespace(num_classes=4, classes=tuple("wxyz"), min_size=(64,), max_size=128)
    with pytest.raises(UserError, match=r"cls_score.*num_classes"):
        Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL), others)
    kept = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(zoo_file), options=SMALL, num_classes=3), others)
    images = pictures()
    with pytest.raises(UserError, match="the classes of the data"):
        kept.class_logits(kept.features(images), [torch.tensor([[0.0, 0, 9, 9]])] * 2, kept.image_size(images))
    with caplog.at_level("WARNING"):
        Detectron2Backend().build_student(DetectorNetwork(weights=str(zoo_file), options=SMALL), others)
    assert "cls_score" in caplog.text


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
