"""Trains, distils, evaluates, resumes and exports classifiers: python projects/classification/train_net.py --gin FILE"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gkd.config import configure
from gkd.engine import cli
from gkd.viz import write_report

ROOT = "Classification"


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    config = configure(arguments.gin, cli.overrides(arguments, ROOT))
    task = config.build(ROOT)
    results = cli.run_task(task, config.text, arguments, lambda folder: write_report(folder, task.distiller, task.data))
    if arguments.export and results is not None:
        task.trainer.fabric.print(f"Wrote {task.export(arguments.export, cli.run_folder(arguments))}")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(cli.build_parser(__doc__), run, argv)


if __name__ == "__main__":
    sys.exit(main())
