"""Augmentation of images with boxes, masks and keypoints, by torchvision's transforms; off unless a data set is given one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd.data.epochs import mix, seeded


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Shapes:
        - **boxes** [n, 4] (x1, y1, x2, y2), **labels** [n] long, **masks** [n, h, w] uint8, **keypoints** [n, K, 3]
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def select(self, kept: Tensor) -> Objects:
        """Those that are marked."""
        return Objects(
            self.boxes[kept],
            self.labels[kept],
            None if self.masks is None else self.masks[kept],
            None if self.keypoints is None else self.keypoints[kept],
        )


class BoxAugment:
    """Crops, colours and sizes drawn at random for each training image, by (seed, epoch, index).

    Args:
        crop: Probability of a crop that keeps objects in part, as for SSD. Objects whose centre is outside are left out.
        colour: Strength of changes of brightness, contrast and saturation, in [0, 1]; the hue changes by a quarter of it at most.
        scale: Smallest and largest factor of the length that an image is resized to, drawn evenly in the logarithm.

    Raises:
        ValueError: If a number is out of range.

    References:
        Liu et al.: SSD: Single Shot MultiBox Detector, ECCV 2016.
        Ghiasi et al.: Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021.
    """

    def __init__(self, crop: float = 0.0, colour: float = 0.0, scale: tuple[float, float] = (1.0, 1.0)) -> None:
        if not 0 <= crop <= 1 or not 0 <= colour <= 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Expected crop and colour in [0, 1] and 0 < smallest <= largest scale (got {crop}, {colour} and {scale})")
        self.crop, self.colour, self.scale = crop, colour, (float(scale[0]), float(scale[1]))

    def __call__(self, image: Tensor, objects: Objects, seed: int) -> tuple[Tensor, Objects, float]:
        """Gives the image, its objects and the factor of its size.

        Shapes:
            - **image** [3, h, w] uint8; **output** [3, h', w'] uint8
        """
        from torchvision.transforms import v2

        with seeded(mix(seed, 1)):
            draws = torch.rand(2).tolist()
            if draws[0] < self.crop:
                image, objects = _cropped(image, objects, v2.RandomIoUCrop())
            if self.colour:
                image = v2.ColorJitter(self.colour, self.colour, self.colour, self.colour / 4)(image)
        return image, objects, self.scale[0] * (self.scale[1] / self.scale[0]) ** draws[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(crop={self.crop}, colour={self.colour}, scale={self.scale})"


def _cropped(image: Tensor, objects: Objects, crop: Any) -> tuple[Tensor, Objects]:
    from torchvision import tv_tensors

    boxes: Any = tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=image.shape[1:])
    drawn = crop.make_params([tv_tensors.Image(image), boxes]) if len(objects.boxes) else {}
    if not drawn:
        return image, objects
    objects = objects.select(drawn["is_within_crop_area"])
    top, left, height, width = (int(drawn[name]) for name in ("top", "left", "height", "width"))
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    corner = torch.tensor([left, top], dtype=objects.boxes.dtype)
    limit = torch.tensor([width, height], dtype=objects.boxes.dtype)
    boxes = (objects.boxes - corner.repeat(2)).clamp(min=0).minimum(limit.repeat(2))
    masks = None if objects.masks is None else objects.masks[window]
    keypoints = objects.keypoints
    if keypoints is not None:
        places = keypoints[..., :2] - corner
        inside = ((places >= 0) & (places < limit)).all(-1, keepdim=True)
        keypoints = torch.cat((places, keypoints[..., 2:]), dim=-1) * inside
    return image[window], replace(objects, boxes=boxes, masks=masks, keypoints=keypoints)
