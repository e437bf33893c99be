"""Bits per byte: how many bits a model needs for each byte of a text.

Perplexity per token can not be compared across vocabularies: a longer token is harder to guess. Dividing by
bytes of UTF-8 removes the tokenizer from the figure, so a model can be compared with itself before and after
its vocabulary was extended. Russian has two bytes a letter: compare languages with themselves, not each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foundation.chat import IGNORED
from foundation.errors import ModelError
from foundation.losses import next_token_nll
from foundation.rows import Row, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foundation.report import Report
    from foundation.tokenizer import Tokenizer


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    report: Report,
    *,
    window_tokens: int,
    batch_rows: int = 16,
) -> float:
    """Bits per UTF-8 byte of `texts`, each document after a boundary token.

    A document longer than `window_tokens` is read in windows that overlap by half, each token counted once with
    at least half a window of context.
    """
    rows = [
        row for text in texts for row in windows(tokenizer.encode(text), tokenizer.boundary_id, window_tokens)
    ]
    rows.sort(key=lambda row: len(row["input_ids"]))  # equal lengths together: less padding
    nats = 0.0
    for start in range(0, len(rows), batch_rows):
        nats += _nats(model, rows[start : start + batch_rows], tokenizer.pad_id)
        report.progress(min(start + batch_rows, len(rows)), len(rows), "row")
    if not math.isfinite(nats):
        raise ModelError(
            "the model's loss is not a number", hint="its weights hold NaN or infinity; was it trained in fp16?"
        )
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def windows(ids: Sequence[int], boundary_id: int, window_tokens: int) -> list[Row]:
    """Rows that together count every token of `ids` exactly once."""
    import numpy as np

    full = np.asarray([boundary_id, *ids], dtype=np.int64)  # [T + 1]
    rows, counted, start = [], 1, 0
    while counted < len(full):
        stop = min(start + window_tokens, len(full))
        labels = full[start:stop].copy()
        labels[: counted - start] = IGNORED
        rows.append({"input_ids": full[start:stop], "labels": labels})
        counted, start = stop, stop - window_tokens // 2
    return rows


def _nats(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> float:
    import torch

    batch = {name: value.to(model.device) for name, value in collate(rows, pad_id).items()}
    with torch.inference_mode():
        return float(next_token_nll(model, batch))
