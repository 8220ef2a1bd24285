"""Which of a network's classes are those of the data, by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gkd.errors import UserError

_log = logging.getLogger(__name__)


def class_positions(classes: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Position of every class of the data among the names of a network's outputs; None if one is missing.

    Examples:
        >>> class_positions(["cat", "dog"], ["__background__", "dog", "cat"])
        [2, 1]
        >>> class_positions(["cat", "cow"], ["dog", "cat"]) is None
        True
    """
    places = {name: place for place, name in enumerate(names)}
    return [places[name] for name in classes] if set(classes) <= set(places) else None


def match_classes(classes: Sequence[str], names: Sequence[str], whose: str) -> list[int] | None:
    """As `class_positions`, and says in the log what follows: scores taken in another order, or none at all.

    Args:
        classes: Names of the data's classes.
        names: Names of the network's.
        whose: Names the network.
    """
    places = class_positions(classes, names)
    if places is None:
        _log.warning("%s: its classes are others, so that only its feature maps can be used; %s", whose, differences(classes, names))
    elif places != sorted(places):
        _log.warning("%s: its classes stand in another order than the data's; its scores are put into theirs", whose)
    return places


def differences(classes: Sequence[str], names: Sequence[str]) -> str:
    """The first names that one has and the other has not.

    Examples:
        >>> differences(["cat", "cow"], ["dog", "cat"])
        "only the data have 'cow', only the network has 'dog'"
    """
    sides = {
        "only the data have": [name for name in classes if name not in names],
        "only the network has": [n for n in names if n not in classes],
    }
    return ", ".join(f"{side} {', '.join(map(repr, lacking[:3]))}" for side, lacking in sides.items() if lacking)


def refuse_classes(classes: Sequence[str], names: Sequence[str] | None, what: str) -> UserError:
    """The error for scores of a network whose classes are not the data's."""
    reason = "got a network of other classes" if names is None else f"got a network of other classes: {differences(classes, names)}"
    return UserError(
        f"Expected a network with the classes of the data for {what} ({reason}). Leave out the terms that compare class scores, or choose "
        "weights of the same classes."
    )
