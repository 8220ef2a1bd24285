"""What a command line shows without a traceback, and how it is worded."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend: says what was expected, what was got and what to do."""


def did_you_mean(names: Iterable[str]) -> str:
    """Words names that come close as a question, with a space before it; empty where there is none."""
    listed = list(dict.fromkeys(names))
    return f" Did you mean {' or '.join(listed)}?" if listed else ""


def unknown_name(what: str, name: str, candidates: Iterable[str]) -> str:
    """Words the message for a name that is not there: what was expected, what was got, and what comes close.

    Examples:
        >>> unknown_name("a key of 'weights'", "grahp", ["graph", "kd"])
        "Expected a key of 'weights' to be one of graph, kd (got 'grahp'). Did you mean 'graph'?"
    """
    candidates = list(candidates)
    near = did_you_mean(map(repr, get_close_matches(name, candidates)))
    return f"Expected {what} to be one of {', '.join(candidates) or '(there are none)'} (got '{name}').{near}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether the system, or torch on its behalf, refused memory."""
    refused = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and refused)
