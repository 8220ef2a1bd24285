from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")

from gkd.viz import Run, compare, draw_accuracies, draw_cost_accuracy, draw_heatmap, draw_losses, draw_method_curves, draw_points


def train(step, **losses):
    named = {f"loss/{name.replace('__', '/')}": value for name, value in losses.items()}
    return {"kind": "train", "epoch": 1, "step": step, "lr": 0.1, "loss": 1.0, "top1": 10.0 * step, **named}


def evaluation(epoch, top1, split="test"):
    return {"kind": "eval", "split": split, "epoch": epoch, "step": 2 * epoch, "top1": top1, "top5": 99.0, "loss": 1.0}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def run(method, seed, last, steps=10):
    results = {"final": {"top1": last}, "seconds": 1.0, "steps": steps}
    return Run(method, seed, results, [evaluation(1, last - 10), evaluation(2, last)])


def test_a_panel_for_each_term_and_a_line_for_each_stage():
    terms = {
        "task": 1.0,
        "kd": 2.0,
        "graph__layer1__edge": 3.0,
        "graph__layer2__edge": 4.0,
        "graph__layer2__vertex": 5.0,
        "at__layer1": 6.0,
    }
    figure = draw_losses([train(1, **terms), train(2, **terms)], steps_per_epoch=2)
    assert titles(figure) == ["sum of all", "task", "kd", "graph · edge", "graph · vertex", "at"]
    edge = figure.axes[3]
    assert [line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else line.get_ydata() for line in edge.lines] == [
        [3, 3],
        [4, 4],
    ]
    assert list(edge.lines[0].get_xdata()) == [0.5, 1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["layer1", "layer2"]
    # A stage has one colour everywhere.
    assert figure.axes[4].lines[0].get_color() == edge.lines[1].get_color()
    assert figure.axes[5].lines[0].get_color() == edge.lines[0].get_color()


def test_a_term_that_comes_late_and_one_that_is_no_number():
    figure = draw_losses([train(1, task=1.0), {**train(2, task=None, kd=2.0)}])
    kd = figure.axes[titles(figure).index("kd")].lines[0]
    assert list(kd.get_xdata()) == [2]
    assert math.isnan(figure.axes[titles(figure).index("task")].lines[0].get_ydata()[1])


def test_the_sum_is_not_shown_beside_its_only_term():
    assert titles(draw_losses([train(1, task=1.0)])) == ["task"]
    assert draw_losses([]).axes[0].texts[0].get_text() == "no records"


def test_accuracies():
    figure = draw_accuracies([train(1), evaluation(1, 50.0), evaluation(1, 40.0, "val"), evaluation(2, 60.0)], steps_per_epoch=2)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["top-1, test"] == [50, 60]
    assert lines["top-1, val"] == [40]
    assert lines["top-1, training images"] == [10]
    assert "agreement with the teacher, test" not in lines
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == len(figure.axes[0].lines)


def test_method_curves_are_means_over_the_seeds():
    runs = [run("alone", 0, 70.0), run("alone", 1, 72.0), run("KD", 0, 75.0)]
    (axes,) = draw_method_curves(runs).axes
    assert [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines] == [("alone", [61, 71]), ("KD", [65, 75])]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(71 + math.sqrt(2))
    assert draw_method_curves([Run("a", 0, {})]).axes[0].texts[0].get_text() == "no evaluations"


def test_points():
    runs = [run("alone", 0, 70.0), run("alone", 1, 72.0), run("KD", 0, 75.0), run("KD", 1, 75.0), Run("broken", 0, {})]
    left, right = draw_points(runs, compare(runs, "alone")).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["alone", "KD", "broken"]
    assert len(right.containers) == 1  # the baseline and the broken method have no difference
    assert len(draw_points(runs, compare(runs)).axes) == 1


def test_heatmap():
    (axes,) = draw_heatmap([[1.0, None], [2.0, 3.5]], ["a", "b"], ["2", "4"], "edges", "k", "top-1").axes
    assert [text.get_text() for text in axes.texts] == ["1.00", "-", "2.00", "3.50"]
    assert [text.get_fontweight() for text in axes.texts] == ["normal", "normal", "normal", "bold"]
    assert draw_heatmap([[None]], ["a"], ["b"]).axes[0].texts[0].get_text() == "-"
    with pytest.raises(ValueError, match=r"Expected 1 x 2 values \(got \[1, 1\]\)"):
        draw_heatmap([[1.0]], ["a"], ["b", "c"])


def test_cost_accuracy_joins_what_no_other_beats():
    runs = [run("cheap", 0, 70.0, 100), run("worse", 0, 69.0, 50), run("dear", 0, 80.0, 10), Run("broken", 0, {})]
    (axes,) = draw_cost_accuracy(compare(runs)).axes
    assert list(axes.lines[0].get_xdata()) == [10, 100]
    assert list(axes.lines[0].get_ydata()) == [70, 80]
    assert sorted(text.get_text() for text in axes.texts) == ["cheap", "dear", "worse"]
    assert draw_cost_accuracy(compare([Run("a", 0, {})])).axes[0].texts[-1].get_text() == "no run tells its cost"
