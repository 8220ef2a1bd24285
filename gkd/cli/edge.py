"""Where errors end: what a user can mend becomes one message and an exit code, a defect of the code keeps its traceback."""

from __future__ import annotations

import errno

from gkd.errors import UserError, is_out_of_memory

FAILED, USER_ERROR, SIGNAL = 1, 2, 128

# Packages of an extra by the name that they are imported by; all others come with gkd.
EXTRAS = {
    "matplotlib": "viz",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "optuna": "sweep",
    "pycocotools": "detection",
    "timm": "timm",
}
ADVICE = {
    errno.ENOSPC: "Free some room and go on with --resume",
    errno.EDQUOT: "Free some room and go on with --resume",
    errno.EFBIG: "Files of this size are not allowed here: choose another place",
    errno.EACCES: "Check its permissions, or choose another place",
    errno.EPERM: "Check its permissions, or choose another place",
    errno.EROFS: "It cannot be written to: choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n), or use fewer workers",
}


def explain(error: Exception) -> tuple[int, str | None]:
    """Exit code and message of an error; no message where its traceback is wanted."""
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, ValueError):  # a value may turn out to be wrong only once there are features
        return USER_ERROR, f"{error} (--debug shows where)"
    cause = _refusal(error)
    if cause is not None:
        return USER_ERROR, _describe_refusal(cause)
    if isinstance(error, ModuleNotFoundError) and error.name is not None and error.name.split(".")[0] in EXTRAS:
        package = error.name.split(".")[0]
        return USER_ERROR, f"Expected the package {package} (got: {error}). Install it: pip install 'gkd[{EXTRAS[package]}]'"
    if is_out_of_memory(error):
        message = (str(error).strip() or "the system refused").splitlines()[0]
        return USER_ERROR, f"Expected enough memory (got: {message}). Take smaller batches, images or networks."
    from gkd.engine import Interrupted, NonFiniteLossError  # loads torch, which the errors above do without

    if isinstance(error, Interrupted):
        return SIGNAL + error.signum, str(error)
    return FAILED, str(error) if isinstance(error, NonFiniteLossError) else None


def _refusal(error: BaseException) -> OSError | None:
    """The system's refusal behind an error: torch turns that of a full disk into a RuntimeError."""
    if isinstance(error, OSError):
        return error
    before = error.__cause__ or error.__context__
    return _refusal(before) if isinstance(error, RuntimeError) and before is not None else None


def _describe_refusal(error: OSError) -> str:
    place = error.filename or error.filename2
    reason = error.strerror or str(error)
    where = f"Expected to read or write {place}" if place else "Expected the system to do as asked"
    advice = ADVICE.get(error.errno or 0, "--debug shows where")
    return f"{where} (got: {reason}). {advice}."
