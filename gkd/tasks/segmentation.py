"""The segmentation task: two networks that give every pixel its class, one data set, one distiller and one trainer, put together."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import models

from gkd.data import DigitSceneMasks
from gkd.distill import Distiller, NetworkPair
from gkd.engine import RunFolder, Trainer
from gkd.engine.folder import read_description
from gkd.errors import UserError
from gkd.models import Teacher, load_weights, read_logits
from gkd.models.modes import evaluating
from gkd.models.names import near
from gkd.tasks.export import export_onnx, export_program
from gkd.tasks.made import check_weights
from gkd.tasks.predictors import MaskPredictor, Predictor
from gkd.tasks.task import Task

AUXILIARY_WEIGHT = 0.5  # of the second classifier that torchvision's networks may have, as in its reference training
SHOWN = 4  # images in the report


@dataclass(frozen=True)
class SegmentationNetwork:
    """How a segmentation network is built; the number of classes comes from the data.

    Args:
        name: A segmentation network of torchvision (``'lraspp_mobilenet_v3_large'``, ``'fcn_resnet50'``, ``'deeplabv3_resnet101'``, ..), or
            ``'package.module:factory'``, called with ``num_classes`` and the options. It returns a map [B, K, h, w], or a dictionary with
            one as ``'out'`` and perhaps ``'aux'``.
        weights: File to start from. A teacher needs it.
        backbone_weights: Name of published weights of torchvision's backbone (``'DEFAULT'``); left out where ``weights`` are given.
        options: Further arguments of the network.
        recipe: Gin file of a training that makes the weights, where the file is absent; `gkd train` runs it first.
    """

    name: str = "lraspp_mobilenet_v3_large"
    weights: str | None = None
    backbone_weights: str | None = None
    options: Mapping[str, Any] | None = None
    recipe: str | None = None

    def build(self, num_classes: int) -> nn.Module:
        """The network with its weights.

        Raises:
            ValueError: If there is no network of this name, or the weights do not fit.
        """
        module, separator, factory = self.name.partition(":")
        options = dict(self.options or {})
        if separator:
            model = getattr(importlib.import_module(module), factory)(num_classes=num_classes, **options)
        else:
            published = models.list_models(module=models.segmentation)
            if self.name not in published:
                raise ValueError(
                    f"Expected a segmentation network of torchvision, such as {near(self.name, published)} (got {self.name!r})"
                )
            backbone = None if self.weights else self.backbone_weights
            model = models.get_model(self.name, weights=None, weights_backbone=backbone, num_classes=num_classes, **options)
        if self.weights is not None:
            load_weights(model, self.weights)
        return model


class SegmentationPair(NetworkPair):
    """Two segmentation networks as the distiller's: terms of logits compare pixels, see `gkd.distill.NetworkPair`.

    Args:
        ignore_index: Target of the pixels that count nowhere.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def logits(self, output: Any, teacher_output: Any, targets: Tensor, compares: str = "classes") -> tuple[Tensor, Tensor, Tensor]:
        """Logits of all pixels [B h w, K] of both, in the student's resolution, and their classes; ignored pixels are equal in both."""
        student, teacher = read_logits(output), read_logits(teacher_output)
        size = student.shape[-2:]
        if teacher.shape[-2:] != size:
            teacher = F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
        targets = _resized(targets, size)
        counts = targets != self.ignore_index
        pixels = [(logits * counts.unsqueeze(1)).movedim(1, -1).flatten(0, -2) for logits in (student, teacher)]
        return pixels[0], pixels[1], (targets * counts).flatten()

    def anchors(self, output: Any, logits: tuple[Any, Any, Any]) -> list[Tensor]:
        """The student's map of logits."""
        return [read_logits(output)]


class PixelLoss(nn.Module):
    """Cross-entropy of the pixels; with an auxiliary classifier, its own beside it.

    Args:
        ignore_index: Target of the pixels that count nowhere.
    """

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        """Losses by name: ``pixels``, and ``auxiliary`` where there is one."""
        losses = {"pixels": self._loss(read_logits(output), targets)}
        if isinstance(output, Mapping) and "aux" in output:
            losses["auxiliary"] = AUXILIARY_WEIGHT * self._loss(output["aux"], targets)
        return losses

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = _resized(targets, logits.shape[-2:])
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)  # a batch without a pixel that counts has the loss 0


