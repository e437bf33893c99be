"""Which rows of a corpus are kept: all from a score on, or an exact share, the best ones.

Two passes. The first scores rows in chunks; the scores go to one file in .work, four bytes a row, and a chunk
counts once `scored.json` says so: what a kill left beyond is cut off. The second writes the rows, by then
knowing which. The score at the border of a share is found by counting, without a sort or a copy of the scores,
so memory does not grow with the corpus. Rows that share the border's score are kept in the order of the files
until the share is full.

A row without a score (NaN) is never kept and belongs to no share: it is counted as unscored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import Field, model_validator

from foundation.errors import InputError
from foundation.files import read_json, write_json, writing
from foundation.report import Report, stop_if_asked
from foundation.rows import batches_of
from foundation.settings import StageSettings

if TYPE_CHECKING:
    import numpy as np

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BINS = 20  # of a histogram
BLOCK_ROWS = 1 << 22  # scores looked at together
WRITTEN_ROWS = 1024  # between two looks at whether a stop was asked for

T = TypeVar("T")


class Choice(StageSettings):
    """How rows are chosen by their scores: one of the two must be set."""

    threshold: float | None = Field(None, allow_inf_nan=False, description="rows that score so much are kept")
    keep_share: float | None = Field(None, gt=0, lt=1, description="this share of the rows is kept, the best")

    @model_validator(mode="after")
    def _one_of_them(self) -> Choice:
        if (self.threshold is None) == (self.keep_share is None):
            raise ValueError("exactly one of threshold and keep_share says what is kept")
        return self


class Row(NamedTuple, Generic[T]):
    """One row of a corpus: the line that is written if it is kept, and what is scored."""

    line: str
    content: T


Read = Callable[[Path], Iterator[Row[T]]]


class Cut(NamedTuple):
    """Rows above `score` are kept, and of those that equal it the first `ties`."""

    score: float
    ties: int


class Outcome(NamedTuple):
    """Rows of one input file, or of all, by what became of them."""

    rows: int
    unscored: int
    kept: int

    @property
    def kept_share(self) -> float:
        return round(self.kept / max(1, self.rows - self.unscored), 6)


def filter_rows(
    paths: Sequence[Path],
    read: Read[T],
    score: Callable[[list[T]], np.ndarray],
    choice: Choice,
    kept_name: str,
    out: Path,
    report: Report,
    *,
    chunk_rows: int,
    key: str,
    span: tuple[float, float] | None = None,
) -> Outcome:
    """Write out/`kept_name`, out/rejected.jsonl (scores under `key`) and out/scores.json.

    `score`: the contents of some rows -> float32 [N]; a chunk's scores depend on its rows alone. `span`: ends
    of the histogram, where scores have some. Raises InputError when no row is scored or kept, StopRequested.
    """
    scores, counts = score_rows(paths, read, score, out / ".work", report, chunk_rows=chunk_rows)
    cut = cut_of(choice, scores)
    kept = write_rows(paths, read, scores, cut, (out / kept_name, out / "rejected.jsonl"), key, report)
    edges = _edges(scores, span)
    parts, start = [], 0
    for path, rows, kept_rows in zip(paths, counts, kept, strict=True):
        found = scores[start : start + rows]
        parts.append({"file": path.name} | _described(found, outcome(found, kept_rows), edges))
        start += rows
    total = outcome(scores, sum(kept))
    facts = {
        "threshold": choice.threshold,
        "keep_share": choice.keep_share,
        "border": _digits(cut.score),
        "edges": [_digits(edge) for edge in edges],
        "all": _described(scores, total, edges),
        "files": parts,
    }
    write_json(out / "scores.json", facts)
    report.note(
        f"{total.kept} of {total.rows} rows are kept ({total.kept_share:.1%}); {total.unscored} unscored"
    )
    return total


# ------------------------------------------------------------------------------------------- the first pass


def score_rows(
    paths: Sequence[Path],
    read: Read[T],
    score: Callable[[list[T]], np.ndarray],
    work: Path,
    report: Report,
    *,
    chunk_rows: int,
) -> tuple[np.ndarray, list[int]]:
    """Scores float32 [N] of all rows, mapped from `work`, and the number of rows of each file.

    Goes on behind the last chunk that is on disk. No chunk reaches over the end of a file.
    """
    import numpy as np

    work.mkdir(parents=True, exist_ok=True)
    store, mark = work / "scores.f32", work / "scored.json"
    done = _resume(store, mark)
    total_bytes = sum(path.stat().st_size for path in paths)
    counts: list[int] = []
    seen, before_bytes = 0, 0
    for path in paths:
        counts.append(0)
        read_bytes, size_bytes = 0, path.stat().st_size
        for chunk in batches_of(read(path), chunk_rows):
            if seen >= done:
                stop_if_asked(report)
                _append(store, score([row.content for row in chunk]), len(chunk))
                write_json(mark, {"rows": seen + len(chunk)})
            seen += len(chunk)
            counts[-1] += len(chunk)
            read_bytes = min(size_bytes, read_bytes + sum(len(row.line.encode()) for row in chunk))
            report.progress(before_bytes + read_bytes, total_bytes, "byte")
        before_bytes += size_bytes
    report.progress(total_bytes, total_bytes, "byte")
    return np.memmap(store, dtype=np.float32, mode="r"), counts


def _resume(store: Path, mark: Path) -> int:
    """Rows whose scores are on disk, with anything beyond them cut off."""
    said = read_json(mark)
    rows = said["rows"] if isinstance(said, dict) else 0
    if not store.is_file() or store.stat().st_size < rows * 4:
        rows = 0
    with writing(store), store.open("ab") as file:
        file.truncate(rows * 4)
    return rows


def _append(store: Path, scores: np.ndarray, rows: int) -> None:
    assert scores.dtype == "float32" and len(scores) == rows, (scores.dtype, len(scores), rows)
    with writing(store), store.open("ab") as file:
        file.write((scores + 0.0).tobytes())  # -0.0 becomes 0.0
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------- the choice


def cut_of(choice: Choice, scores: np.ndarray) -> Cut:
    """The border that `choice` means on these scores [N]. Raises InputError when nothing would be kept."""
    scored = sum(len(block) for block in _blocks(scores))
    if not scored:
        raise InputError(
            f"none of the {len(scores)} rows has a score",
            hint="every one was too long for the model (see max_tokens), or empty",
        )
    if choice.threshold is not None:
        best = order_statistic(scores, scored - 1)
        if best < choice.threshold:
            raise InputError(
                f"no row reaches threshold = {choice.threshold}; the best of {scored} scores {best:.6g}",
                hint="lower the threshold, or choose by keep_share",
            )
        return Cut(choice.threshold, len(scores))
    assert choice.keep_share is not None
    keep = max(1, int(choice.keep_share * scored + 0.5))
    border = order_statistic(scores, scored - keep)
    above = sum(int((block > border).sum()) for block in _blocks(scores))
    return Cut(border, keep - above)


def order_statistic(scores: np.ndarray, rank: int) -> float:
    """The score that `rank` others stand before in ascending order, 0 for the lowest.

    A float's bits, with the sign turned, are ordered like the floats: the upper 16 of them are counted in
    one pass, and in another the lower 16 of those that share the right upper ones.
    """
    import numpy as np

    upper, rank = _place(sum(_counts(_ordered(block) >> 16) for block in _blocks(scores)), rank)
    inside = (bits[bits >> 16 == upper] & 0xFFFF for bits in map(_ordered, _blocks(scores)))
    lower, _ = _place(sum(_counts(bits) for bits in inside), rank)
    bits = upper << 16 | lower
    bits = bits ^ 0x80000000 if bits & 0x80000000 else bits ^ 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def _ordered(scores: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order."""
    import numpy as np

    bits = np.ascontiguousarray(scores).view(np.uint32)
    return np.where(bits & 0x80000000, ~bits, bits | np.uint32(0x80000000))


