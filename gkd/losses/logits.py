from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd.losses.inputs import check_same_shape, in_full_precision, sigmoid_divergence

__all__ = [
    "DISTLoss",
    "DKDLoss",
    "KDLoss",
    "LogitMSELoss",
    "SigmoidKDLoss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "logit_mse_loss",
    "sigmoid_kd_loss",
]


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Asks for logits of equal shapes."""
    if student_logits.dim() != 2:
        raise ValueError(f"Expected logits [B, K] (got {tuple(student_logits.shape)})")
    check_same_shape(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")


def check_classes(student_logits: Tensor, target: Tensor | None = None) -> None:
    """Asks for classes of which an image has one: their probabilities come from a softmax."""
    hint = "for one logit, or for several labels of an image, take SigmoidKDLoss"
    if student_logits.shape[1] < 2:
        raise ValueError(f"Expected logits of at least 2 classes (got {tuple(student_logits.shape)}): {hint}")
    if target is None or target.shape != student_logits.shape or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not (target.sum(1, dtype=torch.float64) - 1).abs().lt(1e-2).all():
        raise ValueError(f"Expected one class of every image, or probabilities that add up to 1 (got labels {tuple(target.shape)}): {hint}")


def check_target(target: Tensor | None, batch: int, method: str) -> None:
    """Asks for the true class of every image."""
    if target is None or target.shape != (batch,) or target.is_floating_point():
        got = None if target is None else f"{tuple(target.shape)} {target.dtype}"
        raise ValueError(
            f"Expected target classes [{batch}] of an integer type (got {got}): {method} needs the true class of every image; "
            "for several labels of an image, take SigmoidKDLoss"
        )


def kl_divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities, summed over classes and averaged over the batch (0 for an empty one)."""
    return (teacher_log.exp() * (teacher_log - student_log)).sum() / max(student_log.shape[0], 1)


@in_full_precision
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Compares softened class probabilities by their Kullback-Leibler divergence.

    .. math:: \frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^t_b / T) \,\|\, \sigma(z^s_b / T)\big)

    A constant added to all logits of an image changes nothing.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        temperature: Softens both distributions; its square keeps the gradient's scale.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2; **output** scalar

    Raises:
        ValueError: If the shapes differ or are not [B, K] with K at least 2, or the temperature is not positive.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kd_loss(logits, logits + 5.0).abs().item() < 1e-6
        True
    """
    check_logits(student_logits, teacher_logits, temperature)
    check_classes(student_logits)
    student_log, teacher_log = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits.detach()))
    return kl_divergence(student_log, teacher_log) * temperature**2


@in_full_precision
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Splits the divergence of KD into the target class against the rest, and the classes of the rest among themselves.

    .. math:: T^2 \left( \alpha\, \mathrm{KL}\big([p^t_y, 1 - p^t_y] \,\|\, [p^s_y, 1 - p^s_y]\big)
              + \beta\, \mathrm{KL}\big(\hat p^t \,\|\, \hat p^s\big) \right)

    averaged over the batch, where :math:`\hat p` is the softmax without the target class. Everything stays in the log domain
    and the target's column is left out rather than pushed down by a large constant, so that a teacher who is sure causes no
    :math:`\log 0`. A constant added to all logits of an image changes nothing.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        target: True class of every image.
        alpha: Weight of target against rest.
        beta: Weight of the rest among themselves.
        temperature: Softens all distributions.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K] with K at least 2, **target** [B] long; **output** scalar

    Raises:
        ValueError: If the shapes are others.

    References:
        Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022.
    """
    check_logits(student_logits, teacher_logits, temperature)
    batch, classes = student_logits.shape
    check_classes(student_logits)
    check_target(target, batch, "DKD")
    true = target.long().unsqueeze(1)
    rest = torch.arange(classes - 1, device=true.device).expand(batch, -1)
    rest = rest + (rest >= true)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits / temperature
        remaining = logits.gather(1, rest)
        binary = torch.cat([logits.gather(1, true), remaining.logsumexp(1, keepdim=True)], 1)
        return binary.log_softmax(1), remaining.log_softmax(1)

    student_binary, student_rest = split(student_logits)
    teacher_binary, teacher_rest = split(teacher_logits.detach())
    loss = alpha * kl_divergence(student_binary, teacher_binary) + beta * kl_divergence(student_rest, teacher_rest)
    return loss * temperature**2


