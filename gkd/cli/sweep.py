"""Runs an ablation, cell by cell, and compares: gkd sweep --gin gin/ablation/graph_construction.gin"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gkd.errors import UserError

if TYPE_CHECKING:
    from gkd.sweep import Sweep
    from gkd.sweep.cells import Job
    from gkd.sweep.commands import Commands
    from gkd.sweep.points import Cell, Plan, Point
    from gkd.sweep.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the ablation")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="BINDING",
        help="one more binding: of the sweep, 'Sweep.seeds = (0,)', or of all cells",
    )
    parser.add_argument("--output", type=Path, help="folder of the sweep (default: runs/ablation/ and the name of the last --gin file)")
    parser.add_argument("--storage", metavar="URL", help="database of the results (default: sweep.db in the folder)")
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    parser.add_argument("--device", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> int:
    """Runs what is left of the sweep and reports; returns 1 where a cell failed."""
    from gkd.config import configure
    from gkd.sweep.cells import Job, make_teacher, work
    from gkd.sweep.commands import Commands
    from gkd.sweep.report import write_report
    from gkd.sweep.study import Study

    bindings = list(arguments.set)
    if arguments.device is not None:
        bindings.append(f"Trainer.device = {arguments.device!r}")
    of_sweep = [line for line in bindings if line.startswith("Sweep.")]
    sweep: Sweep = configure(arguments.gin, of_sweep).build("Sweep")
    name = Path(arguments.gin[-1]).stem
    output = arguments.output or Path("runs/ablation") / name
    output.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.storage or f"sqlite:///{output / 'sweep.db'}", name)
    failed_before = {outcome.number for outcome in study.outcomes().values() if outcome.error is not None}
    ignored = failed_before if arguments.retry_failed else set()

    commands = Commands(sweep, [line for line in bindings if line not in of_sweep])
    plan = plan_cells(commands, study)
    workers = sweep.workers or default_workers(sweep.threads, arguments.device)
    done = sum(cell.key in study.outcomes(ignored) for cell in plan.cells())
    say(f"{len(plan.points)} points x {len(sweep.seeds)} seeds, {done} cells done before, {workers} at a time; {study.url}")
    if sweep.teacher:
        make_teacher(study, sweep.teacher_weights, commands.train_teacher(), sweep.threads, say)

    def launch(cell: Cell) -> Job:
        about = {"label": cell.point.label, "values": dict(cell.point.values), "seed": cell.seed}
        return Job(commands.train(cell.point, cell.seed), output / "cells" / cell.name, cell.key, sweep.threads, about)

    outcomes = work(plan, study, launch, workers, ignored, say)
    return int(write_report(plan, outcomes, output, name) > 0)


def plan_cells(commands: Commands, study: Study | None) -> Plan:
    """Builds everything that every cell is made of, once, before anything is trained.

    A cell is known by its operative configuration, in which the path of a teacher that the sweep makes does not count: it may differ from
    machine to machine.
    """
    from gkd.config import configure
    from gkd.engine.folder import save_student
    from gkd.sweep.points import Plan
    from gkd.tasks import Task

    sweep = commands.sweep
    with tempfile.TemporaryDirectory() as folder:
        weights = sweep.teacher_weights
        if sweep.teacher and not weights.is_file():  # untrained, in place of the one to come
            config = configure(sweep.teacher, commands.of_teacher)
            task = config.build(config.root(Task))
            weights = Path(folder) / weights.name
            save_student(weights, task.student, task.description_of_student())

        def describe(point: Point) -> str:
            at = weights if weights.is_file() else sweep.teacher_weights  # points that a sampler chooses come when the teacher is there
            config = configure(commands.files(point), commands.bindings(point, at))
            task = config.build(config.root(Task))
            if sweep.split == "val" and "val" not in task.splits:
                raise UserError(
                    f"Expected held-out images to choose on, for Sweep.sampler = {sweep.sampler!r} (got none): bind the data's holdout, or "
                    "Sweep.split = 'test'"
                )
            # The value and the lines that it goes on in: a path may be long.
            place = rf"(?m)^{re.escape(sweep.teacher_macro)} =.*(?:\n .*)*"
            return re.sub(place, f"{sweep.teacher_macro} = THE TEACHER", config.text) if sweep.teacher else config.text

        return Plan(sweep, study, describe)


def default_workers(threads: int, device: str | None) -> int:
    """One cell at a time on a GPU; without one as many as the cores allow."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)
