from __future__ import annotations

import pytest
import torch
from torchvision import models

from gkd.detection import DetectorNetwork
from gkd.detection.d2 import Detectron2Backend
from gkd.detection.d2.backend import configure
from gkd.detection.d2.config import INSTALL_PAGE, is_available
from gkd.detection.d2.weights import config_of_weights
from gkd.errors import UserError
from tests.detection.d2.toy import DATA, SMALL, difference, draw_statistics, pictures, student

if not is_available():
    pytest.skip(f"Detectron2 is not installed: {INSTALL_PAGE}", allow_module_level=True)


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
    images = pictures((64, 90), (64, 70))  # of the size that the data have: nothing to resize
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
