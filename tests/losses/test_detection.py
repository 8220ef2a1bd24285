from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gkd.losses.detection import CWDLoss, DenseKDLoss, MGDLoss, PKDLoss, cwd_loss, dense_kd_loss, pkd_loss
from gkd.losses.regions import DsigLoss, FGDLoss, fgd_focal_loss, foreground_mask, instance_graph_loss


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of_boxes(features, rois, output_size, scale):
    """A RoIAlign without torchvision: the mean of the pixels whose centres lie in the box, repeated."""
    rows = []
    for image, x1, y1, x2, y2 in rois.tolist():
        y, x = torch.arange(features.shape[2]) + 0.5, torch.arange(features.shape[3]) + 0.5
        inside = ((y >= y1) & (y <= y2))[:, None] & ((x >= x1) & (x <= x2))
        rows.append((features[int(image)] * inside).sum((1, 2)) / inside.sum().clamp(min=1))
    rows = torch.stack(rows) if rows else features.new_zeros(0, features.shape[1])
    return rows[..., None, None].expand(-1, -1, *output_size)


BOXES = [torch.tensor([[0.0, 0.0, 20.0, 20.0], [10.0, 4.0, 30.0, 31.0]]), torch.zeros(0, 4), torch.tensor([[3.0, 3.0, 9.0, 30.0]])]
SIZE = (32, 32)


def test_cwd_agrees_with_loops():
    student, teacher = maps(2, 3, 2, 4), maps(2, 3, 2, 4, seed=1)
    expected = 0.0
    for s, t in zip(student.flatten(0, 1).flatten(1).numpy(), teacher.flatten(0, 1).flatten(1).numpy(), strict=True):
        p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (t, s))
        expected += (p * np.log(p / q)).sum()
    assert cwd_loss(student, teacher, 2.0).item() == pytest.approx(4 * expected / 6, rel=1e-9)
    torch.testing.assert_close(cwd_loss(student + 3, teacher), cwd_loss(student, teacher))


def test_dense_kd_agrees_with_loops():
    student, teacher = maps(6, 3), maps(6, 3, seed=1)
    expected = count = 0.0
    for s, t in zip(1 / (1 + np.exp(-student.numpy())), 1 / (1 + np.exp(-teacher.numpy())), strict=True):
        count += t.max()
        expected += (abs(s - t) ** 2 * (t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s)))).sum()
    assert dense_kd_loss(student, teacher, focus=2.0).item() == pytest.approx(expected / max(1.0, count), rel=1e-9)
    assert dense_kd_loss(student, student.clone(), focus=0.0) == 0
    with pytest.raises(ValueError, match="focus >= 0"):
        dense_kd_loss(student, teacher, focus=-1.0)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_dense_kd_is_finite_where_all_is_certain(focus):
    for goal in (-200.0, 200.0):
        student, teacher = torch.full((4, 2), 200.0, requires_grad=True), torch.full((4, 2), goal, requires_grad=True)
        DenseKDLoss(focus)(student, teacher).backward()
        assert student.grad.isfinite().all()
        assert teacher.grad is None
    empty = torch.zeros(0, 3, requires_grad=True)
    assert DenseKDLoss(focus)(empty, torch.zeros(0, 3)) == 0


def test_pkd_is_one_minus_the_correlation():
    student, teacher = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    rows = (x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher))
    correlation = np.mean([np.corrcoef(s, t)[0, 1] for s, t in zip(*rows, strict=True)])
    count = 2 * 4 * 5
    assert pkd_loss(student, teacher).item() == pytest.approx((1 - correlation) * (count - 1) / count, rel=1e-5)
    torch.testing.assert_close(pkd_loss(5 * student + 2, teacher), pkd_loss(student, teacher), rtol=1e-4, atol=1e-6)
    assert pkd_loss(maps(2, 3, 8, 10), teacher).isfinite()  # resized


def test_foreground_agrees_with_loops():
    boxes = [box.clone() for box in BOXES]
    boxes[2] = torch.tensor([[0.5, 0.5, 31.9, 32.0], [8.0, 8.0, 8.5, 8.5], [24.0, 24.0, 32.0, 32.0]])
    height, width = 4, 8
    expected = np.zeros((3, height, width))
    for image, box in enumerate(boxes):
        for x1, y1, x2, y2 in box.tolist():
            left, right = math.floor(x1 / 32 * width), math.ceil(x2 / 32 * width)
            top, bottom = math.floor(y1 / 32 * height), math.ceil(y2 / 32 * height)
            area = expected[image, top : bottom + 1, left : right + 1]
            np.maximum(area, 1 / ((right - left + 1) * (bottom - top + 1)), out=area)
    np.testing.assert_allclose(foreground_mask(boxes, SIZE, (height, width)).numpy(), expected, rtol=1e-6)
    assert foreground_mask([torch.zeros(0, 4)] * 2, SIZE, (2, 2)).tolist() == [[[0, 0], [0, 0]]] * 2


