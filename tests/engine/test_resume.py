"""A run that was stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gkd.engine import Interrupted
from gkd.engine.checkpoint import load_checkpoint, rng_state, save_checkpoint, seed_everything, set_rng_state
from gkd.engine.interrupt import STOPPING
from gkd.errors import UserError
from tests.engine import toy

TOTAL = 3 * toy.STEPS_PER_EPOCH


def assert_same(first: Path, second: Path) -> None:
    assert toy.log(first) == toy.log(second)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(path / "checkpoints" / name) for path in (first, second))
        for key in one["model"]:
            assert torch.equal(one["model"][key], other["model"][key]), key
        ours, theirs = one["optimizer"]["state"], other["optimizer"]["state"]
        assert ours.keys() == theirs.keys() != set()
        for number in ours:
            assert torch.equal(ours[number]["momentum_buffer"], theirs[number]["momentum_buffer"])
        assert torch.equal(one["ranks"][0]["rng"]["torch"], other["ranks"][0]["rng"]["torch"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    toy.fit(path)
    return path


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 11])
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, stop):
    _, summary = toy.fit(tmp_path / "run", max_steps=stop)
    assert (summary.step, summary.finished) == (stop, False)
    _, summary = toy.fit(tmp_path / "run", resume=True, seed=123)  # another start, another state of the generators
    assert summary.finished
    assert_same(uninterrupted, tmp_path / "run")


def test_stopping_at_every_step(uninterrupted, tmp_path):
    for stop in range(1, TOTAL + 1):
        toy.fit(tmp_path / "run", resume=stop > 1, seed=stop - 1, max_steps=stop)
    assert_same(uninterrupted, tmp_path / "run")


def test_the_toy_would_show_a_difference(uninterrupted, tmp_path):
    toy.fit(tmp_path / "run", seed=1)
    assert toy.log(uninterrupted) != toy.log(tmp_path / "run")


def test_lines_after_the_last_checkpoint_are_written_anew(uninterrupted, tmp_path):
    path = tmp_path / "run"
    toy.fit(path, max_steps=5)
    checkpoint = (path / "checkpoints" / "last.pt").read_bytes()
    toy.fit(path, resume=True, max_steps=10)
    (path / "checkpoints" / "last.pt").write_bytes(checkpoint)  # as if the process had died before it wrote another
    toy.fit(path, resume=True)
    assert_same(uninterrupted, path)


def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    path = tmp_path / "run"
    _, before = toy.fit(path)
    _, after = toy.fit(path, resume=True)
    assert (after.step, after.last, after.best, after.finished) == (before.step, before.last, before.best, True)
    assert_same(uninterrupted, path)


def test_without_a_checkpoint_it_starts_from_the_beginning(uninterrupted, tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    toy.fit(path, resume=True)
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same(uninterrupted, path)


@pytest.mark.parametrize("during", ["step", "evaluation"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint(uninterrupted, tmp_path, during, signum):
    path = tmp_path / "run"

    def send() -> None:
        torch.rand(3)  # what a thrown-away evaluation drew must not be missing later
        os.kill(os.getpid(), signum)

    handlers = [signal.getsignal(kind) for kind in STOPPING]
    if during == "step":
        settings = {"make": lambda: toy.Toy(hook=lambda call: call == 5 and os.kill(os.getpid(), signum))}
    else:
        settings = {"before_evaluation": send}
    with pytest.raises(Interrupted, match=r"after step \d of 12. Go on .* --resume") as interrupted:
        toy.fit(path, **settings)
    assert interrupted.value.signum == signum
    assert [signal.getsignal(kind) for kind in STOPPING] == handlers
    assert load_checkpoint(path / "checkpoints" / "last.pt")["position"]["step"] == (6 if during == "step" else 4)
    toy.fit(path, resume=True)
    assert_same(uninterrupted, path)


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    def twice(call: int) -> None:
        if call == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy.fit(tmp_path / "run", make=lambda: toy.Toy(hook=twice))


def test_workers_that_ctrl_c_killed_do_not_hide_the_interruption(tmp_path):
    def dying(epoch: int, start: int):
        for step, batch in enumerate(toy.batches(epoch, start)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            yield batch

    with pytest.raises(Interrupted, match="after step 2 of 12"):
        toy.trainer().fit(toy.Task(toy.Toy(), dying), toy.RunFolder(tmp_path / "run"))


KILLED_WHILE_WRITING = """
import os, signal
from pathlib import Path
from tests.engine import toy
from gkd.engine import loop
save = loop.save_checkpoint

def save_and_die(path, state):
    if state["position"]["step"] == 7:
        import torch
        def half(state, file):
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
    save(path, state)

loop.save_checkpoint = save_and_die
toy.fit(Path("run"), checkpoint_every=1)
"""


def test_killed_while_writing_the_previous_checkpoint_loads(uninterrupted, tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    path = tmp_path / "run"
    (half,) = (path / "checkpoints").glob(".last.pt.*.tmp")
    assert half.read_bytes() == b"half a checkpoint"
    assert load_checkpoint(path / "checkpoints" / "last.pt")["position"]["step"] == 6
    toy.fit(path, resume=True)
    assert_same(uninterrupted, path)


def test_other_data_or_another_model_cannot_be_resumed(tmp_path, monkeypatch):
    path = tmp_path / "run"
    toy.fit(path, max_steps=3)
    with pytest.raises(UserError, match=r"(?s)Expected the model that .*last.pt was saved from .*net.1"):
        toy.fit(path, resume=True, make=lambda: toy.Toy(norm=False))
    monkeypatch.setattr(toy.Task, "steps_per_epoch", 2)
    with pytest.raises(UserError, match=r"Expected 4 steps in an epoch, .* \(got 2\)"):
        toy.fit(path, resume=True)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"Expected a checkpoint that gkd wrote at .*last.pt"):
        load_checkpoint(tmp_path / "last.pt")


def test_random_states_survive_a_checkpoint(tmp_path):
    import random

    import numpy as np

    device = torch.device("cpu")
    seed_everything(3)
    np.random.standard_normal()  # noqa: NPY002  leaves a second normal number pending in the state
    save_checkpoint(tmp_path / "state.pt", rng_state(device))

    def draw() -> list[float]:
        return [random.random(), float(np.random.standard_normal()), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    first = draw()
    assert draw() != first
    set_rng_state(load_checkpoint(tmp_path / "state.pt"), device)
    assert draw() == first
