from __future__ import annotations

import pytest
import torch

from gkd.losses import CATKDLoss, Outputs, cat_loss, class_maps
from tests.losses.heads import LinearHead


def draw(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_cat(student, teacher, student_weight, teacher_weight, size, normalize):
    """Class by class and cell by cell."""
    total, (batch, classes) = 0.0, (len(student), len(student_weight))
    for b in range(batch):
        for k in range(classes):
            cells = []
            for features, weight in ((student[b], student_weight[k]), (teacher[b], teacher_weight[k])):
                high, wide = features.shape[1] // size, features.shape[2] // size
                means = [
                    (weight[:, None, None] * features[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide]).sum() / (high * wide)
                    for i in range(size)
                    for j in range(size)
                ]
                length = sum(mean**2 for mean in means) ** 0.5
                cells.append([mean / length if normalize else mean for mean in means])
            total += sum((s - t) ** 2 for s, t in zip(*cells, strict=True))
    return total / (batch * classes * size * size)


@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradients_agree_with_loops(normalize):
    student, teacher = draw(2, 3, 4, 4).requires_grad_(), draw(2, 5, 8, 6, seed=1)
    weights = draw(4, 3, seed=2).requires_grad_(), draw(4, 5, seed=3)
    outputs = Outputs(draw(2, 4), draw(2, 4), torch.tensor([0, 1]), *(LinearHead(weight, torch.ones(4).double()) for weight in weights))
    loss = CATKDLoss(size=2, normalize=normalize)(student, teacher, outputs)
    expected = slow_cat(student, teacher, *weights, 2, normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for gradient, slow in zip(*(torch.autograd.grad(x, [student, weights[0]]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


def test_the_mean_of_class_maps_with_a_bias_is_what_the_layer_makes_of_the_mean():
    features, layer = draw(2, 3, 4, 5), torch.nn.Linear(3, 6).double()
    torch.testing.assert_close(class_maps(features, layer.weight, layer.bias).mean((2, 3)), layer(features.mean((2, 3))))
    assert class_maps(features, layer.weight, size=2).shape == (2, 6, 2, 2)


def test_scale_counts_unless_normalised_and_no_gradient_reaches_the_teacher():
    student, teacher = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1).requires_grad_()
    assert cat_loss(teacher, teacher).item() == 0
    torch.testing.assert_close(cat_loss(3 * student, teacher, normalize=True), cat_loss(student, teacher, normalize=True))
    assert not torch.isclose(cat_loss(3 * student, teacher), cat_loss(student, teacher))
    cat_loss(student, teacher).backward()
    assert teacher.grad is None


def test_finite_where_maps_are_0():
    maps = torch.zeros(2, 3, 2, 2, requires_grad=True)
    cat_loss(maps, torch.zeros(2, 3, 2, 2), normalize=True).backward()
    assert maps.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"Expected a map \[B, 3, h, w\], as the last layer sees its mean \(got \(2, 4, 1, 1\)\)"):
        class_maps(torch.zeros(2, 4, 1, 1), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="Expected one shape"):
        cat_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"size of at least 1 \(got 0\)"):
        CATKDLoss(size=0)
