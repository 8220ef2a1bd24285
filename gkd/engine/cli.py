"""The command line that every train_net.py shares: its options and what they make of a task, its messages, its exit codes."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd.engine.interrupt import Interrupted
from gkd.engine.loop import NonFiniteLossError
from gkd.engine.run import RunFolder
from gkd.engine.task import Task
from gkd.errors import UserError

USER_ERROR = 2


def build_parser(description: str) -> argparse.ArgumentParser:
    """The options of DESIGN's command line; a project adds its own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--gin", action="append", required=True, metavar="FILE", help="configuration; several are read one after the other")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", help="one more binding, such as 'KNNEdges.k = 16'")
    parser.add_argument("--output", type=Path, help="run folder (default: runs/ and the name of the last --gin file)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote to the run folder")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the run folder's student, or else the weights that the file names"
    )
    parser.add_argument("--export", choices=("onnx", "torch"), help="write the student as ONNX or as a torch.export program too")
    parser.add_argument("--no-report", action="store_true", help="leave out report.html, whose pictures take some seconds")
    parser.add_argument("--seed", type=int, help="seed of everything that is drawn")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_folder(arguments: argparse.Namespace) -> RunFolder:
    """Where the run goes: --output, or runs/ and the name of the last --gin file."""
    return RunFolder(arguments.output or Path("runs") / Path(arguments.gin[-1]).stem)


def overrides(arguments: argparse.Namespace, root: str) -> list[str]:
    """The bindings that the options stand for; they are part of the operative configuration like any other."""
    bindings = list(arguments.set)
    if arguments.seed is not None:
        bindings.append(f"{root}.seed = {arguments.seed}")
    if arguments.device is not None:
        bindings.append(f"Trainer.device = {arguments.device!r}")
    return bindings


def run_task(task: Task, config: str, arguments: argparse.Namespace, write_report: Callable[[RunFolder], Path]) -> dict[str, Any] | None:
    """Trains or evaluates, as the options say.

    Args:
        task: What the configuration built.
        config: The operative configuration, to be kept with the run.
        arguments: From the parser.
        write_report: Draws the page of a run that has ended.

    Returns:
        The results, or None where a training stopped before its end.
    """
    fabric, folder = task.trainer.fabric, run_folder(arguments)
    if arguments.eval_only:
        fabric.print(f"Evaluating {task.load(folder)}")
        results = task.evaluate()
        fabric.print(json.dumps(results))
        return results
    if fabric.is_global_zero:
        folder.prepare(resume=arguments.resume, overwrite=arguments.overwrite)
    fabric.barrier()
    trained = task.train(folder, config, resume=arguments.resume)
    if trained is not None:
        *written, last = map(str, task.outputs(folder))
        fabric.print(f"Wrote {', '.join(written)} and {last}")
        if fabric.is_global_zero and not arguments.no_report:
            fabric.print(f"Wrote {write_report(folder)}")
    return trained


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], object], argv: Sequence[str] | None = None) -> int:
    """Parses and runs; turns what may go wrong into one message and an exit code.

    Args:
        parser: From `build_parser`.
        run: Does the work.
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0; 2 for a mistake of the user's; 1 where the losses are no numbers; 128 + signal where a signal ended it.
    """
    arguments = parser.parse_args(argv)
    sys.path.append(str(Path.cwd()))  # the user's own package.module:factory, and imports in gin files
    try:
        run(arguments)
    except (ValueError, NonFiniteLossError) as error:
        # A value may turn out to be wrong only once there are features, such as more neighbours than nodes.
        if arguments.debug:
            traceback.print_exc()
        else:
            hint = "" if isinstance(error, (UserError, NonFiniteLossError)) else " (--debug shows where)"
            print(f"{parser.prog}: {error}{hint}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else USER_ERROR
    except Interrupted as interrupted:
        print(f"{parser.prog}: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what the last checkpoint holds is kept.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
