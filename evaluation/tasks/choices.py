"""Choices by log-probability: which of a few continuations the model finds most likely, nothing generated.

The score of an item is the gold choice's share of the choices' probability,

    share = p(gold) / sum over choices p(choice)          log p(choice) = sum of log p of its tokens,

of which accuracy is the rounded form: the share still tells two models apart that choose the same. The sum is
taken, not a mean over tokens or bytes, because it is the probability of the whole text: choices are then
events of one distribution. In a chat the end of the turn is part of a choice, so one that begins another is
not favoured.
Longer choices are less likely, as they should be; `accuracy_bytes` shows the other custom, log p by byte.
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

FEWEST, MOST = 2, 26


@dataclass(frozen=True)
class Choices:
    """A row a choice, the choices of an item one after another; `gold` and `sizes` have one entry an item."""

    name: str
    rows: Sequence[Row]
    sizes: Sequence[int]  # how many choices
    gold: Sequence[int]  # which of them is right
    lengths_bytes: Sequence[int]  # of each row's choice, UTF-8

    def scores(self, readings: Sequence[Reading]) -> np.ndarray:
        import numpy as np

        by_item = self._by_item(np.asarray([-reading.nll.sum() for reading in readings]))
        shares = [np.exp(logs - np.logaddexp.reduce(logs)) for logs in by_item]
        return np.asarray([share[gold] for share, gold in zip(shares, self.gold, strict=True)])  # [items]

    def figures(self, readings: Sequence[Reading]) -> dict[str, float]:
        """Accuracy by the sum and by the byte, and what blind choice would have: `chance`."""
        import numpy as np

        logs = np.asarray([-reading.nll.sum() for reading in readings])
        return {
            "accuracy": self._accuracy(logs),
            "accuracy_bytes": self._accuracy(logs / np.asarray(self.lengths_bytes)),
            "chance": float(np.mean(1 / np.asarray(self.sizes))),
        }

    def _accuracy(self, values: np.ndarray) -> float:
        import numpy as np

        right = [part.argmax() == gold for part, gold in zip(self._by_item(values), self.gold, strict=True)]
        return float(np.mean(right))

    def _by_item(self, values: np.ndarray) -> list[np.ndarray]:
        import numpy as np

        return np.split(values, np.cumsum(self.sizes)[:-1])


def problem(record: Record) -> str:
    """What is wrong with a line's choices, or nothing."""
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip() for text in choices):
        return '"choices" must be a list of texts that are not empty'
    if not FEWEST <= len(choices) <= MOST:
        return f"{len(choices)} choices; {FEWEST} to {MOST} are allowed"
    if len(set(choices)) < len(choices):
        return "two choices are the same"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f'"answer" is {answer!r:.40}; it must be the place of the right choice, 0 to {len(choices) - 1}'
    return ""


def make(name: str, records: Sequence[Record], writer: Writer) -> Choices:
    """The task of checked lines; items that do not fit the model are left out, as `Writer.fitting` says."""
    items = writer.fitting(name, records, lambda r: [writer.continued(r, choice) for choice in r["choices"]])
    return Choices(
        name,
        rows=[row for _, rows in items for row in rows],
        sizes=[len(rows) for _, rows in items],
        gold=[record["answer"] for record, _ in items],
        lengths_bytes=[len(choice.encode()) for record, _ in items for choice in record["choices"]],
    )
