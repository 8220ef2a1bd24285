from __future__ import annotations

import json
import uuid
from types import SimpleNamespace

import pytest
import torch

from gkd.detection import Detections
from gkd.detection.d2.config import INSTALL_PAGE, is_available
from gkd.errors import UserError

if not is_available():
    pytest.skip(f"Detectron2 is not installed: {INSTALL_PAGE}", allow_module_level=True)
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from gkd.data import DigitScenes
from gkd.detection.d2.data import Detectron2Data, register_coco, register_split
from gkd.detection.d2.evaluation import evaluate_with_detectron2

SMALL = {"min_size": 64, "max_size": 96, "num_workers": 0}


class Oracle:
    """Finds the true boxes of the images that `remember` has seen, moved by some pixels."""

    has_masks, num_keypoints = False, 0

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.targets: list = []

    def remember(self, batches):
        for batch in batches:
            self.targets = batch[1]
            yield batch

    def detect(self, images):
        return [Detections(one["boxes"] + self.shift, torch.ones(len(one["boxes"])), one["labels"]) for one in self.targets]


def record(data, shift: float = 0.0, split: str = "test") -> dict:
    oracle = Oracle(shift)
    return evaluate_with_detectron2(oracle, data, split, lambda: oracle.remember(data.batches(split, 8, resized=False)))


@pytest.fixture(scope="module")
def coco(shared_data):
    root = shared_data / "coco"
    sources = [(str(root / f"annotations/instances_{part}2017.json"), str(root / f"{part}2017")) for part in ("train", "val")]
    return Detectron2Data(*sources, **SMALL)


def test_coco_through_detectron2(coco, shared_data):
    assert (coco.num_classes, coco.category_ids[-1], coco.metric) == (80, 90, "coco")
    assert coco.num_samples("test") == 57
    images, targets, _ = next(coco.batches("test", 1))
    assert images[0].dtype == torch.uint8
    stored = json.loads((shared_data / "coco/annotations/instances_val2017.json").read_text())
    first = coco.samples("test")[0]
    theirs = [a for a in stored["annotations"] if a["image_id"] == first.image_id and not a["iscrowd"]]
    assert len(targets[0]["boxes"]) == len(theirs)
    scale = images[0].shape[-1] / first.size[1]
    assert targets[0]["boxes"][0, 0] == pytest.approx(theirs[0]["bbox"][0] * scale, abs=1e-3)
    assert targets[0]["boxes"][0, 2] == pytest.approx((theirs[0]["bbox"][0] + theirs[0]["bbox"][2]) * scale, abs=1e-3)
    # The evaluation knows what the json knows, crowds and areas included.
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    known = coco.annotations("test")["annotations"]
    assert [[one[key] for key in keys] for one in known] == [[one[key] for key in keys] for one in stored["annotations"]]
    assert [one["id"] for one in known] == list(range(1, len(known) + 1))


def test_names_are_made_of_paths(shared_data):
    from detectron2.data import DatasetCatalog

    root = shared_data / "coco"
    before = set(DatasetCatalog.list())
    names = [register_coco(root / "annotations/instances_val2017.json", root / "val2017") for _ in range(2)]
    assert names[0] == names[1]
    assert str(root.resolve()) in names[0]
    assert set(DatasetCatalog.list()) - before <= set(names)


def test_cocos_evaluator_on_the_truth(coco):
    from detectron2.data import MetadataCatalog

    before = set(MetadataCatalog.list())
    numbers = record(coco)
    assert set(MetadataCatalog.list()) == before  # nothing stays behind
    assert numbers["split"] == "test"
    assert numbers["AP"] > 97  # crowds are no boxes to be found, but count where nothing covers them
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= numbers.keys()
    assert numbers["AP/person"] > 95
    absent = {one["category_id"] for one in coco.annotations("test")["annotations"]}.symmetric_difference(coco.category_ids)
    names = [name for name, number in zip(coco.classes, coco.category_ids, strict=True) if number in absent]
    assert names
    assert all(numbers[f"AP/{name}"] is None for name in names)
    moved = record(coco, shift=3.0)
    assert moved["AP"] < numbers["AP"] - 10
    # gkd's own evaluation is the same for all libraries, and gives the same numbers.
    from gkd.tasks.precision import evaluate_detector

    oracle = Oracle(3.0)
    ours = evaluate_detector(oracle, coco, "test", lambda: oracle.remember(coco.batches("test", 8, resized=False)))
    assert ours == pytest.approx(moved, abs=1e-3)


def test_digit_scenes_as_a_data_set_of_detectron2():
    data = DigitScenes(size=64, num_train=4, num_test=6)
    numbers = record(data)
    assert numbers["AP"] == pytest.approx(100)
    nothing = SimpleNamespace(detect=lambda images: [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for _ in images])
    empty = evaluate_with_detectron2(nothing, data, "test", lambda: data.batches("test", 3))
    assert (empty["AP"], empty["AP/0"]) == (0, 0)


def test_a_split_of_ours_in_the_catalog(coco):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.dataset_mapper import DatasetMapper

    name = f"test-{uuid.uuid4().hex}"
    for _ in range(2):
        register_split(coco, "test", name)
    try:
        records = DatasetCatalog.get(name)
        assert len(records) == 57
        entry = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")(records[0])
        assert torch.equal(entry["image"].flip(0), coco.image("test", 0))
        torch.testing.assert_close(entry["instances"].gt_boxes.tensor, coco.samples("test")[0].boxes)
        assert MetadataCatalog.get(name).thing_classes == list(coco.classes)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_voc_through_detectron2(shared_data):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_pascal_voc

    names = {split: f"test-{uuid.uuid4().hex}" for split in ("train", "val")}
    for split, name in names.items():
        register_pascal_voc(name, str(shared_data / "VOCdevkit/VOC2007"), split, 2007)
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    try:
        data = Detectron2Data(names["train"], names["val"], **SMALL)
        assert (data.num_classes, data.metric, data.num_samples("train"), data.num_samples("test")) == (20, "voc", 500, 250)
        ids = [sample.image_id for split in ("train", "test") for sample in data.samples(split)]
        assert len(set(ids)) == len(ids)
        numbers = record(data)
        assert numbers["AP50"] == pytest.approx(100)
        assert record(data, shift=8.0)["AP50"] < 80
        with pytest.raises(UserError, match="evaluator = 'gkd'"):
            record(data, split="train")
    finally:
        for name in names.values():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_bad_data(tmp_path, shared_data):
    with pytest.raises(UserError, match="such as coco_2017_train"):
        Detectron2Data("coco_2071_train")
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        Detectron2Data("voc_2012_train", "voc_2012_val")
    with pytest.raises(UserError, match="does not exist"):
        Detectron2Data((str(tmp_path / "absent.json"), str(tmp_path)))
    stored = json.loads((shared_data / "coco/annotations/instances_val2017.json").read_text())
    stored["annotations"][0]["category_id"] = 12345
    file = tmp_path / "unknown.json"
    file.write_text(json.dumps(stored))
    source = (str(file), str(shared_data / "coco/val2017"))
    with pytest.raises(UserError, match="12345"):
        Detectron2Data(source, source)
