"""A sweep on PostgreSQL, as several machines would share it: a private server of the test's own, started and stopped at will."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gkd.sweep.study import Study
from tests.sweep.program import PROGRAM

pytest.importorskip("optuna")
pytest.importorskip("psycopg")

USER = "postgres" if os.name == "posix" and os.geteuid() == 0 else getpass.getuser()  # the server refuses to run as root


def programs() -> Path | None:
    """Folder of initdb and pg_ctl."""
    if path := shutil.which("pg_ctl"):
        return Path(path).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return installed[-1].parent if installed else None


PROGRAMS = programs()
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="PostgreSQL is not installed")

SWEEP = """
import sys
from pathlib import Path
from gkd.sweep.cells import Job, work
from gkd.sweep.study import Study
from gkd.sweep.points import Plan, Sweep

sweep = Sweep("run.gin", axes={"x": tuple(range(10, 22))}, seeds=(0, 1))
study = Study(sys.argv[1], "test", patience=6.0)
def launch(cell):
    options = (option for line in (*cell.point.bindings, f"seed = {cell.seed}") for option in ("--set", line))
    return Job([sys.executable, "program.py", *options], Path("cells") / cell.name, cell.key, 1)
work(Plan(sweep, study, repr), study, launch, 1)
"""


class Server:
    """A PostgreSQL server in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "--auth=trust", f"--username={USER}", "-D", str(folder))

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-D", str(self.folder), "-o", options, "-l", str(self.folder / "log"), "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *options: str) -> None:
        assert PROGRAMS is not None
        user = {"user": USER} if os.geteuid() == 0 else {}
        command = [str(PROGRAMS / program), *options]
        done = subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, **user)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def server() -> Iterator[Server]:
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if os.geteuid() == 0:
        shutil.chown(folder, USER)
    server = Server(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


def test_many_open_a_fresh_database_at_once(server):
    with ThreadPoolExecutor(8) as pool:
        studies = list(pool.map(lambda _: Study(server.url, "fresh"), range(8)))
    assert [study.claims.claim("cell") for study in studies].count(True) == 1


@pytest.mark.slow
def test_processes_share_the_cells_though_one_is_killed_and_the_database_restarts(server, tmp_path, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(repository), "SECONDS": "0.5"}
    processes = [
        subprocess.Popen([sys.executable, "-c", SWEEP, server.url], env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    study = Study(server.url, "test")

    def wait_for(cells: int) -> None:
        deadline = time.monotonic() + 300
        while len(study.outcomes()) < cells:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for(3)
    processes[0].kill()
    wait_for(6)
    server.stop()
    time.sleep(2.0)
    server.start()
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes[1:]] == [0, 0], errors
    outcomes = study.outcomes()
    assert len(outcomes) == 24
    assert all(outcome.error is None for outcome in outcomes.values())
    trials = [trial.user_attrs["key"] for trial in study._study.get_trials()]
    assert sorted(trials) == sorted(outcomes)  # each cell was recorded once


def test_a_server_that_is_not_there_is_named(server):
    from gkd.errors import UserError

    server.stop()
    try:
        with pytest.raises(UserError, match=r"Expected a storage that can be reached \(got postgresql://"):
            Study(server.url, "test")
    finally:
        server.start()
