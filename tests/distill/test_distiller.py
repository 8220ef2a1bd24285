from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gkd.distill import Distiller, GradientBalance, Ramp
from gkd.errors import UserError
from gkd.graphs import CompleteEdges, GraphBuilder, HeatKernelEncoding, PatchNodes
from gkd.losses import ATLoss, CRDLoss, EdgeLoss, EncodingLoss, FitNetLoss, GraphLoss, KDLoss, RKDLoss
from gkd.models import ChannelAdapter, Teacher


def network(width=4, classes=5):
    """Two stages; the second one's path holds a dot, and its ReLU overwrites the tapped output of the norm."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class Soft(nn.Module):
    level = "logits"

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, student_logits, teacher_logits, target=None):
        self.calls.append((student_logits, teacher_logits, target))
        return (student_logits - teacher_logits).square().mean()


class Hint(nn.Module):
    level = "stage"
    matched_channels = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, student, teacher):
        self.calls.append((student, teacher))
        return (student - teacher).square().mean()


class Parts(nn.Module):
    level = "stage"
    parts = ("mean", "spread")

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, student, teacher, parts=None):
        self.calls.append(list(parts))
        values = {"mean": (student.mean() - teacher.mean()).square(), "spread": (student.std() - teacher.std()).square()}
        return {part: values[part] for part in parts}


class Built(nn.Module):
    """A term with a layer of its own, at one stage or over all of them."""

    needs_index = True

    def __init__(self, level="stage"):
        super().__init__()
        self.level = level

    def build(self, student_shapes, teacher_shapes):
        self.shapes = (student_shapes, teacher_shapes)
        first, second = (list(shapes.values())[-1] if self.level == "stages" else shapes for shapes in self.shapes)
        self.layer = nn.Linear(first[1], second[1])

    def forward(self, student, teacher, index):
        self.index = index
        if self.level == "stages":
            self.seen = list(student)
            student, teacher = list(student.values())[-1], list(teacher.values())[-1]
        return (self.layer(student.mean((2, 3))) - teacher.mean((2, 3))).square().mean()


class Outcome(nn.Module):
    """A term of maps that asks for what the networks make of them in the end."""

    level = "stages"
    needs_outputs = True

    def build(self, student_shapes, teacher_shapes, num_classes):
        self.layer = nn.Linear(list(student_shapes.values())[-1][1], num_classes)

    def forward(self, student, teacher, outputs):
        self.outputs = outputs
        return (self.layer(list(student.values())[-1].mean((2, 3))) - outputs.teacher_logits).square().mean()


TAPS = {"low": "0", "high.1": ("1.1", "1.1")}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)


def build(**options):
    torch.manual_seed(0)
    options = {"student": network(), "teacher": network(width=6), "taps": TAPS, "input_size": (3, 8, 8), **options}
    return Distiller(**options)


def full(**options):
    terms = {"kd": Soft(), "fitnet": Hint(), "parts": Parts()}
    return build(**{"terms": terms, **options})


def test_names_and_values_of_all_levels(batch):
    distiller = build(terms={"kd": Soft(), "fitnet": Hint(), "parts": Parts(), "review": Built("stages")}, weights={"task": 0.1, "kd": 0.9})
    losses = distiller(*batch, index=torch.arange(4))
    stages = ("low", "high.1")
    expected = ["task", "kd", *(f"fitnet/{stage}" for stage in stages)]
    assert list(losses) == [*expected, *(f"parts/{stage}/{part}" for stage in stages for part in ("mean", "spread")), "review"]
    assert all(loss.shape == () and loss.requires_grad for loss in losses.values())
    student, teacher, target = distiller.terms["kd"].calls[0]
    assert torch.equal(losses["kd"], torch.tensor(0.9) * (student - teacher).square().mean())
    assert torch.equal(losses["task"], torch.tensor(0.1) * nn.functional.cross_entropy(student, batch[1]))
    assert torch.equal(target, batch[1])
    assert torch.equal(distiller.student_logits, student)
    assert torch.equal(distiller.teacher_logits, teacher)
    assert not distiller.student_logits.requires_grad
    assert torch.equal(teacher, distiller.teacher(batch[0]))


def test_plain_training_is_the_same_path(batch):
    distiller = Distiller(network(), label_smoothing=0.1)
    losses = distiller(*batch)
    assert list(losses) == ["task"]
    expected = nn.functional.cross_entropy(distiller.student(batch[0]), batch[1], label_smoothing=0.1)
    assert torch.equal(losses["task"], expected)
    assert distiller.teacher is None
    assert distiller.teacher_logits is None
    assert all(name.startswith("student.") for name in distiller.state_dict())


def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(batch):
    distiller = build(terms={"kd": Soft(), "fitnet": Hint(), "own": Built()})
    sum(distiller(*batch, index=torch.arange(4)).values()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for name, parameter in distiller.named_parameters()
        if "1.0.bias" not in name
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distiller.teacher.parameters())


def test_teacher_is_no_child():
    teacher = network(width=6)
    distiller = full(teacher=teacher)
    inside = {id(tensor) for tensor in [*teacher.parameters(), *teacher.buffers()]}
    assert inside.isdisjoint(id(tensor) for tensor in [*distiller.parameters(), *distiller.buffers()])
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "adapters"}
    assert teacher not in list(distiller.modules())
    assert isinstance(distiller.teacher, Teacher)
    distiller.train()
    assert distiller.student.training
    assert not any(module.training for module in distiller.teacher.modules())


def test_teacher_follows_to_and_weights_stay_exact(batch):
    distiller = full(weights={"kd": 0.9}).double()
    assert all(parameter.dtype == torch.float64 for parameter in distiller.teacher.parameters())
    images, targets = batch
    assert torch.isfinite(sum(distiller(images.double(), targets).values()))
    distiller.to(torch.bfloat16)
    assert distiller._weights[list(distiller.weights).index("kd")] == torch.tensor(0.9)


def test_student_is_an_ordinary_child(batch):
    distiller = full()
    own = {f"student.{name}" for name, _ in distiller.student.named_parameters()}
    assert own == {name for name, _ in distiller.named_parameters() if name.startswith("student.")}
    fresh = network()
    fresh.load_state_dict(
        {name.removeprefix("student."): value for name, value in distiller.state_dict().items() if name.startswith("student.")}
    )
    assert torch.equal(fresh.eval()(batch[0]), distiller.eval().student(batch[0]))


def test_adapters_are_shared_and_built_only_where_needed(batch):
    first, second = Hint(), Hint()
    distiller = build(terms={"a": first, "b": second, "parts": Parts()}, stages={"a": ["high.1"], "b": ["high.1"]})
    assert list(distiller.adapters) == ["high/1"]
    distiller(*batch)
    assert first.calls[0][0] is second.calls[0][0]
    assert first.calls[0][0].shape == (4, 12, 4, 4)  # the teacher's 12 channels


def test_features_are_what_the_terms_see(batch):
    hint, parts = Hint(), Parts()
    distiller = build(terms={"kd": Soft(), "hint": hint, "parts": parts}, stages={"hint": ["high.1"]})
    found = distiller.features(*batch)
    assert [(name, stage, adapted) for name, stage, _, adapted in distiller.stage_terms()] == [
        ("hint", "high.1", True),
        ("parts", "low", False),
        ("parts", "high.1", False),
    ]
    distiller(*batch)
    own, other = hint.calls[0]
    assert torch.equal(found.adapted["high.1"], own)
    assert torch.equal(found.teacher["high.1"], other)
    assert list(found.student) == ["low", "high.1"]
    assert torch.equal(found.output, distiller.student(batch[0]))


def test_features_without_a_teacher_are_the_output(batch):
    found = build(teacher=None, taps={}).features(batch[0])
    assert found.output.shape == (4, 5)
    assert not found.student
    assert not found.teacher


def test_adapter_matches_sizes(batch):
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 16, 5))
    distiller = build(teacher=teacher, taps={"low": ("0", "0")}, terms={"fitnet": Hint()})
    assert torch.isfinite(distiller(*batch)["fitnet/low"])


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 40)])
def test_adapted_maps_have_the_size_of_the_teachers_map_whatever_the_layers_were_probed_with(size):
    """Probed with 8 x 8 pixels, where the two strides give maps of 4 x 4 and 2 x 2."""
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    hint, graph = Hint(), Hint()
    graph.map_size = (3, 3)
    graph.forward = lambda student, teacher: graph.calls.append((student, teacher)) or student.mean()
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(2, 3, *size, generator=generator), torch.tensor([0, 1])
    for terms in ({"hint": hint, "graph": graph}, {"graph": graph}):
        distiller = build(student=student, teacher=teacher, taps={"map": "0"}, terms=terms)
        distiller(images, targets)
        student_map, teacher_map = graph.calls[-1]
        assert teacher_map.shape == (2, 6, size[0] // 4, size[1] // 4)
        pooled = len(terms) == 1 and size[0] // 4 > 3
        assert student_map.shape[2:] == ((3, 3) if pooled else teacher_map.shape[2:])
        assert distiller.features(images).adapted["map"].shape == student_map.shape


def test_training_classes_reach_the_terms_that_remember_samples(batch):
    distiller = build(terms={"crd": CRDLoss(num_negatives=4), "kd": Soft()}, stages={"crd": ["high.1"]})
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    distiller.set_targets(targets)
    assert torch.equal(distiller.terms["crd/high/1"].targets, targets)
    assert torch.isfinite(distiller(*batch, index=torch.arange(4))["crd/high.1"])


@pytest.mark.parametrize(("further", "seen"), [((), (2, 2)), ((2,), (2, 2)), ((3,), (4, 4)), ((None,), (4, 4))])
def test_adapter_averages_first_where_all_its_terms_agree(batch, further, seen):
    terms = {f"graph{number}": Hint() for number in range(1 + len(further))}
    for term, size in zip(terms.values(), (2, *further), strict=True):
        term.map_size = size if size is None else (size, size)
        term.forward = lambda student, teacher, term=term: term.calls.append((student, teacher)) or student.mean()
    distiller = build(terms=terms, stages={name: ["high.1"] for name in terms})
    distiller(*batch)
    student, teacher = terms["graph0"].calls[0]
    assert student.shape == (4, 12, *seen)
    assert teacher.shape == (4, 12, 4, 4)


def test_adapter_never_enlarges_for_a_term(batch):
    term = Hint()
    term.map_size = (6, 6)
    build(terms={"graph": term}, stages={"graph": ["high.1"]})(*batch)
    assert term.calls[0][0].shape == (4, 12, 4, 4)


def test_built_terms_get_shapes_and_a_copy_for_every_stage(batch):
    term = Built()
    distiller = build(terms={"own": term})
    assert list(distiller.terms) == ["own/low", "own/high/1"]
    assert distiller.terms["own/low"].shapes[0][1:] == (4, 8, 8)
    assert distiller.terms["own/low"].shapes[1][1:] == (6, 8, 8)
    assert distiller.terms["own/high/1"].shapes[0][1:] == (8, 4, 4)
    assert not hasattr(term, "layer")
    distiller(*batch, index=torch.arange(4))
    assert torch.equal(distiller.terms["own/low"].index, torch.arange(4))
    with pytest.raises(ValueError, match=r"Expected 'index', .* \(got None\)"):
        distiller(*batch)


def test_stages_come_in_the_order_of_the_taps(batch):
    distiller = build(terms={"review": Built("stages")}, stages={"review": ["high.1", "low"]})
    distiller(*batch, index=torch.arange(4))
    assert distiller.terms["review"].seen == ["low", "high.1"]
    assert list(distiller.terms["review"].shapes[0]) == ["low", "high.1"]


def test_weight_zero_is_not_computed(batch):
    terms = {"kd": Soft(), "fitnet": Hint(), "parts": Parts()}
    distiller = build(terms=terms, weights={"kd": 0, "fitnet/low": 0, "parts/mean": 0})
    assert list(distiller(*batch)) == ["task", "fitnet/high.1", "parts/low/spread", "parts/high.1/spread"]
    assert not terms["kd"].calls
    assert len(terms["fitnet"].calls) == 1
    assert terms["parts"].calls == [["spread"], ["spread"]]
    assert list(distiller.adapters) == ["high/1"]
    assert "kd" not in distiller.terms


def test_teacher_does_not_run_when_nothing_needs_it(batch):
    runs = []
    distiller = full(weights={"kd": Ramp(start=1), "fitnet": 0, "parts": Ramp(start=2)})
    distiller.teacher.register_forward_hook(lambda *_: runs.append(1))
    assert list(distiller(*batch)) == ["task"]
    assert runs == []
    assert distiller.teacher_logits is None
    distiller.progress(1)
    assert list(distiller(*batch)) == ["task", "kd"]
    assert runs == [1]
    distiller.progress(2.5)
    assert len(distiller(*batch)) == 6


def test_only_used_stages_are_tapped():
    distiller = build(taps={**TAPS, "unused": "no.such.path"}, terms={"fitnet": Hint()}, stages={"fitnet": ["low"]})
    assert distiller._student_taps.paths == ("0",)


def test_ramps_follow_progress(batch):
    distiller = full(weights={"kd": Ramp(value=2.0, up=4)})
    plain: dict[float, float] = {}
    for epoch in (1.0, 2.0, 4.0, 9.0):
        distiller.progress(epoch)
        plain[epoch] = distiller.eval()(*batch)["kd"].item()
    assert plain[1.0] * 2 == pytest.approx(plain[2.0])
    assert plain[2.0] * 2 == pytest.approx(plain[4.0])
    assert plain[4.0] == plain[9.0]
    distiller.progress(0.0)
    assert "kd" not in distiller(*batch)


def test_layers_of_idle_terms_get_gradient_zero(batch):
    # DistributedDataParallel waits for a gradient of every parameter
    distiller = full(weights={"fitnet": Ramp(start=3)})
    sum(distiller(*batch).values()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in distiller.adapters.parameters())


def test_nothing_active_gives_a_sum_of_zero(batch):
    distiller = full(weights={"task": 0, "kd": Ramp(start=3), "fitnet": 0, "parts": 0})
    losses = distiller(*batch)
    assert {name: loss.item() for name, loss in losses.items()} == {"task": 0.0}
    losses["task"].backward()
    distiller.progress(4)
    assert list(distiller(*batch)) == ["kd"]


def test_task_may_return_named_losses():
    class Boxes(nn.Module):
        def forward(self, output, targets):
            return {"cls": output["cls"].mean(), "box": output["box"].mean() * targets}

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, images):
            return {"cls": self.layer(images[0]), "box": self.layer(images[1])}

    distiller = Distiller(Detector(), task=Boxes(), weights={"task": 2.0})
    images = [torch.ones(1, 2), torch.zeros(3, 2)]
    losses = distiller(images, 3.0)
    assert list(losses) == ["task/cls", "task/box"]
    assert torch.allclose(losses["task/box"], 6 * distiller.student.layer.bias.mean())
    assert distiller.student_logits is None


def test_balance_enters_state_and_resumes(batch):
    distiller = full(balance=GradientBalance(interval=2))
    for _ in range(3):
        distiller(*batch)
    state = copy.deepcopy(distiller.state_dict())
    assert {name.split(".")[0] for name in state} == {"student", "adapters", "balance"}
    resumed = full(balance=GradientBalance(interval=2), student=network())
    resumed.load_state_dict(state)
    first, second = distiller(*batch), resumed(*batch)
    assert {name: loss.item() for name, loss in first.items()} == {name: loss.item() for name, loss in second.items()}
    assert torch.equal(distiller.balance.norms, resumed.balance.norms)


def test_balance_sees_the_task_behind_copied_taps(batch):
    # the tap of "1.1" is a copy, for the ReLU overwrites the map in place; the first call copies every map
    distiller = full(balance="gradient", weights={"kd": 0})
    distiller(*batch)
    assert (distiller.balance.norms > 0).all()


def test_copies_are_independent(batch):
    distiller = full()
    other = copy.deepcopy(distiller)
    before = distiller.eval()(*batch)["kd"].item()
    with torch.no_grad():
        for parameter in other.student.parameters():
            parameter.zero_()
    other.eval()(*batch)
    assert distiller(*batch)["kd"].item() == before
    assert other.teacher is not distiller.teacher


@pytest.mark.parametrize("compiled", ["student", "distiller"])
def test_compiled_steps_equal_eager_ones(batch, compiled):
    # the ramp moves on and the balance measures in between; neither compiles anything anew
    results = []
    for compiles in (False, True):
        terms = {"kd": KDLoss(), "fitnet": FitNetLoss()}
        distiller = build(terms=terms, weights={"kd": Ramp(up=8)}, balance=GradientBalance(interval=2))
        step = distiller
        if compiles and compiled == "student":
            distiller.student.compile(backend="aot_eager")
        elif compiles:
            step = torch.compile(distiller, backend="eager")
        torch._dynamo.utils.counters.clear()
        graphs = []
        for number in range(1, 6):
            distiller.progress(number / 2)
            losses = step(*batch)
            sum(losses.values()).backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        results.append({name: loss.item() for name, loss in losses.items()})
        assert graphs[-1] == graphs[2]
        assert (graphs[-1] > 0) == compiles
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_boxes_reach_the_terms_that_need_them():
    class Regions(nn.Module):
        level = "stage"
        needs_boxes = True

        def forward(self, student, teacher, boxes, image_size):
            self.seen = (boxes, image_size)
            return (student.mean() - teacher.mean()).square()

    class Boxes(nn.Module):
        def forward(self, output, targets):
            return output.mean()

    term = Regions()
    distiller = build(terms={"regions": term}, stages={"regions": ["low"]}, task=Boxes())
    boxes = [torch.zeros(2, 4), torch.zeros(0, 4)]
    distiller(torch.zeros(2, 3, 8, 6), [{"boxes": box} for box in boxes])
    assert term.seen == (boxes, (8, 6))
    with pytest.raises(ValueError, match="Expected images and targets with 'boxes'"):
        distiller(torch.zeros(2, 3, 8, 6), [{"masks": None}])


def _rank(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    distiller = full(weights={"fitnet": Ramp(start=1)}, balance=GradientBalance(interval=2))
    wrapped = nn.parallel.DistributedDataParallel(distiller)
    generator = torch.Generator().manual_seed(rank)
    for epoch in (0.0, 0.5, 1.0):  # the hint, and its adapters, come in at the end
        distiller.progress(epoch)
        sum(wrapped(torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)).values()).backward()
    results[rank] = (distiller.balance.norms, [parameter.grad for parameter in distiller.parameters()])
    torch.distributed.destroy_process_group()


def test_ranks_weigh_alike(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(_rank, (tmp_path / "store", results), nprocs=2, start_method="fork")
        (norms, gradients), (other_norms, other_gradients) = results[0], results[1]
    assert torch.equal(norms, other_norms)
    assert (norms > 0).all()
    assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "Expected a teacher for the terms kd, fitnet, parts .got none"),
        ({"weights": {"fitnets": 1}}, "got 'fitnets'.. Did you mean 'fitnet"),
        ({"weights": {"fitnet/lou": 1}}, "Did you mean 'fitnet/low'"),
        ({"stages": {"fitnett": ["low"]}}, "a key of 'stages' .*Did you mean 'fitnet'"),
        ({"stages": {"fitnet": ["lo"]}}, "a stage of the term 'fitnet' .*Did you mean 'low'"),
        ({"stages": {"kd": ["low"]}}, "no stages for the term 'kd'"),
        ({"stages": {"fitnet": []}}, "Expected a stage for the term 'fitnet'"),
        ({"taps": {}}, "Expected a stage for the term 'fitnet': give it in 'taps'"),
        ({"taps": {"low": ("0", "0", "0")}}, "Expected the tap 'low' to be a path in the student and one in the teacher"),
        ({"taps": {"mean": "0"}}, "Expected no stage to be named as a part of the term 'parts' .got 'mean'"),
        ({"taps": {"a/b": "0"}}, "Expected another name for a stage"),
        ({"terms": {"task": Soft()}}, "Expected another name for a term"),
        ({"terms": {"x": nn.Identity()}}, "Expected term 'x' to have the attribute 'level'"),
        ({"balance": "gradients"}, "Expected 'balance' to be 'gradient'"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        full(**options)


def test_unknown_path_lists_the_near_ones():
    with pytest.raises(ValueError, match="Expected the path of a module"):
        build(taps={"low": ("0.3", "0")}, terms={"fitnet": Hint()})


def test_adapter_is_the_documented_one():
    assert isinstance(full().adapters["low"], ChannelAdapter)


class Returning(nn.Module):
    """A classifier that returns its logits as other libraries do."""

    def __init__(self, wrap):
        super().__init__()
        self.conv, self.fc, self.wrap = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), wrap

    def forward(self, images):
        features = self.conv(images)
        return self.wrap(self.fc(features.mean((2, 3))), features)


@pytest.mark.parametrize("task", [None, nn.CrossEntropyLoss(ignore_index=2)])
@pytest.mark.parametrize(
    "wrap",
    [lambda logits, features: {"features": features, "logits": logits}, lambda logits, features: (logits, features)],
)
def test_networks_that_return_more_than_a_tensor(wrap, task):
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    student, teacher = Returning(wrap), Returning(wrap)
    plain = Returning(lambda logits, features: logits), Returning(lambda logits, features: logits)
    for network, twin in zip((student, teacher), plain, strict=True):
        twin.load_state_dict(network.state_dict())
    settings = {"taps": {"conv": "conv"}, "terms": {"kd": KDLoss(), "at": ATLoss()}, "task": task}
    distiller, expected = Distiller(student, teacher, **settings), Distiller(*plain, **settings)
    losses = distiller(images, targets)
    torch.testing.assert_close(losses, expected(images, targets), rtol=0, atol=0)
    torch.testing.assert_close(distiller.student_logits, expected.student_logits)
    torch.testing.assert_close(distiller.teacher_logits, expected.teacher_logits)
    sum(losses.values()).backward()


def test_networks_without_logits():
    with pytest.raises(ValueError, match="Expected a network that returns its logits"):
        Distiller(Returning(lambda logits, features: {"loss": 3}))(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("encodings", "weight", "message"),
    [
        ({"loss": HeatKernelEncoding()}, 0.0, "Expected a weight above 0 of 'encoding', .*, in the term 'graph'"),
        ({"builder": HeatKernelEncoding()}, 0.0, "Expected an EncodingLoss .* in the term 'graph'"),
        ({"builder": HeatKernelEncoding()}, 1.0, None),
        ({"loss": HeatKernelEncoding()}, Ramp(up=3), None),
        ({}, 0.0, None),
    ],
)
def test_an_encoding_that_no_active_term_reads_is_refused(batch, encodings, weight, message):
    builder = GraphBuilder(PatchNodes(grid=2), CompleteEdges(), encoding=encodings.get("builder"))
    graph = GraphLoss(builder, {"edge": EdgeLoss(), "encoding": EncodingLoss(encodings.get("loss"))})
    options = {"terms": {"graph": graph}, "weights": {"graph/encoding": weight}, "stages": {"graph": ["low"]}}
    if message is None:
        distiller = build(**options)
        distiller.progress(1.0)
        assert ("graph/low/encoding" in distiller(*batch)) == (weight != 0)
    else:
        with pytest.raises(UserError, match=message):
            build(**options)


def test_extra_taps_are_for_the_terms_that_name_them():
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    networks = [Returning(lambda logits, features: logits) for _ in range(2)]
    settings = {"taps": {"conv": "conv"}, "extra_taps": {"logits": "fc"}}
    losses = Distiller(*networks, terms={"at": ATLoss(), "rkd": RKDLoss()}, stages={"rkd": ["logits"]}, **settings)(images, targets)
    assert list(losses) == ["task", "at/conv", "rkd/logits"]
    with pytest.raises(UserError, match=r"(?s)a stage of the term 'rkd'.*logit"):
        Distiller(*networks, terms={"rkd": RKDLoss()}, stages={"rkd": ["logit"]}, **settings)
    with pytest.raises(UserError, match="Expected other names in 'extra_taps'"):
        Distiller(*networks, taps={"conv": "conv"}, extra_taps={"conv": "fc"})


def test_a_term_of_maps_sees_logits_targets_and_last_layers(batch):
    distiller = build(terms={"outcome": Outcome()})
    losses = distiller(*batch)
    term = distiller.terms["outcome"]
    assert torch.equal(term.outputs.student_logits, distiller.student_logits)
    assert torch.equal(term.outputs.teacher_logits, distiller.teacher_logits)
    assert torch.equal(term.outputs.target, batch[1])
    torch.testing.assert_close(term.outputs.student_head.weight, distiller.student[4].weight)
    torch.testing.assert_close(term.outputs.teacher_head.weight, distiller.teacher.model[4].weight)
    assert losses["outcome"].requires_grad
    assert not [name for name in distiller.state_dict() if "head" in name]


def test_the_last_layers_of_a_copy_are_those_of_its_networks():
    twin = copy.deepcopy(build(terms={"outcome": Outcome()}))
    assert twin._heads[0].layer is twin.student[4]
    assert twin._heads[1].layer is twin.teacher.model[4]


def test_networks_are_not_probed_for_their_last_layer_without_need():
    assert build(terms={"outcome": Outcome()}, weights={"outcome": 0.0})._heads == ()
    assert build(terms={"kd": Soft()})._heads == ()
