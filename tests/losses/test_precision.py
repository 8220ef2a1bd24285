"""Losses with layers of their own, in every precision that a training may have."""

from __future__ import annotations

import copy

import pytest
import torch

from gkd.losses import (
    CCLoss,
    CRDLoss,
    FGDLoss,
    HKDLoss,
    ICKDLoss,
    IRGLoss,
    MGDLoss,
    OFDLoss,
    PKTLoss,
    ReviewKDLoss,
    RKDLoss,
    SPLoss,
    VIDLoss,
    ickd_loss,
)

SHAPES = torch.Size([8, 6, 8, 8]), torch.Size([8, 10, 8, 8])
BUILT = {
    "cc": CCLoss(),
    "crd": CRDLoss(num_samples=32, num_negatives=16),
    "fgd": FGDLoss(),
    "hkd": HKDLoss(k=2),
    "ickd": ICKDLoss(),
    "mgd": MGDLoss(mask_ratio=0.0),
    "ofd": OFDLoss(),
    "review": ReviewKDLoss(),
    "vid": VIDLoss(),
}
MODES = {
    "half features": (torch.float32, torch.float16),
    "bfloat16 features": (torch.float32, torch.bfloat16),
    "half": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "double": (torch.float64, torch.float64),
    "double features": (torch.float32, torch.float64),
}


def build(name):
    torch.manual_seed(0)
    loss = copy.deepcopy(BUILT[name])
    shapes = [{"stage": shape} for shape in SHAPES] if loss.level == "stages" else SHAPES
    loss.build(*shapes)
    return loss


def evaluate(loss, dtype):
    student, teacher = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed, shape in enumerate(SHAPES))
    student.requires_grad_()
    options = {}
    if isinstance(loss, CRDLoss):
        options["index"] = torch.arange(8)
    if isinstance(loss, FGDLoss):
        options = {"boxes": [torch.tensor([[0.0, 0.0, 16.0, 16.0]])] * 8, "image_size": (32, 32)}
    torch.manual_seed(1)
    maps = ({"stage": student}, {"stage": teacher}) if loss.level == "stages" else (student, teacher)
    value = loss(*maps, **options)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BUILT)
def test_without_autocast(name, mode):
    layers, features = MODES[mode]
    expected, _ = evaluate(build(name), torch.float32)
    loss = build(name).to(layers)
    for step in range(2):  # the second time with what the first one remembered
        value, gradient = evaluate(loss, features)
        assert value.dtype in (torch.float32, torch.float64)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
        if name not in ("crd", "ofd") or step == 0:
            torch.testing.assert_close(value.float(), expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", BUILT)
def test_under_autocast(name):
    expected, _ = evaluate(build(name), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = evaluate(build(name), torch.float32)
    torch.testing.assert_close(value.float(), expected, rtol=0.05, atol=1e-3)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-14, 1e-8, 1e12])
@pytest.mark.parametrize("loss", [RKDLoss(), SPLoss(), PKTLoss(), IRGLoss()], ids=lambda loss: type(loss).__name__)
def test_the_scale_of_a_network_does_not_matter(loss, scale):
    student, teacher = (torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if isinstance(loss, PKTLoss):
        scale = max(scale, 1e-8)  # shorter rows count as zero

    def run(student, teacher):
        student = student.clone().requires_grad_()
        maps = ({"s": student}, {"s": teacher}) if loss.level == "stages" else (student, teacher)
        value = loss(*maps)
        value.backward()
        assert student.grad.isfinite().all()
        assert student.grad.abs().sum() > 0
        return value

    value = run(student, teacher)
    torch.testing.assert_close(run(scale * student, teacher), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(run(student, scale * teacher), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_the_scale_of_an_image_does_not_matter_to_channel_correlations(size, scale):
    student, teacher = (torch.randn(3, 8, size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    value = ickd_loss(student, teacher)
    scaled = (scale * student).requires_grad_()
    outcome = ickd_loss(scaled, teacher)
    outcome.backward()
    torch.testing.assert_close(outcome, value, rtol=1e-4, atol=1e-6)
    assert scaled.grad.isfinite().all()
    assert scaled.grad.abs().sum() > 0
