"""Short names of folders for people."""

from collections.abc import Sequence
from pathlib import Path


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Names different paths by their last parts, as many as it takes to tell them apart."""
    parts = {path: Path(path).parts for path in paths}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {path: "/".join(parts[path][-depth:]) for path in parts}
        if len(set(names.values())) == len(names):
            break
    return names
