"""Bindings that nobody would write: each ends in a result or in one message, never in a traceback."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gkd.arguments import ArgumentError, check_arguments
from gkd.cli import main
from gkd.config import _registered, configure
from gkd.engine.folder import save_student

EXAMPLES = {"long": 2000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 12)

RUN = """
include 'gin/quickstart_classification.gin'
Classification.data = @RandomImages()
RandomImages.num_train = 8
RandomImages.num_test = 4
RandomImages.num_classes = 4
RandomImages.input_size = (3, 16, 16)
TEACHER_WEIGHTS = 'teacher.safetensors'
teacher/Network.recipe = None
STUDENT = 'resnet8'
TEACHER = 'resnet8'
BATCH_SIZE = 8
Trainer.device = 'cpu'
Trainer.loggers = ()
Trainer.max_steps = 1
Trainer.check_teacher = False
RAMP = 0
"""
# What is drawn from: numbers on both sides of every bound, and values of other types. Sizes between 8 and the absurd would only take long.
INTEGERS = [-(10**12), -1, 0, 1, 2, 3, 8, 10**12]
FLOATS = [-1e30, -1.0, -1e-9, 0.0, 1e-30, 0.5, 1.0, 1.5, 1e30, 1e999]
WORDS = ["", "auto", "cosine", "nonsense", "é中\u202e", "../..", "~", "None", "x" * 300]
REFERENCES = [
    "@KNNEdges",
    "@KNNEdges()",
    "@CompleteEdges()",
    "@ChannelNodes()",
    "@HeatKernelEncoding()",
    "@KDLoss()",
    "@SGD()",
    "@Digits()",
    "@Cosine()",
    "@nobody()",
    "%NOTHING",
    "%EPOCHS",
    "@instances/GraphBuilder()",
]
# Documented to be positive: below, a run would be wrong without a word.
POSITIVE = [
    "SGD.lr",
    "KNNEdges.k",
    "PatchNodes.grid",
    "KDLoss.temperature",
    "Trainer.steps",
    "Trainer.epochs",
    "Trainer.log_every",
    "Classification.batch_size",
]
BOUNDED = [("Distiller.label_smoothing", -1.0), ("Distiller.label_smoothing", 1.5), ("Classification.data", 0), ("Trainer.clip_norm", -1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a recipe that takes one step, and its teacher."""
    from gkd.data import RandomImages
    from gkd.models import build_classifier

    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "run.gin").write_text(RUN)
    save_student(
        folder / "teacher.safetensors", build_classifier("resnet8", num_classes=4), {"classes": list(RandomImages(num_classes=4).classes)}
    )
    return folder


@pytest.fixture(scope="module")
def parameters(folder) -> list[tuple[str, str, str]]:
    """Scope, class and parameter of everything that the recipe builds."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = configure(["run.gin"])
        config.build("Classification")
        keys = [key for key in config.operative_keys if key[1] != "gin.macro"]
        return sorted({(scope, selector.rsplit(".", 1)[-1], name) for scope, selector, name in keys})
    finally:
        os.chdir(before)


VALUES = st.one_of(
    st.sampled_from([None, True, False, *INTEGERS, *FLOATS, *WORDS, (), (1, 2), (0.5, -1.0), [3], {}, {"a": 1}, {"task": -1.0}]).map(repr),
    st.floats(-1e6, 1e6).map(repr),
    st.integers(-3, 8).map(repr),
    st.text(max_size=8).map(repr),
    st.sampled_from(REFERENCES),
)


def train(folder: Path, monkeypatch, capfd, *bindings: str) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    options = [part for binding in bindings for part in ("--set", binding)]
    code = main(["train", "--gin", "run.gin", "--output", "out", "--no-report", *options])
    return code, capfd.readouterr().err


def test_the_recipe_itself_trains(folder, monkeypatch, capfd, parameters):
    assert train(folder, monkeypatch, capfd) == (0, "")
    assert len(parameters) > 60


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_ends_in_a_result_or_in_one_message(folder, parameters, monkeypatch, capfd, data):
    scope, name, parameter = data.draw(st.sampled_from(parameters))
    value = data.draw(VALUES)
    binding = f"{scope + '/' if scope else ''}{name}.{parameter} = {value}"
    code, error = train(folder, monkeypatch, capfd, binding)
    assert code in (0, 1, 2), binding
    assert "Traceback" not in error, binding
    assert code == 0 or error.strip(), binding
    try:
        check_arguments(_registered[name], {parameter: eval(value, {"inf": float("inf")})})
    except ArgumentError:
        assert code == 2, binding
        assert f"{name}.{parameter}" in error or parameter in error, binding
    except (SyntaxError, NameError):  # a reference
        assume(True)


@pytest.mark.parametrize("value", [-1, 0, -0.5, 1e999])
@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_positive_is_refused_otherwise(folder, monkeypatch, capfd, name, value):
    code, error = train(folder, monkeypatch, capfd, f"{name} = {value}")
    assert code == 2
    assert "Traceback" not in error


@pytest.mark.parametrize(("name", "value"), BOUNDED)
def test_what_is_out_of_its_range_is_refused(folder, monkeypatch, capfd, name, value):
    code, error = train(folder, monkeypatch, capfd, f"{name} = {value}")
    assert code == 2
    assert "Traceback" not in error


def test_a_training_of_any_length_begins_at_once(folder, monkeypatch, capfd):
    assert train(folder, monkeypatch, capfd, f"Trainer.epochs = {10**12}")[0] == 0


def test_every_name_that_can_be_bound_has_a_signature():
    assert all(inspect.signature(listed) for listed in _registered.values())
