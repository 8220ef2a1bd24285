from __future__ import annotations

import pytest
from torch import nn

from gkd.models.modes import evaluating


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_return_after_an_error():
    model = nn.Dropout()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


def test_mode_of_a_model_that_is_in_eval_already():
    model = nn.Sequential(nn.Dropout()).eval()
    with evaluating(model):
        model.train()
    assert not model.training
    assert not model[0].training
