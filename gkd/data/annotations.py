"""Annotations of objects in COCO's form: whatever a file holds is normalised here, once for all formats, or refused."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import normpath
from pathlib import Path
from re import fullmatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gkd.data.images import check_files, image_size
from gkd.data.masks import Segmentation, segmentation_box

_log = logging.getLogger(__name__)

LARGEST = 1e9
"""Numbers beyond are no pixels."""

MIN_SIDE = 1e-3
"""Pixels: the sides of narrower boxes may be equal after rounding, and no detector gives such."""

Record = dict[str, Any]


class Sample(NamedTuple):
    """One image and the objects to train on.

    Args:
        image_id: Its number in the annotations.
        source: What the data's reader takes: a path, or a name.
        size: Height and width.
        boxes: (x1, y1, x2, y2) in pixels, with area, inside the image.
        labels: Classes of the boxes, counted from 0.
        segmentations: Outlines of the objects in COCO's form; None unless masks are asked for.
        keypoints: (x, y, visibility) of every point; None unless keypoints are asked for.

    Shapes:
        - **boxes** [n, 4], **labels** [n] long, **keypoints** [n, K, 3]
    """

    image_id: int
    source: str
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    segmentations: list[Segmentation] | None = None
    keypoints: Tensor | None = None


@dataclass(frozen=True)
class Annotations:
    """The normalised annotations of one part of the data, for training and for evaluation.

    Attributes:
        samples: Images with the objects to train on.
        images: ``id``, ``file_name``, ``height`` and ``width``, in the order of the samples.
        objects: ``id`` (from 1), ``image_id``, ``category_id``, ``bbox``, ``area``, ``iscrowd``, ``difficult``, and ``segmentation`` or
            ``keypoints`` where asked for: all that the evaluation knows, crowds and difficult objects included.
        categories: ``id`` and ``name``, in the order of the labels, and ``keypoints`` where there are some.
    """

    samples: list[Sample]
    images: list[Record]
    objects: list[Record]
    categories: list[Record]

    def select(self, rows: Sequence[int]) -> Annotations:
        """The annotations of some of the images, by their rows."""
        images = [self.images[row] for row in rows]
        ids = {image["id"] for image in images}
        kept = [record for record in self.objects if record["image_id"] in ids]
        return Annotations([self.samples[row] for row in rows], images, kept, self.categories)

    def coco(self) -> dict[str, Any]:
        """A dictionary in the form of COCO's json."""
        return {"info": {}, "images": self.images, "annotations": self.objects, "categories": self.categories}


