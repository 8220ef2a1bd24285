"""Where configuration files lie and how they are read: those of the user, and the recipes that come with gkd."""

from __future__ import annotations

import difflib
from pathlib import Path

from gkd.errors import UserError, did_you_mean

# The recipes are called gin/... everywhere: in a checkout they lie there, in an installation inside the package.
_PACKAGED = Path(__file__).with_name("recipes")
RECIPES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).resolve().parents[1] / "gin"


def find_source(name: str, asked_by: str, beside: Path | None = None) -> Path:
    """Path of a configuration file, looked for beside the file that includes it, in the current folder and among the recipes.

    Args:
        name: As it was written; ``~`` is the home folder, ``gin/...`` may be a recipe of gkd.
        asked_by: Who wants it, for the message.
        beside: The file that includes it.

    Raises:
        UserError: If there is no such file.
    """
    path = Path(name).expanduser()
    candidates = [] if beside is None else [beside.parent / path]
    candidates.append(Path.cwd() / path)
    if path.parts[:1] == ("gin",):
        candidates.append(RECIPES.joinpath(*path.parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    folder = candidates[-1].parent
    near = difflib.get_close_matches(path.name, [file.name for file in folder.glob("*.gin")] if folder.is_dir() else [])
    places = dict.fromkeys(str(place.parent) for place in candidates)
    meant = did_you_mean(str(path.parent / file) for file in near)
    raise UserError(f"Expected the configuration file {name}, asked for by {asked_by} (got no such file in {' or '.join(places)}).{meant}")


def read_source(path: Path) -> str:
    """Text of a configuration file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: If it is in another encoding.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"Expected {path} in UTF-8 (got the byte {content[error.start]:#04x} in line {line}). Save the file in that encoding."
        ) from error
    if "\0" in text:
        raise UserError(f"Expected a text file at {path} (got one with null characters). Save it as text in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
