"""Lists the methods: each with its gin file, paper and published figures. Add one to a pair: gkd train --gin PAIR --gin FILE"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from gkd.sources import RECIPES


class Method(NamedTuple):
    """What the header of a file in gin/methods says."""

    file: str
    summary: str
    paper: str
    published: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the list."""
    for method in map(read_method, sorted((RECIPES / "methods").glob("*.gin"))):
        print(f"{method.file}\n  {method.summary}\n  {method.paper}\n  Published: {method.published}\n")


def read_method(path: Path) -> Method:
    """Reads the header of a method's file: what it does, where it was published, and with what figures.

    Raises:
        ValueError: If the header lacks one of them.
    """
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
    published = next((line.removeprefix("Published: ") for line in lines if line.startswith("Published: ")), None)
    if len(lines) < 3 or published is None:
        raise ValueError(f"Expected a summary, a paper and a line 'Published: ...' at the head of {path} (got {lines})")
    return Method(f"gin/methods/{path.name}", lines[0], lines[1], published)
