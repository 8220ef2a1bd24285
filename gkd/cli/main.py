"""Parses the command line, runs the verb, and turns what may go wrong into one message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gkd.cli.edge import SIGNAL, explain
from gkd.cli.streams import outlive_readers

VERBS = {
    "train": "train, distil, evaluate and export a student, as gin files say",
    "trial": "train a teacher, then its student by several methods and seeds, and compare",
    "predict": "classes, boxes or masks of images, by a run's student",
    "compare": "a table and a page of several runs",
    "sweep": "run an ablation, cell by cell, and compare",
    "report": "write a run's report again",
    "taps": "the places of a network that distillation can look at",
    "methods": "the methods with their gin files, papers and published figures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``gkd``.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0; 2 for a mistake of the user's; 1 where a training or a cell of a sweep failed; 128 + signal where a signal ended it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in VERBS:
        verb = importlib.import_module(f"gkd.cli.{argv[0]}")
        parser = argparse.ArgumentParser(prog=f"gkd {argv[0]}", description=verb.__doc__, allow_abbrev=False)
        verb.add_arguments(parser)
        return run(parser, verb.run, argv[1:])
    parser = argparse.ArgumentParser(
        prog="gkd",
        description="Graph-based knowledge distillation in computer vision.",
        epilog="\n".join(["verbs:", *(f"  {verb:10} {text}" for verb, text in VERBS.items()), "", "gkd VERB --help explains its options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=f"one of {', '.join(VERBS)}")
    parser.parse_args(argv[:1])
    return 0


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None) -> int:
    """Parses and works; what may go wrong becomes one message and an exit code, as `main` documents them.

    Args:
        parser: Knows the options.
        work: Does the work; what it returns is the exit code, None is 0.
        argv: Arguments without the program's name; those of the process by default.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    outlive_readers()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's own package.module:factory, and imports in gin files
    try:
        return work(arguments) or 0
    except Exception as error:
        code, message = explain(error)
        if arguments.debug or message is None:
            traceback.print_exc()
        else:
            print(f"{parser.prog}: {message}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what the last checkpoint holds is kept.", file=sys.stderr)
        return SIGNAL + signal.SIGINT
    finally:
        sys.stdout.flush()
