"""The loss of language modelling, in the form that the training loop takes.

The shift by one happens here and nowhere else: labels stand at the position of their own token, and the logits
before it predict it. Losses that need a teacher live in distill/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foundation.chat import IGNORED
from foundation.chunked import chunked_nll
from foundation.head import hidden_of, inputs_of

if TYPE_CHECKING:
    import torch


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token logits of a batch, read in one go and without a KV cache.  # [B, T, V]"""
    logits: torch.Tensor = model(**inputs_of(batch), use_cache=False).logits
    return logits


def counted(column: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Entries of `column` [B, T, ...] that stand at counted labels [B, T], one after another.  # [N, ...]"""
    return column[:, 1:][labels[:, 1:] != IGNORED]


def predicting(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Entries of `values` [B, T, ...] (logits, hidden states) that predict the counted labels.  # [N, ...]"""
    return values[:, :-1][labels[:, 1:] != IGNORED]


def cross_entropy(model: Any, batch: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the labels, summed and divided by `items` (nats per counted token)."""
    return next_token_nll(model, batch) / items


def next_token_nll(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the counted labels of -log p(label | tokens before it), in fp32."""
    labels = batch["labels"]
    hidden, head = hidden_of(model, batch)
    return chunked_nll(predicting(hidden, labels), head, counted(labels, labels))
