"""How far a layer, or a block of layers, turns the hidden states: importance without a task, in one pass.

Block Influence (ShortGPT, Men et al. 2024):   BI_i = 1 - mean over tokens of cos(h_i, h_{i+1})
Angular distance (Gromov et al. 2024):         d(l, n) = arccos(cos(h_l, h_{l+n})) / pi at a row's last token

h_i is the input of layer i, h_L the output of the last layer BEFORE the final norm: after it, the last layer
would be charged with what the norm does. Sums are float64, padding does not count. Not here: which layer goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from foundation.errors import InputError, ModelError
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, collate, longest_first
from prune.walk import Walk

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel


def block_influence(
    model: PreTrainedModel, rows: Sequence[Row], report: Report, *, pad_id: int, batch_rows: int = 8
) -> np.ndarray:
    """BI of each layer, between 0 and 2, over all tokens of all rows.  # [L]

    Raises InputError when there are no rows, ModelError when hidden states are not finite.
    """
    import torch

    sums = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for batch, lengths in _batches(model, rows, report, pad_id, batch_rows):
        positions = torch.arange(batch["input_ids"].shape[1], device=lengths.device)
        sums += _cosine_sums(model, batch, positions < lengths[:, None])
    tokens = sum(len(row["input_ids"]) for row in rows)
    found: np.ndarray = _finite(1 - sums / tokens).numpy()
    return found


def angular_distances(
    model: PreTrainedModel,
    rows: Sequence[Row],
    report: Report,
    *,
    width: int,
    pad_id: int,
    batch_rows: int = 8,
) -> np.ndarray:
    """Angle / pi that the block of `width` layers from l on turns a row's last token by, its mean over rows.

    [L - width + 1], each between 0 and 1. Raises InputError when there are no rows, ModelError when the model
    has no block so wide, or hidden states are not finite.
    """
    import torch

    layers = len(model.model.layers)
    if not 1 <= width <= layers:
        raise ModelError(f"a block of {width} layers does not lie in a model of {layers}")
    sums = torch.zeros(layers - width + 1, dtype=torch.float64)
    for batch, lengths in _batches(model, rows, report, pad_id, batch_rows):
        states = _last_tokens(model, batch, lengths)  # [L + 1, B, D]
        angles = cosines(states[:-width], states[width:]).clamp(-1, 1).acos() / math.pi  # [L - width + 1, B]
        sums += angles.sum(1).cpu()
    found: np.ndarray = _finite(sums / len(rows)).numpy()
    return found


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between vectors [..., D]; 0 where one of them is zero.  # [...]"""
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / lengths.masked_fill(lengths == 0, 1.0)


def _batches(
    model: PreTrainedModel, rows: Sequence[Row], report: Report, pad_id: int, batch_rows: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches on the model's device, and how many tokens of each row are no padding [B]."""
    import torch

    if not rows:
        raise InputError("there are no rows to measure hidden states on")
    groups = longest_first([len(row["input_ids"]) for row in rows], batch_rows)
    for number, places in enumerate(groups, 1):
        stop_if_asked(report)
        chosen = [rows[place] for place in places]
        batch = {name: value.to(model.device) for name, value in collate(chosen, pad_id).items()}
        yield batch, torch.tensor([len(row["input_ids"]) for row in chosen], device=model.device)
        report.progress(number, len(groups), "batch")


def _cosine_sums(model: PreTrainedModel, batch: dict[str, torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens that are `real` [B, T] of the cosine of each layer's input and output.  # [L]"""
    import torch

    sums: list[torch.Tensor] = []
    before: list[torch.Tensor] = []

    def turn(_: int, hidden: torch.Tensor) -> None:
        now = hidden[real].double()  # [N, D]
        if before:
            sums.append(cosines(before.pop(), now).sum())
        before.append(now)

    with torch.inference_mode():
        walk = Walk(model, batch, turn)
        turn(len(walk.layers), walk.outputs)
        return torch.stack(sums).cpu()


def _last_tokens(model: PreTrainedModel, batch: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Hidden states of each row's last token before each layer, and after the last.  # [L + 1, B, D]"""
    import torch

    states: list[torch.Tensor] = []

    def pick(_: int, hidden: torch.Tensor) -> None:
        states.append(hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1].double())

    with torch.inference_mode():
        walk = Walk(model, batch, pick)
        pick(len(walk.layers), walk.outputs)
        return torch.stack(states)


def _finite(found: torch.Tensor) -> torch.Tensor:
    """`found` by layer; raises ModelError where one is no number."""
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"hidden states about layer {bad[0]} are not finite",
            hint="the weights hold NaN or infinity, or overflow: was the model trained in another precision?",
        )
    return found
