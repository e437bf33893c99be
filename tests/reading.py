"""All that the readers of corpora make of some paths."""

from __future__ import annotations

from pathlib import Path

from corpora.readers import Choice, documents_in, sources_of
from foundation.report import Report


def texts_of(paths: list[Path], report: Report, **choice: str) -> list[str]:
    return [text for source in sources_of(paths, Choice(**choice), report) for text in documents_in(source)]
