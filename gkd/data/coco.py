"""Detection data whose annotations are COCO's json files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from gkd.data.annotations import Annotations, normalise
from gkd.data.box_augment import BoxAugment
from gkd.data.detection import DetectionData
from gkd.data.epochs import count_of, generator
from gkd.data.images import read_image


class COCO(DetectionData):
    """COCO 2017, or any data annotated in its way: ``root/annotations/instances_train2017.json`` and ``root/train2017/*.jpg``.

    Crowd regions are no boxes to train on; the evaluation leaves out what is found in them. The annotations may come from any program: see
    `gkd.data.annotations.normalise`. For one folder of images with one json, give the share of test images:
    ``COCO(root, train=('images', 'labels.json'), test=0.2)``.

    Args:
        root: The folder.
        train: Name of the training part: of its folder of images, and of its json after ``instances_`` (``person_keypoints_`` where
            keypoints are asked for). Or a pair (folder, json) below root.
        test: The same of the part that is evaluated on; or the share (float), or the number (int), of the training images to take.
        val: The same of a part to choose on. None: none, unless ``holdout`` is given.
        classes: Names of the categories to take, in the order of the labels. None: all, by their ids.
        masks: Whether the targets have masks of the objects.
        keypoints: Whether the targets have keypoints.
        metric: See `DetectionData`, and so the others.
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training.
        augment: What else is drawn at random in training.
        skip_empty: Whether images without boxes are left out of the training.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on. None: all.
        split_seed: Seed of these choices.
        num_workers: Processes that decode; 0 decodes in this one. None: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read. False: stop.

    Raises:
        ValueError: If files are absent, or the annotations contradict themselves: says which, and what to do.

    References:
        Lin et al.: Microsoft COCO: Common Objects in Context, ECCV 2014.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Sequence[str] = "train2017",
        test: str | Sequence[str] | float | int = "val2017",
        val: str | Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        masks: bool = False,
        keypoints: bool = False,
        metric: Literal["coco", "voc", "voc07"] = "coco",
        min_size: int | Sequence[int] | None = (640, 672, 704, 736, 768, 800),
        max_size: int = 1333,
        flip: float = 0.5,
        augment: BoxAugment | None = None,
        skip_empty: bool = True,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise ValueError(
                f"Expected the folder of COCO at {root} (got none, seen from {Path.cwd()}). Download 2017 Train, 2017 Val and "
                "their annotations from https://cocodataset.org/#download, unpack them there, or correct COCO.root."
            )
        given = {"train": train, "val": val, "test": test}
        parts = {
            part: _read_part(root, names, classes, masks, keypoints) for part, names in given.items() if isinstance(names, str | Sequence)
        }
        if not isinstance(test, str | Sequence):
            parts["train"], parts["test"] = _divided(parts["train"], test, split_seed)
        super().__init__(
            parts,
            read_image,
            metric=metric,
            min_size=min_size,
            max_size=max_size,
            flip=flip,
            augment=augment,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )


def _divided(content: Annotations, test: float | int, seed: int) -> tuple[Annotations, Annotations]:
    order = torch.randperm(len(content.samples), generator=generator(seed)).tolist()
    number = count_of(test, len(order), "test")
    return content.select(sorted(order[number:])), content.select(sorted(order[:number]))


def _read_part(root: Path, names: str | Sequence[str], classes: Sequence[str] | None, masks: bool, keypoints: bool) -> Annotations:
    if isinstance(names, str):
        names = (names, f"annotations/{'person_keypoints' if keypoints else 'instances'}_{names}.json")
    if len(names) != 2:
        raise ValueError(f"Expected the name of a part, or its folder and its json (got {list(names)})")
    folder, path = (root / name for name in names)
    if not path.is_file():
        near = sorted(str(file.relative_to(root)) for file in root.glob("**/*.json"))[:5]
        raise ValueError(f"Expected COCO's annotations at {path} (got no such file; the folder has {', '.join(near) or 'no json'})")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        for key in ("images", "annotations", "categories"):
            if any(not isinstance(record, dict) for record in content[key] or ()):
                raise TypeError(f"a record of {key} is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected a json of COCO's form, with images, annotations and categories, at {path} (got: {error!r})") from error
    return normalise(content, str(path), lambda image: folder / image["file_name"], classes, masks, keypoints)
