from __future__ import annotations

import csv
import io
import math

import pytest
from rich.console import Console

from gkd.viz import Run, compare
from gkd.viz.table import Difference, estimate, paired_difference


def results(last, best=None, **more):
    return {"final": {"top1": last}, "best": {"top1": last if best is None else best}, **more}


def three_seeds():
    costs = {"seconds": 12.0, "steps": 48, "peak_memory": 3 * 2**29, "parameters": {"student": 100, "teacher": 900, "distillation": 7}}
    alone = [Run("alone", seed, results(value)) for seed, value in enumerate([70.0, 71.0, 75.0])]
    graph = [Run("graph | KD", seed, results(value, value + 1, **costs)) for seed, value in enumerate([72.0, 74.0, 76.0])]
    return alone + graph


def test_hand_values():
    alone, graph = compare(three_seeds(), baseline="alone").rows
    # (70 + 71 + 75) / 3 = 72; deviations -2, -1, 3: variance 14 / 2 = 7.
    assert alone.last.mean == pytest.approx(72)
    assert alone.last.std == pytest.approx(math.sqrt(7))
    # Differences 2, 3, 1: mean 2, standard deviation 1; t of 2 degrees of freedom at 97.5 % is 4.30265 (tables).
    assert graph.difference.mean == pytest.approx(2)
    assert graph.difference.high - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert 2 - graph.difference.low == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert not graph.difference.clear
    assert alone.difference is None
    assert graph.best.mean == pytest.approx(75)
    # 12 s / 48 steps
    assert graph.step_ms.mean == pytest.approx(250)
    assert (graph.extra_parameters, graph.memory) == (7, 3 * 2**29)
    assert alone.step_ms is None


def test_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = {0: 1.0, 1: 2.5, 2: 2.0, 5: 4.0}, {0: 0.5, 1: 2.75, 2: 1.0, 5: 3.0}
    for confidence in (0.9, 0.95, 0.99):
        expected = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(confidence)
        found = paired_difference(a, b, confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_only_common_seeds_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.5, 0: 0.0, 3: -50.0})
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.75)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_spread():
    table = compare([Run("alone", 0, results(70.0)), Run("KD", 0, results(71.5))], baseline="alone")
    line = table.to_markdown().splitlines()[3]
    assert line == "| KD | 1 | 71.50 | 71.50 | +1.50 | - |"
    assert not table.rows[1].difference.clear


def test_difference_is_clear_without_zero():
    assert Difference(1.0, 0.1, 1.9, 3).clear
    assert Difference(-1.0, -1.9, -0.1, 3).clear
    assert not Difference(1.0, -0.1, 2.1, 3).clear


def test_runs_that_failed_are_left_out_of_the_means():
    runs = [*three_seeds(), Run("alone", 3, {}), Run("graph | KD", 3, results(float("nan"))), Run("broken", 0, {})]
    table = compare(runs, baseline="alone")
    assert [row.seeds for row in table.rows] == [3, 3, 0]
    assert table.rows[0].last.mean == pytest.approx(72)
    assert table.rows[2].last is None
    assert "| broken | 0 | - | - | - | - |" in table.to_markdown()


def test_plain_tuples_and_other_metrics():
    table = compare([("a", 0, {"final": {"AP": 30.0}}), ("a", 1, {"final": {"AP": 32.0}})], metric="AP")
    assert table.rows[0].last.mean == 31
    assert "AP last" in table.to_markdown()
    assert "vs" not in table.to_markdown()


def test_csv_keeps_all_digits():
    table = compare(three_seeds(), baseline="alone")
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["method"] for row in rows] == ["alone", "graph | KD"]
    assert float(rows[0]["last_std"]) == math.sqrt(7)
    assert float(rows[1]["difference_low"]) == table.rows[1].difference.low
    assert rows[0]["difference"] == rows[0]["step_ms_mean"] == ""
    assert rows[1]["peak_memory_bytes"] == str(float(3 * 2**29))


def test_formats_agree():
    table = compare(three_seeds(), baseline="alone")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table.to_rich("digits", width=200))
    terminal, page, markdown = console.export_text(), table.to_html(), table.to_markdown()
    for cell in ("72.00 ± 2.65", "+2.00", "[-0.48, +4.48]", "1.50 GiB", "250"):
        assert cell in terminal
        assert cell in page
        assert cell in markdown
    assert "graph \\| KD" in markdown  # a bar would end the cell


@pytest.mark.parametrize(("width", "absent"), [(200, ()), (90, ("peak memory",)), (70, ("peak memory", "top-1 best"))])
def test_narrow_terminals_get_fewer_columns_and_whole_numbers(width, absent):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(compare(three_seeds(), baseline="alone").to_rich(width=width))
    text = console.export_text()
    assert "…" not in text
    for title in ("top-1 last", "top-1 best", "vs alone", "95 % interval", "seconds", "peak memory"):
        assert (title in text) == (title not in absent)


def test_clear_differences_are_marked():
    runs = [Run(method, seed, results(70 + gain + 0.01 * seed * gain)) for method, gain in (("a", 0), ("b", 2)) for seed in range(3)]
    assert compare(runs, "a").to_html().count("class=clear") == 1
    assert compare(three_seeds(), "alone").to_html().count("class=clear") == 0


def test_names_are_escaped():
    page = compare([Run("<script>", 0, results(1.0))]).to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([("a", 0, {})], {"baseline": "b"}, "Expected the baseline to be one of a .got 'b'"),
        ([("a", 0, {}), ("a", 0, {})], {}, "Expected one run of 'a' for each seed"),
        ([("a", 0, {})], {"confidence": 95}, "Expected a confidence between 0 and 1 .got 95"),
    ],
)
def test_mistakes(runs, options, message):
    with pytest.raises(ValueError, match=message):
        compare(runs, **options)


def test_estimate_of_nothing():
    assert estimate([]) is None
    assert math.isnan(estimate([3.0]).std)
