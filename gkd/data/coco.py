"""Detection data whose annotations are COCO's json files."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gkd.data.detection import DetectionData, Part, Sample, clip_boxes
from gkd.data.images import check_files, read_image

_log = logging.getLogger(__name__)


class COCO(DetectionData):
    """COCO 2017, or any data annotated in its way: ``root/annotations/instances_train2017.json`` and ``root/train2017/*.jpg``.

    Crowd regions are no boxes to train on; the evaluation leaves out what is found in them. Boxes are cut off at the edges of the image,
    and those without an area are left out of the training; both are counted in the log. The evaluation takes the annotations as they are in
    the file.

    Args:
        root: The folder.
        train: Name of the training part: of its folder of images, and of its json after ``instances_``. Or a pair (folder, json) below
            root.
        test: The same of the part that is evaluated on.
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training.
        skip_empty: Whether images without boxes are left out of the training.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on. None: all.
        num_workers: Processes that decode; 0 decodes in this one. None: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read. False: stop.

    Raises:
        ValueError: If files are absent, or an annotation names an unknown category or image: says which, and what to do.

    References:
        Lin et al.: Microsoft COCO: Common Objects in Context, ECCV 2014.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Sequence[str] = "train2017",
        test: str | Sequence[str] = "val2017",
        min_size: int | Sequence[int] | None = (640, 672, 704, 736, 768, 800),
        max_size: int = 1333,
        flip: float = 0.5,
        skip_empty: bool = True,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise ValueError(
                f"Expected the folder of COCO at {root} (got none, seen from {Path.cwd()}). Download 2017 Train, 2017 Val and "
                "their annotations from https://cocodataset.org/#download, unpack them there, or correct COCO.root."
            )
        read = {part: _read_part(root, names) for part, names in (("train", train), ("test", test))}
        categories = read["train"][1]["categories"]
        known = [(category["id"], category["name"]) for category in categories]
        other = [(category["id"], category["name"]) for category in read["test"][1]["categories"]]
        if sorted(known) != sorted(other):
            unknown = sorted(set(other).symmetric_difference(known))[:5]
            raise ValueError(f"Expected the same categories in the json files of both parts of {root} (got, in one only, {unknown})")
        ids = sorted(number for number, _ in known)
        parts = {part: Part(_samples(folder, content, ids, file), content) for part, (folder, content, file) in read.items()}
        super().__init__(
            parts,
            [dict(known)[number] for number in ids],
            ids,
            read_image,
            min_size=min_size,
            max_size=max_size,
            flip=flip,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )


def _read_part(root: Path, names: str | Sequence[str]) -> tuple[Path, dict[str, Any], Path]:
    folder, file = (names, f"annotations/instances_{names}.json") if isinstance(names, str) else names
    path = root / file
    if not path.is_file():
        near = sorted(str(found.relative_to(root)) for found in root.glob("**/*.json"))[:5]
        raise ValueError(f"Expected COCO's annotations at {path} (got no such file; the folder has {', '.join(near) or 'no json'})")
    try:
        content = json.loads(path.read_bytes())
        kept = {key: content[key] for key in ("images", "annotations", "categories")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected a json of COCO's form, with images, annotations and categories, at {path} (got: {error!r})") from error
    for annotation in kept["annotations"]:
        annotation.pop("segmentation", None)  # most of the memory, and not asked for
    return root / folder, kept, path


def _samples(folder: Path, content: dict[str, Any], ids: Sequence[int], file: Path) -> list[Sample]:
    label_of = {number: label for label, number in enumerate(ids)}
    images = {image["id"]: image for image in content["images"]}
    strange = Counter(annotation["category_id"] for annotation in content["annotations"] if annotation["category_id"] not in label_of)
    if strange:
        listed = ", ".join(f"{number} in {count} annotations" for number, count in sorted(strange.items())[:5])
        raise ValueError(
            f"Expected every category_id of {file} among its categories (got {listed}). Add the categories, or remove these annotations."
        )
    lost = next((annotation for annotation in content["annotations"] if annotation["image_id"] not in images), None)
    if lost is not None:
        raise ValueError(f"Expected every image_id of {file} among its images (got {lost['image_id']} in annotation {lost.get('id')})")
    check_files([folder / image["file_name"] for image in content["images"]])

    boxes, labels = defaultdict(list), defaultdict(list)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd", 0):
            left, top, width, height = annotation["bbox"]
            boxes[annotation["image_id"]].append([left, top, left + width, top + height])
            labels[annotation["image_id"]].append(label_of[annotation["category_id"]])
    counts: Counter[str] = Counter()
    samples = []
    for number, image in images.items():
        size = (int(image["height"]), int(image["width"]))
        given = torch.tensor(boxes[number], dtype=torch.float32).view(-1, 4)
        clipped, has_area = clip_boxes(given, size)
        counts["cut off at the edge of the image"] += int(((clipped - given).abs() > 1).any(1).sum())  # beyond what rounding does
        counts["left out, without area inside the image"] += int((~has_area).sum())
        label = torch.tensor(labels[number], dtype=torch.long)
        samples.append(Sample(number, str(folder / image["file_name"]), size, clipped[has_area], label[has_area]))
    for what, count in counts.items():
        if count:
            _log.warning("%s: %d boxes %s", file, count, what)
    return samples
