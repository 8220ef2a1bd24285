from __future__ import annotations

import pytest

from gkd.distill import Constant, Ramp, Share
from gkd.distill.schedule import as_schedule


def test_ramp_rises_holds_and_falls():
    ramp = Ramp(value=2.0, up=4, hold=10, down=2)
    # 2 * 1/4 after one of four epochs; 2 * (1 - 0.5/2) half an epoch into a fall of two, which begins at 4 + 10
    assert [ramp(epoch) for epoch in (0, 1, 4, 10, 14, 14.5, 16, 100)] == [0, 0.5, 2, 2, 2, 1.5, 0, 0]


def test_ramp_without_hold_stays():
    ramp = Ramp(value=3.0, up=2, start=5)
    assert [ramp(epoch) for epoch in (0, 4.9, 6, 7, 1e6)] == [0, 0, 1.5, 3, 3]


def test_ramp_without_lengths_is_constant():
    assert Ramp(value=0.9)(0) == Ramp(value=0.9)(1e9) == 0.9


def test_ramp_with_hold_ends_at_once_without_down():
    assert [Ramp(hold=2)(epoch) for epoch in (0, 1.99, 2)] == [1, 1, 0]


def test_schedules_compose():
    schedule = 0.5 * Ramp(up=10) * Ramp(hold=20, down=10) + 0.25
    assert [schedule(epoch) for epoch in (0, 5, 10, 25, 30)] == [0.25, 0.5, 0.75, 0.5, 0.25]


def test_what_is_zero_for_ever_is_known():
    assert as_schedule(0).always_zero
    assert Ramp(value=0.0, up=3).always_zero
    assert (Ramp(up=3) * 0).always_zero
    assert (Ramp(up=3) * 0 + Constant(0)).always_zero
    assert not Ramp(up=3).always_zero
    assert not (Ramp(up=3) * 0 + 1).always_zero
    assert not as_schedule(lambda epoch: 0.0).always_zero


def test_functions_are_schedules():
    assert as_schedule(lambda epoch: epoch**2)(3) == 9


@pytest.mark.parametrize("name", ["up", "hold", "down", "start"])
def test_negative_length_is_an_error(name):
    with pytest.raises(ValueError, match=rf"Expected Ramp.{name} to be a finite number that is not negative \(got -1\)"):
        Ramp(**{"hold": 1, name: -1})


def test_down_needs_hold():
    with pytest.raises(ValueError, match="Expected 'hold' with 'down'"):
        Ramp(down=2)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "0.5", True, None])
def test_weights_are_finite_numbers_that_are_not_negative(value):
    for make in (Constant, lambda value: Ramp(value=value), Share, as_schedule, lambda value: Ramp() * value):
        with pytest.raises(ValueError, match="to be a finite number that is not negative"):
            make(value)
    with pytest.raises(ValueError, match="Expected a weight at epoch 3 to be a finite number"):
        as_schedule(lambda epoch: value)(3)


def test_ramp_in_fractions_of_the_training():
    ramp = Ramp(value=2.0, up=0.1, hold=0.6, down=0.2, unit=40)
    # up to epoch 4, down from 28 to 36
    assert [ramp(epoch) for epoch in (0, 2, 4, 28, 32, 36, 40)] == pytest.approx([0, 1, 2, 2, 1, 0, 0])
    with pytest.raises(ValueError, match=r"Expected Ramp\.unit above 0"):
        Ramp(unit=0)


def test_share_is_a_schedule_in_another_unit():
    share = Share(Ramp(value=0.4, up=2))
    assert [share(epoch) for epoch in (0, 1, 5)] == [0, 0.2, 0.4]
    assert share.is_share
    assert (0.5 * share).is_share
    assert (share + Share(0.1))(1) == pytest.approx(0.3)
    assert not Ramp().is_share
    assert Share(0).always_zero
    assert Share(lambda epoch: epoch / 8)(2) == 0.25


def test_shares_mix_with_nothing_else():
    with pytest.raises(ValueError, match="Expected both summands to be shares"):
        Share(0.1) + 0.1
    with pytest.raises(ValueError, match="Expected at most one factor to be a share"):
        Share(0.1) * Share(0.1)
    with pytest.raises(ValueError, match="a schedule that is no share yet"):
        Share(0.5 * Share(0.1))
