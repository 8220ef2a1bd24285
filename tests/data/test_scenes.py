"""Digit scenes: what is drawn, where it is said to be, and that all follows from seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkd.data import DigitScenes
from gkd.data.drawing import compose, digit_pools


@pytest.fixture(scope="module")
def data():
    return DigitScenes(size=64, num_train=12, num_test=6, digits=(0, 4), skip_empty=False)


def test_follows_from_the_seed(data):
    again = DigitScenes(size=64, num_train=20, num_test=3, digits=(0, 4), skip_empty=False)
    other = DigitScenes(size=64, num_train=12, num_test=3, digits=(0, 4), scene_seed=1, skip_empty=False)
    for index in range(12):  # the same scene, however many there are
        assert torch.equal(data.image("train", index), again.image("train", index))
    assert not torch.equal(data.image("train", 0), other.image("train", 0))
    assert not torch.equal(data.image("train", 0), data.image("test", 0))


def test_boxes_lie_in_the_scene_and_agree_with_the_annotations(data):
    known = data.annotations("train")
    assert len(known["images"]) == 12
    drawn = 0
    for sample in data.samples("train"):
        there = [annotation for annotation in known["annotations"] if annotation["image_id"] == sample.image_id]
        assert [annotation["category_id"] - 1 for annotation in there] == sample.labels.tolist()
        for annotation, box in zip(there, sample.boxes, strict=True):
            left, top, width, height = annotation["bbox"]
            assert box.tolist() == [left, top, left + width, top + height]
            assert annotation["area"] == width * height > 0
            assert 0 <= left < left + width <= 64
            assert 0 <= top < top + height <= 64
            drawn += 1
    assert drawn > 10
    assert len({annotation["id"] for annotation in known["annotations"]}) == drawn
    assert {len(sample.boxes) for sample in data.samples("train")} >= {0, 2}


def test_a_digit_is_drawn_in_its_box_and_nothing_else_without_clutter():
    pool = digit_pools()["train"]
    images = []
    for least in (0, 1):
        scene = compose(np.random.default_rng(3), pool, 64, digits=(least, least), clutter=0)
        images.append(scene.image.float())
    left, top, right, bottom = (int(value) for value in scene.boxes[0])
    change = (images[1] - images[0]).abs().mean(0)
    inside = change[top:bottom, left:right].mean()
    change[top:bottom, left:right] = 0
    assert inside > 2 * change.mean()  # the noise is drawn after the digit, and so differs everywhere


def test_digits_of_the_test_scenes_are_others():
    train, test = (digit_pools()[part][0] for part in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert abs(len(test) / 1797 - 0.3) < 0.01


def test_overlap_is_limited():
    data = DigitScenes(size=64, num_train=20, num_test=1, digits=(5, 6), overlap=0.0)
    for sample in data.samples("train"):
        low = torch.maximum(sample.boxes[:, None, :2], sample.boxes[None, :, :2])
        high = torch.minimum(sample.boxes[:, None, 2:], sample.boxes[None, :, 2:])
        common = (high - low).clamp(min=0).prod(2)
        assert int((common > 0).sum()) == len(sample.boxes)  # each with itself


def test_an_epoch_continues_where_it_was_left(data):
    whole = list(data.batches("train", 4, epoch=2, seed=5))
    rest = list(data.batches("train", 4, epoch=2, seed=5, start=1))
    assert len(whole) == 3
    for (images, targets, index), (again, same, place) in zip(whole[1:], rest, strict=True):
        assert torch.equal(index, place)
        assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same, strict=True))


def test_scenes_without_digits_are_left_out_of_the_training_if_asked():
    every = DigitScenes(size=32, num_train=20, num_test=2, digits=(0, 1), skip_empty=False)
    some = DigitScenes(size=32, num_train=20, num_test=2, digits=(0, 1))
    assert some.num_samples("train") < every.num_samples("train") == 20
    assert all(len(sample.boxes) for sample in some.samples("train"))


def test_splits():
    data = DigitScenes(size=32, num_train=20, num_test=3, holdout=5, subset=8)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [8, 5, 3]
    assert not {s.image_id for s in data.samples("train")} & {s.image_id for s in data.samples("val")}
    assert len(data.annotations("val")["images"]) == 5


@pytest.mark.parametrize("wrong", [{"size": 8}, {"digits": (3, 2)}, {"scale": (0.0, 0.5)}, {"num_test": 0}])
def test_bad_numbers(wrong):
    with pytest.raises(ValueError, match="Expected size >= 16"):
        DigitScenes(**{"num_train": 2, "num_test": 1, **wrong})
