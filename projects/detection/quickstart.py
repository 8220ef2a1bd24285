"""Trains a detector, then its student alone and distilled, several seeds each; prints one table and draws what they find."""

from __future__ import annotations

import argparse
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

from rich.console import Console
from rich.table import Table

from gkd.config import MODULES, configure
from gkd.engine import cli
from gkd.engine.checkpoint import write_atomic
from gkd.engine.run import RunFolder
from gkd.errors import UserError
from gkd.models.weights import load_weights

ALONE = "gin/base/alone.gin"
METHODS = {"alone": [ALONE], "distilled": []}
NUMBERS = ("AP", "AP50", "AP75")
LEAST_SCORE = 0.3  # of what is drawn


def build(files: Sequence[str], bindings: Sequence[str]) -> tuple[Any, str]:
    config = configure(files, bindings, (*MODULES, "gkd.detection", "gkd.detection.detectron2"))
    return config.build("Detection"), config.text


def train(files: Sequence[str], bindings: Sequence[str], output: Path, log: Path | None) -> dict[str, Any]:
    """One run in a process of its own, which one core is enough for."""
    import torch

    torch.set_num_threads(1)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout = log.open("w")
    task, text = build(files, bindings)
    folder = RunFolder(output)
    folder.prepare(overwrite=True)
    results = task.train(folder, text)
    if results is None:
        raise UserError("Expected every run to reach its end (got Trainer.max_steps)")
    sys.stdout = sys.__stdout__
    return results


def run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise UserError(f"Expected at least one seed (got {arguments.seeds})")
    root = arguments.output or Path("runs/quickstart/detection")
    given = [*arguments.set, *([] if arguments.device is None else [f"Trainer.device = {arguments.device!r}"])]
    begin = time.perf_counter()
    # The teacher is a student of nobody, with the teacher's backbone.
    to_teacher = [*given, "Detection.teacher = None", "student/DetectorNetwork.backbone = %TEACHER"]
    print("Training the teacher", flush=True)
    teacher = train([*arguments.gin, ALONE], to_teacher, root / "teacher", None)

    weights = f"TEACHER_WEIGHTS = {str(root / 'teacher' / 'student.pth')!r}"
    jobs = {}
    workers = min(os.cpu_count() or 1, len(METHODS) * arguments.seeds)
    print(f"Training {len(METHODS)} x {arguments.seeds} students, {workers} at a time", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed in range(arguments.seeds):
            for method, files in METHODS.items():
                output, log = root / method / f"seed{seed}", root / "logs" / f"{method}_{seed}.txt"
                bindings = [*given, weights, f"Detection.seed = {seed}"]
                jobs[method, seed] = pool.submit(train, [*arguments.gin, *files], bindings, output, log)
        results = {key: job.result() for key, job in jobs.items()}

    rows = {"teacher": [teacher["final"]]}
    rows |= {method: [results[method, seed]["final"] for seed in range(arguments.seeds)] for method in METHODS}
    cells = {name: [summary([record[number] for record in records]) for number in NUMBERS] for name, records in rows.items()}
    lines = ["| | " + " | ".join(NUMBERS) + " |", "|-" * (len(NUMBERS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]
    write_atomic(root / "table.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    table = Table("", *NUMBERS, title=f"Digit scenes, {arguments.seeds} seeds: mean and standard deviation, in percent")
    for name, values in cells.items():
        table.add_row(name, *values)
    Console().print(table)
    picture = draw(arguments.gin, [*given, weights], root)
    print(f"{time.perf_counter() - begin:.0f} s in all. Table: {root / 'table.md'}; pictures: {picture}; every run has a folder in {root}")


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> summary([1.0, 3.0])
    '2.00 +- 1.41'
    """
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw(files: Sequence[str], bindings: Sequence[str], root: Path, number: int = 6) -> Path | str:
    """Draws test scenes: the true boxes, and what teacher, student alone and distilled student find."""
    try:
        import matplotlib
    except ImportError:
        return "none, as matplotlib is not installed (pip install 'gkd[viz]')"
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    task, _ = build([*files, ALONE], bindings)
    images, targets, _ = next(iter(task.batches("test", number)))
    columns: dict[str, list[Any]] = {"truth": [(target["boxes"], target["labels"]) for target in targets]}
    columns["teacher"] = [kept(found) for found in task.teacher.detect(images)]
    for method in METHODS:
        load_weights(task.student, root / method / "seed0" / "student.safetensors")
        columns[method] = [kept(found) for found in task.detector.detect(images)]
    figure, axes = pyplot.subplots(len(images), len(columns), figsize=(2 * len(columns), 2 * len(images)), squeeze=False)
    for row, image in zip(axes, images, strict=True):
        for axis in row:
            axis.imshow(image.permute(1, 2, 0).cpu().numpy())
            axis.set_axis_off()
    for column, (name, found) in enumerate(columns.items()):
        axes[0, column].set_title(name)
        for row, (boxes, labels) in enumerate(found):
            for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                colour = "lime" if name == "truth" else "yellow"
                axes[row, column].add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour))
                axes[row, column].text(left, top, task.data.classes[label], color=colour, fontsize=8)
    path = root / "detections.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def kept(found: Any) -> tuple[Any, Any]:
    return found.boxes[found.scores >= LEAST_SCORE], found.labels[found.scores >= LEAST_SCORE]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="the pair")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding for every run")
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/quickstart/detection)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.main(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
