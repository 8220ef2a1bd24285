"""Several runs side by side: mean and spread over the seeds, difference from a baseline, cost. Terminal, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"


class Run(NamedTuple):
    """One run of a comparison.

    Attributes:
        method: What it is compared by.
        seed: Runs of the same seed are paired.
        results: What results.json holds; an empty one stands for a run that failed.
        metrics: The records of metrics.jsonl, for curves.
    """

    method: str
    seed: int
    results: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()


class Estimate(NamedTuple):
    """Mean over the seeds and standard deviation (of a sample: n - 1); NaN for one seed."""

    mean: float
    std: float
    seeds: int


class Difference(NamedTuple):
    """Mean of the seed-wise differences from the baseline, with its confidence interval; NaN for one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """One method. None: not known of any of its runs."""

    method: str
    seeds: int
    last: Estimate | None
    best: Estimate | None
    difference: Difference | None
    agreement: Estimate | None
    step_ms: Estimate | None
    extra_parameters: int | None
    memory: float | None
    seconds: Estimate | None


class Column(NamedTuple):
    """A column for people."""

    title: str
    text: Callable[[Row], str]
    rank: int = 0
    """Where there is no room for all, those of rank 2 are left out, and then those of rank 1."""


@dataclass(frozen=True)
class Comparison:
    """A table of methods; see :func:`compare`.

    Attributes:
        rows: One for each method.
        metric: What is compared.
        baseline: What the differences are from.
        confidence: Of the intervals.
    """

    rows: tuple[Row, ...]
    metric: str = "top1"
    baseline: str | None = None
    confidence: float = 0.95

    def columns(self) -> list[Column]:
        """The columns that hold anything."""
        name = {"top1": "top-1"}.get(self.metric, self.metric)
        columns = [
            Column("method", lambda row: row.method),
            Column("seeds", lambda row: str(row.seeds), rank=2),
            Column(f"{name} last", lambda row: _spread(row.last)),
            Column(f"{name} best", lambda row: _spread(row.best), rank=1),
        ]
        if self.baseline is not None:
            columns += [
                Column(f"vs {self.baseline}", lambda row: NONE if row.difference is None else f"{row.difference.mean:+.2f}"),
                Column(f"{100 * self.confidence:g} % interval", _interval),
            ]
        costs = [
            Column("agreement", lambda row: _spread(row.agreement), rank=2),
            Column("ms/step", lambda row: NONE if row.step_ms is None else _number(row.step_ms.mean), rank=2),
            Column("extra parameters", lambda row: NONE if row.extra_parameters is None else f"{row.extra_parameters:,}", rank=2),
            Column("peak memory", lambda row: NONE if row.memory is None else format_bytes(row.memory), rank=2),
            Column("seconds", lambda row: NONE if row.seconds is None else _number(row.seconds.mean)),
        ]
        return columns + [column for column in costs if any(column.text(row) != NONE for row in self.rows)]

    def to_rich(self, title: str | None = None, width: int = 80) -> Table:
        """The table for the terminal; where it would be wider than ``width``, without the columns that matter least."""
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        def build(columns: Sequence[Column]) -> Table:
            table = Table(title=title, title_justify="left", caption=self.note(), caption_justify="left", header_style="bold")
            for number, column in enumerate(columns):
                # Nothing is cut: half a number would be another one.
                table.add_column(Text(column.title), justify="right" if number else "left", no_wrap=True)
            for row in self.rows:
                table.add_row(*(Text(column.text(row), style=self._style(row, column)) for column in columns))
            return table

        columns, wide = self.columns(), Console(width=1000)
        for rank in (2, 1, 0):
            table = build([column for column in columns if column.rank <= rank])
            if Measurement.get(wide, wide.options, table).maximum <= width:
                break
        return table

    def to_csv(self) -> str:
        """Bare numbers with all their digits, one column each; empty where there is none."""
        names = ["method", "seeds"]
        fields = ("last", "best", "agreement", "step_ms", "seconds")
        for name in fields:
            names += [f"{name}_mean", f"{name}_std"]
        names += ["difference", "difference_low", "difference_high", "pairs", "extra_parameters", "peak_memory_bytes"]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            values: list[Any] = [row.method, row.seeds]
            for name in fields:
                estimate = getattr(row, name)
                values += [None, None] if estimate is None else [estimate.mean, estimate.std]
            values += [None] * 4 if row.difference is None else list(row.difference)
            values += [row.extra_parameters, row.memory]
            writer.writerow("" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in values)
        return file.getvalue()

    def to_markdown(self) -> str:
        """A table in Markdown with its note."""
        columns = self.columns()
        lines = [[column.title for column in columns], ["-", *["-:"] * (len(columns) - 1)]]
        lines += [[column.text(row) for column in columns] for row in self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{table}\n\n{self.note()}\n"

    def to_html(self) -> str:
        """A ``<table>``; the page gives it its looks."""
        columns = self.columns()
        head = "".join(f'<th scope="col">{html.escape(column.title)}</th>' for column in columns)
        body = ""
        for row in self.rows:
            cells = f'<th scope="row">{html.escape(row.method)}</th>'
            for column in columns[1:]:
                style = self._style(row, column)
                cells += f"<td{' class=clear' if style else ''}>{html.escape(column.text(row))}</td>"
            body += f"<tr>{cells}</tr>\n"
        return (
            f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
            f'<p class="note">{html.escape(self.note())}</p>'
        )

    def note(self) -> str:
        """What the numbers mean."""
        text = "Mean ± standard deviation over the seeds."
        if self.baseline is not None:
            text += (
                f" Differences from {self.baseline} are paired by seed, with a {100 * self.confidence:g} % interval of Student's t;"
                " bold where it leaves out 0."
            )
        return text

    def _style(self, row: Row, column: Column) -> str:
        is_difference = self.baseline is not None and column.title == f"vs {self.baseline}"
        return "bold" if is_difference and row.difference is not None and row.difference.clear else ""


def compare(
    runs: Iterable[Run | tuple[str, int, Mapping[str, Any]]],
    baseline: str | None = None,
    metric: str = "top1",
    confidence: float = 0.95,
) -> Comparison:
    r"""Compares methods over several seeds.

    .. math:: \bar d \pm t_{n-1, (1 + \gamma) / 2} \, s_d / \sqrt n, \qquad d_i = \text{method}_i - \text{baseline}_i

    The interval goes over the seeds that both have, at the last epoch. Pairing takes out what a seed does to both (same order of images,
    same initial weights). It is no correction for many comparisons.

    Args:
        runs: Method, seed and results of every run; the order of the methods is kept. What a run lacks is left out of the means.
        baseline: The method that the others are compared with. None leaves the differences out.
        metric: Name in ``results['final']`` and ``results['best']``.
        confidence: :math:`\gamma`.

    Raises:
        ValueError: If there is no such baseline, a method has a seed twice, or the confidence is not between 0 and 1.

    Examples:
        >>> runs = [(method, seed, {"final": {"top1": value}}) for seed, values in enumerate([(70, 71), (72, 74)])
        ...         for method, value in zip(("alone", "KD"), values)]
        >>> print(compare(runs, baseline="alone").to_markdown().split("\n\n")[0])
        | method | seeds | top-1 last | top-1 best | vs alone | 95 % interval |
        | - | -: | -: | -: | -: | -: |
        | alone | 2 | 71.00 ± 1.41 | - | - | - |
        | KD | 2 | 72.50 ± 2.12 | - | +1.50 | [-4.85, +7.85] |
    """
    known = [Run(*run) for run in runs]
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence between 0 and 1 (got {confidence})")
    methods = methods_of(known)
    if baseline is not None and baseline not in methods:
        raise ValueError(f"Expected the baseline to be one of {', '.join(methods)} (got '{baseline}')")
    of = {method: [run for run in known if run.method == method] for method in methods}
    for method, own in of.items():
        seeds = [run.seed for run in own]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"Expected one run of '{method}' for each seed (got the seeds {seeds})")
    last = {method: _by_seed(own, metric) for method, own in of.items()}
    rows = []
    for method, own in of.items():
        difference = None
        if baseline is not None and method != baseline:
            difference = paired_difference(last[method], last[baseline], confidence)
        rows.append(
            Row(
                method=method,
                seeds=len(last[method]),
                last=estimate(last[method].values()),
                best=estimate(_values(own, lambda results: (results.get("best") or {}).get(metric))),
                difference=difference,
                agreement=estimate(_values(own, lambda results: (results.get("final") or {}).get("agreement"))),
                step_ms=estimate(_values(own, lambda results: 1000 * results["seconds"] / results["steps"])),
                extra_parameters=next((int(value) for value in _values(own, lambda results: results["parameters"]["distillation"])), None),
                memory=max(_values(own, lambda results: results.get("peak_memory")), default=None),
                seconds=estimate(_values(own, lambda results: results.get("seconds"))),
            )
        )
    return Comparison(tuple(rows), metric, baseline, confidence)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Difference | None:
    """Mean difference over the seeds that both have, and its confidence interval; None if they have none.

    Args:
        values: By seed.
        baseline: By seed.
        confidence: Probability that an interval so made holds the true difference, for normal differences.

    Examples:
        >>> paired_difference({0: 2.0}, {0: 1.5}).mean
        0.5
    """
    found = estimate(values[seed] - baseline[seed] for seed in values if seed in baseline)
    if found is None:
        return None
    if found.seeds < 2:
        return Difference(found.mean, math.nan, math.nan, found.seeds)
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second to import

    half = float(stdtrit(found.seeds - 1, 0.5 + confidence / 2)) * found.std / math.sqrt(found.seeds)
    return Difference(found.mean, found.mean - half, found.mean + half, found.seeds)


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and standard deviation; None of nothing."""
    known = list(values)
    if not known:
        return None
    return Estimate(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def finite(value: Any) -> float | None:
    """A number, or None for what is none or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def methods_of(runs: Iterable[Run]) -> list[str]:
    """The methods in the order in which they come."""
    return list(dict.fromkeys(run.method for run in runs))


def format_bytes(number: float) -> str:
    """In MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _by_seed(runs: Sequence[Run], metric: str) -> dict[int, float]:
    found = {run.seed: finite((run.results.get("final") or {}).get(metric)) for run in runs}
    return {seed: value for seed, value in found.items() if value is not None}


def _values(runs: Sequence[Run], read: Callable[[Mapping[str, Any]], Any]) -> list[float]:
    values = []
    for run in runs:
        try:
            value = finite(read(run.results))
        except (KeyError, TypeError, ZeroDivisionError):  # a run that does not tell
            continue
        if value is not None:
            values.append(value)
    return values


def _spread(value: Estimate | None) -> str:
    if value is None:
        return NONE
    return f"{value.mean:.2f}" if math.isnan(value.std) else f"{value.mean:.2f} ± {value.std:.2f}"


def _interval(row: Row) -> str:
    if row.difference is None or math.isnan(row.difference.low):
        return NONE
    return f"[{row.difference.low:+.2f}, {row.difference.high:+.2f}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
