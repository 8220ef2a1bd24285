"""What a training step costs with each method, beside the student alone and beside KD in the same run.

Every row is a file of gin/methods or gin/base, or bindings, on top of one pair. Networks start from random weights, images are noise:
neither changes the cost. A step is what the engine does: forward of student and teacher, losses, backward, optimiser.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Run, in_child, machine, peak_memory, time_in_turns, write_json
from safetensors.torch import save_file

from gkd.config import MODULES, configure
from gkd.engine.folder import count_parameters
from gkd.models import build_classifier

__all__ = ["StepBenchmark"]

Choice = str | Sequence[str]  # gin files and bindings
PRELOAD = ("gkd.engine", "gkd.losses")
BOUND = ", bound"
LIMIT = "limit"
PROBES = 3  # of memory, whose median counts: what an allocator asks for differs by a tenth from run to run


def training_step(files: list[str], bindings: list[str], networks_alone: bool = False) -> tuple[Run, int]:
    """A function that takes one step, or runs the two networks and the student's backward alone; how many parameters distillation adds."""
    task = configure(files, bindings, (*MODULES, "bounds")).build("Classification")
    trainer, distiller = task.trainer, task.distiller
    if trainer.channels_last:
        distiller.to(memory_format=torch.channels_last)
    module, optimizer = trainer.fabric.setup(distiller, trainer.optimizer(distiller))
    distiller.progress(1e6)  # past every ramp
    module.train()
    images, targets, index = next(iter(task.data.batches("train", task.batch_size, device=trainer.device)))
    if trainer.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        optimizer.zero_grad()
        trainer.fabric.backward(torch.stack(list(module(images, targets, index).values())).sum())
        optimizer.step()

    def run_networks() -> None:
        optimizer.zero_grad()
        with trainer.fabric.autocast():
            with torch.no_grad():
                task.teacher(images)
            logits = task.student(images)
        logits.float().sum().backward()

    if networks_alone:
        return run_networks, 0
    return run, count_parameters(distiller) - count_parameters(task.student)


def memory_probe(files: list[str], bindings: list[str], networks_alone: bool, device: str, threads: int) -> float:
    """MiB that two steps need beyond the two networks, optimiser state included; runs in a process of its own."""
    torch.set_num_threads(threads)
    run, _ = training_step(files, bindings, networks_alone)
    return peak_memory(lambda: (run(), run()), device)


def table(result: Mapping[str, Any]) -> str:
    """The rows as text."""
    head = f"{'':28} {'ms/step':>9} {'to alone':>9} {'to KD':>9} {'to bound':>9} {'peak MiB':>9} {'to KD':>9} {'parameters':>11}"
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), head, "-" * len(head)]
    rows = {row["method"]: row for row in result["rows"]}
    first = result["rows"][0]
    kd = rows.get("KD", first)
    for row in result["rows"]:
        bound = rows.get(f"{row['method']}{BOUND}")
        times = f"{row['ms']:9.1f} {row['ms'] / first['ms']:8.2f}x {row['ms'] / kd['ms']:8.2f}x"
        times += f" {row['ms'] / bound['ms']:8.2f}x" if bound else 10 * " "
        memory = f"{row['peak_mib']:9.0f} {row['peak_mib'] / max(kd['peak_mib'], 1):8.2f}x"
        lines.append(f"{row['method']:28} {times} {memory} {row['parameters']:11,}")
    return "\n".join(lines)


@dataclass(frozen=True)
class StepBenchmark:
    """Times a step of each method and prints one table; the first row is what 'to alone' refers to, the row 'KD' what 'to KD' does.

    Args:
        pair: gin file of the two networks.
        teacher: Name of the teacher in it.
        methods: gin file, binding or several of either, by name of the row.
        bounds: By the name of a method, a binding that puts the least in place of its loss: a row more, which 'to bound' refers to.
        limit: A row more: both networks forward and the student backward, without losses and without an optimiser.
        bindings: Further bindings for every row.
        num_classes: Classes of the noise images.
        input_size: Channels, height and width of them.
        batch_size: Images of a step.
        precision: As of the trainer.
        repeats: Timed steps of each row, in turns; the median counts.
        threads: CPU threads of torch.
        device: 'cpu' or 'cuda'.
        output: JSON file of the result; None writes none.
    """

    pair: str
    teacher: str
    methods: Mapping[str, Choice]
    bounds: Mapping[str, str] = field(default_factory=dict)
    limit: bool = False
    bindings: tuple[str, ...] = ()
    num_classes: int = 100
    input_size: tuple[int, int, int] = (3, 32, 32)
    batch_size: int = 64
    precision: str = "bf16-mixed"
    repeats: int = 10
    threads: int = 2
    device: str = "cpu"
    output: str | None = "runs/benchmark/steps.json"

    def recipes(self) -> dict[str, tuple[str, ...]]:
        """Gin files and bindings of every row, a bound after its method."""
        if unknown := set(self.bounds).difference(self.methods):
            raise ValueError(f"Expected bounds of methods among {', '.join(self.methods)} (got {min(unknown)})")
        recipes: dict[str, tuple[str, ...]] = {}
        for name, choice in self.methods.items():
            recipes[name] = (choice,) if isinstance(choice, str) else tuple(choice)
            if name in self.bounds:
                recipes[name + BOUND] = (*recipes[name], self.bounds[name])
        return {**recipes, LIMIT: ("gin/methods/kd.gin",)} if self.limit else recipes

    @contextmanager
    def prepared(self) -> Iterator[dict[str, tuple[list[str], list[str]]]]:
        """Gin files and all bindings of every row, for as long as the teacher's weights lie on the disk."""
        torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "teacher.safetensors"
            save_file(build_classifier(self.teacher, num_classes=self.num_classes).state_dict(), weights)
            settings = [
                "Classification.data = @RandomImages()",
                f"RandomImages.num_classes = {self.num_classes}",
                f"RandomImages.input_size = {tuple(self.input_size)}",
                f"RandomImages.num_train = {max(self.num_classes, self.batch_size)}",
                f"BATCH_SIZE = {self.batch_size}",
                f"TEACHER_WEIGHTS = '{weights}'",
                f"Trainer.device = '{self.device}'",
                f"Trainer.precision = '{self.precision}'",
                "Trainer.channels_last = True",
                *self.bindings,
            ]
            rows = {}
            for name, parts in self.recipes().items():
                files = [self.pair, *(part for part in parts if part.endswith(".gin"))]
                rows[name] = files, [*settings, *(part for part in parts if not part.endswith(".gin"))]
            yield rows

    def measure(self) -> list[dict[str, Any]]:
        """The rows: method, ms, peak_mib and parameters (those that distillation adds)."""
        with self.prepared() as rows:
            steps = {name: training_step(*row, name == LIMIT) for name, row in rows.items()}
            seconds = time_in_turns({name: run for name, (run, _) in steps.items()}, self.repeats, self.device)
            memory = {
                name: statistics.median(
                    in_child(memory_probe, *row, name == LIMIT, self.device, self.threads, preload=PRELOAD) for _ in range(PROBES)
                )
                for name, row in rows.items()
            }
        return [
            {"method": name, "ms": 1000 * seconds[name], "peak_mib": memory[name], "parameters": parameters}
            for name, (_, parameters) in steps.items()
        ]

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and writes the JSON file.

        Returns:
            ``machine`` and ``rows``, see :meth:`measure`.
        """
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "rows": self.measure()}
        print(table(result))
        write_json(result, self.output)
        return result
