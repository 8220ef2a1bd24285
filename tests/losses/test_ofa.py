from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gkd.losses import OFALoss, Outputs, ofa_loss
from tests.losses.heads import LinearHead


def draw(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_ofa(student, teacher, target, eps, temperature):
    total = 0.0
    for s, t, y in zip(student, teacher, target.tolist(), strict=True):
        p, q = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (t, s))
        for k in range(len(p)):
            true = 1.0 if k == y else 0.0
            total -= ((p[k] + true) ** eps - true) * q[k].log()
    return total / len(student)


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 2.0)])
def test_value_and_gradient_agree_with_loops(eps, temperature):
    student, teacher, target = draw(4, 5).requires_grad_(), 3 * draw(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    loss, expected = ofa_loss(student, teacher, target, eps, temperature), slow_ofa(student, teacher, target, eps, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    (gradient,), (slow,) = (torch.autograd.grad(x, student) for x in (loss, expected))
    torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


def test_the_exponent_1_is_cross_entropy_with_the_teacher():
    student, teacher, target = draw(4, 5), draw(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(ofa_loss(student, teacher, target), nn.functional.cross_entropy(student, teacher.softmax(1)))
    # A fair teacher and student of two classes: ((1/2 + 1)^2 - 1) log 2 for the true class and (1/2)^2 log 2 for the other.
    fair = torch.zeros(1, 2)
    assert ofa_loss(fair, fair, torch.tensor([1]), eps=2.0).item() == pytest.approx(1.5 * math.log(2), rel=1e-6)


def shapes(*sizes):
    return {f"layer{place}": torch.Size([2, *size]) for place, size in enumerate(sizes)}


def built(**options):
    torch.manual_seed(0)
    loss = OFALoss(**options)
    loss.build(shapes((4, 8, 8), (6, 4, 4), (8, 2, 2)), shapes((3, 8, 8), (5, 4, 4), (12, 2, 2)), num_classes=5)
    return loss.double()


def test_every_stage_has_an_exit_that_halves_once_for_every_stage_to_come():
    loss = built()
    widths = [
        [layer.out_channels for layer in exit_.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1] for exit_ in loss.exits
    ]
    assert widths == [[4, 8, 8, 12], [6, 12], [12]]
    strides = [sum(layer.stride == (2, 2) for layer in exit_.modules() if isinstance(layer, nn.Conv2d)) for exit_ in loss.exits]
    assert strides == [2, 1, 0]


def test_exits_are_summed_and_all_learn():
    loss, target = built(eps=1.5), torch.tensor([1, 3])
    student = {name: draw(*shape, seed=place) for place, (name, shape) in enumerate(shapes((4, 8, 8), (6, 4, 4), (8, 2, 2)).items())}
    logits = draw(2, 5).requires_grad_(), draw(2, 5, seed=1).requires_grad_()
    head = LinearHead(draw(5, 8), None)
    values = loss(student, {}, Outputs(*logits, target, head, head))
    exits = [exit_(features) for exit_, features in zip(loss.exits, student.values(), strict=True)]
    torch.testing.assert_close(values["exits"], sum(ofa_loss(exit_, logits[1], target, 1.5) for exit_ in exits))
    torch.testing.assert_close(values["logits"], ofa_loss(*logits, target, 1.5))
    sum(values.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())
    assert logits[0].grad.any()
    assert logits[1].grad is None
    assert set(loss(student, {}, Outputs(*logits, target, head, head), parts=["logits"])) == {"logits"}


def test_finite_where_the_teacher_is_sure():
    student = torch.randn(2, 3, requires_grad=True)
    loss = ofa_loss(student, 1e4 * torch.eye(2, 3), torch.tensor([0, 2]), eps=1.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="OFA-KD needs the true class of every image"):
        ofa_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="before the first forward of OFALoss"):
        OFALoss()({}, {}, None)
    with pytest.raises(ValueError, match=r"Expected maps \[B, C, h, w\] for OFALoss \(got \[\[2, 8\]\]\)"):
        OFALoss().build({"pool": torch.Size([2, 8])}, {"pool": torch.Size([2, 8])}, num_classes=3)
