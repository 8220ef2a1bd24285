"""The database of a sweep: how it is reached, and how long a process waits for one that is away."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from gkd.errors import UserError

OUTAGE = 300.0  # seconds for which a database may be away, as while it restarts
LONGEST_PAUSE = 5.0  # seconds between two attempts

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def patiently(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Repeats a call while the database cannot be reached, with growing pauses, for `OUTAGE` seconds in all.

    What is repeated may have been done before the connection was lost, so the call must not mind that.

    Raises:
        UserError: If the database stays away.
    """

    @functools.wraps(call)
    def patient(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        import tenacity

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_outage),
            stop=tenacity.stop_after_delay(OUTAGE),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE),
            reraise=True,
        )
        try:
            return attempts(call, *args, **kwargs)
        except Exception as error:
            if not _is_outage(error):
                raise
            raise UserError(
                f"Expected the database of the sweep to be back within {OUTAGE:.0f} s (got: {first_line(error)}). "
                "What is done is kept; go on with the same command."
            ) from error

    return patient


def connect(url: str) -> tuple[str, dict[str, Any]]:
    """The URL with its driver, and the options of an engine that notices lost connections.

    Raises:
        UserError: If the driver of PostgreSQL is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgresql", "postgres"):
        if importlib.util.find_spec("psycopg") is None:
            raise UserError("Expected the package psycopg for a PostgreSQL database (got none). Install it: pip install 'gkd[postgres]'.")
        url = f"postgresql+psycopg{separator}{rest}"
    if url.startswith("sqlite"):
        return url, {"connect_args": {"timeout": 60}}
    return url, {"pool_pre_ping": True}


def hide_password(url: str) -> str:
    """The URL without the password in it."""
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.partition(':')[0]}:***@{tail}" if at and ":" in user else url


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class where there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_outage(error: BaseException) -> bool:
    """Whether an error says that the database is away or busy, rather than that it was asked for nonsense."""
    import optuna
    import sqlalchemy

    if isinstance(error, optuna.exceptions.StorageInternalError):
        return error.__cause__ is None or _is_outage(error.__cause__)
    return isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError))
