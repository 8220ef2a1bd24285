"""The command ``gkd``, as ``python -m gkd``."""

import sys

from gkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
