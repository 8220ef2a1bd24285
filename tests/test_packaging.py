"""What an installation holds: every module and every recipe, found by the names that they have in a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BUILD = ("gkd", "gin", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILD:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True, timeout=300)
    (path,) = folder.glob("gkd-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder), str(wheel)], check=True)
    return folder


def gkd(installed: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "gkd"), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_the_wheel_holds_every_module_and_every_recipe(repository, wheel):
    content = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(repository).as_posix() for path in (repository / "gkd").rglob("*.py")}
    recipes = {f"gkd/recipes/{path.relative_to(repository / 'gin').as_posix()}" for path in (repository / "gin").rglob("*.gin")}
    assert len(modules) > 50
    assert len(recipes) > 50
    assert modules | recipes | {"gkd/py.typed"} <= content
    assert {name for name in content if not name.startswith(("gkd/", "gkd-"))} == set()


def test_the_command_works_away_from_the_checkout(installed, tmp_path):
    done = gkd(installed, tmp_path, "--help")
    assert done.returncode == 0
    assert "train" in done.stdout
    done = gkd(installed, tmp_path, "train", "--gin", "gin/quickstart_classificatoin.gin")
    assert done.returncode == 2
    assert "Did you mean gin/quickstart_classification.gin" in done.stderr
