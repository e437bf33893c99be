"""A corpus without what it says twice: paragraphs that repeat an earlier one, exactly or nearly, are left out.

Two paragraphs are exactly alike when their words are the same, whatever their case, punctuation, white space
and Unicode form; digits count, for in a table or a training plan they are what is said. They are nearly alike
when the Jaccard share of their character runs (shingles) reaches `similarity`. Of what is alike, the first in
the order of the corpus stays.

Four passes (signatures.py, repeats.py), each resumed where it was stopped: read and sign; sort out exact
repeats; link what shares a band of its MinHash and compare it; read again and write what stays. The corpus is
never in memory; on disk the passes take about as much space as the corpus, until the stage is finished.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import Field, model_validator

from corpora.paragraphs import Unit, split, without
from foundation.dataio import documents, write_jsonl
from foundation.errors import MissingError
from foundation.files import writing
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many

if TYPE_CHECKING:
    import numpy as np

    from corpora.repeats import Verdicts

SHOWN_CHARACTERS = 120
LEAST_APART = 0.8  # values of two MinHashes that differ, on average, at `similarity`; below it no bands fit
BETWEEN_LOOKS = 4096  # documents written between two questions whether to stop


class Settings(StageSettings):
    """What a paragraph is, and which of them are too much alike."""

    unit: Unit = Field(
        "line",
        description='what is compared: "line", "block" (what stands between empty lines) or "document"',
    )
    exact_characters: int = Field(
        40,
        ge=1,
        description="shorter paragraphs are never removed: headings, replies; letters and spaces count",
    )
    near_characters: int = Field(
        60, ge=20, description="shorter paragraphs are removed for exact repeats only; letters and spaces count"
    )
    similarity: float = Field(
        0.8, ge=0.5, le=1, description="Jaccard share from which paragraphs are nearly alike; 1 = exact only"
    )
    shingle_characters: int = Field(
        5, ge=2, le=9, description="length of the runs of characters that are compared; 2 or 3 for Chinese"
    )
    permutations: int = Field(
        128, ge=32, le=1024, description="values in a MinHash; more find more of the pairs, and take longer"
    )
    listed: int = Field(10_000, ge=0, description="removed paragraphs told of in removed.jsonl, drawn evenly")

    @model_validator(mode="after")
    def _has_bands(self) -> Settings:
        apart = (1 - self.similarity) * self.permutations
        if self.similarity < 1 and apart < LEAST_APART - 1e-9:
            raise ValueError(
                f"similarity = {self.similarity} can not be told from 1 by permutations = {self.permutations}: "
                f"at most {math.floor(1e4 * (1 - LEAST_APART / self.permutations)) / 1e4} can; "
                "lower it, raise permutations (up to 1024), or set similarity = 1: exact repeats only"
            )
        return self

    @model_validator(mode="after")
    def _lengths_agree(self) -> Settings:
        if self.near_characters < self.exact_characters:
            raise ValueError(
                f"near_characters = {self.near_characters} must be at least "
                f"exact_characters = {self.exact_characters}"
            )
        return self


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/text.jsonl, what stays of `corpus`, and out/removed.jsonl, a sample of what does not."""
    try:
        import datasketch  # noqa: F401 - it is not used here, but would be missed after hours

        from corpora import repeats, signatures
    except ImportError as error:
        hint = 'pip install -c constraints.txt "samovar[train]"'
        raise MissingError(f"deduplication needs {error.name}, which is not installed", hint=hint) from None
    paths = many(inputs, "corpus")
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    signed = signatures.sign(paths, settings, work, report)
    verdicts = repeats.decide(signed, settings, report)
    places = repeats.sample(len(verdicts.gone), settings.listed, settings.seed)
    characters = signed.column("characters")
    with writing(out), (out / "removed.jsonl").open("w", encoding="utf-8", newline="\n") as removed:
        writer = Writer(settings, verdicts, characters, places, removed)
        kept = write_jsonl(out / "text.jsonl", writer.left(documents(paths), signed.counts.documents, report))
    counts = signed.counts
    share = writer.kept_bytes / max(1, counts.read_bytes)
    near = len(verdicts.gone) - verdicts.exact
    report.note(
        f"{counts.paragraphs} paragraphs: {verdicts.exact} repeat an earlier one, {near} nearly; "
        f"{share:.1%} of the text stays"
    )
    return {
        "documents": counts.documents,
        "kept_documents": kept,
        "paragraphs": counts.paragraphs,
        "exact_repeats": verdicts.exact,
        "near_repeats": near,
        "scraps": writer.scraps,
        "read_bytes": counts.read_bytes,
        "kept_bytes": writer.kept_bytes,
        "kept_share": share,
    }


class Writer:
    """The corpus a second time, without what goes."""

    def __init__(
        self, settings: Settings, verdicts: Verdicts, characters: np.ndarray, places: set[int], removed: TextIO
    ) -> None:
        """`characters` [N]: letters and spaces of each paragraph; `places` in the verdicts go to `removed`."""
        self._unit: Unit = settings.unit
        self._long_from = settings.exact_characters
        self._verdicts = verdicts
        self._characters = characters
        self._places = places
        self._removed = removed
        self._wanted = {int(verdicts.like[place]) for place in places}
        self._seen: dict[int, dict[str, Any]] = {}
        self.kept_bytes = 0
        self.scraps = 0  # documents that went because too little was left of them

    def left(self, texts: Iterator[str], count: int, report: Report) -> Iterator[dict[str, str]]:
        """One row for each document of which enough is left.

        Short lines are never removed as repeats, but those of a document that is one should not outlive it:
        where nothing else is left, and more of the text went than stays, they go too.
        """
        paragraph = at = 0  # number of the next paragraph, and place of the next that goes
        for number, text in enumerate(texts, 1):
            pieces = split(text, self._unit)
            removed: set[int] = set()
            gone, left, longest, before = 0, 0, 0, paragraph
            for place, piece in enumerate(pieces):
                if not piece.strip():
                    continue
                if paragraph in self._wanted:
                    self._seen[paragraph] = _row(number, paragraph - before + 1, piece)
                if at < len(self._verdicts.gone) and self._verdicts.gone[at] == paragraph:
                    removed.add(place)
                    gone += int(self._characters[paragraph])
                    if at in self._places:
                        self._tell(at, _row(number, paragraph - before + 1, piece))
                    at += 1
                else:
                    left += int(self._characters[paragraph])
                    longest = max(longest, int(self._characters[paragraph]))
                paragraph += 1
            if not removed or longest >= self._long_from or left > gone:
                kept = without(pieces, removed, self._unit) if removed else text
                self.kept_bytes += len(kept.encode())
                yield {"text": kept}
            else:
                self.scraps += left > 0
            if number % BETWEEN_LOOKS == 0:
                stop_if_asked(report)
                report.progress(number, count, "document written")

    def _tell(self, at: int, row: dict[str, Any]) -> None:
        like = self._seen[int(self._verdicts.like[at])]
        told = {**row, "similarity": round(float(self._verdicts.similarity[at]), 4), "like": like}
        self._removed.write(json.dumps(told, ensure_ascii=False) + "\n")


def _row(document: int, paragraph: int, piece: str) -> dict[str, Any]:
    """Where a paragraph stands, both counted from 1, and how it begins."""
    return {"document": document, "paragraph": paragraph, "text": piece.strip()[:SHOWN_CHARACTERS]}
