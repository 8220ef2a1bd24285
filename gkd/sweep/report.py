"""What a sweep leaves behind: tables, a page with maps of its axes, and a table in the terminal."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from gkd.files import write_atomic
from gkd.sweep.points import Plan
from gkd.sweep.study import Outcome
from gkd.viz import compare, draw_heatmap, page, write_comparison
from gkd.viz.report import read_metrics
from gkd.viz.style import can_draw, figure_to_svg
from gkd.viz.table import Run


def write_report(plan: Plan, outcomes: Mapping[str, Outcome], output: Path, name: str) -> int:
    """Writes the tables and the page of a sweep into its folder, and prints the table; returns the number of cells that failed."""
    sweep, cells = plan.sweep, plan.cells()
    runs, failed, kept = [], [], []
    for cell in sorted(cells, key=lambda cell: plan.points.index(cell.point)):
        outcome = outcomes[cell.key]
        runs.append(Run(cell.point.label, cell.seed, outcome.results or {}, read_metrics(output / "cells" / cell.name / "metrics.jsonl")))
        if outcome.error is not None:
            failed.append(f"{cell.point.label}, seed {cell.seed}: {outcome.error}")
        about = {"label": cell.point.label, "values": cell.point.values, "seed": cell.seed, "folder": f"cells/{cell.name}"}
        kept.append({**about, "results": outcome.results, "error": outcome.error})
    comparison = compare(runs, sweep.baseline, sweep.metric)
    problems = "".join(f"\n* {line}" for line in failed)
    markdown = comparison.to_markdown() + (f"\nFailed:\n{problems}\n" if failed else "")
    for file, text in (("table.csv", comparison.to_csv()), ("table.md", markdown), ("results.json", json.dumps(kept, indent=2))):
        write_atomic(output / file, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
    sections = [
        page.section("Failed cells", page.code("\n".join(failed)) if failed else ""),
        page.section("Axes", *heatmaps(plan, outcomes)),
    ]
    images = "held-out" if sweep.split == "val" else "test"
    lead = f"{len(plan.points)} points x {len(sweep.seeds)} seeds of {', '.join(sweep.base)}, judged on the {images} images"
    write_comparison(output / "report.html", runs, sweep.baseline, name, lead, sweep.metric, sections)

    from rich.console import Console

    print()
    Console(width=None if sys.stdout.isatty() else 200).print(comparison.to_rich(name))
    for line in failed:
        print(f"failed: {line}")
    print(f"Wrote {output / 'table.csv'}, table.md, results.json and report.html; every cell has its folder in {output / 'cells'}")
    return len(failed)


def heatmaps(plan: Plan, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """A map for every two axes: the mean over the seeds and over the values of all further axes."""
    if not can_draw():
        return
    metric, values = plan.sweep.metric, plan.sweep.values
    scores: list[tuple[Mapping[str, str], float]] = [
        (covered, outcome.results["final"][metric])
        for cell in plan.cells()
        if (outcome := outcomes[cell.key]).results is not None
        for covered in cell.point.covers
    ]

    def mean(setting: Mapping[str, str]) -> float | None:
        matching = [score for covered, score in scores if setting.items() <= covered.items()]
        return statistics.fmean(matching) if matching else None

    varied = [axis for axis in values if len(values[axis]) > 1]
    for number, (first, second) in enumerate(itertools.combinations(varied, 2)):
        table = [[mean({first: row, second: column}) for column in values[second]] for row in values[first]]
        figure = draw_heatmap(table, values[first], values[second], first, second, f"{metric}, last epoch")
        further = ", ".join(axis for axis in varied if axis not in (first, second))
        caption = "Mean over the seeds" + (f" and over {further}." if further else ".") + " Blank: no result."
        yield page.captioned(figure_to_svg(figure, f"{metric} by {first} and {second}", f"-axes{number}"), caption)