def test_fgd_focal_agrees_with_loops():
    student, teacher = maps(3, 4, 4, 4), maps(3, 4, 4, 4, seed=1)
    foreground = foreground_mask(BOXES, SIZE, (4, 4)).double()

    def attention(x):
        pixels, channels = np.abs(x).mean(0), np.abs(x).mean((1, 2))
        pixels, channels = np.exp(pixels / 0.5), np.exp(channels / 0.5)
        return 16 * pixels / pixels.sum(), 4 * channels / channels.sum()

    expected = 0.0
    for s, t, fg in zip(student.numpy(), teacher.numpy(), foreground.numpy(), strict=True):
        (space, channel), (own_space, own_channel) = attention(t), attention(s)
        background = (fg == 0) / max((fg == 0).sum(), 1)
        weighted = (s - t) ** 2 * space * channel[:, None, None]
        expected += (weighted * (2 * fg + 3 * background)).sum()
        expected += 5 * (np.abs(space - own_space).sum() + np.abs(channel - own_channel).sum())
    assert fgd_focal_loss(student, teacher, foreground, 0.5, 2.0, 3.0, 5.0).item() == pytest.approx(expected / 3, rel=1e-9)


def test_fgd_adds_the_global_term():
    student, teacher = maps(3, 4, 4, 4).float(), maps(3, 4, 4, 4, seed=1).float()
    loss = FGDLoss(global_weight=2.0)
    loss.build(student.shape, teacher.shape)
    focal = fgd_focal_loss(student, teacher, foreground_mask(BOXES, SIZE, (4, 4)))
    # the context blocks start as the identity
    torch.testing.assert_close(loss(student, teacher, boxes=BOXES, image_size=SIZE), focal + 2 * (student - teacher).square().sum() / 3)
    torch.nn.init.normal_(loss.contexts[0].transform[-1].weight)
    block, x = loss.contexts[0], student[:1]
    weights = block.mask(x).flatten().softmax(0)
    context = (x.flatten(2)[0] * weights).sum(1)
    torch.testing.assert_close(block(x), x + block.transform(context[None, :, None, None]))


