"""The verbs beside train: what they print and write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkd.cli import main
from gkd.cli.main import VERBS
from gkd.cli.methods import read_method
from gkd.engine.folder import save_student
from gkd.sources import RECIPES

CLASSIFIER = """
Classification.data = @RandomImages()
RandomImages.num_train = 12
RandomImages.num_test = 8
RandomImages.num_classes = 7
Classification.batch_size = 12
Classification.student = @student/Network()
student/Network.name = 'resnet8'
Classification.trainer = @Trainer()
Trainer.device = 'cpu'
"""
TEACHER = """
Classification.teacher = @teacher/Network()
teacher/Network.name = 'resnet8'
teacher/Network.weights = 'made/student.safetensors'
teacher/Network.recipe = 'teacher.gin'
Trainer.check_teacher = False
Classification.distiller = @Distiller
Distiller.terms = {'kd': @KDLoss()}
"""
DETECTOR = """
Detection.data = @DigitScenes()
DigitScenes.size = 64
DigitScenes.num_train = 2
DigitScenes.num_test = 2
Detection.batch_size = 2
Detection.backend = 'torchvision'
Detection.student = @student/DetectorNetwork()
DetectorNetwork.architecture = 'fcos'
DetectorNetwork.backbone = 'resnet18'
DetectorNetwork.options = {'fpn_channels': 32, 'norm': 'batch', 'trainable_layers': 5, 'score_thresh': 0.0}
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pictures(here) -> list[str]:
    """A folder with a folder in it, a second picture of one name, and a file that is no picture."""
    generator = np.random.default_rng(0)
    names = ["photos/a.png", "photos/more/b.jpg", "photos/more/a.png", "c.png"]
    for number, name in enumerate(names):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(40 + number, 50, 3), dtype=np.uint8)).save(here / name)
    (here / "photos" / "broken.png").write_bytes(b"no picture")
    return names


@pytest.fixture
def classifier(here) -> Path:
    """A run folder."""
    (here / "run.gin").write_text(CLASSIFIER)
    assert main(["train", "--gin", "run.gin", "--no-report"]) == 0
    return here / "runs" / "run"


def task_of(here: Path, text: str, root: str):
    from gkd.config import configure

    (here / "task.gin").write_text(text)
    return configure(["task.gin"]).build(root)


