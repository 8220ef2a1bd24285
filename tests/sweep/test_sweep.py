from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gkd.engine.interrupt import Interrupted
from gkd.errors import UserError
from gkd.sweep.cells import Job, make_teacher, work
from gkd.sweep.points import Plan, Point, Sweep, merge
from gkd.sweep.study import Outcome, Study
from tests.sweep.program import PROGRAM

pytest.importorskip("optuna")

# A sweep in a process of its own, to be killed.
SWEEP = """
import sys
from pathlib import Path
from gkd.sweep.cells import Job, work
from gkd.sweep.study import Study
from gkd.sweep.points import Plan, Sweep

sweep = Sweep("run.gin", axes={"x": (1, 2)}, seeds=(0, 1))
study = Study("sqlite:///sweep.db", "test")
def launch(cell):
    command = [sys.executable, "program.py", *(option for line in cell.point.bindings for option in ("--set", line))]
    return Job([*command, "--set", f"seed = {cell.seed}"], Path("cells") / cell.name, cell.key, 1)
work(Plan(sweep, study, repr), study, launch, 1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    return tmp_path


def open_study(**options) -> Study:
    return Study("sqlite:///sweep.db", "test", **options)


def launch(cell):
    bindings = [*cell.point.bindings, f"seed = {cell.seed}"]
    options = [option for line in bindings for option in ("--set", line)]
    return Job([sys.executable, "program.py", *options], Path("cells") / cell.name, cell.key, 1)


def run(sweep, study, **options):
    plan = Plan(sweep, study, lambda point: repr(point.bindings))
    records = work(plan, study, launch, 2, **{"tell": lambda line: None, **options})
    return {(cell.point.label, cell.seed): records[cell.key] for cell in plan.cells()}


def scores(records):
    return {cell: record.results["final"]["top1"] for cell, record in records.items() if record.results}


def ran() -> list[str]:
    return Path("ran.txt").read_text().splitlines() if Path("ran.txt").is_file() else []


def test_axes_are_bindings_files_and_nothing():
    sweep = Sweep(
        "run.gin",
        axes={
            "method": {"KD": "kd.gin", "DKD": ("dkd.gin", "RAMP = 1"), "alone": ()},
            "KNNEdges.k": (2, 4),
            "name": {"a": "Net.name = 'a'"},
        },
        references={"plain": "plain.gin"},
    )
    points = {point.label: point for point in sweep.grid()}
    assert list(points) == ["plain", "KD, k 2", "KD, k 4", "DKD, k 2", "DKD, k 4", "alone, k 2", "alone, k 4"]
    assert points["plain"].files == ("plain.gin",)
    assert points["DKD, k 4"].files == ("dkd.gin",)
    assert points["DKD, k 4"].bindings == ("RAMP = 1", "KNNEdges.k = 4", "Net.name = 'a'")
    assert points["alone, k 2"].files == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": {"x": ()}}, "values of the axis 'x'"),
        ({"axes": {"x": "x = 1"}}, "values of the axis 'x'"),
        ({}, "at least one axis"),
        ({"axes": {"x": (1,)}, "seeds": ()}, "at least one seed"),
        ({"axes": {"x": (1,)}, "seeds": (0, 0)}, "none twice"),
        ({"axes": {"x": (1,)}, "sampler": "best"}, "'grid', 'random', 'tpe'"),
        ({"axes": {"x": (1,)}, "sampler": "tpe"}, "number of trials"),
        ({"axes": {"x": (1,)}, "workers": 0}, "workers"),
        ({"axes": {"x": (1,)}, "split": "train"}, r"'val' or 'test' \(got 'train'\)"),
        ({"base": (), "axes": {"x": (1,)}}, "gin file as the base"),
    ],
)
def test_malformed_sweeps(options, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**{"base": "run.gin", **options})


def test_equal_configurations_are_one_point():
    # k makes no difference to complete graphs: 2 x 2 points are 3 runs.
    sweep = Sweep("run.gin", axes={"k": (2, 4), "edges": {"kNN": "kNN", "complete": "complete"}})
    merged = merge(sweep.grid(), ["2 kNN", "complete", "4 kNN", "complete"])
    points = {point.label: point for point, _ in merged}
    assert list(points) == ["k 2, kNN", "complete", "k 4, kNN"]
    assert points["complete"].values == {"edges": "complete"}
    assert points["complete"].covers == ({"k": "k 2", "edges": "complete"}, {"k": "k 4", "edges": "complete"})


def test_the_baseline_and_every_point_are_looked_at_first():
    sweep = Sweep("run.gin", axes={"x": (1, 2)}, baseline="KD")
    with pytest.raises(UserError, match=r"Sweep.baseline to be one of 'x 1', 'x 2' \(got 'KD'\)"):
        Plan(sweep, open_study(), repr)

    def refuse(point: Point) -> str:
        if "x = 2" in point.bindings:
            raise UserError("Expected a binding (got x)")
        return point.label

    with pytest.raises(UserError, match="In the cell 'x 2' of the sweep: Expected a binding"):
        Plan(Sweep("run.gin", axes={"x": (1, 2)}), open_study(), refuse)


def test_cells_run_fail_and_crash_side_by_side():
    sweep, lines = Sweep("run.gin", axes={"x": (1, 2, 3, 4, 5)}, seeds=(0, 10)), []
    found = run(sweep, open_study(), tell=lines.append)
    assert scores(found) == {("x 1", 0): 1, ("x 2", 0): 2, ("x 1", 10): 11, ("x 2", 10): 12}
    assert found["x 3", 0].error == "Expected another x (got 3) while building Run"
    assert found["x 4", 0].error == "ended by the signal SIGKILL"
    assert found["x 5", 10].error == "RuntimeError: a defect"
    assert len(lines) == 10
    assert sum("failed: " in line for line in lines) == 6
    assert json.loads(Path("cells/x_2/seed10/cell.json").read_text())["command"][-1] == "--overwrite"

    # Again: nothing is left to do, unless failed cells shall be tried once more or a seed is new.
    before, study = ran(), open_study()
    assert run(sweep, study) == found
    assert ran() == before
    failed = [record.number for record in found.values() if record.error]
    run(Sweep("run.gin", axes={"x": (1, 2, 3)}, seeds=(0, 10)), study, ignored=failed)
    assert ran()[len(before) :] == ["x = 3 seed = 0", "x = 3 seed = 10"]
    run(Sweep("run.gin", axes={"x": (1, 7)}, seeds=(0,)), study)  # other values on an axis than Optuna knows of
    assert ran()[len(before) + 2 :] == ["x = 7 seed = 0"]


def test_a_cell_goes_on_from_a_checkpoint_of_its_own_configuration(tmp_path):
    def options(key: str) -> str:
        job = Job([sys.executable, "program.py", "--set", "x = 1"], tmp_path / "run", key, 1)
        while job.outcome() is None:
            time.sleep(0.02)
        return job.command[-1]

    assert options("a") == "--overwrite"
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/last.pt").touch()
    assert options("a") == "--resume"
    assert options("b") == "--overwrite"


def test_several_at_once_share_the_cells():
    sweep = Sweep("run.gin", axes={"x": tuple(range(6, 12))}, seeds=(0, 1))
    found: list = [None] * 3

    def take_part(number: int) -> None:  # as a process would: with a connection and a claim of its own
        found[number] = run(sweep, open_study())

    threads = [threading.Thread(target=take_part, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran()) == sorted(f"x = {x} seed = {seed}" for x in range(6, 12) for seed in (0, 1))
    assert len(found[0]) == 12
    assert found[0] == found[1] == found[2]


def test_one_of_many_gets_a_claim():
    studies, won = [open_study() for _ in range(4)], []
    barrier = threading.Barrier(4)

    def claim(study: Study) -> None:
        for cell in range(8):
            barrier.wait()
            if study.claims.claim(f"cell {cell}"):
                won.append(cell)

    threads = [threading.Thread(target=claim, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(8))


def test_a_claim_without_a_sign_of_life_is_taken_over():
    first, second, third = open_study(), open_study(patience=0.3), open_study(patience=0.3)
    assert first.claims.claim("cell")
    assert not second.claims.claim("cell")
    time.sleep(0.35)
    assert first.claims.touch("cell")  # alive
    assert not second.claims.claim("cell")
    assert not third.claims.claim("cell")
    time.sleep(0.35)
    assert [second.claims.claim("cell"), third.claims.claim("cell")] == [True, False]
    # The first one comes back: it hears of its loss, and its results do not count.
    assert not first.record("cell", {}, {}, {}, Outcome({"final": {"top1": 1.0}}, None, -1), "top1")
    first.claims._renewed["cell"] = 0.0
    assert first.claims.renew() == ["cell"]
    assert open_study().outcomes() == {}
    assert second.record("cell", {}, {}, {}, Outcome({"final": {"top1": 2.0}}, None, -1), "top1")
    assert third.outcomes()["cell"].results == {"final": {"top1": 2.0}}
    assert third.claims.claim("cell")


def test_killed_and_started_again(repository):
    environment = {**os.environ, "PYTHONPATH": str(repository), "SECONDS": "30"}
    process = subprocess.Popen([sys.executable, "-c", SWEEP], env=environment)
    deadline = time.monotonic() + 120
    while not ran():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    claimed = ran()
    assert len(claimed) == 1
    begin = time.monotonic()
    sweep, study = Sweep("run.gin", axes={"x": (1, 2)}, seeds=(0, 1)), open_study()
    plan = Plan(sweep, study, repr)
    records = work(plan, study, launch, 2, tell=lambda line: None)
    assert time.monotonic() - begin < 25  # it does not wait for the dead one's patience, nor did the cell outlive it
    assert [records[cell.key].results["final"]["top1"] for cell in plan.cells()] == [1, 2, 2, 3]
    assert len(ran()) == 5


def test_ctrl_c_stops_the_cells_and_gives_the_claims_back(monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    sweep, study = Sweep("run.gin", axes={"x": (1, 2)}, seeds=(0,)), open_study()
    jobs = []

    def launch_and_interrupt(cell):
        jobs.append(launch(cell))
        if len(jobs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return jobs[-1]

    with pytest.raises(Interrupted, match="Go on with the same command"):
        work(Plan(sweep, study, repr), study, launch_and_interrupt, 2)
    assert len(jobs) == 2
    assert all(job.outcome() is not None for job in jobs)
    monkeypatch.setenv("SECONDS", "0")
    assert len(scores(run(sweep, open_study()))) == 2


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_chooses_points(sampler):
    sweep = Sweep(
        "run.gin",
        axes={"x": (1, 2, 6), "y": (1, 2, 7)},
        seeds=(0, 1),
        sampler=sampler,
        trials=4,
        references={"zero": "x = 0"},
        baseline="zero",
    )
    found = scores(run(sweep, open_study()))
    assert 2 <= len(found) // 2 <= 5  # the reference and at most 4 points: a point may be drawn twice
    assert found["zero", 1] == 101  # a sampler chooses by the held-out images
    assert scores(run(sweep, open_study())) == found
    assert len(ran()) == len(found)


def test_the_teacher_is_trained_once():
    weights = Path("shared/teacher/student.safetensors")
    command = [sys.executable, "program.py", "--set", "x = 1"]
    lines: list[str] = []
    threads = [threading.Thread(target=make_teacher, args=(open_study(), weights, command, 1, lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert weights.read_text() == "weights"
    assert ran() == ["x = 1"]
    assert [path.name for path in Path("shared").iterdir()] == ["teacher"]
    make_teacher(open_study(), weights, command, 1, lines.append)
    assert ran() == ["x = 1"]
    with pytest.raises(UserError, match=r"Expected the teacher to be trained .*another x"):
        make_teacher(open_study(), Path("other/student.safetensors"), [*command[:-1], "x = 3"], 1, lines.append)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:////nowhere/at/all/sweep.db", "nowhere"),
        ("nosuchdatabase://host/name", "nosuchdatabase"),
        ("sweep.db", "sweep.db"),
    ],
)
def test_a_storage_that_cannot_be_reached(url, reason):
    with pytest.raises(UserError, match=rf"storage that can be reached \(got .*{reason}"):
        Study(url, "test")


def test_passwords_are_not_shown():
    with pytest.raises(UserError) as caught:
        Study("nosuchdatabase://me:secret@host/name", "test")
    assert "secret" not in str(caught.value)
