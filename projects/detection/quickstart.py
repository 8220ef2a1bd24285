"""Trains a detector, then its student alone and distilled, several seeds each; prints one table and draws what they find."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console

from gkd.cli.main import run as run_command
from gkd.config import configure
from gkd.engine.folder import RunFolder
from gkd.errors import UserError
from gkd.models.weights import load_weights
from gkd.viz import compare, read_run, write_comparison, write_report
from gkd.viz.detections import draw_detections, kept
from gkd.viz.style import can_draw

TEACHER = "gin/detection/digit_scenes_teacher.gin"
ALONE = "gin/base/alone.gin"
NOBODY = "Detection.teacher = None"
METHODS = ("alone", "distilled")


def build(files: Sequence[str], bindings: Sequence[str]) -> tuple[Any, str]:
    config = configure(files, bindings)
    return config.build("Detection"), config.text


def train(files: Sequence[str], bindings: Sequence[str], output: Path, log: Path) -> dict[str, Any]:
    """One run in a process of its own, which one core is enough for."""
    import torch

    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stdout(file):
        task, text = build(files, bindings)
        folder = RunFolder(output)
        folder.prepare(overwrite=True)
        results = task.train(folder, text)
        if results is None:
            raise UserError("Expected every run to reach its end (got Trainer.max_steps)")
        write_report(folder, task)
    return results


def run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise UserError(f"Expected at least one seed (got {arguments.seeds})")
    root = arguments.output or Path("runs/quickstart/detection")
    given = [*arguments.set, *([] if arguments.device is None else [f"Trainer.device = {arguments.device!r}"])]
    begin = time.perf_counter()
    weights = f"TEACHER_WEIGHTS = {str(root / 'teacher' / 'student.pth')!r}"
    workers = min(os.cpu_count() or 1, len(METHODS) * arguments.seeds)
    print(f"Training a teacher and {len(METHODS)} x {arguments.seeds} students, {workers} at a time", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:

        def start(method: str, seed: int, files: Sequence[str], *bindings: str) -> Future[dict[str, Any]]:
            output = root / method / f"seed{seed}" if method in METHODS else root / method
            settings = [*given, f"Detection.seed = {seed}", *bindings]
            return pool.submit(train, files, settings, output, root / "logs" / f"{method}_{seed}.txt")

        teacher = start("teacher", 0, [arguments.teacher])
        # The students that learn alone need not wait for it.
        jobs = {("alone", seed): start("alone", seed, [*arguments.gin, ALONE], NOBODY) for seed in range(arguments.seeds)}
        final = teacher.result()["final"]
        metric = "AP" if "AP" in final else "AP50"  # Pascal VOC's
        print(f"Teacher: {final[metric]:.2f} {metric} after {time.perf_counter() - begin:.0f} s", flush=True)
        jobs |= {("distilled", seed): start("distilled", seed, arguments.gin, weights) for seed in range(arguments.seeds)}
        for job in jobs.values():
            job.result()

    runs = [read_run(root / method / f"seed{seed}", method, seed) for method, seed in jobs]
    table = compare(runs, baseline="alone", metric=metric)
    head = f"Teacher: {final[metric]:.2f} {metric}. Students: mean and standard deviation over the seeds ({arguments.seeds}), in percent."
    page = write_comparison(root / "report.html", runs, baseline="alone", title=Path(arguments.gin[0]).stem, lead=head, metric=metric)
    for name, text in (("table.md", table.to_markdown()), ("table.csv", table.to_csv())):
        (root / name).write_text(text)
    console = Console()
    console.print(table.to_rich(head, width=console.width))
    pictures = draw(arguments.gin, [*given, weights], root)
    print(
        f"{time.perf_counter() - begin:.0f} s in all. Report: {page}; pictures: {pictures}; every run has a folder and a report in {root}"
    )


def draw(files: Sequence[str], bindings: Sequence[str], root: Path, number: int = 6) -> Path | str:
    """Draws test scenes: the true boxes, and what teacher, student alone and distilled student find."""
    if not can_draw():
        return "none, as matplotlib is not installed (pip install 'gkd[viz]')"
    task, _ = build([*files, ALONE], bindings)
    images, targets, _ = next(iter(task.batches("test", number)))
    found = {"teacher": [kept(detections) for detections in task.teacher_detector.detect(images)]}
    for method in METHODS:
        load_weights(task.student, root / method / "seed0" / "student.safetensors")
        found[method] = [kept(detections) for detections in task.detector.detect(images)]
    path = root / "detections.png"
    draw_detections(images, targets, found, task.data.classes).savefig(path, dpi=110, facecolor="white")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the pair")
    parser.add_argument("--teacher", default=TEACHER, metavar="FILE", help="how the teacher is trained (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding for every run")
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/quickstart/detection)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", help="cpu or cuda")
    return run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