def test_predict_names_the_classes(classifier, pictures, capsys):
    assert main(["predict", str(classifier), "photos", "c.png", "photos/a.png", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "photos/broken.png" in shown.err
    records = json.loads((classifier / "predictions" / "predictions.json").read_text())
    assert [record["file_name"] for record in records] == [
        "photos/a.png",
        "photos/more/a.png",
        "photos/more/b.jpg",
        "c.png",
        "photos/a.png",
    ]
    for record in records:
        probabilities = [answer["probability"] for answer in record["classes"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1
    drawn = {path.relative_to(classifier / "predictions").as_posix() for path in classifier.rglob("predictions/**/*.png")}
    assert drawn == {f"pictures/{name}.png" for name in ("a", "more/a", "more/b", "c", "a_2")}


def test_predict_answers_as_the_plain_student(classifier, here):
    from gkd.tasks import load_student

    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)  # the student's own size: neither resized nor cut
    Image.fromarray(pixels.numpy()).save(here / "one.png")
    assert main(["predict", str(classifier), "one.png", "--output", "out", "--device", "cpu"]) == 0
    student, description = load_student(classifier / "student.safetensors")
    mean, std = (torch.tensor(description[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = student((pixels.permute(2, 0, 1)[None] / 255 - mean) / std).softmax(dim=1)[0]
    (record,) = json.loads(Path("out/predictions.json").read_text())
    for answer in record["classes"]:
        assert answer["probability"] == pytest.approx(float(expected[description["classes"].index(answer["class"])]), abs=1e-5)


def test_predict_finds_objects_in_coco_form(here, pictures):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from pycocotools.coco import COCO

    task = task_of(here, DETECTOR, "Detection")
    save_student(here / "run" / "student.safetensors", task.student, task.description_of_student())
    assert main(["predict", "run", "photos", "--score", "0", "--output", "out", "--device", "cpu"]) == 0
    records = json.loads(Path("out/predictions.json").read_text())
    assert records
    assert {record["image_id"] for record in records} <= {0, 2, 3}  # 1 is the broken one
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in range(4)],
        "annotations": [],
        "categories": [{"id": number} for number in task.data.category_ids],
    }
    truth.createIndex()
    assert len(truth.loadRes(records).anns) == len(records)
    assert len(list(Path("out/pictures").rglob("*.png"))) == 3
    assert main(["predict", "run", "photos", "--score", "1", "--output", "none", "--device", "cpu"]) == 0
    assert json.loads(Path("none/predictions.json").read_text()) == []


def test_predict_paints_masks(here, pictures):
    from gkd.tasks import SegmentationNetwork

    model = SegmentationNetwork("lraspp_mobilenet_v3_large").build(3)
    description = {
        "task": "Segmentation",
        "model": "lraspp_mobilenet_v3_large",
        "options": {},
        "classes": ["ground", "cat", "dog"],
        "num_classes": 3,
        "input_size": [3, 64, 64],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    save_student(here / "run" / "student.safetensors", model, description)
    assert main(["predict", "run", "c.png", "photos/a.png", "--output", "out", "--device", "cpu"]) == 0
    records = json.loads(Path("out/predictions.json").read_text())
    for record in records:
        with Image.open(Path("out") / record["mask"]) as mask, Image.open(record["file_name"]) as image:
            assert mask.size == image.size
            counts = np.bincount(np.asarray(mask).ravel(), minlength=3) / (mask.size[0] * mask.size[1])
        shares = [record["shares"].get(label, 0) for label in description["classes"]]
        assert shares == pytest.approx(counts.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "c.png"], "Expected a student at nowhere"),
        (["weights.safetensors", "c.png"], "weights without a description"),
        (["weights.safetensors", "nothing.png"], "an image or a folder of images at nothing.png"),
        (["weights.safetensors", "empty"], "images in the folder empty"),
        (["weights.safetensors", "c.png", "--score", "3"], "--score between 0 and 1"),
        (["weights.safetensors", "c.png", "--device", "tpu"], "--device"),
    ],
)
def test_predict_says_what_is_wrong(here, pictures, capsys, options, message):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, "weights.safetensors")
    Path("empty").mkdir()
    assert main(["predict", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_predict_needs_one_image_that_can_be_read(classifier, pictures, capsys):
    assert main(["predict", str(classifier), "photos/broken.png", "--device", "cpu"]) == 2
    assert "images that can be read (got 1 that cannot)" in capsys.readouterr().err


def test_compare_and_report(classifier, here, capsys):
    for name, seed in (("KD/seed0", 0), ("KD/seed1", 1)):
        assert main(["train", "--gin", "run.gin", "--seed", str(seed), "--output", f"runs/{name}", "--no-report"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/run", "runs/KD/seed0", "runs/KD/seed1"]) == 0
    shown = capsys.readouterr().out
    rows = [re.split(r"[│|]", line)[1:3] for line in shown.splitlines() if line.startswith(("│", "|"))]
    assert [(name.strip(), seeds.strip()) for name, seeds in rows] == [("run", "1"), ("KD", "2")]
    assert "<html" in Path("comparison.html").read_text()
    assert main(["compare", "runs/nothing"]) == 2
    assert "runs/nothing" in capsys.readouterr().err

    assert not (classifier / "report.html").exists()
    assert main(["report", "runs/run", "--device", "cpu"]) == 0
    assert "<h2>" in (classifier / "report.html").read_text()
    assert main(["report", "runs/nothing"]) == 2


def test_taps_lists_paths_and_shapes(here, capsys):
    assert main(["taps", "resnet8", "--size", "32"]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["layer1"] == "16 x 32 x 32"
    assert lines["layer3"] == "64 x 8 x 8"
    assert main(["taps", "resnet8", "--size", "0"]) == 2
    assert main(["taps", "resnet9"]) == 2
    assert "resnet8" in capsys.readouterr().err  # the near names


def test_taps_shows_the_grids_of_tokens(capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    assert main(["taps", "timm:vit_tiny_patch16_224"]) == 0
    assert re.search(r"^blocks\.0@auto +192 x 14 x 14$", capsys.readouterr().out, re.MULTILINE)


def test_methods_lists_every_file(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    files = sorted((RECIPES / "methods").glob("*.gin"))
    assert len(files) > 20
    for file in files:
        method = read_method(file)
        assert f"{method.file}\n  {method.summary}\n  {method.paper}\n  Published: {method.published}\n" in shown
        assert re.search(r"\b(19|20)\d\d\b|arXiv \d{4}\.", method.paper), f"{file}: a year"


def test_a_method_without_its_figures_is_an_error(tmp_path):
    (tmp_path / "x.gin").write_text("# X.\n# Somebody: X, 2020.\n\nA = 1\n")
    with pytest.raises(ValueError, match=r"'Published: ...' at the head of .*x.gin"):
        read_method(tmp_path / "x.gin")


@pytest.mark.parametrize("options", [["--help"], ["methods"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_and_methods_load_no_torch(options):
    script = f"""
import sys
from gkd.cli import main
try:
    main({options!r})
except SystemExit as end:
    assert end.code == 0
print(*[name for name in ("torch", "torch_geometric", "numpy", "gin") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    assert done.stdout


def test_absent_weights_are_made_by_their_recipe(here, capsys):
    (here / "teacher.gin").write_text(CLASSIFIER)
    (here / "run.gin").write_text(CLASSIFIER + TEACHER)
    options = ["train", "--gin", "run.gin", "--no-report", "--set", "Trainer.check_teacher = False"]
    assert main([*options, "--eval-only"]) == 2
    assert "gkd train --gin teacher.gin --output made" in capsys.readouterr().err
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "Training teacher.gin first, which makes made/student.safetensors"
    assert Path("made/results.json").is_file()
    assert "agreement" in json.loads(Path("runs/run/results.json").read_text())["final"]
    assert main([*options, "--overwrite"]) == 0
    assert "first, which makes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["teacher/Network.recipe = 'run.gin'"], "to need no weights that it makes itself"),
        (["teacher/Network.recipe = 'nowhere.gin'"], "nowhere.gin"),
        (["teacher/Network.weights = None"], "a file for the weights that the recipe teacher.gin makes"),
        (["teacher/Network.weights = 'made/other.pth'"], "Expected teacher.gin to make made/other.pth"),
        (["teacher/Network.recipe = None"], "made/student.safetensors"),
    ],
)
def test_mistakes_about_recipes_are_one_message(here, capsys, bindings, message):
    (here / "teacher.gin").write_text(CLASSIFIER)
    (here / "run.gin").write_text(CLASSIFIER + TEACHER)
    assert main(["train", "--gin", "run.gin", *(part for binding in bindings for part in ("--set", binding))]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
