from __future__ import annotations

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gkd.losses.features import (
    ATLoss,
    FitNetLoss,
    NSTLoss,
    OFDLoss,
    VIDLoss,
    at_loss,
    fitnet_loss,
    nst_loss,
    ofd_loss,
    ofd_margin,
    vid_loss,
)
from gkd.losses.review import ReviewKDLoss, hcl_loss


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length > 0 else v


def test_at_by_hand():
    # one channel, two pixels: Q = (9, 16) of length sqrt(337) against (1, 0); mean of two squared differences
    student, teacher = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2), torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
    length = math.sqrt(337)
    assert at_loss(student, teacher).item() == pytest.approx(((9 / length - 1) ** 2 + (16 / length) ** 2) / 2, rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_at_agrees_with_loops(power):
    student, teacher = maps(3, 4, 2, 5), maps(3, 6, 2, 5, seed=1)
    expected = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        q, r = (unit(np.sum(np.abs(x) ** power, axis=0).ravel()) for x in (s, t))
        expected.extend((q - r) ** 2)
    assert at_loss(student, teacher, power).item() == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 6, 2, 2), (3, 3, 4, 4)], ids=["pixels", "kernel"])
def test_nst_agrees_with_loops(shape):
    student, teacher = maps(*shape), maps(3, 2, *shape[2:], seed=1)
    expected = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        s, t = ([unit(channel.ravel()) for channel in x] for x in (s, t))

        def kernel(a, b):
            return np.mean([[(x @ y) ** 2 for x in a] for y in b])

        expected += kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)
    assert nst_loss(student, teacher).item() == pytest.approx(expected / 3, rel=1e-8)


def test_vid_is_a_gaussian_likelihood():
    mean, teacher, variance = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    normal = torch.distributions.Normal(mean, variance.sqrt().view(1, 3, 1, 1))
    expected = -(normal.log_prob(teacher) + 0.5 * math.log(2 * math.pi)).mean()
    torch.testing.assert_close(vid_loss(mean, teacher, variance), expected)


def test_ofd_agrees_with_the_published_three_cases():
    student, teacher, margin = maps(4, 3, 3, 3), maps(4, 3, 3, 3, seed=1), torch.tensor([-0.2, -1.0, 0.0], dtype=torch.float64)
    expected = 0.0
    for b, c, i, j in np.ndindex(4, 3, 3, 3):
        s, t, m = student[b, c, i, j].item(), teacher[b, c, i, j].item(), margin[c].item()
        if t > 0 or (m < t <= 0 and s > t):
            expected += (s - t) ** 2
        elif t <= m and s > m:
            expected += (s - m) ** 2
    assert ofd_loss(student, teacher, margin).item() == pytest.approx(expected / 4, rel=1e-9)


def test_ofd_margin_is_the_mean_of_the_negative_values():
    mean, std = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, -0.5, 2.0])
    draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)) * std + mean
    expected = [column[column < 0].mean().item() for column in draws.T]
    assert ofd_margin(mean, std).tolist() == pytest.approx(expected, rel=0.02)
    assert ofd_margin(torch.tensor([9.0]), torch.tensor([2.0])).item() == -6  # hardly ever negative
    assert ofd_margin(torch.tensor([-1.0, 1.0]), torch.zeros(2)).tolist() == [-1, 0]  # a constant channel


def test_ofd_measures_margins_and_weighs_stages():
    shapes = OrderedDict(a=torch.Size((8, 4, 4, 4)), b=torch.Size((8, 6, 2, 2)))
    torch.manual_seed(0)
    loss = OFDLoss()
    loss.build(shapes, shapes)
    student, teacher = ({stage: torch.randn(shape) for stage, shape in shapes.items()} for _ in range(2))
    value = loss(student, teacher)
    expected = 0.0
    for i, (stage, factor) in enumerate([("a", 0.5), ("b", 1.0)]):
        t = teacher[stage]
        margin = torch.stack([channel[channel < 0].mean() for channel in t.unbind(1)])
        expected += factor * ofd_loss(copy.deepcopy(loss.connectors[i])(student[stage]), t, margin)
    torch.testing.assert_close(value, expected)

    loss.eval()
    margin = loss._margin(0, teacher["a"])
    loss({stage: x * 2 for stage, x in student.items()}, {stage: x * 2 for stage, x in teacher.items()})
    torch.testing.assert_close(loss._margin(0, teacher["a"]), margin)  # evaluation measures nothing

    given = OFDLoss(margins={"a": torch.full((4,), -0.25)})
    given.build(shapes, shapes)
    given(student, teacher)
    torch.testing.assert_close(given._margin(0, teacher["a"]), torch.full((4,), -0.25))
    with pytest.raises(ValueError, match=r"Expected margins for stages among \['a', 'b'\]"):
        OFDLoss(margins={"layer": torch.zeros(4)}).build(shapes, shapes)
    with pytest.raises(ValueError, match=r"Expected a margin \[4\] for 'a'"):
        OFDLoss(margins={"a": torch.zeros(3)}).build(shapes, shapes)


