"""What a sweep compares: a base run, axes, seeds; the points of their grid and the cells, each a run of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from gkd.errors import UserError
from gkd.sweep.study import Outcome, Sampler, Study

__all__ = ["Sweep"]

Choice = str | Sequence[str]
Split = Literal["val", "test"]
TEACHER_WEIGHTS = "runs/ablation/teacher/student.safetensors"


@dataclass(frozen=True)
class Point:
    """One setting of everything that is varied, whatever the seed.

    Attributes:
        label: What it is called in the table.
        values: By axis; without the axes that make no difference here. Empty for a reference.
        files: Further gin files, after those of the base.
        bindings: Further bindings, after those of the sweep.
        covers: The points of the grid that are the same run, by axis.
    """

    label: str
    values: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    covers: tuple[Mapping[str, str], ...] = ()


class Cell(NamedTuple):
    """One run: a point and a seed.

    Attributes:
        point: The setting.
        seed: The seed.
        key: The same for the same configuration and seed, in every process and on every machine.
        name: Of its run folder, below that of the sweep.
    """

    point: Point
    seed: int
    key: str
    name: str


class Sweep:
    """An ablation: a base run of which something is changed, in all combinations, with several seeds.

    An axis is one of two things::

        Sweep.axes = {
            'edges': {'kNN': 'GraphBuilder.edges = @KNNEdges()', 'complete': 'GraphBuilder.edges = @CompleteEdges()'},
            'KNNEdges.k': (2, 4, 8),
        }

    A name with a choice for each value, which is a binding, a gin file to include (``.gin``), several of either, or nothing (``()``); or a
    binding with its values. Axes are applied in their order, so a later one may replace what an earlier one has bound. Combinations that
    turn out to be the same run, such as all k of a complete graph, are one point.

    Args:
        base: Gin files of the run that is varied.
        axes: What is varied, and how.
        bindings: Bindings of all cells, references too.
        references: Points beside the grid, each a choice as above: the student alone, say.
        baseline: Label of the point that the others are compared with.
        seeds: Seeds of every point.
        sampler: ``'grid'`` for all combinations; ``'random'`` or ``'tpe'`` for some of them, chosen by Optuna.
        trials: Number of points that a sampler chooses.
        metric: What is compared, in per cent, and what ``'tpe'`` looks for the highest of.
        split: Images that the metric is of: ``'test'``, or ``'val'``, those that the base's data hold out. None: ``'val'`` for a sampler
            that chooses, ``'test'`` for a grid, which shows.
        teacher: Gin files of the training that makes the teacher, where the base has one that can be made. It runs once.
        teacher_weights: Where that teacher is or goes; a folder of its own, which several sweeps may share. By default
            ``runs/ablation/teacher/student.safetensors``.
        teacher_macro: Name by which the base calls the teacher's weights.
        workers: Cells that run at a time; None for one on a GPU, and for as many as there are cores divided by `threads` without.
        threads: Threads of a cell on the CPU.
        reports: Whether every cell draws its ``report.html``, a quarter of its time where trainings are as short as on digits.

    Raises:
        ValueError: If an argument is malformed.

    Examples:
        >>> sweep = Sweep("run.gin", axes={"Trainer.epochs": (1, 2)}, references={"alone": "gin/base/alone.gin"})
        >>> [point.label for point in sweep.grid()]
        ['alone', 'epochs 1', 'epochs 2']
    """

    def __init__(
        self,
        base: Choice,
        axes: Mapping[str, Mapping[str, Choice] | Sequence[Any]] | None = None,
        bindings: Choice = (),
        references: Mapping[str, Choice] | None = None,
        baseline: str | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        sampler: Sampler = "grid",
        trials: int | None = None,
        metric: str = "top1",
        split: Split | None = None,
        teacher: Choice = (),
        teacher_weights: str | None = None,
        teacher_macro: str = "TEACHER_WEIGHTS",
        workers: int | None = None,
        threads: int = 1,
        reports: bool = True,
    ) -> None:
        self.base, self.bindings, self.teacher = _several(base), _several(bindings), _several(teacher)
        self.axes = {name: _choices(name, values) for name, values in (axes or {}).items()}
        self.references = dict(references or {})
        self.baseline, self.seeds, self.sampler, self.trials = baseline, tuple(seeds), sampler, trials
        self.metric = metric
        self.split: Split = split or ("test" if sampler == "grid" else "val")
        if teacher_weights is not None and not self.teacher:
            raise ValueError(f"Expected teacher, the gin files that train {teacher_weights}, beside teacher_weights (got none)")
        self.teacher_weights, self.teacher_macro = Path(teacher_weights or TEACHER_WEIGHTS), teacher_macro
        self.workers, self.threads, self.reports = workers, threads, reports
        if not self.base:
            raise ValueError("Expected at least one gin file as the base (got none)")
        if not self.axes and not self.references:
            raise ValueError("Expected at least one axis or reference (got none)")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"Expected at least one seed, and none twice (got {self.seeds})")
        if sampler not in get_args(Sampler):
            raise ValueError(f"Expected the sampler {', '.join(map(repr, get_args(Sampler)))} (got {sampler!r})")
        if (sampler == "grid") != (trials is None):
            raise ValueError(f"Expected a number of trials for a sampler that chooses, and none for 'grid' (got {sampler!r} and {trials})")
        if self.split not in get_args(Split):
            raise ValueError(f"Expected the split {' or '.join(map(repr, get_args(Split)))} (got {split!r})")
        for name, count in (("trials", trials), ("workers", workers), ("threads", threads)):
            if count is not None and count < 1:
                raise ValueError(f"Expected {name} to be at least 1 (got {count})")

    @property
    def values(self) -> dict[str, list[str]]:
        """The values of every axis, as they are called."""
        return {axis: list(choices) for axis, choices in self.axes.items()}

    @property
    def constant(self) -> set[str]:
        """Axes of one value, which hold what the references do not have; they are left out of the labels."""
        return {axis for axis, choices in self.axes.items() if len(choices) == 1}

    def judged(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What results.json holds, with the evaluations of the sweep's split as ``final`` and ``best``."""
        return {**results, **results.get("val", {"final": None, "best": None})} if self.split == "val" else dict(results)

    def point(self, values: Mapping[str, str]) -> Point:
        """The point with these values on the axes."""
        chosen = [part for axis, choices in self.axes.items() for part in choices[values[axis]]]
        files, bindings = _split(chosen)
        return Point(_label(values, self.constant), dict(values), files, bindings, (dict(values),))

    def reference_points(self) -> list[Point]:
        """The points beside the grid."""
        return [Point(label, {}, *_split(_several(choice))) for label, choice in self.references.items()]

    def grid(self) -> list[Point]:
        """The references and all combinations of the axes."""
        combinations = itertools.product(*self.values.values()) if self.axes else ()
        return [*self.reference_points(), *(self.point(dict(zip(self.axes, values, strict=True))) for values in combinations)]

    def samples(self) -> list[Point]:
        """The references, and points among which every value of every axis is."""
        first = {axis: values[0] for axis, values in self.values.items()}
        varied = [{**first, axis: value} for axis, values in self.values.items() for value in values]
        return [*self.reference_points(), *map(self.point, {tuple(values.items()): values for values in varied}.values())]


