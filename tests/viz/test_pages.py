from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gkd.engine.folder import RunFolder
from gkd.errors import UserError
from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
from gkd.viz import GraphPair, Run, Views, read_run, render_report, sections, write_comparison, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RESULTS = {
    "student": "resnet8",
    "seed": 3,
    "final": {"kind": "eval", "epoch": 2, "step": 4, "split": "test", "top1": 71.25, "top5": 95.5, "agreement": 80.0, "loss": 1.5},
    "best": {"kind": "eval", "epoch": 1, "step": 2, "split": "test", "top1": 72.5, "top5": 96.0},
    "chosen_on": "val",
    "steps": 4,
    "epochs": 2.0,
    "seconds": 75.0,
    "images_per_second": 1234.5,
    "peak_memory": 3 * 2**29,
    "processes": 1,
    "parameters": {"student": 78042, "teacher": 272474, "distillation": 5600},
    "teacher": {"split": "test", "top1": 76.5, "top5": 97.0, "loss": 1.1},
    "cost": {
        "student": {"parameters": 78042, "flops": 25.5e6, "latency_ms": 1.25},
        "teacher": {"parameters": 272474, "flops": None, "latency_ms": None},
    },
    "versions": {"gkd": "0.1.0", "torch": "2.6"},
    "device": {"type": "cpu", "name": "x86_64", "threads": 2},
}
CONFIG = "STUDENT = 'resnet8'\nteacher/Network.name = 'resnet20'\nKNNEdges.k = 3  # <k> & more\n"


def metrics():
    for step in range(1, 5):
        yield {
            "kind": "train",
            "epoch": (step + 1) // 2,
            "step": step,
            "lr": 0.1,
            "loss": 3.0 / step,
            "loss/task": 1.0 / step,
            "top1": 20.0 * step,
        }
        if step % 2 == 0:
            yield {"kind": "eval", "split": "test", "epoch": step // 2, "step": step, "top1": 60.0 + step, "top5": 95.0, "agreement": 70.0}


def views():
    student, teacher = (GraphBuilder(PatchNodes(grid=3), KNNEdges(k=2))(torch.rand(4, 6, 6, 6)) for _ in range(2))
    pairs = [GraphPair(f"graph/{stage}", student, teacher, "PatchNodes", "KNNEdges", "teacher") for stage in ("layer1", "layer2")]
    masks = {"student · layer1": torch.rand(4, 3, 3), "teacher · layer1": torch.rand(4, 6, 6)}
    return Views(torch.rand(4, 3, 12, 12), pairs, masks, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 1]), ("cat", "<dog>", "2"))


def full_report():
    counts = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 2, 5]])
    content = [sections.graphs(views()), sections.attention(views()), sections.confusion(counts, ("cat", "<dog>", "2"))]
    return render_report("a <run>", RESULTS, list(metrics()), CONFIG, content)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "kd-3")
    folder.prepare()
    folder.write_results(RESULTS)
    folder.write_config(CONFIG)
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in metrics()) + '{"kind": "cut off')
    return folder


