"""Words: the candidates that one tokenizer can learn as one token each, in its own spelling."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adaptation.candidates import Candidate
from adaptation.tokenizer_json import SPACE, TokenizerJson, to_byte_level
from foundation.report import Report

SPLIT = "split by the base's pre-tokenizer"  # why a candidate is dropped


@dataclass(frozen=True)
class Words:
    """Word -> weight, the most wanted first; how many there were to choose from; reason -> pieces dropped."""

    taken: dict[str, int]
    supported: int
    dropped: dict[str, int]


def select(
    candidates: Iterable[Candidate], base: TokenizerJson, script: str | None, most: int | None, report: Report
) -> Words:
    """The `most` wanted candidates that pass every filter; all of them for None.

    A piece is dropped when it does not match `script`, when the base would normalise it or split it before
    its merges, and when the base has it. The limit counts what is left.
    """
    pattern, spell = re.compile(script) if script is not None else None, speller(base)
    kept: dict[str, Candidate] = {}
    dropped: Counter[str] = Counter()
    for candidate in candidates:
        text = candidate.piece.replace(SPACE, " ")
        if pattern and not pattern.fullmatch(text):
            dropped["of another script"] += 1
        elif (word := spell(text)) is None:
            dropped[SPLIT] += 1
        elif word in base.vocab:
            dropped["known to the base"] += 1
        elif word not in kept or kept[word].score < candidate.score:
            kept[word] = candidate
    best = sorted(kept, key=lambda word: (-kept[word].score, word))[:most]
    report.note(
        f"{len(best)} words taken of {len(kept)}; dropped: "
        + ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))
    )
    return Words({word: kept[word].weight for word in best}, len(kept), dict(sorted(dropped.items())))


def speller(base: TokenizerJson) -> Callable[[str], str | None]:
    """text -> the one chunk that the base's merges would see, or None when there is no such chunk."""
    backend = base.backend()
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def bytes_chunk(text: str) -> str | None:
        normal = normalizer.normalize_str(text) if normalizer else text
        chunks = [chunk for chunk, _ in pre_tokenizer.pre_tokenize_str(normal)]
        return chunks[0] if chunks == [to_byte_level(text)] else None

    def characters_chunk(text: str) -> str | None:
        chunk = text.replace(" ", SPACE)
        if SPACE in chunk[1:]:
            return None
        # A letter before it takes the space that some normalizers put before a text.
        normal = normalizer.normalize_str("a" + text) if normalizer else "a" + chunk
        return chunk if normal.replace(" ", SPACE).endswith("a" + chunk) else None

    return bytes_chunk if base.family == "bytes" else characters_chunk


def script_characters(lines: Iterable[str], script: str) -> list[str]:
    """Characters of the lines that match `script` alone, sorted."""
    pattern = re.compile(script)
    return sorted(char for char in set().union(*lines) if pattern.fullmatch(char))
