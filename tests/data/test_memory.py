from __future__ import annotations

import pytest
import torch

from gkd.data import CropFlip, InMemoryImages


def make(num_train: int = 23, num_test: int = 11, size: int = 6, **options) -> InMemoryImages:
    source = torch.Generator().manual_seed(0)
    parts = {
        part: (torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=source), torch.arange(number) % 4)
        for part, number in (("train", num_train), ("test", num_test))
    }
    return InMemoryImages(parts, 4, [0.5] * 3, [0.25] * 3, **options)


def collect(batches) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def test_attributes():
    data = make()
    assert data.num_classes == 4
    assert data.classes == ("0", "1", "2", "3")
    assert data.input_size == (3, 6, 6)
    assert data.mean == (0.5,) * 3
    assert data.std == (0.25,) * 3


def test_evaluation_reads_everything_in_order():
    data = make()
    batches = list(data.batches("test", 4))
    assert [len(targets) for _, targets, _ in batches] == [4, 4, 3]
    images, targets, index = collect(batches)
    assert index.tolist() == list(range(11))
    assert torch.equal(targets, data.targets("test"))
    assert images.dtype == torch.float32
    # By hand: byte 0 is (0 - 0.5) / 0.25 = -2, byte 255 is +2.
    assert images.min() >= -2
    assert images.max() <= 2
    assert data.num_batches("test", 4) == 3


def test_training_is_a_permutation_and_drops_the_rest():
    data = make()
    batches = list(data.batches("train", 5, seed=1))
    assert len(batches) == data.num_batches("train", 5) == 4
    images, targets, index = collect(batches)
    assert len(index.unique()) == 20
    assert index.tolist() != sorted(index.tolist())
    assert torch.equal(targets, data.targets("train")[index])
    plain, _, order = collect(data.batches("train_eval", 5))
    assert torch.equal(images, plain[index])  # No augmentation: the same images.
    assert torch.equal(order, torch.arange(23))


