from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gkd.tasks import ClassifierEvaluator

CPU = torch.device("cpu")


class Table(nn.Module):
    """Looks its answer up: the images are row numbers."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits), 0
        self.dropout = nn.Dropout(0.9)

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.logits[rows])


def split(targets: Tensor, size: int):
    rows = torch.arange(len(targets))
    return lambda: zip(rows.split(size), targets.split(size), rows.split(size), strict=True)


def test_hand_values():
    # Row 0 ranks the classes 0 1 2 3 4 5 6, row 1 ranks them 6 5 4 3 2 | 1 0. Target 0 is first; target 1 is not among the first five.
    scores = torch.stack([torch.arange(7.0).flip(0), torch.arange(7.0)])
    targets = torch.tensor([0, 1])
    record = ClassifierEvaluator(Table(scores), split(targets, 1), 7, CPU, split="val")()
    assert record == {"split": "val", "top1": 50.0, "top5": 50.0, "loss": pytest.approx(F.cross_entropy(scores, targets).item())}


def test_equals_a_plain_computation_for_any_batch_size():
    logits, targets = torch.randn(23, 8), torch.randint(0, 8, (23,))
    teacher = torch.randn(23, 8)
    ranks = logits.argsort(dim=1, descending=True)
    expected = {
        "top1": 100 * (ranks[:, 0] == targets).float().mean().item(),
        "top5": 100 * (ranks[:, :5] == targets[:, None]).any(1).float().mean().item(),
        "agreement": 100 * (ranks[:, 0] == teacher.argmax(1)).float().mean().item(),
        "loss": F.cross_entropy(logits, targets).item(),
    }
    for size in (1, 7, 23):
        record = ClassifierEvaluator(Table(logits), split(targets, size), 8, CPU, teacher=lambda rows: teacher[rows])()
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_fewer_than_five_classes():
    record = ClassifierEvaluator(Table(torch.eye(3)), split(torch.tensor([1, 2, 0]), 2), 3, CPU)()
    assert (record["top1"], record["top5"]) == (0.0, 100.0)


def test_modes_come_back_and_the_teacher_is_asked_once():
    student, teacher = Table(torch.eye(4)), Table(torch.eye(4)).eval()
    student.dropout.eval()  # a part that somebody froze
    evaluate = ClassifierEvaluator(student, split(torch.arange(4), 2), 4, CPU, teacher=teacher)
    first, second = evaluate(), evaluate()
    assert first == second
    assert first["agreement"] == 100.0
    assert (student.training, student.dropout.training) == (True, False)
    assert (student.calls, teacher.calls) == (4, 2)


def test_an_interrupted_evaluation_keeps_no_half_answers():
    student, teacher = Table(torch.eye(4)), Table(torch.eye(4)).eval()
    broken = []

    def batches():
        for number, batch in enumerate(split(torch.arange(4), 2)()):
            if number == 1 and not broken:
                broken.append(True)
                raise KeyboardInterrupt
            yield batch

    evaluate = ClassifierEvaluator(student, batches, 4, CPU, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert student.training
    assert evaluate()["agreement"] == 100.0
