from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from gkd.config import MODULES, configure, register
from gkd.errors import UserError


@dataclass
class Wheel:
    size: int = 20
    material: str = "steel"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Expected a positive size (got {self.size})")


@dataclass
class Engine:
    power: float


@dataclass
class Car:
    wheel: Wheel | None = None
    engine: Engine | None = None
    spare: Wheel | None = None
    parts: dict = field(default_factory=dict)
    maker: Callable[..., Wheel] | None = None
    gears: Sequence[float] = ()
    drive: Literal["front", "rear"] = "front"
    open: bool = False
    manual: str | Path = "manual.txt"


@pytest.fixture(autouse=True)
def garage(monkeypatch):
    """A package of its own, so that these tests need none of gkd's."""
    package = types.ModuleType("garage")
    package.__all__ = ["Car", "Engine", "Wheel"]
    package.Car, package.Engine, package.Wheel = Car, Engine, Wheel
    monkeypatch.setitem(sys.modules, "garage", package)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


def build(files, overrides=()):
    return configure(files, overrides, modules=["garage"]).build("Car")


BASE = "SIZE = 18\nCar.wheel = @Wheel()\nWheel.size = %SIZE\n"


def test_files_includes_and_overrides(write):
    write("parts/base.gin", BASE)
    file = write("car.gin", "include 'parts/base.gin'\nCar.engine = @Engine()\nEngine.power = 75.0\n")
    assert build([file]) == Car(Wheel(18), Engine(75.0))
    assert build([file], ["SIZE = 17", "Wheel.material = 'wood'"]) == Car(Wheel(17, "wood"), Engine(75.0))
    later = write("later.gin", "Wheel.size = 3\nCar.engine = None\n")
    assert build([file, later]) == Car(Wheel(3))


def test_the_repository_is_on_the_search_path(write):
    with pytest.raises(UserError, match=r"Classification"):  # read from elsewhere, and only then unknown here
        configure(["gin/base/classification.gin"], modules=["garage"])
    with pytest.raises(
        UserError, match=r"gin/base/classificatoin.gin, asked for by the command line .*Did you mean gin/base/classification.gin"
    ):
        configure(["gin/base/classificatoin.gin"], modules=["garage"])


def test_the_operative_configuration_can_be_read_again(write):
    config = configure([write("car.gin", BASE)], modules=["garage"])
    first = config.build("Car")
    text = config.text
    assert "Wheel.material = 'steel'" in text  # defaults are part of it
    assert "SIZE = 18" in text
    again = configure([write("again.gin", text)], modules=["garage"])
    assert again.build("Car") == first
    assert again.text == text


