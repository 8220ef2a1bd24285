from __future__ import annotations

import pytest

from gkd.distill.weights import LossName, resolve_weights
from gkd.errors import UserError

NAMES = [
    LossName("task"),
    LossName("kd"),
    *(LossName("graph", stage, part) for stage in ("layer2.0", "layer3") for part in ("vertex", "edge")),
]


def at_start(weights):
    return {name: schedule(0) for name, schedule in resolve_weights(weights, NAMES).items()}


def test_everything_weighs_one_by_default():
    assert set(at_start({}).values()) == {1.0}
    assert list(at_start({})) == ["task", "kd", "graph/layer2.0/vertex", "graph/layer2.0/edge", "graph/layer3/vertex", "graph/layer3/edge"]


def test_most_specific_key_wins():
    weights = {"graph/layer3/edge": 4.0, "graph": 1.5, "graph/edge": 3.0, "graph/layer3": 2.0}
    values = at_start(weights)
    assert values["graph/layer3/edge"] == 4.0
    assert values["graph/layer2.0/edge"] == 3.0  # the part before the stage
    assert values["graph/layer3/vertex"] == 2.0
    assert values["graph/layer2.0/vertex"] == 1.5
    del weights["graph/layer3/edge"]
    assert at_start(weights)["graph/layer3/edge"] == 3.0
    assert at_start(dict(reversed(weights.items()))) == at_start(weights)  # the order of the keys says nothing


@pytest.mark.parametrize(
    ("key", "hint"),
    [("grahp", "Did you mean 'graph'"), ("graph/layer4", "'graph/layer3'"), ("graph/edges", "'graph/edge'"), ("KD", "kd, task")],
)
def test_unknown_key_lists_the_near_ones(key, hint):
    with pytest.raises(UserError, match=f"Expected a key of 'weights' to be one of .*got '{key}'") as error:
        resolve_weights({key: 1.0}, NAMES)
    assert hint in str(error.value)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1.0", None])
def test_numbers_that_are_no_weights(weight):
    with pytest.raises(ValueError, match=r"Expected weights\['graph/edge'\] to be a finite number that is not negative"):
        resolve_weights({"graph/edge": weight}, NAMES)
