"""Losses of a student against a teacher's store, one a file, in one table.

    L = ce_weight * CE + kl_lambda * w * T^2 * KD         summed over counted tokens, divided by their number

CE and the published weight read the student at temperature 1, KD reads it at the store's temperature T, which
is what the teacher's log-probabilities were made with. T^2, because the gradient of KD in the logits shrinks as
1/T^2 (Hinton, Vinyals, Dean 2015, section 2): so kl_lambda means the same at every temperature.

All of them see the student through foundation.chunked's readings alone, so logits are never held for a batch.
The entries of a position are distinct ids; a log-probability of -inf says that there is no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distill.losses.forward_kl import forward_kl
from distill.losses.published import published_code_weight, published_weight
from distill.losses.renormalised_kl import renormalised_kl
from distill.losses.reverse_kl import reverse_kl
from distill.losses.sampled_kl import sampled_kl
from distill.losses.shift_invariant import shift_invariant_weight
from distill.losses.teacher import Teacher, teacher_of
from foundation.chunked import Readings, chunked_loss, chunked_nll
from foundation.errors import InputError, ModelError
from foundation.head import hidden_of
from foundation.losses import counted, predicting

if TYPE_CHECKING:
    import torch

PerToken = Callable[[Teacher, Readings], "torch.Tensor"]

ENTRIES = ("topk_ids", "topk_logprobs")
GOLD = (*ENTRIES, "gold_logprob")
TAIL = (*ENTRIES, "tail_logprob")


@dataclass(frozen=True)
class Kind:
    """A loss: the columns that it reads of a store, and KD and its weight at a position."""

    reads: tuple[str, ...] = ()  # none: no teacher at all
    kd: PerToken | None = None
    weight: PerToken | None = None  # None = 1 everywhere
    support: Literal["top_k", "sampled"] = "top_k"  # which kind of store it is right for


LOSSES: dict[str, Kind] = {
    "ce": Kind(),
    "published": Kind((*GOLD, "log_z"), renormalised_kl, published_weight),
    "published_code": Kind((*GOLD, "log_z"), renormalised_kl, published_code_weight),
    "shift_invariant": Kind(GOLD, renormalised_kl, shift_invariant_weight),
    "forward_kl": Kind(TAIL, forward_kl),
    "renormalised_kl": Kind(ENTRIES, renormalised_kl),
    "reverse_kl": Kind(TAIL, reverse_kl),
    "sampled_kl": Kind(ENTRIES, sampled_kl, support="sampled"),
}


def make_loss(name: str, *, kl_lambda: float, ce_weight: float, temperature: float) -> DistillLoss:
    """The loss called `name`, in the form that foundation.tune takes. Raises InputError for an unknown name."""
    if name not in LOSSES:
        raise InputError(f"loss = {name!r} is not known", hint=f"one of: {', '.join(LOSSES)}")
    return DistillLoss(LOSSES[name], kl_lambda, ce_weight, temperature)


class DistillLoss:
    """Sum of L over a batch's counted tokens / items. Every call adds to `sums`, which its reader empties.

    sums: "tokens" (how many were counted), "ce" (nats), and with a teacher "kd" (T^2 * KD) and "weight" (w).
    """

    def __init__(self, kind: Kind, kl_lambda: float, ce_weight: float, temperature: float) -> None:
        self.kind, self.kl_lambda, self.ce_weight, self.temperature = kind, kl_lambda, ce_weight, temperature
        self.sums: dict[str, torch.Tensor] = {}
        self.chunk_rows = 0  # as many as fit

    def __call__(self, model: Any, batch: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        """Raises ModelError when the batch lacks a column that the loss reads."""
        labels = batch["labels"]
        if missing := [name for name in self.kind.reads if name not in batch]:
            raise ModelError(
                f"the batch has no column {', '.join(missing)}", hint="lay the teacher's store beside the rows"
            )
        columns = {name: counted(batch[name], labels) for name in self.kind.reads}  # [N, ...]
        hidden, head = hidden_of(model, batch)
        total, figures = self.of_hidden(predicting(hidden, labels), head, counted(labels, labels), columns)
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()
        return total / items

    def of_hidden(
        self, hidden: torch.Tensor, head: Any, gold: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(sum of L, sums) at N positions: hidden [N, D], gold ids [N], columns [N, ...]."""
        tokens = gold.new_tensor(len(gold))
        if self.kind.kd is None:
            nll = chunked_nll(hidden, head, gold, chunk_rows=self.chunk_rows)
            return self.ce_weight * nll, {"ce": nll.detach(), "tokens": tokens}
        teacher = teacher_of(columns, gold, self.temperature)
        kd, weigh = self.kind.kd, self.kind.weight

        def per_position(read: Readings, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            there = teacher.at(rows)
            divergence = kd(there, read) * self.temperature**2  # [n]
            weight = weigh(there, read) if weigh else divergence.new_ones(len(divergence))  # [n]
            loss = self.ce_weight * read.nll + self.kl_lambda * weight * divergence
            return loss, {"ce": read.nll, "kd": divergence, "weight": weight}

        total, figures = chunked_loss(
            hidden, head, columns["topk_ids"].long(), teacher.present, gold, per_position,
            temperature=self.temperature, chunk_rows=self.chunk_rows,
        )  # fmt: skip
        return total, {**figures, "tokens": tokens}
