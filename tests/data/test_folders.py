from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from gkd.data import CIFAR10, CIFAR100, CropFlip, ImageFolder, ImageNet

datasets = pytest.importorskip("torchvision.datasets")


def write_images(root, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(root / folder / "image.png")


def test_cifar100_is_what_torchvision_reads(cifar100_root):
    data = CIFAR100(cifar100_root, holdout=0.1)
    assert data.num_classes == 100
    assert data.classes[:3] == ("apple", "aquarium_fish", "baby")
    assert data.input_size == (3, 32, 32)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    assert torch.bincount(data.targets("val")).tolist() == [50] * 100
    assert data.num_batches("train", 64) == 703

    reference = datasets.CIFAR100(cifar100_root, train=False)
    images, targets, index = next(data.batches("test", 50))
    bytes_ = torch.stack([torch.from_numpy(np.array(reference[number][0])) for number in index.tolist()]).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.5071, 0.4867, 0.4408]).view(-1, 1, 1), torch.tensor([0.2675, 0.2565, 0.2761]).view(-1, 1, 1)
    torch.testing.assert_close(images, (bytes_ / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert targets.tolist() == [reference[number][1] for number in index.tolist()]

    # The statistics of the recipe are those of the training images.
    for channel in range(3):
        std, mean = torch.std_mean(data._images["train"][:, channel].float())
        assert mean / 255 == pytest.approx(data.mean[channel], abs=1e-3)
        assert std / 255 == pytest.approx(data.std[channel], abs=1e-3)
    assert isinstance(data.augment, CropFlip)
    assert data.augment.padding == 4


def test_cifar10_reads_files_in_the_original_format(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        batch = {"data": np.full((10, 3072), number, dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(ValueError, match="content is not the original one"):
        CIFAR10(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *arguments: True)
    data = CIFAR10(tmp_path, augment=None, mean=[0] * 3, std=[1] * 3)
    assert data.classes == tuple("abcdefghij")
    assert [data.num_samples(split) for split in ("train", "test")] == [50, 10]
    assert data.augment is None
    images, targets, _ = next(data.batches("test", 10))
    assert torch.equal(targets, torch.arange(10))
    torch.testing.assert_close(images, torch.full((10, 3, 32, 32), 5 / 255))


@pytest.mark.parametrize(("kind", "folder"), [(CIFAR10, "cifar-10-batches-py"), (CIFAR100, "cifar-100-python")])
def test_absent_cifar_says_what_to_do(tmp_path, kind, folder):
    name = kind.__name__
    with pytest.raises(ValueError, match=f"Expected {name} in the folder .*{folder} .*nowhere does not exist") as caught:
        kind(tmp_path / "nowhere")
    assert f"{name}.download = True" in str(caught.value)
    assert f"{name}.root" in str(caught.value)
    with pytest.raises(ValueError, match="is empty"):
        kind(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train").write_text("")
    with pytest.raises(ValueError, match="contains train: a file is missing"):
        kind(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        kind(tmp_path / "file")


def test_a_failed_download_is_told(tmp_path, monkeypatch):
    def download(self):
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    with pytest.raises(ValueError, match="the download failed: no network"):
        CIFAR100(tmp_path, download=True)


def test_validation_folder_stands_in_for_test(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "val/a", "val/b")
    data = ImageFolder(tmp_path, size=8, num_workers=0)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [2, 0, 2]
    write_images(tmp_path, "test/a", "test/b")
    data = ImageFolder(tmp_path, size=8, num_workers=0)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [2, 2, 2]


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"Expected the folders 'train' and 'test'.*absent does not exist.*ImageFolder\.root"):
        ImageFolder(tmp_path / "absent")
    write_images(tmp_path, "train/a", "train/b")
    with pytest.raises(ValueError, match="contains train"):
        ImageFolder(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"Expected a folder with images for each class in .*test"):
        ImageFolder(tmp_path)
    write_images(tmp_path, "test/a", "test/c")
    with pytest.raises(ValueError, match=r"only one of train and test: \['b', 'c'\]"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "hollow").mkdir()
    with pytest.raises(ValueError, match="no images of the classes hollow"):
        ImageFolder(tmp_path)


def test_what_other_programs_leave_in_folders_is_no_class_and_no_image(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "test/a", "test/b")
    write_images(tmp_path, "train/.ipynb_checkpoints", "train/__MACOSX/a", "test/a/.ipynb_checkpoints")
    (tmp_path / "train" / "a" / "._image.png").write_bytes(b"no image")
    (tmp_path / "train" / "a" / "notes.txt").touch()
    data = ImageFolder(tmp_path, size=8, num_workers=0)
    assert data.classes == ("a", "b")
    assert [data.num_samples(split) for split in ("train", "test")] == [2, 2]


def test_files_that_vanish_are_found_before_the_training(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "test/a", "test/b")
    data = ImageFolder(tmp_path, size=8, num_workers=0)
    data.check_files()
    (tmp_path / "test" / "b" / "image.png").unlink()
    with pytest.raises(ValueError, match=r"Expected all 4 files .*got 1 absent: .*test/b/image.png"):
        data.check_files()


def test_imagenet_wants_its_thousand_classes(tmp_path):
    with pytest.raises(ValueError, match=r"Expected the folders 'train' and 'val' of ImageNet.*ImageNet\.root"):
        ImageNet(tmp_path)
    write_images(tmp_path, "train/n01", "train/n02", "val/n01", "val/n02")
    with pytest.raises(ValueError, match=r"Expected 1000 class folders.*got 2: use ImageFolder"):
        ImageNet(tmp_path, num_workers=0)


def test_imagenet_tests_on_the_validation_images(tmp_path, monkeypatch):
    names = [f"n{number:08d}" for number in range(1000)]
    for part in ("train", "val"):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "x.JPEG").touch()
    data = ImageNet(tmp_path, num_workers=0)
    assert data.classes == tuple(names)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [1000, 0, 1000]
    with pytest.raises(ValueError, match=r"Expected 2 readable images of the part 'test' in a batch \(got 2"):
        next(data.batches("test", 2))
