from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gkd.data import CropFlip, Digits, RandomImages
from gkd.data.digits import digit_images


def test_images_are_scikit_learns():
    images, targets = digit_images(8)
    reference = load_digits()
    assert torch.equal(targets, torch.from_numpy(reference.target).long())
    # At size 8, the digit is shrunk into the inner 6x6; grey 16 of 16 stays at most 255 and the ring around is black.
    assert images.shape == (1797, 1, 8, 8)
    assert images.max() <= 255
    ring = images.clone()
    ring[:, :, 1:-1, 1:-1] = 0
    assert not ring.any()


@pytest.mark.parametrize("size", [16, 32])
def test_the_means_of_the_pixels_are_kept(size):
    images, _ = digit_images(size)
    inner = images[:, 0, size // 8 : -size // 8, size // 8 : -size // 8].double().mean((1, 2)).numpy()
    np.testing.assert_allclose(inner, load_digits().images.mean((1, 2)) * 255 / 16, atol=8)


@pytest.mark.parametrize("size", [16, 32])
def test_splits(size):
    data = Digits(size, holdout=0.1)
    assert data.num_classes == 10
    assert data.input_size == (3, size, size)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [1132, 126, 539]
    for split in ("train", "val", "test"):
        counts = torch.bincount(data.targets(split)).double()
        assert counts.min() / counts.max() > 0.85  # 174 to 183 images a class in the whole.
    images = torch.cat([images for split in ("train_eval", "val", "test") for images, _, _ in data.batches(split, 500)])
    assert len(images) == 1797
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.mean().abs() < 0.02
    assert (images.std() - 1).abs() < 0.02


def test_the_test_images_are_always_the_same():
    def rows(data: Digits) -> list[int]:
        return [hash(image.numpy().tobytes()) for image in next(data.batches("test", 539))[0]]

    assert rows(Digits(16)) == rows(Digits(16, holdout=0.2, subset=100, split_seed=5))


def test_augmentation_cuts_nothing_off():
    data = Digits(16)
    assert isinstance(data.augment, CropFlip)
    assert (data.augment.padding, data.augment.flip) == (2, 0.0)
    images, _, index = next(data.batches("train", 1000))
    plain = next(data.batches("train_eval", 1258))[0][index]
    torch.testing.assert_close(images.mean((1, 2, 3)), plain.mean((1, 2, 3)))
    assert not torch.equal(images, plain)


@pytest.mark.parametrize("size", [0, 12, 30])
def test_size_must_be_a_multiple_of_eight(size):
    with pytest.raises(ValueError, match="Expected size as a positive multiple of 8"):
        Digits(size)


def test_shares_are_checked():
    with pytest.raises(ValueError, match="Expected test as a share"):
        Digits(test=1.0)
    with pytest.raises(ValueError, match="Expected augment as 'default'"):
        Digits(augment="flip")


@pytest.mark.parametrize(("num_classes", "input_size"), [(10, (3, 32, 32)), (3, (1, 5, 7)), (100, (3, 64, 64))])
def test_random_images(num_classes, input_size):
    data = RandomImages(num_classes, input_size, num_train=200, num_test=40, augment=CropFlip(2))
    again = RandomImages(num_classes, input_size, num_train=200, num_test=40, augment=CropFlip(2))
    assert data.input_size == input_size
    assert data.num_classes == num_classes
    for first, second in zip(data.batches("train", 16), again.batches("train", 16), strict=True):
        assert first[0].shape == (16, *input_size)
        assert torch.equal(first[0], second[0])
    assert not torch.equal(next(RandomImages(num_classes, input_size, seed=1).batches("test", 8))[0], next(data.batches("test", 8))[0])


def test_random_images_can_be_learnt():
    data = RandomImages(num_classes=5, input_size=(3, 8, 8))
    images, targets, _ = next(data.batches("train", 256))
    centers = torch.stack([images[targets == number].mean(0) for number in range(5)]).flatten(1)
    tests, labels, _ = next(data.batches("test", 128))
    assert (torch.cdist(tests.flatten(1), centers).argmin(1) == labels).double().mean() > 0.95


def test_random_images_refuse():
    with pytest.raises(ValueError, match="Expected positive numbers"):
        RandomImages(num_classes=0)
