"""The report of a run: one page with its figures, curves, graphs and configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.viz import page
from gkd.viz.curves import TITLES, draw_accuracies, draw_losses, headline
from gkd.viz.style import can_draw, figure_to_svg
from gkd.viz.table import Run, finite, format_bytes

if TYPE_CHECKING:
    from gkd.engine.folder import RunFolder

NO_PICTURES = "The pictures need matplotlib: pip install 'gkd[viz]'."


def write_report(folder: RunFolder, task: Any = None, title: str | None = None) -> Path:
    """Writes ``report.html`` into a run folder: one file that opens without a network and runs no script.

    What the folder holds is shown as far as it is there: results.json, metrics.jsonl, config.gin. A task adds sections of its own, drawn
    with its networks as they are, so they should hold the weights that the results are of. Without matplotlib the page has no pictures.

    Args:
        folder: Where a training has written.
        task: The `gkd.tasks.Task` that was trained; None leaves its sections out.
        title: Heading; None is the folder's name.

    Returns:
        Path of the report.

    Raises:
        UserError: If the folder holds neither results nor metrics, or cannot be written to.
    """
    results = json.loads(folder.results.read_text()) if folder.results.is_file() else {}
    metrics = read_metrics(folder.metrics)
    if not results and not metrics:
        raise UserError(f"Expected results.json or metrics.jsonl in {folder.path} (got neither). Give the folder of a run, or train first.")
    config = folder.config.read_text() if folder.config.is_file() else ""
    sections = task.sections() if task is not None and can_draw() else []
    content = render_report(title or folder.path.resolve().name, results, metrics, config, sections).encode()
    write_atomic(folder.report, lambda file: file.write(content))
    return folder.report


def render_report(
    title: str, results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], config: str = "", sections: Sequence[str] = ()
) -> str:
    """The page of :func:`write_report`, from what it shows.

    Args:
        title: Heading.
        results: What results.json holds; may be empty.
        metrics: Records of metrics.jsonl; may be empty.
        config: The operative configuration.
        sections: What the task adds after the curves.
    """
    content = [page.figures(_key_figures(results))]
    if not results:
        content.append(page.paragraph("This run has no results yet: it was interrupted or is still going on."))
    content += [_curves(results, metrics), *sections] if can_draw() else [page.paragraph(NO_PICTURES)]
    content.append(page.section("The run", page.facts_table(_details(results))))
    if config:
        content.append(page.section("Configuration", page.collapsed("The operative bindings (config.gin)", page.code(config.strip()))))
    return page.page(title, _lead(results, config), content)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, without a last line that was cut off; an absent file has no records."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_run(path: Path | str, method: str, seed: int | None = None) -> Run:
    """Reads a run folder for a comparison; one without results counts as a run that failed.

    Args:
        path: The run folder.
        method: What the run is compared by.
        seed: None takes that of the results.
    """
    from gkd.engine.folder import RunFolder

    folder = RunFolder(path)
    results = json.loads(folder.results.read_text()) if folder.results.is_file() else {}
    return Run(method, int(results.get("seed", 0)) if seed is None else seed, results, read_metrics(folder.metrics))


def _lead(results: Mapping[str, Any], config: str) -> str:
    student = results.get("student") or _bound(config, "student")
    teacher = _bound(config, "teacher") if (results.get("parameters") or {}).get("teacher", 1) else None
    words = [f"{student}, taught by {teacher}" if student and teacher else str(student) if student else "A training"]
    if results.get("seed") is not None:
        words.append(f"seed {results['seed']}")
    if finite(results.get("epochs")) is not None:
        words.append(f"{results['epochs']:g} epochs")
    return " · ".join(words)


def _bound(config: str, network: str) -> str | None:
    """Name of a network, as the configuration binds it."""
    found = re.search(rf"^{network}/Network\.name = \\?\s*['\"](.+?)['\"]", config, re.MULTILINE)
    macro = re.search(rf"^{network.upper()} = \\?\s*['\"](.+?)['\"]", config, re.MULTILINE)
    return found[1] if found else macro[1] if macro else None


def _key_figures(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    final, best = results.get("final") or {}, results.get("best") or {}
    split = f"{final['split']} images" if "split" in final else ""
    facts = []
    for name in headline(final):
        value, at_best = finite(final.get(name)), finite(best.get(name))
        if value is not None:
            remark = f"best {at_best:.2f} at epoch {best.get('epoch', '?')}" if at_best is not None else split
            facts.append((TITLES.get(name, name), f"{value:.2f}", remark))
    judged = results.get("teacher") or {}
    for name in headline(judged)[:1]:
        if finite(judged.get(name)) is not None:
            facts.append((f"teacher's {TITLES.get(name, name)}", f"{judged[name]:.2f}", f"{judged.get('split', 'test')} images"))
    seconds, speed, memory = (finite(results.get(name)) for name in ("seconds", "images_per_second", "peak_memory"))
    if seconds is not None:
        facts.append(("training time", format_seconds(seconds), "" if speed is None else f"{speed:,.0f} images/s"))
    if memory is not None:
        facts.append(("peak memory", format_bytes(memory), (results.get("device") or {}).get("type", "")))
    parameters = results.get("parameters") or {}
    if "student" in parameters:
        teacher = f"teacher {parameters['teacher']:,}" if parameters.get("teacher") else "no teacher"
        facts.append(("parameters", f"{parameters['student']:,}", teacher))
    return facts


def _details(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    final, device = results.get("final") or {}, results.get("device") or {}
    parameters = results.get("parameters") or {}
    facts = [
        ("seed", results.get("seed")),
        ("steps", f"{results['steps']:,}" if "steps" in results else None),
        (
            "test loss" if final.get("split") == "test" else "loss",
            f"{final['loss']:.4g}" if finite(final.get("loss")) is not None else None,
        ),
        ("best epoch chosen on", f"{results['chosen_on']} images" if "chosen_on" in results else None),
        ("parameters used in training alone", f"{parameters['distillation']:,}" if "distillation" in parameters else None),
        *((f"the {network}, for one image", _cost(cost)) for network, cost in (results.get("cost") or {}).items()),
        ("processes", results.get("processes")),
        ("device", ", ".join(str(part) for part in (device.get("type"), device.get("name")) if part)),
        ("threads", device.get("threads")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _cost(cost: Mapping[str, Any]) -> str:
    flops, latency = finite(cost.get("flops")), finite(cost.get("latency_ms"))
    words = [f"{cost['parameters']:,} parameters"]
    words += [] if flops is None else [f"{flops / 1e9:.3g} GFLOP"]
    words += [] if latency is None else [f"{latency:.3g} ms"]
    return ", ".join(words)


def _curves(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    steps, epochs = finite(results.get("steps")), finite(results.get("epochs"))
    per_epoch = steps / epochs if steps and epochs else None
    accuracies = figure_to_svg(draw_accuracies(metrics, per_epoch), "Evaluations and learning rate over the training")
    losses = figure_to_svg(draw_losses(metrics, per_epoch), "Every loss term over the training")
    return page.section(
        "Learning curves",
        page.captioned(
            accuracies,
            "Left: how good the student is, on the training images (as augmented, on the way) and in the evaluations. "
            "Right: the learning rate.",
        ),
        page.captioned(
            losses,
            "The loss and its terms as they were added up, weights and ramps included: a panel for each term, a line for each stage. "
            "Values are means between two log points. Scales differ from panel to panel.",
        ),
    )


def format_seconds(seconds: float) -> str:
    """In seconds, minutes or hours.

    Examples:
        >>> format_seconds(12.34), format_seconds(75), format_seconds(7300)
        ('12.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
