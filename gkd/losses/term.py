from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

__all__ = ["GraphTerm", "Head", "Outputs", "Term"]

Level = Literal["logits", "stage", "stages"]


@dataclass(frozen=True)
class Term:
    """What a loss declares to the :class:`~gkd.distill.Distiller`: attributes of the module, of these names.

    ``level`` is all that a module needs; what it does not declare has the default. It is called with what its level says, and with the
    keyword arguments that its declarations ask for. Four methods are found by their names:

    * ``build(student_shape, teacher_shape)``, for terms that own layers, is called once with the shapes [B, C, h, w] of the maps at the
      level ``'stage'``, where every stage gets a copy of the module, and with two dictionaries of shapes at ``'stages'``.
      Heights and widths are those of ``Distiller.input_size``; in training they are those of the images. With ``needs_outputs`` it is also
      given ``num_classes=``.
    * ``check_parts(active)`` is called once with the names of the parts that weigh something at some time; it raises a ValueError if what
      the term was given is read by none of them.
    * ``progress(epoch)``, for terms that change with time, is called with the epoch, which need not be a whole number.
    * ``set_targets(targets)``, for terms that keep a memory of the training samples, is called with the classes of all of them.

    Examples:
        >>> class Mean(nn.Module):
        ...     level = "stage"
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).square()
        >>> Term.of(Mean()).matched_channels
        False
    """

    level: Level
    """``'logits'``: called with (student_logits, teacher_logits, target). ``'stage'``: with the two maps of one stage after the other.
    ``'stages'``: with two dictionaries {stage: map}."""
    matched_channels: bool = False
    """Its student maps come from a :class:`~gkd.models.ChannelAdapter`, one for a stage, shared by the terms: with the teacher's channels,
    height and width."""
    map_size: tuple[int, int] | None = None
    """Height and width to which it averages a map in any case. Where all terms of an adapter agree on it, the adapter does so first."""
    parts: tuple[str, ...] = ()
    """Names of the values in the dictionary that it returns; it is called with ``parts=`` those that weigh something."""
    needs_index: bool = False
    """It is called with ``index=`` the positions of the images in the data set."""
    needs_boxes: bool = False
    """It is called with ``boxes=`` and ``image_size=``, see :class:`~gkd.distill.NetworkPair`."""
    needs_outputs: bool = False
    """A term of maps that is called with ``outputs=``, the :class:`Outputs` of both networks: logits, targets, and their last layers."""
    true_boxes_only: bool = False
    """Its boxes are the annotated ones, without the background that a detector's task may add."""
    dense: bool = False
    """It compares the class logits of all places of a detector without proposals."""
    compares: str = "classes"
    """Of detectors, what a term of the level ``'logits'`` compares: scores of ``'classes'``; ``'masks'`` in shared proposals; the
    ``'locations'`` of boxes, with the teacher's confidence as target; or ``'crossed'``, the teacher's head on both networks' maps."""

    @property
    def keywords(self) -> list[str]:
        """The keyword arguments that its declarations ask for, without ``parts``."""
        return ["index"] * self.needs_index + ["boxes", "image_size"] * self.needs_boxes + ["outputs"] * self.needs_outputs

    @classmethod
    def of(cls, module: nn.Module, name: str = "") -> Term:
        """Reads what a module declares.

        Args:
            module: The loss.
            name: What it is called, for the message.

        Raises:
            ValueError: If the module has no ``level``, or something it declares has another type.
        """
        title = f"term '{name}'" if name else type(module).__name__
        declared = dict(_declared(module, cls))
        level = declared.get("level")
        if level not in get_args(Level):
            levels = ", ".join(get_args(Level))
            raise ValueError(f"Expected {title} to have the attribute 'level', one of {levels} (got {level!r} of {type(module).__name__})")
        parts = declared.get("parts", ())
        if isinstance(parts, str) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"Expected {title} to have a tuple of names as 'parts' (got {parts!r})")
        declared["parts"] = tuple(parts)
        size = declared.get("map_size")
        if size is not None and (not isinstance(size, tuple) or len(size) != 2):
            raise ValueError(f"Expected {title} to have a height and a width as 'map_size' (got {size!r})")
        for field in fields(cls):
            if field.type == "bool" and not isinstance(declared.get(field.name, False), bool):
                raise ValueError(f"Expected {title} to have True or False as '{field.name}' (got {declared[field.name]!r})")
        return cls(**declared)


class Head(Protocol):
    """The last layer of a classifier, a linear one; reading its weights raises a ValueError where a network has none."""

    @property
    def weight(self) -> Tensor:
        """[K, C], the rows in the order of the student's classes."""

    @property
    def bias(self) -> Tensor | None:
        """[K], or None."""

    def check_map(self, features: Tensor, logits: Tensor) -> None:
        """Raises a ValueError unless the layer sees the mean of this map."""


class Outputs(NamedTuple):
    """What two classifiers make of the images in the end, for the terms of maps that declare ``needs_outputs``."""

    student_logits: Tensor
    teacher_logits: Tensor
    target: Any
    """As terms of the level ``'logits'`` see it: one class of every image."""
    student_head: Head
    teacher_head: Head


@dataclass(frozen=True)
class GraphTerm:
    """What a comparison of two graphs declares to :class:`~gkd.losses.GraphLoss`: attributes of the module, of these names.

    A module that declares nothing is taken to need all of it.
    """

    matched_nodes: bool = True
    """Node i of the student must be node i of the teacher."""
    matched_features: bool = True
    """The features of the nodes must mean the same in both."""
    reads_encoding: bool = True
    """It may read the encoding ``pe`` that a builder gives to the nodes."""

    @classmethod
    def of(cls, module: nn.Module) -> GraphTerm:
        """Reads what a module declares."""
        return cls(**dict(_declared(module, cls)))


def _declared(module: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    for field in fields(kind):
        if hasattr(module, field.name):
            yield field.name, getattr(module, field.name)


@runtime_checkable
class BuildsLayers(Protocol):
    """A term with layers of its own, see :class:`Term`."""

    def build(self, student_shape: Any, teacher_shape: Any, **options: Any) -> None:
        """Creates the layers for maps of these shapes."""


@runtime_checkable
class ChecksParts(Protocol):
    """A term that knows which settings its parts read, see :class:`Term`."""

    def check_parts(self, active: Collection[str]) -> None:
        """Raises a ValueError if it was given something that none of its active parts reads."""


@runtime_checkable
class RemembersSamples(Protocol):
    """A term with a memory of the training samples, see :class:`Term`."""

    def set_targets(self, targets: Tensor) -> None:
        """Tells the classes of all training samples."""


@runtime_checkable
class ChangesWithTime(Protocol):
    """A term that is a function of the epoch too, see :class:`Term`."""

    def progress(self, epoch: float) -> None:
        """Tells the epoch, which need not be a whole number."""
