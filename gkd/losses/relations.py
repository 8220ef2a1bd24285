from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import unit_rows
from gkd.losses.inputs import as_input, check_batch, check_maps, gather_images, gram, in_full_precision, pool, unit_scale, vectors

__all__ = [
    "CCLoss",
    "ICKDLoss",
    "IRGLoss",
    "PKTLoss",
    "RKDLoss",
    "SPLoss",
    "cc_loss",
    "ickd_loss",
    "irg_loss",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "sp_loss",
]


def relative_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Squared Euclidean distances between all rows, at least `eps` and exactly 0 on the diagonal.

    They are in units of the square of the longest row, seen from the mean row.

    Shapes:
        - **x** [B, D]; **output** [B, B]
    """
    x = x - x.mean(0)  # distances do not change, and large common offsets do not cancel digits
    products = unit_scale(gram(x))
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None] - 2 * products).clamp(min=eps)
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


@in_full_precision
def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares which images of the batch are alike: row-normalised Gram matrices of the flattened maps.

    .. math:: \frac{1}{B^2} \| \hat G^s - \hat G^t \|_F^2, \quad G = F F^\top,\; F \in \mathbb R^{B \times Chw}

    Widths and sizes need not agree; scale and any rotation of the flattened features do not matter. The cheapest possible are the two
    Gram matrices forward and one product of [B, B] with [B, Chw] backward, next to which the rest vanishes.

    Shapes:
        - **student** [B, ...], **teacher** [B, ...] with B at least 2; **output** scalar

    Raises:
        ValueError: If there are fewer than two images.

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019.
    """
    check_batch(student, teacher, at_least=2)
    student_rows, teacher_rows = (unit_rows(unit_scale(gram(vectors(x)))) for x in (student, teacher.detach()))
    return F.mse_loss(student_rows, teacher_rows)


@in_full_precision
def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the distances between all images, each network's in units of its own mean distance, by the Huber loss.

    .. math:: \frac{1}{B^2} \sum_{ij} \ell\left(\frac{d^s_{ij}}{\bar d^s}, \frac{d^t_{ij}}{\bar d^t}\right)

    Invariant to translation, rotation and scale of either network's vectors.

    Shapes:
        - **student** [B, C], **teacher** [B, D] with B at least 2; **output** scalar

    References:
        Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019.
    """
    check_batch(student, teacher, at_least=2)
    return F.smooth_l1_loss(_over_mean_distance(student), _over_mean_distance(teacher.detach()))


def _over_mean_distance(x: Tensor) -> Tensor:
    squares = relative_distances(x)
    off_diagonal = squares > 0
    distances = torch.where(off_diagonal, squares, 1).sqrt() * off_diagonal  # the square root has no gradient at 0
    return distances / (distances.sum() / (len(x) * (len(x) - 1)))


@in_full_precision
def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the angles in all triangles of images by the Huber loss of their cosines.

    .. math:: \frac{1}{B^3} \sum_{ijk} \ell\left(\cos^s_{ijk}, \cos^t_{ijk}\right), \quad
              \cos_{ijk} = \Big\langle \frac{x_i - x_j}{\|x_i - x_j\|}, \frac{x_k - x_j}{\|x_k - x_j\|} \Big\rangle

    The [B, B, D] differences are never formed: :math:`\langle x_i - x_j, x_k - x_j \rangle = G_{ik} - G_{ij} - G_{jk} + G_{jj}` with the
    Gram matrix of the centred vectors. So the cost beyond two small products is a handful of passes over one [B, B, B] tensor, and the
    cheapest possible is the Huber loss of two given tensors of that size. Images closer than rounding allows to tell apart have no
    direction: their cosines are 0 and get no gradient. Invariant to translation, rotation and scale of either network's vectors.

    Shapes:
        - **student** [B, C], **teacher** [B, D]; **output** scalar, 0 for fewer than three images

    References:
        Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019.
    """
    check_batch(student, teacher, at_least=2)
    with torch.no_grad():
        teacher_cosines = _cosines(teacher)
    return F.smooth_l1_loss(_cosines(student), teacher_cosines)


