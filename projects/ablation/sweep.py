"""Runs an ablation, cell by cell, and compares: the command `gkd sweep` from a checkout."""

from __future__ import annotations

import sys

from gkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