def test_instance_graph_agrees_with_loops_and_ignores_padding():
    student, teacher = maps(3, 4, 5), maps(3, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    expected = 0.0
    for s, t, keep in zip(student.numpy(), teacher.numpy(), mask.numpy(), strict=True):
        if keep.any():
            s, t = s[keep], t[keep]
            a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
            expected += 0.5 * ((s - t) ** 2).mean() + 1.0 * ((a @ a.T - b @ b.T) ** 2).mean()
    value = instance_graph_loss(student, teacher, mask)
    assert value.item() == pytest.approx(expected / 3, rel=1e-9)
    poisoned = torch.where(mask[..., None], student, 1e6).requires_grad_()
    torch.testing.assert_close(instance_graph_loss(poisoned, teacher, mask), value)
    instance_graph_loss(poisoned, teacher, mask).backward()
    assert (poisoned.grad[~mask] == 0).all()


def test_dsig_cuts_the_regions():
    student, teacher = maps(3, 4, 8, 8).float(), maps(3, 4, 8, 8, seed=1).float()
    loss = DsigLoss(roi_align=mean_of_boxes, output_size=1)
    rows = [mean_of_boxes(x, torch.tensor([[0, 0, 0, 5, 5], [0, 2.5, 1, 7.5, 7.75]]), (1, 1), 1.0).flatten(1) for x in (student, teacher)]
    only = loss(student[:1], teacher[:1], boxes=BOXES[:1], image_size=SIZE)
    torch.testing.assert_close(only, instance_graph_loss(rows[0][None], rows[1][None], torch.ones(1, 2, dtype=torch.bool)))
    third = loss(student[2:], teacher[2:], boxes=BOXES[2:], image_size=SIZE)
    torch.testing.assert_close(loss(student, teacher, boxes=BOXES, image_size=SIZE), (only + third) / 3)


def test_dsig_reads_boxes_with_torchvision_by_default():
    ops = pytest.importorskip("torchvision.ops")
    assert DsigLoss().nodes.roi_align is ops.roi_align


def test_mgd_generates_from_what_is_kept():
    student, teacher = maps(64, 3, 8, 8).float(), maps(64, 4, 8, 8, seed=1).float()
    loss = MGDLoss(mask_ratio=0.65)
    loss.build(student.shape, teacher.shape)
    loss.generation = torch.nn.Identity()
    aligned = loss.align(student)
    torch.manual_seed(0)
    kept = torch.rand(64, 1, 8, 8) >= 0.65
    assert kept.float().mean().item() == pytest.approx(0.35, abs=0.03)
    torch.manual_seed(0)
    torch.testing.assert_close(loss(student, teacher), (aligned * kept - teacher).square().sum() / 64)
    loss.mask_channels = True
    torch.manual_seed(0)
    kept = torch.rand(64, 4, 1, 1) >= 0.65
    torch.manual_seed(0)
    torch.testing.assert_close(loss(student, teacher), (aligned * kept - teacher).square().sum() / 64)
    exact = MGDLoss(mask_ratio=0.0)
    exact.build(teacher.shape, teacher.shape)
    exact.generation = torch.nn.Identity()
    assert exact(teacher, teacher).item() == 0


def built(loss, student, teacher):
    torch.manual_seed(0)
    if hasattr(loss, "build"):
        loss.build(student.shape, teacher.shape)
    return loss


LOSSES = {"cwd": CWDLoss, "pkd": PKDLoss, "mgd": MGDLoss, "fgd": FGDLoss, "dsig": lambda: DsigLoss(roi_align=mean_of_boxes, output_size=2)}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_student_and_layers_only(name):
    channels = 3 if name in ("mgd", "fgd") else 4
    student, teacher = torch.randn(3, channels, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8, requires_grad=True)
    loss = built(LOSSES[name](), student, teacher)
    for module in loss.modules():  # past the zero start of the context blocks
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, boxes=BOXES, image_size=SIZE)
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert bool(list(loss.parameters())) == (name in ("mgd", "fgd"))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "constant"])
def test_finite_on_degenerate_maps(name, value):
    student, teacher = torch.full((3, 4, 8, 8), value, requires_grad=True), torch.randn(3, 4, 8, 8)
    loss = built(LOSSES[name](), student, teacher)
    for goal in (teacher, torch.zeros(3, 4, 8, 8)):
        result = loss(student, goal, boxes=BOXES, image_size=SIZE)
        (gradient,) = torch.autograd.grad(result, student)
        assert result.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["cwd", "pkd", "fgd", "dsig"])
def test_zero_at_teacher(name):
    features = torch.randn(3, 4, 8, 8)
    loss = built(LOSSES[name](), features, features)
    assert loss(features, features.clone(), boxes=BOXES, image_size=SIZE).abs().item() < 1e-6


def test_no_boxes_at_all():
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    empty = [torch.zeros(0, 4)] * 2
    dsig = LOSSES["dsig"]()
    value = dsig(features, torch.randn(2, 4, 8, 8), boxes=empty, image_size=SIZE)
    value.backward()
    assert value.item() == 0
    assert (features.grad == 0).all()
    fgd = built(FGDLoss(), features, features)
    assert fgd(features, torch.randn(2, 4, 8, 8), boxes=empty, image_size=SIZE).item() > 0  # all is background


def test_errors():
    a, b = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8, 8)
    with pytest.raises(ValueError, match="Expected one shape"):
        cwd_loss(a, b)
    with pytest.raises(ValueError, match="temperature above 0"):
        cwd_loss(a, a, 0.0)
    with pytest.raises(ValueError, match="at least two values in a channel"):
        pkd_loss(a[:1, :, :1, :1], a[:1, :, :1, :1])
    with pytest.raises(ValueError, match=r"mask_ratio in \[0, 1\)"):
        MGDLoss(mask_ratio=1.0)
    for loss in (MGDLoss(), FGDLoss()):
        with pytest.raises(RuntimeError, match=r"Expected build\("):
            loss(a, a, boxes=BOXES, image_size=SIZE)
    for loss in (built(FGDLoss(), a, a), LOSSES["dsig"]()):
        with pytest.raises(ValueError, match=r"Expected boxes of 3 images and an image_size \(got None and None\)"):
            loss(a, a)
        with pytest.raises(ValueError, match="those of 2"):
            loss(a, a, boxes=BOXES[:2], image_size=SIZE)
    with pytest.raises(ValueError, match=r"Expected boxes \[n, 4\]"):
        foreground_mask([torch.zeros(2, 5)], SIZE, (2, 2))
