"""Augmentation of whole batches on the device: images in, draws in, images out; nothing here draws by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Augmentation(Protocol):
    """What :class:`~gkd.data.InMemoryImages` calls on a batch of training images.

    Attributes:
        num_draws (int): Uniform draws in [0, 1) that one image takes.
    """

    num_draws: int

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augments images [B, C, H, W] uint8 by draws [B, num_draws] float; keeps shape and dtype."""


def shift(images: Tensor, offset: Tensor, padding: int) -> Tensor:
    """Pads with zeros and cuts every image out again at its own offset.

    Args:
        images: Images of any dtype.
        offset: Row and column of the cut in the padded image: ``padding`` in both leaves an image as it is.
        padding: Pixels added on each side.

    Shapes:
        - **images** [B, C, H, W], **offset** [B, 2] long in [0, 2 padding]; **output** [B, C, H, W]
    """
    height, width = images.shape[-2:]
    # A view of every possible cut; the gather copies one of them an image.
    cuts = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return cuts[torch.arange(len(images), device=images.device), :, offset[:, 0], offset[:, 1]]


def mirror(images: Tensor, where: Tensor) -> Tensor:
    """Exchanges left and right in the images that are marked.

    Shapes:
        - **images** [B, C, H, W], **where** [B] bool; **output** [B, C, H, W]
    """
    return torch.where(where[:, None, None, None], images.flip(-1), images)


def erase(images: Tensor, center: Tensor, size: int) -> Tensor:
    """Sets a square of every image to zero; what of it lies outside the image is cut off.

    Args:
        images: Images of any dtype.
        center: Row and column of the square's centre (for an even size, the pixel below and right of it).
        size: Side of the square, in pixels.

    Shapes:
        - **images** [B, C, H, W], **center** [B, 2] long; **output** [B, C, H, W]

    References:
        DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, arXiv 1708.04552.
    """
    height, width = images.shape[-2:]
    low = center - size // 2
    rows = torch.arange(height, device=images.device) - low[:, :1]
    columns = torch.arange(width, device=images.device) - low[:, 1:]
    inside = ((rows >= 0) & (rows < size))[:, None, :, None] & ((columns >= 0) & (columns < size))[:, None, None, :]
    return images.masked_fill(inside, 0)


class CropFlip:
    """The augmentation of the CIFAR recipes: a random crop of the zero-padded image, a random mirror image, and cutout if wanted.

    Args:
        padding: Zeros on each side before the crop, in pixels. 0: no shift.
        flip: Probability of a mirror image. 0 where left and right matter (digits).
        cutout: Side of the square set to zero, in pixels. 0: none.

    Shapes:
        - **images** [B, C, H, W] uint8, **draws** [B, 5] in [0, 1); **output** [B, C, H, W] uint8

    Raises:
        ValueError: If a number is out of range, or if the draws are not [B, 5].

    Examples:
        >>> images = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
        >>> CropFlip(padding=1, flip=0.5)(images, torch.tensor([[0.0, 0.4, 0.9, 0.0, 0.0]]))[0, 0]
        tensor([[0, 0, 0],
                [0, 1, 2],
                [3, 4, 5]], dtype=torch.uint8)
    """

    num_draws = 5

    def __init__(self, padding: int = 4, flip: float = 0.5, cutout: int = 0) -> None:
        if padding < 0 or cutout < 0 or not 0 <= flip <= 1:
            raise ValueError(f"Expected padding >= 0, flip in [0, 1] and cutout >= 0 (got {padding}, {flip} and {cutout})")
        self.padding = padding
        self.flip = flip
        self.cutout = cutout

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Applies shift, mirror and cutout, in this order."""
        if draws.shape != (len(images), self.num_draws):
            raise ValueError(f"Expected draws [{len(images)}, {self.num_draws}] (got {list(draws.shape)})")
        if self.padding:
            images = shift(images, _integers(draws[:, 0:2], 2 * self.padding + 1), self.padding)
        if self.flip:
            images = mirror(images, draws[:, 2] < self.flip)
        if self.cutout:
            height, width = images.shape[-2:]
            center = torch.stack((_integers(draws[:, 3], height), _integers(draws[:, 4], width)), dim=1)
            images = erase(images, center, self.cutout)
        return images

    def __repr__(self) -> str:
        return f"{type(self).__name__}(padding={self.padding}, flip={self.flip}, cutout={self.cutout})"


def _integers(draws: Tensor, number: int) -> Tensor:
    """Uniform integers in [0, number); rounding up of the product must not give ``number``."""
    return (draws * number).long().clamp_(max=number - 1)


def choose(augment: Augmentation | str | None, default: Augmentation) -> Augmentation | None:
    """Gives the data set's own augmentation for ``'default'``, else what the user asked for."""
    if isinstance(augment, str):
        if augment != "default":
            raise ValueError(f"Expected augment as 'default', None or an augmentation such as CropFlip() (got '{augment}')")
        return default
    return augment


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises unless there are a mean and a positive standard deviation for each channel."""
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(f"Expected mean and positive std for each of {channels} channels (got mean={mean}, std={std})")


class Normalize:
    r"""Turns bytes into normalised floats in one pass.

    .. math:: y_c = \frac{x_c / 255 - \mu_c}{\sigma_c}

    Args:
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        channels_last: Give the images in the channels_last memory format.

    Shapes:
        - **images** [B, C, H, W] uint8; **output** [B, C, H, W] float32

    Raises:
        ValueError: If images are not uint8 or do not have as many channels as there are means.

    Examples:
        >>> Normalize([0.5], [0.5])(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[[[-1.,  1.]]]])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels_last: bool = False) -> None:
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * std_)).float().view(-1, 1, 1)
        self.shift = (-mean_ / std_).float().view(-1, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises a batch where it is."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != len(self.scale):
            raise ValueError(f"Expected uint8 images [B, {len(self.scale)}, H, W] (got {images.dtype} {list(images.shape)})")
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        return images.to(torch.float32, memory_format=self.memory_format).mul_(self.scale).add_(self.shift)
