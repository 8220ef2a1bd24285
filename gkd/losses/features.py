from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import unit_rows
from gkd.losses.inputs import as_input, check_maps, check_same_shape, gram, in_full_precision, match_size, sum_of_squares

__all__ = [
    "ATLoss",
    "FitNetLoss",
    "NSTLoss",
    "OFDLoss",
    "VIDLoss",
    "at_loss",
    "fitnet_loss",
    "nst_loss",
    "ofd_loss",
    "ofd_margin",
    "vid_loss",
]


@in_full_precision
def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Asks the student's map to be the teacher's: the mean squared difference.

    .. math:: \frac{1}{B C h w} \| F^s - F^t \|^2

    Shapes:
        - **student**, **teacher** [B, C, h, w]; **output** scalar

    Raises:
        ValueError: If the shapes differ: the student's map must have gone through an adapter first.

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    return F.mse_loss(student, teacher.detach())


def at_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    r"""Compares where the two networks respond: attention maps of unit length.

    .. math:: \frac{1}{B h w} \sum_b \Big\| \frac{Q^s_b}{\|Q^s_b\|} - \frac{Q^t_b}{\|Q^t_b\|} \Big\|^2, \quad Q_b = \sum_c |F_{bc}|^p

    Scale, sign, number and order of channels do not matter; the larger map is pooled to the size of the smaller one. The cheapest
    possible are the two sums of squares forward and one product of the student's map backward, next to which the rest vanishes.

    Args:
        student: Feature map.
        teacher: Feature map; gets no gradient.
        power: p; large powers look at the peaks only.

    Shapes:
        - **student** [B, C, h, w], **teacher** [B, D, h', w']; **output** scalar

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017.
    """
    check_maps(student, teacher)
    student, teacher = match_size(student, teacher.detach())
    with full_precision(student):
        return F.mse_loss(_attention(student, power), _attention(teacher, power))


def _attention(features: Tensor, power: float) -> Tensor:
    powers = sum_of_squares(features) if power == 2 else as_float(features).abs().pow(power).sum(1)
    return unit_rows(powers.flatten(1) / features.shape[1])


@in_full_precision
def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the distributions of the channels' activation patterns by maximum mean discrepancy with the kernel :math:`(x^\top y)^2`.

    .. math:: \frac1B \sum_b \Big\| \tfrac1C \hat F_s^\top \hat F_s - \tfrac1D \hat F_t^\top \hat F_t \Big\|_F^2

    with :math:`\hat F` [C, hw] whose rows are channels of unit length. This is the published
    :math:`\overline{k(s,s)} + \overline{k(t,t)} - 2\overline{k(s,t)}` written as one square: the feature space of the kernel are the
    products of two pixels. Where a map has many pixels and few channels the kernel itself is cheaper and is used.
    Number, order, scale and sign of the channels do not matter; the larger map is pooled to the size of the smaller one.

    Shapes:
        - **student** [B, C, h, w], **teacher** [B, D, h', w']; **output** scalar

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv 1707.01219.
    """
    check_maps(student, teacher)
    student, teacher = match_size(student, teacher.detach())
    student, teacher = unit_rows(student.flatten(2)), unit_rows(teacher.flatten(2))
    c, d, pixels = student.shape[1], teacher.shape[1], student.shape[2]
    if pixels * (c + d) <= c * c + c * d + d * d:
        difference = gram(student.mT) / c - gram(teacher.mT) / d
        return difference.square().sum() / len(student)
    return gram(student).square().mean() + gram(teacher).square().mean() - 2 * (student @ teacher.mT).square().mean()


@in_full_precision
def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's map under a Gaussian with one variance for each channel, without :math:`\log 2\pi`.

    .. math:: \frac{1}{B D h w} \sum \frac12 \left( \frac{(F^t - \mu)^2}{\sigma_c^2} + \log \sigma_c^2 \right)

    Its minimum is half the mean log-variance, reached at mean = teacher.

    Args:
        mean: What the student predicts.
        teacher: What is predicted; gets no gradient.
        variance: Of every channel, positive.

    Shapes:
        - **mean**, **teacher** [B, D, h, w], **variance** [D]; **output** scalar

    References:
        Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, CVPR 2019.
    """
    check_maps(mean, teacher)
    check_same_shape(mean, teacher)
    variance = variance.view(1, -1, 1, 1)
    return 0.5 * ((mean - teacher.detach()).square() / variance + variance.log()).mean()


