"""Learning curves: every loss term, the accuracies, and the means of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gkd.viz.style import INK, MUTED, SERIES, TEACHER, grid_of, styled, whole_ticks
from gkd.viz.table import Run, finite, methods_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]

TITLES = {"top1": "top-1", "top5": "top-5", "agreement": "agreement with the teacher"}
MOST_FIGURES = 4


def headline(record: Mapping[str, Any]) -> list[str]:
    """The first numbers of an evaluation, in per cent: what a task puts first is what it is judged by."""
    numbers = {name for name, value in record.items() if "/" not in name and finite(value) is not None}
    names = [name for name in record if name in numbers.difference(("epoch", "step", "loss"))]
    return names[:MOST_FIGURES]


@styled
def draw_losses(metrics: Metrics, steps_per_epoch: float | None = None) -> Figure:
    """Draws every loss term over the training, a panel for each term (or part of one) and a line for each stage.

    The losses are shown as they were added up, that is, weighted.

    Args:
        metrics: Records of a metrics.jsonl.
        steps_per_epoch: To count epochs; None counts steps.
    """
    train = [record for record in metrics if record.get("kind") == "train"]
    names = list(dict.fromkeys(name for record in train for name in record if name == "loss" or name.startswith("loss/")))
    stages = _stages(names)
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        parts = name.split("/")[1:]
        stage = next((part for part in parts[1:] if part in stages), "")
        title = " · ".join(part for part in parts if part != stage) or "sum of all"
        panels.setdefault(title, []).append((stage, name))
    if set(panels) == {"sum of all", "task"}:
        panels.pop("sum of all")  # it is the task's loss
    figure, axes = grid_of(max(len(panels), 1), 4, 2.3, 1.75)
    for panel, (title, lines) in zip(axes, panels.items(), strict=False):
        for stage, name in lines:
            color = SERIES[stages.index(stage) % len(SERIES)] if stage else INK if name == "loss" else TEACHER
            _line(panel, train, name, steps_per_epoch, color=color, label=stage)
        panel.set_title(title)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    for panel in axes[-min(4, len(axes)) :]:
        panel.set_xlabel("step" if steps_per_epoch is None else "epoch")
    if not panels:
        _say(axes[0], "no records")
    for panel in axes:
        whole_ticks(panel)
    handles = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=len(handles))
    return figure


@styled
def draw_accuracies(metrics: Metrics, steps_per_epoch: float | None = None) -> Figure:
    """Draws how good the student is over the training: on the training images, and in the evaluations.

    Args:
        metrics: Records of a metrics.jsonl.
        steps_per_epoch: To count epochs; None counts steps.
    """
    train = [record for record in metrics if record.get("kind") == "train"]
    evaluations = [record for record in metrics if record.get("kind") == "eval"]
    figure, (accuracy, rate) = grid_of(2, 2, 4.4, 2.5)
    if any("top1" in record for record in train):
        _line(accuracy, train, "top1", steps_per_epoch, color=MUTED, label="top-1, training images", linestyle=(0, (2, 1.5)))
    splits = list(dict.fromkeys(str(record.get("split", "")) for record in evaluations))
    names = headline(evaluations[0]) if evaluations else []
    for split in splits:
        records = [record for record in evaluations if str(record.get("split", "")) == split]
        for name in reversed(names):  # top-1 above the others
            dotted: dict[str, Any] = {"linestyle": (0, (1, 1.4))} if name == "agreement" else {}
            color = SERIES[(len(names) * splits.index(split) + names.index(name)) % len(SERIES)]
            marker = "o" if len(records) < 40 else ""
            _line(
                accuracy,
                records,
                name,
                steps_per_epoch,
                color=color,
                label=f"{TITLES.get(name, name)}, {split}",
                marker=marker,
                markersize=3.2,
                **dotted,
            )
    accuracy.set_title("per cent")
    accuracy.set_ylim(top=max(100.0, accuracy.get_ylim()[1]))
    _line(rate, train, "lr", steps_per_epoch, color=MUTED, label="")
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    for panel in (accuracy, rate):
        panel.set_xlabel("step" if steps_per_epoch is None else "epoch")
        whole_ticks(panel)
    if accuracy.lines:
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


@styled
def draw_method_curves(runs: Sequence[Run], metric: str = "top1", split: str | None = None) -> Figure:
    """Draws the mean of every method's runs over the epochs, and a band of one standard deviation over the seeds.

    Args:
        runs: Runs with the records of their metrics.jsonl.
        metric: Name in the evaluations.
        split: Which evaluations; None takes all.
    """
    figure, (panel,) = grid_of(1, 1, 7.2, 3.4)
    methods = methods_of(runs)
    for number, method in enumerate(methods):
        at: dict[float, list[float]] = {}
        for run in runs:
            if run.method != method:
                continue
            for record in run.metrics:
                value = finite(record.get(metric))
                if record.get("kind") == "eval" and split in (None, record.get("split")) and value is not None:
                    at.setdefault(float(record["epoch"]), []).append(value)
        if not at:
            continue
        epochs = np.array(sorted(at))
        mean = np.array([np.mean(at[epoch]) for epoch in epochs])
        spread = np.array([np.std(at[epoch], ddof=1) if len(at[epoch]) > 1 else 0.0 for epoch in epochs])
        color = SERIES[number % len(SERIES)]
        style = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))[number // len(SERIES) % 3]
        panel.plot(epochs, mean, color=color, label=method, linestyle=style, marker="o" if len(epochs) < 40 else "", markersize=3.2)
        panel.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)
    panel.set_xlabel("epoch")
    whole_ticks(panel)
    panel.set_title(f"{TITLES.get(metric, metric)} in per cent")
    if panel.lines:
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    else:
        _say(panel, "no evaluations")
    return figure


def _line(panel: Axes, records: Metrics, name: str, steps_per_epoch: float | None, **style: Any) -> None:
    found = [(record["step"] / (steps_per_epoch or 1), finite(record.get(name))) for record in records if name in record]
    x, y = [step for step, _ in found], [np.nan if value is None else value for _, value in found]
    panel.plot(x, y, **{"marker": "o" if len(x) == 1 else "", "markersize": 3.2, **style})


def _stages(names: Sequence[str]) -> list[str]:
    """Which parts of the names are stages: the second of three, and the second of two where it is one elsewhere or its term has several."""
    split = [name.split("/")[1:] for name in names]
    known = dict.fromkeys(parts[1] for parts in split if len(parts) == 3)
    seconds: dict[str, list[str]] = {}
    for parts in split:
        if len(parts) == 2 and parts[0] != "task":
            seconds.setdefault(parts[0], []).append(parts[1])
    for term in seconds.values():
        known.update(dict.fromkeys(term))
    return list(known)


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=MUTED)