class Plan:
    """The cells of a sweep, all of them at once or, with a sampler, a few more whenever the known ones are done.

    Args:
        sweep: The sweep.
        study: Where a sampler's points are kept; a grid needs none.
        describe: Gives the complete configuration of a point as text, the same on every machine.

    Raises:
        UserError: If a point cannot be configured, or the baseline is none of them.
    """

    def __init__(self, sweep: Sweep, study: Study | None, describe: Callable[[Point], str]) -> None:
        self.sweep, self.study, self._describe = sweep, study, describe
        checked = sweep.grid() if sweep.sampler == "grid" else sweep.samples()
        texts = [self._checked(point) for point in checked]
        if sweep.sampler != "grid":
            kept = [(point, text) for point, text in zip(checked, texts, strict=True) if not point.values]
            checked, texts = [point for point, _ in kept], [text for _, text in kept]
        self._points = merge(checked, texts, sweep.constant)
        self._sampled: list[tuple[Point, str]] = []
        self._proposed = 0
        labels = [point.label for point, _ in self._points]
        if sweep.baseline is not None and sweep.baseline not in labels:
            raise UserError(f"Expected Sweep.baseline to be one of {', '.join(map(repr, labels))} (got {sweep.baseline!r})")

    @property
    def points(self) -> list[Point]:
        """What has been planned so far."""
        return [point for point, _ in [*self._points, *self._sampled]]

    def cells(self) -> list[Cell]:
        """What has been planned so far: the first seed of every point, then the second."""
        numbered = [*self._points, *self._sampled]
        names: dict[str, int] = {}
        cells = []
        for seed in self.sweep.seeds:
            for point, text in numbered:
                key = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}/{seed}"
                name = f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', point.label).strip('_.') or 'base'}/seed{seed}"
                names[name] = names.get(name, 0) + 1
                if names[name] > 1:
                    name = f"{name}_{key[:6]}"
                cells.append(Cell(point, seed, key, name))
        return cells

    def extend(self, outcomes: Mapping[str, Outcome]) -> bool:
        """Lets the sampler choose one more point, if it is one's turn; returns whether there may be more to do than before."""
        sweep = self.sweep
        if self.study is None or sweep.trials is None:  # a grid is planned at once
            return False
        proposed = self.study.points()
        if len(proposed) <= self._proposed:
            added = self.study.propose(sweep.values, sweep.sampler, sweep.trials, self._scores(outcomes))
            proposed = self.study.points()
            if not added and len(proposed) <= self._proposed:
                return len(proposed) < sweep.trials  # another process is about it
        for values in proposed[self._proposed :]:
            if all(values.get(axis) in sweep.axes[axis] for axis in sweep.axes):  # else of a file that has changed since
                self._add(sweep.point(values))
        self._proposed = len(proposed)
        return True

    def _add(self, point: Point) -> None:
        try:
            text = self._describe(point)
        except UserError:  # a combination that does not go together: its run says so, and is a failed one
            text = repr(point)
        if text not in [planned for _, planned in [*self._points, *self._sampled]]:
            self._sampled.append((point, text))

    def _scores(self, outcomes: Mapping[str, Outcome]) -> dict[tuple[str, ...], float]:
        """Mean over the seeds of every point that has results."""
        scores: dict[tuple[str, ...], list[float]] = {}
        for cell in self.cells():
            outcome = outcomes.get(cell.key)
            if outcome is not None and outcome.results is not None and cell.point.values:
                scores.setdefault(tuple(cell.point.values.values()), []).append(outcome.results["final"][self.sweep.metric])
        return {values: statistics.fmean(of_seeds) for values, of_seeds in scores.items()}

    def _checked(self, point: Point) -> str:
        try:
            return self._describe(point)
        except UserError as error:
            raise UserError(f"In the cell '{point.label}' of the sweep: {error}") from error


