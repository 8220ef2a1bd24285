"""COCO and Pascal VOC: crowds, difficult objects, empty and damaged images, and messages for what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from gkd.data import COCO, VOC, UnreadableImageError
from gkd.data.object_reader import resize


def picture(path: Path, size=(40, 30), colour=(200, 10, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def coco_json(**changes) -> dict:
    box = {"iscrowd": 0, "area": 50.0, "segmentation": [[1, 2]]}
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", "height": 30, "width": 40} for number in (7, 8, 9)],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 10, 5], **box},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [30, 20, 25, 5], **box},  # goes over the right edge by 15
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], **box, "iscrowd": 1},
            {"id": 4, "image_id": 8, "category_id": 1, "bbox": [50, 5, 10, 5], **box},  # outside
            {"id": 5, "image_id": 8, "category_id": 1, "bbox": [5, 5, 0, 5], **box},  # no area
        ],
    }
    return {**content, **changes}


@pytest.fixture
def coco(tmp_path):
    def write(train=None, test=None):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for part, content in (("train2017", train), ("val2017", test)):
            (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content or coco_json()))
            for number in (7, 8, 9):
                picture(tmp_path / part / f"{number}.png")
        return tmp_path

    return write


def test_coco(coco, caplog):
    with caplog.at_level(logging.WARNING):
        data = COCO(coco(), num_workers=0, min_size=None, skip_empty=False)
    assert data.classes == ("person", "car")
    assert data.category_ids == (1, 3)
    assert [len(sample.boxes) for sample in data.samples("train")] == [2, 0, 0]
    assert data.samples("train")[0].boxes.tolist() == [[10, 5, 20, 10], [30, 20, 40, 25]]  # x + width, y + height; cut off at 40
    assert data.samples("train")[0].labels.tolist() == [1, 0]
    assert "1 box(es) cut off" in caplog.text
    assert "2 box(es) left out" in caplog.text
    # The evaluation knows the crowd, the areas, and the boxes as they are in the file, but none that nobody could find.
    objects = data.annotations("test")["annotations"]
    assert [one["bbox"] for one in objects] == [[10, 5, 10, 5], [30, 20, 25, 5], [0, 0, 40, 30]]
    assert [one["iscrowd"] for one in objects] == [0, 0, 1]
    assert [one["area"] for one in objects] == [50] * 3
    assert COCO(coco(), num_workers=0).num_samples("train") == 1  # images without boxes are left out by default


def test_flipped_and_resized_boxes(coco):
    data = COCO(coco(), num_workers=0, min_size=60, max_size=100, flip=1.0)
    (image,), (target,), index = next(data.batches("train", 1))
    assert image.shape == (3, 60, 80)
    assert target["size"] == (30, 40)
    # Twice as large, then x -> 80 - x: [20, 10, 40, 20] and [60, 40, 80, 50].
    assert target["boxes"].tolist() == [[40, 10, 60, 20], [0, 40, 20, 50]]
    assert index.tolist() == [0]
    (image,), (target,), _ = next(data.batches("test", 1))
    assert target["boxes"][0].tolist() == [20, 10, 40, 20]


def test_sizes_and_workers_follow_from_the_seed(coco):
    options = {"min_size": (20, 30, 40, 50, 60), "skip_empty": False}
    alone, with_workers = COCO(coco(), num_workers=0, **options), COCO(coco(), num_workers=1, **options)
    read = [
        [(image.shape, image.sum()) for batch in data.batches("train", 1, epoch=3, seed=1) for image in batch[0]]
        for data in (alone, with_workers)
    ]
    assert read[0] == read[1]
    shapes = {batch[0][0].shape for epoch in range(6) for batch in alone.batches("train", 1, epoch=epoch)}
    assert len(shapes) > 2


def test_a_limit_to_the_longer_side():
    assert resize(torch.zeros(3, 30, 60, dtype=torch.uint8), 60, 80).shape == (3, 40, 80)


def test_unreadable_images_are_named_and_counted(coco, caplog):
    root = coco()
    (root / "val2017" / "8.png").write_bytes(b"no picture")
    data = COCO(root, num_workers=0, min_size=None)
    with pytest.raises(UnreadableImageError, match=r"1 so far(?s:.*)8\.png: UnidentifiedImageError(?s:.*)skip_unreadable = True"):
        list(data.batches("test", 2))
    lenient = COCO(root, num_workers=0, min_size=None, skip_unreadable=True)
    with caplog.at_level(logging.WARNING):
        assert [len(images) for images, _, _ in lenient.batches("test", 2)] == [1, 1]
    assert "8.png" in caplog.text
    assert "(1 so far)" in caplog.text
    assert len(lenient.unreadable) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco_json(categories=[{"id": 1, "name": "person"}]), r"every category_id .*got 3 in 1 annotations.*remove these annotations"),
        (coco_json(images=coco_json()["images"][1:]), r"every image_id .*got 7 in annotation 1"),
        ({"images": []}, r"a json of COCO's form"),
    ],
)
def test_wrong_json(coco, content, message):
    with pytest.raises(ValueError, match=message):
        COCO(coco(train=content, test=content))


def test_other_categories_in_the_test_part(coco):
    with pytest.raises(
        ValueError, match=r"same categories in the parts 'train' and 'test' .*got, in one only, \[\(3, 'car'\), \(3, 'lorry'\)\]"
    ):
        COCO(coco(test=coco_json(categories=[{"id": 3, "name": "lorry"}, {"id": 1, "name": "person"}])))


def test_absent_files(coco, tmp_path):
    with pytest.raises(ValueError, match=r"folder of COCO at .*nowhere.*cocodataset"):
        COCO(tmp_path / "nowhere")
    root = coco()
    with pytest.raises(ValueError, match=r"annotations at .*train2014.json .*the folder has annotations/instances_train2017.json"):
        COCO(root, train="train2014")
    (root / "train2017" / "9.png").unlink()
    with pytest.raises(ValueError, match=r"all 3 files .*got 1 absent: .*9.png"):
        COCO(root)


def voc_xml(*objects: tuple[str, list[int], int]) -> str:
    written = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        + "</bndbox></object>"
        for name, corners, difficult in objects
    ]
    return f"<annotation><size><width>40</width><height>30</height></size>{''.join(written)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    def write(*objects):
        base = tmp_path / "VOCdevkit" / "VOC2007"
        for folder in ("Annotations", "ImageSets/Main"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name, text in (("000001", voc_xml(*objects)), ("000002", voc_xml())):
            (base / "Annotations" / f"{name}.xml").write_text(text)
            picture(base / "JPEGImages" / f"{name}.jpg")
        for split in ("trainval", "test"):
            (base / "ImageSets" / "Main" / f"{split}.txt").write_text("000001\n000002\n")
        return tmp_path

    return write


PARTS = {"train": ["VOC2007/trainval"], "num_workers": 0, "min_size": None}


def test_voc(voc):
    # Pixels count from 1 and both ends belong to the box: 1..10 is [0, 10].
    root = voc(("dog", [1, 1, 10, 10], 0), ("cat", [11, 6, 45, 20], 1))
    data = VOC(root, **PARTS)
    assert data.metric == "voc"
    assert data.num_samples("train") == 1
    assert data.samples("train")[0].boxes.tolist() == [[0, 0, 10, 10], [10, 5, 40, 20]]
    assert [data.classes[label] for label in data.samples("train")[0].labels] == ["dog", "cat"]
    assert len(VOC(root, difficult=False, **PARTS).samples("train")[0].boxes) == 1
    assert [annotation["difficult"] for annotation in data.annotations("test")["annotations"]] == [0, 1]
    assert [len(target["boxes"]) for target in next(data.batches("test", 2))[1]] == [2, 0]


def test_voc_mistakes(voc, tmp_path):
    with pytest.raises(ValueError, match=r"folder of Pascal VOC .*VOC\.root"):
        VOC(tmp_path / "nowhere")
    root = voc(("unicorn", [1, 1, 5, 5], 0))
    with pytest.raises(ValueError, match=r"got 'unicorn'.*VOC\.classes"):
        VOC(root, **PARTS)
    with pytest.raises(ValueError, match=r"image set VOC2012/trainval .*there are VOC2007/test, VOC2007/trainval"):
        VOC(root)
    root = voc(("dog", [1, 1, 5, 5], 0))
    (root / "VOCdevkit/VOC2007/Annotations/000002.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"annotation of Pascal VOC at .*000002.xml"):
        VOC(root, **PARTS)


def test_the_real_parts(shared_data):
    coco = COCO(shared_data / "coco", num_workers=0, min_size=64, max_size=100)
    assert (coco.num_samples("train"), coco.num_samples("test"), coco.num_classes) == (79, 57, 80)
    images, targets, _ = next(coco.batches("train", 2))
    for image, target in zip(images, targets, strict=True):
        assert (target["boxes"] <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
