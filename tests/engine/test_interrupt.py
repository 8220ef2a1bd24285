from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch

from gkd.engine.interrupt import Agreement, Interrupts
from tests.engine import toy


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.signum is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_ask_each_other_about_every_two_seconds(monkeypatch):
    clock = iter([0.0, *(10.0 * step for step in range(1, 4))])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    asked = []

    def exchange(answers: torch.Tensor, op: object) -> None:
        asked.append(answers.tolist())
        answers[0] = max(answers[0], 15.0 if len(asked) == 3 else 0.0)  # another process got SIGTERM

    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    agreement = Agreement(torch.device("cpu"))
    # Ten seconds a step: asked after every step. Nothing of it depends on the log points.
    assert [agreement.ask(0, step) for step in (1, 2, 3)] == [0, 0, signal.SIGTERM]
    assert [step_seconds for _, step_seconds in asked] == [10.0, 10.0, 10.0]


def test_fast_steps_are_asked_about_rarely(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda answers, op: asked.append(float(answers[0])))
    agreement = Agreement(torch.device("cpu"))
    for step in range(1, 102):
        assert agreement.ask(1 if step % 50 == 1 else 0, step) == (1 if step % 50 == 1 else 0)
    assert len(asked) == 3  # after the steps 1, 51 and 101


CLOSED = """
import sys
from pathlib import Path
from tests.engine import toy
_, summary = toy.fit(Path(sys.argv[1]), log_every=1, resume=True)
assert summary.finished
"""


def test_a_closed_pipe_does_not_end_the_training(tmp_path, repository):
    path = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", CLOSED, str(path)]
    for forced in ("", "1"):  # plain lines, and a progress bar
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, "FORCE_COLOR": forced} if forced else environment
        ) as process:
            process.stdout.close()
            errors = process.stderr.read().decode()
            assert process.wait() == 0, errors
        assert "Broken pipe" not in errors
        assert len(toy.log(path)) == toy.STEPS_PER_EPOCH * 3 + 3
        (path / "metrics.jsonl").unlink()
        (path / "checkpoints" / "last.pt").unlink()
