"""Reading files of a run that may be missing, half written or damaged."""

import json
from typing import Any

from etils import epath


def listing(folder: epath.Path, suffix: str = "") -> list[epath.Path]:
    """Returns the files of a folder by name, without hidden ones (of writers at work); none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and not path.name.startswith("."))


def read_json(path: epath.Path, problems: list[str]) -> dict[str, Any] | None:
    """Returns the dict in a JSON file; None, and one more message in `problems`, if it cannot be read."""
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__} instead of a dict")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(unreadable(path, error))
        return None
    return record


def size_of(path: epath.Path) -> int:
    """Returns the bytes of a file; 0 if it is gone."""
    try:
        return path.stat().length
    except OSError:
        return 0


def place_of(path: epath.Path) -> str:
    """Returns the end of a path, for messages about files of a run that is named already."""
    return "/".join(path.parts[-3:] if path.name == "metadata" else path.parts[-2:])


def unreadable(path: epath.Path, error: Exception) -> str:
    """Returns a message on a file that cannot be read."""
    return f"{place_of(path)} cannot be read: {type(error).__name__}: {str(error)[:160]}".rstrip(".") + "."
