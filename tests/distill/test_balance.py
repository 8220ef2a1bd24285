from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gkd.distill import Distiller, GradientBalance, Ramp, Share
from gkd.errors import UserError


def step(balance, task, losses, anchors):
    """What the distiller does with the balance in a step."""
    if balance.tick(losses):
        balance.measure(task, losses, anchors)
    return balance.factors()


def measured(balance, names, scale=1.0, steps=1):
    """Steps of a toy: at z = (1, 1) the task pulls with (3, 4), norm 5, and the loss of power p with p * scale."""
    balance.build(names)
    for _ in range(steps):
        z = torch.tensor([1.0, 1.0], requires_grad=True)
        task = 3 * z[0] + 4 * z[1]
        losses = {name: scale * z[0] ** (position + 1) for position, name in enumerate(names)}
        factors = step(balance, task, losses, {name: [z] for name in names})
    return factors


def test_factor_is_the_ratio_of_norms():
    factors = measured(GradientBalance(), ["a", "b"], scale=10.0)
    assert factors["a"].item() == pytest.approx(5 / 10)
    assert factors["b"].item() == pytest.approx(5 / 20)


def test_running_mean_by_hand():
    balance = GradientBalance(interval=1, momentum=0.5)
    balance.build(["a"])
    for scale in (1.0, 3.0):
        z = torch.ones(1, requires_grad=True)
        factors = step(balance, 2 * z.sum(), {"a": scale * z.sum()}, {"a": [z]})
    # task: 0.5 * (0.5 * 0 + 0.5 * 2) + 0.5 * 2 = 1.5; loss: 0.5 * (0.5 * 1) + 0.5 * 3 = 1.75
    assert factors["a"].item() == pytest.approx(1.5 / 1.75)


def test_several_maps_are_one_anchor():
    balance = GradientBalance()
    balance.build(["a"])
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    task, loss = 3 * first[0] + 4 * second[0], 2 * second[1]
    assert step(balance, task, {"a": loss}, {"a": [first, second]})["a"].item() == pytest.approx(5 / 2)


def test_measures_at_the_interval_only(monkeypatch):
    balance = GradientBalance(interval=3)
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    measured(balance, ["a"], steps=7)
    assert len(calls) == 2 * 3  # task and loss, at the steps 0, 3 and 6


def test_not_in_eval_and_not_without_gradient():
    balance = GradientBalance().eval()
    assert measured(balance, ["a"]) == {}
    balance.train()
    with torch.no_grad():
        assert measured(balance, ["a"]) == {}
    assert balance.norms.eq(0).all()


def test_loss_without_gradient_weighs_nothing_and_a_bad_measurement_is_skipped():
    balance = GradientBalance(interval=1)
    balance.build(["none", "wild"])
    z = torch.ones(2, requires_grad=True)
    factors = step(balance, z.sum(), {"none": torch.ones(()), "wild": 2 * z.sum()}, {"none": [z], "wild": [z]})
    assert factors["none"] == 0
    assert factors["wild"].item() == pytest.approx(0.5)
    step(balance, z.sum(), {"none": 0 * z.sum(), "wild": z.sum() * float("inf")}, {"none": [z], "wild": [z]})
    assert [factor.item() for factor in balance.factors().values()] == pytest.approx([0, 0.5])


def test_fresh_loss_is_measured_at_once():
    balance = GradientBalance(interval=100)
    balance.build(["a", "b"])
    z = torch.ones(1, requires_grad=True)
    step(balance, z.sum(), {"a": z.sum()}, {"a": [z]})
    factors = step(balance, z.sum(), {"a": z.sum(), "b": 4 * z.sum()}, {"a": [z], "b": [z]})
    assert factors["b"].item() == pytest.approx(0.25)
    assert factors["a"].item() == pytest.approx(1.0)


def test_resumes_exactly():
    balance = GradientBalance(interval=3)
    measured(balance, ["a", "b"], steps=5)
    resumed = GradientBalance(interval=3)
    resumed.build(["a", "b"])
    resumed.load_state_dict(copy.deepcopy(balance.state_dict()))
    assert torch.equal(resumed.norms, balance.norms)
    assert (resumed._step, resumed._measured) == (5, {"a", "b"})


def test_state_of_other_losses_is_an_error():
    balance = GradientBalance()
    balance.build(["a"])
    with pytest.raises((ValueError, RuntimeError), match=r"Expected the state of 1 balanced losses|size mismatch"):
        balance.load_state_dict({"norms": torch.zeros(2, 2), "_extra_state": torch.zeros(3, dtype=torch.long)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "'interval' to be at least 1"),
        ({"momentum": 1.0}, r"'momentum' in \[0, 1\)"),
        ({"cap": 0}, "'cap' above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        GradientBalance(**options)


class Distance(nn.Module):
    level = "stage"

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher):
        return self.scale * (student - teacher).square().mean()


def small_distiller(**options):
    torch.manual_seed(0)

    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

    return Distiller(network(), network(), taps={"map": "1"}, input_size=(3, 8, 8), **options)


def pulls(distiller, dtype=None):
    """Norms of the gradients of the weighted losses at the tapped map."""
    images, targets = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    maps = []
    distiller.student[1].register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        losses = distiller(images, targets)
    norms = {name: torch.autograd.grad(loss, maps[-1], retain_graph=True)[0].float().norm().item() for name, loss in losses.items()}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    return norms


@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_distiller_reaches_the_shares(scale, dtype):
    weights = {"task": 0.3, "fitnet": Ramp(value=0.25)}
    balance = GradientBalance(interval=1, momentum=0.0)
    pull = pulls(small_distiller(terms={"fitnet": Distance(scale)}, weights=weights, balance=balance), dtype)
    # the share counts from the plain task loss, whatever the task itself weighs
    assert pull["fitnet/map"] / (pull["task"] / 0.3) == pytest.approx(0.25, rel=1e-3 if dtype is None else 2e-2)


def test_shares_stand_beside_absolute_weights():
    plain = pulls(small_distiller(terms={"a": Distance(3.0), "b": Distance(70.0)}))
    distiller = small_distiller(terms={"a": Distance(3.0), "b": Distance(70.0)}, weights={"task": 0.5, "a": 2.0, "b": Share(0.25)})
    assert distiller.balance.names == ["b/map"]
    pull = pulls(distiller)
    assert pull["a/map"] == pytest.approx(2 * plain["a/map"])
    assert pull["b/map"] == pytest.approx(0.25 * plain["task"], rel=1e-3)
    assert pull["task"] == pytest.approx(0.5 * plain["task"])


def test_the_sum_of_the_shares_is_bounded():
    terms = {"a": Distance(3.0), "b": Distance(70.0), "c": Distance(1.0)}
    weights = {"a": Share(0.9), "b": Share(Ramp(value=0.6, start=1)), "c": 0.5}
    distiller = small_distiller(terms=terms, weights=weights, balance=GradientBalance(momentum=0.0, cap=1.0))
    assert distiller.weights == {"task": 1.0, "a/map": 0.9, "b/map": 0.0, "c/map": 0.5}
    distiller.progress(1.0)
    assert distiller.weights == pytest.approx({"task": 1.0, "a/map": 0.6, "b/map": 0.4, "c/map": 0.5})
    pull = pulls(distiller)
    assert pull["a/map"] + pull["b/map"] == pytest.approx(pull["task"], rel=1e-3)


def test_the_task_is_no_share():
    with pytest.raises(UserError, match="Expected an absolute weight of 'task'"):
        small_distiller(weights={"task": Share(0.5)})
