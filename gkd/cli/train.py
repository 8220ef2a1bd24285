"""Trains, distils, evaluates, resumes and exports a student: gkd train --gin FILE"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gkd.errors import UserError

if TYPE_CHECKING:
    from gkd.config import Config
    from gkd.tasks import Task
    from gkd.tasks.made import AbsentWeightsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
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


def run(arguments: argparse.Namespace, making: Sequence[str] = ()) -> None:
    """Trains or evaluates, as the options say.

    Args:
        arguments: The options.
        making: Weights that wait for this training.
    """
    from gkd.engine import RunFolder
    from gkd.tasks.made import AbsentWeightsError
    from gkd.viz import write_report

    try:
        config, task = build_task(arguments)
    except UserError as error:
        if arguments.eval_only or not isinstance(error.__cause__, AbsentWeightsError):
            raise
        make_weights(error.__cause__, arguments.device, making)
        config, task = build_task(arguments)
    fabric = task.trainer.fabric
    folder = RunFolder((arguments.output or Path("runs") / Path(arguments.gin[-1]).stem).expanduser())
    if arguments.eval_only:
        task.trainer.say(f"Evaluating {task.load(folder)}")
        task.trainer.say(json.dumps(task.evaluate()))
    else:
        if fabric.is_global_zero:
            folder.prepare(resume=arguments.resume, overwrite=arguments.overwrite)
        fabric.barrier()
        results = task.train(folder, config.text, arguments.resume, arguments.overwrite)
        if results is None:
            return
        if fabric.is_global_zero and not arguments.no_report:
            task.trainer.say(f"Wrote {write_report(folder, task)}")
    if fabric.is_global_zero and arguments.export:
        task.trainer.say(f"Wrote {task.export(arguments.export, folder)}")


def build_task(arguments: argparse.Namespace) -> tuple[Config, Task]:
    """Reads the gin files and builds the task that they configure; --seed and --device are bindings like any other."""
    from gkd.config import configure
    from gkd.tasks import Task

    config = configure(arguments.gin, arguments.set)
    root = config.root(Task)
    overrides = list(arguments.set)
    if arguments.seed is not None:
        overrides.append(f"{root}.seed = {arguments.seed}")
    if arguments.device is not None:
        overrides.append(f"Trainer.device = {arguments.device!r}")
    config = configure(arguments.gin, overrides)
    return config, config.build(root)


def make_weights(absent: AbsentWeightsError, device: str | None, making: Sequence[str]) -> None:
    """Trains the recipe of absent weights into their folder, or goes on with a training that was interrupted there."""
    if absent.weights in making:
        raise UserError(f"Expected {absent.recipe} to need no weights that it makes itself (got {absent.weights}). Remove its own recipe.")
    folder = Path(absent.weights).parent
    print(f"Training {absent.recipe} first, which makes {absent.weights}", flush=True)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--gin", absent.recipe, "--output", str(folder), "--resume", *([] if device is None else ["--device", device])]
    run(parser.parse_args(options), [*making, absent.weights])
    if not Path(absent.weights).is_file():
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise UserError(f"Expected {absent.recipe} to make {absent.weights} (got {written}). Correct the name of the weights.")
