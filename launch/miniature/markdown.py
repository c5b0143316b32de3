"""Markdown of the miniature paper's pages: wrapped paragraphs, tables, links to headings."""

import textwrap
from collections.abc import Sequence

LINE = 128  # characters


def wrapped(text: str) -> str:
    """Wraps a paragraph or an item of a list."""
    return textwrap.fill(text, LINE, subsequent_indent="  " if text.startswith("* ") else "", break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def link(title: str) -> str:
    """Returns a link to a heading of the same page, by GitHub's rule for anchors."""
    anchor = "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return f"[{title}](#{anchor})"


def listed(words: Sequence[str]) -> str:
    """Joins words as 'a, b and c'."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
