"""Documents that somebody judged: read, checked, each text once, and parted into training and held-out.

A line is {"text": .., "label": 0 or 1}, or {"text": .., "score": number} where a setting says from which score
on a document is good. Texts that differ in white space or in the form of their letters alone are one text:
it is judged once, and stands on one side of the split.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foundation.dataio import records
from foundation.errors import InputError

MOST_CONTRADICTIONS = 0.05  # of the different texts


class Judged(NamedTuple):
    """One judged document; `place` is its file and line, `key` names its text under a seed."""

    text: str
    good: bool
    place: str
    key: bytes


class Labels(NamedTuple):
    """The labels of all texts with one opinion, by key, and what was met on the way."""

    good: dict[bytes, bool]
    read: int
    repeated: int  # documents beyond the first of a text
    contradictory: int  # texts judged both good and bad; they are left out


def judged(paths: Sequence[Path], good_from: float | None, seed: int) -> Iterator[Judged]:
    """All documents in order. Raises InputError naming file and line."""
    for path in paths:
        for number, record in records(path):
            place = f"{path}, line {number}"
            text = record.get("text")
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{place}: no text under 'text'; the keys are {sorted(record)[:8]}")
            yield Judged(text, _is_good(record, good_from, place), place, _key(text, seed))


def labels_of(paths: Sequence[Path], good_from: float | None, seed: int) -> Labels:
    """The label of each text; some 150 bytes of memory for a text.

    Raises InputError on what `judged` refuses, and where more than MOST_CONTRADICTIONS of the texts are judged
    both ways: such labels are noise.
    """
    found: dict[bytes, bool | None] = {}
    read = 0
    example = ""
    for document in judged(paths, good_from, seed):
        read += 1
        before = found.setdefault(document.key, document.good)
        if before is not None and before != document.good:
            found[document.key] = None
            example = example or f"{document.place}: {document.text!r:.80}"
    both = sum(good is None for good in found.values())
    if both > MOST_CONTRADICTIONS * len(found):
        raise InputError(
            f"{both} of {len(found)} texts are judged both good and bad (at most {MOST_CONTRADICTIONS:.0%} may "
            f"be); such a one is {example}",
            hint="decide on one label a text; with scores, write each text once with its mean",
        )
    good = {key: label for key, label in found.items() if label is not None}
    return Labels(good, read, read - len(found), both)


def side(
    paths: Sequence[Path], good_from: float | None, seed: int, labels: Labels, held_share: float, *, held: bool
) -> Iterator[Judged]:
    """Each text of one side of the split once, in the order of the files."""
    left = set(labels.good)
    for document in judged(paths, good_from, seed):
        if document.key in left and is_held(document.key, held_share) == held:
            left.remove(document.key)
            yield document


def is_held(key: bytes, held_share: float) -> bool:
    """True for the texts that are held out: it depends on text and seed, never on the order of the files."""
    return int.from_bytes(key[:8], "big") / 2**64 < held_share


def _key(text: str, seed: int) -> bytes:
    same = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(f"{seed}\0{same}".encode(), digest_size=16).digest()


def _is_good(record: dict[str, Any], good_from: float | None, place: str) -> bool:
    if good_from is None:
        label = record.get("label")
        if type(label) is not int or label not in (0, 1):
            seen = (
                f"label {label!r:.40}" if "label" in record else f"no label; the keys are {sorted(record)[:8]}"
            )
            raise InputError(
                f"{place}: {seen}; 0 (bad) or 1 (good) is needed",
                hint="where documents have a score, say with good_from from which one on they are good",
            )
        return label == 1
    score = record.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
        seen = f"score {score!r:.40}" if "score" in record else f"no score; the keys are {sorted(record)[:8]}"
        raise InputError(
            f"{place}: {seen}; a finite number is needed",
            hint='leave good_from out where documents have {"label": 0 or 1}',
        )
    return score >= good_from


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # an integer of hundreds of digits
        return False