def test_epochs_and_seeds_differ_and_repeat():
    data = make(augment=CropFlip(padding=2))

    def read(seed: int, epoch: int) -> torch.Tensor:
        return collect(data.batches("train", 5, seed=seed, epoch=epoch))[0]

    first = read(0, 0)
    assert torch.equal(read(0, 0), first)
    assert not torch.equal(read(0, 1), first)
    assert not torch.equal(read(1, 0), first)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(read(0, 0), first)
    torch.set_rng_state(state)
    read(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("split", ["train", "test"])
def test_start_continues_bit_for_bit(split):
    data = make(augment=CropFlip(padding=2))
    whole = list(data.batches(split, 3, seed=5, epoch=2))
    for start in range(len(whole) + 1):
        rest = list(data.batches(split, 3, seed=5, epoch=2, start=start))
        assert len(rest) == len(whole) - start
        for expected, found in zip(whole[start:], rest, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("split", ["train", "train_eval", "test"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_what_one_process_sees(split, world_size):
    data = make(num_test=13, augment=CropFlip(padding=2))
    single = list(data.batches(split, 2 * world_size, seed=5, epoch=2))
    ranks = [list(data.batches(split, 2, seed=5, epoch=2, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(single) == data.num_batches(split, 2, world_size)
    for step, expected in enumerate(single):
        found = collect([batches[step] for batches in ranks if step < len(batches)])
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_augmented_images_are_shifts_of_their_own():
    data = make(augment=CropFlip(padding=2))
    clean = collect(data.batches("train_eval", 23))[0]
    images, _, index = next(data.batches("train", 20))
    black = -2.0  # Padding is black before normalisation.
    moved = 0
    for image, number in zip(images, index, strict=True):
        padded = torch.nn.functional.pad(clean[number], (2,) * 4, value=black)
        cuts = [padded[:, row : row + 6, column : column + 6] for row in range(5) for column in range(5)]
        matches = [torch.equal(image, cut) or torch.equal(image, cut.flip(-1)) for cut in cuts]
        assert any(matches)
        moved += not matches[12]
    assert moved > 10


def test_holdout_and_subset():
    whole, held, small, smaller = make(200), make(200, holdout=0.1), make(200, holdout=0.1, subset=0.5), make(200, holdout=20, subset=40)
    assert [whole.num_samples(split) for split in ("train", "val", "test")] == [200, 0, 11]
    assert [held.num_samples(split) for split in ("train", "train_eval", "val")] == [180, 180, 20]
    assert torch.bincount(held.targets("val")).tolist() == [5] * 4
    assert small.num_samples("train") == 90
    assert smaller.num_samples("train") == 40
    assert torch.bincount(smaller.targets("train")).tolist() == [10] * 4

    def rows(data: InMemoryImages, split: str) -> set[bytes]:
        return {image.numpy().tobytes() for image in collect(data.batches(split, 7))[0]}

    assert not rows(held, "val") & rows(held, "train_eval")
    assert rows(held, "val") | rows(held, "train_eval") == rows(whole, "train_eval")
    assert rows(small, "val") == rows(smaller, "val") == rows(held, "val")
    assert rows(smaller, "train_eval") < rows(small, "train_eval") < rows(held, "train_eval")
    assert rows(make(200, holdout=0.1, split_seed=1), "val") != rows(held, "val")
    # The index counts within the split: a memory bank of num_samples('train') rows holds it.
    assert max(int(index.max()) for _, _, index in small.batches("train", 10)) < 90


def test_own_validation_part():
    images, targets = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.arange(8) % 2
    parts = {"train": (images, targets), "val": (images[:3], targets[:3]), "test": (images[:2], targets[:2])}
    data = InMemoryImages(parts, ["a", "b"], [0.5] * 3, [0.5] * 3)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [8, 3, 2]
    with pytest.raises(ValueError, match="Expected holdout=0"):
        InMemoryImages(parts, ["a", "b"], [0.5] * 3, [0.5] * 3, holdout=0.5)


def test_channels_last():
    last = next(make(channels_last=True).batches("test", 4))[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, next(make().batches("test", 4))[0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("valid", 4), {}, r"Expected a split among 'train', 'train_eval', 'val', 'test' \(got 'valid'\)"),
        (("val", 4), {}, r"Expected held-out images for the split 'val' .*holdout=0\.1"),
        (("train", 0), {}, "Expected batch_size and world_size of at least 1"),
        (("train", 24), {}, r"Expected at least one full batch of 24 images \(got 23"),
        (("train", 12), {"world_size": 2}, r"full batch of 2 x 12 images \(got 23"),
        (("train", 4), {"rank": 2, "world_size": 2}, r"Expected rank in \[0, 2\) \(got 2\)"),
        (("train", 4), {"start": 6}, r"Expected start in \[0, 5\] \(got 6\)"),
        (("train", 4), {"start": -1}, r"Expected start in \[0, 5\] \(got -1\)"),
    ],
)
def test_batches_refuses_at_once(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make().batches(*arguments, **options)  # Not one batch has been asked for.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "Expected at least one training image"),
        ({"holdout": 1.5}, "Expected holdout as a share"),
        ({"holdout": -0.1}, "Expected holdout as a share"),
        ({"subset": 0}, "Expected at least one training image"),
        ({"subset": 24}, r"Expected subset as a share .* at most 23 images \(got 24\)"),
        ({"holdout": 4, "subset": 20}, r"at most 19 images \(got 20\)"),
    ],
)
def test_splits_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_parts_are_checked():
    images, targets = torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.arange(4)
    good = (images, targets)
    statistics = ([0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"Expected parts 'train' and 'test'.*got \['train'\]"):
        InMemoryImages({"train": good}, 4, *statistics)
    with pytest.raises(ValueError, match=r"Expected uint8 images \[N, 3, 4, 4\] in the part 'test' \(got torch.float32"):
        InMemoryImages({"train": good, "test": (images.float(), targets)}, 4, *statistics)
    with pytest.raises(ValueError, match=r"Expected long targets \[4\] in the part 'test'"):
        InMemoryImages({"train": good, "test": (images, targets[:3])}, 4, *statistics)
    with pytest.raises(ValueError, match=r"Expected targets in \[0, 3\) in the part 'train' \(got 0 to 3\)"):
        InMemoryImages({"train": good, "test": good}, 3, *statistics)
    with pytest.raises(ValueError, match="Expected images in the part 'test'"):
        InMemoryImages({"train": good, "test": (images[:0], targets[:0])}, 4, *statistics)
    with pytest.raises(ValueError, match="Expected mean and positive std for each of 3 channels"):
        InMemoryImages({"train": good, "test": good}, 4, [0.5], [0.5])


@pytest.mark.gpu
def test_the_gpu_sees_the_same_images_in_chunks():
    data = make(augment=CropFlip(padding=2))
    expected = list(data.batches("train", 4, seed=3))
    found = list(data.batches("train", 4, seed=3, device="cuda"))
    for a, b in zip(expected, found, strict=True):
        assert b[0].is_cuda
        torch.testing.assert_close(a[0], b[0].cpu(), rtol=1e-6, atol=1e-6)
        assert torch.equal(a[2], b[2].cpu())


def test_chunks_are_cut_into_batches():
    # The path of an accelerator, on the device that every machine has beside the CPU: shapes only; the pixels are compared on a GPU.
    data = make(augment=CropFlip(padding=2))
    batches = list(data.batches("train", 4, seed=3, device="meta"))
    assert [tuple(images.shape) for images, _, _ in batches] == [(4, 3, 6, 6)] * 5
