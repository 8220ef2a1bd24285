"""The torchvision back end against torchvision alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from gkd.detection import DetectorNetwork
from gkd.detection.torchvision import TorchvisionBackend, TorchvisionDetector
from gkd.errors import UserError

BACKEND = TorchvisionBackend()
NAMES = ("a", "b", "c", "d", "e")


def data_of(*classes):
    return SimpleNamespace(num_classes=len(classes), classes=classes, category_ids=range(1, len(classes) + 1), min_size=(64,), max_size=96)


DATA = data_of(*NAMES)
SMALL = {"fpn_channels": 32, "norm": "batch"}
HEADS = {"faster_rcnn": {"box_channels": 32, "anchor_sizes": (16, 24, 32, 48, 64)}, "retinanet": {}, "fcos": {}}


def build(architecture="faster_rcnn", backbone="resnet10", **options) -> TorchvisionDetector:
    return BACKEND.build_student(DetectorNetwork(architecture, backbone, options={**SMALL, **HEADS[architecture], **options}), DATA)


def images(*sizes):
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes or ((64, 64), (40, 60))]


def targets(*counts):
    boxes = [torch.tensor([[2.0, 3.0, 30.0, 35.0], [20.0, 10.0, 38.0, 39.0]])[:count] for count in counts]
    return [{"boxes": box, "labels": torch.arange(len(box)) + 3} for box in boxes]


def test_every_side_of_a_new_fcos_has_a_gradient():
    # Of the distances, cut off at 0, one side can be negative everywhere from the start; then its boxes stay flat for ever.
    head = build("fcos").model.head.regression_head
    features = [torch.rand(2, 32, 8, 8) for _ in range(5)]
    with torch.no_grad():
        head.bbox_reg.weight[3] = -head.bbox_reg.weight[3].abs()
    distances, _ = head(features)
    assert (distances > 0).flatten(0, 1).any(dim=0).all()


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet", "fcos"])
def test_training_pass(architecture):
    detector = build(architecture)
    detector.model.train()
    pictures = images()
    output = detector.forward(pictures, targets(2, 0))
    assert output.image_size == detector.image_size(pictures) == (64, 64)
    assert (
        tuple(output.features)
        == detector.levels
        == (("p2", "p3", "p4", "p5", "p6") if detector.two_stage else ("p3", "p4", "p5", "p6", "p7"))
    )
    strides = [64 // features.shape[-1] for features in output.features.values()]
    assert strides[:3] == ([4, 8, 16] if detector.two_stage else [8, 16, 32])
    sum(output.losses.values()).backward()
    assert not [name for name, parameter in detector.model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if detector.two_stage:
        assert len(output.proposals) == 2
        assert not output.proposals[0].requires_grad
    empty = detector.forward(pictures, targets(0, 0))
    assert all(loss.isfinite() for loss in empty.losses.values())


def test_losses_are_those_of_the_library():
    detector = build()
    detector.model.train()
    pictures, given = images(), targets(2, 1)
    torch.manual_seed(3)  # the heads sample
    own = detector.forward(pictures, given).losses
    torch.manual_seed(3)
    library = detector.model([image / 255 for image in pictures], [{**target, "labels": target["labels"] + 1} for target in given])
    assert own.keys() == library.keys()
    for name, loss in own.items():
        assert torch.equal(loss, library[name])


def test_teacher_features_are_those_of_the_library_alone(tmp_path):
    torch.manual_seed(0)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5)
    library = detection.FasterRCNN(backbone, 6, min_size=64, image_mean=mean, image_std=std).eval()
    torch.save(library.state_dict(), tmp_path / "teacher.pth")
    network = DetectorNetwork(
        "faster_rcnn", "resnet18", weights=str(tmp_path / "teacher.pth"), options={"norm": "batch", "image_mean": mean, "image_std": std}
    )
    teacher = BACKEND.build_teacher(network, DATA)
    pictures = images((64, 96), (64, 64))
    with torch.no_grad():
        expected = library.backbone(library.transform([image / 255 for image in pictures])[0].tensors)
    for own, map_ in zip(teacher.features(pictures).values(), expected.values(), strict=True):
        assert (own - map_).abs().max() < 1e-5
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("architecture", ["faster_rcnn", "fcos"])
def test_features_call_no_head(architecture):
    detector = build(architecture)
    called = []
    for name, module in detector.model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    detector.features(images())
    assert any(name.startswith("backbone.fpn") for name in called)
    assert {name.split(".")[0] for name in called} == {"backbone"}


def test_class_logits_are_in_the_order_of_the_data_with_the_background_last():
    detector = build()
    detector.model.eval()
    pictures = images()
    features = detector.features(pictures)
    boxes = [torch.tensor([[0.0, 0.0, 30.0, 30.0], [5.0, 5.0, 20.0, 40.0]]), torch.zeros(0, 4)]
    logits = detector.class_logits(features, boxes, (64, 64))
    heads = detector.model.roi_heads
    maps = dict(zip(["0", "1", "2", "3", "pool"], features.values(), strict=True))
    library, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, [(64, 64)] * 2)))
    assert torch.equal(logits, torch.cat((library[:, 1:], library[:, :1]), dim=1))
    with pytest.raises(UserError, match="two-stage"):
        build("fcos").class_logits(features, boxes, (64, 64))


def test_detections_have_the_labels_of_the_data_and_the_mode_stays():
    detector = build(box_score_thresh=0.0)
    detector.model.train()
    detector.model.backbone.eval()
    found = detector.detect(images())
    assert detector.model.training
    assert not detector.model.backbone.training
    assert len(found) == 2
    assert len(found[0].boxes) > 0
    labels = torch.cat([result.labels for result in found])
    assert 0 <= int(labels.min()) <= int(labels.max()) < 5


def test_saved_weights_load_in_plain_torchvision(tmp_path):
    detector = BACKEND.build_student(DetectorNetwork("faster_rcnn", "resnet18"), DATA)
    detector.save(tmp_path / "student.pth")
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5)
    detection.FasterRCNN(backbone, 6).load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True), strict=True)
    # Frozen norms read them too.
    again = BACKEND.build_student(DetectorNetwork("faster_rcnn", "resnet18", weights=str(tmp_path / "student.pth")), DATA)
    assert torch.equal(again.model.backbone.body.conv1.weight, detector.model.backbone.body.conv1.weight)
    assert not again.model.backbone.body.layer1[0].conv1.weight.requires_grad
    assert again.model.backbone.body.layer2[0].conv1.weight.requires_grad


def test_mobilenets_have_a_map_for_each_stride():
    detector = build("fcos", "mobilenet_v2")
    assert detector.levels == ("p3", "p4", "p5", "p6", "p7")


def test_imagenet_backbones_by_file(tmp_path):
    from torchvision.models import resnet18

    model = resnet18()
    torch.save(model.state_dict(), tmp_path / "imagenet.pth")
    network = DetectorNetwork("retinanet", "resnet18", backbone_weights=str(tmp_path / "imagenet.pth"))
    body = BACKEND.build_student(network, DATA).model.backbone.body
    assert torch.equal(body.layer3[0].conv1.weight, model.layer3[0].conv1.weight)
    assert type(body.bn1).__name__ == "FrozenBatchNorm2d"


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (DetectorNetwork("fcos", "resnet17"), ValueError, "the backbone resnet1.*got 'resnet17'"),
        (DetectorNetwork("fcos", "resnet10", weights="nowhere.pth"), FileNotFoundError, "file of weights at nowhere.pth"),
        (DetectorNetwork("fcos", "resnet18", weights="DEFAULT"), FileNotFoundError, "fcos on resnet50 only.*Train the network"),
        (DetectorNetwork("fcos", "resnet50", weights="COCO_V9"), FileNotFoundError, "or one of COCO_V1"),
        (DetectorNetwork("fcos", "resnet18", backbone_weights="nothing"), FileNotFoundError, "or one of IMAGENET1K_V1"),
        (DetectorNetwork("fcos", "resnet10", options={"colour": 1}), ValueError, "options that torchvision's FCOS takes.*colour"),
        (DetectorNetwork("fcos", "resnet10", options={"norm": "group"}), ValueError, "norm 'batch' or 'frozen'"),
        (DetectorNetwork("fcos", "resnet10", options={"trainable_layers": 6}), ValueError, "trainable_layers from 0 to 5"),
    ],
)
def test_mistakes(network, error, message):
    with pytest.raises(error, match=message):
        BACKEND.build_student(network, DATA)


def test_a_teacher_needs_weights():
    with pytest.raises(UserError, match=r"weights of the teacher fcos on resnet10 .*student\.pth in its run folder"):
        BACKEND.build_teacher(DetectorNetwork("fcos", "resnet10"), DATA)


def test_a_teacher_of_other_classes_gives_features_alone(tmp_path):
    other = data_of("a", "z")
    options = {**SMALL, **HEADS["faster_rcnn"]}
    BACKEND.build_student(DetectorNetwork("faster_rcnn", "resnet10", options=options), other).save(tmp_path / "two.pth")
    network = DetectorNetwork("faster_rcnn", "resnet10", weights=str(tmp_path / "two.pth"), num_classes=3, options=options)
    teacher = BACKEND.build_teacher(network, DATA)
    features = teacher.features(images())
    with pytest.raises(UserError, match="other classes"):
        teacher.class_logits(features, [torch.zeros(0, 4)] * 2, (64, 64))
