from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gkd.graphs.nodes import RegionNodes
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import unit_rows
from gkd.graphs.values import constant
from gkd.losses.inputs import as_input, check_maps, check_same_shape, gram, in_full_precision, nan_if_diverged

__all__ = ["DsigLoss", "FGDLoss", "GlobalContext", "fgd_focal_loss", "foreground_mask", "instance_graph_loss"]


def foreground_mask(boxes: Sequence[Tensor], image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    r"""Marks the pixels of a feature map that lie in a box by one over the area of the smallest such box, and the others by 0.

    A box covers, as published, the pixels from :math:`\lfloor x_1 w / W \rfloor` to :math:`\lceil x_2 w / W \rceil` inclusive, and likewise
    in y. All boxes of all images are marked at once.

    Args:
        boxes: Of every image, (x1, y1, x2, y2) in pixels of the batch.
        image_size: Height and width of the (padded) batch of images that the map was computed from.
        size: Height and width of the map.

    Shapes:
        - **boxes** B times [n_i, 4]; **output** [B, h, w]

    Raises:
        ValueError: If a tensor of boxes is not [n, 4].

    Examples:
        >>> foreground_mask([torch.tensor([[0.0, 0.0, 8.0, 0.0]])], (32, 32), (4, 4))[0, 0]
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    if wrong := [tuple(box.shape) for box in boxes if box.dim() != 2 or box.shape[1] != 4]:
        raise ValueError(f"Expected boxes [n, 4] for every image (got {wrong[0]})")
    # Padding is a box that starts and ends before the map.
    padded = nn.utils.rnn.pad_sequence([box.float() for box in boxes], batch_first=True, padding_value=-1e6)
    height, width = size
    scaled = padded * constant((width / image_size[1], height / image_size[0]), padded).repeat(2)
    low, high = scaled[..., :2].floor(), scaled[..., 2:].ceil()
    weight = 1 / (high - low + 1).prod(2)
    column, row = torch.arange(width, device=padded.device), torch.arange(height, device=padded.device)
    in_column = (column >= low[..., :1]) & (column <= high[..., :1])
    in_row = (row >= low[..., 1:]) & (row <= high[..., 1:])
    covered = in_row.unsqueeze(3) & in_column.unsqueeze(2)
    if padded.shape[1] == 0:
        return padded.new_zeros(len(boxes), height, width)
    return (covered * weight[..., None, None]).amax(1)


def _attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Attention over pixels [B, h, w] and channels [B, C], each of mean 1."""
    magnitude = features.abs()
    pixels, channels = magnitude.mean(1), magnitude.mean((2, 3))
    space = (pixels.flatten(1) / temperature).softmax(1).view_as(pixels) * pixels[0].numel()
    return space, (channels / temperature).softmax(1) * channels.shape[1]


@in_full_precision
def fgd_focal_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    temperature: float = 0.5,
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
    attention_weight: float = 1e-3,
) -> Tensor:
    r"""Compares maps inside and outside the boxes apart, guided by the teacher's attention, and the attentions themselves.

    .. math:: \frac1B \sum \big( \alpha M + \beta \bar M \big)\, A^S_t A^C_t\, (F^s - F^t)^2
              + \frac{\gamma}{B} \big( |A^S_s - A^S_t|_1 + |A^C_s - A^C_t|_1 \big)

    M is the :func:`foreground_mask`, :math:`\bar M` shares the weight 1 evenly among the pixels outside all boxes.

    Shapes:
        - **student**, **teacher** [B, C, h, w], **foreground** [B, h, w]; **output** scalar

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    teacher = teacher.detach()
    student_space, student_channels = _attention(student, temperature)
    space, channels = _attention(teacher, temperature)
    outside = (foreground == 0).to(space.dtype)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    pixels = (foreground_weight * foreground + background_weight * outside) * space
    difference = (student - teacher).square()
    features = torch.einsum("bchw,bc,bhw->", difference, channels, pixels)
    attention = (student_space - space).abs().sum() + (student_channels - channels).abs().sum()
    return (features + attention_weight * attention) / len(student)


class GlobalContext(nn.Module):
    """Adds to every pixel what an attention-weighted mean over the image says (the GcBlock); at first it adds nothing.

    Args:
        channels: Of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        last = nn.Conv2d(hidden, channels, 1)
        self.transform = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.mask.bias, last.weight, last.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the map with its context, of the same shape."""
        weights = self.mask(features).flatten(1).softmax(1)
        context = torch.einsum("bcp,bp->bc", features.flatten(2), weights.to(features.dtype))
        return features + self.transform(context[..., None, None])


@in_full_precision
def instance_graph_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    node_weight: float = 0.5,
    edge_weight: float = 2.0,
) -> Tensor:
    r"""Compares graphs whose nodes are the regions of an image and whose edges are all the cosines between them.

    .. math:: \frac1B \sum_b \left( \lambda_v \mathrm{MSE}(X^s_b, X^t_b) + \frac{\lambda_e}{2} \mathrm{MSE}(E^s_b, E^t_b) \right),
              \quad E_{ij} = \cos(x_i, x_j)

    Means are over the existing nodes of an image. Cosines keep their sign, as published. An image without regions counts 0.

    Args:
        student: Features of the regions.
        teacher: Features of the same regions; get no gradient.
        mask: Which nodes exist.
        node_weight: Weight of the nodes.
        edge_weight: Weight of the edges.

    Shapes:
        - **student**, **teacher** [B, n, d], **mask** [B, n]; **output** scalar

    References:
        Chen, Chen, Cao, Gao, Liu, Zhang, Cai, Sun: Deep Structured Instance Graph for Distilling Object Detectors, ICCV 2021.
    """
    check_same_shape(student, teacher)
    nodes = mask.unsqueeze(2)
    student, teacher = torch.where(nodes, student, 0.0), torch.where(nodes, teacher.detach(), 0.0)
    count = mask.sum(1).clamp(min=1)
    node_error = (student - teacher).square().sum((1, 2)) / (count * max(student.shape[2], 1))
    edge_error = (gram(unit_rows(student)) - gram(unit_rows(teacher))).square().sum((1, 2)) / count.square()
    return (node_weight * node_error + 0.5 * edge_weight * edge_error).sum() / max(len(student), 1)


class FGDLoss(nn.Module):
    r"""Focal and global distillation: :func:`fgd_focal_loss` plus the distance of both maps with their :class:`GlobalContext`.

    .. math:: L_{focal} + \frac{\lambda}{B} \| \mathrm{GC}_s(F^s) - \mathrm{GC}_t(F^t) \|^2

    It is 0 at student = teacher until the two context blocks have learned to differ. The defaults are those published for anchor-based
    one-stage detectors; two-stage ones take 5e-5, 2.5e-5, 5e-5 and 5e-7.

    Args:
        temperature: Of the attention.
        foreground_weight: Alpha.
        background_weight: Beta.
        attention_weight: Gamma.
        global_weight: Lambda.
    """

    level = "stage"
    needs_boxes = True
    true_boxes_only = True  # what a detector adds to the boxes of a graph is no foreground

    def __init__(
        self,
        temperature: float = 0.5,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 1e-3,
        global_weight: float = 5e-6,
    ) -> None:
        super().__init__()
        self.temperature, self.global_weight = temperature, global_weight
        self.weights = (foreground_weight, background_weight, attention_weight)
        self.align: nn.Module = nn.Identity()
        self.contexts = nn.ModuleList()

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the context blocks, and a 1x1 convolution if needed, for maps of these shapes [B, C, h, w]."""
        c, d = student_shape[1], teacher_shape[1]
        self.align = nn.Identity() if c == d else nn.Conv2d(c, d, 1)
        self.contexts = nn.ModuleList([GlobalContext(d), GlobalContext(d)])

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the loss of one stage.

        Args:
            student: Feature map [B, C, h, w].
            teacher: Feature map [B, D, h, w].
            boxes: True boxes of every image, B times [n_i, 4] as (x1, y1, x2, y2) in pixels; n_i may be 0.
            image_size: Height and width of the batch of images, padding included.
        """
        if not self.contexts:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of FGDLoss")
        check_maps(student, teacher)
        if boxes is None or image_size is None or len(boxes) != len(student):
            raise ValueError(f"Expected boxes of {len(student)} images and an image_size (got {_count(boxes)} and {image_size})")
        student, teacher = self.align(as_input(student, self.align)), teacher.detach()
        foreground = foreground_mask([box.to(student.device) for box in boxes], image_size, (student.shape[2], student.shape[3]))
        focal = fgd_focal_loss(student, teacher, foreground, self.temperature, *self.weights)
        student_context, teacher_context = (
            as_float(context(as_input(features, context))) for context, features in zip(self.contexts, (student, teacher), strict=True)
        )
        return focal + self.global_weight * (student_context - teacher_context).square().sum() / len(student)


class DsigLoss(nn.Module):
    """Structured instance graphs, see :func:`instance_graph_loss`, of the regions that :class:`gkd.graphs.RegionNodes` cuts out.

    After the paper, for regions of one map: which boxes take part is up to the caller (true boxes, or proposals), background regions are
    not mined, and the mean over the images takes the place of the sum over the (two) images of one GPU.

    Args:
        roi_align: Reads the boxes from a map; :func:`torchvision.ops.roi_align` if None.
        output_size: Height and width of what is read from a box.
        node_weight: Weight of the nodes.
        edge_weight: Weight of the edges.
    """

    level = "stage"
    matched_channels = True
    needs_boxes = True

    def __init__(
        self,
        roi_align: Callable[..., Tensor] | None = None,
        output_size: int = 7,
        node_weight: float = 0.5,
        edge_weight: float = 2.0,
    ) -> None:
        super().__init__()
        if roi_align is None:
            from torchvision import ops

            roi_align = ops.roi_align
        self.nodes = RegionNodes(roi_align, output_size=output_size)
        self.node_weight, self.edge_weight = node_weight, edge_weight

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the loss of one stage.

        Args:
            student: Feature map [B, C, h, w].
            teacher: Feature map [B, C, h', w'].
            boxes: Regions of every image, B times [n_i, 4] as (x1, y1, x2, y2) in pixels; n_i may be 0.
            image_size: Height and width of the batch of images, padding included.
        """
        check_maps(student, teacher)
        if boxes is None or image_size is None or len(boxes) != len(student):
            raise ValueError(f"Expected boxes of {len(student)} images and an image_size (got {_count(boxes)} and {image_size})")
        if not any(len(box) for box in boxes):
            return 0 * as_float(student).sum()
        with full_precision(student):
            try:
                student_nodes = self.nodes(student, boxes, image_size)
                with torch.no_grad():
                    teacher_nodes = self.nodes(teacher, boxes, image_size)
            except ValueError as error:
                return nan_if_diverged(error, student)
            assert student_nodes.mask is not None
            return instance_graph_loss(student_nodes.x, teacher_nodes.x, student_nodes.mask, self.node_weight, self.edge_weight)


def _count(boxes: Sequence[Tensor] | None) -> str:
    return "None" if boxes is None else f"those of {len(boxes)}"
