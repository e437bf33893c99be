"""Copying: how much of a text the model would write out again before its first mistake.

The score of an item is the share of the copy's tokens that greedy decoding reproduces, from the first on.
Nothing is generated for it: up to its first mistake a greedy answer is the copy, so one reading of prompt and
copy tells where the mistake is, at the first token that is not the model's first choice. What greedy decoding
would write after it can not be told from that, and is not scored. In a chat its last token ends the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.tasks.prompts import Record, Writer
from foundation.rows import Row
from foundation.task import Reading

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Copying:
    """A row an item: prompt and copy."""

    name: str
    rows: Sequence[Row]

    def scores(self, readings: Sequence[Reading]) -> np.ndarray:
        import numpy as np

        return np.asarray([np.logical_and.accumulate(reading.hit).mean() for reading in readings])  # [items]

    def figures(self, readings: Sequence[Reading]) -> dict[str, float]:
        """The share of items that are copied whole."""
        return {"exact": sum(bool(reading.hit.all()) for reading in readings) / len(readings)}


def problem(record: Record) -> str:
    """What is wrong with a line's copy, or nothing."""
    copy = record["copy"]
    return "" if isinstance(copy, str) and copy.strip() else '"copy" must be a text that is not empty'


def make(name: str, records: Sequence[Record], writer: Writer) -> Copying:
    """The task of checked lines; items that do not fit the model are left out."""
    items = writer.fitting(name, records, lambda record: [writer.continued(record, record["copy"])])
    return Copying(name, [row for _, rows in items for row in rows])
