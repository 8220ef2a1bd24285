"""Mixed training images: a batch and its classes are blended once, and student and teacher see the same mixture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gkd.data.classification import Batch
from gkd.data.epochs import MIX, generator, mix, seeded


class Mix:
    r"""Mixup and CutMix, by torchvision, on batches of images with a class each.

    With a share :math:`\lambda` drawn from a Beta distribution for each step, an image becomes :math:`\lambda x_i + (1 - \lambda) x_{i-1}`
    (mixup), or gets a rectangle of its neighbour's (CutMix); its target becomes the same mixture of both classes, [B, K]. The task's
    cross-entropy takes such targets; terms that ask for one class, such as DKD, get the larger share; logged accuracies count it as right.

    The draws follow from (seed, epoch, step) alone. Each of several processes mixes its own images.

    Args:
        mixup: Both parameters of the Beta distribution of mixup. 0: no mixup.
        cutmix: The same of CutMix. Where both are given, each step takes one of them, with equal probability.

    Raises:
        ValueError: If both are 0, or one is negative.

    References:
        Zhang, Cisse, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018.
        Yun et al.: CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019.
        Beyer et al.: Knowledge Distillation: A Good Teacher Is Patient and Consistent, CVPR 2022.

    Examples:
        >>> images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
        >>> mixed, shares = Mix(mixup=0.2)(images, targets, num_classes=3, seed=0)
        >>> mixed.shape, shares.sum(dim=1)
        (torch.Size([2, 3, 4, 4]), tensor([1., 1.]))
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        if not (mixup >= 0 and cutmix >= 0 and mixup + cutmix > 0):
            raise ValueError(f"Expected mixup and cutmix of at least 0, and not both 0 (got {mixup} and {cutmix})")
        self.mixup, self.cutmix = float(mixup), float(cutmix)

    def __call__(self, images: Tensor, targets: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mixes a batch.

        Shapes:
            - **images** [B, C, H, W], **targets** [B] long; **output** [B, C, H, W] and [B, num_classes] float
        """
        from torchvision.transforms import v2

        kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)) if alpha]
        chosen = int(torch.randint(len(kinds), (), generator=generator(seed)))
        with seeded(seed):
            mixed, shares = kinds[chosen](images, targets)
        return mixed, shares

    def batches(self, batches: Iterable[Batch], num_classes: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Mixes the batches of an epoch from step `start` on."""
        for step, (images, targets, index) in enumerate(batches, start=start):
            mixed, shares = self(images, targets, num_classes, mix(seed, epoch, MIX, step))
            yield mixed, shares, index

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mixup={self.mixup}, cutmix={self.cutmix})"
