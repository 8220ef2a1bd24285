"""How good a classifier is, and how much of its teacher it has taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from gkd.models import read_logits
from gkd.models.modes import evaluating


class ClassifierEvaluator:
    """Top-1, top-5, loss and agreement with the teacher over one split, in percent where they are shares.

    The student is evaluated in float32 whatever it is trained in, so the numbers are those of the exported weights. Under several
    processes each sees its part of the split with the running statistics of the first, and the metrics are combined. The teacher's answers
    are kept after the first time: they never change.

    Args:
        student: The classifier; it is back in the mode it was in afterwards.
        batches: Gives the split's batches (images, targets, index), the same each time.
        num_classes: Number of classes.
        device: Where the metrics are kept.
        teacher: Gives the teacher's logits of the images; None leaves the agreement out.
        split: Name of the split, for the record.
        channels_last: Memory format of the images.

    Examples:
        >>> data = [(torch.eye(3), torch.tensor([0, 1, 0]), torch.arange(3))]
        >>> evaluate = ClassifierEvaluator(nn.Identity(), lambda: iter(data), 3, torch.device("cpu"), split="test")
        >>> round(evaluate()["top1"], 2)
        66.67
    """

    def __init__(
        self,
        student: nn.Module,
        batches: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]],
        num_classes: int,
        device: torch.device,
        teacher: Callable[[Tensor], Any] | None = None,
        split: str = "test",
        channels_last: bool = False,
    ) -> None:
        self.student, self.batches, self.num_classes, self.device = student, batches, num_classes, device
        self.teacher, self.split, self.channels_last = teacher, split, channels_last
        self._teacher_answers: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> Mapping[str, Any]:
        """Record of one evaluation: split, top1, top5, agreement (with a teacher), loss."""
        top1 = self._accuracy(1)
        top5 = self._accuracy(min(5, self.num_classes))
        agreement = self._accuracy(1)
        loss = MeanMetric().to(self.device)
        if torch.distributed.is_initialized():
            for buffer in self.student.buffers():
                torch.distributed.broadcast(buffer, src=0)
        answers = []
        with evaluating(self.student):
            for number, (images, targets, _) in enumerate(self.batches()):
                if self.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                logits = read_logits(self.student(images)).float()
                top1.update(logits, targets)
                top5.update(logits, targets)
                loss.update(F.cross_entropy(logits, targets, reduction="none"))
                if self.teacher is not None:
                    if number < len(self._teacher_answers):
                        answer = self._teacher_answers[number]
                    else:
                        answer = read_logits(self.teacher(images)).argmax(dim=1)
                        answers.append(answer)
                    agreement.update(logits, answer)
        if not self._teacher_answers:  # kept only when complete: an evaluation may be interrupted
            self._teacher_answers = answers
        record: dict[str, Any] = {"split": self.split, "top1": 100.0 * float(top1.compute()), "top5": 100.0 * float(top5.compute())}
        if self.teacher is not None:
            record["agreement"] = 100.0 * float(agreement.compute())
        record["loss"] = float(loss.compute())
        return record

    def _accuracy(self, top_k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(self.num_classes, top_k=top_k, average="micro", validate_args=False).to(self.device)