def test_scopes(write):
    file = write("car.gin", "Car.wheel = @Wheel()\nCar.spare = @spare/Wheel()\nspare/Wheel.size = 5\nWheel.material = 'wood'\n")
    assert build([file]) == Car(Wheel(20, "wood"), spare=Wheel(5, "wood"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Weel.size = 3", r"name of a class or function in car.gin:4 \(got 'Weel'\). Did you mean Wheel\?"),
        ("Wheel.sise = 3", r"parameter of Wheel in car.gin:4 \(got 'sise'; it has size, material\). Did you mean size\?"),
        ("Car.spare = @Weel()", r"in car.gin:4 \(got 'Weel'\). Did you mean Wheel"),
        ("Car.parts = {'a': [@Weel()]}", r"in car.gin:4 \(got 'Weel'\)"),
        ("Wheel.material = %MATERIAL", r"a value for %MATERIAL, which Wheel.material in car.gin:4 uses \(got none\)"),
        ("Wheel.size = %SISE", r"%SISE.* Did you mean %SIZE"),
        ("spar/Wheel.size = 4", r"got spar/Wheel.size \(car.gin:4\), which nothing reads"),
        ("SISE = 4", r"got SISE \(car.gin:4\), which nothing reads\). Did you mean SIZE"),
        ("Engine.power = 4.0", r"got Engine.power \(car.gin:4\), which nothing reads"),
        ("Wheel.material = steel", r"in car.gin, line 4 .*Strings need quotes"),
        ("Wheel.material = 'steel", r"in car.gin, line"),
        ("include 'nowhere.gin'", r"nowhere.gin, asked for by car.gin:4"),
        ("include 'car.gin'", r"without a circle \(got car.gin -> car.gin\)"),
        ("import nowhere_at_all", r"a module to import in car.gin:4 \(got nowhere_at_all"),
        ("Wheel.size = 0", r"Expected a positive size \(got 0\)\n  while building Wheel"),
        ("Car.engine = @Engine()", r"Expected a value for 'power' \(got none\)\n  while building Engine"),
        ("Wheel.size = %gin.REQUIRED", r"complete configuration"),
        ("Wheel.size = 2.5", r"^Expected Wheel.size to be an integer \(got 2.5\) in car.gin:4$"),
        ("SIZE = '3'", r"^Expected Wheel.size to be an integer \(got '3'\) in car.gin:4, by SIZE$"),
        ("Wheel.size = True", r"Wheel.size to be an integer \(got True\)"),
        ("Wheel.material = None", r"Wheel.material to be a string \(got None\)"),
        ("Car.open = 'False'", r"Car.open to be True or False \(got 'False'\)"),
        ("Car.drive = 'all'", r"Car.drive to be 'front' or 'rear' \(got 'all'\)"),
        ("Car.gears = 3", r"Car.gears to be a list or tuple of numbers \(got 3\)"),
        ("Car.gears = (1, 'two')", r"Car.gears to be a list or tuple of numbers \(got \(1, 'two'\)\)"),
        ("Car.gears = (1, 1e999)", r"Car.gears to be a list or tuple of numbers"),
        ("Car.wheel = @Wheel", r"Car.wheel to be a Wheel object or None \(got @Wheel\) in car.gin:4. Write @Wheel\(\), with brackets"),
        ("Car.engine = @Wheel()", r"Car.engine to be an Engine object or None \(got @Wheel\(\)\) in car.gin:4"),
        ("A = %B\nB = %A\nWheel.material = %A", r"without a circle \(got %A -> %B -> %A\)"),
        ("Car.spare = @spare/Car()", r"without a circle \(got spare/Car -> spare/Car\)"),
        ("Wheel.size = " + "[" * 300 + "]" * 300, r"in car.gin"),
        ("Wheel.size = " + "9" * 5000, r"in car.gin"),
    ],
)
def test_mistakes_are_one_message(write, line, message):
    file = write("car.gin", BASE + line + "\n")
    with pytest.raises(UserError, match=f"(?s){message}") as error:
        build([file])
    assert "In call to configurable" not in str(error.value)


def test_mistakes_in_overrides_name_the_override(write):
    with pytest.raises(UserError, match=r"--set 'Wheel.sise = 3'"):
        build([write("car.gin", BASE)], ["Wheel.sise = 3"])
    with pytest.raises(UserError, match=r"got Engine.power \(--set 'Engine.power = 3.0'\), which nothing reads"):
        build([write("car.gin", BASE)], ["Engine.power = 3.0"])


def test_an_ablation_may_replace_what_its_base_configures(write):
    # Wheel, its size and its macro have no owner any more; that is what the ablation is for.
    write("base.gin", BASE)
    assert build([write("without.gin", "include 'base.gin'\nCar.wheel = None\n")]) == Car()
    # ... and a binding to the part that was taken away is a mistake when it comes after.
    with pytest.raises(UserError, match=r"got Wheel.size \(--set 'Wheel.size = 3'\)"):
        build(["without.gin"], ["Wheel.size = 3"])


def test_a_binding_that_scopes_hide_everywhere_reaches_nothing(write):
    with pytest.raises(UserError, match=r"got Wheel.size \(car.gin:2\)"):
        build([write("car.gin", "Car.wheel = @front/Wheel()\nWheel.size = 3\nfront/Wheel.size = 4\n")])


def test_what_the_caller_gives_cannot_be_bound(write):
    # Built in code with its size said there: the binding reaches nothing.
    config = configure([write("car.gin", "Car.maker = @Wheel\nWheel.size = 3\n")], modules=["garage"])
    with pytest.raises(UserError, match=r"Wheel\.size"):
        config.build("Car")


def test_a_defect_keeps_its_traceback(write, monkeypatch):
    monkeypatch.setattr(Wheel, "__post_init__", lambda wheel: wheel.absent)
    with pytest.raises(AttributeError, match="absent"):
        build([write("car.gin", BASE)])


def test_names_are_unique_over_the_packages():
    for module in MODULES:
        register(module)
    other = types.ModuleType("other_garage")
    other.__all__, other.Wheel = ["Wheel"], type("Wheel", (), {})
    sys.modules["other_garage"] = other
    register("garage")
    with pytest.raises(ValueError, match="one object named Wheel"):
        register("other_garage")