def _cosines(x: Tensor) -> Tensor:
    """Cosines [j, i, k] of the angle at image j between the images i and k."""
    products = unit_scale(gram(x - x.mean(0)))
    squares = products.diagonal()
    scale = squares[:, None] + squares[None]
    distances = scale - 2 * products
    apart = distances > 32 * torch.finfo(x.dtype).eps * scale.clamp(min=torch.finfo(x.dtype).tiny)
    inverse = torch.where(apart, distances, 1).rsqrt() * apart  # [j, i]
    # <x_i - x_j, x_k - x_j> = G_ik + (G_jj / 2 - G_ij) + (G_jj / 2 - G_kj): one outer product and two rank-one terms
    half = inverse * (0.5 * squares[:, None] - products)
    cosines = torch.addcmul(half.unsqueeze(1), products, inverse.unsqueeze(1)) * inverse.unsqueeze(2)
    return torch.addcmul(cosines, half.unsqueeze(2), inverse.unsqueeze(1))


@in_full_precision
def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Correlates the differences of neighbouring images in the batch.

    .. math:: \frac{1}{B - 1} \sum_{b < B} \langle \delta_b, \delta_{b+1} \rangle, \quad \delta_b = |e^s_b - e^t_b|

    This is the form in which the method's weight of 0.02 was published by the CRD benchmark, from code of the method's authors; the
    paper itself writes a Taylor-expanded Gaussian kernel. It depends on the order of the batch, and its minimum 0 is reached at equality.

    Args:
        student: Embedding of the student.
        teacher: Embedding of the teacher, of the same width; it *does* get a gradient, since its embedding is learned too.

    Shapes:
        - **student**, **teacher** [B, D] with B at least 2; **output** scalar

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019.
    """
    check_batch(student, teacher, at_least=2)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"Expected two embeddings [B, D] (got {tuple(student.shape)} and {tuple(teacher.shape)})")
    difference = (student - teacher).abs()
    return (difference[:-1] * difference[1:]).sum(1).mean()


@in_full_precision
def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Compares the probabilities with which images are neighbours: cosines, moved to [0, 1] and normalised for every image.

    .. math:: \frac{1}{B^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \quad
              p_{ij} = \frac{1 + \cos(x_i, x_j)}{\sum_k (1 + \cos(x_i, x_k))}

    Invariant to rotation, and to the length of every vector.

    Shapes:
        - **student** [B, C], **teacher** [B, D] with B at least 2; **output** scalar

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.
    """
    check_batch(student, teacher, at_least=2)
    student_chance, teacher_chance = (F.normalize(gram(unit_rows(x)) + 1, p=1, dim=1) for x in (student, teacher.detach()))
    return (teacher_chance * ((teacher_chance + eps) / (student_chance + eps)).log()).mean()


