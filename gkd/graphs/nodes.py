from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.arguments import flag, positive_integer
from gkd.graphs.precision import as_float
from gkd.graphs.values import readable


class Nodes(NamedTuple):
    """The nodes of B graphs, padded to the same number.

    Args:
        x: What the nodes are, in float32 or float64.
        pos: Where they are; None if they have no place.
        mask: True for nodes that exist; None if all do.

    Shapes:
        - **x** [B, n, d], **pos** [B, n, p], **mask** [B, n] bool
    """

    x: Tensor
    pos: Tensor | None = None
    mask: Tensor | None = None


class ChannelNodes(nn.Module):
    r"""Every channel of a feature map is a node, described by its map: :math:`x_c \in \mathbb{R}^{hw}`.

    Args:
        grid: Size (height, width) to which every map is average-pooled, so that stages and networks with maps of different sizes have
            equally long rows; None keeps the map's own size.
        center: Subtracts the graph's mean row, so that a cosine sees what distinguishes the nodes and not what they share.

    Shapes:
        - **features** [B, C, h, w]; **output.x** [B, C, h * w]

    Raises:
        ValueError: If the features do not have this shape, are empty maps, or (checked on the CPU only) are not finite.

    Examples:
        >>> ChannelNodes(grid=4)(torch.rand(2, 16, 8, 8)).x.shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, grid: int | tuple[int, int] | None = None, center: bool = False) -> None:
        super().__init__()
        self.grid = _grid_size(grid)
        self.center = flag(center, "center")

    def forward(self, features: Tensor) -> Nodes:
        """Nodes of B graphs with C nodes each."""
        x = _pooled(check_features(features, (4,), "[B, C, h, w]"), self.grid).flatten(2)
        return Nodes(centered(x) if self.center else x)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"grid={self.grid}, center={self.center}"


class PatchNodes(nn.Module):
    r"""Every position of a feature map is a node, described by its channels: :math:`x_p \in \mathbb{R}^C`.

    Nodes are in row-major order. Their position (x, y) is the centre of the patch, in units of the image's width and height.

    Args:
        grid: Size (height, width) to which the map is average-pooled; None keeps the map's own size.
        center: Subtracts the graph's mean row.

    Shapes:
        - **features** [B, C, h, w]; **output.x** [B, h * w, C], **output.pos** [B, h * w, 2] in (0, 1)

    Raises:
        ValueError: If the features do not have this shape, are empty maps, or (checked on the CPU only) are not finite.

    Examples:
        >>> nodes = PatchNodes()(torch.rand(2, 16, 2, 2))
        >>> nodes.x.shape, nodes.pos[0].tolist()
        (torch.Size([2, 4, 16]), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    """

    def __init__(self, grid: int | tuple[int, int] | None = None, center: bool = False) -> None:
        super().__init__()
        self.grid = _grid_size(grid)
        self.center = flag(center, "center")

    def forward(self, features: Tensor) -> Nodes:
        """Nodes of B graphs with h * w nodes each."""
        pooled = _pooled(check_features(features, (4,), "[B, C, h, w]"), self.grid)
        batch_size, _, height, width = pooled.shape
        x = pooled.flatten(2).mT.contiguous()
        column = (torch.arange(width, device=x.device, dtype=x.dtype) + 0.5) / width
        row = (torch.arange(height, device=x.device, dtype=x.dtype) + 0.5) / height
        pos = torch.stack((column.repeat(height), row.repeat_interleave(width)), dim=-1)
        return Nodes(centered(x) if self.center else x, pos.expand(batch_size, -1, -1))

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"grid={self.grid}, center={self.center}"


class InstanceNodes(nn.Module):
    """Every image of the batch is a node of *one* graph, described by its feature map.

    Args:
        grid: Size (height, width) to which every map is average-pooled: 1 leaves one number a channel, None keeps the whole map.
        center: Subtracts the mean row of the batch.

    Shapes:
        - **features** [B, C, h, w] or [B, D]; **output.x** [1, B, C * h * w] or [1, B, D]

    Raises:
        ValueError: If the features do not have one of these shapes, have empty rows, or (checked on the CPU only) are not finite.

    Examples:
        >>> InstanceNodes(grid=1)(torch.rand(5, 16, 8, 8)).x.shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, grid: int | tuple[int, int] | None = None, center: bool = False) -> None:
        super().__init__()
        self.grid = _grid_size(grid)
        self.center = flag(center, "center")

    def forward(self, features: Tensor) -> Nodes:
        """Nodes of one graph with B nodes."""
        features = check_features(features, (2, 4), "[B, C, h, w] or [B, D]")
        x = (_pooled(features, self.grid) if features.dim() == 4 else features).flatten(1)[None]
        return Nodes(centered(x) if self.center else x)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"grid={self.grid}, center={self.center}"


