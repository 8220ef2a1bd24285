"""Trains a teacher, then its student alone, with KD and with graphs, several seeds each, and prints one table."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from gkd.cli.main import run as run_command
from gkd.engine.folder import RunFolder
from gkd.errors import UserError
from gkd.viz import compare, read_run, write_comparison, write_report

TEACHER = "gin/classification/digits_teacher.gin"
METHODS = {"alone": ["gin/base/alone.gin"], "KD": ["gin/methods/kd.gin"], "graph + KD": []}


def train(files: Sequence[str], bindings: Sequence[str], output: Path, log: Path | None) -> dict[str, Any]:
    """One run in a process of its own, which one core is enough for."""
    import torch

    from gkd.config import configure

    torch.set_num_threads(1)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout = log.open("w")
    config = configure(files, bindings)
    task = config.build("Classification")
    folder = RunFolder(output)
    folder.prepare(overwrite=True)
    results = task.train(folder, config.text)
    if results is None:
        raise UserError("Expected every run to reach its end (got Trainer.max_steps)")
    write_report(folder, task)
    sys.stdout = sys.__stdout__
    return results


def run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise UserError(f"Expected at least one seed (got {arguments.seeds})")
    root = arguments.output or Path("runs/quickstart/classification")
    device = [] if arguments.device is None else [f"Trainer.device = {arguments.device!r}"]
    begin = time.perf_counter()
    print(f"Training the teacher: {TEACHER}", flush=True)
    teacher = train([TEACHER], device, root / "teacher", None)

    weights = f"TEACHER_WEIGHTS = {str(root / 'teacher' / 'student.safetensors')!r}"
    jobs, folders = {}, {}
    workers = min(os.cpu_count() or 1, len(METHODS) * arguments.seeds)
    print(f"Training {len(METHODS)} x {arguments.seeds} students, {workers} at a time", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for method, files in METHODS.items():
            for seed in range(arguments.seeds):
                output = folders[method, seed] = root / method.replace(" + ", "_") / f"seed{seed}"
                bindings = [*arguments.set, *device, weights, f"Classification.seed = {seed}"]
                jobs[method, seed] = pool.submit(
                    train, [*arguments.gin, *files], bindings, output, root / "logs" / f"{output.parent.name}_{seed}.txt"
                )
        for job in jobs.values():
            job.result()

    runs = [read_run(folders[method, seed], method, seed) for method, seed in jobs]
    table = compare(runs, baseline="KD")
    top1 = teacher["final"]["top1"]
    head = f"Teacher {teacher['student']}: {top1:.2f} % top-1. Students: mean and standard deviation of {arguments.seeds} seeds."
    report = write_comparison(root / "report.html", runs, baseline="KD", title="Handwritten digits", lead=head)
    for name, text in (("table.md", table.to_markdown()), ("table.csv", table.to_csv())):
        (root / name).write_text(text)
    console = Console()
    console.print(table.to_rich(head, width=console.width))
    print(f"{time.perf_counter() - begin:.0f} s in all. Report: {report}; every run has a folder and a report of its own in {root}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the pair")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding for every student")
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/quickstart/classification)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", help="cpu or cuda")
    return run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
