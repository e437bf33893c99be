"""Perplexity: how well a model predicts texts, or the assistant's turns of conversations.

The score of an item is exp(-mean nll of its counted tokens), the geometric mean of the probabilities that they
got: 1 over the item's perplexity, in [0, 1]. Items count alike, long or short. `perplexity` is the customary
figure, over all tokens of the task. Neither can be compared across vocabularies; bits per byte can (bits.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.bits import windows
from evaluation.tasks.prompts import Record, Writer, nothing_of
from foundation.rows import Row
from foundation.task import Reading

if TYPE_CHECKING:
    import numpy as np

MOST_NATS = 700.0  # exp of more is no float; a model that bad is bad enough


@dataclass(frozen=True)
class Perplexity:
    """Rows of an item one after another: a conversation is one, a long text several windows."""

    name: str
    rows: Sequence[Row]
    sizes: Sequence[int]  # rows of each item

    def scores(self, readings: Sequence[Reading]) -> np.ndarray:
        import numpy as np

        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        nats = np.add.reduceat([reading.nll.sum() for reading in readings], starts)
        tokens = np.add.reduceat([len(reading.nll) for reading in readings], starts)
        return np.exp(-nats / tokens)  # [items]

    def figures(self, readings: Sequence[Reading]) -> dict[str, float]:
        nats = float(sum(reading.nll.sum() for reading in readings))
        mean = nats / sum(len(reading.nll) for reading in readings)
        return {"perplexity": math.exp(min(mean, MOST_NATS)), "nats_per_token": mean}


def make(name: str, records: Sequence[Record], writer: Writer) -> Perplexity:
    """The task of checked lines; conversations that do not fit the model are left out."""

    def write(record: Record) -> list[Row]:
        if "messages" in record:
            return writer.conversation(record["messages"])
        tokenizer = writer.tokenizer
        rows = windows(tokenizer.encode(record["text"]), tokenizer.boundary_id, writer.max_tokens)
        if not rows:
            raise nothing_of(record["text"])
        return rows

    items = writer.fitting(name, records, write)
    return Perplexity(name, [row for _, rows in items for row in rows], [len(rows) for _, rows in items])
