"""The torture test does what its table says; ``make torture`` runs it at length."""

from __future__ import annotations

import random
import signal

import pytest

from projects.reliability.bench import Bench
from projects.reliability.torture import full_disk, killed_by, table, two_writers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("fault", [killed_by(signal.SIGKILL), killed_by(signal.SIGTERM), full_disk, two_writers])
def test_nothing_is_lost(bench, tmp_path, fault):
    tally = fault(bench, random.Random(1), tmp_path / "run")
    assert tally.survived
    assert tally.tried > 0


def test_a_loss_would_be_seen(bench, tmp_path):
    path = tmp_path / "run"
    assert bench.start(path, "--seed", "1").wait() == 0
    assert bench.read(path) != bench.result


def test_table():
    assert table([("SIGKILL", 30, 30), ("full disk", 4, 3)]).splitlines()[2:] == [
        "| SIGKILL | 30 | 30 | 0 |",
        "| full disk | 4 | 3 | 1 |",
        "| all | 34 | 33 | 1 |",
    ]
