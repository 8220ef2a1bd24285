"""The page of a comparison: the table of the methods, their curves, their points and what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from gkd.files import write_atomic
from gkd.viz import page
from gkd.viz.curves import draw_method_curves
from gkd.viz.report import NO_PICTURES
from gkd.viz.style import can_draw, figure_to_svg
from gkd.viz.sweeps import draw_cost_accuracy, draw_points
from gkd.viz.table import Run, compare


def write_comparison(
    path: Path | str,
    runs: Iterable[Run],
    baseline: str | None = None,
    title: str = "Comparison",
    lead: str = "",
    metric: str = "top1",
    sections: Iterable[str] = (),
) -> Path:
    """Writes one HTML page that compares methods over seeds, and opens without a network.

    Args:
        path: File to write.
        runs: From :func:`~gkd.viz.read_run`, say; the order of the methods is kept.
        baseline: The method that the others are compared with.
        title: Heading.
        lead: A sentence under it.
        metric: What is compared.
        sections: More HTML, from :mod:`gkd.viz.page`, after the table.

    Returns:
        The path.

    Raises:
        ValueError: If the runs cannot be compared, see :func:`compare`.
    """
    runs = list(runs)
    comparison = compare(runs, baseline, metric)
    keys = (f"-{position}" for position in itertools.count())
    parts = [comparison.to_html(), *sections]
    if can_draw():
        intervals = f" Right: mean difference from {baseline} and its 95 % interval; one that leaves out 0 is clear." if baseline else ""
        parts.append(
            page.section(
                "Methods",
                page.captioned(
                    figure_to_svg(draw_points(runs, comparison), "The methods' results with their spread", next(keys)),
                    f"Small dots: single runs; large: mean and standard deviation over the seeds, at the last epoch.{intervals}",
                ),
            )
        )
        if any(run.metrics for run in runs):
            parts.append(
                page.section(
                    "Learning curves",
                    page.captioned(
                        figure_to_svg(draw_method_curves(runs, metric), "The methods' evaluations over the epochs", next(keys)),
                        "Evaluations on the way: mean over the seeds, and a band of one standard deviation.",
                    ),
                )
            )
        if any(row.step_ms is not None for row in comparison.rows):
            parts.append(
                page.section(
                    "Cost",
                    page.captioned(
                        figure_to_svg(draw_cost_accuracy(comparison), "Accuracy against the time of a step", next(keys)),
                        "Time of a training step against what it reaches. The dashed line joins the methods that no other beats in both.",
                    ),
                )
            )
    else:
        parts.append(page.paragraph(NO_PICTURES))
    seeds = sorted({run.seed for run in runs})
    lead = lead or f"{len(comparison.rows)} methods, {len(seeds)} seed{'s' if len(seeds) != 1 else ''} ({', '.join(map(str, seeds))})"
    path = Path(path)
    content = page.page(title, lead, parts).encode()
    write_atomic(path, lambda file: file.write(content))
    return path
