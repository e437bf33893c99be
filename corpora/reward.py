"""Instruction data through a reward model: every conversation is scored, the best are kept.

As in Vikhr, where pairs of an instruction and an answer were chosen by a reward model. What is scored is the
conversation as the reward model reads it, see reward_model.py. A conversation that is longer than that model
reads is not scored at all, since the score of a piece says little of the whole: it is rejected, counted, and
belongs to no share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from corpora.choose import Choice, Row, filter_rows
from corpora.reward_model import RewardModel
from foundation.dataio import Message, blaming, conversations, lines
from foundation.report import Report
from foundation.rows import longest_first
from foundation.stage import Figures, Inputs, many, one

if TYPE_CHECKING:
    import numpy as np

CHUNK_BATCHES = 16  # a kill costs at most so many batches; their rows are sorted by length together


class Settings(Choice):
    """Which rewards are kept, and how the reward model is run."""

    threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description="conversations with a reward (the logit) of at least this are kept",
    )
    max_tokens: int = Field(
        1024, ge=8, description="longer conversations are rejected unscored; the model's own limit holds too"
    )
    batch_rows: int = Field(16, ge=1, description="conversations in one forward pass, of similar length")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the reward model's weights; bf16 is for a GPU, rounds, and lets padding show",
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/data.jsonl (kept, each line as it was), out/rejected.jsonl and out/scores.json.

    Raises ModelError for a `reward` that is no reward model, InputError for bad `data` or when nothing is
    kept, and StopRequested with all rewards so far on disk.
    """
    model = RewardModel(one(inputs, "reward"), settings.precision)
    longest = min(settings.max_tokens, model.longest)
    found = filter_rows(
        many(inputs, "data"),
        read,
        lambda chunk: scores(model, chunk, longest, settings.batch_rows),
        settings,
        "data.jsonl",
        out,
        report,
        chunk_rows=settings.batch_rows * CHUNK_BATCHES,
        key="reward",
    )
    if found.unscored:
        report.note(f"{found.unscored} conversations exceed {longest} tokens; they are rejected unscored")
    return {
        "read": found.rows,
        "too_long": found.unscored,
        "kept": found.kept,
        "kept_share": found.kept_share,
    }


def read(path: Path) -> Iterator[Row[list[Message]]]:
    raw = (line for _, line in lines(path) if line.strip())
    for line, messages in zip(raw, conversations([path]), strict=True):
        yield Row(line, messages)


def scores(model: RewardModel, chunk: list[list[Message]], longest: int, batch_rows: int) -> np.ndarray:
    """Rewards float32 [N] of a chunk, in batches of similar length; NaN for what is longer than `longest`."""
    import numpy as np

    rows = []
    for messages in chunk:
        with blaming(messages):
            rows.append(model.encode(messages))
    found = np.full(len(rows), np.nan, dtype=np.float32)
    fitting = [number for number, row in enumerate(rows) if len(row.ids) <= longest]
    for places in longest_first([len(rows[number].ids) for number in fitting], batch_rows):
        batch = [fitting[place] for place in places]
        found[batch] = model.scores([rows[number] for number in batch])
    return found
