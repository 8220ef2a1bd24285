"""Detectron2's models behind gkd's interface of detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.detection.classes import refuse_classes
from gkd.detection.d2.config import input_format
from gkd.detection.d2.files import config_text, save_config
from gkd.detection.interface import Detections, Detector, Images, Output, Targets
from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.models.modes import evaluating


class Detectron2Detector(Detector):
    """A model of Detectron2 whose backbone gives feature maps by name: GeneralizedRCNN, PanopticFPN, RetinaNet, FCOS and their like.

    Images come in RGB, and the model gets them in the channel order that its configuration asks for; it subtracts its own mean, divides
    by its own standard deviation and pads as its backbone wants. So two models of other habits see the same picture. In inference, images
    as they are stored are resized as Detectron2's `DefaultPredictor` does it.

    Args:
        model: The model.
        config: What it was built from, a CfgNode or a LazyConfig.
        labels: The model's class of every class of the data; None if it has others.
        names: Names of the model's classes.
        size: Shorter and longest side in inference; None leaves images as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.config, self.size = model, config, size
        self.classes = None if names is None else tuple(names)
        self.labels = None if labels is None else tuple(labels)
        self.reverses_channels = input_format(config) == "BGR"
        shapes = self._network.backbone.output_shape()
        self.levels = tuple(sorted(shapes, key=lambda name: shapes[name].stride))
        self.two_stage = hasattr(model, "roi_heads") and getattr(model, "proposal_generator", None) is not None
        heads: Any = getattr(model, "roi_heads", None)
        self.has_masks = bool(getattr(heads, "mask_on", False))
        self.num_keypoints = heads.keypoint_head.num_keypoints if getattr(heads, "keypoint_on", False) else 0
        self._tables: dict[torch.device, Tensor] = {}
        if hasattr(model, "_ema_update") and not hasattr(model, "loss_normalizer"):
            _keep_normalizer(model, 300.0 if type(model).__name__ == "FCOS" else 100.0)

    @property
    def _network(self) -> Any:
        """The model, whose attributes type checkers do not know."""
        return self.model

    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width that the images are padded to."""
        from detectron2.structures import ImageList

        backbone = self._network.backbone
        shapes = [torch.empty_like(image, device="meta") for image in images]
        padded = ImageList.from_tensors(shapes, backbone.size_divisibility, padding_constraints=backbone.padding_constraints)
        return padded.tensor.shape[-2], padded.tensor.shape[-1]

    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of one pass in training mode."""
        from detectron2.utils.events import EventStorage

        network = self._network
        seen: dict[str, Any] = {}
        handles = [network.backbone.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, features=output))]
        if self.two_stage or hasattr(network, "head"):
            head = network.proposal_generator if self.two_stage else network.head
            handles.append(head.register_forward_hook(lambda module, inputs, output: seen.update(head=output)))
        try:
            with EventStorage():  # the heads insist on telling somebody how many anchors matched
                losses = network(self._inputs(images, targets))
        finally:
            for handle in handles:
                handle.remove()
        height, width = seen["inputs"][0].shape[-2:]
        output = Output(losses, self._sorted(seen["features"]), (height, width))
        if self.two_stage:
            output.proposals = [found.proposal_boxes.tensor.detach() for found in seen["head"][0]]
        elif "head" in seen:
            output.dense_logits = self._dense(seen["head"][0])
            output.dense_locations = self._flat(seen["head"][1], 4)
        return output

    def features(self, images: Images) -> dict[str, Tensor]:
        """Maps of all levels, by the model's own preprocessing, backbone and pyramid."""
        return self._sorted(self._network.backbone(self._network.preprocess_image(self._inputs(images)).tensor))

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Class scores of given boxes; of a cascade those of its first stage, which is made for proposals."""
        from detectron2.structures import Boxes

        heads = self._roi_heads("class logits")
        table = self._label_table(next(iter(features.values())).device)
        proposals = [Boxes(box) for box in boxes]
        if hasattr(heads, "box_pooler"):
            box_head, predictor = heads.box_head, heads.box_predictor
            if isinstance(predictor, nn.ModuleList | list):
                box_head, predictor = box_head[0], predictor[0]
            pooled = box_head(heads.box_pooler([features[name] for name in heads.box_in_features], proposals))
        else:  # heads on a map of stride 16, without a pyramid
            predictor = heads.box_predictor
            pooled = heads._shared_roi_transform([features[name] for name in heads.in_features], proposals).mean(dim=(2, 3))
        return predictor(pooled)[0][:, torch.cat((table, table.new_full((1,), heads.num_classes)))]

    def mask_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Scores of the mask head."""
        from detectron2.structures import Boxes

        heads = self._roi_heads("mask logits")
        if not self.has_masks or not hasattr(heads, "mask_pooler"):
            raise UserError(f"Expected a detector with a mask head on its pyramid for mask logits (got {type(self.model).__name__})")
        pooled = heads.mask_pooler([features[name] for name in heads.mask_in_features], [Boxes(box) for box in boxes])
        logits = heads.mask_head.layers(pooled)
        if logits.shape[1] == 1:  # one mask for whatever class
            return logits[:, 0]
        return logits[torch.arange(len(labels), device=logits.device), self._label_table(logits.device)[labels]]

    def dense_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class scores of the head, which computes its boxes along the way."""
        if self.two_stage or not hasattr(self.model, "head"):
            raise UserError(f"Expected a one-stage detector for class logits at all places (got {type(self.model).__name__})")
        return self._dense(self._network.head([features[name] for name in self._network.head_in_features])[0])

    def dense_locations(self, features: Mapping[str, Tensor]) -> Tensor:
        """Boxes of the head."""
        if self.two_stage or not hasattr(self.model, "head"):
            raise self._lacks("a regression head at all places")
        return self._flat(self._network.head([features[name] for name in self._network.head_in_features])[1], 4)

    @torch.no_grad()
    def detect(self, images: Images) -> list[Detections]:
        """What the model finds, best first."""
        table = self._label_table(images[0].device)
        label_of = torch.full((max(self._num_classes, int(table.max()) + 1),), -1, device=table.device)
        label_of[table] = torch.arange(len(table), device=table.device)
        inputs = [
            {**entry, "image": self._resized(entry["image"]), "height": image.shape[1], "width": image.shape[2]}
            for entry, image in zip(self._inputs(images), images, strict=True)
        ]
        with evaluating(self.model):
            outputs = self._network(inputs)
        detections = []
        for output in outputs:
            instances = output["instances"]
            labels = label_of[instances.pred_classes]
            order = instances.scores.argsort(descending=True, stable=True)
            order = order[labels[order] >= 0]
            masks = instances.pred_masks[order] if instances.has("pred_masks") else None
            keypoints = instances.pred_keypoints[order] if instances.has("pred_keypoints") else None
            detections.append(Detections(instances.pred_boxes.tensor[order], instances.scores[order], labels[order], masks, keypoints))
        return detections

    def describe(self) -> dict[str, Any]:
        """The configuration, and how images are prepared."""
        network = self._network
        part = getattr(network, "roi_heads", network)
        predictor = getattr(part, "box_predictor", part)
        return {
            "architecture": type(network).__name__,
            "backbone": None,
            "config": config_text(self.config),
            "labels": None if self.labels is None else list(self.labels),
            "names": None if self.classes is None else list(self.classes),
            "size": None if self.size is None else list(self.size),
            "mean": network.pixel_mean.flatten().tolist(),
            "std": network.pixel_std.flatten().tolist(),
            "channels": "BGR" if self.reverses_channels else "RGB",
            "thresholds": {name: getattr(predictor, name) for name in ("test_score_thresh", "test_nms_thresh") if hasattr(predictor, name)},
        }

    def save(self, path: Path) -> None:
        """Writes ``{'model': weights}``, which `DetectionCheckpointer` loads, and the configuration beside it, with the suffix .yaml."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        write_atomic(path, lambda file: torch.save({"model": state}, file))
        save_config(self.config, path.with_suffix(".yaml"))

    def _dense(self, logits: Sequence[Tensor]) -> Tensor:
        """Joins the levels' maps [B, A * K, h, w] of class scores."""
        return self._flat(logits, self._network.num_classes)[..., self._label_table(logits[0].device)]

    @staticmethod
    def _flat(levels: Sequence[Tensor], width: int) -> Tensor:
        rows = [level.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels]
        return torch.cat(rows, dim=1)

    @property
    def _num_classes(self) -> int:
        return int(getattr(self._network, "roi_heads", self._network).num_classes)

    def _roi_heads(self, what: str) -> Any:
        if not self.two_stage:
            raise UserError(f"Expected a two-stage detector for terms of {what} (got {type(self.model).__name__})")
        return self._network.roi_heads

    def _label_table(self, device: torch.device) -> Tensor:
        if self.labels is None:
            raise refuse_classes((), None, "its losses, scores and detections")
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.labels, device=device)
        return self._tables[device]

    def _resized(self, image: Tensor) -> Tensor:
        """Resizes by PIL, as `DefaultPredictor` does."""
        if self.size is None:
            return image
        from detectron2.data.transforms import ResizeShortestEdge

        pixels = image.permute(1, 2, 0).cpu().numpy()
        transform = ResizeShortestEdge([self.size[0]] * 2, self.size[1]).get_transform(pixels)
        return torch.from_numpy(transform.apply_image(pixels).copy()).permute(2, 0, 1).to(image.device)

    def _inputs(self, images: Images, targets: Targets | None = None) -> list[dict[str, Any]]:
        """What the model is called with: channels in its order, true objects where there are."""
        inputs: list[dict[str, Any]] = [{"image": image.flip(0) if self.reverses_channels else image} for image in images]
        if targets is None:
            return inputs
        from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

        table = self._label_table(images[0].device)
        wanted = [name for name, asked in (("masks", self.has_masks), ("keypoints", self.num_keypoints)) if asked]
        if hasattr(self.model, "sem_seg_head"):
            wanted.append("sem_seg")
        for entry, image, target in zip(inputs, images, targets, strict=True):
            if lacking := [name for name in wanted if name not in target]:
                raise UserError(f"Expected {lacking[0]} in the targets of {type(self.model).__name__} (got {', '.join(target)})")
            instances = Instances((image.shape[-2], image.shape[-1]), gt_boxes=Boxes(target["boxes"]), gt_classes=table[target["labels"]])
            if self.has_masks:
                instances.gt_masks = BitMasks(target["masks"].bool())
            if self.num_keypoints:
                instances.gt_keypoints = Keypoints(target["keypoints"])
            entry["instances"] = instances
            if "sem_seg" in wanted:
                entry["sem_seg"] = target["sem_seg"]
        return inputs

    def _sorted(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: features[name] for name in self.levels}


def _keep_normalizer(model: nn.Module, initial: float) -> None:
    """Lets checkpoints of a training have the running mean that one-stage detectors divide by, a plain number in Detectron2.

    The model's own `state_dict` stays as Detectron2 has it: the number is there only where the model is a part of something greater.

    Args:
        model: RetinaNet, FCOS or their like.
        initial: What Detectron2 starts from.
    """
    model.register_buffer("loss_normalizer", torch.tensor(initial))
    model.register_state_dict_post_hook(_leave_normalizer_out)
    model.register_load_state_dict_pre_hook(_fill_normalizer_in)


def _leave_normalizer_out(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not prefix:
        state.pop("loss_normalizer", None)


def _fill_normalizer_in(model: Any, state: dict[str, Any], prefix: str, *further: Any) -> None:
    state.setdefault(f"{prefix}loss_normalizer", model.loss_normalizer)
