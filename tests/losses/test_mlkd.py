from __future__ import annotations

import pytest
import torch

from gkd.distill import Distiller
from gkd.errors import UserError
from gkd.losses import KDLoss, LDLoss, MLKDLoss, StandardizedLogits, mlkd_loss, standardize_logits

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]


def slow_parts(student, teacher, temperatures=TEMPERATURES):
    """Image by image and pair by pair."""
    losses = {"instance": 0.0, "batch": 0.0, "class": 0.0}
    images, classes = student.shape
    for temperature in temperatures:
        p = torch.stack([z.exp() / z.exp().sum() for z in student / temperature])
        q = torch.stack([z.exp() / z.exp().sum() for z in teacher / temperature])
        for i in range(images):
            losses["instance"] += temperature**2 * sum(q[i, k] * (q[i, k].log() - p[i, k].log()) for k in range(classes)) / images
        for i in range(images):
            for j in range(images):
                losses["batch"] += (p[i].dot(p[j]) - q[i].dot(q[j])) ** 2 / images
        for k in range(classes):
            for m in range(classes):
                losses["class"] += (p[:, k].dot(p[:, m]) - q[:, k].dot(q[:, m])) ** 2 / classes
    return losses


def masked(values):
    """The share of values that are at most the median, as the public code selects confidences."""
    return (values <= values.sort().values[[len(values) // 2 - 1, len(values) // 2]].mean()).double().mean()


def test_values_and_gradients_agree_with_loops(batch):
    student, teacher = batch[0].requires_grad_(), batch[1]
    losses, expected = mlkd_loss(student, teacher), slow_parts(student, teacher)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=0)
        (gradient,), (slow,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (loss, expected[name]))
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


def test_the_weights_of_the_file_are_the_published_sum_for_equal_views(batch):
    student, teacher = batch
    confidence = teacher.softmax(1)
    images, classes = masked(confidence.max(1).values), masked(confidence.sum(0))
    slow = slow_parts(student, teacher)
    published = 0.9 * ((1 + images) * slow["instance"] + images * slow["batch"] + classes * slow["class"])
    losses = mlkd_loss(student, teacher)
    weighted = 1.35 * losses["instance"] + 0.45 * (losses["batch"] + losses["class"])
    torch.testing.assert_close(weighted, published)


def test_zero_at_teacher_and_gradient_to_student_only(batch):
    student, teacher = (x.requires_grad_() for x in batch)
    assert all(loss.abs().item() < 1e-12 for loss in MLKDLoss()(student, student).values())
    sum(MLKDLoss()(student, teacher).values()).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_shift_changes_nothing(batch):
    student, teacher = batch
    torch.testing.assert_close(mlkd_loss(student + 7, teacher - 3), mlkd_loss(student, teacher))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["constant", "ordinary", "saturated"])
def test_finite(batch, scale):
    student, teacher = ((x.float() * scale).requires_grad_() for x in batch)
    loss = sum(mlkd_loss(student, teacher).values())
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_only_the_parts_that_are_asked_for(batch):
    assert set(mlkd_loss(*batch, parts=["class"])) == {"class"}
    with pytest.raises(ValueError, match=r"Expected temperatures above 0 \(got \(0\.0, 2\.0\)\)"):
        MLKDLoss((0.0, 2.0))
    with pytest.raises(ValueError, match="Expected logits of at least 2 classes"):
        mlkd_loss(torch.zeros(2, 1), torch.zeros(2, 1))


def test_a_standardised_loss_has_the_parts_of_the_loss(batch):
    loss = StandardizedLogits(MLKDLoss())
    expected = slow_parts(*(standardize_logits(x) for x in batch))
    assert loss(*batch, parts=["instance"])["instance"].item() == pytest.approx(expected["instance"].item(), rel=1e-9)
    linear = torch.nn.Linear(3, 4)
    distiller = Distiller(
        torch.nn.Sequential(linear),
        torch.nn.Linear(3, 4),
        terms={"ls": loss, "kd": StandardizedLogits(KDLoss(2.0))},
        weights={"ls/class": 0.0},
    )
    assert set(distiller(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))) == {"task", "ls/instance", "ls/batch", "kd"}
    with pytest.raises(UserError, match="ls/edge"):
        Distiller(linear, torch.nn.Linear(3, 4), terms={"ls": loss}, weights={"ls/edge": 1.0})


def test_only_losses_of_class_logits_are_standardised():
    with pytest.raises(TypeError, match=r"Expected a loss of level 'logits' that compares classes \(got LDLoss\)"):
        StandardizedLogits(LDLoss())
