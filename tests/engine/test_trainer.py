from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from gkd.cli.main import run
from gkd.engine import SGD, Flat, NonFiniteLossError, Trainer
from gkd.engine.loop import split_batch
from gkd.engine.settings import resolve_device
from gkd.errors import UserError
from tests.engine import toy


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_close(records: list[dict], others: list[dict]) -> None:
    assert len(records) == len(others) == 7
    for one, other in zip(records, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


def plain() -> toy.Toy:
    return toy.Toy(dropout=0.0, norm=False)


def test_equals_a_plain_loop():
    model, _ = toy.fit(None, make=plain, epochs=2, schedule=Flat(), optimizer=SGD(lr=0.1, weight_decay=0.01, nesterov=True))
    torch.manual_seed(0)
    reference = plain()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for epoch in range(2):
        for step, batch in enumerate(toy.batches(epoch, 0)):
            reference.progress(epoch + step / toy.STEPS_PER_EPOCH)
            optimizer.zero_grad()
            sum(reference(*batch).values()).backward()
            optimizer.step()
    assert torch.allclose(weights(model), weights(reference), atol=1e-6)


def test_records(tmp_path):
    _, summary = toy.fit(tmp_path / "run", log_every=3)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    tests = [record for record in records if record["kind"] == "eval"]
    assert [(record["epoch"], record["step"]) for record in train] == [(1, 3), (2, 6), (3, 9), (3, 12)]
    assert [(record["epoch"], record["step"]) for record in tests] == [(1, 4), (2, 8), (3, 12)]
    assert {"lr", "loss", "loss/task", "loss/size", "top1", "images_per_second"} <= set(train[1])
    assert train[1]["loss"] == pytest.approx(train[1]["loss/task"] + train[1]["loss/size"], rel=1e-6)
    assert summary.last == tests[-1]
    assert summary.best["top1"] == max(record["top1"] for record in tests)
    # cosine over 12 steps at the last step made, number 11 from 0: 0.1 * (1 + cos(11 pi / 12)) / 2
    assert train[-1]["lr"] == pytest.approx(0.1 * 0.5 * (1 + torch.cos(torch.tensor(11 * torch.pi / 12)).item()), rel=1e-5)


def test_best_checkpoint_is_that_of_the_best_evaluation(tmp_path):
    _, summary = toy.fit(tmp_path / "run", epochs=6)
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert best["position"]["step"] == summary.best["step"]
    model = toy.Toy()
    model.load_state_dict(best["model"])
    assert toy.Task(model).evaluate("test")["top1"] == summary.best["top1"]


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradient_is_that_of_the_whole_batch(parts):
    whole, _ = toy.fit(None, make=plain)
    cut, _ = toy.fit(None, make=plain, accumulate=parts)
    assert torch.allclose(weights(whole), weights(cut), atol=1e-6)


def test_accumulated_losses_are_logged_as_their_mean(tmp_path):
    toy.fit(tmp_path / "whole", make=plain)
    toy.fit(tmp_path / "cut", make=plain, accumulate=2)
    assert_close(toy.log(tmp_path / "whole"), toy.log(tmp_path / "cut"))


def test_a_batch_that_cannot_be_cut():
    with pytest.raises(ValueError, match=r"into 4 equal parts \(got 6 samples\)"):
        split_batch((torch.zeros(6),), 4)


def test_clipping_bounds_the_step():
    # One step of SGD with lr 1 moves the weights by the clipped gradient.
    settings = {"max_steps": 1, "optimizer": SGD(lr=1.0, momentum=0.0, weight_decay=0.0), "schedule": Flat()}
    torch.manual_seed(0)
    start = weights(plain())
    free, _ = toy.fit(None, make=plain, **settings)
    clipped, _ = toy.fit(None, make=plain, clip_norm=1e-3, **settings)
    assert (weights(free) - start).norm() > 2e-3
    assert (weights(clipped) - start).norm() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_resumes_exactly(tmp_path, precision):
    whole, _ = toy.fit(tmp_path / "whole", precision=precision)
    exact, _ = toy.fit(tmp_path / "exact", precision="32-true")
    toy.fit(tmp_path / "run", precision=precision, max_steps=5)
    resumed, _ = toy.fit(tmp_path / "run", precision=precision, resume=True, seed=9)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole), weights(exact))
    assert weights(whole).dtype == torch.float32
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert bool(state["scaler"]) == (precision == "16-mixed")


def test_inputs_stay_in_float32_under_autocast():
    seen = []

    class Spy(toy.Toy):
        def forward(self, inputs, targets, index):
            seen.append(inputs.dtype)
            return super().forward(inputs, targets, index)

    toy.fit(None, make=Spy, precision="bf16-mixed", max_steps=1)
    assert seen == [torch.float32]


