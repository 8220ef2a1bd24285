"""The memory of a sweep: what became of its cells, and what a sampler proposed, in an Optuna study that processes and machines share."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gkd.errors import UserError
from gkd.sweep.claims import PATIENCE, Claims
from gkd.sweep.storage import connect, first_line, hide_password, patiently

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

Sampler = Literal["grid", "random", "tpe"]

ATTEMPTS = 6  # to open a database that other processes open and fill at the same time


class Outcome(NamedTuple):
    """What became of a cell.

    Attributes:
        results: What results.json held; None where the cell failed.
        error: Why it failed.
        number: Of the trial in the study.
    """

    results: dict[str, Any] | None
    error: str | None
    number: int


class Study:
    """An Optuna study, and the claims on the cells that are being worked on.

    Every finished cell is one trial, complete or failed, so that Optuna's own tools read the study. A database that is away, as while it
    restarts, is waited for.

    Args:
        url: A database that SQLAlchemy knows: ``sqlite:///runs/sweep.db``, ``postgresql://..``.
        name: The study in it; made where it is not there.
        patience: Seconds after which a claim that is not renewed is void.

    Attributes:
        claims: Who works on what.

    Raises:
        UserError: If optuna or the database's driver is not installed, or the database cannot be reached.
    """

    def __init__(self, url: str, name: str, patience: float = PATIENCE) -> None:
        try:
            import optuna
            import sqlalchemy
        except ImportError as error:
            raise UserError(f"Expected optuna for a sweep (got: {error}). Install it: pip install 'gkd[sweep]'.") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url, self.name = url, name
        address, options = connect(url)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.claims = Claims(sqlalchemy.create_engine(address, **options), name, patience)
                storage = optuna.storages.RDBStorage(address, engine_kwargs=options)
                self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
                return
            except Exception as error:  # each driver has exceptions of its own
                # Processes that begin at once all want to make the tables; whoever comes second fails, and finds them the next time.
                is_race = isinstance(error, (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError, AssertionError))
                if attempt == ATTEMPTS or not is_race:
                    raise UserError(
                        f"Expected a storage that can be reached (got {hide_password(url)}: {first_line(error)}). Check --storage: "
                        "sqlite:///folder/sweep.db for a file in a folder that exists, or the URL of a running database."
                    ) from error
                time.sleep(random.uniform(0.05, 0.15) * attempt)

    # ---------------------------------------------------------------- results

    @patiently
    def outcomes(self, ignored: Collection[int] = ()) -> dict[str, Outcome]:
        """The finished cells by key; of a cell with several trials the last.

        Args:
            ignored: Numbers of trials that do not count.
        """
        from optuna.trial import TrialState

        outcomes = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            key = trial.user_attrs.get("key")
            if key is not None and trial.number not in ignored:
                outcomes[key] = Outcome(trial.user_attrs.get("results"), trial.user_attrs.get("error"), trial.number)
        return outcomes

    @patiently
    def record(
        self, key: str, about: Mapping[str, Any], values: Mapping[str, str], axes: Mapping[str, Sequence[str]], outcome: Outcome, score: str
    ) -> bool:
        """Keeps what became of a claimed cell and gives the claim back.

        Args:
            key: The cell.
            about: What else the trial says of it.
            values: Its values on the axes.
            axes: All values of the axes.
            outcome: Its results, or why there are none.
            score: Name in ``results['final']`` of the trial's value.

        Returns:
            False if the claim was lost to another process in the meantime: that one's results count.
        """
        if not self.claims.touch(key):
            return False
        import optuna

        value = None if outcome.results is None else float((outcome.results.get("final") or {})[score])
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        attributes = {**about, "key": key, **({"error": outcome.error} if value is None else {"results": outcome.results})}
        try:
            self._study.add_trial(_trial(state, value, values, axes, attributes))
        except ValueError:  # the file's axes have other values now, which Optuna does not allow: keep them in the description alone
            self._study.add_trial(_trial(state, value, {}, {}, attributes))
        self.claims.release(key)
        return True

    # ---------------------------------------------------------------- sampling

    @patiently
    def points(self) -> list[dict[str, str]]:
        """The points that a sampler has proposed so far: the value on every axis."""
        attributes = self._study.user_attrs
        numbers = sorted(int(name.removeprefix("point ")) for name in attributes if name.startswith("point "))
        return [attributes[f"point {number}"] for number in numbers]

    @patiently
    def propose(
        self, axes: Mapping[str, Sequence[str]], sampler: Sampler, limit: int, scores: Mapping[tuple[str, ...], float], seed: int = 0
    ) -> bool:
        """Adds a point, chosen by the scores of the others; returns whether there was room and no other process was proposing one.

        Args:
            axes: All values of the axes.
            sampler: ``'random'`` or ``'tpe'``.
            limit: Number of points in all.
            scores: Of the points that are finished, by their values in the order of the axes.
            seed: Of the sampler.
        """
        with self._lock("points") as locked:
            points = self.points()
            if not locked or len(points) >= limit:
                return False
            import optuna

            samplers = optuna.samplers
            chosen = samplers.RandomSampler(seed + len(points)) if sampler == "random" else samplers.TPESampler(seed=seed + len(points))
            memory = optuna.create_study(direction="maximize", sampler=chosen)  # a copy of the study: asking leaves nothing half done
            for point in points:
                score = scores.get(tuple(point.values()))
                if score is not None:
                    memory.add_trial(_trial(optuna.trial.TrialState.COMPLETE, score, point, axes, {}))
            asked = memory.ask({axis: optuna.distributions.CategoricalDistribution(list(values)) for axis, values in axes.items()})
            self._study.set_user_attr(f"point {len(points)}", {axis: asked.params[axis] for axis in axes})
            return True

    @contextmanager
    def _lock(self, key: str) -> Iterator[bool]:
        locked = self.claims.claim(key)
        try:
            yield locked
        finally:
            if locked:
                self.claims.release(key)


def _trial(
    state: optuna.trial.TrialState,
    value: float | None,
    values: Mapping[str, str],
    axes: Mapping[str, Sequence[str]],
    attributes: Mapping[str, Any],
) -> optuna.trial.FrozenTrial:
    import optuna

    kinds: dict[str, optuna.distributions.BaseDistribution] = {
        axis: optuna.distributions.CategoricalDistribution(list(axes[axis])) for axis in values
    }
    return optuna.trial.create_trial(state=state, value=value, params=dict(values), distributions=kinds, user_attrs=dict(attributes))