def _counts(values: np.ndarray) -> Any:
    import numpy as np

    return np.bincount(values, minlength=1 << 16)


def _place(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that the row of `rank` is in, and how many of that bucket stand before it."""
    import numpy as np

    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, rank, side="right"))
    return place, rank - int(ends[place] - counts[place])


def _blocks(scores: np.ndarray) -> Iterator[np.ndarray]:
    """The scores that there are, without NaN, some at a time."""
    import numpy as np

    for start in range(0, len(scores), BLOCK_ROWS):
        block = scores[start : start + BLOCK_ROWS]
        yield block[~np.isnan(block)]


# ------------------------------------------------------------------------------------------ the second pass


def write_rows(
    paths: Sequence[Path],
    read: Read[T],
    scores: np.ndarray,
    cut: Cut,
    to: tuple[Path, Path],
    key: str,
    report: Report,
) -> list[int]:
    """Write the kept rows as they are and the rejected ones with their score. Returns the kept of each file."""
    kept = [0] * len(paths)
    number, ties = 0, 0
    with writing(to[0]), _lines(to[0]) as kept_file, _lines(to[1]) as rejected_file:
        for place, path in enumerate(paths):
            for row in read(path):
                score = float(scores[number])
                tie = score == cut.score and ties < cut.ties
                if tie or score > cut.score:
                    kept_file.write(row.line + "\n")
                    kept[place] += 1
                    ties += tie
                else:
                    record = json.loads(row.line) | {key: None if score != score else _digits(score)}
                    rejected_file.write(json.dumps(record, ensure_ascii=False) + "\n")
                number += 1
                if number % WRITTEN_ROWS == 0:
                    stop_if_asked(report)
                    report.progress(number, len(scores), "row")
    report.progress(number, len(scores), "row")
    return kept


def _lines(path: Path) -> Any:
    return path.open("w", encoding="utf-8", newline="\n")


# --------------------------------------------------------------------------------------------- what is said


def outcome(scores: np.ndarray, kept: int) -> Outcome:
    return Outcome(len(scores), len(scores) - sum(len(block) for block in _blocks(scores)), kept)


def _described(scores: np.ndarray, found: Outcome, edges: np.ndarray) -> dict[str, Any]:
    """Counts, quantiles and histogram of some scores. The quantile q is the score of rank floor(q (N - 1))."""
    import numpy as np

    scored = found.rows - found.unscored
    facts: dict[str, Any] = {**found._asdict(), "kept_share": found.kept_share}
    if scored:
        ranks = {q: int(q * (scored - 1)) for q in QUANTILES}
        facts["quantiles"] = {str(q): _digits(order_statistic(scores, rank)) for q, rank in ranks.items()}
        counts = np.sum([np.histogram(block, edges)[0] for block in _blocks(scores)], axis=0)
        facts["histogram"] = counts.tolist()
    return facts


def _edges(scores: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    import numpy as np

    if span is None:
        scored = sum(len(block) for block in _blocks(scores))
        span = order_statistic(scores, 0), order_statistic(scores, scored - 1)
        if span[0] == span[1]:
            span = span[0] - 0.5, span[1] + 0.5
    return np.linspace(*span, BINS + 1)


def _digits(value: float) -> float:
    """Six decimal places, for a reader; the choice is made on the scores themselves."""
    return round(float(value), 6)
