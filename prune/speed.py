"""How fast a model reads, beside another on the same machine in the same minute.

Tokens per second say as much of the machine and of what else runs on it as of the model. The two models take
turns on one fixed batch, so what disturbs one disturbs the other: their ratio is the figure to keep. It is a
reading speed: no KV cache, no sampling, every position's logits.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_ROWS = 4
ROW_TOKENS = 128
LEAST_TURNS, MOST_TURNS, ENOUGH_SECONDS = 7, 51, 2.0  # a small model's turn is short, and so disturbed more


def relative_speed(model: PreTrainedModel, original: PreTrainedModel) -> tuple[float, float]:
    """(tokens per second of `model`, how many times that of `original`), each a median over turns."""
    own: list[float] = []
    others: list[float] = []
    ids, original_ids = _batch(model), _batch(original)
    _seconds(model, ids), _seconds(original, original_ids)  # the first pass of each is never like the others
    end = time.perf_counter() + ENOUGH_SECONDS
    while len(own) < LEAST_TURNS or (len(own) < MOST_TURNS and time.perf_counter() < end):
        own.append(_seconds(model, ids) / ids.numel())
        others.append(own[-1] if model is original else _seconds(original, original_ids) / original_ids.numel())
    ratios = [other / mine for mine, other in zip(own, others, strict=True)]
    return 1 / statistics.median(own), statistics.median(ratios)


def _batch(model: PreTrainedModel) -> torch.Tensor:
    """Ids [B, T] that the model has, the same at every call."""
    import torch

    config = model.config.get_text_config()
    tokens = min(ROW_TOKENS, config.max_position_embeddings)
    ids = torch.arange(BATCH_ROWS * tokens).reshape(BATCH_ROWS, tokens)  # [B, T]
    return (ids * 7919 % config.vocab_size).to(model.device)


def _seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        return time.perf_counter() - start
