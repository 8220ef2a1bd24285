"""One writer at a time: a lock on a folder, which names its holder and ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from pathlib import Path

from gkd.errors import UserError


class FolderLock:
    """A lock file in a folder. The system gives it up when the process ends, however that happens, so no lock is ever stale.

    A record lock (`fcntl.lockf`) belongs to the process alone: the workers of a data loader, which outlive a killed parent for some
    seconds, do not hold it. The same object may take the lock several times.

    Args:
        path: The lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._depth = 0

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UserError: If another process holds it, or the file cannot be written.
        """
        while self._descriptor is None:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UserError(f"Expected a run folder that can be written to (got {self.path.parent}: {error.strerror})") from error
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file(descriptor, self.path):  # otherwise its last holder has removed it in between
                    self._descriptor = descriptor
            except (BlockingIOError, PermissionError) as error:
                holder = os.read(descriptor, 1000)
                raise UserError(
                    f"Expected a run folder that no other training writes to (got {self.path.parent}, {_describe(holder)}). "
                    "Wait for it, stop it, or choose another --output."
                ) from error
            except OSError:  # a file system without locks: better no protection than no training
                self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        if self._depth == 0:
            about = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(about).encode(), 0)
        self._depth += 1

    def release(self) -> None:
        """Gives it up, and removes the file."""
        self._depth -= 1
        if self._depth == 0 and self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe(holder: bytes) -> str:
    try:
        about = json.loads(holder)
        return f"held by the process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "held by another process"
