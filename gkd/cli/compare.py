"""Compares runs: a table, and a page with their curves. Folders that differ only in their seed are runs of one method."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gkd.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; those called seedN are runs of the folder above")
    parser.add_argument("--baseline", metavar="NAME", help="method that the others are compared with (default: the first)")
    parser.add_argument("--metric", help="what is compared (default: what the runs chose their best checkpoint by)")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="page to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table and writes the page."""
    from rich.console import Console

    from gkd.viz import compare, read_run, write_comparison

    runs = []
    for path in map(Path.expanduser, arguments.runs):
        if not (path / "results.json").is_file() and not (path / "metrics.jsonl").is_file():
            raise UserError(f"Expected the folder of a run at {path} (got neither results.json nor metrics.jsonl there)")
        runs.append(read_run(path, _method(path)))
    scores = sorted({run.results["score"] for run in runs if "score" in run.results})
    if arguments.metric is None and len(scores) > 1:
        raise UserError(f"Expected runs that are judged by one number (got {' and '.join(scores)}). Choose one: --metric {scores[0]}")
    metric = arguments.metric or (scores[0] if scores else "top1")
    baseline = arguments.baseline or runs[0].method
    page = write_comparison(arguments.output.expanduser(), runs, baseline, metric=metric)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(compare(runs, baseline, metric).to_rich(width=console.width))
    print(f"Wrote {page}")


def _method(path: Path) -> str:
    """Name of the method: of the folder, or of the one above where the folder is a seed's."""
    path = path.resolve()
    return path.parent.name if path.name.removeprefix("seed").isdigit() and path.name.startswith("seed") else path.name
