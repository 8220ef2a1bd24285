"""The dry pass finds what would fail later, and leaves no trace in the run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gkd.data import RandomImages
from gkd.distill import Distiller, Ramp
from gkd.engine import SGD, NonFiniteLossError, RunFolder, Trainer
from gkd.engine.checkpoint import load_checkpoint
from gkd.errors import UserError
from gkd.losses import CRDLoss, KDLoss
from gkd.models import build_classifier
from gkd.tasks import Classification, Network
from gkd.tasks.dry_pass import check_weights, first_epochs


class Broken(nn.Module):
    level = "logits"

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error

    def forward(self, student, teacher, target):
        if self.error is not None:
            raise self.error
        return (student - student.detach()).norm().sqrt()  # 0, with an infinite slope


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(build_classifier("resnet8", num_classes=4).state_dict(), path)
    return str(path)


def task(weights, terms=None, ramps=None, data=None, **settings) -> Classification:
    def distiller(**wired) -> Distiller:
        terms_used = {"kd": KDLoss(), "crd": CRDLoss(num_samples=24, num_negatives=4)} if terms is None else terms
        return Distiller(taps={"pool": "layer3"}, terms=terms_used, weights=ramps or {}, balance="gradient", **wired)

    defaults = {"epochs": 2, "device": "cpu", "loggers": (), "log_every": 1, "optimizer": SGD(lr=0.01), "check_teacher": False}
    images = RandomImages(num_classes=4, num_train=24, num_test=12) if data is None else data
    return Classification(
        Network("resnet8"),
        Network("resnet8", weights=weights) if weights else None,
        images,
        distiller,
        trainer=Trainer(**{**defaults, **settings}),
        batch_size=12,
    )


def test_a_run_is_overwritten_only_by_one_that_can_begin(weights, tmp_path):
    folder = RunFolder(tmp_path / "run")
    task(weights, epochs=1).train(folder)
    before = folder.student.read_bytes()
    folder.prepare(overwrite=True)
    with pytest.raises(UserError, match="in Broken"):
        task(weights, terms={"mine": Broken(TypeError("too many"))}).train(folder, overwrite=True)
    assert folder.student.read_bytes() == before
    task(weights, epochs=1, optimizer=SGD(lr=0.1)).train(folder, overwrite=True)
    assert folder.student.read_bytes() != before


@pytest.mark.parametrize("error", [TypeError("too many"), AttributeError("no shape"), KeyError("layer3"), RuntimeError("sizes differ")])
def test_a_part_that_fails_is_named(weights, tmp_path, error):
    run = task(weights, terms={"mine": Broken(error)}, ramps={"mine": Ramp(1.0, start=1, up=0)})
    with pytest.raises(UserError, match=rf"got {type(error).__name__} in Broken \(terms.mine\): .*--debug"):
        run.train(RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_with_it_equals_one_without(tmp_path, weights, capsys):
    ramps = {"crd": Ramp(1.0, up=1, start=1)}
    for name in ("with", "without"):
        task(weights, ramps=ramps, dry_pass=name == "with").train(RunFolder(tmp_path / name))
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("with", "without")]
    assert any("memory" in name for name in states[0]["model"])
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert torch.equal(*(state["ranks"][0]["rng"]["torch"] for state in states))
    records = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("with", "without")]
    for one, two in zip(*records, strict=True):
        assert {**one, "images_per_second": 0} == {**two, "images_per_second": 0}
    # The teacher's score comes with the results in any case, and is printed before the first epoch by the dry pass.
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without")]
    assert results[0]["teacher"] == results[1]["teacher"]
    assert set(results[0]["teacher"]) == {"split", "top1", "top5", "loss"}
    printed = capsys.readouterr().out
    assert printed.index("The teacher on the test images: top1") < printed.index("epoch 1/2")
    assert printed.count("The teacher on the test images") == 1


def test_the_cost_of_both_networks_is_in_the_results(tmp_path, weights):
    results = task(weights, terms={"kd": KDLoss()}).train(RunFolder(tmp_path))
    assert set(results["cost"]) == {"student", "teacher"}
    for cost in results["cost"].values():
        assert cost["parameters"] == sum(parameter.numel() for parameter in build_classifier("resnet8", num_classes=4).parameters())
        # resnet8 at 32 x 32: 3x3 convolutions 3 to 16 once and 16 to 16 twice at 32 x 32, 16 to 32, 32 to 32 and the shortcut 16 to 32 at
        # 16 x 16, 32 to 64, 64 to 64 and the shortcut at 8 x 8, and 64 to 4; two operations for a multiplication and an addition.
        first = 1024 * 9 * (3 * 16 + 2 * 16 * 16)
        second = 256 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
        third = 64 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
        assert cost["flops"] == 2 * (first + second + third + 64 * 4)
        assert cost["latency_ms"] > 0


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        (Broken(ValueError("Expected k below 16 (got 64)")), ValueError, "Expected k below 16"),
        (Broken(), NonFiniteLossError, r"Expected finite gradients before the first step .*weights of epoch 2"),
    ],
)
def test_a_term_that_fails_later_is_found_before_the_first_step(tmp_path, weights, term, error, message):
    folder = RunFolder(tmp_path)
    with pytest.raises(error, match=message):
        task(weights, terms={"late": term}, ramps={"late": Ramp(1.0, up=0, start=1)}).train(folder)
    assert not folder.metrics.exists()


def test_every_set_of_active_terms_is_tried_once():
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    terms = {name: KDLoss() for name in ("early", "late", "never")}
    ramps = {"early": Ramp(1.0, up=4, hold=1, down=1), "late": Ramp(1.0, up=0, start=7.5), "never": Ramp(1.0, up=0, start=30)}
    distiller = Distiller(student, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), terms=terms, weights=ramps)
    assert list(first_epochs(distiller, 40, 4)) == [0, 0.5, 7.5]
    assert list(first_epochs(distiller, 2, 4)) == [0, 0.25]  # half an epoch: only the last step is left
    assert list(first_epochs(distiller, 1, 4)) == [0]


def test_a_teacher_that_only_guesses_is_refused(tmp_path, weights):
    # Six of twelve right are within the luck of a guess: 25 + 2 * sqrt(0.25 * 0.75 / 12) = 50 percent.
    images = RandomImages(num_classes=4, num_train=24, num_test=12)
    assert task(weights, data=images).chance == pytest.approx(50.0)
    with pytest.raises(UserError, match=r"better than guessing, .* top1 of up to 50 \(got .*check_teacher = False"):
        task(weights, check_teacher=True).train(RunFolder(tmp_path))


def test_a_teacher_with_weights_that_are_no_numbers_is_refused(tmp_path, weights):
    broken = task(weights, check_teacher=True)
    with torch.no_grad():
        next(broken.teacher.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"Expected finite weights of the teacher \(got NaN or infinity in model\."):
        broken.train(RunFolder(tmp_path))


def test_a_teacher_may_have_infinite_buffers_but_no_infinite_weights():
    teacher = nn.Linear(2, 2)
    teacher.register_buffer("mask", torch.full((2, 2), float("-inf")), persistent=False)
    check_weights(teacher)
    with torch.no_grad():
        teacher.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"NaN or infinity in weight\)"):
        check_weights(teacher)


def test_absent_files_and_broken_images_are_found_before_the_first_step(tmp_path):
    class Absent(RandomImages):
        def check_files(self):
            raise UserError("Expected the image a.png (got no such file)")

    class Unreadable(RandomImages):
        def batches(self, split, *arguments, **options):
            if split == "test":
                raise UserError("Expected an image in b.png")
            return super().batches(split, *arguments, **options)

    for kind, message in ((Absent, "a.png"), (Unreadable, "b.png")):
        folder = RunFolder(tmp_path / kind.__name__)
        with pytest.raises(UserError, match=message):
            task(None, terms={}, data=kind(num_classes=4, num_train=24, num_test=12, holdout=12)).train(folder)
        assert not folder.metrics.exists()


def test_further_evaluation_sets_of_the_data(tmp_path):
    class Two(RandomImages):
        evaluation_sets = ("test",)

    data = Two(num_classes=4, num_train=36, num_test=12, holdout=12)
    results = task(None, terms={}, data=data).train(RunFolder(tmp_path))
    assert results["chosen_on"] == "val"
    assert results["further"]["test"] == {name: results["final"][name] for name in ("split", "top1", "top5", "loss")}
    splits = [json.loads(line).get("split") for line in (tmp_path / "metrics.jsonl").open()]
    assert [split for split in splits if split] == ["val", "test"] * 2
