"""Which layers of a cut model train, which are compared with the teacher's, and how their outputs are read.

Three numberings meet here: layers of the student (0 ... L-1), layers of the teacher, and gaps of the student
(gap g lies before its layer g, so 0 ... L). kept[j] is the teacher's layer that the student's layer j was: the
same weights' origin, however many were removed in between. Outputs are taken before the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from foundation.errors import ModelError
from foundation.healing import HiddenLoss

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]
"""(layer of the student, layer of the teacher)"""


def check_map(kept: Sequence[int], gaps: Sequence[int], layers: int, teacher_layers: int | None) -> None:
    """Raise ModelError unless `kept` maps all `layers` of the student into the teacher, and gaps are gaps."""
    if len(kept) != layers:
        raise ModelError(
            f"the map from student to teacher names {len(kept)} layers, the student has {layers}",
            hint="cut the model and make its map in one step",
        )
    rising = all(before < after for before, after in pairwise(kept))
    last = kept[-1] if teacher_layers is None else teacher_layers - 1
    if not rising or kept[0] < 0 or kept[-1] > last:
        raise ModelError(
            f"layers {list(kept)} are no part of a teacher of {last + 1} layers, in order",
            hint="the teacher is the model that all cuts began from, and the map counts its layers",
        )
    if wrong := [gap for gap in gaps if not 0 <= gap <= layers]:
        raise ModelError(f"gaps {wrong}: a model of {layers} layers has gaps 0 to {layers}")


def neighbours(gaps: Sequence[int], layers: int) -> list[int]:
    """The student's layers directly beside each gap, rising; a gap at an end has one."""
    return sorted({layer for gap in gaps for layer in (gap - 1, gap) if 0 <= layer < layers})


def pairs(
    hidden_loss: HiddenLoss, trained: Sequence[int], kept: Sequence[int], teacher_layers: int
) -> list[Pair]:
    """Layers that are drawn together: "last", the last of `trained`, both (once, where they are one), or all.

    LayerKD, Table 1. `trained` are layers of the student; where every weight or LoRA trains, all of them are.
    The student's last layer is drawn to the teacher's last, whichever it was itself: where the end of the model
    was cut, its own old output is where it stands already (measured: KL .107 -> .088 that way, .011 this way).
    """
    last = len(kept) - 1
    chosen: dict[HiddenLoss, set[int]] = {
        "none": set(),
        "last": {last},
        "trained": {max(trained)},
        "trained_last": {max(trained), last},
        "all": set(range(len(kept))),
    }
    return [
        (layer, teacher_layers - 1 if layer == last else kept[layer]) for layer in sorted(chosen[hidden_loss])
    ]


def layers_of(model: Any) -> Any:
    """The decoder's layers, of a plain model or one with adapters."""
    return model.get_decoder().layers


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

    handles = [layers_of(model)[index].register_forward_hook(keep(index)) for index in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
