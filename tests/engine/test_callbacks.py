from __future__ import annotations

import pytest

from gkd.engine import Callback, EarlyStopping, RunFolder
from gkd.engine.checkpoint import load_checkpoint
from tests.engine import toy


def test_every_hook_is_called_in_its_place():
    calls = []

    class Recorder(Callback):
        def on_train_start(self, task, step):
            calls.append(("start", step))

        def on_step_end(self, step, losses):
            calls.append(("step", step, sorted(losses)[0]))

        def on_evaluation_end(self, step, record):
            calls.append(("evaluation", step, record["split"]))

        def on_train_end(self, summary):
            calls.append(("end", summary.step))

    toy.fit(None, epochs=1, callbacks=[Recorder(), Callback()])
    steps = [("step", step, "loss") for step in range(1, 5)]
    assert calls == [("start", 0), *steps, ("evaluation", 4, "test"), ("end", 4)]


def stopping(path, scores, resume=False, **settings):
    model = toy.Toy()
    task = toy.Task(model, evaluate=lambda split: {"split": split, "top1": next(scores)})
    return toy.trainer(epochs=8, early_stopping=EarlyStopping(patience=2, min_delta=1.0), **settings).fit(task, RunFolder(path), resume)


def test_early_stopping(tmp_path, capsys):
    # Of 10, 12, 12.5 and 11 the second is the last that gains more than 1: two evaluations later it ends, in epoch 4.
    summary = stopping(tmp_path, iter([10.0, 12.0, 12.5, 11.0, 99.0]))
    assert (summary.step, summary.finished, summary.best["top1"]) == (16, True, 12.5)
    assert "Stopped early after step 16: 2 evaluations without a higher top1 than 12.0." in capsys.readouterr().out
    assert stopping(tmp_path, iter([]), resume=True).step == 16  # it stays stopped


def test_early_stopping_resumes(tmp_path):
    stopping(tmp_path, iter([10.0, 9.0]), max_steps=9)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["position"]["stale"] == 1
    assert stopping(tmp_path, iter([float("nan"), 99.0]), resume=True).step == 12


def test_an_end_between_epochs(tmp_path):
    summary = stopping(tmp_path, iter([10.0, 9.0, 9.0]), evaluate_every=0.5)
    assert (summary.step, summary.finished) == (6, True)


@pytest.mark.parametrize("settings", [{"patience": 0}, {"patience": 2.5}, {"min_delta": -1.0}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="Expected"):
        EarlyStopping(**settings)


def test_several_sets_are_evaluated_and_the_first_chooses(tmp_path):
    scores = {"val": iter([1.0, 3.0, 2.0]), "clean": iter([9.0, 8.0, 7.0])}
    task = toy.Task(toy.Toy(), splits=("val", "clean"), evaluate=lambda split: {"split": split, "top1": next(scores[split])})
    summary = toy.trainer().fit(task, RunFolder(tmp_path))
    assert summary.best["top1"] == 3.0
    assert summary.last["split"] == "val"
    assert [record["split"] for record in toy.log(tmp_path) if record["kind"] == "eval"] == ["val", "clean"] * 3
