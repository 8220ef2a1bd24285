from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.outputs import read_logits
from gkd.models.weights import load_weights

Statistics = Sequence[float] | Tensor


class Teacher(nn.Module):
    r"""A fixed network that is asked, not trained: always in eval mode, without gradient, on inputs normalised as it expects.

    The images come normalised for the student. A teacher that was trained with other statistics, or with the channels the
    other way round (BGR), gets

    .. math:: x_t = (x_s \sigma_s + \mu_s - \mu_t) / \sigma_t,

    one multiply-add per channel, or the very same tensor where the two agree. A teacher that was trained at another resolution gets the
    images resized, antialiased, and one whose classes have another order answers in the student's. It is a wrapper for the wrapped:
    `FeatureTaps(teacher, ['layer3'])` finds the paths inside the network and sees all this done.

    The network's parameters are frozen in place; give a copy of a network that is still to be trained.

    Args:
        model: The network, or any callable from images to a tensor.
        mean: Mean of each channel that the teacher was trained with, in *its own* order of channels; None: the student's.
        std: Standard deviation of each channel, likewise.
        weights: A file or dict of weights for the model (see load_weights).
        student_mean: Mean of each channel that the images were normalised with; may also come later, by `match_student`.
        student_std: Standard deviation of each channel, likewise.
        reverse_channels: Whether the teacher expects the channels in the opposite order to the student's.
        input_size: Height and width of the images that the teacher sees; one number for both; None: those of the student's.
        logit_order: For every class of the student the position of that class in the teacher's logits (see gkd.models.class_order).

    Shapes:
        - **images** [B, C, H, W]; **output** what the model returns, or with logit_order the logits [B, K]

    Gradient: none, neither to the images nor to the parameters; the output may enter losses of a student.

    Raises:
        ValueError: If only one of mean and std is given, a standard deviation is not positive, the numbers of channels differ,
            a size is not positive, logit_order names a position twice, or, when called, the teacher has statistics of its own and the
            student's are not known.

    Examples:
        >>> teacher = Teacher(nn.Identity(), mean=[0.5], std=[0.5], student_mean=[0.0], student_std=[1.0])
        >>> teacher(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)).flatten().tolist()
        [-1.0, 0.0, 1.0]
    """

    scale: Tensor | None
    shift: Tensor | None
    logit_order: Tensor | None

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        mean: Statistics | None = None,
        std: Statistics | None = None,
        weights: str | os.PathLike[str] | dict[str, Any] | None = None,
        student_mean: Statistics | None = None,
        student_std: Statistics | None = None,
        reverse_channels: bool = False,
        input_size: int | Sequence[int] | None = None,
        logit_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.reverse_channels = reverse_channels
        self.statistics = _pair(mean, std, "mean and std")
        self.input_size = _size(input_size)
        self._matched = False
        self.register_buffer("logit_order", _order(logit_order), persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        if weights is not None:
            if not isinstance(model, nn.Module):
                raise ValueError(f"Expected a torch.nn.Module to load weights into (got {type(model).__name__})")
            load_weights(model, weights)
        if student_mean is not None or student_std is not None:
            self.match_student(student_mean, student_std)
        self.requires_grad_(False)
        self.eval()

    @property
    def module(self) -> nn.Module | Callable[..., Any]:
        """The wrapped network, by the name that wrappers have for it."""
        return self.model

    def match_student(self, mean: Statistics | None, std: Statistics | None) -> None:
        """Takes note of the statistics, in the student's order of channels, that the images are normalised with."""
        student = _pair(mean, std, "student_mean and student_std")
        self._matched = student is not None
        self.scale = self.shift = None
        if student is None or self.statistics is None:
            return
        student_mean, student_std = (value.flip(0) for value in student) if self.reverse_channels else student
        own_mean, own_std = self.statistics
        if own_mean.numel() != student_mean.numel():
            raise ValueError(
                f"Expected as many channels in the teacher's statistics as in the student's, {student_mean.numel()} "
                f"(got {own_mean.numel()})"
            )
        if torch.equal(own_mean, student_mean) and torch.equal(own_std, student_std):
            return
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        self.scale = (student_std / own_std).view(-1, 1, 1).to(like.device, torch.float32)
        self.shift = ((student_mean - own_mean) / own_std).view(-1, 1, 1).to(like.device, torch.float32)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    def normalize(self, images: Tensor) -> Tensor:
        """Turns images normalised for the student into images normalised for the teacher."""
        if self.statistics is not None and not self._matched:
            raise ValueError(
                "Expected student_mean and student_std, for the teacher has statistics of its own (got neither); give them to "
                "Teacher, or call match_student"
            )
        if self.reverse_channels:
            images = images.flip(1)
        if self.scale is None or self.shift is None:
            return images
        if images.size(1) != self.scale.size(0):
            raise ValueError(f"Expected images of {self.scale.size(0)} channels (got {list(images.shape)})")
        return torch.addcmul(self.shift, images, self.scale).to(images.dtype)

    def image_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the images that the model is called with, for images of this height and width."""
        return self.input_size or (size[0], size[1])

    def resize(self, images: Tensor) -> Tensor:
        """Brings images to the teacher's own height and width, bilinearly and antialiased."""
        if self.input_size is None or tuple(images.shape[-2:]) == self.input_size:
            return images
        return F.interpolate(images.float(), self.input_size, mode="bilinear", antialias=True).to(images.dtype)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on the images, resized and normalised its way; further arguments are passed on."""
        # Not inference_mode: what it returns could not be saved for the backward pass of a student's loss.
        with torch.no_grad():
            if isinstance(self.model, nn.Module) and self.model.training:
                self.model.eval()
            inputs = self.normalize(images)
            output = self.model(inputs if self.input_size is None else self.resize(inputs), *args, **kwargs)
            return output if self.logit_order is None else read_logits(output).index_select(1, self.logit_order)


def _size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"Expected input_size as one positive integer or as height and width (got {size})")
    return sides


def _order(order: Sequence[int] | None) -> Tensor | None:
    if order is None:
        return None
    if len(set(order)) < len(order) or min(order, default=0) < 0:
        raise ValueError(f"Expected logit_order to name a position of the teacher's logits for every class, none twice (got {list(order)})")
    return torch.tensor(order)


def _pair(mean: Statistics | None, std: Statistics | None, names: str) -> tuple[Tensor, Tensor] | None:
    """Checks a mean and a standard deviation and returns them in float64, or None where neither is given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"Expected both {names}, or neither (got {mean} and {std})")
    mean, std = (torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten() for value in (mean, std))
    if mean.numel() != std.numel():
        raise ValueError(f"Expected {names} for the same channels (got {mean.numel()} and {std.numel()})")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"Expected {names} finite and every deviation positive (got {mean.tolist()} and {std.tolist()})")
    return mean, std
