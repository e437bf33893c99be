"""From a user's files to training text: normalised, without exact repeats, and with a held-out part.

The narrow version of what a corpus needs; near-duplicates and quality filters are a matter of their own.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from foundation.dataio import documents, write_jsonl
from foundation.errors import InputError
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many


class Settings(StageSettings):
    """Which field is read, what is dropped, and how much is held out."""

    field: str = Field("text", min_length=1, description="key of the text in JSON lines")
    min_characters: int = Field(1, ge=1, description="shorter documents are dropped")
    max_documents: int = Field(0, ge=0, description="documents that are used, from the start; 0 = all")
    held_share: float = Field(
        0.02, ge=0, lt=1, description="share of documents held out, by a hash of their text"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/text.jsonl (training) and out/held.jsonl from `corpus`."""
    counts = {"read": 0, "short": 0, "repeated": 0}
    kept: list[str] = []
    held: list[str] = []
    for text in _clean(documents(many(inputs, "corpus"), settings.field), settings, counts):
        (held if _draw(text, settings.seed) < settings.held_share else kept).append(text)
    if not kept:
        raise InputError(
            f"no document is left to train on ({counts})", hint="lower min_characters or held_share"
        )
    write_jsonl(out / "text.jsonl", ({"text": text} for text in kept))
    write_jsonl(out / "held.jsonl", ({"text": text} for text in held))
    report.note(f"{counts['read']} documents: {counts['short']} too short, {counts['repeated']} repeated")
    return {**counts, "kept": len(kept), "held": len(held)}


def _clean(texts: Iterable[str], settings: Settings, counts: dict[str, int]) -> Iterator[str]:
    """NFC, no trailing white space, no exact repeats; stops at max_documents."""
    seen: set[bytes] = set()
    for text in texts:
        counts["read"] += 1
        clean = "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).strip().splitlines())
        digest = hashlib.blake2b(clean.encode(), digest_size=16).digest()
        if len(clean) < settings.min_characters:
            counts["short"] += 1
        elif digest in seen:
            counts["repeated"] += 1
        else:
            seen.add(digest)
            yield clean
            if len(seen) == settings.max_documents:
                return


def _draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed, never on the order of the files."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