def test_hcl_agrees_with_loops():
    student, teacher = maps(2, 3, 8, 8), maps(2, 3, 8, 8, seed=1)
    expected, total = ((student - teacher) ** 2).mean().item(), 1.0
    for level, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        cells = (x.view(2, 3, level, 8 // level, level, 8 // level).mean((3, 5)) for x in (student, teacher))
        expected += weight * F.mse_loss(*cells).item()
        total += weight
    assert hcl_loss(student, teacher).item() == pytest.approx(expected / total, rel=1e-9)
    vector = maps(2, 3, 1, 1)
    torch.testing.assert_close(hcl_loss(vector, 0 * vector), vector.square().mean())  # no coarser grid


def test_review_fuses_from_deep_to_shallow():
    student = {"a": torch.randn(2, 3, 8, 8), "b": torch.randn(2, 5, 4, 4)}
    teacher = {"a": torch.randn(2, 4, 16, 16), "b": torch.randn(2, 6, 4, 4)}
    loss = ReviewKDLoss(max_mid_channels=4)
    loss.build({stage: x.shape for stage, x in student.items()}, {stage: x.shape for stage, x in teacher.items()})
    loss.eval()
    a, b, p = loss.fusions
    pooled = p.reduce(student["b"].mean((2, 3), keepdim=True))
    y = F.interpolate(pooled, (4, 4))
    x = b.reduce(student["b"])
    z = torch.sigmoid(b.attention[0](torch.cat([x, y], 1)))
    middle = x * z[:, :1] + y * z[:, 1:]
    x, y = a.reduce(student["a"]), F.interpolate(middle, (8, 8))
    z = torch.sigmoid(a.attention[0](torch.cat([x, y], 1)))
    shallow = F.interpolate(x * z[:, :1] + y * z[:, 1:], (16, 16))
    expected = (
        hcl_loss(p.expand(pooled), teacher["b"].mean((2, 3), keepdim=True))
        + hcl_loss(b.expand(middle), teacher["b"])
        + hcl_loss(a.expand(shallow), teacher["a"])
    )
    torch.testing.assert_close(loss(student, teacher), expected)
    assert len(ReviewKDLoss(pooled=False).fusions) == 0


STAGE = [FitNetLoss(), ATLoss(), NSTLoss()]


@pytest.mark.parametrize("loss", STAGE, ids=repr)
def test_zero_at_teacher_and_gradient_to_student_only(loss):
    student, teacher = maps(3, 4, 3, 3).requires_grad_(), maps(3, 4, 3, 3, seed=1).requires_grad_()
    assert loss(student, student.detach()).abs().item() < 1e-12
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("loss", STAGE, ids=repr)
def test_batch_is_the_mean_of_singles(loss):
    student, teacher = maps(3, 4, 3, 3), maps(3, 4, 3, 3, seed=1)
    singles = torch.stack([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(student, teacher), singles.mean())


@pytest.mark.parametrize("loss", STAGE, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "constant"])
def test_finite_on_degenerate_maps(loss, value):
    student = torch.full((3, 4, 3, 3), value, requires_grad=True)
    for teacher in (torch.zeros(3, 4, 3, 3), torch.rand(3, 4, 3, 3)):
        result = loss(student, teacher)
        (gradient,) = torch.autograd.grad(result, student)
        assert result.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("loss", [ATLoss(), NSTLoss()], ids=repr)
def test_invariances(loss):
    student, teacher = maps(3, 4, 4, 4), maps(3, 6, 2, 2, seed=1)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(-3 * student[:, [2, 0, 3, 1]], 0.5 * teacher), value)
    assert not torch.isclose(loss(student.flip(3), teacher), value)
    torch.testing.assert_close(loss(F.adaptive_avg_pool2d(student, 2), teacher), value)


@pytest.mark.parametrize("loss", STAGE, ids=repr)
def test_float32_under_autocast(loss):
    student, teacher = maps(3, 4, 3, 3).float(), maps(3, 4, 3, 3, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, half = loss(student, teacher), loss(student.bfloat16(), teacher.bfloat16())
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher), rtol=0, atol=0)