@in_full_precision
def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    r"""Asks the student to respond where the teacher does, and not to respond where it does not.

    .. math:: \frac1B \sum \big( F^s - \max(F^t, m_c) \big)^2 \,\big[\, F^t > 0 \;\text{or}\; F^s > \max(F^t, m_c) \,\big]

    The published sum over channels and pixels, mean over images.

    Args:
        student: Map before the activation, of the teacher's channels.
        teacher: Map before the activation; pooled to the student's size, gets no gradient.
        margin: What counts as no response in a channel: the mean of its negative values. Not positive.

    Shapes:
        - **student** [B, D, h, w], **teacher** [B, D, h', w'], **margin** [D]; **output** scalar

    References:
        Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, ICCV 2019.
    """
    check_maps(student, teacher)
    teacher = teacher.detach()
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    check_same_shape(student, teacher)
    wanted = torch.maximum(teacher, margin.detach().view(1, -1, 1, 1))
    counts = (teacher > 0) | (student > wanted)
    return ((student - wanted).square() * counts).sum() / len(student)


def ofd_margin(mean: Tensor, std: Tensor) -> Tensor:
    r"""Mean of the negative values of a Gaussian: the margin of channels that leave a batch norm with bias `mean` and weight `std`.

    .. math:: E[x \mid x < 0] = \mu - |\sigma| \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / |\sigma|)}

    As published, a channel that is negative with a probability below 0.001 gets :math:`-3 |\sigma|`.

    Shapes:
        - **mean**, **std** [C]; **output** [C]

    Examples:
        >>> ofd_margin(torch.tensor([0.0]), torch.tensor([1.0]))  # half a Gaussian: -sqrt(2 / pi)
        tensor([-0.7979])
    """
    if mean.shape != std.shape or mean.dim() != 1:
        raise ValueError(f"Expected mean and std [C] (got {tuple(mean.shape)} and {tuple(std.shape)})")
    mean, std = mean.detach().double(), std.detach().double().abs()
    ratio = mean / std
    log_density = -0.5 * ratio.square() - 0.5 * math.log(2 * math.pi)
    tail = torch.special.log_ndtr(-ratio)
    margin = torch.where(tail > math.log(1e-3), mean - std * (log_density - tail).exp(), -3 * std)
    return torch.where(std > 0, margin, mean.clamp(max=0)).float()


class FitNetLoss(nn.Module):
    """Hint learning, see :func:`fitnet_loss`. Published with weight 100 on one middle stage.

    The student's map arrives through the adapter of the Distiller (1x1 convolution and norm); the published regressor ends with a ReLU too.
    """

    level = "stage"
    matched_channels = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        return fitnet_loss(student, teacher)


class ATLoss(nn.Module):
    """Attention transfer, see :func:`at_loss`. Published with weight 1000 on every stage."""

    level = "stage"

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        if not power >= 1:
            raise ValueError(f"Expected a power of at least 1 (got {power})")
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        return at_loss(student, teacher, self.power)


class NSTLoss(nn.Module):
    """Neuron selectivity transfer, see :func:`nst_loss`. Published with weight 50 on every stage."""

    level = "stage"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        return nst_loss(student, teacher)


