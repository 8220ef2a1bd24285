from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gkd.config import configure
from gkd.data import DigitScenes, RandomImages
from gkd.detection import DetectorNetwork
from gkd.engine import RunFolder, Trainer
from gkd.tasks import Classification, Detection, Network

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"  # The examples of gkd/graphs/README.md run in tests/graphs.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_" not in path.relative_to(ROOT / "docs").parts[0][:1])
READMES = [README, *sorted((ROOT / "gkd").rglob("README.md")), *sorted((ROOT / "projects").rglob("README.md")), *PAGES]
WITH_CODE = [path for path in [README, *PAGES] if "```python" in path.read_text()]
VERB = re.compile(r"^(?:torchrun .* -m )?gkd (\w+)(.*)$", re.M)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a text, each with the line on which its code begins."""
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)]


def test_the_reader_of_blocks():
    text = "a\n```python\nx = 1\n```\n```bash\nmake\n```\n```python\ny = 2\nz = 3\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n"), (9, "y = 2\nz = 3\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages assume to be there: a trained classifier, a trained detector, and a photo."""
    folder = tmp_path_factory.mktemp("pages")
    Image.new("RGB", (64, 48)).save(folder / "photo.jpg")
    data = RandomImages(num_classes=3, num_train=4, num_test=4)
    Classification(Network("resnet8"), data=data, batch_size=4, trainer=Trainer(device="cpu")).save(run_folder(folder, "runs/name"))
    options = {"fpn_channels": 64, "norm": "batch"}
    scenes = DigitScenes(num_train=4, num_test=2, size=64)
    Detection(DetectorNetwork("fcos", "resnet10", options=options), data=scenes, batch_size=2, trainer=Trainer(device="cpu")).save(
        run_folder(folder, "runs/mine")
    )
    return folder


def run_folder(folder: Path, name: str) -> RunFolder:
    (folder / name).mkdir(parents=True)
    return RunFolder(folder / name)


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(folder, path):
    """One block after the other in one process, as a reader would type them; empty lines keep the line numbers of the text."""
    script = ""
    for line, code in python_blocks(path.read_text()):
        script += "\n" * (line - 1 - script.count("\n")) + code
    (folder / "page.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", [page for page in [README, *PAGES] if "```gin" in page.read_text()], ids=lambda path: path.name)
def test_the_gin_files_of_a_page_are_understood(tmp_path, monkeypatch, path):
    """Each block is a file, of the name that stands last before it; what it binds exists and takes such values."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    blocks = list(re.finditer(r"^```gin\n(.*?)^```", text, re.M | re.S))
    names = [(re.findall(r"`(\w+\.gin)`", text[: block.start()]) or ["block.gin"])[-1] for block in blocks]
    for name, block in zip(names, blocks, strict=True):
        Path(name).write_text(block[1])
    included = {name for block in blocks for name in re.findall(r"^include '(\w+\.gin)'", block[1], re.M)}
    for name in set(names) - included:
        configure([name])


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs sphinx: pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"index.html", "start.html", "methods.html", "api.html"} <= {page.name for page in (tmp_path / "html").iterdir()}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_readme_names_exist(path):
    """Relative links, and the scripts and gin files of its commands."""
    text = path.read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    named = re.findall(r"(?<![\w./-])((?:projects|gin)/[\w./-]+\.(?:py|gin))", text)
    missing = [target for target in linked if not (path.parent / target).exists()]
    missing += [target for target in named if not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_are_parsed(path):
    """Every `gkd VERB ...` of a code block has a verb and options that exist."""
    import argparse
    import importlib
    import shlex

    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", path.read_text(), re.M | re.S)
    commands = [match for block in blocks for match in VERB.findall(block.replace("\\\n", " "))]
    for verb, options in commands:
        module = importlib.import_module(f"gkd.cli.{verb}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(shlex.split(options, comments=True))
