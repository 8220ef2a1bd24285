from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from gkd.engine import RunFolder
from gkd.engine.lock import FolderLock
from gkd.errors import UserError
from tests.engine import toy

HOLD = """
import sys, time
from pathlib import Path
from gkd.engine.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path, repository):
    """A process that writes to tmp_path."""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    for attempt in (
        lambda: RunFolder(tmp_path).prepare(resume=True),
        lambda: RunFolder(tmp_path).prepare(overwrite=True),
        RunFolder(tmp_path).clear,
        lambda: toy.fit(tmp_path),
    ):
        with pytest.raises(UserError, match=rf"no other training writes to \(got .* held by the process {holder.pid} on .* since"):
            attempt()


def test_the_lock_of_a_stopped_process_holds_and_that_of_a_killed_one_does_not(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="held by the process"):
        toy.fit(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    toy.fit(tmp_path, resume=True)
    assert not (tmp_path / ".lock").exists()


def test_the_same_lock_may_be_taken_again(tmp_path):
    lock = FolderLock(tmp_path / ".lock")
    with lock:
        with lock:
            assert str(os.getpid()) in lock.path.read_text()
        assert lock.path.exists()
    assert not lock.path.exists()
    with lock:
        assert lock.path.exists()


def test_a_lock_without_a_readable_holder(tmp_path, holder):
    (tmp_path / ".lock").write_text("")
    with pytest.raises(UserError, match="held by another process"):
        FolderLock(tmp_path / ".lock").acquire()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(UserError, match="can be written to"):
        FolderLock(tmp_path / "absent" / ".lock").acquire()
