"""The interface: settings by back end, and which back end is taken."""

from __future__ import annotations

import sys

import pytest

from gkd.detection import DetectorNetwork, choose_backend
from gkd.detection.torchvision import TorchvisionBackend
from gkd.errors import UserError


def test_settings_may_be_given_for_each_back_end():
    network = DetectorNetwork(weights={"detectron2": "a.pkl"}, options={"torchvision": {"norm": "batch"}}, backbone_weights="DEFAULT")
    assert network.setting("weights", "detectron2") == "a.pkl"
    assert network.setting("weights", "torchvision") is None
    assert network.setting("options", "torchvision") == {"norm": "batch"}
    assert network.setting("options", "detectron2") == {}
    assert network.setting("backbone_weights", "torchvision") == "DEFAULT"


def test_the_choice_of_a_back_end(monkeypatch):
    assert isinstance(choose_backend("torchvision")[0], TorchvisionBackend)
    own = TorchvisionBackend()
    assert choose_backend(own) == (own, None)
    with pytest.raises(UserError, match=r"'torchvision' or 'detectron2' or 'transformers' .*got 'mmdet'"):
        choose_backend("mmdet")
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if it were not installed
    backend, note = choose_backend()
    assert isinstance(backend, TorchvisionBackend)
    assert "Detectron2 is not installed" in note


def test_detectron2_demanded_but_absent(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(UserError, match=r"Detectron2 .*https://detectron2.readthedocs.io/en/latest/tutorials/install.html"):
        choose_backend("detectron2")
