"""List of the public weights that this project reads: name, use, license; `python -m checkpoints_tools artefacts` prints it.

The list is artefacts.tsv. Names like ORG/REPO and ORG/REPO/FILE are on the Hugging Face hub and can be given wherever a path
can; the others are addresses to download from.
"""

from pathlib import Path
from typing import NamedTuple

GATED = "gated: accept the license on its page and log in (`hf auth login`) before it can be fetched"


class Artefact(NamedTuple):
    """One row of the list."""

    name: str  # on the hub, or a URL
    file: str  # the files that are read; for a URL, the best name for the download; a folder may have shards or .bin instead
    what: str
    fills: str  # config field, command or function that takes it
    license: str  # as its publisher states it, with '(gated)' where the hub asks for consent; 'see its page' where it is unsure


_LINES = Path(__file__).with_suffix(".tsv").read_text().splitlines()
_HEADER, *ARTEFACTS = [Artefact(*line.split("\t")) for line in _LINES if not line.startswith("#")]


def table() -> str:
    """Returns the list as text, one artefact a line, and the meaning of 'gated'."""
    rows = [_HEADER, *ARTEFACTS]
    widths = [min(max(map(len, column)), 76) for column in zip(*rows)]  # long URLs push the rest of their line aside
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", GATED])