@in_full_precision
def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares which channels of an image respond alike: row-normalised Gram matrices of the channels.

    .. math:: \frac{1}{B C} \sum_b \| \hat G^s_b - \hat G^t_b \|_F^2, \quad G_b = F_b F_b^\top,\; F_b \in \mathbb R^{C \times hw}

    Heights and widths need not agree. Where a map has fewer pixels than channels the [C, C] matrices are not formed either:
    with :math:`M = F^\top F` the row products are :math:`\langle G^s_i, G^t_i \rangle = (F^s F^{s\top}\!F^t)_i \cdot F^t_i` and
    :math:`\|G_i\|^2 = F_i M F_i^\top`. The cheapest possible is the smaller of both sets of products.

    Shapes:
        - **student** [B, C, h, w], **teacher** [B, C, h', w']; **output** scalar in [0, 4]

    Raises:
        ValueError: If the numbers of channels differ.

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021.
    """
    check_maps(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"Expected equally many channels (got {tuple(student.shape)} and {tuple(teacher.shape)})")
    student, teacher = student.flatten(2), teacher.detach().flatten(2)
    batch, channels = student.shape[:2]
    if max(student.shape[2], teacher.shape[2]) >= channels:
        student_rows, teacher_rows = (unit_rows(unit_scale(gram(x), (1, 2))) for x in (student, teacher))
        return (student_rows - teacher_rows).square().sum() / (batch * channels)
    student, teacher = unit_scale(student, (1, 2)), unit_scale(teacher, (1, 2))
    student_square = ((student @ gram(student.mT)) * student).sum(2)
    teacher_square = ((teacher @ (teacher.mT @ teacher)) * teacher).sum(2)
    product = ((student @ (student.mT @ teacher)) * teacher).sum(2)
    tiny = torch.finfo(student.dtype).tiny
    student_alive, teacher_alive = student_square > tiny, teacher_square > tiny
    # The product of the squares could overflow or underflow; the product of their roots does not.
    inverse = torch.where(student_alive, student_square, 1).rsqrt() * torch.where(teacher_alive, teacher_square, 1).rsqrt()
    rows = student_alive.to(student.dtype) + teacher_alive.to(student.dtype) - 2 * product * inverse * (student_alive & teacher_alive)
    return rows.sum() / (batch * channels)


def irg_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    edge_weight: float = 5.0,
    transform_weight: float = 5.0,
) -> Tensor:
    r"""Compares the relation graphs of a batch: their edges in every stage, and how the instances move from stage to stage.

    .. math:: \lambda_e \, \overline{\mathrm{MSE}(E^s_l, E^t_l)} + \lambda_\tau \, \overline{\mathrm{MSE}(\tau^s_l, \tau^t_l)}

    Edges :math:`E_l` [B, B] are the squared distances between the flattened maps, over the largest one; the pooled vectors of the deepest
    stage count as a stage more. The transformation :math:`\tau_l` [B] is the squared distance that an instance moves from stage l to l + 1,
    over the largest one, with both maps averaged to the smaller number of channels and pixels. Bars are means over the stages.
    Widths of the two networks need not agree, nor does the scale of a network matter.

    Args:
        student: Maps from shallow to deep.
        teacher: Maps of the same stages; get no gradient.
        edge_weight: Weight of the edges.
        transform_weight: Weight of the transformations, of which a single stage has none.

    Shapes:
        - **student**, **teacher** S times [B, C, h, w] with B at least 2; **output** scalar

    References:
        Liu, Cao, Li, Yuan, Hu, Li, Duan: Knowledge Distillation via Instance Relationship Graph, CVPR 2019.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"Expected equally many stages, at least one (got {len(student)} and {len(teacher)})")
    for student_map, teacher_map in zip(student, teacher, strict=True):
        check_maps(student_map, teacher_map)
        check_batch(student_map, teacher_map, at_least=2)
    with full_precision(student[0]):
        student_edges, student_moves = _irg(student)
        with torch.no_grad():
            teacher_edges, teacher_moves = _irg(teacher)
        loss = edge_weight * F.mse_loss(student_edges, teacher_edges)
        return loss + transform_weight * F.mse_loss(student_moves, teacher_moves) if len(student) > 1 else loss


