"""Writing files such that a crash cannot spoil them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from gkd.errors import UserError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part, whenever the process is killed.

    The content goes to a temporary file of its own in the same folder, is flushed to the disk and takes the place of `path` in one step.
    Several processes may write one path at a time: the last one wins.

    Args:
        path: File to write; its folder is made where it is absent.
        write: Called with the open binary file.

    Raises:
        UserError: If the system refuses, for want of room or permission; the old content is still there.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp keeps others out, an ordinary file does not
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise unwritable(path, refusal) from error
    # The rename itself is on the disk only once the folder is; systems that cannot sync a folder raise.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: numbers that are not finite become null.

    Examples:
        >>> to_json({"loss": float("nan"), "top1": [1.5]})
        '{"loss": null, "top1": [1.5]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell of a file that cannot be written."""
    return UserError(
        f"Expected to be able to write {path} (got: {error.strerror or error}). What was complete before is kept. "
        "Make room or allow writing there, then go on with --resume."
    )


def remove_temporary(folder: Path) -> None:
    """Removes what killed processes left of files that `write_atomic` was writing into a folder; nobody may be writing there now."""
    for path in folder.glob(".*.????????.tmp"):
        path.unlink(missing_ok=True)


def _refusal(error: BaseException | None) -> OSError | None:
    """The system's error behind an error: torch.save hides it behind a RuntimeError."""
    while isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    """The mask of the process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
