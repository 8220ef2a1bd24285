from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gkd.losses.features import FitNetLoss
from gkd.losses.logits import (
    DISTLoss,
    DKDLoss,
    KDLoss,
    LogitMSELoss,
    SigmoidKDLoss,
    dist_loss,
    dkd_loss,
    kd_loss,
    sigmoid_kd_loss,
)
from gkd.losses.standardized import StandardizedLogits, standardize_logits

LOSSES = [KDLoss(), LogitMSELoss(), DKDLoss(), DISTLoss(), StandardizedLogits(KDLoss(2.0)), StandardizedLogits(DKDLoss(temperature=2.0))]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.tensor([0, 4, 2, 2, 1, 3])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def test_kd_by_hand():
    # T = 1; teacher (1/2, 1/2), student (3/4, 1/4): KL = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3)
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert kd_loss(student, teacher, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


def test_kd_agrees_with_loops(batch):
    student, teacher, _ = batch
    expected = np.mean([divergence(softmax(t / 3), softmax(s / 3)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]) * 9
    assert kd_loss(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-9)


def test_dkd_agrees_with_loops(batch):
    student, teacher, target = batch
    expected = 0.0
    for s, t, y in zip(student.numpy() / 4, teacher.numpy() / 4, target.tolist(), strict=True):
        p, q = softmax(t), softmax(s)
        expected += 1.5 * divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        expected += 6.0 * divergence(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y]))
    assert dkd_loss(student, teacher, target, 1.5, 6.0, 4.0).item() == pytest.approx(expected * 16 / 6, rel=1e-9)


def test_dkd_recombines_to_kd(batch):
    # KD = TCKD + (1 - p_y) NCKD per image, so with one image alpha = 1 and beta = 1 - p_y give KD itself
    student, teacher, target = (x[:1] for x in batch)
    rest = 1 - (teacher / 4).softmax(1)[0, target].item()
    torch.testing.assert_close(dkd_loss(student, teacher, target, 1.0, rest, 4.0), kd_loss(student, teacher, 4.0))


def test_dist_agrees_with_numpy(batch):
    student, teacher, _ = batch
    p, q = ((z / 2).softmax(1).numpy() for z in (student, teacher))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = 4 * (2 * (1 - rows) + 3 * (1 - columns))
    assert dist_loss(student, teacher, 2.0, 3.0, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_logit_mse_by_hand():
    assert LogitMSELoss()(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == 2.5  # (1 + 4) / 2


def test_standardize_agrees_with_numpy(batch):
    student = batch[0].numpy()
    expected = (student - student.mean(1, keepdims=True)) / (student.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardize_logits(batch[0]).numpy(), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_zero_at_teacher_and_gradient_to_student_only(loss, batch):
    student, teacher, target = batch
    # DIST's published eps keeps it a little above 0
    assert loss(student, student, target).abs().item() < (1e-4 if isinstance(loss, DISTLoss) else 1e-6)
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(student, teacher, target).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradcheck(loss, batch):
    student, teacher, target = batch
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student.clone().requires_grad_())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_shift_changes_nothing_and_scale_does_unless_standardized(loss, batch):
    student, teacher, target = batch
    value = loss(student, teacher, target)
    shifted = torch.isclose(loss(student + 7, teacher - 3, target), value).item()
    assert shifted == (not isinstance(loss, LogitMSELoss))
    scaled = loss(student, 5 * teacher, target)
    assert torch.isclose(scaled, value).item() == isinstance(loss, StandardizedLogits)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["constant", "ordinary", "saturated"])
def test_finite(loss, batch, scale):
    student, teacher, target = batch[0].float() * scale, batch[1].float() * scale, batch[2]
    student.requires_grad_()
    value = loss(student, teacher, target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_float32_under_autocast(loss, batch):
    student, teacher, target = batch[0].float(), batch[1].float(), batch[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, target)
        half = loss(student.bfloat16(), teacher.bfloat16(), target)
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher, target), rtol=0, atol=0)


