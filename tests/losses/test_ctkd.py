from __future__ import annotations

import math

import pytest
import torch

from gkd.distill import Distiller
from gkd.losses import CTKDLoss, StandardizedLogits, ctkd_loss, kd_loss, scale_gradient


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]


def slow_ctkd(student, teacher, theta):
    """Image by image, with probabilities instead of their logarithms."""
    temperature = 1 + 20 / (1 + (-theta).exp())
    total = 0.0
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        total += (p * (p / q).log()).sum()
    return total * temperature**2 / len(student)


@pytest.mark.parametrize(("epoch", "reversal"), [(0, 0.0), (2.5, -0.5 * (1 - math.sqrt(0.5))), (5, -0.5), (10, -1.0), (200, -1.0)])
def test_value_and_gradients_agree_with_loops(batch, epoch, reversal):
    student, teacher = batch[0].requires_grad_(), batch[1]
    loss = CTKDLoss().double()
    loss.progress(epoch)
    value = loss(student, teacher)
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    expected = slow_ctkd(student, teacher, theta)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    gradient, of_theta = torch.autograd.grad(value, [student, loss.theta])
    slow, slow_of_theta = torch.autograd.grad(expected, [student, theta])
    torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(of_theta, reversal * slow_of_theta, rtol=1e-5, atol=1e-9)
    assert slow_of_theta.abs() > 1e-3


def test_at_a_fixed_temperature_it_is_kd(batch):
    torch.testing.assert_close(ctkd_loss(*batch, torch.tensor(3.0, dtype=torch.float64)), kd_loss(*batch, 3.0))
    assert CTKDLoss().temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))


def test_the_gradient_is_scaled_and_nothing_else():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor(-2.0))
    assert torch.equal(y, x)
    (5 * y).sum().backward()
    assert x.grad.tolist() == [-10.0, -10.0]


@pytest.mark.parametrize("wrap", [False, True])
def test_the_distiller_tells_the_epoch_and_the_temperature_is_trained(wrap):
    inner = CTKDLoss(epochs=4.0)
    loss = StandardizedLogits(inner) if wrap else inner
    distiller = Distiller(torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), terms={"kd": loss})
    assert inner.reversal.item() == 0
    distiller.progress(2.0)
    assert inner.reversal.item() == pytest.approx(-0.5)
    sum(distiller(torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])).values()).backward()
    assert any(parameter is inner.theta for parameter in distiller.parameters())
    assert inner.theta.grad.abs() > 0
    assert not any("reversal" in key for key in distiller.state_dict())


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["constant", "saturated"])
def test_finite_and_no_gradient_to_the_teacher(batch, scale):
    student, teacher = ((x.float() * scale).requires_grad_() for x in batch)
    loss = CTKDLoss()
    loss.progress(20.0)
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert loss.theta.grad.isfinite()
    assert teacher.grad is None


def test_errors():
    with pytest.raises(ValueError, match=r"Expected numbers above 0 \(got 1\.0, 20\.0 and 0\)"):
        CTKDLoss(epochs=0)
    with pytest.raises(ValueError, match="Expected logits of at least 2 classes"):
        ctkd_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor(2.0))
