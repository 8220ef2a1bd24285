"""Runs an ablation, cell by cell, and compares: python projects/ablation/sweep.py --gin gin/ablation/graph_construction.gin"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gkd.cli.main import run as run_command
from gkd.config import configure
from gkd.engine.folder import save_student
from gkd.files import write_atomic
from gkd.sweep.cells import Job, make_teacher, work
from gkd.sweep.points import Cell, Plan, Point, Sweep
from gkd.sweep.study import Record, Study
from gkd.viz import draw_heatmap, page
from gkd.viz.comparison import write_comparison
from gkd.viz.report import read_metrics
from gkd.viz.style import can_draw, figure_to_svg
from gkd.viz.table import Run, compare

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """The command lines of a sweep's cells, and of its teacher.

    Args:
        sweep: The sweep.
        bindings: Further bindings of all of them.
    """

    def __init__(self, sweep: Sweep, bindings: Sequence[str]) -> None:
        self.sweep, self.further = sweep, list(bindings)

    def files(self, point: Point) -> list[str]:
        return [*self.sweep.base, *point.files]

    def bindings(self, point: Point, seed: int, weights: Path) -> list[str]:
        sweep = self.sweep
        teacher = [f"{sweep.teacher_macro} = {str(weights)!r}"] if sweep.teacher else []
        return [*sweep.bindings, *self.further, *teacher, *point.bindings, f"{sweep.root}.seed = {seed}"]

    def train(self, point: Point, seed: int) -> list[str]:
        command = self._command(self.files(point), self.bindings(point, seed, self.sweep.teacher_weights))
        return command if self.sweep.reports else [*command, "--no-report"]

    def train_teacher(self) -> list[str]:
        return self._command(self.sweep.teacher, [line for line in self.further if line.startswith("Trainer.device")])

    def _command(self, files: Sequence[str], bindings: Sequence[str]) -> list[str]:
        options = [option for file in files for option in ("--gin", file)] + [option for line in bindings for option in ("--set", line)]
        return [sys.executable, str(ROOT / self.sweep.program), *options]


def plan_cells(commands: Commands, study: Study) -> Plan:
    """Builds everything that every cell is made of, once, before anything is trained.

    A cell is known by its operative configuration, in which the path of a teacher that the sweep makes does not count: it may differ from
    machine to machine.
    """
    sweep = commands.sweep
    with tempfile.TemporaryDirectory() as folder:
        weights = sweep.teacher_weights
        if sweep.teacher and not weights.is_file():  # untrained, in place of the one to come
            task = configure(sweep.teacher, [line for line in commands.further if line.startswith("Trainer.device")]).build(sweep.root)
            weights = Path(folder) / weights.name
            save_student(weights, task.student, task.description_of_student())

        def describe(point: Point) -> str:
            at = weights if weights.is_file() else sweep.teacher_weights  # points that a sampler chooses come when the teacher is there
            config = configure(commands.files(point), commands.bindings(point, 0, at))
            config.build(sweep.root)
            # The value and the lines that it goes on in: a path may be long.
            place = rf"(?m)^{re.escape(sweep.teacher_macro)} =.*(?:\n .*)*"
            return re.sub(place, f"{sweep.teacher_macro} = THE TEACHER", config.text) if sweep.teacher else config.text

        return Plan(sweep, study, describe)


def run(arguments: argparse.Namespace) -> int:
    bindings = list(arguments.set)
    if arguments.device is not None:
        bindings.append(f"Trainer.device = {arguments.device!r}")
    own = [line for line in bindings if line.startswith("Sweep.")]
    sweep: Sweep = configure(arguments.gin, own).build("Sweep")
    name = Path(arguments.gin[-1]).stem
    output = arguments.output or Path("runs/ablation") / name
    output.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.storage or f"sqlite:///{output / 'sweep.db'}", name)
    ignored = [record.number for record in study.records().values() if record.error is not None] if arguments.retry_failed else []

    commands = Commands(sweep, [line for line in bindings if line not in own])
    plan = plan_cells(commands, study)
    workers = sweep.workers or default_workers(sweep.threads, arguments.device)
    done = sum(cell.key in study.records(ignored) for cell in plan.cells())
    print(f"{len(plan.points)} points x {len(sweep.seeds)} seeds, {done} cells done before, {workers} at a time; {study.url}", flush=True)
    if sweep.teacher:
        make_teacher(study, sweep.teacher_weights, commands.train_teacher(), sweep.threads, say)

    def launch(cell: Cell) -> Job:
        about = {"label": cell.point.label, "values": dict(cell.point.values), "seed": cell.seed}
        return Job(commands.train(cell.point, cell.seed), output / "cells" / cell.name, cell.key, sweep.threads, about)

    records = work(plan, study, launch, workers, ignored, say)
    return report(plan, records, output, name)


def report(plan: Plan, records: Mapping[str, Record], output: Path, name: str) -> int:
    """Writes and prints what was found; returns the number of cells that failed."""
    sweep, cells = plan.sweep, plan.cells()
    runs, failed, kept = [], [], []
    for cell in sorted(cells, key=lambda cell: plan.points.index(cell.point)):
        record = records[cell.key]
        runs.append(Run(cell.point.label, cell.seed, record.results or {}, read_metrics(output / "cells" / cell.name / "metrics.jsonl")))
        if record.error is not None:
            failed.append(f"{cell.point.label}, seed {cell.seed}: {record.error}")
        about = {"label": cell.point.label, "values": cell.point.values, "seed": cell.seed, "folder": f"cells/{cell.name}"}
        kept.append({**about, "results": record.results, "error": record.error})
    comparison = compare(runs, sweep.baseline, sweep.metric)
    problems = "".join(f"\n* {line}" for line in failed)
    markdown = comparison.to_markdown() + (f"\nFailed:\n{problems}\n" if failed else "")
    for file, text in (("table.csv", comparison.to_csv()), ("table.md", markdown), ("results.json", json.dumps(kept, indent=2))):
        write_atomic(output / file, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
    sections = [
        page.section("Failed cells", page.code("\n".join(failed)) if failed else ""),
        page.section("Axes", *heatmaps(plan, records)),
    ]
    lead = f"{len(plan.points)} points x {len(sweep.seeds)} seeds of {', '.join(sweep.base)}"
    write_comparison(output / "report.html", runs, sweep.baseline, name, lead, sweep.metric, sections)

    from rich.console import Console

    print()
    Console(width=None if sys.stdout.isatty() else 200).print(comparison.to_rich(name))
    for line in failed:
        print(f"failed: {line}")
    print(f"Wrote {output / 'table.csv'}, table.md, results.json and report.html; every cell has its folder in {output / 'cells'}")
    return len(failed)


def heatmaps(plan: Plan, records: Mapping[str, Record]) -> Iterator[str]:
    """A map for every two axes: the mean over the seeds and over the values of all further axes."""
    if not can_draw():
        return
    metric, values = plan.sweep.metric, plan.sweep.values
    scores: list[tuple[Mapping[str, str], float]] = [
        (covered, record.results["final"][metric])
        for cell in plan.cells()
        if (record := records[cell.key]).results is not None
        for covered in cell.point.covers
    ]

    def mean(setting: Mapping[str, str]) -> float | None:
        found = [score for covered, score in scores if setting.items() <= covered.items()]
        return statistics.fmean(found) if found else None

    varied = [axis for axis in values if len(values[axis]) > 1]
    for number, (first, second) in enumerate(itertools.combinations(varied, 2)):
        table = [[mean({first: row, second: column}) for column in values[second]] for row in values[first]]
        figure = draw_heatmap(table, values[first], values[second], first, second, f"{metric}, last epoch")
        further = ", ".join(axis for axis in varied if axis not in (first, second))
        caption = "Mean over the seeds" + (f" and over {further}." if further else ".") + " Blank: no result."
        yield page.captioned(figure_to_svg(figure, f"{metric} by {first} and {second}", f"-axes{number}"), caption)


def default_workers(threads: int, device: str | None) -> int:
    """One cell at a time on a GPU; without one as many as the cores allow."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
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
    return run_command(parser, lambda arguments: int(run(arguments) > 0), argv)


if __name__ == "__main__":
    sys.exit(main())
