from __future__ import annotations

import contextlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gkd import __version__
from gkd.engine.checkpoint import load_checkpoint, save_checkpoint
from gkd.engine.folder import RunFolder, describe_machine, peak_memory, read_description, save_student
from gkd.engine.log import MetricsFile, TerminalLog, read_metrics
from gkd.errors import UserError
from gkd.files import write_atomic


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    folder.prepare()  # empty: fine
    folder.write_results({"top1": 1.0})
    with pytest.raises(UserError, match=r"--resume, replace it with --overwrite"):
        folder.prepare()
    folder.prepare(resume=True)
    assert json.loads(folder.results.read_text()) == {"top1": 1.0}


def test_overwriting_removes_nothing_of_other_origin(tmp_path):
    folder = RunFolder(tmp_path)
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    folder.last.parent.mkdir()
    folder.last.write_bytes(b"old")
    folder.write_config("A = 1\n")
    folder.prepare(overwrite=True)
    assert folder.last.is_file()  # until nothing is known to stop the new run
    folder.clear()
    assert sorted(tmp_path.iterdir()) == [mine]


def test_what_cannot_be_prepared(tmp_path):
    with pytest.raises(UserError, match="got both"):
        RunFolder(tmp_path).prepare(resume=True, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="got the file"):
        RunFolder(tmp_path / "file").prepare()


def test_resuming_what_is_not_there_starts(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    folder.prepare(resume=True)
    assert folder.path.is_dir()


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_killed_writer_left_is_removed(tmp_path, how):
    folder = RunFolder(tmp_path)
    folder.last.parent.mkdir()
    mine = tmp_path / ".notes.tmp"
    left = [tmp_path / ".results.json.a1b2c3d4.tmp", folder.last.parent / ".last.pt.x_y_z_00.tmp"]
    for path in (mine, *left):
        path.write_bytes(b"half")
    folder.prepare(**{how: True})
    assert mine.exists()
    assert not any(path.exists() for path in left)


def test_results_are_strict_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_results({"final": {"loss": float("nan"), "top1": [1.0, float("inf")]}, "seconds": 1.5})
    strict = json.loads(folder.results.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"final": {"loss": None, "top1": [1.0, None]}, "seconds": 1.5}


def test_changed_bindings(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.changed_bindings("A = 1\n") == []
    folder.write_config("A = 1\nB = 2\n")
    assert folder.changed_bindings("A = 1\nB = 3\n") == ["B = 3"]


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"to write .*file \(got: No space left on device\).* --resume"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_message():
    metrics = MetricsFile(Path("/dev/full"))
    with pytest.raises(UserError, match="No space left on device"):
        metrics.write({"kind": "train"})


def test_a_full_disk_under_torch_save_is_one_message(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with limited_file_size(4096), pytest.raises(UserError, match="File too large"):
        save_checkpoint(path, {"weights": torch.randn(100_000)})
    assert load_checkpoint(path) == {"step": 1}


@contextlib.contextmanager
def limited_file_size(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_student_file_keeps_names_and_description(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.tied = model[0]  # tied weights share memory
    path = tmp_path / "student.safetensors"
    about = {"model": "toy", "classes": ["cat", "Hund", "猫"], "mean": [0.5]}
    save_student(path, model, about)
    assert read_description(path) == {"version": __version__, **about}
    from safetensors.torch import load_file

    state = load_file(path)
    model.load_state_dict(state, strict=True)
    assert state.keys() == model.state_dict().keys()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert read_description(tmp_path / "other.safetensors") == {}


def test_metrics_file_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write({"kind": "train", "step": 1, "loss": 0.5})
    length = metrics.length()
    metrics.write({"kind": "train", "step": 2, "loss": float("inf")})
    metrics.close()
    assert [record["loss"] for record in read_metrics(path)] == [0.5, None]
    with path.open("a") as file:
        file.write('{"kind": "tr')
    assert len(read_metrics(path)) == 2
    metrics = MetricsFile(path, length)
    metrics.write({"kind": "train", "step": 2, "loss": 0.25})
    metrics.close()
    assert [record["loss"] for record in read_metrics(path)] == [0.5, 0.25]


def test_terminal_shows_plain_lines_where_it_is_none(capsys):
    log = TerminalLog(total_steps=8, total_epochs=2)
    log.advance(4)
    log.write(
        {
            "kind": "train",
            "epoch": 1,
            "step": 4,
            "lr": 0.1,
            "loss": 2.0,
            "loss/graph/layer2/edge": 0.25,
            "loss/graph/layer3/edge": 0.5,
            "top1": 12.345,
            "images_per_second": 99.6,
        }
    )
    log.close()
    assert capsys.readouterr().out == "epoch 1/2  step 4/8  lr 0.1  loss 2  graph 0.75  top1 12.35  100 images/s\n"


def test_terminal_shows_a_bar_where_it_is_one(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    log = TerminalLog(total_steps=8, total_epochs=2)
    log.write({"kind": "train", "epoch": 1, "step": 4, "loss": 2.0})
    log.advance(4)
    log.write({"kind": "eval", "split": "test", "epoch": 1, "step": 4, "top1": 50.0})
    log.close()
    shown = capsys.readouterr().out
    assert "epoch 1/2" in shown
    assert "4/8" in shown
    assert "test  top1 50.00" in shown


def test_machine():
    described = describe_machine(torch.device("cpu"))
    assert described["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert described["device"]["type"] == "cpu"
    assert peak_memory(torch.device("cpu")) > 50 * 2**20
