"""Writes the report of a run again, with its pictures, from what its folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from gkd.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> None:
    """Builds the task that config.gin describes, gives it the run's student, and writes report.html."""
    from gkd.config import configure
    from gkd.engine import RunFolder
    from gkd.tasks import Task
    from gkd.viz import write_report

    folder = RunFolder(arguments.run.expanduser())
    if not folder.config.is_file():
        raise UserError(f"Expected the folder of a run at {folder.path} (got no {folder.config.name} there)")
    config = configure([folder.config.resolve()], [f"Trainer.device = {arguments.device!r}"])
    task = config.build(config.root(Task))
    task.load(folder)
    print(f"Wrote {write_report(folder, task)}")
