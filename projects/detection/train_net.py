"""Trains, distils, evaluates and resumes detectors: python projects/detection/train_net.py --gin FILE"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import write_report

from gkd.config import MODULES, configure
from gkd.engine import cli
from gkd.errors import UserError

ROOT = "Detection"


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.export:
        raise UserError(
            f"Expected no --export for detectors (got {arguments.export}). The run folder holds the student in its library's own format, "
            "which the library's own tools export."
        )
    config = configure(arguments.gin, cli.overrides(arguments, ROOT), (*MODULES, "gkd.detection", "gkd.detection.detectron2"))
    task = config.build(ROOT)
    return cli.run_task(task, config.text, arguments, lambda folder: write_report(folder, task))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(cli.build_parser(__doc__), run, argv)


if __name__ == "__main__":
    sys.exit(main())
