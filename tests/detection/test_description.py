"""A student that describes itself: the plain library gives the boxes that the evaluation saw."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gkd.detection import DetectorNetwork, load_detector, read_detector
from gkd.detection.torchvision import TorchvisionBackend
from gkd.detection.torchvision.networks import OF_TWO_STAGES
from gkd.engine.folder import save_student
from gkd.errors import UserError

DATA = SimpleNamespace(
    num_classes=3, classes=("ant", "bee", "cow"), category_ids=(1, 2, 7), min_size=(48, 64), max_size=90, keypoints=("nose", "tail")
)
BACKEND = TorchvisionBackend()
LIBRARY = ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]


def network(architecture: str) -> DetectorNetwork:
    """Small, with a threshold at which something is found."""
    if architecture == "ssdlite320_mobilenet_v3_large":
        return DetectorNetwork(architecture, options={"score_thresh": 0.0, "detections_per_img": 5, "image_mean": [0.4, 0.5, 0.6]})
    if architecture not in ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"):
        return DetectorNetwork(architecture, options={"box_score_thresh": 0.0, "box_detections_per_img": 5})
    options = {"fpn_channels": 32, "image_mean": [0.4, 0.5, 0.6]}
    if architecture in OF_TWO_STAGES:
        options |= dict.fromkeys(OF_TWO_STAGES[architecture], 16) | {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    else:
        options |= {"score_thresh": 0.0, "detections_per_img": 5}
    return DetectorNetwork(architecture, "resnet10", options=options)


def written(architecture: str, folder) -> tuple:
    detector = BACKEND.build_student(network(architecture), DATA)
    for buffer in detector.model.buffers():  # as a training would leave them
        if buffer.is_floating_point():
            buffer.add_(0.1 * torch.rand_like(buffer))
    description = {"task": "Detection", "backend": "torchvision", "network": detector.describe(), "classes": list(DATA.classes)}
    save_student(folder / "student.safetensors", detector.model, description)
    return detector, json.loads(json.dumps(description))


def stored_images() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((50, 70), (120, 80), (64, 64))]


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", *LIBRARY])
def test_the_plain_library_gives_the_boxes_that_the_evaluation_saw(architecture, tmp_path):
    detector, description = written(architecture, tmp_path)
    images = stored_images()
    seen = detector.detect(images)
    assert sum(len(one.boxes) for one in seen) > 0
    model, described = load_detector(tmp_path)
    assert described["classes"] == list(DATA.classes)
    assert not model.training
    with torch.no_grad():
        plain = model([image / 255 for image in images])
    for one, theirs, image in zip(seen, plain, images, strict=True):
        torch.testing.assert_close(theirs["boxes"], one.boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs["scores"], one.scores, atol=1e-5, rtol=0)
        labels = torch.tensor(description["network"]["labels"])
        assert torch.equal(theirs["labels"], labels[one.labels])
        if architecture == "mask_rcnn":
            assert one.masks.shape == (len(one.boxes), *image.shape[1:])
            assert torch.equal(theirs["masks"][:, 0] >= 0.5, one.masks)
        if architecture == "keypoint_rcnn":
            torch.testing.assert_close(theirs["keypoints"][..., :2], one.keypoints[..., :2], atol=1e-4, rtol=0)


def test_what_was_written_is_what_the_library_needs_to_be_told(tmp_path):
    """torchvision alone, told the size and the statistics of the description."""
    from torchvision.models import detection

    detector = BACKEND.build_student(DetectorNetwork("fasterrcnn_mobilenet_v3_large_320_fpn", options={"box_score_thresh": 0.0}), DATA)
    described = detector.describe()
    assert described["size"] == [64, 90]
    sizes = {"min_size": described["size"][0], "max_size": described["size"][1]}
    plain = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None, num_classes=4, box_score_thresh=0.0, **sizes)
    plain.load_state_dict(detector.model.state_dict(), strict=True)
    images = stored_images()
    with torch.no_grad():
        theirs = plain.eval()([image / 255 for image in images])
    for one, other in zip(detector.detect(images), theirs, strict=True):
        torch.testing.assert_close(other["boxes"], one.boxes, atol=1e-4, rtol=0)


def test_training_leaves_the_size_to_the_data_and_inference_does_not():
    detector = BACKEND.build_student(network("fcos"), DATA)
    images = [torch.zeros(3, 96, 128, dtype=torch.uint8)] * 2
    detector.model.train()
    targets = [{"boxes": torch.tensor([[2.0, 3.0, 30.0, 35.0]]), "labels": torch.tensor([1])}] * 2
    output = detector.forward(images, targets)
    assert output.features["p3"].shape[2:] == (12, 16)
    assert detector.features(images)["p3"].shape[2:] == (12, 16)
    sizes = []
    detector.model.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[2:])))
    detector.detect(images)
    assert sizes == [(64, 96)]  # 64 x 85, padded


def test_a_teacher_is_what_its_file_says(tmp_path):
    detector, _ = written("fcos", tmp_path)
    detector.save(tmp_path / "student.pth")
    other = SimpleNamespace(**{**vars(DATA), "classes": ("cow", "ant", "bee")})
    images = stored_images()
    for weights in ("student.pth", "student.safetensors"):
        teacher = BACKEND.build_teacher(DetectorNetwork(weights=str(tmp_path / weights)), other)
        assert teacher.describe()["mean"] == [0.4, 0.5, 0.6]
        assert type(teacher.model).__name__ == "FCOS"
        detector.model.eval()
        features = detector.features(images)
        for level, map_ in detector.features(images).items():
            torch.testing.assert_close(teacher.features(images)[level], map_)
        # The scores come in the order of the data.
        assert torch.equal(teacher.dense_logits(features), detector.dense_logits(features)[..., [2, 0, 1]])
    with pytest.raises(UserError, match=r"weights of 'resnet18' as DetectorNetwork.backbone says .*'resnet10'"):
        BACKEND.build_teacher(DetectorNetwork("fcos", "resnet18", weights=str(tmp_path / "student.pth")), other)
    # Of other classes only the maps are of use.
    strange = SimpleNamespace(**{**vars(DATA), "classes": ("cow", "ant", "yak")})
    teacher = BACKEND.build_teacher(DetectorNetwork(weights=str(tmp_path / "student.pth")), strange)
    with pytest.raises(UserError, match="classes of the data"):
        teacher.dense_logits(teacher.features(images))


def test_what_is_no_detector(tmp_path):
    with pytest.raises(UserError, match=r"run folder or its student\.safetensors"):
        load_detector(tmp_path)
    save_student(tmp_path / "student.safetensors", torch.nn.Linear(1, 1), {"task": "Classification"})
    with pytest.raises(UserError, match="got Classification"):
        load_detector(tmp_path)
    description = {"task": "Detection", "backend": "torchvision", "network": {"architecture": "os:system"}}
    save_student(tmp_path / "student.safetensors", torch.nn.Linear(1, 1), description)
    with pytest.raises(UserError, match="trust = True to import and call os:system"):
        read_detector(tmp_path)


def test_the_file_holds_what_the_model_holds(tmp_path):
    detector, _ = written("fcos", tmp_path)
    assert load_file(tmp_path / "student.safetensors").keys() == detector.model.state_dict().keys()


def test_exported_detectors_find_the_same_boxes(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    detector, _ = written("faster_rcnn", tmp_path)
    onnx = BACKEND.export(detector, "onnx", tmp_path)
    program = BACKEND.export(detector, "torch", tmp_path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    assert {output.name for output in session.get_outputs()} == {"boxes", "scores", "labels"}
    image = stored_images()[1]
    (ours,) = detector.detect([image])
    assert len(ours.boxes) > 0
    (boxes,) = session.run(["boxes"], {"image": (image / 255).numpy()})
    torch.testing.assert_close(torch.from_numpy(boxes), ours.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.jit.load(program)([image / 255])[1][0]["boxes"], ours.boxes, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="'onnx' or 'torch'"):
        BACKEND.export(detector, "caffe", tmp_path)
