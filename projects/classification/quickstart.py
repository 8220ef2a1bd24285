"""Trains a teacher, then its student alone, with KD and with graphs, several seeds each, and prints one table."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gkd.engine import cli
from gkd.engine.checkpoint import write_atomic
from gkd.engine.run import RunFolder
from gkd.errors import UserError

TEACHER = "gin/classification/digits_teacher.gin"
METHODS = {"alone": ["gin/base/alone.gin"], "KD": ["gin/methods/kd.gin"], "graph + KD": []}
COLUMNS = ("student", "last top-1", "best top-1", "agreement", "seconds")


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
    sys.stdout = sys.__stdout__
    if results is None:
        raise UserError("Expected every run to reach its end (got Trainer.max_steps)")
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
    jobs = {}
    workers = min(os.cpu_count() or 1, len(METHODS) * arguments.seeds)
    print(f"Training {len(METHODS)} x {arguments.seeds} students, {workers} at a time", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for method, files in METHODS.items():
            for seed in range(arguments.seeds):
                output = root / method.replace(" + ", "_") / f"seed{seed}"
                bindings = [*arguments.set, *device, weights, f"Classification.seed = {seed}"]
                jobs[method, seed] = pool.submit(
                    train, [*arguments.gin, *files], bindings, output, root / "logs" / f"{output.parent.name}_{seed}.txt"
                )
        results = {key: job.result() for key, job in jobs.items()}

    rows = [summarize(method, [results[method, seed] for seed in range(arguments.seeds)]) for method in METHODS]
    top1 = teacher["final"]["top1"]
    head = f"Teacher {teacher['student']}: {top1:.2f} %. Mean and standard deviation of {arguments.seeds} seeds, in percent."
    table = format_table(head, rows)
    write_atomic(root / "table.md", lambda file: file.write(table.encode()))
    report = {"teacher": teacher, "runs": [{"method": method, **result} for (method, _), result in results.items()]}
    write_atomic(root / "results.json", lambda file: file.write(json.dumps(report, indent=2).encode()))
    print(f"\n{table}\n{time.perf_counter() - begin:.0f} s in all. Report: {root / 'table.md'}; every run has its own folder in {root}")


def summarize(method: str, results: Sequence[dict[str, Any]]) -> list[str]:
    def spread(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"

    numbers = [
        spread([result[which][name] for result in results]) for which, name in (("final", "top1"), ("best", "top1"), ("final", "agreement"))
    ]
    return [method, *numbers, f"{statistics.fmean(result['seconds'] for result in results):.1f}"]


def format_table(head: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [COLUMNS, ["-" * width for width in widths], *rows]
    return (
        head
        + "\n\n"
        + "".join("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |\n" for line in lines)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the pair")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding for every student")
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/quickstart/classification)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.main(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
