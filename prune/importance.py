"""What each layer is worth: the score of the model without it.

Task importance (LayerKD): leave one layer out, score the model on representative rows, remove the layer whose
removal costs least. Scores are taken afresh after every removal, because healing changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from foundation.report import Report
from foundation.rows import Row
from prune.cut import without

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[["PreTrainedModel", Sequence[Row], int], float]
"""score(model, rows, pad_id) -> nats per counted token; lower is better."""


def leave_one_out(
    model: PreTrainedModel, rows: Sequence[Row], score: Score, report: Report, *, pad_id: int
) -> list[float]:
    """Score without each layer, [L]; the least valuable layer has the lowest."""
    total = len(model.model.layers)
    scores = []
    for layer in range(total):
        with without(model, layer):
            scores.append(score(model, rows, pad_id))
        report.progress(layer + 1, total, "layer", loss=scores[-1])
    return scores
