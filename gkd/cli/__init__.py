"""The command ``gkd``: one module for each of its verbs, imported when it is asked for, so that ``gkd --help`` loads no torch."""

from gkd.cli.main import main

__all__ = ["main"]
