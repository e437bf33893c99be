"""The loss of healing: logits and hidden states of a cut model against those of the model that it was cut from.

    L = logits + hidden_weight * hidden          each a mean over the counted tokens of the optimiser step
    logits   one of distill/heal/divergence.py, or of distill/losses where a top-K store is the teacher
    hidden   sum over pairs of layers ("all": mean over them) of mean_D (h_student - h_teacher)^2

LayerKD (Kovalev & Tikhomirov 2025). Positions are those that predict a counted label, in both parts: padding
and prompts have no say. Hidden states are taken before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.heal.chunked import chunked_divergence
from distill.heal.divergence import SHARE, divergence
from distill.heal.layers import Pair, layer_outputs
from distill.losses import LOSSES, make_loss
from foundation.chat import IGNORED
from foundation.errors import ModelError
from foundation.head import Head, hidden_of
from foundation.healing import HealSettings
from foundation.losses import counted, predicting

if TYPE_CHECKING:
    import torch

SERVED = {"kl": ("forward_kl", 1.0), "kl_100": ("forward_kl", SHARE), "kl_reverse": ("reverse_kl", 1.0)}
"""What a top-K store can serve: logit_loss -> (loss of distill.losses, weight)."""

Batch = dict[str, "torch.Tensor"]


class HealingLoss:
    """Sum of L over a batch's counted tokens / items. Every call adds to `sums`, which its reader empties.

    sums: "tokens" (how many were counted), "logits" and "hidden" (as in L, without hidden_weight) where they
    are part of it. student is the model itself, which the loop may hand in wrapped (DDP). Without a teacher the
    batch has a store's columns beside its labels.
    """

    def __init__(
        self, settings: HealSettings, student: Any, teacher: Any | None, layer_pairs: Sequence[Pair]
    ) -> None:
        self.settings, self.student, self.teacher = settings, student, teacher
        self.pairs = list(layer_pairs)
        self.share = 1 / len(self.pairs) if settings.hidden_loss == "all" else 1.0
        self.sums: dict[str, torch.Tensor] = {}
        self.chunk_rows = 0  # as many as fit

    def __call__(self, model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
        """Raises ModelError when there is no teacher and the batch lacks a column of the store."""
        labels = batch["labels"]
        target, wanted = self._target(batch)
        with layer_outputs(self.student, [own for own, _ in self.pairs]) as reached:
            hidden, head = hidden_of(model, batch)
        parts: dict[str, torch.Tensor] = {}
        if self.settings.logit_loss != "none":
            states = predicting(hidden, labels)  # [N, D]
            parts["logits"] = (
                self._stored(states, head, batch) if target is None else self._live(states, head, *target)
            )
        if self.pairs:
            parts["hidden"] = self.share * sum(
                squared_error(reached[own], wanted[other], labels) for own, other in self.pairs
            )
        tokens = (labels[:, 1:] != IGNORED).sum()
        for name, value in {**parts, "tokens": tokens}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        weights = {"logits": 1.0, "hidden": self.settings.hidden_weight}
        total: torch.Tensor = sum(weights[name] * value for name, value in parts.items()) / items
        return total

    def _target(self, batch: Batch) -> tuple[tuple[torch.Tensor, Head] | None, dict[int, torch.Tensor]]:
        """((the teacher's head input [N, D], its head), its layers' outputs); (None, {}) where none is live."""
        import torch

        if self.teacher is None:
            return None, {}
        with torch.no_grad(), layer_outputs(self.teacher, [other for _, other in self.pairs]) as seen:
            hidden, head = hidden_of(self.teacher, batch)
        return (predicting(hidden, batch["labels"]), head), seen

    def _live(self, hidden: torch.Tensor, head: Head, target: torch.Tensor, target_head: Head) -> torch.Tensor:
        kind = divergence(self.settings.logit_loss, self.settings.logit_temperature)
        return chunked_divergence(hidden, head, target, target_head, kind, chunk_rows=self.chunk_rows)

    def _stored(self, hidden: torch.Tensor, head: Head, batch: Batch) -> torch.Tensor:
        name, weight = SERVED[self.settings.logit_loss]
        if missing := [column for column in LOSSES[name].reads if column not in batch]:
            raise ModelError(
                f"the batch has no column {', '.join(missing)}", hint="lay the teacher's store beside the rows"
            )
        labels = batch["labels"]
        columns = {column: counted(batch[column], labels) for column in LOSSES[name].reads}  # [N, ...]
        loss = make_loss(name, kl_lambda=weight, ce_weight=0.0, temperature=1.0)
        loss.chunk_rows = self.chunk_rows
        return loss.of_hidden(hidden, head, counted(labels, labels), columns)[0]


def squared_error(own: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the positions that predict counted labels of mean_D (own - other)^2; own, other [B, T, D].

    In float32, or float64 where the student is, whatever the two models compute in.
    """
    import torch

    dtype = torch.promote_types(own.dtype, torch.float32)
    distance = predicting(own, labels).to(dtype) - predicting(other, labels).to(dtype)  # [N, D]
    return distance.square().mean(-1).sum()
