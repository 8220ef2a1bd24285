"""A teacher, then its student alone, with KD and with graphs, several seeds each, in one table: `gkd trial` from a checkout."""

from __future__ import annotations

import sys

from gkd.cli import main

OPTIONS = ("--teacher", "gin/classification/digits_teacher.gin", "--output", "runs/quickstart/classification")
METHODS = ("KD=gin/methods/kd.gin", "alone=gin/base/alone.gin", "graph + KD=")

if __name__ == "__main__":
    sys.exit(main(["trial", *OPTIONS, *(part for method in METHODS for part in ("--method", method)), *sys.argv[1:]]))
