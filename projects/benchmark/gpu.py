"""Everything that is worth knowing of a machine with a GPU, in order of worth, within some minutes: one command, one results file.

Each part is a command of its own. A part that is done stays in the results file and is not run again; a training that ran out of time goes
on from its checkpoint when the command is given once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import machine, write_json

from gkd.errors import UserError

__all__ = ["GPU"]

RUN = str(Path(__file__).resolve().parent / "run.py")
GRACE = 30.0  # seconds that a training has for its checkpoint
LAST_LINES = 5


@dataclass(frozen=True)
class Part:
    """Commands that run at the same time, by label, and the JSON files that they write."""

    name: str
    commands: Mapping[str, Sequence[str]]
    outputs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class GPU:
    """Runs tests, tables and trainings on a GPU, the most worthwhile first.

    Args:
        minutes: Time for all of it; what does not fit waits for the next run of the command.
        device: 'cuda', or 'cpu' for a rehearsal.
        tests: Arguments of pytest.
        tables: Benchmarks of this folder, and the bindings of each.
        rival: Bindings of the comparison with mdistiller, which takes part where the environment variable MDISTILLER names a checkout.
        pairs: Trainings: gin files and bindings by name.
        seeds: Of each training; all at once on the one device.
        folder: Where runs, tables and logs go.
        output: JSON file of all results; what is done there is not done again.
    """

    tables: Mapping[str, Sequence[str]]
    pairs: Mapping[str, Sequence[str]]
    minutes: float = 25
    device: str = "cuda"
    tests: Sequence[str] = ("-m", "gpu")
    rival: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    folder: str = "runs/gpu"
    output: str = "runs/benchmark/gpu.json"

    def parts(self) -> Iterator[Part]:
        """What is to do, in order."""
        yield Part("tests", {"pytest": [sys.executable, "-m", "pytest", "-q", *self.tests]})
        for name, bindings in self.tables.items():
            yield self._benchmark(name, bindings)
        if os.environ.get("MDISTILLER"):
            yield self._benchmark("rival", self.rival)
        for name, choices in self.pairs.items():
            yield self._training(name, choices)

    def run(self) -> dict[str, Any]:
        """Runs what is not done yet, and writes the results after every part.

        Returns:
            ``machine``, ``options`` and ``parts``: by name a ``state`` (done, stopped or failed), ``seconds``, ``results``, ``last_lines``.
        """
        end = time.monotonic() + 60 * self.minutes
        output = Path(self.output)
        parts = json.loads(output.read_text())["parts"] if output.is_file() else {}
        result = {"machine": machine(self.device, threads=0), "options": asdict(self), "parts": parts}
        for part in self.parts():
            if parts.get(part.name, {}).get("state") == "done":
                print(f"{part.name}: done before")
            elif (seconds := end - time.monotonic()) > GRACE:
                parts[part.name] = run_part(part, seconds - GRACE, Path(self.folder))
                write_json(result, self.output)
                print(f"{part.name}: {parts[part.name]['state']} after {parts[part.name]['seconds']:.0f} s", flush=True)
            else:
                print(f"{part.name}: no time left; give the command once more")
        write_json(result, self.output)
        return result

    def _benchmark(self, name: str, bindings: Sequence[str]) -> Part:
        output = Path(self.folder) / f"{name}.json"
        root = ROOTS.get(name)
        if root is None:
            raise UserError(f"Expected GPU.tables among {', '.join(ROOTS)} (got {name})")
        settings = [f"{root}.device = '{self.device}'", f"{root}.output = '{output}'", *bindings]
        command = [sys.executable, RUN, "--gin", f"gin/benchmark/{name}.gin", *_options("--set", settings)]
        return Part(name, {name: command}, {name: output})

    def _training(self, name: str, choices: Sequence[str]) -> Part:
        files = [choice for choice in choices if choice.endswith(".gin")]
        bindings = [choice for choice in choices if not choice.endswith(".gin")]
        commands, outputs = {}, {}
        for seed in self.seeds:
            folder = Path(self.folder) / name / f"seed{seed}"
            command = [sys.executable, "-m", "gkd", "train", *_options("--gin", files), *_options("--set", bindings)]
            command += ["--seed", str(seed), "--device", self.device, "--output", str(folder), "--resume", "--no-report"]
            commands[f"seed{seed}"], outputs[f"seed{seed}"] = command, folder / "results.json"
        return Part(name, commands, outputs)


ROOTS = {"sync": "SyncCheck", "graphs": "GraphBenchmark", "steps": "StepBenchmark", "methods": "MethodBenchmark", "rival": "RivalBenchmark"}


def _options(flag: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def run_part(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """Runs the commands of a part side by side, at most so long, and reads what they wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    logs = {label: folder / f"{part.name}-{label}.log" for label in part.commands}
    with ExitStack() as stack:
        processes = {
            label: subprocess.Popen(command, stdout=stack.enter_context(logs[label].open("w")), stderr=subprocess.STDOUT)
            for label, command in part.commands.items()
        }
        try:
            codes = {label: finish(process, begin + seconds) for label, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
    stopped = None in codes.values()
    state = "stopped" if stopped else "failed" if any(codes.values()) else "done"
    return {
        "state": state,
        "seconds": time.monotonic() - begin,
        "results": {label: json.loads(path.read_text()) for label, path in part.outputs.items() if codes[label] == 0},
        "last_lines": {label: log.read_text().splitlines()[-LAST_LINES:] for label, log in logs.items()},
    }


def finish(process: subprocess.Popen, end: float) -> int | None:
    """Exit code of a process; None where it had to be ended, after which a training has written its checkpoint."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
    return None