class VIDLoss(nn.Module):
    """Variational information distillation, see :func:`vid_loss`. Published with weight 1 on every stage.

    Three 1x1 convolutions predict the teacher's map from the student's; the variance of every channel is learned beside them.

    Args:
        initial_variance: Of every channel, above eps.
        eps: Smallest variance.
    """

    level = "stage"

    def __init__(self, initial_variance: float = 5.0, eps: float = 1e-5) -> None:
        super().__init__()
        if not initial_variance > eps > 0:
            raise ValueError(f"Expected initial_variance above eps above 0 (got {initial_variance} and {eps})")
        self.initial_variance, self.eps = initial_variance, eps
        self.regressor: nn.Module | None = None
        self.register_parameter("log_scale", None)

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the regressor for maps of these shapes [B, C, h, w]."""
        c, d = student_shape[1], teacher_shape[1]
        first, second, third = (nn.Conv2d(channels, d, 1, bias=False) for channels in (c, d, d))
        self.regressor = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.log_scale = nn.Parameter(torch.full((d,), math.log(math.expm1(self.initial_variance - self.eps))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        if self.regressor is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of VIDLoss")
        check_maps(student, teacher)
        student, teacher = match_size(student, teacher)
        return vid_loss(self.regressor(as_input(student, self.regressor)), teacher, F.softplus(self.log_scale) + self.eps)


class OFDLoss(nn.Module):
    r"""Overhaul of feature distillation, see :func:`ofd_loss`. Published with weight 0.001.

    Every stage has a 1x1 convolution and batch norm from student to teacher channels; a stage counts half as much as the next deeper one.
    Tap the maps *before* their activation where the networks offer it. On maps after a ReLU the margin is 0, and what is left is the
    partial distance: the student is asked for the teacher's responses, and for none where there are none.

    The margin of a channel is the mean of its negative values. Published code reads it off the teacher's last batch norm; given here as
    `margins` (see :func:`ofd_margin`), or else measured while training as a running mean over the batches, which needs no particular layer.

    Args:
        margins: A margin [D] for each stage name; stages that are missing are measured.
        momentum: Weight of the newest batch in the running means.
    """

    level = "stages"

    def __init__(self, margins: Mapping[str, Tensor] | None = None, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"Expected a momentum in (0, 1] (got {momentum})")
        self.momentum = momentum
        self.given = {stage: margin.detach() for stage, margin in (margins or {}).items()}
        self.connectors = nn.ModuleList()
        self.stages: list[str] = []

    def build(self, student_shapes: Mapping[str, torch.Size], teacher_shapes: Mapping[str, torch.Size]) -> None:
        """Creates a connector for every stage of these shapes [B, C, h, w]."""
        if unknown := [stage for stage in self.given if stage not in teacher_shapes]:
            raise ValueError(f"Expected margins for stages among {list(teacher_shapes)} (got {unknown})")
        self.stages = list(teacher_shapes)
        self.connectors = nn.ModuleList()
        for i, (stage, shape) in enumerate(teacher_shapes.items()):
            d = shape[1]
            convolution = nn.Conv2d(student_shapes[stage][1], d, 1, bias=False)
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / d))
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(d)))
            margin = self.given.get(stage)
            if margin is not None and margin.shape != (d,):
                raise ValueError(f"Expected a margin [{d}] for '{stage}' (got {tuple(margin.shape)})")
            # Sum and share of negative values: their ratio is the margin, and a zero start needs no correction.
            self.register_buffer(f"negative_sum_{i}", torch.zeros(d) if margin is None else margin.float().clone())
            self.register_buffer(f"negative_share_{i}", torch.zeros(d) if margin is None else torch.ones(d))

    @torch.no_grad()
    def _margin(self, i: int, teacher: Tensor) -> Tensor:
        total, share = self.get_buffer(f"negative_sum_{i}"), self.get_buffer(f"negative_share_{i}")
        if self.training and self.stages[i] not in self.given:
            total.lerp_(as_float(teacher).clamp(max=0).mean((0, 2, 3)).to(total.dtype), self.momentum)
            share.lerp_((teacher < 0).to(share.dtype).mean((0, 2, 3)), self.momentum)
        return total / share.clamp(min=torch.finfo(share.dtype).tiny)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of all stages, given from shallow to deep."""
        if not self.stages:
            raise RuntimeError("Expected build(student_shapes, teacher_shapes) before the first forward of OFDLoss")
        losses = []
        for i, (stage, connector) in enumerate(zip(self.stages, self.connectors, strict=True)):
            loss = ofd_loss(connector(as_input(student[stage], connector)), teacher[stage], self._margin(i, teacher[stage]))
            losses.append(loss / 2 ** (len(self.stages) - 1 - i))
        return torch.stack(losses).sum()
