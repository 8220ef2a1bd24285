"""The networks of a classification: how they are built, and how they come back from a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gkd.engine.folder import read_description
from gkd.errors import UserError
from gkd.models import Teacher, build_classifier, class_order, load_weights
from gkd.models.classes import reorder_logits
from gkd.models.classifiers import is_safe, open_classifier
from gkd.models.libraries.classifier import Classifier
from gkd.tasks.made import check_weights


@dataclass(frozen=True)
class Network:
    """How a classifier is built; the number of classes comes from the data.

    Args:
        name: A name that `build_classifier` knows.
        weights: File, or name of published weights, to start from. A teacher needs them.
        options: Further arguments of the network.
        mean: Mean of each channel of the images that a teacher was trained with. None: what its safetensors file says, or the library that
            publishes the weights, or else the data's.
        std: Standard deviations, likewise.
        reverse_channels: A teacher that was trained with BGR images.
        input_size: Height and width of the images that a teacher was trained with, to which the student's are resized. None: as the mean.
        classes: Names of the classes in the order of the logits. None: what the safetensors file says, or else the data's.
        recipe: Gin file of a training that makes the weights, where the file is absent; `gkd train` runs it first.
    """

    name: str
    weights: str | None = None
    options: Mapping[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    reverse_channels: bool = False
    input_size: int | Sequence[int] | None = None
    classes: Sequence[str] | None = None
    recipe: str | None = None

    def check_weights(self) -> None:
        """Raises where weights are absent that a recipe makes."""
        check_weights(self.weights, self.recipe)

    def build(self, data: Any) -> Classifier:
        """The network with its weights, its logits in the order of the data's classes.

        Raises:
            ValueError: If the weights are for as many classes as the data has, but for others.
        """
        classifier = open_classifier(self.name, data.num_classes, self.weights, self.options)
        classes = self.classes or self._description.get("classes")
        if classes and not classifier.new_layers:
            order = class_order(classes, data.classes, f"the weights {self.weights}")
            if order is not None:
                with torch.random.fork_rng(devices=[]):
                    larger = build_classifier(self.name, data.num_classes + 1, **(self.options or {}))
                reorder_logits(classifier.model, larger, order)
                beginning = ", ".join(data.classes[:3])
                warnings.warn(f"The classes of {self.weights} are put into the order of the data's: {beginning}, ...", stacklevel=2)
        return classifier

    def build_teacher(self, data: Any) -> tuple[Teacher, str]:
        """The network as a teacher of a student on these data, and why its logits cannot be compared with the student's, if so.

        A teacher for other classes keeps them: its features can still be learned from.

        Raises:
            UserError: If there are no weights.
        """
        if self.weights is None:
            raise UserError(
                f"Expected weights of the teacher {self.name} (got none). Set teacher/Network.weights to a file; "
                "a training with this network as its student makes one, student.safetensors in its run folder."
            )
        classifier = open_classifier(self.name, data.num_classes, self.weights, self.options, keep_classes=True)
        description = self._description
        published = classifier.preprocessing
        mean, std = (self.mean, self.std) if self.mean or self.std else (description.get("mean"), description.get("std"))
        size = self.input_size or description.get("input_size", [])[1:]
        if published is not None and not description:
            mean, std = (mean, std) if mean or std else (published.mean, published.std)
            size = size or published.size
        order, difference = self._compare(classifier, self.classes or description.get("classes"), data)
        teacher = Teacher(
            classifier.model,
            mean=data.mean if mean is None else mean,
            std=data.std if std is None else std,
            student_mean=data.mean,
            student_std=data.std,
            reverse_channels=self.reverse_channels,
            input_size=size or None,
            logit_order=order,
        )
        return teacher, difference

    @property
    def _description(self) -> Mapping[str, Any]:
        """What a file that gkd wrote says of its network."""
        path = Path(self.weights or "").expanduser()
        return read_description(path) if path.suffix == ".safetensors" and path.is_file() else {}

    def _compare(self, classifier: Classifier, classes: Sequence[str] | None, data: Any) -> tuple[list[int] | None, str]:
        if classifier.num_classes != data.num_classes:
            return None, f"the teacher has {classifier.num_classes or 'no'} classes, the data have {data.num_classes}"
        try:
            return class_order(classes, data.classes, f"the teacher {self.weights}") if classes else None, ""
        except ValueError as error:
            return None, str(error)


def load_student(
    path: Path | str, factory: Callable[..., nn.Module] | None = None, trust: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the classifier in a student.safetensors, in eval mode, with what the file says of it (classes, mean, std, input_size).

    Args:
        path: The file; `~` is the home folder.
        factory: Builds a network of your own: `factory(num_classes=..., **options)`. None: what the file names.
        trust: Whether the file may name any function on the Python path, or a model of a hub. Without it only networks of gkd, torchvision
            and timm are built, so that a file from elsewhere can run nothing.

    Raises:
        UserError: If the file does not say what it holds, or names a network that is not trusted.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"Expected a student.safetensors at {path} (got no such file)")
    description = read_description(path)
    if "model" not in description:
        raise UserError(
            f"Expected a file that gkd wrote at {path} (got weights without a description); use build_classifier(name, weights=...)"
        )
    name, options = description["model"], description.get("options") or {}
    if factory is not None:
        model = factory(num_classes=description["num_classes"], **options)
        load_weights(model, path)
    elif trust or is_safe(name, options):
        model = build_classifier(name, num_classes=description["num_classes"], weights=path, **options)
    else:
        raise UserError(
            f"Expected a network of gkd, torchvision or timm in {path} (got {name!r} with the options {list(options)}); give load_student "
            "the factory of the network, or trust=True if you know where the file comes from"
        )
    return model.eval(), description
