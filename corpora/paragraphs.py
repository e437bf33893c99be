"""A document as paragraphs, and what is left of it without some of them.

A paragraph is a line, a block between empty lines (for hard-wrapped text), or the whole document. Blank pieces
only separate.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from functools import cache
from typing import Literal

Unit = Literal["line", "block", "document"]

_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def split(text: str, unit: Unit) -> list[str]:
    """The pieces of `text` in order, blank ones included."""
    if unit == "line":
        return text.split("\n")
    return _EMPTY_LINES.split(text) if unit == "block" else [text]


def without(pieces: list[str], places: Collection[int], unit: Unit) -> str:
    """The pieces as one text, but for those at `places`; no empty line is left first, last or twice."""
    left: list[str] = []
    for place, piece in enumerate(pieces):
        if place not in places and (piece.strip() or (left and left[-1].strip())):
            left.append(piece)
    while left and not left[-1].strip():
        left.pop()
    return ("\n" if unit == "line" else "\n\n").join(left)


def folded(paragraph: str) -> str:
    """`paragraph` in Unicode's compatibility form and without case: ﬁ is fi, É is é, № is no."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", paragraph).casefold())


@cache
def character_classes() -> bytes:
    """For every code point: 1 where it belongs to a word (letter, digit, mark), 2 where it is an invisible
    control such as a soft hyphen and disappears, 0 where it stands between words.
    """
    classes = defaultdict(
        int, dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Mn", "Mc", "Me"), 1)
    )
    classes["Cf"] = 2
    return bytes(map(classes.__getitem__, map(unicodedata.category, map(chr, range(0x110000)))))