def normalise(
    content: Mapping[str, Any],
    where: str,
    path: Callable[[Record], Path] | None = None,
    classes: Sequence[str] | None = None,
    masks: bool = False,
    keypoints: bool = False,
    difficult: bool = True,
) -> Annotations:
    """Reads annotations in COCO's form, of any program.

    Ids of annotations are counted anew from 1, since evaluations take 0 for 'none'; ids of images and categories stay where they are
    different integers (or such in text), and are counted from 1 otherwise. An area that is missing, null or not positive is the box's,
    ``iscrowd`` and ``difficult`` are 0 where missing, a missing box is that of the outline, a missing size that of the file. Objects
    without an area inside their image are left out and counted in the log. Boxes to train on are cut off at the edges of the image; the
    evaluation has them as they are in the file.

    Args:
        content: ``images``, ``annotations`` and ``categories``; null stands for none.
        where: Names the source in messages.
        path: Gives the file of an image's record, which must then exist. None: images are no files.
        classes: Names of the categories to take, in the order of the labels. None: all, by their ids.
        masks: Whether outlines are wanted, of every object.
        keypoints: Whether keypoints are wanted.
        difficult: Whether difficult objects are trained on.

    Raises:
        ValueError: If ids, names or files are not unique, ids lead nowhere, or numbers are none: both places are named.
    """
    categories = _categories(content.get("categories") or [], where)
    chosen = _chosen(list(categories.values()), classes, where)
    images = _images(content.get("images") or [], where)
    sources = {key: image["file_name"] if path is None else str(path(image)) for key, image in images.items()}
    if path is not None:
        check_files(sources.values())
    for key, image in images.items():
        if min(image["height"], image["width"]) < 1:
            image["height"], image["width"] = _stored_size(sources[key], where)
    points = keypoint_names(chosen, where) if keypoints else ()
    objects = _objects(content.get("annotations") or [], images, categories, chosen, where, masks, len(points))

    label_of = {category["id"]: label for label, category in enumerate(chosen)}
    of_image: dict[int, list[Record]] = {image["id"]: [] for image in images.values()}
    for record in objects:
        of_image[record["image_id"]].append(record)
    samples = []
    for key, image in images.items():
        there = [one for one in of_image[image["id"]] if not one["iscrowd"] and (difficult or not one["difficult"])]
        size = (image["height"], image["width"])
        boxes, has_area = clip_boxes(_corners([one["bbox"] for one in there]), size)
        there = [one for one, is_kept in zip(there, has_area.tolist(), strict=True) if is_kept]  # all, but for rounding
        samples.append(
            Sample(
                image["id"],
                sources[key],
                size,
                boxes[has_area],
                torch.tensor([label_of[one["category_id"]] for one in there], dtype=torch.long),
                [one["segmentation"] for one in there] if masks else None,
                torch.tensor([one["keypoints"] for one in there], dtype=torch.float32).view(-1, len(points), 3) if points else None,
            )
        )
    return Annotations(samples, list(images.values()), objects, chosen)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cuts boxes off at the edges of the image, and tells which are left with an area.

    Args:
        boxes: (x1, y1, x2, y2) in pixels.
        size: Height and width of the image.

    Shapes:
        - **boxes** [n, 4]; **output** [n, 4], [n] bool

    Examples:
        >>> clip_boxes(torch.tensor([[-2.0, 1.0, 9.0, 3.0], [9.0, 1.0, 12.0, 3.0]]), (4, 8))
        (tensor([[0., 1., 8., 3.],
                [8., 1., 8., 3.]]), tensor([ True, False]))
    """
    height, width = size
    clipped = torch.stack([boxes[:, side].clamp(0, (width, height)[side % 2]) for side in range(4)], dim=1)
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(1)


def keypoint_names(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    """Names of the keypoints that all categories share.

    Raises:
        ValueError: If there are none, or others in another category.
    """
    names = {tuple(category.get("keypoints") or ()) for category in categories}
    if len(names) != 1 or not next(iter(names)):
        raise ValueError(f"Expected categories with the same keypoints in {where} (got {sorted(map(list, names))}): choose classes")
    return next(iter(names))


def flip_pairs(names: Sequence[str]) -> list[int]:
    """For each keypoint, the place of the one that it becomes in a mirror image: left and right change places.

    Examples:
        >>> flip_pairs(["nose", "left_eye", "right_eye"])
        [0, 2, 1]
    """
    place = {name: number for number, name in enumerate(names)}
    return [place.get(_mirrored(name), number) for number, name in enumerate(names)]


def _mirrored(name: str) -> str:
    swapped = {"left": "right", "right": "left"}
    return next((name.replace(side, swapped[side]) for side in swapped if side in name), name)


def _key(value: Any) -> Any:
    """An id as it is compared: ``1``, ``1.0`` and ``"1"`` are the same."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = str(value).strip()
    return int(text) if fullmatch(r"-?[0-9]+", text) else text


def _numbered(keys: Sequence[Any]) -> dict[Any, int]:
    """The ids to go on with: the given ones where all are integers, else counted from 1."""
    return {key: key if all(isinstance(each, int) for each in keys) else place + 1 for place, key in enumerate(keys)}


def _categories(records: Sequence[Mapping[str, Any]], where: str) -> dict[Any, Record]:
    if not records:
        raise ValueError(f"Expected categories in {where} (got none)")
    names: dict[str, Any] = {}
    keyed: dict[Any, Mapping[str, Any]] = {}
    for record in records:
        key, name = _key(record.get("id")), record.get("name")
        if record.get("id") is None or not isinstance(name, str) or not name.strip():
            raise ValueError(f"Expected an id and a name of every category of {where} (got {dict(record)})")
        if key in keyed:
            raise ValueError(f"Expected categories of different ids in {where} (got {key!r} for {keyed[key]['name']!r} and {name!r})")
        if name in names:
            raise ValueError(f"Expected categories of different names in {where} (got {name!r} for the ids {names[name]!r} and {key!r})")
        keyed[key], names[name] = record, key
    numbers = _numbered(list(keyed))
    order = sorted(keyed, key=lambda key: numbers[key])
    kept = ("keypoints", "skeleton", "supercategory", "isthing")
    return {
        key: {"id": numbers[key], "name": keyed[key]["name"], **{part: keyed[key][part] for part in kept if keyed[key].get(part)}}
        for key in order
    }


def _chosen(categories: list[Record], classes: Sequence[str] | None, where: str) -> list[Record]:
    if classes is None:
        return categories
    named = {category["name"]: category for category in categories}
    absent = [name for name in classes if name not in named]
    if absent or len(set(classes)) < len(classes) or not classes:
        near = get_close_matches(absent[0], list(named), 3, 0.5) if absent else []
        hint = f"; near is {', '.join(near)}" if near else f"; there are {', '.join(list(named)[:8])}"
        raise ValueError(f"Expected classes, each once, among the categories of {where} (got {absent or list(classes)}{hint})")
    return [named[name] for name in classes]


