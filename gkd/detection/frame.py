"""Maps of networks that resize their images themselves, brought to where the images lie in the padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resampled(
    maps: Mapping[str, Tensor], resized: tuple[int, int], sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Lays maps that each cover one image as a whole over the padded batch; padding is 0.

    Args:
        maps: Of every level a map of all images.
        resized: Height and width that every image was resized to.
        sizes: Height and width of the images as given.
        image_size: Height and width of the padded batch.

    Shapes:
        - **maps** [B, C, h, w]; **output** [B, C, h', w'], with as many values to a pixel of `resized` as before
    """
    device = next(iter(maps.values())).device
    extent = torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True).view(-1, 1, 1, 2).flip(3)
    laid = {}
    for level, map_ in maps.items():
        rows, columns = (max(1, round(map_.shape[2 + axis] * image_size[axis] / resized[axis])) for axis in (0, 1))
        down = (torch.arange(rows, device=device) + 0.5) * (image_size[0] / rows)
        across = (torch.arange(columns, device=device) + 0.5) * (image_size[1] / columns)
        centres = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=2)
        grid = 2 * centres / extent - 1
        inside = (grid.abs() <= 1).all(3).unsqueeze(1)
        # At the border as in the middle of the outermost cell; what lies outside of the image is padding.
        values = F.grid_sample(map_, grid.to(map_.dtype), padding_mode="border", align_corners=False)
        laid[level] = values * inside
    return laid
