from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gkd.errors import UserError
from gkd.models import ClassHead, FeatureTaps, find_head, read_logits


class Taps(Protocol):
    """Calls a network and gives, beside its output, the maps of chosen places in it, as :class:`~gkd.models.FeatureTaps` does."""

    @property
    def model(self) -> Any:
        """Called with the same arguments, it gives the output alone."""

    def __call__(self, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Returns the output and {place: map}."""

    def shapes(self, input_size: Sequence[int]) -> dict[str, torch.Size]:
        """Shapes of the maps for two inputs of this size."""


class NetworkPair:
    """How the :class:`~gkd.distill.Distiller` calls and reads its two networks: here, as classifiers.

    For other networks override it: what they take, what their maps are, what of their outputs is compared.
    """

    def student_taps(self, student: nn.Module, paths: Iterable[str]) -> Taps:
        """What calls the student; raises ValueError for a place that it does not have."""
        return FeatureTaps(student, paths)

    def teacher_taps(self, teacher: nn.Module, paths: Iterable[str]) -> Taps:
        """What calls the teacher, likewise."""
        return FeatureTaps(teacher, paths)

    def student_inputs(self, images: Any, targets: Any) -> tuple[Any, ...]:
        """What the student is called with."""
        return (images,)

    def teacher_inputs(self, images: Any, targets: Any) -> tuple[Any, ...]:
        """What the teacher is called with."""
        return (images,)

    def logits(self, output: Any, teacher_output: Any, targets: Any, compares: str = "classes") -> tuple[Any, Any, Any]:
        """What terms of the level ``'logits'`` see: student's and teacher's logits, and the targets; of mixed ones, the largest share.

        Raises:
            UserError: If the networks have nothing of the kind that the term compares, see :class:`~gkd.losses.Term`.
        """
        if compares != "classes":
            raise UserError(f"Expected a term that compares class logits for these networks (got one that compares {compares})")
        is_mixed = isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() == 2
        return read_logits(output), read_logits(teacher_output), targets.argmax(dim=1) if is_mixed else targets

    def heads(self, student: nn.Module, teacher: nn.Module, input_size: Sequence[int]) -> tuple[ClassHead, ClassHead]:
        """The last layers of both, for terms that ask for the networks' outputs; they follow the networks wherever these go.

        Raises:
            UserError: If the networks are no classifiers.
        """
        return find_head(student, input_size), find_head(teacher, input_size)

    def anchors(self, output: Any, logits: tuple[Any, Any, Any]) -> list[Tensor]:
        """Where terms of the level ``'logits'`` and the task both pull at the student, for a balance of their gradients."""
        return [logits[0]]

    def regions(self, images: Any, targets: Any, output: Any, true_boxes_only: bool = False) -> tuple[list[Tensor], tuple[int, int]]:
        """Finds the boxes of every image, in pixels, and the size of the images, for a term that looks at regions."""
        if not isinstance(images, Tensor) or not all(isinstance(target, Mapping) and "boxes" in target for target in targets):
            raise ValueError(f"Expected images and targets with 'boxes' (got {type(images).__name__} and {type(targets).__name__})")
        return [target["boxes"] for target in targets], (images.shape[-2], images.shape[-1])
