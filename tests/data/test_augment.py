from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from gkd.data import CropFlip, Normalize
from gkd.data.augment import choose, erase, mirror, shift


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8)  # Never 0: zeros in the output come from padding or erasing.


def test_shift_by_hand():
    # [[1, 2], [3, 4]] padded by 1; offset (0, 1) cuts rows 0..1, columns 1..2: the image moves down by one.
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    assert shift(image, torch.tensor([[0, 1]]), 1).tolist() == [[[[0, 0], [1, 2]]]]
    assert shift(image, torch.tensor([[1, 1]]), 1).tolist() == image.tolist()
    assert shift(image, torch.tensor([[2, 2]]), 1).tolist() == [[[[4, 0], [0, 0]]]]


@pytest.mark.parametrize("shape", [(7, 3, 9, 9), (5, 1, 6, 11)])
def test_crop_flip_equals_one_image_at_a_time(shape):
    images, padding, size = pixels(*shape), 3, 4
    draws = torch.rand(len(images), 5)
    output = CropFlip(padding, flip=0.5, cutout=size)(images, draws)
    height, width = shape[-2:]
    for image, draw, result in zip(images.numpy(), draws.double().numpy(), output.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        row, column = int(draw[0] * (2 * padding + 1)), int(draw[1] * (2 * padding + 1))
        expected = padded[:, row : row + height, column : column + width].copy()
        if draw[2] < 0.5:
            expected = expected[:, :, ::-1].copy()
        top, left = int(draw[3] * height) - size // 2, int(draw[4] * width) - size // 2
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        np.testing.assert_array_equal(result, expected)
    assert not torch.equal(output, images)


def test_crops_are_uniform_over_all_offsets():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 1
    images = image.expand(8000, -1, -1, -1)
    mean = CropFlip(padding=1, flip=0.5)(images, torch.rand(8000, 5)).double().mean(0)[0]
    # The marked pixel lands on each of 3 x 3 places with probability 1/9; 5 standard deviations are 5 sqrt(8/81/8000) < 0.018.
    assert (mean[1:4, 1:4] - 1 / 9).abs().max() < 0.018
    assert mean.sum() == pytest.approx(1)


def test_extreme_draws_stay_in_range():
    largest = 1 - 2**-24  # The largest draw in float32; times 5 it must not round to an offset of 5.
    images = pixels(2, 3, 4, 4)
    draws = torch.tensor([[0.0] * 5, [largest] * 5])
    for padding in (1, 2, 4, 64):
        output = CropFlip(padding, cutout=2)(images, draws)
        assert output.shape == images.shape


def test_switches():
    images, draws = pixels(6, 3, 8, 8), torch.rand(6, 5)
    assert torch.equal(CropFlip(padding=0, flip=0.0)(images, draws), images)
    assert torch.equal(CropFlip(padding=0, flip=1.0)(images, draws), images.flip(-1))
    assert torch.equal(mirror(mirror(images, draws[:, 0] < 0.5), draws[:, 0] < 0.5), images)
    erased = erase(images, torch.tensor([[4, 4]] * 6), 20)
    assert (erased == 0).all()


def test_input_is_not_written_to():
    images, draws = pixels(6, 3, 8, 8), torch.rand(6, 5)
    kept = images.clone()
    Normalize([0.5] * 3, [0.5] * 3)(CropFlip(cutout=4)(images, draws))
    assert torch.equal(images, kept)


def test_batch_equals_singles():
    images, draws = pixels(6, 3, 8, 8), torch.rand(6, 5)
    augment = CropFlip(padding=2, cutout=3)
    singles = torch.cat([augment(images[i : i + 1], draws[i : i + 1]) for i in range(6)])
    assert torch.equal(augment(images, draws), singles)
    assert augment(images[:0], draws[:0]).shape == (0, 3, 8, 8)


def test_normalize_equals_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images = pixels(4, 3, 5, 6)
    mean, std = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    output = Normalize(mean, std)(images)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert output.is_contiguous()
    last = Normalize(mean, std, channels_last=True)(images)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, output)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 2, 2).byte()])
def test_normalize_refuses(images):
    with pytest.raises(ValueError, match=r"Expected uint8 images \[B, 3, H, W\] \(got"):
        Normalize([0.5] * 3, [0.5] * 3)(images)


@pytest.mark.parametrize("options", [{"padding": -1}, {"flip": 1.5}, {"cutout": -2}])
def test_crop_flip_refuses(options):
    with pytest.raises(ValueError, match="Expected padding >= 0"):
        CropFlip(**options)


def test_draws_must_fit():
    with pytest.raises(ValueError, match=r"Expected draws \[2, 5\] \(got \[2, 3\]\)"):
        CropFlip()(pixels(2, 3, 4, 4), torch.rand(2, 3))


def test_choose():
    default, own = CropFlip(), CropFlip(2)
    assert choose("default", default) is default
    assert choose(own, default) is own
    assert choose(None, default) is None
    with pytest.raises(ValueError, match=r"Expected augment as 'default'.*got 'randaugment'"):
        choose("randaugment", default)


def test_pickles():
    images, draws = pixels(2, 3, 8, 8), torch.rand(2, 5)
    augment, normalize = pickle.loads(pickle.dumps((CropFlip(2), Normalize([0.5] * 3, [0.2] * 3, channels_last=True))))
    assert torch.equal(augment(images, draws), CropFlip(2)(images, draws))
    assert torch.equal(normalize(images), Normalize([0.5] * 3, [0.2] * 3)(images))


@pytest.mark.gpu
def test_same_pixels_on_the_gpu():
    images, draws = pixels(16, 3, 32, 32), torch.rand(16, 5)
    augment = CropFlip(cutout=8)
    assert torch.equal(augment(images.cuda(), draws.cuda()).cpu(), augment(images, draws))
