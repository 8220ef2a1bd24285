from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near(name: str, known: Iterable[str], count: int = 5) -> str:
    """Lists the known names most like a misspelled one, or else the first of all, for an error message.

    Examples:
        >>> near("Resnet2O", ["resnet20", "resnet56", "vgg13"])
        'resnet20, resnet56'
        >>> near("?", ["layer1", "layer2"])
        'layer1, layer2'
    """
    by_lower: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(known):
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    matches = get_close_matches(name.lower(), by_lower, n=count) or list(by_lower)[:count]
    return ", ".join(candidate for match in matches for candidate in by_lower[match])
