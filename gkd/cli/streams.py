"""Standard streams that outlive their readers: a training goes on where ``| head -1`` or a closed terminal has taken its output away."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


class _Unbreakable(io.FileIO):
    """A file whose reader may go: what is written then is lost, and nothing else."""

    def write(self, data: Any) -> int:
        """Writes, or drops what nobody reads."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Puts such streams in the place of standard output and error, where these are the process's own."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: TextIO = getattr(sys, name)
        try:
            is_own = stream is not None and stream.fileno() == descriptor
        except (OSError, ValueError, AttributeError):  # replaced by something that is no file, such as a test's
            is_own = False
        if is_own:
            stream.flush()
            file = io.BufferedWriter(_Unbreakable(descriptor, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=name == "stderr" or stream.isatty()))
