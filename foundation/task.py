"""What a model is asked, and how its answers become scores between 0 and 1: the words that the measuring of
models (evaluation) and the removing of layers (prune) share.

A task is read or answered. Read: its rows go through the model once, and the scores follow from what the model
thought of each counted token. Answered: the model goes on from prompts, greedily. Either way one score an item,
higher is better, so that two models can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from foundation.chunked import CHUNK_BYTES, Logits, cap, multiplied
from foundation.head import Head
from foundation.losses import counted, predicting
from foundation.rows import Row

if TYPE_CHECKING:
    import numpy as np
    import torch


class Reading(NamedTuple):
    """What a model thought of one row's counted tokens, in float64 where a float."""

    nll: np.ndarray  # [n] -log p(token), nats
    hit: np.ndarray  # [n] bool: the token is the model's first choice
    kl: np.ndarray  # [n] KL(original || this model), nats; empty where no original was given


@runtime_checkable
class ReadTask(Protocol):
    """Choices, perplexity, copying: scores follow from readings of `rows`."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> Sequence[Row]: ...

    def scores(self, readings: Sequence[Reading]) -> np.ndarray:
        """One score an item in [0, 1], higher is better; readings are those of `rows`, in their order."""

    def figures(self, readings: Sequence[Reading]) -> dict[str, float]:
        """What else a report shows, such as accuracy or perplexity."""


@runtime_checkable
class AnsweredTask(Protocol):
    """Generation: scores follow from greedy answers to `prompts`."""

    @property
    def name(self) -> str: ...

    @property
    def prompts(self) -> Sequence[Sequence[int]]: ...

    @property
    def answer_tokens(self) -> int:
        """An answer is cut at so many tokens."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """An answer ends before one of these."""

    def scores(self, answers: Sequence[Sequence[int]]) -> np.ndarray:
        """One score a prompt in [0, 1], higher is better."""

    def figures(self, answers: Sequence[Sequence[int]]) -> dict[str, float]: ...


Task = ReadTask | AnsweredTask


def read_tokens(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, original: tuple[torch.Tensor, Head] | None = None
) -> list[Reading]:
    """One reading a row: hidden [B, T, D] is the head's input, labels [B, T]; both as `hidden_of` and `collate`
    give them. `original` is the same of the model that KL is measured from. Logits [n, V] are held for a chunk
    of positions alone; the result does not depend on how positions fall into chunks.
    """
    import numpy as np
    import torch

    gold = counted(labels, labels)  # [N]
    states = predicting(hidden, labels)  # [N, D]
    reference = None if original is None else (predicting(original[0], labels), original[1])
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    rows = max(1, budget // (4 * head.vocab_tokens * (1 if reference is None else 3)))
    nll, hit, kl = [], [], []
    for start in range(0, len(gold), rows):
        at = slice(start, start + rows)
        log_q = log_probabilities(states[at], head)  # [n, V]
        ids = gold[at][:, None]
        nll.append(-log_q.gather(1, ids).squeeze(1).double())
        hit.append(log_q.argmax(1) == gold[at])
        if reference is not None:
            log_p = log_probabilities(reference[0][at], reference[1])
            kl.append((log_p.exp() * (log_p - log_q)).sum(1).double())
    parts = [torch.cat(part).cpu().numpy() if part else np.empty(0) for part in (nll, hit, kl)]
    ends = (labels[:, 1:] != -100).sum(1).cumsum(0).tolist()  # [B]
    starts = [0, *ends[:-1]]
    return [Reading(*(part[a:b] for part in parts)) for a, b in zip(starts, ends, strict=True)]


def log_probabilities(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """log p over the vocabulary for head inputs [n, D], in float32 (float64 where the head is).  # [n, V]"""
    import torch

    weight = head.factors[0][1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    z = torch.empty((len(hidden), head.vocab_tokens), dtype=dtype, device=hidden.device)
    Logits(head, multiplied(hidden, head), dtype).write(slice(None), z)
    cap(z, head)
    return z.log_softmax(-1)
