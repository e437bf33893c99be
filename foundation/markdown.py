"""Markdown of reports: tables, and text from outside that stays text in them."""

from __future__ import annotations

from collections.abc import Sequence

MARKS = "\\|<`[]*"  # what would begin a cell, link, picture, tag or emphasis inside of a word too


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0, marks: str = MARKS) -> str:
    """A Markdown table; the first `left` columns are text, the others stand at the right."""
    rule = ["---" if place < left else "---:" for place in range(len(head))]
    lines = [
        [inline(cell, marks) for cell in head],
        rule,
        *([inline(cell, marks) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def inline(text: str, marks: str = MARKS) -> str:
    """`text` as one line of Markdown in which `marks` are but characters."""
    line = " ".join(text.split())
    for mark in marks:
        line = line.replace(mark, f"\\{mark}")
    return line