class Page(HTMLParser):
    """Collects tags, references, pictures and text; checks that tags are closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[tuple[str, dict[str, str]]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.references += [found[name] for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag in ("img", "svg", "picture", "object"):
            self.pictures.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_self_contained(text: str, pictures: int) -> Page:
    page = Page(text)
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import|<script|<iframe", text)
    assert not re.search(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink))", text)  # names of vocabularies, which nobody fetches
    assert len(page.pictures) == pictures
    for tag, attributes in page.pictures:
        assert attributes["alt" if tag == "img" else "aria-label"].strip()
        assert tag == "img" or attributes["role"] == "img"
    for drawing in re.findall(r'<svg role="img".*?</svg>', text, re.DOTALL):
        assert re.search("<(path|image|use) ", drawing)
    assert len(set(page.ids)) == len(page.ids)
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    return page


def test_a_report_that_cannot_be_written_leaves_the_old_one(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = read_run(folder.path, "KD")
    pages = {
        write_report(folder): lambda: write_report(folder),
        tmp_path / "all.html": lambda: write_comparison(tmp_path / "all.html", [run]),
    }
    (tmp_path / "all.html").write_text("old")
    before = {path: path.read_text() for path in pages}
    monkeypatch.setattr(os, "fsync", refuse)
    for path, write in pages.items():
        with pytest.raises(UserError, match=r"Expected to be able to write .* \(got: No space left on device\)"):
            write()
        assert path.read_text() == before[path]


def test_report_of_a_folder(folder):
    pytest.importorskip("matplotlib")
    path = write_report(folder)
    assert path == folder.report
    page = check_self_contained(path.read_text(), pictures=2)
    for shown in (
        "kd-3",
        "resnet8, taught by resnet20 · seed 3 · 2 epochs",
        "71.25",
        "best 72.50 at epoch 1",
        "80.00",
        "1 min 15 s",
        "1.50 GiB",
    ):
        assert shown in page.text
    for shown in ("78,042", "5,600", "torch 2.6", "cpu, x86_64", "KNNEdges.k = 3  # <k> & more"):
        assert shown in page.text


def test_the_teacher_and_what_both_networks_cost():
    page = render_report("run", RESULTS, [], CONFIG)
    assert "resnet8, taught by resnet20" in page
    assert re.search(r"teacher&#x27;s top-1.*76\.50", page, re.DOTALL)
    assert "78,042 parameters, 0.0255 GFLOP, 1.25 ms" in page
    assert ">272,474 parameters<" in page


def test_report_with_all_pictures():
    pytest.importorskip("matplotlib")
    text = full_report()
    page = check_self_contained(text, pictures=2 + 2 * 2 + 1 + 1)
    assert "<dog>, taken for 2" in page.text
    assert "12 of 15 test images are named right" in page.text
    assert "2 taken for <dog> (2)" in page.text
    assert page.tags.count("figcaption") == len(page.pictures)
    assert len(text) < 500_000
    # Neutral colours follow the theme: the light theme's ink is in no drawing.
    drawings = "".join(re.findall(r'<svg role="img".*?</svg>', text, re.DOTALL))
    assert "var(--ink)" in drawings
    assert "#25292f" not in drawings
    assert "prefers-color-scheme:dark" in text


def test_pages_are_the_same_each_time():
    pytest.importorskip("matplotlib")
    first, second = (render_report("run", RESULTS, list(metrics())) for _ in range(2))
    assert first == second


def test_report_without_matplotlib(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = check_self_contained(write_report(folder).read_text(), pictures=0)
    assert "The pictures need matplotlib: pip install 'gkd[viz]'." in page.text
    assert "71.25" in page.text
    from gkd.viz import draw_losses

    with pytest.raises(UserError, match="Expected matplotlib to draw pictures"):
        draw_losses([])


def test_report_of_an_unfinished_run(folder):
    folder.results.unlink()
    assert "no results yet" in write_report(folder).read_text()


def test_report_of_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"Expected results.json or metrics.jsonl in .* \(got neither\)"):
        write_report(RunFolder(tmp_path))


def test_runs_are_read_from_their_folders(folder, tmp_path):
    run = read_run(folder.path, "KD")
    assert (run.method, run.seed, run.results) == ("KD", 3, RESULTS)
    assert len(run.metrics) == 6
    assert read_run(tmp_path / "nowhere", "KD", seed=7) == Run("KD", 7, {}, [])


def comparison_runs():
    for method, gain in (("alone", 0.0), ("graph + KD", 2.0)):
        for seed in range(3):
            final = {"top1": 70 + gain + seed * (1 + 0.1 * gain)}
            yield Run(method, seed, {**RESULTS, "final": final}, list(metrics()))


def test_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_comparison(
        tmp_path / "new" / "comparison.html", comparison_runs(), baseline="alone", title="Digits", sections=["<p>more</p>"]
    )
    page = check_self_contained(path.read_text(), pictures=3)
    assert "2 methods, 3 seeds (0, 1, 2)" in page.text
    assert "+2.20" in page.text
    assert "more" in page.text


def test_importing_does_not_load_matplotlib():
    script = "import sys, gkd.viz; print([name for name in ('matplotlib', 'lightning') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


class Opened(NamedTuple):
    console: list[str]
    requests: list[str]
    screenshot: Path


def open_in_chromium(page: Path, folder: Path) -> Opened:
    shot, log = folder / f"{page.stem}.png", folder / f"{page.stem}.json"
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    )
    options += " --disable-sync --disable-extensions --disable-dev-shm-usage --enable-logging=stderr --window-size=1100,1400"
    own = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([CHROMIUM or "", *options.split(), *own, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert shot.is_file(), done.stderr[-2000:]
    # One event a line; the browser's own requests (the time, say) belong to no file.
    events = [line for line in log.read_text().splitlines() if '"network_isolation_key":"file:' in line]
    urls = [url for line in events for url in re.findall(r'"url":"((?!file:|data:)[^"]*)"', line)]
    return Opened([line for line in done.stderr.splitlines() if "CONSOLE" in line], urls, shot)


def colors_of(path: Path) -> int:
    """Number of distinct rows in a PNG of 8 bits: a blank page has one or two."""
    data, position, packed = path.read_bytes(), 8, b""
    width = 0
    while position < len(data):
        (length,), kind = struct.unpack(">I", data[position : position + 4]), data[position + 4 : position + 8]
        if kind == b"IHDR":
            width, _, _, color = struct.unpack(">IIBB", data[position + 8 : position + 18])
            channels = {2: 3, 6: 4}[color]
        packed += data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    rows, stride = zlib.decompress(packed), 1 + width * channels
    return len({rows[start : start + stride] for start in range(0, len(rows), stride)})


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_pages_open_in_chromium_without_errors_or_requests(tmp_path):
    pytest.importorskip("matplotlib")
    # First that the means see what they look for.
    control = tmp_path / "control.html"
    control.write_text("<script>console.error('planted')</script><img src='http://planted.invalid/a.png'>")
    seen = open_in_chromium(control, tmp_path)
    assert any("planted" in line for line in seen.console)
    assert any("planted.invalid" in url for url in seen.requests)

    report = tmp_path / "report.html"
    report.write_text(full_report())
    opened = open_in_chromium(report, tmp_path)
    assert (opened.console, opened.requests) == ([], [])
    assert colors_of(opened.screenshot) > 200
