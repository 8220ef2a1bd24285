from __future__ import annotations

import pytest
import torch

from gkd.engine.window import MAX_NAMES, Window


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_mean_is_over_the_steps_that_had_the_name():
    window = Window(torch.device("cpu"))
    window.add(1, scalars(task=1.0, kd=4.0))
    window.add(2, scalars(task=3.0))
    window.add(3, scalars(kd=8.0, task=5.0))
    assert window.means() == {"task": 3.0, "kd": 6.0}
    window.reset()
    assert window.means() == {}


def test_the_first_bad_step_is_remembered_over_resets():
    window = Window(torch.device("cpu"))
    window.add(1, scalars(task=1.0, kd=1.0))
    assert window.first_bad() is None
    window.add(2, scalars(graph=1.0, kd=float("inf"), task=float("nan")))
    window.reset()
    window.add(3, scalars(task=float("nan"), kd=1.0))
    assert window.first_bad() == (2, ["kd", "task"])


def test_continues_from_its_state():
    first = Window(torch.device("cpu"))
    first.add(1, scalars(a=0.1, b=0.2))
    second = Window(torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    for window in (first, second):
        window.add(2, scalars(a=0.7, b=0.3))
        window.add(3, scalars(a=0.9))
    assert first.means() == second.means()


def test_the_state_does_not_change_with_the_window():
    window = Window(torch.device("cpu"))
    window.add(1, scalars(a=1.0))
    restored = Window(torch.device("cpu"))
    restored.load_state_dict(window.state_dict())
    window.add(2, scalars(a=3.0))
    assert restored.means() == {"a": 1.0}


def test_number_of_names_is_checked():
    window = Window(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Expected 1 to 62 .* \(got 0\)"):
        window.add(1, {})
    names = {f"loss/{number}": torch.tensor(float("nan") if number == MAX_NAMES - 1 else 0.0) for number in range(MAX_NAMES)}
    window.add(1, names)
    assert window.first_bad() == (1, [f"loss/{MAX_NAMES - 1}"])


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    device = torch.device("cuda")
    window = Window(device)
    value = torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            window.add(step, {"task": value, "kd": value})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.means() == {"task": 1.0, "kd": 1.0}
