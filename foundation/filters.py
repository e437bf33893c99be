"""Filters of an answer's text that need nothing but the text: its end, its length, its script.

Each gives the reason for a rejection, or "". The reasons' first words name them in counts and reports.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

Script = Literal["any", "cyrillic", "russian", "latin"]
# What counts as a letter of the script. Russian is stricter than Cyrillic: і, ї, є, ў, қ are foreign to it.
_SCRIPTS = {
    "cyrillic": re.compile("[\u0400-\u052f]"),
    "russian": re.compile("[а-яёА-ЯЁ]"),
    "latin": re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]"),
}


def script_share(text: str, script: Script) -> float:
    """Share of the letters of `text` that belong to `script`; 0 for a text without letters, 1 for "any"."""
    if script == "any":
        return 1.0
    letters = [c for c in unicodedata.normalize("NFC", text) if c.isalpha()]
    return sum(bool(_SCRIPTS[script].match(c)) for c in letters) / len(letters) if letters else 0.0


def text_filter(
    min_characters: int, max_characters: int, script: Script, least_share: float
) -> Callable[[str], str]:
    """text -> reason for its rejection, or "". `max_characters` 0 sets no limit."""

    def reason(text: str) -> str:
        length = len(text.strip())
        if not length:
            return "empty"
        if length < min_characters:
            return f"short: {length} characters"
        if max_characters and length > max_characters:
            return f"long: {length} characters"
        share = script_share(text, script)
        if share < least_share:
            return f"script: {share:.2f} of the letters are {script}"
        return ""

    return reason
