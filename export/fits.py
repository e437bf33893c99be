"""How many conversations fit a card: a first estimate of llama.cpp's memory, in pure Python.

    total = weights + KV memory + compute buffer + CUDA context

Weights and KV are exact. The compute buffer follows llama.cpp's graph with flash attention; on 2,376
measured contexts it was between 3.1 % under (at most 18 MiB, which is added here) and 7.5 % over. The
CUDA context is an ASSUMPTION: 107 to 555 MiB were reported, the largest is taken. What the desktop and
other programs hold is not known here and must be taken off the card's size by the caller.

Source: formulas checked against llama.cpp's own breakdown for 11 model shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foundation.shape import ModelShape

MIB = 2**20
ASSUMED_CUDA_CONTEXT_BYTES = 555 * MIB
COMPUTE_MARGIN_BYTES = 18 * MIB
MOST_SLOTS = 256  # llama.cpp's limit of sequences in one context
Cache = Literal["f16", "q8_0"]


@dataclass(frozen=True)
class Memory:
    """Device memory of one process that serves `slots` conversations of `context_tokens` each."""

    slots: int
    context_tokens: int  # what a slot really gets: llama.cpp rounds up to 256
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    cuda_context_bytes: int = ASSUMED_CUDA_CONTEXT_BYTES

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.cuda_context_bytes


def memory(
    shape: ModelShape,
    weights_bytes: int,
    context_tokens: int,
    *,
    slots: int = 1,
    cache: Cache = "f16",
    batch_tokens: int = 512,
) -> Memory:
    """Memory for `slots` conversations of at least `context_tokens` tokens each, split KV.

    `weights_bytes`: what the weights take on the card (export.ggufs.gpu_bytes).
    """
    per_slot = _pad256(context_tokens)
    return Memory(
        slots=slots,
        context_tokens=per_slot,
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes(shape, per_slot, slots=slots, cache=cache, batch_tokens=batch_tokens),
        compute_bytes=compute_bytes(shape, per_slot, outputs=slots, batch_tokens=batch_tokens)
        + COMPUTE_MARGIN_BYTES,
    )


def fits(
    shape: ModelShape, weights_bytes: int, card_bytes: int, context_tokens: int, *, cache: Cache = "f16"
) -> Memory | None:
    """The memory of as many slots of `context_tokens` as fit `card_bytes`; None when not even one does."""
    best = None
    for slots in range(1, MOST_SLOTS + 1):
        need = memory(shape, weights_bytes, context_tokens, slots=slots, cache=cache)
        if need.total_bytes > card_bytes:
            break
        best = need
    return best


def kv_bytes(shape: ModelShape, per_slot: int, *, slots: int, cache: Cache, batch_tokens: int) -> int:
    """Keys and values of all layers: exact. A sliding layer keeps its window and one batch."""
    values = shape.kv_heads * shape.head_dim
    row = values * 2 if cache == "f16" else values // 32 * 34  # a block of 32 q8_0 values takes 34 bytes
    cells = sum(_cells(window, per_slot, batch_tokens) for window in shape.windows)
    return cells * slots * row * 2


def compute_bytes(shape: ModelShape, per_slot: int, *, outputs: int, batch_tokens: int) -> int:
    """Scratch of one step with flash attention: the widest of the output layer and an inner layer."""
    kinds = {_cells(window, per_slot, batch_tokens) for window in shape.windows}
    logits = outputs * shape.vocab * 4 + 2 * shape.hidden * batch_tokens * 4
    layer = (3 * shape.ffn + 3 * shape.hidden + shape.heads * shape.head_dim) * batch_tokens * 4
    return max(logits, layer + 2 * batch_tokens * sum(kinds))


def _cells(window: int | None, per_slot: int, batch_tokens: int) -> int:
    """KV cells of one slot in a layer."""
    return per_slot if window is None else _pad256(min(per_slot, window + batch_tokens))


def _pad256(tokens: int) -> int:
    return -(-tokens // 256) * 256
