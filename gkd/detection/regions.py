"""Which regions of the images are compared: true boxes, background that was mined, proposals that both networks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align

from gkd.graphs import RegionNodes
from gkd.graphs.values import constant

OUTSIDE = -8.0  # corners of a box that lies before the image: it makes no node


@dataclass(frozen=True)
class Regions:
    """How many regions beside the true boxes take part.

    Args:
        background: Background regions of each image that are added to the true boxes as nodes of a graph.
        max_iou: Largest overlap of a background region with a true box.
        proposals: Proposals of each image on which class logits are compared, where a term does that.
    """

    background: int = 8
    max_iou: float = 0.3
    proposals: int = 64

    def __post_init__(self) -> None:
        if self.background < 0 or self.proposals < 1 or not 0 < self.max_iou <= 1:
            raise ValueError(
                "Expected background >= 0, proposals >= 1 and max_iou in (0, 1] "
                f"(got {self.background}, {self.proposals} and {self.max_iou})"
            )


class BoxNodes(RegionNodes):
    """`gkd.graphs.RegionNodes` cut out by torchvision's RoIAlign.

    Args:
        output_size: Size (height, width) of what is read from a box.
        sampling_ratio: Points read for each value, along each axis; 0 takes as many as the box has pixels.
        center: Subtracts the graph's mean row.
    """

    def __init__(self, output_size: int | tuple[int, int] = 1, sampling_ratio: int = 2, center: bool = False) -> None:
        super().__init__(partial(roi_align, aligned=True, sampling_ratio=sampling_ratio), output_size, center)


def padded_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Puts the boxes of all images into one tensor; the rest are boxes outside the image, which make no node.

    Shapes:
        - **boxes** B times [n_i, 4]; **output** [B, max n_i, 4]

    Examples:
        >>> padded_boxes([torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.zeros(0, 4)])[1]
        tensor([[-8., -8., -7., -7.]])
    """
    padded = pad_sequence([box.float() for box in boxes], batch_first=True, padding_value=float("nan"))
    return torch.where(padded.isnan(), _outside(padded), padded)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of all boxes with all others of the same image.

    Shapes:
        - **boxes** [B, n, 4], **others** [B, m, 4]; **output** [B, n, m]

    Examples:
        >>> box_iou(torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 3.0, 2.0]]]))
        tensor([[[0.3333]]])
    """
    first, second = boxes.unsqueeze(2), others.unsqueeze(1)
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (first, second)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-9)


def mine_background(candidates: Tensor, boxes: Tensor, number: int, max_iou: float = 0.3) -> Tensor:
    """Takes the first candidates of each image that overlap no true box by more than `max_iou`.

    All images are done at once and nothing waits for a GPU: where there are too few such candidates, boxes outside the image fill up.

    Args:
        candidates: Best first; boxes outside the image are passed over.
        boxes: True boxes, as `padded_boxes` gives them.
        number: How many are wanted.
        max_iou: Largest overlap.

    Shapes:
        - **candidates** [B, n, 4], **boxes** [B, m, 4]; **output** [B, number, 4]

    Examples:
        >>> candidates = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [6.0, 6.0, 9.0, 9.0]]])
        >>> mine_background(candidates, torch.tensor([[[0.0, 0.0, 4.0, 5.0]]]), number=1)
        tensor([[[6., 6., 9., 9.]]])
    """
    if candidates.shape[1] < number:
        filler = _outside(candidates.new_empty(candidates.shape[0], number - candidates.shape[1], 4))
        candidates = torch.cat((candidates, filler), dim=1)
    overlap = box_iou(candidates, boxes)
    overlap = overlap.amax(2) if boxes.shape[1] else overlap.new_zeros(candidates.shape[:2])
    # A proposal may have shrunk to a line at the edge of the image.
    is_background = (overlap <= max_iou) & (candidates[..., 2] > 0) & (candidates[..., 2:] - candidates[..., :2] >= 1).all(2)
    order = torch.arange(candidates.shape[1], device=candidates.device)
    first = torch.where(is_background, order, order + candidates.shape[1]).argsort(dim=1)[:, :number]
    chosen = candidates.gather(1, first.unsqueeze(2).expand(-1, -1, 4))
    return torch.where(is_background.gather(1, first).unsqueeze(2), chosen, _outside(chosen))


def grid_candidates(features: Tensor, image_size: tuple[int, int], grid: int = 8, scales: Sequence[float] = (0.125, 0.25, 0.5)) -> Tensor:
    """Squares on a grid over the image, those first where a feature map responds most: candidates of networks without proposals.

    Args:
        features: A map, whose mean absolute value is the response.
        image_size: Height and width of the images.
        grid: Most centres along a side.
        scales: Sides, as shares of the image's shorter side.

    Shapes:
        - **features** [B, C, h, w]; **output** [B, n, 4]
    """
    response = features.detach().abs().mean(1, keepdim=True).float()
    rows, columns = min(grid, features.shape[2]), min(grid, features.shape[3])
    response = F.adaptive_avg_pool2d(response, (rows, columns)).flatten(1)
    height, width = image_size
    down = (torch.arange(rows, device=features.device) + 0.5) * (height / rows)
    across = (torch.arange(columns, device=features.device) + 0.5) * (width / columns)
    centres = torch.stack((across.repeat(rows), down.repeat_interleave(columns)), dim=1)
    half = constant(scales, centres).view(-1, 1, 1) * (min(image_size) / 2)
    limit = constant((width, height), centres).repeat(2)
    squares = torch.cat((centres - half, centres + half), dim=2).clamp(min=0).minimum(limit).flatten(0, 1)
    order = response.repeat(1, len(scales)).argsort(dim=1, descending=True, stable=True)
    return squares[order]


def shared_proposals(proposals: Sequence[Tensor], number: int, image_size: tuple[int, int]) -> Tensor:
    """The first proposals of every image; the whole image stands where there are too few.

    Shapes:
        - **proposals** B times [n_i, 4]; **output** [B, number, 4]
    """
    padded = padded_boxes(proposals)[:, :number]
    padded = torch.cat((padded, _outside(padded.new_empty(padded.shape[0], number - padded.shape[1], 4))), dim=1)
    whole = constant((0.0, 0.0, image_size[1], image_size[0]), padded)
    return torch.where((padded[..., 2:3] < 0), whole, padded)


def region_labels(regions: Tensor, boxes: Tensor, labels: Sequence[Tensor], num_classes: int, min_iou: float = 0.5) -> Tensor:
    """Class of the true box that a region overlaps most, or `num_classes`, the background.

    Shapes:
        - **regions** [B, n, 4], **boxes** [B, m, 4] as of `padded_boxes`, **labels** B times [m_i]; **output** [B, n] long
    """
    if boxes.shape[1] == 0:
        return torch.full(regions.shape[:2], num_classes, device=regions.device)
    overlap, nearest = box_iou(regions, boxes).max(2)
    classes = pad_sequence(list(labels), batch_first=True, padding_value=num_classes)
    return torch.where(overlap >= min_iou, classes.gather(1, nearest), num_classes)


def _outside(like: Tensor) -> Tensor:
    return constant((OUTSIDE, OUTSIDE, OUTSIDE + 1, OUTSIDE + 1), like).expand(like.shape)
