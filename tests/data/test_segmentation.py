"""Segmentation data: image and mask stay together, whatever is done to them, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkd.data import DigitSceneMasks, DigitScenes, SegmentationFolder, UnreadableImageError, VOCSegmentation

CLASSES = ("ground", "left", "right")


def write_pair(folder: Path, masks: Path, name: str, size: tuple[int, int] = (12, 20)) -> None:
    """An image whose red channel says the class of each pixel: 40 times its number."""
    height, width = size
    mask = np.zeros(size, dtype=np.uint8)
    mask[: height // 2, : width // 2], mask[: height // 2, width // 2 :] = 1, 2
    for place in (folder, masks):
        place.mkdir(parents=True, exist_ok=True)
    image = np.stack([mask * 40, np.full_like(mask, 7), np.full_like(mask, 9)], axis=2)
    Image.fromarray(image).save(folder / f"{name}.png")
    picture = Image.fromarray(mask)
    picture.putpalette([value % 256 for value in range(3, 771)])  # As VOC's masks: the indices count, not the colours.
    picture.save(masks / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for number in range(count):
            write_pair(tmp_path / part / "images", tmp_path / part / "masks", f"{number}")
    return tmp_path


def plain(**options):
    return {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3, "num_workers": 0, **options}


def test_masks_follow_their_images(root):
    data = SegmentationFolder(root, CLASSES, size=16, scale=(0.5, 2.0), **plain())
    assert (data.num_classes, data.classes, data.input_size) == (3, CLASSES, (3, 16, 16))
    pixels, flipped = 0, 0
    for epoch in range(5):
        for images, targets, index in data.batches("train", 3, epoch=epoch, seed=1):
            assert images.shape == (3, 3, 16, 16)
            assert targets.shape == (3, 16, 16)
            assert targets.dtype == torch.long
            assert len(index) == 3
            counted = targets != 255
            # Smoothed edges apart, red is 40 times the class; outside of the image, all is 0.
            agree = (images[:, 0] - 40.0 * targets).abs()[counted] < 1
            assert agree.float().mean() > 0.7
            assert (images[:, 1][counted] > 0).all()
            assert (images[:, 1][~counted] == 0).all()
            pixels += int(counted.sum())
            for target in targets:
                columns = [(target == number).nonzero()[:, 1].float().mean() for number in (1, 2)]
                flipped += int(columns[0] > columns[1])
    assert pixels > 1000
    assert 5 < flipped < 25


def test_evaluation_keeps_every_pixel(root):
    data = SegmentationFolder(root, CLASSES, size=10, **plain())
    images, targets, index = next(data.batches("test", 3))
    assert index.tolist() == [0, 1, 2]
    # 12 x 20 fits as 6 x 10; the rest is filled below.
    assert (targets[:, 6:] == 255).all()
    assert targets[0, 0].tolist() == [1] * 5 + [2] * 5
    assert (targets[0, 3:6] == 0).all()
    assert torch.equal(images, next(data.batches("test", 3, epoch=5, seed=9))[0])


def test_workers_and_start_make_no_difference(root):
    alone, workers = (SegmentationFolder(root, CLASSES, size=8, num_workers=number) for number in (0, 1))
    whole = list(alone.batches("train", 2, epoch=1, seed=3))
    for batches in (workers.batches("train", 2, epoch=1, seed=3), workers.batches("train", 2, epoch=1, seed=3)):
        for first, second in zip(whole, batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (rest,) = alone.batches("train", 2, epoch=1, seed=3, start=2)
    assert torch.equal(rest[0], whole[2][0])
    assert not torch.equal(next(alone.batches("train", 2, epoch=2, seed=3))[0], whole[0][0])


def test_the_two_layouts_and_validation_parts(tmp_path):
    for part in ("train", "val"):
        for number in range(4):
            write_pair(tmp_path / "images" / part, tmp_path / "masks" / part, f"{number}")
    data = SegmentationFolder(tmp_path, CLASSES, size=8, holdout=1, **plain())
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [3, 1, 4]
    write_pair(tmp_path / "images" / "test", tmp_path / "masks" / "test", "9")
    data = SegmentationFolder(tmp_path, CLASSES, size=8, **plain())
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [4, 4, 1]
    with pytest.raises(ValueError, match="Expected holdout=0 where the data bring their own validation part"):
        SegmentationFolder(tmp_path, CLASSES, size=8, holdout=1)


def test_two_folders_alone(tmp_path):
    for number in range(10):
        write_pair(tmp_path / "images", tmp_path / "masks", f"{number}")
    data = SegmentationFolder(tmp_path, CLASSES, size=8, test=0.3, holdout=2, **plain())
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [5, 2, 3]
    again = SegmentationFolder(tmp_path, CLASSES, size=8, test=3, **plain())
    files = [list(each._files()) for each in (data, again)]
    assert files[0] == files[1]
    assert len(set(files[0])) == 20
    with pytest.raises(ValueError, match=r"Expected test as a share .*\(got 11\)"):
        SegmentationFolder(tmp_path, CLASSES, test=11)


def test_mistakes_are_named(root):
    with pytest.raises(ValueError, match=r"Expected the folders train/images.*SegmentationFolder\.root"):
        SegmentationFolder(root / "train" / "images", CLASSES)
    with pytest.raises(ValueError, match=r"Expected size >= 1.*scale.*\(got 8, \(2, 1\)"):
        SegmentationFolder(root, CLASSES, size=8, scale=(2, 1))
    with pytest.raises(ValueError, match="Expected 2 to 255 classes of different names"):
        SegmentationFolder(root, ("a", "a"))
    with pytest.raises(UnreadableImageError, match=r"Expected classes below 2, or 255, in the mask .*0.png \(got \[2\]\)"):
        list(SegmentationFolder(root, CLASSES[:2], size=8, num_workers=0).batches("test", 1))
    Image.new("L", (5, 5)).save(root / "test" / "masks" / "0.png")
    with pytest.raises(UnreadableImageError, match=r"Expected a mask of \[12, 20\] pixels at .*0.png \(got \[5, 5\]\)"):
        list(SegmentationFolder(root, CLASSES, size=8, num_workers=0).batches("test", 1))
    Image.new("RGB", (20, 12)).save(root / "test" / "masks" / "0.png")
    with pytest.raises(UnreadableImageError, match=r"Expected a mask of one channel .*\(got mode RGB\)"):
        list(SegmentationFolder(root, CLASSES, size=8, num_workers=0).batches("test", 1))
    lenient = SegmentationFolder(root, CLASSES, size=8, num_workers=0, skip_unreadable=True)
    assert [index.tolist() for _, _, index in lenient.batches("test", 2)] == [[1], [2]]
    (root / "test" / "masks" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"Expected all 3 files .*got 1 absent: .*masks/0.png"):
        SegmentationFolder(root, CLASSES)
    write_pair(root / "test" / "images", root / "test" / "masks", "0")
    Image.new("RGB", (20, 12)).save(root / "test" / "images" / "0.jpg")
    with pytest.raises(ValueError, match=r"Expected images of different names.*0.jpg and 0.png"):
        SegmentationFolder(root, CLASSES)


def test_files_that_vanish_are_found_before_the_training(root):
    data = SegmentationFolder(root, CLASSES, size=8, num_workers=0)
    data.check_files()
    for number in range(5):
        (root / "train" / "masks" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"got 5 absent: .*0.png, .*1.png, .*2.png, \.\."):
        data.check_files()


def test_voc(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in (("train", ("a", "b c")), ("val", ("d",))):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write_pair(base / "JPEGImages", base / "SegmentationClass", name)
            Image.open(base / "JPEGImages" / f"{name}.png").save(base / "JPEGImages" / f"{name}.jpg")
    data = VOCSegmentation(tmp_path, size=20, num_workers=0)
    assert data.num_classes == 21
    assert data.classes[:2] == ("background", "aeroplane")
    assert [data.num_samples(split) for split in ("train", "test")] == [2, 1]
    targets = next(data.batches("test", 1))[1]
    assert set(targets.unique().tolist()) == {0, 1, 2, 255}
    with pytest.raises(ValueError, match=r"image set VOC2012/trainval .*there are VOC2012/train, VOC2012/val.*VOCSegmentation\.train"):
        VOCSegmentation(tmp_path, train="VOC2012/trainval")


def test_digit_scenes_are_those_of_detection():
    scene = {"size": 64, "num_train": 6, "num_test": 4, "clutter": 0, "overlap": 0.0}
    masks, boxes = DigitSceneMasks(**scene, mean=(0, 0, 0), std=(1, 1, 1)), DigitScenes(**scene)
    images, targets, index = next(masks.batches("test", 4))
    assert index.tolist() == [0, 1, 2, 3]
    objects = 0
    for image, target, sample, number in zip(images, targets, boxes.samples("test"), range(4), strict=True):
        torch.testing.assert_close(image, boxes.image("test", number) / 255)
        outside = torch.ones_like(target, dtype=torch.bool)
        for (left, top, right, bottom), label in zip(sample.boxes.long().tolist(), sample.labels.tolist(), strict=True):
            inside = target[top:bottom, left:right]
            assert set(inside.unique().tolist()) <= {0, label + 1}
            assert (inside == label + 1).float().mean() > 0.15  # strokes, not the whole box
            outside[top:bottom, left:right] = False
            objects += 1
        assert (target[outside] == 0).all()
    assert objects > 4
    assert [DigitSceneMasks(**scene, holdout=2).num_samples(split) for split in ("train", "val", "test")] == [4, 2, 4]
    masks.check_files()
