"""Predicts with a run's student: classes, boxes or masks of images, as predictions.json and as pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import UserError

if TYPE_CHECKING:
    from gkd.tasks.predictors import Predictor

BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a student.safetensors")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders of images")
    parser.add_argument("--output", type=Path, help="folder of predictions.json and pictures (default: predictions in the run folder)")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detected object; 0 keeps all (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--trust", action="store_true", help="build the network even where the file names a function of one's own")


def run(arguments: argparse.Namespace) -> None:
    """Predicts and writes what it says."""
    from gkd.files import to_json, write_atomic

    if not 0 <= arguments.score <= 1:
        raise UserError(f"Expected --score between 0 and 1 (got {arguments.score})")
    student = arguments.run.expanduser()
    student = student / "student.safetensors" if student.is_dir() else student
    images = dict(_images(arguments.images))
    predictor = open_predictor(student, arguments.device, arguments.trust)
    output = (arguments.output or student.parent / "predictions").expanduser()
    records, unreadable = predict(predictor, images, output, arguments.score)
    for name, reason in unreadable.items():
        print(f"left out, it cannot be read: {name}: {reason}", file=sys.stderr)
    if len(unreadable) == len(images):
        raise UserError(f"Expected images that can be read (got {len(images)} that cannot)")
    path = output / "predictions.json"
    write_atomic(path, lambda file: file.write((to_json(records, indent=1) + "\n").encode()))
    print(f"Wrote {path} and pictures of {len(images) - len(unreadable)} images to {output}")


def open_predictor(student: Path, device: str, trust: bool) -> Predictor:
    """The predictor that the student's file asks for."""
    import torch

    import gkd.tasks
    from gkd.engine.folder import read_description
    from gkd.engine.settings import resolve_device

    if not student.is_file():
        raise UserError(f"Expected a student at {student} (got no such file). Give the folder of a run that has ended.")
    kind, index = resolve_device(device)
    name = read_description(student).get("task")
    task = getattr(gkd.tasks, str(name), None)
    if name not in gkd.tasks.__all__ or not (isinstance(task, type) and issubclass(task, gkd.tasks.Task)):
        raise UserError(f"Expected a student that gkd wrote at {student} (got {name or 'weights without a description'})")
    return task.predictor(student, torch.device(kind if index is None else f"{kind}:{index}"), trust)


def predict(predictor: Predictor, images: dict[str, Path], output: Path, score: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Predicts image by image and writes the pictures.

    Returns:
        What predictions.json holds, and why images are left out, by their names.
    """
    from rich.console import Console
    from rich.progress import track

    from gkd.data.images import read_image

    records: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    numbered = list(enumerate(images.items()))
    batches = [numbered[start : start + BATCH] for start in range(0, len(numbered), BATCH)]
    for batch in track(batches, "Predicting", console=Console(stderr=True), transient=True):
        readable = []
        for number, (name, path) in batch:
            try:
                readable.append((number, name, path, read_image(path)))
            except (OSError, ValueError) as error:
                unreadable[str(path)] = str(error) or type(error).__name__
        predictions = predictor([image for *_, image in readable]) if readable else []
        for (number, name, path, image), prediction in zip(readable, predictions, strict=True):
            records += [{"file_name": str(path), **record} for record in predictor.records(prediction, number, name, score)]
            for folder, picture in predictor.pictures(image, prediction, score).items():
                target = output / folder / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
    return records, unreadable


def _images(places: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Names, each its own, and paths of the images."""
    from gkd.data.images import image_files

    names: set[str] = set()
    for place in places:
        root = place.expanduser()
        if not root.exists():
            raise UserError(f"Expected an image or a folder of images at {root} (got nothing there)")
        files = image_files(root) if root.is_dir() else [root]
        if not files:
            raise UserError(f"Expected images in the folder {root} (got none)")
        for path in files:
            stem = (path.relative_to(root) if root.is_dir() else Path(path.name)).with_suffix("").as_posix()
            name, number = stem, 1
            while name in names:
                number += 1
                name = f"{stem}_{number}"
            names.add(name)
            yield name, path
