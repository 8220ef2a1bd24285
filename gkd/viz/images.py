"""Pictures over images and classes: where a network looks, and what it takes for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from gkd.viz.style import BLUE, INK, MUTED, ORANGE, STUDENT, TEACHER, bare, grid_of, styled, veil

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_attention(images: Tensor, masks: Mapping[str, Tensor], number: int = 3, titles: Sequence[str] = ()) -> Figure:
    """Draws attention masks over the first images: a row for each image, a column for each mask.

    Every mask is stretched from its smallest to its largest value, so that shapes are compared and not strengths.

    Args:
        images: In [0, 1].
        masks: By name.
        number: Of images, at most.
        titles: Of the images.

    Shapes:
        - **images** [B, C, H, W], **masks** [B, h, w] each
    """
    if any(mask.dim() != 3 or len(mask) != len(images) for mask in masks.values()):
        raise ValueError(f"Expected masks [{len(images)}, h, w] (got {[list(mask.shape) for mask in masks.values()]})")
    rows, columns = min(number, len(images)), 1 + len(masks)
    side = min(1.5, 10 / columns)
    figure, panels = grid_of(max(rows * columns, 1), columns, side, side)
    gray = images.detach().float().cpu().clamp(0, 1)
    gray = gray.mean(dim=1) if gray.size(1) != 3 else (gray * gray.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1)
    size = tuple(max(96, length) for length in gray.shape[1:])
    for row in range(rows):
        picture = F.interpolate(gray[row, None, None], size=size, mode="nearest")[0, 0]
        shown = images[row].detach().float().cpu().clamp(0, 1)
        first = panels[row * columns]
        first.imshow((shown.movedim(0, -1) if len(shown) == 3 else shown[0]).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if row < len(titles):
            first.set_title(titles[row])
        for column, (name, mask) in enumerate(masks.items(), start=1):
            heat = F.interpolate(mask[row, None, None].detach().float().cpu(), size=size, mode="bilinear", align_corners=False)[0, 0]
            heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
            axes = panels[row * columns + column]
            axes.imshow(_blend(picture.numpy(), heat.numpy()), interpolation="nearest")
            if row == 0:
                color = STUDENT if name.startswith("student") else TEACHER if name.startswith("teacher") else INK
                axes.set_title(name.replace(" · ", "\n"), color=color, fontsize=8)
    for panel in panels:
        bare(panel)
    return figure


@styled
def draw_confusion(matrix: Tensor, classes: Sequence[str] = ()) -> Figure:
    """Draws how often each class is taken for each: rows are the true classes, columns the answers.

    The diagonal is blue by the share of its class that is right; a mistake is orange by its share of the largest one, so that few
    mistakes are seen too.

    Args:
        matrix: Counts.
        classes: Names, drawn where they fit.

    Shapes:
        - **matrix** [K, K]
    """
    counts = np.asarray(matrix, dtype=float)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(classes) not in (0, len(counts)):
        raise ValueError(f"Expected a square matrix, and a name for each class (got {counts.shape} and {len(classes)} names)")
    size = len(counts)
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    wrong = share * (1 - np.eye(size))
    figure, (panel,) = grid_of(1, 1, 4.6, 4.4)
    panel.imshow(np.diag(np.diag(share)), cmap=veil(BLUE), vmin=0, vmax=1.25, interpolation="nearest")
    panel.imshow(np.sqrt(wrong / wrong.max(initial=1e-12)), cmap=veil(ORANGE), vmin=0, vmax=1.1, interpolation="nearest")
    bare(panel)
    names = [str(name) for name in classes] or [str(number) for number in range(size)]
    if size <= 30:
        longest = max(map(len, names), default=0)
        panel.set_xticks(range(size), names, rotation=90 if longest > 3 else 0, color=MUTED)
        panel.set_yticks(range(size), names, color=MUTED)
        panel.tick_params(length=0)
    if size <= 12:
        for row, column in zip(*np.nonzero(counts), strict=True):
            panel.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", fontsize=8, color=INK)
    panel.set_xlabel("the student's answer")
    panel.set_ylabel("true class")
    return figure


def _blend(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a mask over a grey image: the image stays as brightness, the mask is the colour."""
    from matplotlib import colormaps

    color = colormaps["inferno"](heat)[..., :3]
    return 0.35 * picture[..., None] * (0.35 + 0.65 * heat[..., None]) + 0.65 * color
