from __future__ import annotations

import math

import pytest
import torch

from gkd.losses import RLDLoss, rld_loss


@pytest.fixture
def batch():
    """Teachers that are right, that are wrong, and that rank the true class last."""
    student = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = torch.tensor([[3.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.5, 0.0], [0.0, 2.0, 2.0, 1.0]], dtype=torch.float64)
    return student, teacher, torch.tensor([0, 1, 3, 2])


def slow_rld(student, teacher, target, alpha=1.0, beta=8.0, temperature=4.0, confidence_temperature=1.0):
    """Image by image, with probabilities instead of their logarithms."""
    total = 0.0
    for s, t, y in zip(student, teacher, target.tolist(), strict=True):
        p, q = ((z / confidence_temperature).exp() for z in (t, s))
        p, q = (p / p.sum()).max(), (q / q.sum())[y]
        total += alpha * confidence_temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        below = [k for k in range(len(t)) if t[k] < t[y]]
        if below:
            p, q = ((z[below] / temperature).exp() for z in (t, s))
            p, q = p / p.sum(), q / q.sum()
            total += beta * temperature**2 * (p * (p / q).log()).sum()
    return total / len(student)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2.0, "temperature": 3.0, "confidence_temperature": 2.0}])
def test_value_and_gradient_agree_with_loops(batch, options):
    student, teacher, target = batch
    student.requires_grad_()
    loss, expected = rld_loss(student, teacher, target, **options), slow_rld(student, teacher, target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    (gradient,), (slow,) = (torch.autograd.grad(x, student) for x in (loss, expected))
    torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


def test_a_class_that_the_teacher_ranks_above_the_true_one_does_not_count():
    # True class 1; the teacher prefers 0. Among the classes below, 2 and 3, the student agrees. Confidence: student 1/2, teacher 1/2.
    teacher = torch.tensor([[math.log(6.0), math.log(3.0), math.log(2.0), 0.0]])
    student = torch.tensor([[0.0, math.log(4.0), math.log(2.0), 0.0]])
    assert RLDLoss()(student, teacher, torch.tensor([1])).item() == pytest.approx(0, abs=1e-6)
    assert RLDLoss()(student, teacher, torch.tensor([0])).item() > 0.1


def test_zero_at_a_teacher_that_is_right_and_no_gradient_to_it(batch):
    student, teacher = batch[0].requires_grad_(), batch[1].requires_grad_()
    assert rld_loss(teacher, teacher, teacher.argmax(1)).item() == pytest.approx(0, abs=1e-9)
    RLDLoss()(student, teacher, batch[2]).backward()
    assert teacher.grad is None
    torch.testing.assert_close(rld_loss(student + 7, teacher - 3, batch[2]), rld_loss(student, teacher, batch[2]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["constant", "ordinary", "saturated"])
def test_finite(batch, scale):
    student, teacher = (x.float() * scale for x in batch[:2])
    loss = RLDLoss()(student.requires_grad_(), teacher, batch[2])
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_errors(batch):
    student, teacher, target = batch
    with pytest.raises(ValueError, match="RLD needs the true class of every image"):
        rld_loss(student, teacher, target[:2])
    with pytest.raises(ValueError, match="RLD needs the true class of every image"):
        RLDLoss()(student, teacher)
    with pytest.raises(ValueError, match=r"Expected a temperature above 0 \(got 0\.0\)"):
        rld_loss(student, teacher, target, confidence_temperature=0.0)
