"""Pictures over many runs: methods as points, two axes as a heat map, cost against accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gkd.viz.style import BLUE, INK, MUTED, SERIES, bare, grid_of, styled, veil
from gkd.viz.table import Comparison, Run, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_points(runs: Sequence[Run], comparison: Comparison) -> Figure:
    """Draws every run as a dot and every method as its mean with one standard deviation; with a baseline also the paired differences.

    Args:
        runs: The runs.
        comparison: Their table.
    """
    rows, metric = comparison.rows, comparison.metric
    differences = comparison.baseline is not None and any(row.difference is not None for row in rows)
    panels_wide = 2 if differences else 1
    figure, panels = grid_of(panels_wide, panels_wide, 4.4 if differences else 6.4, 0.9 + 0.32 * max(len(rows), 2))
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        color = SERIES[place % len(SERIES)]
        values = [finite((run.results.get("final") or {}).get(metric)) for run in runs if run.method == row.method]
        known = [value for value in values if value is not None]
        panels[0].scatter(known, [place] * len(known), s=16, color=color, alpha=0.45, linewidths=0)
        if row.last is not None:
            std = 0.0 if math.isnan(row.last.std) else row.last.std
            panels[0].errorbar(row.last.mean, place, xerr=std, color=color, fmt="o", markersize=6, capsize=2.5, linewidth=1.4)
        if differences and row.difference is not None:
            low, high = row.difference.low, row.difference.high
            half = 0.0 if math.isnan(low) else (high - low) / 2
            panels[1].errorbar(row.difference.mean, place, xerr=half, color=color, fmt="o", markersize=6, capsize=2.5, linewidth=1.4)
    name = {"top1": "top-1 in per cent"}.get(metric, metric)
    panels[0].set_title(f"{name}, last epoch")
    panels[0].set_yticks(places, [row.method for row in rows])
    if differences:
        panels[1].set_title(f"difference from {comparison.baseline}")
        panels[1].axvline(0, color=MUTED, linewidth=0.9)
        panels[1].set_yticks(places, [""] * len(rows))
    for panel in panels:
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines["left"].set_visible(False)
    return figure


@styled
def draw_heatmap(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_name: str = "",
    column_name: str = "",
    title: str = "",
) -> Figure:
    """Draws a table of numbers as colours, with the numbers: what a sweep found for every pair of settings.

    Args:
        values: A number for every row and column; None or NaN where a cell has none.
        rows: Values of the one axis.
        columns: Values of the other.
        row_name: Name of the one axis.
        column_name: Name of the other.
        title: What the numbers are.
    """
    table = np.array([[math.nan if finite(value) is None else value for value in line] for line in values], dtype=float)
    if table.shape != (len(rows), len(columns)):
        raise ValueError(f"Expected {len(rows)} x {len(columns)} values (got {list(table.shape)})")
    longest = max(map(len, rows), default=0)
    figure, (panel,) = grid_of(1, 1, 1.4 + 0.07 * longest + 0.72 * max(len(columns), 2), 1.1 + 0.42 * max(len(rows), 1))
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    # The lowest is not blank: blank says that there is no number.
    share = 0.1 + 0.8 * (table - low) / max(high - low, 1e-12)
    panel.imshow(share, cmap=veil(BLUE), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    best = np.nanargmax(table) if known.size else -1
    for place, value in enumerate(table.flat):
        row, column = divmod(place, table.shape[1])
        text, weight = ("-", "normal") if math.isnan(value) else (f"{value:.2f}", "bold" if place == best else "normal")
        panel.text(column, row, text, ha="center", va="center", color=INK, fontweight=weight)
    bare(panel)
    panel.set_xticks(range(len(columns)), columns, color=INK)
    panel.set_yticks(range(len(rows)), rows, color=INK)
    panel.tick_params(length=0)
    panel.set(xlabel=column_name, ylabel=row_name)
    panel.set_title(title)
    return figure


@styled
def draw_cost_accuracy(comparison: Comparison) -> Figure:
    """Draws accuracy against the time of a step, a point for each method; a line joins those that no other beats in both.

    Args:
        comparison: The table of the methods.
    """
    from matplotlib.ticker import LogLocator

    points = [
        (row.step_ms.mean, row.last.mean, row.last.std, row.method, number)
        for number, row in enumerate(comparison.rows)
        if row.step_ms is not None and row.last is not None
    ]
    figure, (panel,) = grid_of(1, 1, 7.4, max(3.6, 0.24 * len(points)))
    front: list[tuple[float, float, float, str, int]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    panel.plot([point[0] for point in front], [point[1] for point in front], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    # Names stand in a column beside the picture, the best on top, where they cannot lie over each other.
    for place, (x, y, std, method, number) in enumerate(sorted(points, key=lambda point: -point[1])):
        color = SERIES[number % len(SERIES)]
        panel.errorbar(x, y, yerr=0.0 if math.isnan(std) else std, color=color, fmt="o", markersize=6, capsize=2.5, linewidth=0.9)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
        at = (1.06, 1 - (place + 0.5) / len(points))
        panel.annotate(method, (x, y), at, textcoords="axes fraction", va="center", fontsize=8, color=INK, arrowprops=line)
    if not points:
        panel.text(0.5, 0.5, "no run tells its cost", transform=panel.transAxes, ha="center", color=MUTED)
    elif max(point[0] for point in points) > 5 * min(point[0] for point in points) > 0:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_formatter("")
    panel.margins(x=0.08)
    panel.set_xlabel("milliseconds a step")
    panel.set_title({"top1": "top-1 in per cent"}.get(comparison.metric, comparison.metric))
    return figure
