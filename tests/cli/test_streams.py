from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import pathlib, sys
from gkd.cli.streams import outlive_readers
outlive_readers()
for number in range(100_000):
    print('line', number)
print('to the other stream', file=sys.stderr)
sys.stdout.flush()
pathlib.Path(sys.argv[1]).write_text('reached the end')
"""


def test_a_process_outlives_the_readers_of_its_output(tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "end")], **options)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert (tmp_path / "end").read_text() == "reached the end"


def test_all_lines_reach_a_reader_that_stays(tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [f"line {number}" for number in range(100_000)]
    assert done.stderr == "to the other stream\n"


def test_a_full_disk_is_an_error(tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "No space left" in done.stderr
