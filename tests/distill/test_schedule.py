from __future__ import annotations

import pytest

from gkd.distill import Constant, Ramp
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
    with pytest.raises(ValueError, match=f"Expected '{name}' not to be negative .got -1"):
        Ramp(**{"hold": 1, name: -1})


def test_down_needs_hold():
    with pytest.raises(ValueError, match="Expected 'hold' with 'down'"):
        Ramp(down=2)