def built(name):
    shapes = OrderedDict(a=torch.Size((4, 3, 4, 4)), b=torch.Size((4, 5, 2, 2)))
    goals = OrderedDict(a=torch.Size((4, 4, 4, 4)), b=torch.Size((4, 6, 2, 2)))
    torch.manual_seed(0)
    if name == "vid":
        loss = VIDLoss()
        loss.build(shapes["a"], goals["a"])
        return loss, torch.randn(shapes["a"]), torch.randn(goals["a"])
    loss = ReviewKDLoss() if name == "review" else OFDLoss()
    loss.build(shapes, goals)
    return loss, {k: torch.randn(s) for k, s in shapes.items()}, {k: torch.randn(s) for k, s in goals.items()}


@pytest.mark.parametrize("name", ["vid", "ofd", "review"])
def test_losses_with_layers_train_them(name):
    loss, student, teacher = built(name)
    parameters = dict(loss.named_parameters())
    assert parameters
    inputs = list(student.values()) if isinstance(student, dict) else [student]
    goals = list(teacher.values()) if isinstance(teacher, dict) else [teacher]
    for x in (*inputs, *goals):
        x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    assert sum(p.grad.abs().sum() > 0 for p in parameters.values()) >= 0.9 * len(parameters)
    assert all(x.grad is not None for x in inputs)
    assert all(x.grad is None for x in goals)
    restored, _, _ = built(name)
    restored.load_state_dict(loss.state_dict())
    zeros = {k: torch.zeros_like(x) for k, x in student.items()} if isinstance(student, dict) else torch.zeros_like(student)
    assert loss(zeros, teacher).isfinite()


@pytest.mark.parametrize("loss", [VIDLoss(), OFDLoss(), ReviewKDLoss()], ids=lambda loss: type(loss).__name__)
def test_unbuilt_losses_say_so(loss):
    features = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"Expected build\("):
        loss(features, features) if loss.level == "stage" else loss({"a": features}, {"a": features})


def test_vid_starts_with_the_given_variance_and_its_minimum_is_half_the_log_variance():
    loss = VIDLoss(initial_variance=2.0)
    loss.build(torch.Size((1, 3, 4, 4)), torch.Size((1, 3, 4, 4)))
    loss.regressor = nn.Identity()
    features = torch.randn(2, 3, 4, 4)
    assert loss(features, features).item() == pytest.approx(0.5 * math.log(2.0), rel=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="Expected one shape"):
        fitnet_loss(maps(2, 3, 4, 4), maps(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"Expected feature maps \[B, C, h, w\] that are not empty"):
        at_loss(maps(2, 3), maps(2, 3))
    with pytest.raises(ValueError, match="not empty"):
        nst_loss(maps(0, 3, 2, 2), maps(0, 3, 2, 2))
    with pytest.raises(ValueError, match="Expected one batch size"):
        at_loss(maps(2, 3, 2, 2), maps(3, 3, 2, 2))
    with pytest.raises(ValueError, match="power of at least 1"):
        ATLoss(power=0.5)
    with pytest.raises(ValueError, match="initial_variance above eps"):
        VIDLoss(initial_variance=0.0)
    with pytest.raises(ValueError, match="momentum"):
        OFDLoss(momentum=0.0)
    with pytest.raises(ValueError, match="Expected mean and std"):
        ofd_margin(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(("most", "width"), [(512, 8), (3, 3)])
def test_review_hands_on_the_width_of_the_deepest_student_stage(most, width):
    loss = ReviewKDLoss(max_mid_channels=most, pooled=False)
    students = {"low": torch.Size((2, 4, 8, 8)), "high": torch.Size((2, 8, 4, 4))}
    teachers = {"low": torch.Size((2, 16, 8, 8)), "high": torch.Size((2, 32, 4, 4))}
    loss.build(students, teachers)
    assert [fusion.reduce[0].in_channels for fusion in loss.fusions] == [4, 8]
    assert [fusion.reduce[0].out_channels for fusion in loss.fusions] == [width, width]
    assert [fusion.expand[0].out_channels for fusion in loss.fusions] == [16, 32]
    assert [fusion.attention is not None for fusion in loss.fusions] == [True, False]
