"""A Detectron2 network is what its files say: trained by Detectron2 itself, or written by gkd; and nothing in them runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gkd.detection import DetectorNetwork, load_detector
from gkd.detection.d2 import Detectron2Backend
from gkd.detection.d2.config import INSTALL_PAGE, find_config, is_available
from gkd.detection.d2.files import parse_config
from gkd.engine.folder import save_student
from gkd.errors import UserError
from tests.detection.d2.toy import DATA, SMALL, difference, draw_statistics, pictures, student

if not is_available():
    pytest.skip(f"Detectron2 is not installed: {INSTALL_PAGE}", allow_module_level=True)

MASKS = {**SMALL, "MODEL.ROI_MASK_HEAD.CONV_DIM": 8, "MODEL.ROI_MASK_HEAD.NUM_CONV": 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
POINTS = {**SMALL, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
FEW = {"TEST.DETECTIONS_PER_IMAGE": 4}


def objects() -> list[dict]:
    masks = torch.zeros(2, 64, 90, dtype=torch.uint8)
    masks[0, 5:40, 4:30] = masks[1, 10:50, 40:80] = 1
    points = torch.tensor([[[5.0, 6.0, 2.0], [20.0, 30.0, 2.0]], [[45.0, 15.0, 2.0], [70.0, 40.0, 1.0]]])
    boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [40.0, 10.0, 80.0, 50.0]])
    return [{"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks, "keypoints": points}] * 2


@pytest.mark.parametrize(
    ("architecture", "options", "losses"),
    [("mask_rcnn", MASKS, "loss_mask"), ("keypoint_rcnn", POINTS, "loss_keypoint"), ("cascade_mask_rcnn", MASKS, "loss_mask")],
)
def test_masks_and_keypoints_are_used_and_described(architecture, options, losses, tmp_path):
    data = SimpleNamespace(**vars(DATA), keypoints=("head", "tail"))
    network = DetectorNetwork(architecture, "resnet18", options={**options, **FEW})
    detector = Detectron2Backend().build_student(network, data)
    assert (detector.has_masks, detector.num_keypoints) == ("mask" in architecture, 2 * (architecture == "keypoint_rcnn"))
    images = pictures((64, 90), (64, 90))
    detector.model.train()
    output = detector.forward(images, objects())
    assert losses in output.losses
    sum(output.losses.values()).backward()
    boxes = [torch.tensor([[4.0, 5.0, 30.0, 40.0]])] * 2
    assert detector.class_logits(output.features, boxes, output.image_size).shape == (2, 4)
    if detector.has_masks:
        labels = torch.tensor([0, 2])
        pooled = detector.mask_logits(output.features, boxes, labels, output.image_size)
        assert pooled.shape == (2, 28, 28)
    lacking = [{name: value for name, value in one.items() if name in ("boxes", "labels")} for one in objects()]
    with pytest.raises(UserError, match=r"Expected (masks|keypoints) in the targets of GeneralizedRCNN"):
        detector.forward(images, lacking)

    stored = pictures((50, 70), (100, 80))
    seen = detector.detect(stored)
    assert sum(len(one.boxes) for one in seen) > 0
    save_student(
        tmp_path / "student.safetensors",
        detector.model,
        {"task": "Detection", "backend": "detectron2", "network": detector.describe(), "classes": list(data.classes)},
    )
    model, description = load_detector(tmp_path)
    assert description["network"]["size"] == [64, 128]
    from detectron2.data.transforms import ResizeShortestEdge

    entries = []
    for image in stored:  # what DefaultPredictor does
        pixels = image.permute(1, 2, 0).numpy()
        resized = ResizeShortestEdge([64, 64], 128).get_transform(pixels).apply_image(pixels)
        entry = {"image": torch.as_tensor(resized.copy()).permute(2, 0, 1), "height": image.shape[1], "width": image.shape[2]}
        entries.append(entry)
    with torch.no_grad():
        outputs = model(entries)
    for theirs, ours in zip(outputs, seen, strict=True):
        torch.testing.assert_close(theirs["instances"].pred_boxes.tensor, ours.boxes, atol=1e-4, rtol=0)
        if detector.has_masks:
            assert torch.equal(theirs["instances"].pred_masks, ours.masks)


def test_a_teacher_of_detectron2s_own_trainer_is_what_it_was_trained_as(tmp_path):
    """Its output folder holds model_final.pth and config.yaml; nothing else is named."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data.dataset_mapper import DatasetMapper
    from detectron2.modeling import build_model
    from PIL import Image

    config = get_cfg()
    config.merge_from_file(str(find_config("faster_rcnn")))
    config.merge_from_list([entry for pair in SMALL.items() for entry in pair])
    config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    config.MODEL.ROI_HEADS.NUM_CLASSES, config.MODEL.DEVICE, config.MODEL.WEIGHTS = 3, "cpu", ""
    alone = build_model(config).eval()
    draw_statistics(alone)
    DetectionCheckpointer(alone, str(tmp_path)).save("model_final")
    (tmp_path / "config.yaml").write_text(config.dump())

    teacher = Detectron2Backend().build_teacher(DetectorNetwork(weights=str(tmp_path / "model_final.pth")), DATA)
    assert teacher.reverses_channels
    image = pictures((64, 90))[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    entry = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")({"file_name": str(tmp_path / "image.png")})
    with torch.no_grad():
        theirs = alone.backbone(alone.preprocess_image([entry]).tensor)
        assert difference(teacher.features([image]), theirs) < 1e-5
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"no config\.yaml beside"):
        Detectron2Backend().build_teacher(DetectorNetwork(weights=str(tmp_path / "model_final.pth")), DATA)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [{folder}]\n",
        "MODEL: {{WEIGHTS: !!python/object/apply:os.mkdir [{folder}]}}\n",
        "model: {{_target_: os.mkdir, path: {folder}}}\n",
        "model: {{_target_: torch.nn.Linear, backbone: {{_target_: detectron2.layers.wrappers.os.mkdir, path: {folder}}}}}\n",
    ],
)
def test_nothing_in_a_file_beside_weights_runs(text, tmp_path):
    student().save(tmp_path / "student.pth")
    (tmp_path / "student.yaml").write_text(text.format(folder=tmp_path / "trap"))
    with pytest.raises(UserError, match="Expected a configuration"):
        Detectron2Backend().build_teacher(DetectorNetwork(weights=str(tmp_path / "student.pth")), DATA)
    with pytest.raises(UserError, match="Expected a configuration"):
        parse_config(text.format(folder=tmp_path / "trap"), "a file")
    assert not (tmp_path / "trap").exists()


def test_a_students_file_has_the_size_of_its_images_and_no_data_of_others(tmp_path):
    from detectron2.config import LazyConfig, get_cfg

    student().save(tmp_path / "student.pth")
    config = get_cfg()
    config.merge_from_file(str(tmp_path / "student.yaml"))
    assert (config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST) == (64, 128)
    assert (config.DATASETS.TRAIN, config.DATASETS.TEST, config.MODEL.WEIGHTS) == ((), (), "")
    student("fcos").save(tmp_path / "fcos.pth")
    lazy = LazyConfig.load(str(tmp_path / "fcos.yaml"))
    assert lazy.dataloader.test.mapper.augmentations[0].short_edge_length == [64, 64]
    assert "train" not in lazy or "init_checkpoint" not in lazy.train
