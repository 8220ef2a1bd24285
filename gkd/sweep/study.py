"""The memory of a sweep: a database that several processes and machines share without doing a cell twice."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

Sampler = Literal["grid", "random", "tpe"]

BEAT = 2.0  # seconds between two signs of life
GONE = 6.0  # seconds without one after which a claim is void whose process no longer runs on this machine
PATIENCE = 60.0  # the same for a process that cannot be looked at, on another machine


class Record(NamedTuple):
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
    """An Optuna study, and claims on cells that are held while somebody works on them.

    Every finished cell is one trial, complete or failed, so that Optuna's own tools read the study. What is being worked on is not in the
    study but in a table beside it, ``gkd_claims``, whose primary key lets one process through and no second one: Optuna reads and then
    writes the state of a waiting trial, which on SQLite two processes can do at once. A claim counts its holder's signs of life. Whoever
    sees it stand still for long enough, by his own clock, may take it over.

    Args:
        url: A database that SQLAlchemy knows: ``sqlite:///runs/sweep.db``, ``postgresql://..``.
        name: The study in it; made where it is not there.
        patience: Seconds after which a claim without a sign of life is void.

    Raises:
        UserError: If optuna is not installed or the database cannot be reached.
    """

    def __init__(self, url: str, name: str, patience: float = PATIENCE) -> None:
        try:
            import optuna
            import sqlalchemy
        except ImportError as error:
            raise UserError(f"Expected optuna for a sweep (got: {error}). Install it: pip install 'gkd[sweep]'.") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url, self.name, self.patience = url, name, patience
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._held: dict[str, float] = {}  # when the last sign of life was given
        self._seen: dict[str, tuple[str, int, float]] = {}  # claims of others: owner, count, since when
        self._claims = sqlalchemy.Table(
            "gkd_claims",
            sqlalchemy.MetaData(),
            sqlalchemy.Column("study", sqlalchemy.String(255), primary_key=True),
            sqlalchemy.Column("cell", sqlalchemy.String(255), primary_key=True),
            sqlalchemy.Column("owner", sqlalchemy.String(255), nullable=False),
            sqlalchemy.Column("beats", sqlalchemy.Integer, nullable=False),
        )
        # Two processes that begin at once may both want to make the tables; the second finds them the next time.
        for attempt in range(5):
            try:
                options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
                self._engine = sqlalchemy.create_engine(url, **options)
                self._claims.metadata.create_all(self._engine)
                storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
                self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
                return
            except Exception as error:  # a driver that is missing, a wrong password, no such folder: each has exceptions of its own
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if attempt == 4 or not ("exist" in reason or "locked" in reason or "UNIQUE" in reason):
                    raise UserError(
                        f"Expected a storage that can be reached (got {_hide_password(url)}: {reason}). Check --storage: "
                        "sqlite:///folder/sweep.db for a file in a folder that exists, or the URL of a running database with its driver."
                    ) from error
                time.sleep(0.2 * (attempt + 1))

    # ---------------------------------------------------------------- results

    def records(self, ignored: Collection[int] = ()) -> dict[str, Record]:
        """The finished cells by key; of a cell with several trials the last.

        Args:
            ignored: Numbers of trials that do not count.
        """
        from optuna.trial import TrialState

        found = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            key = trial.user_attrs.get("key")
            if key is not None and trial.number not in ignored:
                found[key] = Record(trial.user_attrs.get("results"), trial.user_attrs.get("error"), trial.number)
        return found

    def record(
        self, key: str, about: Mapping[str, Any], values: Mapping[str, str], axes: Mapping[str, Sequence[str]], outcome: Record, score: str
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
        if not self._touch(key):
            return False
        import optuna

        value = None if outcome.results is None else float((outcome.results.get("final") or {})[score])
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        told = {**about, "key": key, **({"error": outcome.error} if value is None else {"results": outcome.results})}
        try:
            self._study.add_trial(_trial(state, value, values, axes, told))
        except ValueError:  # the file's axes have other values now, which Optuna does not allow: keep them in the description alone
            self._study.add_trial(_trial(state, value, {}, {}, told))
        self.release(key)
        return True

    # ---------------------------------------------------------------- claims

    def claim(self, key: str) -> bool:
        """Takes a cell, if nobody has it or its holder has given no sign of life for long enough."""
        import sqlalchemy

        try:
            with self._engine.begin() as connection:
                connection.execute(self._claims.insert().values(study=self.name, cell=key, owner=self._owner, beats=0))
        except sqlalchemy.exc.IntegrityError:
            if not self._take_over(key):
                return False
        self._held[key] = time.monotonic()
        self._seen.pop(key, None)
        return True

    def beat(self) -> list[str]:
        """Gives a sign of life for every claim, where one is due; returns those that were lost."""
        due = [key for key, last in self._held.items() if time.monotonic() - last >= BEAT]
        return [key for key in due if not self._touch(key)]

    def release(self, key: str) -> None:
        """Gives a claim back."""
        self._held.pop(key, None)
        with self._engine.begin() as connection:
            connection.execute(self._claims.delete().where(self._mine(key)))

    def _mine(self, key: str) -> Any:
        columns = self._claims.c
        return (columns.study == self.name) & (columns.cell == key) & (columns.owner == self._owner)

    def _touch(self, key: str) -> bool:
        with self._engine.begin() as connection:
            changed = connection.execute(self._claims.update().where(self._mine(key)).values(beats=self._claims.c.beats + 1)).rowcount
        if changed:
            self._held[key] = time.monotonic()
        else:
            self._held.pop(key, None)
        return bool(changed)

    def _take_over(self, key: str) -> bool:
        """Takes a claim that has stood still. The count in the condition lets one of several through."""
        columns, now = self._claims.c, time.monotonic()
        here = (columns.study == self.name) & (columns.cell == key)
        with self._engine.begin() as connection:
            row = connection.execute(self._claims.select().where(here)).first()
        if row is None:  # given back just now
            return False
        owner, beats, since = self._seen.get(key, (None, None, now))
        if (owner, beats) != (row.owner, row.beats):
            self._seen[key] = (row.owner, row.beats, now)
            return False
        if now - since < (min(GONE, self.patience) if _is_gone(row.owner) else self.patience):
            return False
        with self._engine.begin() as connection:
            still = here & (columns.owner == row.owner) & (columns.beats == row.beats)
            return bool(connection.execute(self._claims.update().where(still).values(owner=self._owner, beats=0)).rowcount)

    # ---------------------------------------------------------------- sampling

    def points(self) -> list[dict[str, str]]:
        """The points that a sampler has proposed so far: the value on every axis."""
        attributes = self._study.user_attrs
        numbers = sorted(int(name.removeprefix("point ")) for name in attributes if name.startswith("point "))
        return [attributes[f"point {number}"] for number in numbers]

    def propose(
        self, axes: Mapping[str, Sequence[str]], sampler: Sampler, limit: int, scores: Mapping[tuple[str, ...], float], seed: int = 0
    ) -> bool:
        """Adds a point, chosen by what is known of the others; returns whether there was room and nobody else was about it.

        Args:
            axes: All values of the axes.
            sampler: ``'random'`` or ``'tpe'``.
            limit: Number of points in all.
            scores: Of the points that are finished, by their values in the order of the axes.
            seed: Of the sampler.
        """
        with self._lock("points") as locked:
            known = self.points()
            if not locked or len(known) >= limit:
                return False
            import optuna

            samplers = optuna.samplers
            chosen = samplers.RandomSampler(seed + len(known)) if sampler == "random" else samplers.TPESampler(seed=seed + len(known))
            memory = optuna.create_study(direction="maximize", sampler=chosen)  # a copy of what is known: asking leaves nothing half done
            for point in known:
                score = scores.get(tuple(point.values()))
                if score is not None:
                    memory.add_trial(_trial(optuna.trial.TrialState.COMPLETE, score, point, axes, {}))
            asked = memory.ask({axis: optuna.distributions.CategoricalDistribution(list(values)) for axis, values in axes.items()})
            self._study.set_user_attr(f"point {len(known)}", {axis: asked.params[axis] for axis in axes})
            return True

    @contextmanager
    def _lock(self, key: str) -> Iterator[bool]:
        locked = self.claim(key)
        try:
            yield locked
        finally:
            if locked:
                self.release(key)


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


def _is_gone(owner: str) -> bool:
    """Whether the owner of a claim was a process of this machine that has ended."""
    host, pid, _ = owner.rsplit("/", 2)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _hide_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    scheme, colon, rest = head.partition("://")
    return f"{scheme}{colon}{rest.partition(':')[0]}:***@{tail}" if at and ":" in rest else url
