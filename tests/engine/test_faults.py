"""Nothing is lost, and nothing is wrong without a word: evaluations that fail, weights that diverge, settings that change."""

from __future__ import annotations

import json

import pytest
import torch

from gkd.engine import SGD, AdamW, NonFiniteLossError, RunFolder
from gkd.engine.checkpoint import load_checkpoint, save_checkpoint
from gkd.errors import UserError
from tests.engine import toy
from tests.engine.test_resume import assert_same


def state(path, name="last.pt"):
    return load_checkpoint(path / "checkpoints" / name)


def test_configured_hyperparameters_count_on_resuming(tmp_path):
    for name in ("same", "changed"):
        toy.fit(tmp_path / name, max_steps=5, optimizer=SGD(lr=0.1))
    same, _ = toy.fit(tmp_path / "same", resume=True, optimizer=SGD(lr=0.1))
    changed, _ = toy.fit(tmp_path / "changed", resume=True, optimizer=SGD(lr=0.1, momentum=0.5, weight_decay=0.5, nesterov=True))
    (group,) = state(tmp_path / "changed")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 0.5, True)
    # Seven steps with a thousand times the weight decay.
    assert changed.net[0].weight.norm() < 0.98 * same.net[0].weight.norm()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [(AdamW(), r"Expected SGD as the optimiser.*\(got AdamW\)"), (SGD(decay_norm_and_bias=False), "check decay_norm_and_bias")],
)
def test_an_optimiser_of_another_kind_is_refused(tmp_path, optimizer, message):
    toy.fit(tmp_path, max_steps=5)
    with pytest.raises(UserError, match=message):
        toy.fit(tmp_path, resume=True, optimizer=optimizer)


@pytest.mark.parametrize("damage", [lambda state: state.pop("ranks"), lambda state: state.update(position=None)])
def test_a_checkpoint_with_something_missing_is_one_message(tmp_path, damage):
    toy.fit(tmp_path, max_steps=5)
    content = state(tmp_path)
    damage(content)
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", content)
    with pytest.raises(UserError, match="start again with --overwrite"):
        toy.fit(tmp_path, resume=True)


def test_a_refused_resumption_leaves_the_configuration(tmp_path):
    folder = RunFolder(tmp_path)
    trainer = toy.trainer(max_steps=5)
    trainer.fit(toy.Task(toy.Toy()), folder, config="A = 1\n")
    with pytest.raises(UserError, match="Expected the model that"):
        trainer.fit(toy.Task(toy.Toy(norm=False)), folder, resume=True, config="A = 2\n")
    assert folder.config.read_text() == "A = 1\n"
    toy.trainer().fit(toy.Task(toy.Toy()), folder, resume=True, config="A = 3\n")
    assert folder.config.read_text() == "A = 3\n"


def test_an_evaluation_that_fails_loses_no_step(tmp_path):
    toy.fit(tmp_path / "whole")

    def fail() -> None:
        torch.rand(3)
        raise OSError("broken test image")

    with pytest.raises(OSError, match="broken test image"):
        toy.fit(tmp_path / "run", before_evaluation=fail)
    assert state(tmp_path / "run")["position"]["step"] == toy.STEPS_PER_EPOCH
    toy.fit(tmp_path / "run", resume=True, seed=5)
    assert_same(tmp_path / "whole", tmp_path / "run")


class Exploding(toy.Toy):
    """The loss stays finite, while the gradient of one step is not."""

    def forward(self, inputs, targets, index):
        losses = super().forward(inputs, targets, index)
        if self.calls == 7:
            losses["extra"] = 0 * (self.net[0].weight - self.net[0].weight.detach()).norm().sqrt()  # infinite slope at 0
        return losses


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    message = r"Expected finite weights \(got NaN or infinity in net.0.weight and .* more at step 7, epoch 2, .*last good checkpoint"
    with pytest.raises(NonFiniteLossError, match=message):
        toy.fit(tmp_path, make=Exploding, checkpoint_every=1)
    content = state(tmp_path)
    assert content["position"]["step"] == 6
    assert all(value.isfinite().all() for value in content["model"].values())
    _, summary = toy.fit(tmp_path, resume=True)
    assert summary.finished


def test_a_buffer_that_is_unset_before_the_first_step_may_be_so(tmp_path):
    class Lazy(toy.Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(torch.nan))

    _, summary = toy.fit(tmp_path, make=Lazy)
    assert summary.finished


def test_a_moment_that_is_not_finite_replaces_no_checkpoint(tmp_path):
    class Overflowing(toy.Toy):
        def forward(self, inputs, targets, index):
            losses = super().forward(inputs, targets, index)
            if self.calls == 7:
                losses["extra"] = 1e25 * (self.net[0].weight - self.net[0].weight.detach()).sum()  # its square is infinite
            return losses

    with pytest.raises(NonFiniteLossError, match=r"exp_avg_sq of net.0.weight"):
        toy.fit(tmp_path, make=Overflowing, checkpoint_every=1, optimizer=AdamW())
    assert state(tmp_path)["position"]["step"] == 6


def test_the_best_evaluation_is_a_number(tmp_path):
    scores = iter([float("nan"), 10.0, float("nan")])
    task = toy.Task(toy.Toy(), evaluate=lambda split: {"split": split, "top1": next(scores)})
    summary = toy.trainer().fit(task, RunFolder(tmp_path))
    assert summary.best["top1"] == 10.0
    assert state(tmp_path, "best.pt")["position"]["step"] == 8
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_divergence_that_a_graph_refuses_is_one_of_the_training(tmp_path):
    class Graph(Exploding):
        def forward(self, inputs, targets, index):
            if not self.net[0].weight.isfinite().all():
                raise ValueError("Expected finite features (got NaN)")
            return super().forward(inputs, targets, index)

    with pytest.raises(NonFiniteLossError, match=r"Expected finite features \(got NaN\).* at step 8, epoch 2.*lower learning rate"):
        toy.fit(tmp_path, make=Graph)


def test_a_wrong_setting_found_in_a_step_stays_one():
    def refuse(call: int) -> None:
        raise ValueError("Expected k below the number of nodes (got 64)")

    with pytest.raises(ValueError, match="Expected k below"):
        toy.fit(None, make=lambda: toy.Toy(hook=refuse))
