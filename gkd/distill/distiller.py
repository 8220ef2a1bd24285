from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gkd.distill.balance import GradientBalance, as_balance
from gkd.distill.networks import NetworkPair, Taps
from gkd.distill.plan import Call, module_key, plan_calls, two_paths
from gkd.distill.schedule import Schedule
from gkd.distill.weights import LossName, resolve_weights
from gkd.errors import UserError
from gkd.losses.term import ChangesWithTime, ChecksParts, Outputs, RemembersSamples, Term
from gkd.models import ChannelAdapter, Teacher, read_logits


class Features(NamedTuple):
    """What two networks make of the same images."""

    output: Any
    """Of the student."""
    student: dict[str, Tensor]
    """Its maps by stage, for the stages that some term looks at."""
    teacher: dict[str, Tensor]
    """The teacher's."""
    adapted: dict[str, Tensor]
    """The student's as the terms with ``matched_channels`` see them."""


class Distiller(nn.Module):
    """Turns a batch into the named, weighted losses that train a student under a teacher.

    The student is an ordinary child module that never learns of the distillation: its inner maps are read by
    :class:`~gkd.models.FeatureTaps`. The teacher is no child. It follows ``.to()``, but ``train()``, ``parameters()`` and
    ``state_dict()`` do not know it. What a term returns is named ``term``, ``term/stage`` or ``term/stage/part``, and weighed by the
    most specific of the keys ``term/stage/part``, ``term/part``, ``term/stage``, ``term``; without any of these by 1. What weighs 0 is not
    computed, and the teacher does not run for it.

    Every term says at which level it works: at the logits, at one stage after the other, or at all stages together.
    :class:`~gkd.losses.Term` lists what else it may declare, such as that it compares maps of equal channels.

    Args:
        student: The network to train.
        teacher: The network to learn from, best a :class:`~gkd.models.Teacher`; any other module is made one. None for a plain training.
        taps: For every stage the module paths in the student and the teacher; one path for both where they agree. Deep stages last.
        terms: The losses by name. Names hold no ``/``.
        weights: Numbers, :class:`~gkd.distill.Ramp` or functions of the epoch, by key; :class:`~gkd.distill.Share` of one of these for a
            weight in units of the task's gradient. ``task`` is the task's own.
        stages: Which stages a term looks at, where it is not all of ``taps``.
        extra_taps: Further taps, such as the pooled vector, for the terms alone that name them in ``stages``.
        task: The loss ``(student_output, targets)`` of the task; a tensor, or a dictionary of named ones. By default the cross-entropy.
            The losses of torch see the logits in what the student returns (:func:`~gkd.models.read_logits`), any other sees all of it.
        label_smoothing: Of the default task loss.
        balance: A :class:`~gkd.distill.GradientBalance`, or ``'gradient'`` for one with its defaults, which is also what shares get where
            there is none. If no weight is a ``Share``, it makes shares of all weights but the task's.
        input_size: [C, H, W] of an image that both networks take, to probe the channels of the maps where a layer must be built. Images of
            the training may have other sizes.
        networks: How the two networks are called and read, where they are no classifiers.

    Raises:
        UserError: If a name in ``weights``, ``stages`` or ``balance`` is unknown, or the arguments contradict each other.
        ValueError: If a module path does not exist.

    Examples:
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> distiller = Distiller(student, label_smoothing=0.1)
        >>> list(distiller(torch.randn(2, 3, 2, 2), torch.tensor([0, 2])))
        ['task']
    """

    teacher: nn.Module | None
    student_logits: Tensor | None
    teacher_logits: Tensor | None
    _weights: Tensor
    _student_taps: Taps
    _teacher_taps: Taps | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        taps: Mapping[str, Sequence[str] | str] | None = None,
        terms: Mapping[str, nn.Module] | None = None,
        weights: Mapping[str, float | Schedule | Callable[[float], float]] | None = None,
        stages: Mapping[str, Sequence[str]] | None = None,
        extra_taps: Mapping[str, Sequence[str] | str] | None = None,
        task: Callable[..., Tensor | Mapping[str, Tensor]] | None = None,
        label_smoothing: float = 0.0,
        balance: GradientBalance | str | None = None,
        input_size: Sequence[int] = (3, 32, 32),
        networks: NetworkPair | None = None,
    ) -> None:
        super().__init__()
        terms = dict(terms or {})
        if terms and teacher is None:
            raise UserError(f"Expected a teacher for the terms {', '.join(terms)} (got none)")
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher(teacher)
        self.student = student
        self.networks = NetworkPair() if networks is None else networks
        self.__dict__["teacher"] = teacher  # past nn.Module.__setattr__, which would make it a child
        self.student_logits = self.teacher_logits = None
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected label_smoothing in [0, 1) (got {label_smoothing})")
        self.task = nn.CrossEntropyLoss(label_smoothing=label_smoothing) if task is None else task
        self._task_reads_logits = isinstance(self.task, nn.modules.loss._Loss)

        taps, extra_taps = taps or {}, extra_taps or {}
        if twice := [stage for stage in extra_taps if stage in taps]:
            raise UserError(f"Expected other names in 'extra_taps' than in 'taps' (got {', '.join(twice)} in both)")
        paths = {stage: two_paths(stage, path) for stage, path in (*taps.items(), *extra_taps.items())}
        calls = plan_calls(terms, list(taps), stages or {}, list(extra_taps))
        names = [LossName("task"), *(name for call in calls for name in call.names)]
        self._schedules = resolve_weights(weights or {}, names)
        self._calls = [call for call in calls if not all(self._schedules[name].always_zero for name in call.losses.values())]
        self._check_parts(terms)
        self._paths = {stage: path for stage, path in paths.items() if any(stage in call.stages for call in self._calls)}
        self.__dict__["_student_taps"] = self.networks.student_taps(student, dict.fromkeys(path for path, _ in self._paths.values()))
        teacher_paths = dict.fromkeys(path for _, path in self._paths.values())
        self.__dict__["_teacher_taps"] = self.networks.teacher_taps(teacher, teacher_paths) if teacher else None
        self._heads: tuple[Any, ...] = ()
        if teacher is not None and any(call.term.needs_outputs for call in self._calls):
            self._heads = self.networks.heads(student, teacher, input_size)
        self.adapters, self.terms = nn.ModuleDict(), nn.ModuleDict()
        self._build(terms, tuple(input_size))

        shares = [name for name, schedule in self._schedules.items() if schedule.is_share]
        if "task" in shares:
            raise UserError("Expected an absolute weight of 'task', in units of which the shares count (got a Share)")
        self.balance = as_balance(balance) or (GradientBalance() if shares else None)
        if self.balance is not None:
            computed = [name for call in self._calls for name in call.losses.values()]
            self.balance.build([name for name in computed if name in shares or not shares])
        self.register_buffer("_weights", torch.zeros(len(self._schedules)), persistent=False)
        self.progress(0.0)

    def progress(self, epoch: float) -> None:
        """Sets weights, and terms that change with time, to what they are at ``epoch``, which may lie between whole numbers.

        There is nothing to checkpoint: both are pure functions of the epoch.
        """
        self.weights = {name: schedule(epoch) for name, schedule in self._schedules.items()}
        if self.balance is not None:
            self.weights.update(self.balance.bounded({name: self.weights[name] for name in self.balance.names}))
        self._active = frozenset(name for name, weight in self.weights.items() if weight != 0)
        self._fill_weights()
        for term in self.terms.values():
            if isinstance(term, ChangesWithTime):
                term.progress(epoch)

    def forward(self, images: Any, targets: Any, index: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the active losses, weighted, by name; their sum is what to minimise.

        Args:
            images: What the student takes: [B, C, H, W], normalised for the student.
            targets: What the task loss takes: [B] class indices.
            index: Positions of the images in the data set, [B], for terms that need them.
        """
        if self.balance is not None and self.balance.tick(name for name in self.balance.names if name in self._active):
            return self._measured_losses(images, targets, index)
        return self._losses(images, targets, index)

    def features(self, images: Any, targets: Any = None) -> Features:
        """Runs both networks and returns what the terms would compare, without any loss: for looking at it.

        Args:
            images: As in `forward`.
            targets: As in `forward`.
        """
        tapped = bool(self._paths)
        output, student = self._run_student(self.networks.student_inputs(images, targets), tapped)
        teacher = self._run_teacher(self.networks.teacher_inputs(images, targets), tapped)[1] if tapped else {}
        return Features(output, student, teacher, self._adapted(self._calls, student, teacher))

    def declared_terms(self) -> Iterator[tuple[nn.Module, Term]]:
        """Every term that weighs something at some time, with what it declares; for every stage where it has layers of its own."""
        terms = {call.key: call.term for call in self._calls}
        yield from ((self.terms[key], term) for key, term in terms.items())

    @property
    def remembers_samples(self) -> bool:
        """Whether some term keeps a memory of the training samples, and wants to know their classes."""
        return any(isinstance(term, RemembersSamples) for term in self.terms.values())

    def set_targets(self, targets: Tensor) -> None:
        """Tells the classes of all training samples to the terms that keep a memory of them.

        Args:
            targets: Classes of the training samples, [num_samples].
        """
        for term in self.terms.values():
            if isinstance(term, RemembersSamples):
                term.set_targets(targets)

    def stage_terms(self) -> Iterator[tuple[str, str, nn.Module, bool]]:
        """Every term that works stage by stage: its name, the stage, the module, and whether it takes the student's adapted map."""
        for call in self._calls:
            if call.term.level == "stage":
                yield call.name, call.stages[0], self.terms[call.key], call.adapted

    @torch.compiler.disable
    def _measured_losses(self, images: Any, targets: Any, index: Tensor | None) -> dict[str, Tensor]:
        # Inside compiled code there is no gradient to look at. The import behind set_stance takes seconds: only where something may be
        # compiled.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            return self._losses(images, targets, index, measure=True)

    def _losses(self, images: Any, targets: Any, index: Tensor | None, measure: bool = False) -> dict[str, Tensor]:
        calls = [call for call in self._calls if not self._active.isdisjoint(call.losses.values())]
        tapped = any(call.stages for call in calls)
        output, student = self._run_student(self.networks.student_inputs(images, targets), tapped)
        losses: dict[str, Tensor] = {}
        anchors: dict[str, list[Tensor]] = {}
        self.student_logits, self.teacher_logits = self._logits(output), None
        if calls:
            teacher_output, teacher = self._run_teacher(self.networks.teacher_inputs(images, targets), tapped)
            self.teacher_logits = self._logits(teacher_output)
            options: dict[str, Any] = {}
            if any(call.term.needs_index for call in calls):
                options["index"] = _expect_index(index)
            if any(call.term.needs_outputs for call in calls):
                options["outputs"] = Outputs(*self.networks.logits(output, teacher_output, targets), *self._heads)
            compared = dict.fromkeys(call.term.compares for call in calls if call.term.level == "logits")
            logits = {kind: self.networks.logits(output, teacher_output, targets, kind) for kind in compared}
            adapted = self._adapted(calls, student, teacher)
            for call in calls:
                if call.term.needs_boxes:
                    options["boxes"], options["image_size"] = self.networks.regions(images, targets, output, call.term.true_boxes_only)
                seen = logits.get(call.term.compares, (None, None, None))
                values = self._evaluate(call, seen, adapted if call.adapted else student, teacher, options)
                losses.update(values)
                anchors.update(dict.fromkeys(values, [student[stage] for stage in call.stages] or self.networks.anchors(output, seen)))
        tasks = self._task_losses(output, targets, losses)
        if measure and losses and self.balance is not None:
            shared = {name: loss for name, loss in losses.items() if name in self.balance.names}
            self.balance.measure(torch.stack(list(tasks.values())).sum(), shared, anchors)
        return self._weigh(tasks, losses)

    def _run_student(self, inputs: tuple[Any, ...], tapped: bool) -> tuple[Any, dict[str, Tensor]]:
        features = {}
        if tapped:
            output, maps = self._student_taps(*inputs)
            features = {stage: maps[path] for stage, (path, _) in self._paths.items()}
        else:
            output = self._student_taps.model(*inputs)
        return output, features

    def _run_teacher(self, inputs: tuple[Any, ...], tapped: bool) -> tuple[Any, dict[str, Tensor]]:
        """Runs the teacher: the one place that detaches it."""
        assert self.teacher is not None
        assert self._teacher_taps is not None
        features = {}
        with torch.no_grad():
            if tapped:
                output, maps = self._teacher_taps(*inputs)
                features = {stage: maps[path].detach() for stage, (_, path) in self._paths.items()}
            else:
                output = self._teacher_taps.model(*inputs)
        return output.detach() if isinstance(output, Tensor) else output, features

    def _logits(self, output: Any) -> Tensor | None:
        if isinstance(output, Tensor):
            return output.detach()
        return read_logits(output).detach() if self._task_reads_logits else None

    def _task_losses(self, output: Any, targets: Any, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if losses and self.balance is None and "task" not in self._active:
            return {}
        task = self.task(read_logits(output) if self._task_reads_logits else output, targets)
        return {"task": task} if isinstance(task, Tensor) else {f"task/{name}": loss for name, loss in task.items()}

    def _evaluate(
        self,
        call: Call,
        outputs: tuple[Any, Any, Any],
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        context: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        options = {key: context[key] for key in call.term.keywords}
        if None not in call.losses:
            options["parts"] = [part for part, name in call.losses.items() if name in self._active]
        module = self.terms[call.key]
        if call.term.level == "logits":
            values = module(*outputs, **options)
        elif call.term.level == "stage":
            values = module(student[call.stages[0]], teacher[call.stages[0]], **options)
        else:
            values = module({stage: student[stage] for stage in call.stages}, {stage: teacher[stage] for stage in call.stages}, **options)
        return {call.losses[None]: values} if isinstance(values, Tensor) else {call.losses[part]: loss for part, loss in values.items()}

    def _weigh(self, tasks: dict[str, Tensor], losses: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = dict(zip(self.weights, self._weights.unbind(), strict=True))
        weighted = {name: weights["task"] * loss for name, loss in tasks.items() if "task" in self._active or not losses}
        factors = {} if self.balance is None else self.balance.factors()
        for name, loss in losses.items():
            weighted[name] = weights[name] * factors[name] * loss if name in factors else weights[name] * loss
        if len(self._active) < len(self.weights):
            # Layers of what is switched off for now get the gradient 0 rather than none: DistributedDataParallel waits for every parameter.
            parameters = [*self.adapters.parameters(), *self.terms.parameters()]
            first = next(iter(weighted))
            weighted[first] = weighted[first] + 0 * sum(parameter.sum() for parameter in parameters if parameter.requires_grad)
        return weighted

    def _adapted(self, calls: Sequence[Call], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            stage: self.adapters[module_key(stage)](features, size=self._adapted_size(stage, teacher[stage]))
            for stage, features in student.items()
            if _adapts(calls, stage)
        }

    def _adapted_size(self, stage: str, teacher: Tensor) -> tuple[int, int] | None:
        """Size of the teacher's map, or to which all the terms average a larger one anyway."""
        if teacher.dim() != 4:
            return None
        height, width = teacher.shape[2:]
        size = self._map_sizes[stage]
        return (height, width) if size is None or size[0] > height or size[1] > width else size

    def _build(self, modules: Mapping[str, nn.Module], input_size: tuple[int, ...]) -> None:
        """Makes the layers that the losses need, before an optimiser can miss them."""
        adapted = [stage for stage in self._paths if _adapts(self._calls, stage)]
        student: dict[str, torch.Size] = {}
        teacher: dict[str, torch.Size] = {}
        if self._teacher_taps is not None and (adapted or any(call.builds for call in self._calls)):
            student_shapes, teacher_shapes = self._student_taps.shapes(input_size), self._teacher_taps.shapes(input_size)
            student = {stage: student_shapes[path] for stage, (path, _) in self._paths.items()}
            teacher = {stage: teacher_shapes[path] for stage, (_, path) in self._paths.items()}
        self._map_sizes: dict[str, tuple[int, int] | None] = {}
        for stage in adapted:
            sizes = {call.term.map_size for call in self._calls if call.adapted and stage in call.stages}
            self._map_sizes[stage] = sizes.pop() if len(sizes) == 1 else None
            self.adapters[module_key(stage)] = _adapter(stage, student[stage], teacher[stage])
        matched = {stage: teacher[stage] if stage in adapted else shape for stage, shape in student.items()}
        for call in self._calls:
            if call.key in self.terms:
                continue
            module: Any = modules[call.name]
            if call.builds:
                shapes = matched if call.adapted else student
                options = {"num_classes": self._heads[0].num_classes} if call.term.needs_outputs else {}
                if call.term.level == "stage":
                    module = copy.deepcopy(module)
                    module.build(shapes[call.stages[0]], teacher[call.stages[0]], **options)
                else:
                    seen, asked = ({stage: sizes[stage] for stage in call.stages} for sizes in (shapes, teacher))
                    module.build(seen, asked, **options)
            self.terms[call.key] = module

    def _check_parts(self, modules: Mapping[str, nn.Module]) -> None:
        for name in dict.fromkeys(call.name for call in self._calls):
            module = modules[name]
            if isinstance(module, ChecksParts):
                calls = [call for call in self._calls if call.name == name]
                idle = {loss for call in calls for loss in call.losses.values() if self._schedules[loss].always_zero}
                try:
                    module.check_parts([part for part in Term.of(module).parts if any(call.losses[part] not in idle for call in calls)])
                except ValueError as error:
                    raise UserError(f"{error}, in the term '{name}'") from error

    def _fill_weights(self) -> None:
        # A tensor, so that neither a compiled nor a captured step is made anew when a ramp moves on.
        self._weights.copy_(torch.tensor(list(self.weights.values())), non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        self._weights = self._weights.float()  # model.half() is not meant for them
        self._fill_weights()
        return self


def _adapts(calls: Sequence[Call], stage: str) -> bool:
    return any(call.adapted and stage in call.stages for call in calls)


def _adapter(stage: str, student: torch.Size, teacher: torch.Size) -> ChannelAdapter:
    if len(student) != len(teacher):
        raise UserError(f"Expected two maps or two vectors to match at the stage '{stage}' (got {list(student)} and {list(teacher)})")
    return ChannelAdapter(student[1], teacher[1])


def _expect_index(index: Tensor | None) -> Tensor:
    if index is None:
        raise ValueError("Expected 'index', the positions of the images in the data set, for a term that keeps a memory of them (got None)")
    return index
