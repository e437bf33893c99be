"""Remove a layer from a model, and everything in its configuration that is listed by layer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foundation.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def cut(model: PreTrainedModel, layer: int) -> None:
    """Remove `layer` in place; later layers move down by one, with their cache index and per-layer settings.

    Raises ModelError when there is no such layer, or it is the only one.
    """
    layers = model.model.layers
    total = len(layers)
    if not 0 <= layer < total or total == 1:
        raise ModelError(f"layer {layer} can not be removed from a model of {total} layers")
    del layers[layer]
    for index, module in enumerate(layers):
        module.self_attn.layer_idx = index
    for name, value in vars(model.config).items():
        if isinstance(value, list) and len(value) == total and not name.startswith("_"):
            setattr(model.config, name, value[:layer] + value[layer + 1 :])
    model.config.num_hidden_layers = total - 1


@contextmanager
def without(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """The model as if `layer` were not there, inside the block; nothing is copied. Needs use_cache off."""
    import torch

    whole: Any = model.model.layers
    model.model.layers = torch.nn.ModuleList(m for index, m in enumerate(whole) if index != layer)
    total, model.config.num_hidden_layers = model.config.num_hidden_layers, len(whole) - 1
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = whole, total
