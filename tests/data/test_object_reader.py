"""Masks, keypoints and boxes follow flips, sizes and crops; what is narrower than rounding is left out; workers get arrays."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkd.data import COCO, BoxAugment, DigitScenes, UnreadableImageError
from gkd.data.box_augment import Objects
from gkd.data.masks import decode_masks, encode_mask, segmentation_box
from gkd.data.object_reader import ObjectReader

coder = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

SIZE = (30, 40)
POINTS = [5, 3, 2, 6, 4, 2, 11, 9, 1]
NAMES = ["nose", "left_hand", "right_hand"]


def square(left: int, top: int, side: int) -> list[list[int]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def content() -> dict:
    """An image in which the objects are the only bright pixels."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[16:26, 20:30] = True
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2]]}],
        "annotations": [
            {
                "image_id": 1,
                "category_id": 1,
                "bbox": [4, 2, 8, 8],
                "segmentation": square(4, 2, 8),
                "keypoints": [5, 3, 2, 6, 4, 2, 11, 9, 1],
            },
            {"image_id": 1, "category_id": 1, "bbox": [20, 16, 10, 10], "segmentation": encode_mask(mask)},
        ],
    }


def drawn() -> np.ndarray:
    image = np.zeros(SIZE, dtype=np.uint8)
    image[2:10, 4:12], image[16:26, 20:30] = 100, 200
    return image


@pytest.fixture
def root(tmp_path) -> Path:
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    (tmp_path / "labels.json").write_text(json.dumps(content()))
    return tmp_path


def read(root: Path, split: str = "train", epoch: int = 0, **options) -> tuple[torch.Tensor, dict]:
    part = (".", "labels.json")
    data = COCO(root, train=part, test=part, **{"num_workers": 0, "masks": True, "keypoints": True, "min_size": None, **options})
    images, targets, _ = next(data.batches(split, 1, epoch=epoch))
    return images[0], targets[0]


@pytest.mark.parametrize(
    "options",
    [{"flip": 0.0}, {"flip": 1.0}, {"flip": 1.0, "min_size": 60, "max_size": 100}, {"flip": 0.0, "min_size": 15}],
)
def test_masks_keypoints_and_boxes_follow_the_image(root, options):
    image, target = read(root, **options)
    scale = image.shape[1] / SIZE[0]
    assert target["masks"].shape == (2, *image.shape[1:])
    assert target["masks"].dtype == torch.uint8
    assert target["keypoints"].shape == (2, 3, 3)
    for mask, (left, top, right, bottom), shade in zip(target["masks"], target["boxes"].round().long().tolist(), (100, 200), strict=True):
        inside = torch.zeros_like(mask)
        inside[top:bottom, left:right] = 1
        assert torch.equal(mask, inside)
        assert (image[0][mask.bool()].float() - shade).abs().mean() < 20
    points = torch.tensor([[5.0, 3.0], [6.0, 4.0], [11.0, 9.0]]) * scale
    visibility = [2, 2, 1]
    if options["flip"]:
        points[:, 0] = image.shape[2] - points[:, 0]
        points = points[[0, 2, 1]]  # a left hand is a right hand in the mirror
        visibility = [2, 1, 2]
    torch.testing.assert_close(target["keypoints"][0, :, :2], points)
    assert target["keypoints"][0, :, 2].tolist() == visibility
    assert (target["keypoints"][1] == 0).all()


def test_evaluation_knows_outlines_and_keypoints(root):
    part = (".", "labels.json")
    data = COCO(root, train=part, test=part, num_workers=0, masks=True, keypoints=True)
    first, second = data.annotations("test")["annotations"]
    assert first["segmentation"] == square(4, 2, 8)
    assert (first["num_keypoints"], second["num_keypoints"]) == (3, 0)
    assert second["keypoints"] == [0] * 9
    assert data.keypoints == tuple(NAMES)
    plain = COCO(root, train=part, test=part, num_workers=0)
    assert not {"segmentation", "keypoints"} & set(plain.annotations("test")["annotations"][0])
    assert not {"masks", "keypoints"} & set(next(plain.batches("test", 1))[1][0])


