"""Scenes of handwritten digits with boxes: a detection problem of real strokes that comes with the installation."""

from __future__ import annotations

from torch import Tensor

from gkd.data.annotations import Record, normalise
from gkd.data.box_augment import BoxAugment
from gkd.data.detection import DetectionData
from gkd.data.drawing import Scene, draw_scenes
from gkd.data.masks import encode_mask


class DigitScenes(DetectionData):
    """scikit-learn's 1797 handwritten digits, composed into scenes with boxes: the embedded default of detection.

    Digits of different size, colour and brightness stand on an uneven ground, before and behind clutter of lines and fragments of digits,
    and cover each other in part. Digits of test scenes occur in no training scene. A box is the rectangle around the strokes, covered parts
    included; a digit that would be covered for more than `overlap` is moved or left out. The annotations are COCO's, and so is the metric.

    Everything follows from `scene_seed`: the same on every machine, and image i is the same whatever the number of images.

    Args:
        size: Height and width of a scene.
        num_train: Training scenes.
        num_test: Test scenes.
        digits: Fewest and most digits in a scene; 0 makes some scenes empty.
        scale: Smallest and largest height of a digit, as a share of the scene.
        clutter: Most lines and fragments in a scene.
        overlap: Share of a digit's box that another may cover.
        scene_seed: Seed of the scenes.
        holdout: Training scenes for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training scenes, those to train on. None: all.
        skip_empty: Whether scenes without digits are left out of the training.
        min_size: As in `DetectionData`; None leaves the scenes as they are.
        masks: Whether the targets have masks: the strokes of each digit, where nothing covers them.
        augment: As in `DetectionData`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> data = DigitScenes(size=64, num_train=4, num_test=2)
        >>> images, targets, index = next(data.batches("test", 2))
        >>> [tuple(image.shape) for image in images], sorted(targets[0])
        ([(3, 64, 64), (3, 64, 64)], ['boxes', 'image_id', 'labels', 'size'])
    """

    def __init__(
        self,
        size: int = 128,
        num_train: int = 1000,
        num_test: int = 200,
        digits: tuple[int, int] = (1, 6),
        scale: tuple[float, float] = (0.12, 0.45),
        clutter: int = 8,
        overlap: float = 0.3,
        scene_seed: int = 0,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        skip_empty: bool = True,
        min_size: int | None = None,
        masks: bool = False,
        augment: BoxAugment | None = None,
    ) -> None:
        scenes = draw_scenes({"train": num_train, "test": num_test}, size, digits, scale, clutter, overlap, scene_seed)
        self._scenes: dict[str, Tensor] = {}
        parts = {}
        for number, part in enumerate(scenes):
            images: list[Record] = []
            objects: list[Record] = []
            for index, scene in enumerate(scenes[part]):
                image_id, name = number * 10_000_000 + index + 1, f"{part}/{index:06d}.png"
                images.append({"id": image_id, "file_name": name, "height": size, "width": size})
                self._scenes[name] = scene.image
                objects += _objects(scene, image_id, masks)
            categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
            content = {"images": images, "annotations": objects, "categories": categories}
            parts[part] = normalise(content, f"the {part} scenes", masks=masks)
        super().__init__(
            parts,
            self._scenes.__getitem__,
            min_size=min_size,
            flip=0.0,
            augment=augment,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            num_workers=0,
        )

    def _files(self) -> list[str]:
        return []


def _objects(scene: Scene, image_id: int, masks: bool) -> list[Record]:
    objects = []
    for number, ((left, top, right, bottom), label) in enumerate(zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)):
        outline = {"segmentation": encode_mask(scene.instances == number + 1)} if masks else {}
        objects.append({"image_id": image_id, "category_id": label + 1, "bbox": [left, top, right - left, bottom - top], **outline})
    return objects
