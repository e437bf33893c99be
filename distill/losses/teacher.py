"""What a loss reads of the teacher at n positions: the columns of a store, as tensors without a NaN in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Teacher(NamedTuple):
    """Log-probabilities are at the store's temperature."""

    present: torch.Tensor  # [n, K] is there an entry? A position may have fewer than K
    entries: torch.Tensor  # [n, K] log p of each (sampled: log of its weight); 0 where there is none
    mass: torch.Tensor  # [n, K] p of each; 0 where there is none
    tail: torch.Tensor  # [n] log of the mass off the entries; -inf where there is none
    gold: torch.Tensor  # [n] log p of the gold token
    logit: torch.Tensor  # [n] the teacher's logit of the gold token; 0 where that is not among the entries

    def at(self, rows: slice) -> Teacher:
        """The same for some of the positions."""
        return Teacher(*(column[rows] for column in self))


def teacher_of(columns: dict[str, torch.Tensor], gold: torch.Tensor, temperature: float) -> Teacher:
    """Stored columns at N positions ([N, K] and [N]) beside their gold ids [N]; one not read may be missing.

    t = temperature * (log p_gold + log Z), and 0 where gold is outside the entries (RuAdapt-KD, eq. 1).
    """
    import torch

    raw = columns["topk_logprobs"]  # [N, K]
    present = raw > -math.inf
    nothing = raw.new_zeros(len(raw))  # [N]
    tail, gold_logprob, log_z = (
        columns.get(name, nothing) for name in ("tail_logprob", "gold_logprob", "log_z")
    )
    inside = ((columns["topk_ids"] == gold[:, None]) & present).any(1)  # [N]
    logit = torch.where(inside, temperature * (gold_logprob + log_z), 0.0)
    return Teacher(present, raw.masked_fill(~present, 0.0), raw.exp(), tail, gold_logprob, logit)