def test_masks_and_keypoints_that_are_asked_for_must_be_there(root):
    lacking = content()
    del lacking["annotations"][1]["segmentation"]
    del lacking["categories"][0]["keypoints"]
    (root / "labels.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match=r"a segmentation of every object .*masks = False"):
        read(root, keypoints=False)
    with pytest.raises(ValueError, match="categories with the same keypoints"):
        read(root, masks=False)
    short = content()
    short["annotations"][0]["keypoints"] = [1, 2, 3]
    (root / "labels.json").write_text(json.dumps(short))
    with pytest.raises(ValueError, match=r"Expected 3 keypoints .*\(got 3 numbers\)"):
        read(root)


def test_damaged_outlines_are_named_with_their_image(root):
    damaged = content()
    damaged["annotations"][1]["segmentation"] = {"size": [3, 3], "counts": [9]}
    (root / "labels.json").write_text(json.dumps(damaged))
    with pytest.raises(UnreadableImageError, match=r"a\.png: ValueError: Expected polygons, or run lengths of size \[30, 40\]"):
        read(root)


def test_outlines_are_those_of_coco():
    generator = np.random.default_rng(0)
    masks = generator.random((6, 13, 17)) < 0.5
    masks[0], masks[1] = False, True
    for mask in masks:
        runs = encode_mask(torch.from_numpy(mask))
        compressed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": list(compressed["size"]), "counts": compressed["counts"].decode()}
        assert coder.frPyObjects(runs, 13, 17)["counts"] == compressed["counts"]
        assert torch.equal(decode_masks([runs, text], (13, 17)), torch.from_numpy(np.stack([mask, mask]).astype(np.uint8)))
    assert segmentation_box(encode_mask(torch.from_numpy(masks[0])), (13, 17)) == [0, 0, 0, 0]
    assert segmentation_box(encode_mask(torch.from_numpy(masks[1])), (13, 17)) == [0, 0, 17, 13]
    assert segmentation_box(square(2, 3, 4), (13, 17)) == [2, 3, 4, 4]
    assert decode_masks([[[1, 2, 3, 4]]], (5, 5)).sum() == 0  # a line
    for wrong in ({"size": [3, 3], "counts": [9]}, {"size": [13, 17], "counts": [5]}, "outline"):
        with pytest.raises(ValueError, match=r"Expected (polygons, or )?run lengths"):
            decode_masks([wrong], (13, 17))


def test_boxes_narrower_than_rounding_are_left_out_before_the_training(root):
    narrow = content()
    narrow["annotations"][0] |= {"bbox": [0, 0, 2e-3, 10]}
    (root / "labels.json").write_text(json.dumps(narrow))
    for options, left in (({"min_size": None}, 2), ({"min_size": 3}, 1)):  # narrower than a thousandth of a pixel once it is resized
        for flip in (0.0, 1.0):
            _, target = read(root, flip=flip, **options)
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == len(target["keypoints"]) == left
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_crops_keep_objects_and_pixels_together(root):
    sizes = set()
    for epoch in range(30):
        image, target = read(root, epoch=epoch, augment=BoxAugment(crop=1.0))
        sizes.add(tuple(image.shape[1:]))
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].long().tolist(), strict=True):
            assert mask.shape == image.shape[1:]
            inside = torch.zeros_like(mask)
            inside[top:bottom, left:right] = 1
            assert torch.equal(mask, inside)
            assert len(image[0][mask.bool()].unique()) == 1
        visible = target["keypoints"][target["keypoints"][..., 2] > 0][:, :2]
        assert ((visible >= 0) & (visible <= torch.tensor([image.shape[2], image.shape[1]]))).all()
    assert len(sizes) > 5


def test_augmentation_follows_from_seed_epoch_and_index(root):
    augment = BoxAugment(crop=0.5, colour=0.4, scale=(0.5, 2.0))
    state = torch.get_rng_state()
    first, again, later = (read(root, epoch=epoch, augment=augment) for epoch in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])
    assert first[0].shape != later[0].shape
    plain, untouched = read(root, "test"), read(root, "test", augment=augment)
    assert torch.equal(plain[0], untouched[0])  # evaluation draws nothing
    shapes = {read(root, epoch=epoch, augment=BoxAugment(scale=(0.5, 2.0)))[0].shape[1] for epoch in range(20)}
    assert min(shapes) < 25
    assert max(shapes) > 35
    assert 15 <= min(shapes) <= max(shapes) <= 60


def test_colours_change_and_places_do_not(root):
    image, target = read(root, epoch=1, augment=BoxAugment(colour=0.5), flip=0.0)
    plain, expected = read(root, epoch=1, flip=0.0)
    assert not torch.equal(image, plain)
    assert torch.equal(target["boxes"], expected["boxes"])
    with pytest.raises(ValueError, match=r"crop and colour in \[0, 1\] and 0 < smallest <= largest scale \(got 2.0, 0.0"):
        BoxAugment(crop=2.0)


def test_digit_scenes_have_masks():
    data = DigitScenes(size=64, num_train=4, num_test=3, clutter=0, masks=True)
    for images, targets, _ in data.batches("test", 3):
        for image, target in zip(images, targets, strict=True):
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
            for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].long().tolist(), strict=True):
                assert mask.sum() > 0
                assert mask.sum() == mask[top:bottom, left:right].sum()


def test_workers_get_few_flat_arrays(root):
    data = COCO(root, train=(".", "labels.json"), test=(".", "labels.json"), num_workers=0, masks=True, keypoints=True)
    samples = data.samples("train") * 5000
    reader = ObjectReader(samples, data._read_image, (600,), 1000, 0.5, [0, 2, 1])
    assert not any(isinstance(value, torch.Tensor) for value in vars(reader).values())  # each would cost a file descriptor
    per_image = len(pickle.dumps(reader)) / len(samples)
    assert per_image < 600  # its outlines in text among them
    again = pickle.loads(pickle.dumps(reader))
    image, objects = again[(4999, 7)]
    assert isinstance(objects, Objects)
    assert torch.equal(image, reader[(4999, 7)][0])


PROGRAM = """
import multiprocessing, resource, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    from gkd.data import COCO
    part = ("images", "labels.json")
    data = COCO(sys.argv[1], train=part, test=part, num_workers=1, min_size=None)
    pids = set()
    for epoch in range(2):
        boxes = sum(len(target["boxes"]) for _, targets, _ in data.batches("train", 50, epoch=epoch) for target in targets)
        (loader,) = data._loaders.values()
        pids.add(loader.loader._iterator._workers[0].pid)
    print(boxes, len(pids))
"""


def test_two_hundred_images_under_forkserver(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(200):
        Image.fromarray(drawn()).save(tmp_path / "images" / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]} for number in range(200)]
    annotations = [{"image_id": number, "category_id": 1, "bbox": [4, 2, 8, 8]} for number in range(200)]
    (tmp_path / "labels.json").write_text(json.dumps({**content(), "images": images, "annotations": annotations}))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py"), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["200", "1"]  # all boxes, and the worker of the first epoch reads the second
