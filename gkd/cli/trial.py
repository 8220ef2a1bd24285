"""Trains a teacher, then its student by several methods with several seeds, and compares: gkd trial --gin PAIR --teacher FILE"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gkd.errors import UserError

ALONE = "gin/base/alone.gin"


class Training(NamedTuple):
    """One run of a trial.

    Attributes:
        name: What is printed of it.
        command: The program and its options, without those about the folder.
        folder: Run folder.
    """

    name: str
    command: list[str]
    folder: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the pair")
    parser.add_argument("--teacher", metavar="FILE", help="how the teacher is trained (default: the pair names its weights)")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME=CHANGES",
        help="gin files and bindings after the pair's, with ';' between them (default: 'alone=gin/base/alone.gin' and 'distilled=')",
    )
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding for every student")
    parser.add_argument(
        "--set-all", action="append", default=[], metavar="BINDING", help="one more binding for every run, the teacher's too"
    )
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/ and the name of the last --gin file)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--workers", type=int, help="runs at a time, one core each (default: the number of cores)")
    parser.add_argument("--device", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Trains all that is not done yet and writes the comparison."""
    from rich.console import Console

    from gkd.sweep.commands import train_command
    from gkd.viz import compare, read_run, write_comparison
    from gkd.viz.style import can_draw

    for name, count in (("seeds", arguments.seeds), ("workers", arguments.workers)):
        if count is not None and count < 1:
            raise UserError(f"Expected --{name} to be at least 1 (got {count})")
    begin = time.perf_counter()
    methods = dict(_method(text) for text in arguments.method or [f"alone={ALONE}", "distilled="])
    root = arguments.output or Path("runs") / Path(arguments.gin[-1]).stem
    common = [*arguments.set_all, *([] if arguments.device is None else [f"Trainer.device = {arguments.device!r}"])]
    bindings = [*common, *arguments.set]
    workers = arguments.workers or os.cpu_count() or 1

    lead = f"Students: mean and standard deviation of {arguments.seeds} seeds, in percent."
    if arguments.teacher:
        folder = root / "teacher"
        train([Training("teacher", train_command([arguments.teacher], common), folder)], workers)
        bindings.append(f"TEACHER_WEIGHTS = {str(_weights(folder))!r}")
        teacher = read_run(folder, "teacher").results
        lead = f"Teacher {teacher['student']}: {teacher['final'][teacher['score']]:.2f} {teacher['score']}. {lead}"

    students = {(method, seed): root / method.replace(" + ", "_") / f"seed{seed}" for seed in range(arguments.seeds) for method in methods}
    trainings = []
    for (method, seed), folder in students.items():
        files, changes = methods[method]
        command = [*train_command([*arguments.gin, *files], [*bindings, *changes]), "--seed", str(seed)]
        trainings.append(Training(f"{method}, seed {seed}", command, folder))
    train(trainings, workers)

    runs = [read_run(students[method, seed], method, seed) for method in methods for seed in range(arguments.seeds)]
    metric, baseline = runs[0].results["score"], next(iter(methods))
    table = compare(runs, baseline=baseline, metric=metric)
    pictures = _pictures(arguments.gin, bindings, {method: students[method, 0] for method in methods}) if can_draw() else []
    title = Path(arguments.gin[-1]).stem
    page = write_comparison(root / "report.html", runs, baseline=baseline, title=title, lead=lead, metric=metric, sections=pictures)
    for name, text in (("table.md", table.to_markdown()), ("table.csv", table.to_csv())):
        (root / name).write_text(text)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table.to_rich(lead, width=console.width))
    print(f"{time.perf_counter() - begin:.0f} s in all. Report: {page}; every run has a folder and a report of its own in {root}")


def train(trainings: Sequence[Training], workers: int) -> None:
    """Runs trainings, each in a process of its own with one thread, with a line when one starts and ends and whenever an epoch is over.

    What is done is kept, and an interrupted training goes on from its checkpoint the next time.

    Raises:
        UserError: If a training fails.
        Interrupted: If a signal asked to stop.
    """
    from gkd.engine.interrupt import Interrupted, Interrupts
    from gkd.sweep.cells import POLL, Job

    waiting, running, progress = list(trainings), dict[str, Job](), dict[str, str]()
    names = {str(training.folder): training.name for training in trainings}
    with Interrupts() as interrupts:
        try:
            while waiting or running:
                if interrupts.signum is not None:
                    raise Interrupted(interrupts.signum, "Interrupted; what is done is kept. Go on with the same command.")
                while waiting and len(running) < workers:
                    training = waiting.pop(0)
                    running[str(training.folder)] = Job(training.command, training.folder, " ".join(training.command), threads=1)
                for folder, job in list(running.items()):
                    line = job.last_line()
                    if line.startswith("epoch ") and line != progress.get(folder):
                        progress[folder] = line
                        print(f"{names[folder]}: {line}", flush=True)
                    outcome = job.outcome()
                    if outcome is not None:
                        del running[folder]
                        if outcome.results is None:
                            raise UserError(f"Expected the training of {names[folder]} to end well (got: {outcome.error}; see {folder})")
                time.sleep(POLL)
        finally:
            for job in running.values():
                job.stop()


def _method(text: str) -> tuple[str, tuple[list[str], list[str]]]:
    """Name, gin files and bindings of a method."""
    name, separator, changes = text.partition("=")
    if not name.strip() or not separator:
        raise UserError(f"Expected --method NAME=CHANGES, such as 'KD=gin/methods/kd.gin' (got {text!r})")
    parts = [part.strip() for part in changes.split(";") if part.strip()]
    return name.strip(), ([part for part in parts if part.endswith(".gin")], [part for part in parts if not part.endswith(".gin")])


def _weights(folder: Path) -> Path:
    """The teacher's file: in its library's own format where there is one."""
    from gkd.engine.folder import RunFolder

    library = folder / "student.pth"
    return library if library.is_file() else RunFolder(folder).student


def _pictures(files: Sequence[str], bindings: Sequence[str], students: Mapping[str, Path]) -> list[str]:
    """What the task shows of its students side by side."""
    from gkd.config import configure
    from gkd.engine.folder import RunFolder
    from gkd.tasks import Task

    config = configure(files, bindings)
    task: Task = config.build(config.root(Task))
    return task.comparison({method: RunFolder(folder).student for method, folder in students.items()})
