"""The JSON shape of an answer: exactly the keys that the template names, each of its kind.

An answer is text from outside: whatever it holds, `read` says what is wrong and raises nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from distill.synthesize.template import Key

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
LONGEST = 200_000  # characters


def read(text: str, shape: Mapping[str, Key]) -> tuple[dict[str, str], str]:
    """(keys as text, "") or ({}, what is wrong). One ```json fence around the object is taken off."""
    if len(text) > LONGEST:
        return {}, "too long to be read as JSON"
    clean = text.strip()
    if fenced := _FENCE.match(clean):
        clean = fenced[1]
    try:
        record = json.loads(clean, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {}, "not JSON"
    if not isinstance(record, dict):
        return {}, f"a JSON {type(record).__name__}, not an object"
    if missing := [key for key in shape if key not in record]:
        return {}, f"no key {', '.join(missing)}"
    if unknown := [key for key in record if key not in shape]:
        return {}, f"unknown key {unknown[0][:40]!r}"
    for name, key in shape.items():
        if problem := _wrong(record[name], key):
            return {}, f"{name}: {problem}"
    return {name: str(record[name]) for name in shape}, ""


def _wrong(value: Any, key: Key) -> str:
    if key.kind == "integer":
        if type(value) is not int or not key.least <= value <= key.most:
            return f"not an integer of {key.least}..{key.most}"
        return ""
    if not isinstance(value, str):
        return "not text"
    if _HALF_PAIR.search(value):  # an escape such as \ud800 alone is valid JSON, and no character
        return "half of a surrogate pair"
    return "" if value.strip() or key.empty else "empty"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
