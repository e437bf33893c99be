"""Tasks measured the plain way: each row once through the whole model, each prompt answered once.

prune/ has its own way, which shares the work of nearly equal models, and must come to the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foundation.errors import ModelError
from foundation.greedy import greedy
from foundation.head import hidden_of
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, collate
from foundation.task import Reading, ReadTask, Task, read_tokens

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Measured:
    """What one model made of one task: one score an item in [0, 1], and the figures a report shows."""

    name: str
    scores: np.ndarray  # [items]
    figures: dict[str, float]


def measure(
    model: PreTrainedModel, tasks: Sequence[Task], pad_id: int, report: Report, *, batch_rows: int = 16
) -> list[Measured]:
    """Every task's scores by `model` in evaluation mode. Raises ModelError where its loss is not a number."""
    measured = []
    for task in tasks:
        if isinstance(task, ReadTask):
            readings = read(model, task.rows, pad_id, report, batch_rows=batch_rows)
            measured.append(Measured(task.name, task.scores(readings), task.figures(readings)))
            continue
        answers = greedy(
            model,
            task.prompts,
            answer_tokens=task.answer_tokens,
            stop_ids=task.stop_ids,
            pad_id=pad_id,
            report=report,
            batch_rows=batch_rows,
        )
        measured.append(Measured(task.name, task.scores(answers), task.figures(answers)))
    return measured


def read(
    model: PreTrainedModel, rows: Sequence[Row], pad_id: int, report: Report, *, batch_rows: int = 16
) -> list[Reading]:
    """A reading of each row, in their order. Raises ModelError for a model whose loss is not a number."""
    import numpy as np
    import torch

    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))  # less padding
    readings: dict[int, Reading] = {}
    for start in range(0, len(order), batch_rows):
        stop_if_asked(report)
        places = order[start : start + batch_rows]
        batch = collate([rows[place] for place in places], pad_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}  # [B, T]
        with torch.inference_mode():
            readings.update(zip(places, read_tokens(*hidden_of(model, batch), batch["labels"]), strict=True))
        report.progress(start + len(places), len(order), "row")
    if not all(np.isfinite(reading.nll).all() for reading in readings.values()):
        raise ModelError(
            "the model's loss is not a number", hint="its weights hold NaN or infinity; was it trained in fp16?"
        )
    return [readings[place] for place in range(len(rows))]
