from __future__ import annotations

import pytest

from gkd.engine import SGD, AdamW, Cosine, Flat, MultiStep, OneCycle, Trainer
from gkd.engine.checks import check_flag, check_integer, check_number

NAN, INFINITY = float("nan"), float("inf")

REFUSED = [
    (Trainer, "epochs", [0, -1, NAN, INFINITY, "3", True]),
    (Trainer, "evaluate_every", [0, NAN]),
    (Trainer, "steps", [0, 2.5, True, "10"]),
    (Trainer, "max_steps", [0, 1.5]),
    (Trainer, "checkpoint_every", [0, 0.5]),
    (Trainer, "log_every", [0, 2.5, None]),
    (Trainer, "accumulate", [0, 1.5]),
    (Trainer, "clip_norm", [0, -1.0, NAN, INFINITY, "1"]),
    (Trainer, "channels_last", ["False", 0, None]),
    (Trainer, "compile", ["fast", 1]),
    (Trainer, "cudnn_benchmark", ["False", 0]),
    (Trainer, "find_unused_parameters", ["False"]),
    (SGD, "lr", [0, -0.1, NAN, "0.1"]),
    (SGD, "momentum", [-0.1, 1.0, NAN]),
    (SGD, "weight_decay", [-1e-4, NAN]),
    (SGD, "nesterov", ["False"]),
    (SGD, "decay_norm_and_bias", ["False"]),
    (AdamW, "lr", [0, NAN]),
    (AdamW, "betas", [(0.9,), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9)]),
    (AdamW, "weight_decay", [-1.0]),
    (Flat, "warmup", [-1, NAN]),
    (Flat, "warmup_start", [-0.1, 2.0]),
    (Cosine, "final", [-1, 1.5, NAN]),
    (Cosine, "warmup", [-1]),
    (OneCycle, "rise", [0, 1, 30]),
    (OneCycle, "start", [-1, 2]),
    (OneCycle, "final", [-1, 2, NAN]),
]


@pytest.mark.parametrize(("kind", "name", "value"), [(kind, name, value) for kind, name, values in REFUSED for value in values])
def test_a_setting_outside_its_range_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=r"^Expected .*\(got .*\)$"):
        kind(**({"device": "cpu"} if kind is Trainer else {}), **{name: value})


@pytest.mark.parametrize("settings", [{"factor": -0.1}, {"milestones": (-1,)}, {"milestones": (NAN,)}, {"warmup": -1}])
def test_milestones_and_their_factor(settings):
    with pytest.raises(ValueError, match="Expected"):
        MultiStep(**{"milestones": (1,), **settings})


def test_what_is_fine():
    check_number("x", 1, above=0, most=1)
    check_number("x", None, optional=True)
    check_integer("x", 3, least=3)
    check_flag("x", False)
    Trainer(epochs=0.5, steps=None, clip_norm=None, compile="reduce-overhead", device="cpu")
    Cosine(final=0)
    AdamW(betas=[0, 0.999])


def test_the_message_names_the_range():
    with pytest.raises(ValueError, match=r"^Expected momentum to be a finite number >= 0 and < 1 \(got 2\)$"):
        SGD(momentum=2)
    with pytest.raises(ValueError, match=r"^Expected clip_norm to be a finite number > 0 or None \(got -1\)$"):
        Trainer(clip_norm=-1)
    with pytest.raises(ValueError, match="Expected a momentum above 0"):
        SGD(momentum=0.0, nesterov=True)
