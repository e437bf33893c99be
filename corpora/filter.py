"""A corpus through a trained quality filter: every document is scored, the best are kept.

The classifier comes from corpora.quality. Each document is scored by itself, so neither the order of the files
nor a stop changes a score. See choose.py for how the kept ones are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from corpora.choose import Choice, Row, filter_rows
from corpora.classifier import load_classifier
from foundation.dataio import documents
from foundation.report import Report
from foundation.stage import Figures, Inputs, many, one

CHUNK_DOCUMENTS = 1024  # a kill costs at most so many scores


class Settings(Choice):
    """How good a document must be, or which share of them is kept."""

    threshold: float | None = Field(
        None, ge=0, le=1, description="documents whose probability of being good is at least this are kept"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/text.jsonl (kept), out/rejected.jsonl and out/scores.json from `corpus` and `quality`.

    Raises ArtifactError for a classifier that can not be used, InputError when no document is kept, and
    StopRequested with all scores so far on disk.
    """
    classifier = load_classifier(one(inputs, "quality"))
    paths = many(inputs, "corpus")
    found = filter_rows(
        paths,
        read,
        classifier.scores,
        settings,
        "text.jsonl",
        out,
        report,
        chunk_rows=CHUNK_DOCUMENTS,
        key="score",
        span=(0.0, 1.0),
    )
    return {"read": found.rows, "kept": found.kept, "kept_share": found.kept_share}


def read(path: Path) -> Iterator[Row[str]]:
    for text in documents([path]):
        yield Row(json.dumps({"text": text}, ensure_ascii=False), text)
