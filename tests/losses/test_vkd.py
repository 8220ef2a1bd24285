from __future__ import annotations

import pytest
import torch

from gkd.losses import VkDLoss, vkd_loss


def draw(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def slow_vkd(projected, teacher):
    total, (images, channels) = 0.0, teacher.shape
    for z, t in zip(projected, teacher, strict=True):
        mean = t.sum() / channels
        normal = (t - mean) / (((t - mean) ** 2).sum() / channels + 1e-5).sqrt()
        for d in (z - normal).abs():
            total += 0.5 * d * d if d < 1 else d - 0.5
    return total / (images * channels)


def built(student: int, teacher: int):
    loss = VkDLoss()
    loss.build(torch.Size([2, student, 2, 2]), torch.Size([2, teacher, 2, 2]))
    return loss.double()


def test_value_and_gradients_agree_with_loops():
    student, teacher, loss = draw(4, 3, 2, 2).requires_grad_(), draw(4, 5, 1, 2, seed=1), built(3, 5)
    value = loss(student, teacher)
    expected = slow_vkd(student.mean((2, 3)) @ loss.projection.weight.T, teacher.mean((2, 3)))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    wanted = [student, *loss.parameters()]
    for gradient, slow in zip(*(torch.autograd.grad(x, wanted) for x in (value, expected)), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("student", "teacher"), [(3, 5), (4, 4), (6, 2)])
def test_the_projection_stays_orthogonal_under_training(student, teacher):
    loss = built(student, teacher)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss.projection.weight.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        loss(draw(8, student, seed=seed), draw(8, teacher, seed=seed + 9)).backward()
        optimizer.step()
    weight = loss.projection.weight
    product = weight.T @ weight if teacher >= student else weight @ weight.T
    torch.testing.assert_close(product, torch.eye(min(student, teacher), dtype=torch.float64), rtol=0, atol=1e-5)
    assert not torch.allclose(weight, before)


def test_scale_and_shift_of_the_teacher_do_not_matter_those_of_the_student_do():
    projected, teacher = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    value = vkd_loss(projected, teacher)
    torch.testing.assert_close(vkd_loss(projected, 3 * teacher - 2), value, rtol=1e-4, atol=0)
    assert not torch.isclose(vkd_loss(2 * projected, teacher), value)
    value.backward()
    assert teacher.grad is None
    assert vkd_loss(torch.nn.functional.layer_norm(teacher, (5,)), teacher).item() == 0


def test_finite_where_a_teacher_is_constant():
    projected = torch.randn(2, 3, requires_grad=True)
    vkd_loss(projected, torch.ones(2, 3)).backward()
    assert projected.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"Expected vectors \[B, D\] \(got \(2, 3, 1\)\)"):
        vkd_loss(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    with pytest.raises(RuntimeError, match="before the first forward of VkDLoss"):
        VkDLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
