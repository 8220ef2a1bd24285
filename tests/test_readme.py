from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"  # The examples of gkd/graphs/README.md run in tests/graphs.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_" not in path.relative_to(ROOT / "docs").parts[0][:1])
READMES = [README, *sorted((ROOT / "gkd").rglob("README.md")), *sorted((ROOT / "projects").rglob("README.md")), *PAGES]
VERB = re.compile(r"^(?:torchrun .* -m )?gkd (\w+)(.*)$", re.M)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a text, each with the line on which its code begins."""
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)]


def test_the_reader_of_blocks():
    text = "a\n```python\nx = 1\n```\n```bash\nmake\n```\n```python\ny = 2\nz = 3\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n"), (9, "y = 2\nz = 3\n")]


def test_the_code_of_the_readme_runs(tmp_path):
    """One block after the other in one process, as a reader would type them; empty lines keep the line numbers of the text."""
    blocks = python_blocks(README.read_text())
    assert blocks
    script = ""
    for line, code in blocks:
        script += "\n" * (line - 1 - script.count("\n")) + code
    (tmp_path / "README.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "README.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
