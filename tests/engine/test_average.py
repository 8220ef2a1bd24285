from __future__ import annotations

import pytest
import torch

from gkd.engine import EMA, Interrupted
from gkd.engine.checkpoint import load_checkpoint
from tests.engine import toy
from tests.engine.test_resume import assert_same


def averages(path):
    return load_checkpoint(path / "checkpoints" / "last.pt")["average"]


def test_equals_the_recursion(tmp_path):
    steps = []

    class Watch:
        def on_step_end(self, task):
            steps.append({name: value.clone() for name, value in task.student.state_dict().items()})

    toy.fit(tmp_path, ema=EMA(decay=0.8), callbacks=[Watch()])
    saved = averages(tmp_path)
    for name in ("0.weight", "1.running_var"):
        mean = steps[0][name]
        for step in steps[1:]:
            mean = 0.8 * mean + 0.2 * step[name]
        assert torch.allclose(saved[f"module.{name}"], mean, atol=1e-6)
    assert not torch.allclose(saved["module.0.weight"], steps[-1]["0.weight"], atol=1e-4)


def test_the_average_is_evaluated_and_left_in_the_student(tmp_path):
    model, summary = toy.fit(tmp_path / "run", ema=EMA(decay=0.9))
    assert all(torch.equal(value, averages(tmp_path / "run")[f"module.{name}"]) for name, value in model.net.state_dict().items())
    assert toy.Task(model).evaluate("test")["top1"] == summary.last["top1"]


def test_training_itself_does_not_change(tmp_path):
    for name, ema in (("without", None), ("with", EMA(decay=0.9))):
        toy.fit(tmp_path / name, ema=ema)
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("without", "with")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_resumes_exactly(tmp_path, stop):
    toy.fit(tmp_path / "whole", ema=EMA(decay=0.9))
    toy.fit(tmp_path / "run", ema=EMA(decay=0.9), max_steps=stop)
    toy.fit(tmp_path / "run", ema=EMA(decay=0.9), resume=True, seed=4)
    assert_same(tmp_path / "whole", tmp_path / "run")
    one, two = averages(tmp_path / "whole"), averages(tmp_path / "run")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_interrupted_evaluation_gives_the_trained_weights_back(tmp_path):
    toy.fit(tmp_path / "whole", ema=EMA(decay=0.9))

    def interrupt() -> None:
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        toy.fit(tmp_path / "run", ema=EMA(decay=0.9), before_evaluation=interrupt)
    toy.fit(tmp_path / "run", ema=EMA(decay=0.9), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_decay_outside_its_range():
    with pytest.raises(ValueError, match="Expected decay"):
        EMA(decay=1.0)