def _pearson(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """Mean over all lines along `dim` of the correlation coefficient; a constant line counts as uncorrelated."""
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    lengths = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return ((x * y).sum(dim) / (lengths + eps)).mean()


@in_full_precision
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    r"""Asks for correlated, rather than equal, probabilities: within every image and within every class.

    .. math:: T^2 \left( \beta \big(1 - \tfrac1B \sum_b \rho(Y^s_{b:}, Y^t_{b:})\big)
              + \gamma \big(1 - \tfrac1K \sum_k \rho(Y^s_{:k}, Y^t_{:k})\big) \right), \quad Y = \sigma(z / T)

    with Pearson's :math:`\rho`. As published, `eps` is added to the product of the two lengths, so classes that are nearly constant
    over the batch count less than one and the loss at student = teacher is small but not exactly 0.

    Args:
        student_logits: Scores before the softmax.
        teacher_logits: Likewise; gets no gradient.
        beta: Weight of the relation between classes (rows).
        gamma: Weight of the relation between images (columns).
        temperature: Softens both distributions.
        eps: Added to the denominator of the correlation.

    Shapes:
        - **student_logits**, **teacher_logits** [B, K], both at least 2; **output** scalar

    Raises:
        ValueError: If the shapes are others: neither one image nor one class has a correlation.

    References:
        Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """
    check_logits(student_logits, teacher_logits, temperature)
    check_classes(student_logits)
    if student_logits.shape[0] < 2:
        raise ValueError(f"Expected at least 2 images (got {tuple(student_logits.shape)})")
    student, teacher = ((z / temperature).softmax(1) for z in (student_logits, teacher_logits.detach()))
    between_classes = 1 - _pearson(student, teacher, 1, eps)
    between_images = 1 - _pearson(student, teacher, 0, eps)
    return (beta * between_classes + gamma * between_images) * temperature**2


@in_full_precision
def sigmoid_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    ignore_label: float | None = None,
) -> Tensor:
    r"""Compares the chances that labels apply, one by one: for several labels of an image, or for one logit of two classes.

    .. math:: \frac{T^2}{|M|} \sum_{(b, k) \in M} \mathrm{KL}\big(p^t_{bk} \,\|\, p^s_{bk}\big), \quad p = \sigma(z / T)

    with the logistic function :math:`\sigma` and two outcomes for each label, over all labels M that are not ignored. The mean over the
    labels is that of :class:`torch.nn.BCEWithLogitsLoss`, beside which it stands.

    Args:
        student_logits: Scores before the logistic function.
        teacher_logits: Likewise; gets no gradient.
        target: Labels, to find those to ignore; None if there are none.
        temperature: Softens both chances; its square keeps the gradient's scale.
        ignore_label: Value in ``target`` of a label that is not known, such as -1; None if all are.

    Shapes:
        - **student_logits**, **teacher_logits**, **target** [B, K], or [B] for one logit; **output** scalar, 0 if all labels are ignored

    Raises:
        ValueError: If the shapes differ, or the temperature is not positive.

    Examples:
        >>> sigmoid_kd_loss(torch.zeros(1, 2), torch.tensor([[0.0, 20.0]]))  # log 2 for the second label, 0 for the first
        tensor(0.3466)
    """
    if student_logits.dim() not in (1, 2):
        raise ValueError(f"Expected logits [B, K] or [B] (got {tuple(student_logits.shape)})")
    check_same_shape(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")
    divergence = sigmoid_divergence(student_logits / temperature, teacher_logits.detach() / temperature) * temperature**2
    if ignore_label is None:
        return divergence.sum() / max(divergence.numel(), 1)
    if target is None or target.numel() != divergence.numel():
        got = None if target is None else tuple(target.shape)
        raise ValueError(f"Expected labels {tuple(student_logits.shape)} with ignore_label={ignore_label} (got {got})")
    counts = target.view_as(divergence) != ignore_label
    return divergence.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


@in_full_precision
def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Asks for the teacher's logits themselves: the mean squared difference.

    .. math:: \frac{1}{B K} \| z^s - z^t \|^2

    Shapes:
        - **student_logits**, **teacher_logits** [B, K]; **output** scalar

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014.
    """
    check_logits(student_logits, teacher_logits, 1.0)
    return (student_logits - teacher_logits.detach()).square().sum() / max(student_logits.numel(), 1)


class KDLoss(nn.Module):
    """Classical distillation, see :func:`kd_loss`. Published with 0.1 x cross-entropy and weight 0.9."""

    level = "logits"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target is only looked at, to refuse several labels of an image."""
        check_classes(student_logits, target)
        return kd_loss(student_logits, teacher_logits, self.temperature)

    def extra_repr(self) -> str:
        """Names the temperature."""
        return f"temperature={self.temperature}"


class DKDLoss(nn.Module):
    """Decoupled distillation, see :func:`dkd_loss`. Published with weight 1 and 20 epochs of ramp."""

    level = "logits"

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target must be given."""
        if target is None:
            raise ValueError("Expected target classes [B] (got None): DKD needs the true class of every image")
        return dkd_loss(student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature)

    def extra_repr(self) -> str:
        """Names the weights and the temperature."""
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"


class DISTLoss(nn.Module):
    """Correlation of probabilities, see :func:`dist_loss`. Published on CIFAR-100 with temperature 4 and weight 2."""

    level = "logits"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target is only looked at, to refuse several labels of an image."""
        check_classes(student_logits, target)
        return dist_loss(student_logits, teacher_logits, self.beta, self.gamma, self.temperature)

    def extra_repr(self) -> str:
        """Names the weights and the temperature."""
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"


class SigmoidKDLoss(nn.Module):
    """Distillation of labels that are no alternatives, and of one logit, see :func:`sigmoid_kd_loss`."""

    level = "logits"

    def __init__(self, temperature: float = 1.0, ignore_label: float | None = None) -> None:
        super().__init__()
        self.temperature, self.ignore_label = temperature, ignore_label

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target says which labels are ignored."""
        return sigmoid_kd_loss(student_logits, teacher_logits, target, self.temperature, self.ignore_label)

    def extra_repr(self) -> str:
        """Names the temperature."""
        return f"temperature={self.temperature}, ignore_label={self.ignore_label}"


class LogitMSELoss(nn.Module):
    """Regression of logits, see :func:`logit_mse_loss`; also the vertices of IRG."""

    level = "logits"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Returns the loss; target is not used."""
        return logit_mse_loss(student_logits, teacher_logits)