def test_built_objects_are_ordinary_ones(write):
    car = build([write("car.gin", BASE)])
    assert type(car) is Car
    assert type(car.wheel) is Wheel
    # What is called after building is the class itself: gin has no part in it.
    assert Wheel() == Wheel(20)


def test_only_this_module_imports_gin(repository):
    sources = [path for folder in ("gkd", "projects") for path in (repository / folder).rglob("*.py")]
    importing = [
        path for path in sources if any(line.lstrip().startswith(("import gin", "from gin")) for line in path.read_text().splitlines())
    ]
    assert importing == [repository / "gkd" / "config.py"]


def test_numbers_and_lists_may_be_written_in_any_form(write):
    car = build([write("car.gin", "Car.gears = [3, 2.5]\nCar.engine = @Engine()\nEngine.power = 75\nCar.manual = '~/manual.txt'\n")])
    assert (car.gears, car.engine.power) == ([3, 2.5], 75)
    assert car.manual == os.path.expanduser("~/manual.txt")


def test_an_object_given_to_whom_a_class_is_due_is_explained(write):
    with pytest.raises(UserError, match=r"Car.maker to be a callable that returns Wheel or None \(got @Wheel\(\)\) in car.gin:1"):
        build([write("car.gin", "Car.maker = @Wheel()\n")])


def test_values_of_code_are_not_checked(write):
    # The binding is wrong only where it is used.
    config = configure([write("car.gin", "Car.maker = @Wheel\nWheel.material = 3\n")], modules=["garage"])
    with pytest.raises(UserError, match=r"Wheel\.material"):
        config.build("Car")
    assert Wheel(2, 3).material == 3


def test_includes_are_looked_for_beside_the_file_then_here(write, tmp_path, monkeypatch):
    write("set/wheels.gin", "Wheel.size = 3\nCar.wheel = @Wheel()\n")
    write("set/car.gin", "include 'wheels.gin'\n")
    assert build(["set/car.gin"]) == Car(Wheel(3))
    write("wheels.gin", "Wheel.size = 4\nCar.wheel = @Wheel()\n")
    assert build(["set/car.gin"]) == Car(Wheel(3))
    (tmp_path / "set" / "wheels.gin").unlink()
    assert build(["set/car.gin"]) == Car(Wheel(4))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(["~/set/car.gin"]) == Car(Wheel(4))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_are_utf8(write, tmp_path, encoding):
    (tmp_path / "car.gin").write_bytes("Wheel.material = 'Eichenholz, geölt'\r\nCar.wheel = @Wheel()\r\n".encode(encoding))
    assert build(["car.gin"]) == Car(Wheel(20, "Eichenholz, geölt"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-16-be"])
def test_other_encodings_are_named(write, tmp_path, encoding):
    (tmp_path / "car.gin").write_bytes("Car.wheel = @Wheel()\nWheel.material = 'geölt'\n".encode(encoding))
    with pytest.raises(UserError, match=r"car.gin.*UTF-8"):
        build(["car.gin"])


def test_an_import_registers_what_the_module_lists(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write("my_wagons.py", "__all__ = ['Wagon']\nclass Wagon:\n    def __init__(self, load: int): self.load = load\n")
    file = write("car.gin", "import my_wagons\nCar.parts = {'wagon': @Wagon()}\nWagon.load = 3\n")
    config = configure([file], modules=["garage"])
    wagon = config.build("Car").parts["wagon"]
    assert (type(wagon).__name__, wagon.load) == ("Wagon", 3)
    assert config.text.startswith("import my_wagons\n")
    with pytest.raises(UserError, match=r"Wagon.load to be an integer \(got 'much'\) in --set"):
        build([file], ["Wagon.load = 'much'"])


def test_an_imported_name_that_is_taken_is_one_message(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write("my_wheels.py", "__all__ = ['Wheel']\nclass Wheel: ...\n")
    with pytest.raises(UserError, match=r"one object named Wheel.* imported in car.gin:1"):
        build([write("car.gin", "import my_wheels\nCar.wheel = @Wheel()\n")])


def test_a_defect_of_an_imported_module_keeps_its_traceback(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write("my_mistake.py", "def broken(:\n")
    with pytest.raises(SyntaxError):
        build([write("car.gin", "import my_mistake\n")])