class Segmentation(Task):
    """Trains, evaluates and exports a segmentation network, with or without a teacher; the sibling of `Classification`.

    Args:
        student: The network to train.
        teacher: The network to learn from; None trains the student alone, which is how a teacher is made.
        data: Images with the class of every pixel; scenes of digits by default.
        distiller: Called with the student, the teacher and the image size.
        trainer: The settings of the training.
        batch_size: Images in a step, over all processes.
        eval_batch_size: Images in a step of an evaluation, over all processes.
        seed: Seed of the weights, the order and the augmentation of the images.

    Raises:
        UserError: If the parts do not fit together.
    """

    score = "mIoU"

    def __init__(
        self,
        student: SegmentationNetwork,
        teacher: SegmentationNetwork | None = None,
        data: Any = None,
        distiller: Callable[..., Distiller] = Distiller,
        trainer: Trainer | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(DigitSceneMasks() if data is None else data, trainer or Trainer(), batch_size, eval_batch_size, seed)
        self.network, self.name, self.initial_weights = student, student.name, student.weights
        for network in (student, *([] if teacher is None else [teacher])):
            check_weights(network.weights, network.recipe)
        self.student = student.build(self.data.num_classes)
        self.teacher = None if teacher is None else self._build_teacher(teacher)
        ignored = self.data.ignore_index
        self.distiller = distiller(
            student=self.student,
            teacher=self.teacher,
            input_size=self.data.input_size,
            task=PixelLoss(ignored),
            networks=SegmentationPair(ignored),
        )
        self.place()

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is, see :meth:`judge`."""
        return self.judge("student", split, partial(self.eval_batches, split))

    @torch.no_grad()
    def judge(self, network: str, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any]:
        """Record of an evaluation, in percent: mIoU over the classes that occur, share of right pixels, and ``IoU/CLASS``.

        A class that neither the masks nor the network has is None.
        """
        judged: nn.Module = getattr(self, network)
        if torch.distributed.is_initialized():
            for buffer in judged.buffers():
                torch.distributed.broadcast(buffer, src=0)
        counts = MulticlassConfusionMatrix(self.data.num_classes, ignore_index=self.data.ignore_index, validate_args=False)
        counts = counts.to(self.trainer.device)
        with evaluating(judged):
            for images, targets, _ in batches():
                counts.update(_predicted(judged, images), targets)
        matrix = counts.compute().double()
        right, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
        occurs = union > 0
        share = torch.where(occurs, 100.0 * right / union.clamp(min=1), torch.nan)
        per_class = {
            f"IoU/{name}": None if value != value else value for name, value in zip(self.data.classes, share.tolist(), strict=True)
        }
        pixels = 100.0 * float(right.sum() / matrix.sum().clamp(min=1))
        return {"split": split, "mIoU": float(share[occurs].mean()), "pixels": pixels, **per_class}

    def description_of_student(self) -> dict[str, Any]:
        """Name and options of the network, classes, size and statistics of the images."""
        return {
            "task": type(self).__name__,
            "model": self.network.name,
            "options": dict(self.network.options or {}),
            "classes": list(self.data.classes),
            "num_classes": self.data.num_classes,
            "input_size": list(self.data.input_size),
            "mean": [float(value) for value in self.data.mean],
            "std": [float(value) for value in self.data.std],
        }

    @classmethod
    def predictor(cls, path: Path, device: torch.device, trust: bool = False) -> Predictor:
        """See :meth:`Task.predictor`."""
        return MaskPredictor(*load_segmenter(path), device)

    def sections(self) -> list[str]:
        """Masks beside the true ones, and the graphs of the terms."""
        from gkd.viz import collect_views, page, sections
        from gkd.viz.style import figure_to_svg

        images, targets, _ = next(iter(self.batches("test", SHOWN)))
        views = collect_views(self.distiller, (images, targets), self.data.mean, self.data.std, self.data.classes)
        networks = {"student": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}
        masks = {"truth": targets}
        for name, network in networks.items():
            with evaluating(network):
                masks[name] = _predicted(network, images)
        figure = _draw_masks(views.images, {name: mask.cpu() for name, mask in masks.items()}, self.data.num_classes)
        svg = figure_to_svg(figure, "True and predicted masks")
        shown = page.section(
            "Masks", page.captioned(svg, "A colour for each class; pixels that count nowhere are left blank in the truth.")
        )
        return [shown, sections.graphs(views), sections.attention(views)]

    def export(self, kind: str, folder: RunFolder) -> Path:
        """Writes the student, whose output is the map of logits, in another format and checks that it computes the same.

        Args:
            kind: ``'onnx'`` or ``'torch'``.
            folder: Where to.
        """
        writers = {"onnx": (export_onnx, folder.onnx), "torch": (export_program, folder.program)}
        if kind not in writers:
            raise UserError(f"Expected the export 'onnx' or 'torch' (got {kind!r})")
        write, path = writers[kind]
        write(_Logits(self.student), self.data.input_size, path)
        return path

    def _build_teacher(self, network: SegmentationNetwork) -> Teacher:
        if network.weights is None:
            raise UserError(
                f"Expected weights of the teacher {network.name} (got none). Set teacher/SegmentationNetwork.weights to a file; "
                "a training with this network as its student makes one, student.safetensors in its run folder."
            )
        path = Path(network.weights).expanduser()
        description = read_description(path) if path.suffix == ".safetensors" and path.is_file() else {}
        classes = description.get("classes", list(self.data.classes))
        if list(classes) != list(self.data.classes):
            raise UserError(
                f"Expected a teacher for the classes of the data in their order, {', '.join(self.data.classes[:3])}, ... "
                f"(got {', '.join(classes[:3])}, ... in {path})"
            )
        return Teacher(
            network.build(self.data.num_classes),
            mean=description.get("mean", self.data.mean),
            std=description.get("std", self.data.std),
            student_mean=self.data.mean,
            student_std=self.data.std,
        )


def load_segmenter(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the network in a student.safetensors, in eval mode, with what the file says of it (classes, mean, std, input_size).

    Only networks of torchvision are built: a file from elsewhere runs nothing. Others load by `gkd.models.load_weights`.

    Raises:
        UserError: If the file does not say what it holds, or names another network.
    """
    path = Path(path).expanduser()
    description = read_description(path) if path.is_file() else {}
    name = str(description.get("model"))
    if description.get("task") != Segmentation.__name__ or ":" in name:
        raise UserError(f"Expected a student.safetensors of a segmentation network of torchvision at {path} (got {name})")
    network = SegmentationNetwork(name, weights=str(path), options=description["options"])
    return network.build(description["num_classes"]).eval(), description


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return read_logits(self.model(images))


def _predicted(network: nn.Module, images: Tensor) -> Tensor:
    """Class of every pixel of the images, [B, H, W]."""
    logits = read_logits(network(images)).float()
    if logits.shape[-2:] != images.shape[-2:]:
        logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


def _resized(targets: Tensor, size: Sequence[int]) -> Tensor:
    """Targets in the resolution of a map, by the nearest pixel."""
    if tuple(targets.shape[-2:]) == tuple(size):
        return targets
    return F.interpolate(targets.unsqueeze(1).float(), size=tuple(size), mode="nearest").squeeze(1).long()


def _draw_masks(images: Tensor, masks: Mapping[str, Tensor], num_classes: int) -> Any:
    from gkd.viz.style import bare, grid_of, styled

    @styled
    def draw() -> Any:
        figure, panels = grid_of(len(images) * (1 + len(masks)), 1 + len(masks), 2.0, 2.0)
        rows = iter(panels)
        for row, image in enumerate(images):
            pictures = {"image": image.permute(1, 2, 0).numpy(), **{name: mask[row].numpy() for name, mask in masks.items()}}
            for name, picture in pictures.items():
                panel = bare(next(rows))
                hidden = picture >= num_classes if picture.ndim == 2 else None
                if hidden is None:
                    panel.imshow(picture)
                else:
                    panel.imshow(
                        picture, cmap="tab20", vmin=0, vmax=max(19, num_classes - 1), alpha=(~hidden).astype(float), interpolation="nearest"
                    )
                if row == 0:
                    panel.set_title(name)
        return figure

    return draw()
