"""A teacher's top-K on every response token, stored once.

Shards are written whole; a killed capture goes on after the last of them. log(1-P) and log Z are taken from
the full logits here, because afterwards they can not be had: 1 - P in fp32 is zero long before the tail is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distill.store import FORMAT, row_key, shard_path, write_shard
from foundation.chat import IGNORED
from foundation.dataio import conversations
from foundation.errors import ModelError
from foundation.losses import counted, logits_of, predicting
from foundation.model import context_tokens, load
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, chat_rows, collate
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class Settings(StageSettings):
    """How much of the teacher's distribution is kept."""

    top_k: int = Field(100, ge=1, le=4096, description="ids kept for each token")
    batch_rows: int = Field(16, ge=1, description="conversations in one forward pass")
    shard_rows: int = Field(1024, ge=1, description="conversations in one shard: the most a kill can cost")
    max_tokens: int = Field(1024, ge=8, description="longest conversation that is used")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/store from `teacher` and `data`."""
    folder, store = one(inputs, "teacher"), out / "store"
    store.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(folder)
    longest = min(settings.max_tokens, context_tokens(folder))
    rows, too_long = chat_rows(conversations(many(inputs, "data")), tokenizer, longest)
    model = load(folder)
    vocab = model.config.vocab_size
    if settings.top_k >= vocab:
        raise ModelError(f"top_k = {settings.top_k}; the teacher has {vocab} tokens, so at most {vocab - 1}")
    shards = range(0, len(rows), settings.shard_rows)
    for number, start in enumerate(shards):
        if not shard_path(store, number).exists():
            part = rows[start : start + settings.shard_rows]
            _write(model, part, settings, tokenizer.pad_id, shard_path(store, number))
        report.progress(min(start + settings.shard_rows, len(rows)), len(rows), "row")
        stop_if_asked(report)
    tokens = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    size = sum(path.stat().st_size for path in store.glob("shard-*.safetensors"))
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.digest,
        "vocab_tokens": vocab,
        "top_k": settings.top_k,
        "rows": len(rows),
        "tokens": tokens,
        "shards": len(shards),
    }
    (store / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return {"rows": len(rows), "too_long": too_long, "tokens": tokens, "bytes_per_token": size / tokens}


def _write(model: Any, rows: list[Row], settings: Settings, pad_id: int, path: Path) -> None:
    import numpy as np
    import torch

    parts: list[dict[str, np.ndarray]] = []
    with torch.inference_mode():
        for start in range(0, len(rows), settings.batch_rows):
            batch = collate(rows[start : start + settings.batch_rows], pad_id)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logits = logits_of(model, batch)  # [B, T, V]
            labels = batch["labels"]
            parts.append(top_k_columns(predicting(logits, labels), counted(labels, labels), settings.top_k))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = [int((row["labels"][1:] != IGNORED).sum()) for row in rows]
    write_shard(path, columns, [row_key(row) for row in rows], lengths)


def top_k_columns(logits: torch.Tensor, gold: torch.Tensor, top_k: int) -> dict[str, Any]:
    """Store columns (numpy) of `logits` [N, V] with gold next tokens [N]; see distill/store.py."""
    import numpy as np

    logits = logits.float()
    log_z = logits.logsumexp(-1)  # [N]
    if not log_z.isfinite().all():
        raise ModelError("the teacher's logits are not numbers", hint="its weights hold NaN or infinity")
    top, ids = logits.topk(top_k, dim=-1)  # [N, K]
    tail = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - log_z  # [N]
    inside = (ids == gold[:, None]).any(-1)  # [N]
    gold_logit = logits.gather(-1, gold[:, None]).squeeze(-1) * inside  # [N]
    narrow = np.uint16 if logits.shape[-1] <= 2**16 else np.uint32
    return {
        "topk_ids": ids.cpu().numpy().astype(narrow),
        "topk_logprobs": (top - log_z[:, None]).cpu().numpy().astype(np.float16),
        "tail_logprob": tail.cpu().numpy().astype(np.float32),
        "gold_logit": gold_logit.cpu().numpy().astype(np.float32),
        "log_z": log_z.cpu().numpy().astype(np.float32),
    }
