"""What students say of images in files: classes, boxes and masks, as records and as pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gkd.detection import Detections, Detector
from gkd.models import read_logits

MOST_CLASSES = 5  # that a classifier names
MARGIN = 8 / 7  # by which an image is larger than what is cut out of its middle, as `gkd.data.ImageFolder` does it


class Predictor(ABC):
    """A task's student as `gkd predict` uses it.

    A task gives one by its class method ``predictor(path, device, trust)``; nothing else has to know of it.
    """

    @abstractmethod
    def __call__(self, images: Sequence[Tensor]) -> list[Any]:
        """One prediction for each image [3, h, w] uint8, RGB; the images may differ in size."""

    @abstractmethod
    def records(self, prediction: Any, number: int, name: str, score: float) -> list[dict[str, Any]]:
        """What predictions.json holds of an image.

        Args:
            prediction: What the call gave.
            number: Of the image, counted from 0.
            name: Of the image's pictures.
            score: Least score of what is kept.
        """

    @abstractmethod
    def pictures(self, image: Tensor, prediction: Any, score: float) -> Mapping[str, Any]:
        """Pictures (PIL) of the prediction, by the folder that each is written to."""


class ClassPredictor(Predictor):
    """Names the likeliest classes.

    Args:
        model: The classifier.
        description: What its file says of it.
        device: Where it computes.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], device: torch.device) -> None:
        self.model, self.classes = model.to(device).eval(), description["classes"]
        self.normalised = _Normalised(description, device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[Any]:
        """The likeliest classes and their probabilities."""
        batch = torch.cat([self.normalised(_cut(image, self.normalised.size)) for image in images])
        best = read_logits(self.model(batch)).float().softmax(dim=1).topk(min(MOST_CLASSES, len(self.classes)))
        return [
            [(self.classes[label], score) for label, score in zip(labels, scores, strict=True)]
            for labels, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def records(self, prediction: Any, number: int, name: str, score: float) -> list[dict[str, Any]]:
        """The classes with their probabilities, likeliest first."""
        return [{"classes": [{"class": label, "probability": probability} for label, probability in prediction]}]

    def pictures(self, image: Tensor, prediction: Any, score: float) -> Mapping[str, Any]:
        """The image with the classes beside it."""
        from PIL import Image, ImageDraw

        picture = _picture(image)
        side = max(160, picture.height)
        sheet = Image.new("RGB", (picture.width + 260, side), "white")
        sheet.paste(picture, (0, 0))
        text = "\n".join(f"{100 * probability:5.1f} %  {label}" for label, probability in prediction)
        ImageDraw.Draw(sheet).multiline_text((picture.width + 12, 12), text, fill="black", spacing=8)
        return {"pictures": sheet}


class BoxPredictor(Predictor):
    """Finds objects.

    Args:
        detector: The detector behind gkd's interface.
        description: What its file says of it.
        device: Where it computes.
    """

    def __init__(self, detector: Detector, description: Mapping[str, Any], device: torch.device) -> None:
        self.detector, self.device = detector, device
        detector.model.to(device)
        self.classes, self.category_ids = description["classes"], description["category_ids"]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[Any]:
        """The detections of every image."""
        return self.detector.detect([image.to(self.device) for image in images])

    def records(self, prediction: Detections, number: int, name: str, score: float) -> list[dict[str, Any]]:
        """Results in COCO's form, with the name of the class."""
        boxes = prediction.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), strict=True)
        return [
            {"image_id": number, "category_id": self.category_ids[label], "bbox": box, "score": value, "class": self.classes[label]}
            for box, value, label in rows
            if value >= score
        ]

    def pictures(self, image: Tensor, prediction: Detections, score: float) -> Mapping[str, Any]:
        """The image with its boxes."""
        from torchvision.utils import draw_bounding_boxes

        keep = prediction.scores >= score
        boxes, labels = prediction.boxes[keep].cpu(), prediction.labels[keep].tolist()
        if not labels:
            return {"pictures": _picture(image)}
        scores = prediction.scores[keep].tolist()
        names = [f"{self.classes[label]} {value:.2f}" for label, value in zip(labels, scores, strict=True)]
        colors = [_color(label) for label in labels]
        return {"pictures": _picture(draw_bounding_boxes(image.cpu(), boxes, names, colors, width=2))}


class MaskPredictor(Predictor):
    """Says of every pixel what it belongs to.

    Args:
        model: Gives logits [B, K, h, w] or ``{'out': logits}``.
        description: What its file says of it.
        device: Where it computes.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], device: torch.device) -> None:
        self.model, self.classes = model.to(device).eval(), description["classes"]
        self.normalised = _Normalised(description, device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[Any]:
        """The class of every pixel of every image as it is in its file."""
        batch = torch.cat([self.normalised(_resized(image, self.normalised.size)) for image in images])
        logits = read_logits(self.model(batch)).float()
        sizes = [image.shape[1:] for image in images]
        return [
            F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu()
            for one, size in zip(logits, sizes, strict=True)
        ]

    def records(self, prediction: Tensor, number: int, name: str, score: float) -> list[dict[str, Any]]:
        """The file of the mask, and the share of the pixels of every class in it."""
        shares = torch.bincount(prediction.flatten(), minlength=len(self.classes)) / prediction.numel()
        return [
            {
                "mask": f"masks/{name}.png",
                "shares": {label: share for label, share in zip(self.classes, shares.tolist(), strict=True) if share},
            }
        ]

    def pictures(self, image: Tensor, prediction: Tensor, score: float) -> Mapping[str, Any]:
        """The mask, whose pixels are numbers of classes, and the image under its colours."""
        from PIL import Image
        from torchvision.utils import draw_segmentation_masks

        mask = Image.fromarray(prediction.to(torch.uint8 if len(self.classes) <= 256 else torch.int32).numpy())
        if mask.mode == "L":
            mask.putpalette([part for label in range(256) for part in _color(label)])
        labels = prediction.unique().tolist()
        layers = torch.stack([prediction == label for label in labels])
        drawn = draw_segmentation_masks(image.cpu(), layers, alpha=0.5, colors=[_color(label) for label in labels])
        return {"masks": mask, "pictures": _picture(drawn)}


class _Normalised:
    """Images of the network's size as it was trained to see them."""

    def __init__(self, description: Mapping[str, Any], device: torch.device) -> None:
        self.channels, *size = description["input_size"]
        self.size = (size[0], size[1])
        self.mean, self.std = (torch.tensor(description[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))

    def __call__(self, image: Tensor) -> Tensor:
        pixels = image.to(self.mean.device).float()[None] / 255
        if self.channels == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        return (pixels - self.mean) / self.std


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    return image if tuple(image.shape[1:]) == size else functional.resize(image, list(size), antialias=True)


def _cut(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the image in the network's size; an image that has it already stays as it is."""
    from torchvision.transforms.v2 import functional

    if tuple(image.shape[1:]) == size:
        return image
    scale = MARGIN * max(size[0] / image.shape[1], size[1] / image.shape[2])
    larger = [max(edge, round(scale * length)) for edge, length in zip(size, image.shape[1:], strict=True)]
    return functional.center_crop(functional.resize(image, larger, antialias=True), list(size))


def _picture(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _color(label: int) -> tuple[int, int, int]:
    """Pascal VOC's colour of a class: the bits of its number, spread over the three channels."""
    red, green, blue = (sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
    return red, green, blue
