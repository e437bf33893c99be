"""A decoder taken apart: one batch goes through the whole model once, and after that through any layer alone.

How a family builds its masks, its rotary embeddings and its sliding windows is not repeated here. Every layer
is called as the model itself called it: what it was given beside the hidden states is kept from that one pass.
So a layer keeps its own kind of attention when its neighbours go, which is what cutting the checkpoint does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foundation.head import Head, hidden_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Walk:
    """One batch [B, T] in a model of L layers. Use inside torch.inference_mode().

    inputs[i] is the input [B, T, D] of layer i; outputs is that of the last layer, before the final norm;
    hidden is the head's input, after it. `passes` counts passes of one batch through one layer.
    `keep(i, input of layer i)` is called as the batch goes through, in place of keeping `inputs`: L of them at
    once may be more than the memory holds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: dict[str, torch.Tensor],
        keep: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self.model: Any = model
        self.layers = list(self.model.model.layers)
        self.inputs: list[torch.Tensor] = []
        self._hand_on = keep
        self._beside: list[dict[str, Any]] = []
        handles = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        handles.append(self.layers[-1].register_forward_hook(self._keep_last))
        try:
            self.hidden, self.head = hidden_of(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        self.batch_rows = self.hidden.shape[0]
        self.passes = len(self.layers)

    head: Head
    hidden: torch.Tensor
    outputs: torch.Tensor

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of layer `index` for `hidden` [n * B, T, D]: n variants of the batch, one after another."""
        copies = hidden.shape[0] // self.batch_rows
        self.passes += copies
        beside = {name: self._spread(value, copies) for name, value in self._beside[index].items()}
        return _states(self.layers[index](hidden, **beside))

    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """The head's input for outputs of the last layer [..., D]."""
        normed: torch.Tensor = self.model.model.norm(outputs)
        return normed

    def _keep(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._hand_on:
            self._hand_on(len(self._beside), hidden)
        else:
            self.inputs.append(hidden)
        self._beside.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    def _keep_last(self, _: Any, __: Any, output: Any) -> None:
        self.outputs = _states(output)

    def _spread(self, value: Any, copies: int) -> Any:
        """What belongs to the rows of the batch, for so many copies of it; what all rows share stays."""
        if isinstance(value, tuple):
            return tuple(self._spread(part, copies) for part in value)
        of_rows = getattr(value, "ndim", 0) > 1 and value.shape[0] == self.batch_rows
        return value.repeat(copies, *[1] * (value.ndim - 1)) if of_rows and copies > 1 else value


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states
