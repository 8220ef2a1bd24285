"""Runs a benchmark: python projects/benchmark/run.py --gin gin/benchmark/graphs.gin

The file gin/benchmark/NAME.gin configures the class in projects/benchmark/NAME.py; further --gin files and --set bindings change its sizes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gkd.config import configure
from gkd.errors import UserError
from gkd.sources import RECIPES


def run(files: Sequence[str], overrides: Sequence[str]) -> None:
    name = Path(files[0]).stem
    known = sorted(file.stem for file in (RECIPES / "benchmark").glob("*.gin"))
    if name not in known:
        raise UserError(f"Expected the first --gin file to be named after a benchmark, {', '.join(known)} (got {files[0]})")
    (root,) = importlib.import_module(name).__all__
    configure(files, overrides, modules=(name,)).build(root).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="configuration; several are read one after the other")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="such as 'GraphBenchmark.device = \"cuda\"'")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.gin, arguments.set)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
