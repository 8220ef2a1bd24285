"""torchvision's detectors behind gkd's interface: two stages with masks or keypoints, RetinaNet, FCOS, SSD and their like."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from gkd.detection.classes import refuse_classes
from gkd.detection.frame import resampled
from gkd.detection.interface import Detections, Detector, Images, Maps, Output, Targets
from gkd.detection.torchvision.networks import Plan
from gkd.detection.torchvision.pyramids import norm_of
from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.models.modes import evaluating
from gkd.models.watch import watched

PROBE = 128


class AsStored(GeneralizedRCNNTransform):
    """Normalises and pads as ever, and leaves images in the size that they have."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Returns image and objects as they are."""
        return image, target


class TorchvisionDetector(Detector):
    """A detector of torchvision, or one that is made like these; see `Detector`.

    In training its transform leaves the size of the images to the data, unless it takes images of one size only, as SSD does. In inference
    it resizes images as they are stored to the size that the data were evaluated at, as the library does it.

    Args:
        model: The network.
        labels: The library's label of every class of the data, in their order; None if the network has other classes.
        plan: How it was built.
        size: Shorter and longest side in inference; None leaves images as they are.
        names: Names of all places of its class layers.
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[int] | None,
        plan: Plan,
        size: tuple[int, int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.model: Any = model
        self.plan, self.size, self.names = plan, size, None if names is None else tuple(names)
        self.classes = None if names is None else tuple(names[int(plan.has_background) :])
        _set_size(self.model, size)
        self.two_stage = hasattr(model, "roi_heads")
        self.has_masks = self.two_stage and self.model.roi_heads.has_mask()
        self.num_keypoints = plan.num_keypoints if self.two_stage and self.model.roi_heads.has_keypoint() else 0
        self.labels = None if labels is None else tuple(labels)
        self._keys = _level_names(model)
        self._tables: dict[torch.device, Tensor] = {}
        self.levels = tuple(self._keys)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the only images that the network takes; None if it takes all."""
        return self.model.transform.fixed_size and self.model.transform.fixed_size[::-1]

    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width, rounded up to what the transform pads to."""
        step = self.model.transform.size_divisible
        height, width = (-(-max(image.shape[side] for image in images) // step) * step for side in (1, 2))
        return height, width

    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of one pass."""
        labels = self._label_table(images[0].device)
        seen: dict[str, Any] = {}
        if self.two_stage:
            modules = {"proposals": self.model.rpn}
        else:
            modules = {"logits": self.model.head.classification_head, "locations": self.model.head.regression_head}
        with watched({"features": self.model.backbone, **modules}, seen):
            losses = self.model(_floats(images), [self._target(target, labels) for target in targets])
        output = Output(losses, self._named(seen["features"], images), self.image_size(images))
        if self.two_stage:
            output.proposals = [boxes.detach() for boxes in seen["proposals"][0]]
        else:
            output.dense_logits = self._scores(seen["logits"], labels)
            output.dense_locations = _boxes_of(seen["locations"])
        return output

    def features(self, images: Images) -> Maps:
        """Transform, backbone and pyramid."""
        transform = self.model.transform
        prepared = [transform.normalize(image) for image in _floats(images)]
        if self.fixed_size:
            prepared = [transform.resize(image)[0] for image in prepared]
        return self._named(self.model.backbone(transform.batch_images(prepared, transform.size_divisible)), images)

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Scores of the second stage."""
        heads = self._roi_heads("class logits")
        table = self._label_table(next(iter(features.values())).device)
        pooled = _pool(heads.box_roi_pool, self._maps(features), boxes, image_size)
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        return logits[:, torch.cat((table, table.new_zeros(1)))]

    def mask_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Scores of the mask head."""
        heads = self._roi_heads("mask logits")
        if not self.has_masks:
            raise UserError(f"Expected a detector that segments instances for mask logits (got {type(self.model).__name__})")
        pooled = _pool(heads.mask_roi_pool, self._maps(features), boxes, image_size)
        logits = heads.mask_predictor(heads.mask_head(pooled))
        places = self._label_table(logits.device)[labels]
        return logits[torch.arange(len(places), device=logits.device), places]

    def dense_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores of the classification head."""
        if self.two_stage:
            raise UserError(f"Expected a one-stage detector for class logits at all places (got {type(self.model).__name__})")
        table = self._label_table(next(iter(features.values())).device)
        return self._scores(self.model.head.classification_head(list(self._maps(features).values())), table)

    def dense_locations(self, features: Mapping[str, Tensor]) -> Tensor:
        """Boxes of the regression head."""
        if self.two_stage:
            raise self._lacks("a regression head at all places")
        return _boxes_of(self.model.head.regression_head(list(self._maps(features).values())))

    def detect(self, images: Images) -> list[Detections]:
        """The library's own inference."""
        table = self._label_table(images[0].device)
        label_of = torch.full((max(self.plan.places, int(table.max()) + 1),), -1, device=table.device)
        label_of[table] = torch.arange(len(table), device=table.device)
        with evaluating(self.model), torch.no_grad():
            results = self.model(_floats(images))
        detections = []
        for result in results:
            labels = label_of[result["labels"]]
            rows = labels >= 0  # the weights may have places that no class of the data uses
            masks = result["masks"][rows, 0] >= 0.5 if "masks" in result else None
            keypoints = None
            if "keypoints" in result:
                keypoints = torch.cat((result["keypoints"][rows][..., :2], result["keypoints_scores"][rows][..., None]), dim=2)
            detections.append(Detections(result["boxes"][rows], result["scores"][rows], labels[rows], masks, keypoints))
        return detections

    def describe(self) -> dict[str, Any]:
        """The plan, and how images are prepared."""
        transform, plan = self.model.transform, self.plan
        options = {name: value for name, value in plan.options.items() if name not in ("trainable_layers", "norm", "norm_eps")}
        if ":" not in plan.architecture:
            options.update(norm_of(self.model.backbone))
        return {
            "architecture": plan.architecture,
            "backbone": plan.backbone,
            "options": options,
            "places": plan.places,
            "names": None if self.names is None else list(self.names),
            "labels": None if self.labels is None else list(self.labels),
            "num_keypoints": plan.num_keypoints,
            "size": None if self.size is None else list(self.fixed_size or self.size),
            "mean": list(map(float, transform.image_mean)),
            "std": list(map(float, transform.image_std)),
            "channels": "RGB",
            "thresholds": _thresholds(self.model),
        }

    def save(self, path: Path) -> None:
        """A state_dict, as `torch.save` writes it."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        write_atomic(path, lambda file: torch.save(state, file))

    def _target(self, target: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
        wanted = [name for name, asked in (("masks", self.has_masks), ("keypoints", self.num_keypoints)) if asked]
        if lacking := [name for name in wanted if name not in target]:
            raise UserError(f"Expected {lacking[0]} in the targets of {type(self.model).__name__} (got {', '.join(target)})")
        located = {name: target[name] for name in ("boxes", *wanted)}
        return {**located, "labels": labels[target["labels"]]}

    def _roi_heads(self, what: str) -> Any:
        if not self.two_stage:
            raise UserError(f"Expected a two-stage detector for terms of {what} (got {type(self.model).__name__}, which has no proposals)")
        return self.model.roi_heads

    def _scores(self, logits: Tensor, table: Tensor) -> Tensor:
        """Scores before a sigmoid; those of SSD, before a softmax with a background, are turned into such."""
        if not self.plan.has_background:
            return logits[..., table]
        logs = logits.log_softmax(-1)[..., table]
        return logs - torch.log1p(-logs.exp().clamp(max=1 - 1e-6))

    def _maps(self, features: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        native = features.native if isinstance(features, Maps) else features
        return OrderedDict((key, native[level]) for level, key in self._keys.items() if level in native)

    def _named(self, maps: Mapping[str, Tensor], images: Images) -> Maps:
        native = {level: maps[key] for level, key in self._keys.items()}
        if self.fixed_size is None:
            return Maps(native)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return Maps(resampled(native, self.fixed_size, sizes, self.image_size(images)), native)

    def _label_table(self, device: torch.device) -> Tensor:
        if self.labels is None:
            raise refuse_classes((), None, "its losses, scores and detections")
        if device not in self._tables:  # made once: a copy to a GPU would wait for it in every step
            self._tables[device] = torch.tensor(self.labels, device=device)
        return self._tables[device]


def _pool(pool: Any, maps: OrderedDict[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
    """Cuts the boxes out of the levels that there are; the library's module remembers those of its first call."""
    names = [name for name in pool.featmap_names if name in maps]
    if names != list(pool.featmap_names):
        pool = MultiScaleRoIAlign(names, pool.output_size, pool.sampling_ratio)
    return pool(maps, list(boxes), [image_size] * len(boxes))