@pytest.mark.parametrize("loss", [KDLoss(), LogitMSELoss(), DKDLoss()], ids=repr)
def test_empty_and_single_batches(loss, batch):
    student, teacher, target = batch
    empty = student[:0].clone().requires_grad_()
    value = loss(empty, teacher[:0], target[:0])
    value.backward()
    assert value.item() == 0
    singles = torch.stack([loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss(student, teacher, target), singles.mean())


def test_errors(batch):
    student, teacher, target = batch
    with pytest.raises(ValueError, match=r"Expected one shape .* \(got \(6, 5\) and \(6, 4\)\)"):
        kd_loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match=r"Expected logits \[B, K\]"):
        kd_loss(student[0], teacher[0])
    with pytest.raises(ValueError, match="Expected a temperature above 0"):
        kd_loss(student, teacher, 0.0)
    with pytest.raises(ValueError, match="Expected target classes"):
        DKDLoss()(student, teacher)
    with pytest.raises(ValueError, match="integer type"):
        dkd_loss(student, teacher, F.one_hot(target, 5).double())
    with pytest.raises(ValueError, match="at least 2 images"):
        dist_loss(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="at least 2 classes"):
        dkd_loss(student[:, :1], teacher[:, :1], torch.zeros(6, dtype=torch.long))
    with pytest.raises(TypeError, match="level 'logits'"):
        StandardizedLogits(FitNetLoss())


@pytest.mark.parametrize("loss", [KDLoss(), DKDLoss(), DISTLoss()])
def test_one_logit_and_several_labels_are_for_the_sigmoid_form(loss):
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"at least 2 classes \(got \(4, 1\)\): .*take SigmoidKDLoss"):
        loss(student[:, :1], teacher[:, :1], torch.zeros(4, dtype=torch.long))
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    for target in (labels, labels.long(), labels.bool()):
        with pytest.raises(ValueError, match="take SigmoidKDLoss"):
            loss(student, teacher, target)


@pytest.mark.parametrize("loss", [KDLoss(), DISTLoss()])
def test_mixed_labels_are_no_several_labels(loss):
    student, teacher, target = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    assert loss(student, teacher, target) == loss(student, teacher)


class TestSigmoidKD:
    def test_by_hand(self):
        # student 0 has the chance 1/2, teacher log 3 the chance 3/4: 3/4 log(3/2) + 1/4 log(1/2)
        expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        assert sigmoid_kd_loss(torch.zeros(1, 1), torch.tensor([[math.log(3.0)]])).item() == pytest.approx(expected, rel=1e-5)

    def test_one_logit_is_the_softmax_over_two_classes(self):
        student, teacher = (torch.randn(6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
        pairs = [torch.cat([z, torch.zeros_like(z)], 1) for z in (student, teacher)]
        torch.testing.assert_close(sigmoid_kd_loss(student, teacher, temperature=3.0), kd_loss(*pairs, temperature=3.0))
        torch.testing.assert_close(sigmoid_kd_loss(student[:, 0], teacher[:, 0]), sigmoid_kd_loss(student, teacher))

    def test_agrees_with_loops(self, batch):
        student, teacher, _ = batch
        p, q = (1 / (1 + np.exp(-z.numpy() / 2)) for z in (teacher, student))
        expected = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) * 4
        assert SigmoidKDLoss(2.0)(student, teacher).item() == pytest.approx(expected, rel=1e-9)

    def test_a_shift_of_all_logits_counts(self, batch):
        teacher = batch[1]
        assert sigmoid_kd_loss(teacher, teacher).item() == 0
        assert sigmoid_kd_loss(teacher + 1, teacher).item() > 0.01
        assert kd_loss(teacher + 1, teacher).item() == pytest.approx(0, abs=1e-9)

    def test_ignored_labels(self, batch):
        student, teacher, _ = batch
        target = torch.zeros(6, 5)
        target[0], target[3, 2] = -1, -1
        counts = target != -1
        expected = sigmoid_kd_loss(student[counts], teacher[counts])
        student.requires_grad_()
        value = SigmoidKDLoss(ignore_label=-1)(student, teacher, target)
        value.backward()
        torch.testing.assert_close(value, expected)
        assert not student.grad[~counts].any()
        assert SigmoidKDLoss(ignore_label=-1)(student, teacher, torch.full((6, 5), -1.0)).item() == 0
        with pytest.raises(ValueError, match=r"Expected labels \(6, 5\) with ignore_label=-1 \(got None\)"):
            SigmoidKDLoss(ignore_label=-1)(student, teacher)

    def test_gradient_and_sure_teachers(self, batch):
        student, teacher, _ = batch
        torch.autograd.gradcheck(lambda z: sigmoid_kd_loss(z, teacher, temperature=2.0), student.requires_grad_())
        sure = torch.tensor([[1e4, -1e4]], requires_grad=True)
        sigmoid_kd_loss(-sure, sure).backward()
        assert sure.grad.isfinite().all()

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"Expected logits \[B, K\] or \[B\]"):
            sigmoid_kd_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
        with pytest.raises(ValueError, match="Expected a temperature above 0"):
            sigmoid_kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
