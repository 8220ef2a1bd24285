from __future__ import annotations

import pytest
import torch
from torch import nn

from gkd.engine import SGD, AdamW, Cosine, Flat, MultiStep, OneCycle


def torch_factors(make, total: int) -> list[float]:
    """Learning rates that torch's own scheduler of an optimiser with lr 1 gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = make(optimizer)
    factors = []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("total", [7, 40])
def test_schedules_agree_with_torch(total):
    schedulers = torch.optim.lr_scheduler
    pairs = [
        (OneCycle(), lambda optimizer: schedulers.OneCycleLR(optimizer, 1.0, total, cycle_momentum=False)),
        (Cosine(), lambda optimizer: schedulers.CosineAnnealingLR(optimizer, total)),
        (MultiStep((2, 5), unit="step"), lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 5])),
    ]
    for schedule, make in pairs:
        ours = [schedule(step, total, 1) for step in range(total)]
        assert ours == pytest.approx(torch_factors(make, total), rel=1e-6, abs=1e-9)


def test_epochs_become_steps():
    # Milestone 1.5 epochs of 4 steps: step 6.
    assert [MultiStep((1.5,))(step, 12, 4) for step in (5, 6)] == [1.0, pytest.approx(0.1)]
    # Warm-up over 1 epoch of 4 steps, from 0.2: 0.2 + 0.8 * 1/4 = 0.4 at step 1.
    assert Flat(warmup=1, warmup_start=0.2)(1, 12, 4) == pytest.approx(0.4)
    assert Flat(warmup=8, unit="step")(4, 12, 4) == pytest.approx(0.5)
    assert Cosine(warmup=1)(4, 12, 4) == pytest.approx(1.0)


def test_one_step_is_enough_for_every_schedule():
    for schedule in (Flat(), Cosine(), OneCycle(), MultiStep(())):
        assert 0 < schedule(0, 1, 1) <= 1


def test_wrong_settings():
    with pytest.raises(ValueError, match="ascending"):
        MultiStep((5, 2))
    with pytest.raises(ValueError, match="'epoch' or 'step'"):
        Cosine(unit="iteration")
    with pytest.raises(ValueError, match="> 0 and < 1"):
        OneCycle(rise=30)
    with pytest.raises(ValueError, match=r"Expected at least one parameter .* Flatten"):
        SGD()(nn.Flatten())


@pytest.mark.parametrize("spec", [SGD(weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_weight_decay_of_vectors_is_an_option(spec):
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    decays = {False: [0.1, 0.0], True: [0.1]}
    for decay_norm_and_bias, expected in decays.items():
        optimizer = type(spec)(weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)(module)
        assert [group["weight_decay"] for group in optimizer.param_groups] == expected
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    matrices, vectors = type(spec)(decay_norm_and_bias=False)(module).param_groups
    assert [parameter.ndim for parameter in matrices["params"]] == [4]
    assert [parameter.ndim for parameter in vectors["params"]] == [1, 1, 1]
