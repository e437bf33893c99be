"""Healing: a cut model learns from the model that it was cut from.

Loss (LayerKD, Kovalev & Tikhomirov 2025): KL(teacher || student) over the full vocabulary, plus the mean
squared error of the hidden states after the last trained layer and after the last layer, before the final norm.
Means over counted tokens, not sums over batch and vocabulary: the published sum scales with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.losses import logits_of, predicting
from foundation.report import Report
from foundation.rows import Row, Rows
from foundation.tune import TuneSettings, tune

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kept: Sequence[int],
    trained: Sequence[int],
    rows: Rows[Row],
    settings: TuneSettings,
    work: Path,
    report: Report,
    *,
    pad_id: int,
    hidden_weight: float,
) -> dict[str, float | int]:
    """Train layers `trained` (indices in the student; all of them = every weight) toward `teacher`, in place.

    kept[j] is the teacher's layer that the student's layer j was; so "the same layer" means the same weights'
    origin, however many were removed in between.
    """
    everything = len(trained) == len(kept)
    student.requires_grad_(everything)
    for index in trained:
        student.model.layers[index].requires_grad_(True)
    teacher.requires_grad_(False)
    pairs = {(max(trained), kept[max(trained)]), (len(kept) - 1, kept[-1])}
    loss = HealingLoss(student, teacher, sorted(pairs), hidden_weight)
    return tune(student, rows, loss, settings, work, report, pad_id=pad_id)


class HealingLoss:
    """KL + hidden_weight * sum of MSE over `pairs` of (student layer, teacher layer), per counted token."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pairs: Sequence[tuple[int, int]],
        hidden_weight: float,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.pairs, self.hidden_weight = list(pairs), hidden_weight

    def __call__(
        self, model: PreTrainedModel, batch: dict[str, torch.Tensor], items: torch.Tensor
    ) -> torch.Tensor:
        import torch
        from torch.nn.functional import kl_div

        labels = batch["labels"]
        with torch.no_grad(), layer_outputs(self.teacher, [t for _, t in self.pairs]) as target:
            wanted = predicting(logits_of(self.teacher, batch), labels).float().log_softmax(-1)  # [N, V]
        with layer_outputs(self.student, [s for s, _ in self.pairs]) as reached:
            given = predicting(logits_of(model, batch), labels).float().log_softmax(-1)  # [N, V]
        total = kl_div(given, wanted, reduction="sum", log_target=True)
        for own, other in self.pairs:
            distance = predicting(reached[own] - target[other], labels).float()  # [N, D]
            total = total + self.hidden_weight * distance.square().mean(-1).sum()
        return total / items


@contextmanager
def layer_outputs(model: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Outputs [B, T, D] of `layers` during the forward passes inside the block, before any final norm.

    Hooks, because output_hidden_states names the input of a layer, and gives the last one after the norm.
    """
    seen: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.model.layers[index].register_forward_hook(keep(index)) for index in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