def _images(records: Sequence[Mapping[str, Any]], where: str) -> dict[Any, Record]:
    keyed: dict[Any, Record] = {}
    files: dict[str, Any] = {}
    for record in records:
        name = record.get("file_name")
        if record.get("id") is None or not isinstance(name, str) or not name:
            raise ValueError(f"Expected an id and a file_name of every image of {where} (got {dict(record)})")
        key = _key(record["id"])
        if key in keyed:
            raise ValueError(f"Expected images of different ids in {where} (got {key!r} for {keyed[key]['file_name']} and {name})")
        if normpath(name) in files:
            raise ValueError(f"Expected every file once in {where} (got {name} for the image ids {files[normpath(name)]!r} and {key!r})")
        size = {side: _number(record.get(side) or 0, f"{side} of {name}", where) for side in ("height", "width")}
        keyed[key] = {"id": key, "file_name": name, "height": int(size["height"]), "width": int(size["width"])}
        files[normpath(name)] = key
    for key, number in _numbered(list(keyed)).items():
        keyed[key]["id"] = number
    return keyed


def _stored_size(source: str, where: str) -> tuple[int, int]:
    try:
        return image_size(source)
    except OSError as error:
        raise ValueError(f"Expected height and width of {source} in {where}, or in the file (got neither: {error})") from error


def _objects(
    records: Sequence[Mapping[str, Any]],
    images: Mapping[Any, Record],
    categories: Mapping[Any, Record],
    chosen: Sequence[Record],
    where: str,
    masks: bool,
    num_keypoints: int,
) -> list[Record]:
    wanted = {category["id"] for category in chosen}
    unknown = Counter(_key(record.get("category_id")) for record in records if _key(record.get("category_id")) not in categories)
    if unknown:
        listed = ", ".join(f"{number} in {count} annotations" for number, count in sorted(unknown.items(), key=str)[:5])
        raise ValueError(
            f"Expected every category_id of {where} among its categories (got {listed}). Add the categories, or remove these annotations."
        )
    objects: list[Record] = []
    counts: Counter[str] = Counter()
    for record in records:
        image, category = images.get(_key(record.get("image_id"))), categories[_key(record["category_id"])]
        name = f"annotation {record.get('id')}"
        if image is None:
            raise ValueError(f"Expected every image_id of {where} among its images (got {record.get('image_id')} in {name})")
        if category["id"] not in wanted:
            continue
        outline = record.get("segmentation") or None
        if masks and outline is None:
            raise ValueError(f"Expected a segmentation of every object of {where} (got none in {name}): add it, or set masks = False")
        size = (image["height"], image["width"])
        box = _box(record.get("bbox"), outline, size, f"{name} of {image['file_name']}", where)
        excess, sides = _beyond(box, size)
        if min(sides) < MIN_SIDE:
            counts["left out, without area inside the image"] += 1
            continue
        counts["cut off at the edge of the image"] += excess > 1  # beyond what rounding does
        area: Any = record.get("area")
        is_given = isinstance(area, int | float) and math.isfinite(area) and area > 0
        objects.append(
            {
                "id": len(objects) + 1,
                "image_id": image["id"],
                "category_id": category["id"],
                "bbox": box,
                "area": float(area) if is_given else box[2] * box[3],
                "iscrowd": _flag(record.get("iscrowd"), f"iscrowd of {name}", where),
                "difficult": _flag(record.get("difficult"), f"difficult of {name}", where),
                **({"segmentation": outline} if masks else {}),
                **(_keypoints(record.get("keypoints"), num_keypoints, name, where) if num_keypoints else {}),
            }
        )
    for what, count in counts.items():
        if count:
            _log.warning("%s: %d box(es) %s", where, count, what)
    return objects


def _box(box: Any, outline: Segmentation | None, size: tuple[int, int], name: str, where: str) -> list[float]:
    if box is None and outline is not None:
        return segmentation_box(outline, size)
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        raise ValueError(f"Expected a bbox [x, y, width, height] in {name} in {where} (got {box!r})")
    return [_number(value, f"bbox of {name}", where) for value in box]


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ValueError(f"Expected a finite number as {name} in {where} (got {value!r})")
    return number


def _flag(value: Any, name: str, where: str) -> int:
    return int(_number(value or 0, name, where) != 0)


def _keypoints(points: Any, number: int, name: str, where: str) -> Record:
    values = [_number(value, f"keypoint of {name}", where) for value in points or [0] * (3 * number)]
    if len(values) != 3 * number:
        raise ValueError(f"Expected {number} keypoints (x, y, visibility) in {name} of {where} (got {len(values)} numbers)")
    return {"keypoints": values, "num_keypoints": sum(visibility > 0 for visibility in values[2::3])}


def _beyond(box: Sequence[float], size: tuple[int, int]) -> tuple[float, tuple[float, float]]:
    """By how much a box leaves its image, and the sides of what is inside."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    excess = max(-left, -top, right - size[1], bottom - size[0])
    return excess, (min(right, size[1]) - max(left, 0), min(bottom, size[0]) - max(top, 0))


def _corners(boxes: Sequence[Sequence[float]]) -> Tensor:
    corners = [[left, top, left + width, top + height] for left, top, width, height in boxes]
    return torch.tensor(corners, dtype=torch.float32).view(-1, 4)
