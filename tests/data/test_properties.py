"""Whatever a file holds: it is read as it should be, or refused by a ValueError."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gkd.data.annotations import Sample, normalise
from gkd.data.images import image_size, read_image, read_mask
from gkd.data.object_reader import ObjectReader

# Modes that a format stores.
STORED = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "LAB"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
}


@st.composite
def files(draw) -> tuple[bytes, tuple[int, int]]:
    """An image file of any kind, and its height and width as seen upright."""
    kind = draw(st.sampled_from(sorted(STORED)))
    mode = draw(st.sampled_from(STORED[kind]))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    wide = Image.new(mode, (1, 1)).tobytes()
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    if mode == "F":
        picture = Image.fromarray(numbers.uniform(0, draw(st.sampled_from([1.0, 300.0])), (height, width)).astype(np.float32))
    elif mode == "1":
        picture = Image.fromarray(numbers.random((height, width)) < 0.5)
    else:
        picture = Image.frombytes(mode, (width, height), numbers.bytes(width * height * len(wide)))
    if mode == "P":
        picture.putpalette(numbers.bytes(768))
    orientation = draw(st.integers(0, 9)) if kind in ("PNG", "JPEG", "TIFF", "WEBP") else 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture.save(stream, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}))
    return stream.getvalue(), (width, height) if orientation in range(5, 9) else (height, width)


@given(files())
def test_images_of_any_kind(tmp_path_factory, made):
    content, size = made
    path = tmp_path_factory.getbasetemp() / "picture"
    path.write_bytes(content)
    assert image_size(path) == size
    try:
        image = read_image(path)
    except ValueError as error:
        assert "Expected" in str(error)  # noqa: PT017  the message is what is promised
        return
    assert image.dtype == torch.uint8
    assert image.shape == (3, *size)
    try:
        assert read_mask(path).shape == (1, *size)
    except ValueError as error:
        assert "one channel" in str(error)  # noqa: PT017


odd_numbers = st.one_of(
    st.none(),
    st.integers(-3, 50),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["7", " 3 ", "a", "", "-1", "1e3", True, 1.0, 2**70, [], {}]),
)
ids = st.one_of(st.integers(-2, 4), st.sampled_from(["1", "2", "b", 1.0, None, "ü"]))
boxes = st.one_of(st.lists(st.floats(-20, 60), min_size=4, max_size=4), st.lists(odd_numbers, max_size=5), odd_numbers)


@st.composite
def contents(draw) -> dict:
    """Annotations of a program that one does not know."""
    images = draw(st.lists(st.fixed_dictionaries({"id": ids, "file_name": st.sampled_from(["a", "b", "./a", "c/d", None, 5])}), max_size=4))
    for image in images:
        image |= {"height": draw(st.one_of(st.just(30), odd_numbers)), "width": draw(st.one_of(st.just(40), odd_numbers))}
    names = st.one_of(st.sampled_from(["x", "y", "z"]), st.none(), st.just(""))
    categories = draw(st.lists(st.fixed_dictionaries({"id": ids, "name": names}), max_size=3))
    fields = {"image_id": ids, "category_id": ids, "bbox": boxes}
    optional = {"id": ids, "area": odd_numbers, "iscrowd": odd_numbers, "difficult": odd_numbers}
    annotations = draw(st.lists(st.fixed_dictionaries(fields, optional=optional), max_size=6))
    content = {"images": images, "annotations": annotations, "categories": categories}
    if draw(st.booleans()):
        content[draw(st.sampled_from(sorted(content)))] = None
    return content


@given(contents())
def test_annotations_of_any_kind(content):
    try:
        read = normalise(content, "here")
    except ValueError as error:
        assert "Expected" in str(error)  # noqa: PT017
        return
    json.dumps(read.coco(), allow_nan=False)
    assert [one["id"] for one in read.objects] == list(range(1, len(read.objects) + 1))
    image_ids = {image["id"] for image in read.images}
    assert len(image_ids) == len(read.images) == len(read.samples)
    assert all(isinstance(number, int) for number in image_ids)
    for one in read.objects:
        assert one["image_id"] in image_ids
        assert one["area"] > 0
        assert one["iscrowd"] in (0, 1)
    for sample in read.samples:
        height, width = sample.size
        assert height > 0
        assert width > 0
        assert len(sample.boxes) == len(sample.labels)
        assert (sample.labels < len(read.categories)).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= torch.tensor([width, height] * 2)).all()


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    corners=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=5),
    min_size=st.one_of(st.none(), st.integers(1, 40)),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**62),
)
def test_boxes_keep_an_area_inside_the_image(size, corners, min_size, flip, seed):
    height, width = size
    scaled = torch.tensor(corners, dtype=torch.float32).view(-1, 4) * torch.tensor([width, height] * 2)
    ordered = torch.cat((torch.minimum(scaled[:, :2], scaled[:, 2:]), torch.maximum(scaled[:, :2], scaled[:, 2:])), dim=1)
    sample = Sample(1, "here", size, ordered, torch.arange(len(ordered)))
    sizes = () if min_size is None else (min_size,)
    reader = ObjectReader([sample], lambda source: torch.zeros(3, *size, dtype=torch.uint8), sizes, 50, flip)
    image, objects = reader[(0, seed)]
    assert max(image.shape[1:]) <= max(50, height, width)
    assert len(objects.boxes) == len(objects.labels)
    assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
    assert (objects.boxes >= -1e-3).all()
    assert (objects.boxes <= torch.tensor([image.shape[2], image.shape[1]] * 2) * (1 + 1e-5) + 1e-3).all()
    wide = ((ordered[:, 2:] - ordered[:, :2]).amin(1, keepdim=True) * min(image.shape[1] / height, image.shape[2] / width) > 0.01).flatten()
    assert set(wide.nonzero().flatten().tolist()) <= set(objects.labels.tolist())
    assert all(math.isfinite(value) for value in objects.boxes.flatten().tolist())
