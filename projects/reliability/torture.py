"""Disturbs small trainings in every way that a machine knows, and counts what is lost.

    python -m projects.reliability.torture [--kills 100] [--others 21] [--seed 0]

Every disturbed run goes on with ``gkd train --resume`` and has to give, bit for bit, the student, the records and the results of an
undisturbed one. The table it prints is that of the README beside this file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from projects.reliability.bench import Bench, limit_file_size

KILLS_PER_RUN = 5
CHECKPOINT = 700_000  # bytes of a checkpoint of this training, about


class Tally(NamedTuple):
    """What became of the faults of one run."""

    tried: int
    survived: bool


def killed_by(signum: signal.Signals) -> Callable[[Bench, random.Random, Path], Tally]:
    """A fault: the signal comes several times in a run, each time at a random moment."""

    def fault(bench: Bench, draw: random.Random, path: Path) -> Tally:
        tried, well = 0, True
        while tried < KILLS_PER_RUN:
            process = bench.start(path, "--resume")
            process.wait(draw.uniform(0.0, bench.seconds))
            if process.poll() is not None:
                break
            process.send(signum)
            tried += 1
            # Before the first step and after the last one a signal ends the process in the ordinary way.
            well = well and process.wait() in (0, -signum, 128 + signum) and "Error" not in process.text()
        return Tally(tried, bench.finishes_alike(path) and well)

    return fault


def full_disk(bench: Bench, draw: random.Random, path: Path) -> Tally:
    """The disk is full at a random moment: a small tmpfs where root may mount one, a limit on the size of files otherwise."""
    mounted = mount(path, f"size={draw.randint(CHECKPOINT // 8, 5 * CHECKPOINT // 2)}")
    limit = draw.randint(1, CHECKPOINT)
    try:
        process = bench.start(path, "--resume", before=(lambda: None) if mounted else (lambda: limit_file_size(limit)))
        refused = process.wait() == 2 and "Traceback" not in process.text()
        well = refused or (mounted and process.code == 0)  # it may have been enough
        if mounted:
            mount(path, "remount,size=64m")
        return Tally(1, bench.finishes_alike(path) and well)
    finally:
        if mounted:
            subprocess.run(["umount", path], check=True)


def read_only(bench: Bench, draw: random.Random, path: Path) -> Tally:
    """The file system becomes read-only between two parts of a run; nothing to try where none may be mounted."""
    if not mount(path, "size=64m"):
        return Tally(0, True)
    try:
        bench.start(path, "--resume", "--set", f"Trainer.max_steps = {draw.randint(1, 11)}").wait()
        mount(path, "remount,ro")
        process = bench.start(path, "--resume")
        well = process.wait() == 2 and "Traceback" not in process.text()
        mount(path, "remount,rw")
        return Tally(1, bench.finishes_alike(path) and well)
    finally:
        subprocess.run(["umount", path], check=True)


def two_writers(bench: Bench, draw: random.Random, path: Path) -> Tally:
    """A second process wants the folder of a running one, or of one that stands still."""
    first = bench.start(path)
    while not (path / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.005)
    stands_still = draw.random() < 0.5
    if stands_still:
        first.send(signal.SIGSTOP)
    second = bench.start(path, draw.choice(("--resume", "--overwrite")))
    refused = second.wait() == 2 and f"the process {first.pid}" in second.text()
    if stands_still:
        first.send(signal.SIGCONT)
    return Tally(1, first.wait() == 0 and refused and bench.read(path) == bench.result)


# A further fault, such as a database that restarts under a sweep, is one more line.
KILLS = {signum.name: killed_by(signum) for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
OTHERS = {"full disk": full_disk, "read-only file system": read_only, "two writers": two_writers}


def mount(path: Path, options: str) -> bool:
    """Mounts a tmpfs, or mounts it anew with other options; False where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


def torture(kills: int, others: int, seed: int, root: Path) -> list[tuple[str, int, int]]:
    """Tries every fault until the numbers asked for are reached; gives its name, how often it was tried, and how often survived."""
    draw, bench = random.Random(seed), Bench(root)
    rows = []
    for faults, count in ((KILLS, kills), (OTHERS, others)):
        for name, fault in faults.items():
            tried = survived = 0
            for number in range(-(-count // len(faults))):
                if tried * len(faults) >= count:
                    break
                path = root / f"{name.replace(' ', '-')}-{number}"
                tally = fault(bench, draw, path)
                tried, survived = tried + tally.tried, survived + tally.tried * tally.survived
                if tally.survived:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    print(f"LOST: {name}, see {path}", flush=True)
            print(f"{name}: {survived} of {tried}", flush=True)
            rows.append((name, tried, survived))
    return rows


def table(rows: list[tuple[str, int, int]]) -> str:
    """The rows and their sum in Markdown."""
    total = ("all", sum(tried for _, tried, _ in rows), sum(survived for *_, survived in rows))
    lines = ["| fault | tried | survived | lost |", "|-|-|-|-|"]
    return "\n".join([*lines, *(f"| {name} | {tried} | {survived} | {tried - survived} |" for name, tried, survived in (*rows, total))])


def run() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Disturbs small trainings and counts what is lost.")
    parser.add_argument("--kills", type=int, default=100, help="signals to send, over all kinds")
    parser.add_argument("--others", type=int, default=21, help="other faults, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    rows = torture(arguments.kills, arguments.others, arguments.seed, root)
    print(table(rows))
    lost = sum(tried - survived for _, tried, survived in rows)
    if not lost:
        shutil.rmtree(root)
    return int(lost > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run())