def _irg(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Edges [S + 1, B, B] and transformations [S - 1, B]."""
    features = [as_float(x) for x in features]
    distances = torch.stack([relative_distances(vectors(x)) for x in (*features, pool(features[-1]))])
    moves = [_moves(x, y) for x, y in itertools.pairwise(features)]
    relative = [move / move.max() for move in moves]
    return distances / distances.amax((1, 2), keepdim=True), torch.stack(relative) if relative else distances.new_zeros(0)


def _moves(x: Tensor, y: Tensor) -> Tensor:
    size = (min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3]))
    x, y = (z if z.shape[1:] == size else F.adaptive_avg_pool3d(z.unsqueeze(1), size).squeeze(1) for z in (x, y))
    return unit_scale((x - y).square().flatten(1).sum(1)).clamp(min=1e-12)


class SPLoss(nn.Module):
    """Similarity preserving, see :func:`sp_loss`. Published with weight 3000 on the last stage.

    Args:
        gather: Compare the images of all processes instead of those of one, see :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stage"

    def __init__(self, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        return sp_loss(*(gather_images(student, teacher) if self.gather else (student, teacher)))


class RKDLoss(nn.Module):
    """Relational distillation, see :func:`rkd_distance_loss` and :func:`rkd_angle_loss`. Published with weight 1 on the last stage.

    Maps are averaged over their pixels first: the relations are those of the penultimate vectors.

    Args:
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles; 0 leaves them out.
        gather: Compare the images of all processes instead of those of one, see :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stage"

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, gather: bool = False) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight, self.gather = distance_weight, angle_weight, gather

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        student, teacher = pool(as_float(student)), pool(as_float(teacher))
        if self.gather:
            student, teacher = gather_images(student, teacher)
        loss = self.distance_weight * rkd_distance_loss(student, teacher)
        return loss + self.angle_weight * rkd_angle_loss(student, teacher) if self.angle_weight else loss

    def extra_repr(self) -> str:
        """Names the weights."""
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


class CCLoss(nn.Module):
    """Correlation congruence, see :func:`cc_loss`. Published with weight 0.02 on the last stage.

    Both networks' pooled maps go through a learned linear embedding.

    Args:
        embedding_dim: Width of the embedding.
        gather: Compare the images of all processes instead of those of one, see :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stage"

    def __init__(self, embedding_dim: int = 128, gather: bool = False) -> None:
        super().__init__()
        self.embedding_dim, self.gather = embedding_dim, gather
        self.student_embedding: nn.Module | None = None
        self.teacher_embedding: nn.Module | None = None

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the embeddings for maps of these shapes [B, C, h, w]."""
        self.student_embedding = nn.Linear(student_shape[1], self.embedding_dim)
        self.teacher_embedding = nn.Linear(teacher_shape[1], self.embedding_dim)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        if self.student_embedding is None or self.teacher_embedding is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of CCLoss")
        pairs = ((self.student_embedding, student), (self.teacher_embedding, teacher.detach()))
        embeddings = [layer(as_input(pool(as_float(features)), layer)) for layer, features in pairs]
        return cc_loss(*(gather_images(*embeddings) if self.gather else embeddings))


class PKTLoss(nn.Module):
    """Probabilistic knowledge transfer, see :func:`pkt_loss`. Published with weight 30000 on the last stage; maps are pooled first.

    Args:
        gather: Compare the images of all processes instead of those of one, see :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stage"

    def __init__(self, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        pooled = pool(as_float(student)), pool(as_float(teacher))
        return pkt_loss(*(gather_images(*pooled) if self.gather else pooled))


class ICKDLoss(nn.Module):
    """Inter-channel correlation, see :func:`ickd_loss`. Published with weight 2.5 on the last stage.

    The student's map goes through the published 1x1 convolution and batch norm to the teacher's channels, also where they agree already.
    """

    level = "stage"

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = None

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the embedding for maps of these shapes [B, C, h, w]."""
        channels = teacher_shape[1]
        self.embedding = nn.Sequential(nn.Conv2d(student_shape[1], channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        if self.embedding is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of ICKDLoss")
        return ickd_loss(self.embedding(as_input(student, self.embedding)), teacher)


class IRGLoss(nn.Module):
    """Instance relationship graphs, see :func:`irg_loss`. The paper's vertices are the logits: add :class:`LogitMSELoss` with weight 0.1.

    Args:
        edge_weight: Weight of the edges.
        transform_weight: Weight of the transformations between neighbouring stages.
        gather: Compare the images of all processes instead of those of one, see :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stages"

    def __init__(self, edge_weight: float = 5.0, transform_weight: float = 5.0, gather: bool = False) -> None:
        super().__init__()
        self.edge_weight, self.transform_weight, self.gather = edge_weight, transform_weight, gather

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of all stages, given from shallow to deep."""
        students, teachers = list(student.values()), [teacher[stage] for stage in student]
        if self.gather:
            students, teachers = gather_images(*students), gather_images(*teachers)
        return irg_loss(students, teachers, self.edge_weight, self.transform_weight)

    def extra_repr(self) -> str:
        """Names the weights."""
        return f"edge_weight={self.edge_weight}, transform_weight={self.transform_weight}"
