"""Runs the cells of a sweep, each in a process of its own, so that none can harm another or the sweep."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from gkd.engine.folder import RunFolder
from gkd.engine.interrupt import Interrupted, Interrupts
from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.sweep.points import Cell, Plan
from gkd.sweep.study import Outcome, Study

POLL = 0.3  # seconds
GOODBYE = 60.0  # seconds that a cell gets to write its checkpoint

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Job:
    """A training in a process of its own. What it prints goes to ``output.txt`` and ``errors.txt`` in the run folder.

    It goes on from its last checkpoint where the folder holds one of the same key, and starts anew otherwise. On Linux it does not outlive
    its parent, whatever ends that one, so that the folder is free for whoever takes over.

    Args:
        command: The program and its options, without those about the folder.
        path: Run folder.
        key: Of the configuration.
        threads: Of the process.
        about: Kept as ``cell.json`` in the run folder.
    """

    def __init__(self, command: Sequence[str], path: Path, key: str, threads: int, about: dict[str, Any] | None = None) -> None:
        self.folder = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        described = path / "cell.json"
        before = json.loads(described.read_text()) if described.is_file() else {}
        going_on = before.get("key") == key and self.folder.last.is_file()
        self.command = [*command, "--output", str(path), "--resume" if going_on else "--overwrite"]
        content = json.dumps({"key": key, **(about or {}), "command": self.command}, indent=2)
        write_atomic(described, lambda file: file.write(content.encode()))
        self._program = program_name(command)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with (path / "output.txt").open("w") as output, (path / "errors.txt").open("w") as errors:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which then asks its cells to stop
                preexec_fn=_die_with_parent if _libc else None,
            )

    def outcome(self) -> Outcome | None:
        """What became of it; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0 and self.folder.results.is_file():
            return Outcome(json.loads(self.folder.results.read_text()), None, -1)
        return Outcome(None, self._reason(code), -1)

    def last_line(self) -> str:
        """The last complete line that it printed, empty where there is none yet."""
        text = (self.folder.path / "output.txt").read_text(errors="replace")
        return text.rpartition("\n")[0].rpartition("\n")[2]

    def stop(self, wait: bool = True) -> None:
        """Asks it to write a checkpoint and end; makes it end where it does not in time."""
        if self._process.poll() is None:
            self._process.terminate()
        if wait:
            try:
                self._process.wait(GOODBYE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"ended by the signal {signal.Signals(-code).name}"
        lines = [line for line in (self.folder.path / "errors.txt").read_text(errors="replace").splitlines() if line.strip()]
        begin = next((number for number in reversed(range(len(lines))) if lines[number].startswith(f"{self._program}: ")), len(lines) - 1)
        message = " ".join(line.strip() for line in lines[max(begin, 0) :]).removeprefix(f"{self._program}: ")
        return message or (f"ended with the exit code {code}" if code else "ended without results")


def work(
    plan: Plan,
    study: Study,
    launch: Callable[[Cell], Job],
    workers: int,
    ignored: Collection[int] = (),
    tell: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Runs the cells that nobody else has run or is running, and waits for those that others run.

    Args:
        plan: The cells.
        study: Where their results go.
        launch: Starts a cell.
        workers: Cells at a time.
        ignored: Numbers of trials that do not count.
        tell: Takes a line for every cell that ended.

    Returns:
        What became of every cell, by key.

    Raises:
        Interrupted: If SIGINT or SIGTERM asked to stop. The cells have written their checkpoints, and the claims are given back.
    """
    running: dict[str, tuple[Cell, Job]] = {}
    waiting = False
    with Interrupts() as interrupts:
        try:
            while True:
                if interrupts.signum is not None:
                    raise Interrupted(interrupts.signum, "Interrupted; what is done is kept. Go on with the same command.")
                for key in study.claims.renew():  # lost: the process stood still for so long that another one took over
                    running.pop(key)[1].stop()
                for key, (cell, job) in list(running.items()):
                    outcome = job.outcome()
                    if outcome is not None:
                        del running[key]
                        _keep(plan, study, cell, job, outcome, tell)
                outcomes = study.outcomes(ignored)
                cells = [cell for cell in plan.cells() if cell.key not in outcomes]
                todo = [cell for cell in cells if cell.key not in running]
                if not todo and len(running) < workers and not plan.extend(outcomes) and not cells:
                    return outcomes
                for cell in todo:
                    if len(running) >= workers:
                        break
                    if study.claims.claim(cell.key):
                        if cell.key in study.outcomes(ignored):  # done between the look and the claim
                            study.claims.release(cell.key)
                        else:
                            running[cell.key] = (cell, launch(cell))
                if todo and not running and not waiting:
                    tell(f"Waiting for {len(todo)} cells that other processes have claimed")
                    waiting = True
                time.sleep(POLL)
        finally:
            for _, job in running.values():
                job.stop(wait=False)
            for key, (_, job) in running.items():
                job.stop()
                study.claims.release(key)


def program_name(command: Sequence[str]) -> str:
    """What a program calls itself in its messages: ``gkd train`` of ``python -m gkd train ..``, else the name of its file.

    Examples:
        >>> program_name(["python", "-m", "gkd", "train", "--gin", "x.gin"]), program_name(["python", "projects/train.py"])
        ('gkd train', 'train.py')
    """
    return " ".join(command[2:4]) if command[1] == "-m" else Path(command[1]).name


def _keep(plan: Plan, study: Study, cell: Cell, job: Job, outcome: Outcome, tell: Callable[[str], None]) -> None:
    metric = plan.sweep.metric
    if outcome.results is not None:
        outcome = outcome._replace(results=plan.sweep.judged(outcome.results))
    score = None if outcome.results is None else (outcome.results.get("final") or {}).get(metric)
    if outcome.results is not None and not (isinstance(score, int | float) and math.isfinite(score)):
        outcome = Outcome(None, f"its results have no final {metric}", -1)
    about = {"label": cell.point.label, "seed": cell.seed, "folder": str(job.folder.path), "command": job.command}
    if not study.record(cell.key, about, cell.point.values, plan.sweep.values, outcome, metric):
        return
    outcomes = study.outcomes()
    done = sum(planned.key in outcomes for planned in plan.cells())
    result = f"failed: {outcome.error}" if outcome.results is None else f"{metric} {outcome.results['final'][metric]:.2f}"
    tell(f"{done}/{len(plan.cells())}  {cell.point.label}, seed {cell.seed}: {result}")


def make_teacher(study: Study, weights: Path, command: Sequence[str], threads: int, tell: Callable[[str], None] = print) -> None:
    """Trains the teacher where there is none, once for all processes that share the study, and waits for it.

    The training has a folder of its own beside the teacher's, which takes its place when it is complete: no sweep sees a part of it. A
    training that failed or was interrupted goes on from its last checkpoint the next time.

    Args:
        study: Where the work is claimed.
        weights: The teacher's student.safetensors.
        command: The program and its options, without those about the folder.
        threads: Of the process.
        tell: Takes a line on what is done.

    Raises:
        UserError: If the training fails.
        Interrupted: If SIGINT or SIGTERM asked to stop.
    """
    key = f"teacher {weights.resolve()}"[-250:]
    job: Job | None = None
    place = weights.parent.with_name(f"{weights.parent.name}.training")
    with Interrupts() as interrupts:
        try:
            while not weights.is_file():
                if interrupts.signum is not None:
                    raise Interrupted(interrupts.signum, "Interrupted while the teacher was trained. Start again with the same command.")
                study.claims.renew()
                if job is None and study.claims.claim(key) and not weights.is_file():
                    tell(f"Training the teacher for {weights}")
                    job = Job(command, place, " ".join(command), threads)
                outcome = None if job is None else job.outcome()
                if outcome is not None:
                    if outcome.results is None:
                        raise UserError(f"Expected the teacher to be trained by {' '.join(command)} (got: {outcome.error})")
                    _move(place, weights.parent)
                    tell(f"The teacher has {outcome.results['final']}")
                time.sleep(POLL)
        finally:
            if job is not None:
                job.stop()
            study.claims.release(key)


def _move(source: Path, target: Path) -> None:
    """Puts what a training wrote to its place, the weights last; what another process has put there stays."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        if not (target / path.name).exists():
            os.replace(path, target / path.name)
    shutil.rmtree(source)


def _die_with_parent() -> None:
    assert _libc is not None
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