def test_channels_last_reaches_model_and_images():
    seen = []

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            seen.append((images.is_contiguous(memory_format=torch.channels_last), images.is_contiguous()))
            return {"task": self.conv(images).square().mean()}

    model = Images()
    batches = lambda epoch, start: iter([(torch.randn(2, 3, 8, 8),)])  # noqa: E731
    toy.trainer(epochs=1, channels_last=True).fit(toy.Task(model, batches, steps_per_epoch=1, batch_size=2, splits=()))
    assert seen == [(True, False)]
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("setting", "sizes_vary", "expected"), [(None, False, True), (None, True, False), (True, True, True), (False, False, False)]
)
def test_convolutions_are_not_tried_anew_where_sizes_vary(setting, sizes_vary, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not expected)
    toy.trainer(cudnn_benchmark=setting, max_steps=1).fit(toy.Task(toy.Toy(), sizes_vary=sizes_vary))
    assert torch.backends.cudnn.benchmark == expected


def test_non_finite_loss_is_named_and_keeps_the_good_checkpoint(tmp_path):
    path = tmp_path / "run"
    message = r"NaN or infinity in task at step 7, epoch 2, samples \[12, 13, 14, 15, 16, 17\]\).* last good checkpoint is .*last.pt"
    with pytest.raises(NonFiniteLossError, match=message):
        toy.fit(path, make=lambda: toy.Toy(bad_call=6), checkpoint_every=5)
    state = torch.load(path / "checkpoints" / "last.pt", weights_only=True)
    assert state["position"]["step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())


def test_number_of_batches_is_checked():
    with pytest.raises(ValueError, match=r"Expected 5 batches in epoch 0 \(got 4\)"):
        toy.trainer().fit(toy.Task(toy.Toy(), steps_per_epoch=5))
    with pytest.raises(ValueError, match="Expected batches from step 0 of epoch 0 on"):
        toy.trainer().fit(toy.Task(toy.Toy(), lambda epoch, start: iter(())))
    _, summary = toy.fit(None, epochs=2.5)  # a fraction of an epoch is fine
    assert summary.step == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16"}, "Expected the precision '32-true', 'bf16-mixed', '16-mixed'"),
        ({"accumulate": 0}, "Expected accumulate to be an integer >= 1"),
        ({"epochs": 0}, "Expected epochs to be a finite number > 0"),
        ({"device": "tpu"}, "Expected the device"),
        ({"device": "cpu:1"}, "Expected the device"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == ("cpu", None)


TWO_PROCESSES = """
import sys, torch
from functools import partial
from pathlib import Path
from gkd.engine.folder import RunFolder
from tests.engine import toy

for steps in (5, 12):  # the second resumes
    torch.manual_seed(0)
    model = toy.Toy(dropout=0.0, norm=False)
    trainer = toy.trainer(max_steps=steps)
    batches = partial(toy.batches, rank=trainer.fabric.global_rank, world_size=trainer.fabric.world_size)
    trainer.fit(toy.Task(model, batches), RunFolder(Path(sys.argv[1])), resume=steps == 12)
"""


def test_two_processes_give_the_gradients_of_one(tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    toy.fit(tmp_path / "one", make=plain)
    both = [torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("one", "two")]
    assert len(both[1]["ranks"]) == 2
    for name, value in both[0]["model"].items():
        assert torch.allclose(value, both[1]["model"][name], atol=1e-6), name
    # What is logged is the mean over the processes: that of the whole batch.
    assert_close(toy.log(tmp_path / "one"), toy.log(tmp_path / "two"))


ONE_IS_STOPPED = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from gkd.engine import Interrupted
from gkd.engine.folder import RunFolder
from tests.engine import toy

trainer = toy.trainer(log_every=1000)
rank = trainer.fabric.global_rank

def slow(call):
    time.sleep(0.7)
    if rank == 1 and call == 1:
        os.kill(os.getpid(), signal.SIGTERM)

try:
    batches = partial(toy.batches, rank=rank, world_size=2)
    trainer.fit(toy.Task(toy.Toy(dropout=0.0, norm=False, hook=slow), batches, splits=()), RunFolder(Path(sys.argv[1])))
except Interrupted as interrupted:
    Path(f"{sys.argv[1]}.{rank}").write_text(str(interrupted.signum))
"""


def test_processes_stop_together_long_before_the_next_record(tmp_path, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "train.py"
    script.write_text(ONE_IS_STOPPED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"run.{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGTERM))] * 2
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert 2 <= state["position"]["step"] <= 6


def test_sigterm_ends_a_command_with_its_code(tmp_path, capsys):
    model = lambda: toy.Toy(hook=lambda call: call == 2 and os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    code = run(argparse.ArgumentParser("toy"), lambda arguments: toy.fit(tmp_path / "run", make=model), [])
    assert code == 128 + signal.SIGTERM
    assert "after step 3 of 12. Go on with the same command and --resume." in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_a_command_with_code_1(capsys):
    assert run(argparse.ArgumentParser("toy"), lambda arguments: toy.fit(None, make=lambda: toy.Toy(bad_call=0)), []) == 1
    assert "in task at step 1" in capsys.readouterr().err
