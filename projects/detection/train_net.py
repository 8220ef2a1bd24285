"""Trains, distils, evaluates and exports detectors: the command `gkd train` from a checkout."""

from __future__ import annotations

import sys

from gkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