def merge(points: Sequence[Point], texts: Sequence[str], constant: Collection[str] = ()) -> list[tuple[Point, str]]:
    """Joins points whose configurations are the same; what they have not in common makes no difference and leaves their label.

    Args:
        points: The points.
        texts: Their configurations.
        constant: Axes that are left out of the labels.
    """
    same: dict[str, list[Point]] = {}
    for point, text in zip(points, texts, strict=True):
        same.setdefault(text, []).append(point)
    merged = []
    for text, group in same.items():
        first = group[0]
        values = {axis: value for axis, value in first.values.items() if all(other.values.get(axis) == value for other in group)}
        label = first.label if len(group) == 1 or not first.values else _label(values, constant) or first.label
        covers = tuple(values for point in group for values in point.covers)
        merged.append((replace(first, label=label, values=values, covers=covers), text))
    labels = [point.label for point, _ in merged]
    return [
        (replace(point, label=_label(point.covers[0], ())) if labels.count(point.label) > 1 and point.covers else point, text)
        for point, text in merged
    ]


def _label(values: Mapping[str, str], constant: Collection[str]) -> str:
    return ", ".join(value for axis, value in values.items() if axis not in constant) or ", ".join(values.values())


def _several(choice: Choice) -> tuple[str, ...]:
    return (choice,) if isinstance(choice, str) else tuple(choice)


def _split(parts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files and bindings."""
    return tuple(part for part in parts if part.endswith(".gin")), tuple(part for part in parts if not part.endswith(".gin"))


def _choices(name: str, values: Mapping[str, Choice] | Sequence[Any]) -> dict[str, tuple[str, ...]]:
    if isinstance(values, str) or not values:
        raise ValueError(f"Expected values of the axis {name!r}, as a dictionary or a tuple (got {values!r})")
    if isinstance(values, Mapping):
        return {str(label): _several(choice) for label, choice in values.items()}
    return {f"{name.rsplit('.', 1)[-1]} {value}": (f"{name} = {value!r}",) for value in values}
