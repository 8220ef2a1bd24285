from __future__ import annotations

import csv
import sys

import pytest

from gkd.engine import CSVLogger, MLFlowLogger, RunFolder, TensorBoardLogger, Trainer, WandbLogger
from gkd.errors import UserError
from tests.engine import toy


def test_tensorboard_is_the_default_and_goes_on(tmp_path):
    assert Trainer(device="cpu").loggers == (TensorBoardLogger(),)
    toy.fit(tmp_path, loggers=None, max_steps=7)
    toy.fit(tmp_path, loggers=None, resume=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "test/top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 12]


def table(path):
    with (path / "csv" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if not name.endswith("images_per_second")} for row in csv.DictReader(file)]


def test_a_resumed_table_equals_the_uninterrupted_one(tmp_path):
    toy.fit(tmp_path / "whole", loggers=[CSVLogger()])
    toy.fit(tmp_path / "run", loggers=[CSVLogger()], max_steps=7)
    toy.fit(tmp_path / "run", loggers=[CSVLogger()], resume=True)
    whole = table(tmp_path / "whole")
    assert [int(row["step"]) for row in whole] == [3, 4, 6, 8, 9, 12, 12]
    assert table(tmp_path / "run") == whole


def test_a_logger_that_fails_is_left_out(tmp_path):
    class Broken:
        def log_metrics(self, metrics, step):
            raise OSError("No space left on device")

        def finalize(self, status):
            raise AssertionError("it was left out")

    with pytest.warns(UserWarning, match="Broken failed and gets no further records: No space left"):
        _, summary = toy.fit(tmp_path, loggers=[lambda folder, step: Broken()])
    assert summary.finished
    assert len(toy.log(tmp_path)) == 7


@pytest.mark.parametrize(("make", "package"), [(WandbLogger(), "wandb"), (MLFlowLogger(), "mlflow")])
def test_an_absent_package_is_one_message(tmp_path, monkeypatch, make, package):
    monkeypatch.setitem(sys.modules, package, None)
    from lightning.pytorch import loggers

    monkeypatch.setattr(loggers, type(make).__name__, absent)
    with pytest.raises(UserError, match=rf"Expected the package {package} .* pip install {package}"):
        toy.fit(tmp_path, loggers=[make])


def absent(**settings):
    raise ModuleNotFoundError("No module named it")


@pytest.mark.parametrize(("make", "identity"), [(WandbLogger(project="mine"), "id"), (MLFlowLogger(experiment="mine"), "run_id")])
def test_a_service_goes_on_with_the_run_that_it_has(tmp_path, monkeypatch, make, identity):
    from lightning.pytorch import loggers

    given = []

    class Service:
        def __init__(self, **settings):
            given.append(settings)
            self.run_id = settings.get("run_id") or "abc"

    monkeypatch.setattr(loggers, type(make).__name__, Service)
    folder = RunFolder(tmp_path)
    for step in (0, 7):
        make(folder, step)
    assert "mine" in given[0].values()
    assert given[1][identity] == (given[0]["id"] if identity == "id" else "abc")


def test_one_logger_needs_a_list():
    with pytest.raises(ValueError, match="Expected loggers to be a list"):
        Trainer(loggers=CSVLogger(), device="cpu")
