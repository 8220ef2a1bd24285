"""A teacher, then its student alone and distilled, several seeds each, in one table: `gkd trial` from a checkout."""

from __future__ import annotations

import sys

from gkd.cli import main

OPTIONS = ("--teacher", "gin/detection/digit_scenes_teacher.gin", "--seeds", "2", "--output", "runs/quickstart/detection")

if __name__ == "__main__":
    # The teacher learns from the same data, so what is set is set for all runs.
    sys.exit(main(["trial", *OPTIONS, *("--set-all" if option == "--set" else option for option in sys.argv[1:])]))
