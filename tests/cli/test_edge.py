from __future__ import annotations

import errno

import pytest

from gkd.cli.edge import explain
from gkd.engine import Interrupted, NonFiniteLossError
from gkd.errors import UserError


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("Expected a (got b)"), 2, "Expected a (got b)"),
        (ValueError("Expected k <= 3 (got 4)"), 2, "Expected k <= 3 (got 4) (--debug shows where)"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            2,
            "write runs (got: Permission denied). Check its",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), 2, "--resume"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 10), 2, "Choose a shorter name"),
        (OSError("something else"), 2, "something else"),
        (raised_from(RuntimeError("unexpected pos 3"), OSError(errno.ENOSPC, "No space left on device")), 2, "No space left"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), 2, "pip install 'gkd[timm]'"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"), 2, "pip install 'gkd[export]'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, "enough memory"),
        (MemoryError(), 2, "enough memory"),
        (NonFiniteLossError("Expected finite losses"), 1, "Expected finite losses"),
        (Interrupted(15, "saved"), 143, "saved"),
    ],
)
def test_what_a_user_can_mend_is_one_message(error, code, message):
    got_code, got_message = explain(error)
    assert got_code == code
    assert message in got_message


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        TypeError("b"),
        AttributeError("c"),
        RuntimeError("shapes"),
        ModuleNotFoundError("no gkd.x", name="gkd.x"),
    ],
)
def test_a_defect_keeps_its_traceback(error):
    assert explain(error) == (1, None)
