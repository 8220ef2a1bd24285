"""Every kind of image file becomes what a person would see, or is refused by a message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkd.data import COCO, ImageFolder
from gkd.data.images import image_files, image_size, read_image, read_mask

GREY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def saved(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def grey(path: Path) -> torch.Tensor:
    """An image whose channels are equal, as one of them."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0]


def expected(values=GREY) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def test_sixteen_bits_are_scaled(tmp_path):
    picture = Image.fromarray(GREY.astype(np.uint16) * 257)
    for name in ("a.png", "a.tif"):
        assert torch.equal(grey(saved(tmp_path / name, picture)), expected())
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + (GREY.astype(np.uint16) * 257).astype(">u2").tobytes())
    assert torch.equal(grey(tmp_path / "a.pgm"), expected())


def test_floats_are_scaled_or_refused(tmp_path):
    assert torch.equal(grey(saved(tmp_path / "a.tif", Image.fromarray(GREY.astype(np.float32) / 255))), expected())
    for factor in (1.0, np.nan):
        with pytest.raises(ValueError, match=r"Expected floats in \[0, 1\] \(got "):
            read_image(saved(tmp_path / "b.tif", Image.fromarray(GREY.astype(np.float32) * np.float32(factor))))
    with pytest.raises(ValueError, match="got 32-bit integers"):
        read_image(saved(tmp_path / "c.tif", Image.fromarray(GREY.astype(np.int32) * 1000)))


def test_images_are_turned_as_the_camera_says(tmp_path):
    upright = Image.fromarray(np.stack([GREY.repeat(16, 0).repeat(16, 1)] * 3, axis=2))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
        9: upright,  # no orientation that there is
    }
    for orientation, picture in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("png", "tif"):
            path = saved(tmp_path / f"{orientation}.{suffix}", picture, exif=exif)
            assert torch.equal(grey(path), expected(np.asarray(upright)[:, :, 0])), path
            assert image_size(path) == (32, 48)


def test_transparent_pixels_show_white_and_not_what_is_hidden_in_them(tmp_path):
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0] = [[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert image[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    shades = np.array([[[9, 0], [9, 255]]], dtype=np.uint8)
    assert grey(saved(tmp_path / "b.png", Image.fromarray(shades, mode="LA")))[0].tolist() == [255, 9]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([200, 10, 20, 30, 40, 50])
    assert read_image(saved(tmp_path / "c.png", palette))[:, 0].T.tolist() == [[200, 10, 20], [30, 40, 50]]
    assert read_image(saved(tmp_path / "d.png", palette, transparency=0))[:, 0].T.tolist() == [[255, 255, 255], [30, 40, 50]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert read_image(saved(tmp_path / "e.png", keyed, transparency=(1, 2, 3)))[:, 0].T.tolist() == [[255, 255, 255], [4, 5, 6]]


def test_other_modes(tmp_path):
    assert grey(saved(tmp_path / "1.png", Image.fromarray(GREY > 100))).tolist() == [[0, 0, 255], [255, 255, 255]]
    assert torch.equal(grey(saved(tmp_path / "L.png", Image.fromarray(GREY))), expected())
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for name in ("cmyk.jpg", "cmyk.tif"):
        assert read_image(saved(tmp_path / name, cyan)).float().mean((1, 2)).round().tolist() == [0, 255, 255]


def test_frames_and_suffixes_do_not_matter(tmp_path):
    frames = [Image.new("L", (3, 2), shade) for shade in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert grey(tmp_path / "a.gif").unique().tolist() == [10]
    saved(tmp_path / "wrong.jpg", Image.fromarray(GREY), format="PNG")
    assert torch.equal(grey(tmp_path / "wrong.jpg"), expected())


def test_damaged_files_raise(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="truncated"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="cannot identify"):
        read_image(path)


def test_masks_are_numbers_of_classes(tmp_path):
    numbers = np.array([[0, 1], [20, 255]], dtype=np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette([value % 256 for value in range(768)])
    for picture in (palette, Image.fromarray(numbers), Image.fromarray(numbers.astype(np.uint16))):
        assert read_mask(saved(tmp_path / "a.png", picture)).tolist() == [numbers.tolist()]
    with pytest.raises(ValueError, match=r"one channel that holds numbers of classes \(got mode RGB\)"):
        read_mask(saved(tmp_path / "b.png", palette.convert("RGB")))


def test_lists_of_files(tmp_path):
    for name in ("b.JPG", "a/c.png", "a.webp", ".hidden.png", ".ipynb_checkpoints/b.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)] == ["a.webp", "b.JPG", "a/c.png"]


def test_classification_and_detection_read_alike(tmp_path):
    import json

    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    for part in ("train", "test"):
        (tmp_path / part / "x").mkdir(parents=True)
        saved(tmp_path / part / "x" / "a.png", sixteen, exif=exif)
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}],
            "categories": [{"id": 1, "name": "x"}],
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    boxes = COCO(tmp_path, train=("train/x", "train.json"), test=("test/x", "test.json"), num_workers=0, min_size=None)
    classes = ImageFolder(tmp_path, size=7, num_workers=0, eval_transform=to_bytes, train_transform=to_bytes, mean=[0] * 3, std=[1] * 3)
    (image,), _, _ = next(boxes.batches("test", 1))
    again = next(classes.batches("test", 1))[0][0]
    assert image.unique().numel() > 50  # neither all white nor all black
    torch.testing.assert_close(again, image[:, :7, :7] / 255)


def to_bytes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, :7, :7].contiguous()
