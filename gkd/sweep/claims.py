"""Claims on cells: who works on what, in a table of a database that several processes and machines share."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Any

from gkd.sweep.storage import patiently

RENEWAL = 2.0  # seconds between two renewals of a claim
GONE = 6.0  # seconds without renewal after which a claim is void whose process no longer runs on this machine
PATIENCE = 60.0  # the same for a process that cannot be looked at, on another machine


class Claims:
    """Claims on cells that are held while their owner works on them.

    The primary key of the table ``gkd_claims`` lets one process through and no second one. Optuna reads and then writes the state of a
    waiting trial, which on SQLite two processes can do at once. Every renewal raises a count. Whoever sees it stand still for long enough,
    by a clock of its own, may take the claim over.

    Args:
        engine: Of SQLAlchemy.
        study: Name of the study that the cells belong to.
        patience: Seconds after which a claim that is not renewed is void.
    """

    def __init__(self, engine: Any, study: str, patience: float = PATIENCE) -> None:
        import sqlalchemy

        self.study, self.patience = study, patience
        self.owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._engine = engine
        self._renewed: dict[str, float] = {}  # claims held here, and when they were renewed
        self._observed: dict[str, tuple[str, int, float]] = {}  # claims of others: owner, count, since when
        self.table = sqlalchemy.Table(
            "gkd_claims",
            sqlalchemy.MetaData(),
            sqlalchemy.Column("study", sqlalchemy.String(255), primary_key=True),
            sqlalchemy.Column("cell", sqlalchemy.String(255), primary_key=True),
            sqlalchemy.Column("owner", sqlalchemy.String(255), nullable=False),
            sqlalchemy.Column("beats", sqlalchemy.Integer, nullable=False),
        )
        self.table.metadata.create_all(engine)

    @patiently
    def claim(self, key: str) -> bool:
        """Takes a cell, if nobody has it or its owner has not renewed the claim for long enough."""
        import sqlalchemy

        try:
            with self._engine.begin() as connection:
                connection.execute(self.table.insert().values(study=self.study, cell=key, owner=self.owner, beats=0))
        except sqlalchemy.exc.IntegrityError:
            if not self._is_mine(key) and not self._take_over(key):
                return False
        self._renewed[key] = time.monotonic()
        self._observed.pop(key, None)
        return True

    def renew(self) -> list[str]:
        """Renews every claim for which it is time; returns those that were lost."""
        due = [key for key, last in self._renewed.items() if time.monotonic() - last >= RENEWAL]
        return [key for key in due if not self.touch(key)]

    @patiently
    def touch(self, key: str) -> bool:
        """Renews a claim; returns whether it is still held."""
        with self._engine.begin() as connection:
            changed = connection.execute(self.table.update().where(self._mine(key)).values(beats=self.table.c.beats + 1)).rowcount
        if changed:
            self._renewed[key] = time.monotonic()
        else:
            self._renewed.pop(key, None)
        return bool(changed)

    @patiently
    def release(self, key: str) -> None:
        """Gives a claim back."""
        self._renewed.pop(key, None)
        with self._engine.begin() as connection:
            connection.execute(self.table.delete().where(self._mine(key)))

    def _mine(self, key: str) -> Any:
        columns = self.table.c
        return (columns.study == self.study) & (columns.cell == key) & (columns.owner == self.owner)

    def _is_mine(self, key: str) -> bool:
        """Whether this process has the claim: an insertion may have succeeded although the connection was lost before the answer came."""
        with self._engine.begin() as connection:
            return key not in self._renewed and connection.execute(self.table.select().where(self._mine(key))).first() is not None

    def _take_over(self, key: str) -> bool:
        """Takes a claim that has stood still. The count in the condition lets one of several through."""
        columns, now = self.table.c, time.monotonic()
        here = (columns.study == self.study) & (columns.cell == key)
        with self._engine.begin() as connection:
            row = connection.execute(self.table.select().where(here)).first()
        if row is None:  # given back just now
            return False
        owner, beats, since = self._observed.get(key, (None, None, now))
        if (owner, beats) != (row.owner, row.beats):
            self._observed[key] = (row.owner, row.beats, now)
            return False
        if now - since < (min(GONE, self.patience) if _is_gone(row.owner) else self.patience):
            return False
        with self._engine.begin() as connection:
            still = here & (columns.owner == row.owner) & (columns.beats == row.beats)
            return bool(connection.execute(self.table.update().where(still).values(owner=self.owner, beats=0)).rowcount)


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
