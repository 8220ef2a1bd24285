from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from gkd.data import ImageFolder
from gkd.data.workers import PackedStrings

v2 = pytest.importorskip("torchvision.transforms.v2")


def write_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog", "owl"), size: int = 12) -> Path:
    """Writes so many images of noise for each class of each part."""
    for part, number in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for count in range(number):
                pixels = torch.randint(0, 256, (size, size + 3, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{name}{count}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 7, "test": 3})


def collect(batches) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_evaluation_equals_a_plain_loop(root):
    data = ImageFolder(root, size=8, num_workers=0)
    assert data.classes == ("cat", "dog", "owl")
    assert data.input_size == (3, 8, 8)
    images, targets, index = collect(data.batches("test", 4))
    assert targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert index.tolist() == list(range(9))
    transform = v2.Compose([v2.Resize(9), v2.CenterCrop(8), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    normalize = v2.Normalize(data.mean, data.std)
    paths = sorted((root / "test").glob("*/*.png"))
    expected = torch.stack([normalize(transform(Image.open(path).convert("RGB"))) for path in paths])
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_workers_steps_and_ranks_make_no_difference(root):
    alone, workers = ImageFolder(root, size=8, num_workers=0), ImageFolder(root, size=8, num_workers=2)
    for epoch in (0, 1):
        whole = list(alone.batches("train", 4, epoch=epoch, seed=3))
        assert len(whole) == 5
        assert same(list(workers.batches("train", 4, epoch=epoch, seed=3)), whole)  # The second epoch is read by the same workers.
    assert same(list(alone.batches("train", 4, epoch=1, seed=3, start=2)), whole[2:])
    ranks = [list(alone.batches("train", 2, epoch=1, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert same([collect(step) for step in zip(*ranks, strict=True)], whole)
    assert not torch.equal(next(alone.batches("train", 4, epoch=0, seed=3))[0], whole[0][0])

    # Given up in the middle, read twice at once: each iteration gives what it should.
    abandoned = workers.batches("train", 4, epoch=0, seed=3)
    next(abandoned)
    abandoned.close()
    assert same(list(workers.batches("train", 4, epoch=1, seed=3)), whole)
    pairs = list(zip(workers.batches("train", 4, epoch=1, seed=3), workers.batches("train", 4, epoch=1, seed=3), strict=True))
    assert same([first for first, _ in pairs], whole)
    assert same([second for _, second in pairs], whole)


def test_global_generators_do_not_move(root):
    data = ImageFolder(root, size=8, num_workers=0)
    state, python_state = torch.get_rng_state(), random.getstate()
    list(data.batches("train", 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_own_transforms_may_draw_from_python(root):
    def transform(picture):
        return torch.full((3, 2, 2), random.randrange(256), dtype=torch.uint8)

    data = ImageFolder(root, size=2, num_workers=0, train_transform=transform, eval_transform=transform, mean=[0] * 3, std=[1] * 3)
    first = collect(data.batches("train", 4, seed=1))[0]
    random.seed(123)
    assert torch.equal(collect(data.batches("train", 4, seed=1))[0], first)
    assert len(first[:, 0, 0, 0].unique()) > 10


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        (lambda picture: picture, "got Image"),
        (lambda picture: torch.zeros(3, 8, 8), r"got torch.float32 \[3, 8, 8\]"),
        (lambda picture: torch.zeros(3, 9, 8, dtype=torch.uint8), r"got torch.uint8 \[3, 9, 8\]"),
    ],
)
def test_a_wrong_transform_is_told_at_once(root, transform, got):
    with pytest.raises(ValueError, match=rf"Expected a transform that gives uint8 \[3, 8, 8\] \({got}"):
        ImageFolder(root, size=8, num_workers=0, train_transform=transform)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_named_and_counted(tmp_path, num_workers, caplog):
    root = write_folder(tmp_path, {"train": 4, "test": 1})
    broken = [root / "train" / "dog" / "dog1.png", root / "train" / "owl" / "owl3.png"]
    broken[0].write_bytes(broken[0].read_bytes()[:60])
    broken[1].write_text("not an image")
    with pytest.raises(ValueError, match="Expected 12 readable images of the part 'train' in a batch") as caught:
        list(ImageFolder(root, size=8, num_workers=num_workers).batches("train_eval", 12))
    assert "got 2 that cannot be read" in str(caught.value)
    assert all(str(path) in str(caught.value) for path in broken)
    assert "Traceback" not in str(caught.value)

    data = ImageFolder(root, size=8, num_workers=num_workers, skip_unreadable=True)
    images, targets, index = collect(data.batches("train_eval", 5))
    assert index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert torch.equal(targets, data.targets("train_eval")[index])
    assert len(images) == 10
    assert set(data.unreadable) == {str(path) for path in broken}
    list(data.batches("train", 4))
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 2  # Once an image, not once an epoch.
    with pytest.raises(ValueError, match=r"\(got 1 that cannot be read; 2 so far\)"):  # A batch of nothing helps nobody.
        list(data.batches("train_eval", 1))


def test_paths_come_back():
    paths = ["/a/b.png", "", "ü/漢字.jpg", "/a/b c.png"]
    stored = PackedStrings(paths)
    assert [stored[row] for row in range(4)] == paths


@pytest.mark.gpu
def test_gpu_batches_equal_cpu_batches(root):
    data = ImageFolder(root, size=8, num_workers=1)
    for a, b in zip(data.batches("train", 4, seed=3), data.batches("train", 4, seed=3, device="cuda"), strict=True):
        torch.testing.assert_close(a[0], b[0].cpu(), rtol=1e-6, atol=1e-6)
        assert torch.equal(a[2], b[2].cpu())