class RegionNodes(nn.Module):
    """Every box is a node, described by the features inside it; graphs have as many nodes as their image has boxes.

    Boxes are clipped to the image. A box that then has no area (it lies outside) makes no node: its place is masked out, and the other
    nodes of the image move up when the graph is built. A malformed box (corners in the wrong order, no area, not finite) is an error,
    because it means that the boxes are not what they are taken for, for example (x, y, width, height).

    Args:
        roi_align: Called as ``roi_align(features, rois, output_size, spatial_scale)`` with rois [K, 5] (image, x1, y1, x2, y2):
            ``torchvision.ops.roi_align``, or a ``functools.partial`` of it that sets ``aligned=True`` or ``sampling_ratio``.
        output_size: Size (height, width) of what is read from a box.
        center: Subtracts the graph's mean row.

    Shapes:
        - **features** [B, C, h, w], **boxes** B tensors [n_i, 4] (x1, y1, x2, y2) in image pixels, **image_size** (height, width);
          **output.x** [B, max n_i, C * height * width], **output.pos** [B, max n_i, 4] (centre x, centre y, width, height) in units of
          the image, **output.mask** [B, max n_i]

    Raises:
        ValueError: If shapes disagree, a box is malformed, or (checked on the CPU only) features are not finite.
    """

    def __init__(self, roi_align: Callable[..., Tensor], output_size: int | tuple[int, int] = 1, center: bool = False) -> None:
        super().__init__()
        if not callable(roi_align):
            raise TypeError(f"Expected roi_align to be callable, such as torchvision.ops.roi_align (got {type(roi_align).__name__})")
        size = _grid_size(output_size)
        if size is None:
            raise ValueError("Expected an output_size (got None)")
        self.roi_align = roi_align
        self.output_size = size
        self.center = flag(center, "center")

    def forward(self, features: Tensor, boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Nodes:
        """Nodes of B graphs, padded to the largest number of boxes."""
        features = check_features(features, (4,), "[B, C, h, w]")
        batch_size, _, height, width = features.shape
        if len(boxes) != batch_size:
            raise ValueError(f"Expected one tensor of boxes for each of the {batch_size} images (got {len(boxes)})")
        if len(image_size) != 2 or min(image_size) <= 0:
            raise ValueError(f"Expected image_size (height, width) in pixels (got {tuple(image_size)})")
        counts = [_num_boxes(index, box) for index, box in enumerate(boxes)]
        size = max(counts, default=0)
        sizes = torch.tensor(counts, dtype=torch.long)
        image = torch.arange(batch_size).repeat_interleave(sizes)
        slot = torch.arange(sum(counts)) + (image * size - (sizes.cumsum(0) - sizes)[image])
        image, slot = (index.to(features.device, non_blocking=True) for index in (image, slot))
        corners = as_float(torch.cat(list(boxes)).detach() if boxes else features.new_zeros(0, 4))
        if readable(corners):
            _check_boxes(corners, counts)
        corners = corners.to(features.device, non_blocking=True)

        # Boxes go to feature coordinates here, not by spatial_scale, which is one number for both axes.
        x0, x1 = corners[:, 0::2].clamp(0, image_size[1]).unbind(1)
        y0, y1 = corners[:, 1::2].clamp(0, image_size[0]).unbind(1)
        inside = (x1 > x0) & (y1 > y0)
        across, down = width / image_size[1], height / image_size[0]
        rois = torch.stack((image.to(corners.dtype), x0 * across, y0 * down, x1 * across, y1 * down), dim=1).to(features.dtype)
        rows = self.roi_align(features, rois, self.output_size, 1.0).flatten(1)
        centre_and_size = ((x0 + x1) / 2, image_size[1]), ((y0 + y1) / 2, image_size[0]), (x1 - x0, image_size[1]), (y1 - y0, image_size[0])
        places = torch.stack([value / length for value, length in centre_and_size], dim=1).to(features.dtype)

        def pad(values: Tensor) -> Tensor:
            empty = values.new_zeros(batch_size * size, *values.shape[1:])
            return empty.index_copy(0, slot, values).view(batch_size, size, *values.shape[1:])

        x, pos, mask = pad(torch.where(inside[:, None], rows, 0.0)), pad(torch.where(inside[:, None], places, 0.0)), pad(inside)
        return Nodes(centered(x, mask) if self.center else x, pos, mask)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"output_size={self.output_size}, center={self.center}"


def centered(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Subtracts the mean row of each graph; padded rows become zero.

    Shapes:
        - **x** [B, n, d], **mask** [B, n]; **output** [B, n, d]
    """
    if mask is None:
        return x - x.mean(dim=1, keepdim=True) if x.shape[1] > 0 else x
    exists = mask[:, :, None]
    x = torch.where(exists, x, 0.0)
    mean = x.sum(dim=1, keepdim=True) / exists.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(exists, x - mean, 0.0)


def check_features(features: Tensor, ranks: tuple[int, ...], shape: str) -> Tensor:
    """Features in float32 or float64, after their type, rank and (on the CPU, where it costs no wait) their values were checked."""
    if not isinstance(features, Tensor):
        raise TypeError(f"Expected features to be a tensor (got {type(features).__name__})")
    if features.dim() not in ranks:
        raise ValueError(f"Expected features of shape {shape} (got {list(features.shape)})")
    if not features.is_floating_point():
        raise ValueError(f"Expected floating-point features (got {features.dtype})")
    if math.prod(features.shape[2:]) == 0 or (features.dim() == 2 and features.shape[1] == 0):
        raise ValueError(f"Expected features of shape {shape} with at least one value a row (got {list(features.shape)})")
    features = as_float(features)
    # One sum is cheaper than isfinite over everything and is not finite if a value is not; the reverse may be overflow.
    if readable(features) and not math.isfinite(features.detach().sum().item()):
        broken = int((~features.detach().isfinite()).sum())
        if broken:
            raise ValueError(f"Expected finite features (got NaN or infinity in {broken} of {features.numel()} values)")
    return features


def checked_rows(nodes: Nodes) -> Tensor:
    """The rows x [B, n, d] in float32 or float64, zero where no node exists, so that nothing of the padding enters a result."""
    x, _, mask = nodes
    if x.dim() != 3:
        raise ValueError(f"Expected nodes.x of shape [B, n, d] (got {list(x.shape)})")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"Expected nodes.mask of shape {list(x.shape[:2])} and type torch.bool (got {list(mask.shape)}, {mask.dtype})")
    x = as_float(x)
    return x if mask is None else torch.where(mask[:, :, None], x, 0.0)


def _pooled(features: Tensor, grid: tuple[int, int] | None) -> Tensor:
    if grid is None or grid == tuple(features.shape[2:]):
        return features
    if grid[0] > features.shape[2] or grid[1] > features.shape[3]:
        raise ValueError(
            f"Expected a grid no larger than the map, {list(features.shape[2:])} (got {list(grid)}): take a smaller grid, or None"
        )
    if features.numel() == 0:
        return features.new_zeros(*features.shape[:2], *grid)
    return F.adaptive_avg_pool2d(features, grid)


def _grid_size(grid: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    size = tuple(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else (grid, grid)
    if len(size) != 2:
        raise ValueError(f"Expected the size of a grid to be one number or two, (height, width) (got {grid!r})")
    return positive_integer(size[0], "the height of a grid"), positive_integer(size[1], "the width of a grid")


def _num_boxes(index: int, boxes: Tensor) -> int:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Expected boxes of shape [n, 4] for image {index} (got {list(boxes.shape)})")
    return boxes.shape[0]


def _check_boxes(corners: Tensor, counts: list[int]) -> None:
    broken = ~(corners[:, 2:] > corners[:, :2]).all(dim=1) | ~corners.isfinite().all(dim=1)
    if corners.shape[0] > 0 and bool(broken.any()):
        first = int(broken.nonzero()[0])
        image = next(i for i in range(len(counts)) if first < sum(counts[: i + 1]))
        raise ValueError(
            f"Expected boxes (x1, y1, x2, y2) with x1 < x2 and y1 < y2 "
            f"(got {[round(v, 4) for v in corners[first].tolist()]}, box {first - sum(counts[:image])} of image {image})"
        )