def _boxes_of(output: Any) -> Tensor:
    """FCOS answers with boxes and how central they are."""
    return output[0] if isinstance(output, tuple) else output


def _set_size(model: Any, size: tuple[int, int] | None) -> None:
    """Tells the transform what to do in inference, and to leave the size to the data in training."""
    old = model.transform
    if old.fixed_size is not None:
        return
    if size is None:
        model.transform = AsStored(old.min_size, old.max_size, old.image_mean, old.image_std, size_divisible=old.size_divisible)
        return
    old.min_size, old.max_size, old._skip_resize = (size[0],), size[1], True


def _thresholds(model: Any) -> dict[str, float]:
    part = model.roi_heads if hasattr(model, "roi_heads") else model
    return {name: getattr(part, name) for name in ("score_thresh", "nms_thresh", "detections_per_img") if hasattr(part, name)}


def _level_names(model: nn.Module) -> dict[str, str]:
    """The library's key of each map by the name that its stride gives; a second map of a stride gets a 'b'."""
    network: Any = model
    height, width = (network.transform.fixed_size or (PROBE, PROBE))[::-1]
    with evaluating(network.backbone), torch.no_grad():
        maps = network.backbone(torch.zeros(1, 3, height, width))
    keys: dict[str, str] = {}
    for key, feature in ({"0": maps} if isinstance(maps, Tensor) else maps).items():
        name = f"p{round(torch.log2(torch.tensor(width / feature.shape[-1])).item())}"
        keys[name if name not in keys else f"{name}b"] = key
    return keys


def _floats(images: Images) -> list[Tensor]:
    return [image.float() / 255 for image in images]
