"""A divergence between two live models, computed over chunks of positions.

Neither model's logits [N, V] are ever held for a batch, nor their gradient: a chunk needs three buffers [n, V]
(the student's logits, the teacher's, one to work in), a fourth where the student's logits are soft-capped. How
chunks are made, and the gradient in the forward pass, is foundation/chunked.py; its readings at a few ids can
not say what is needed here, since every id of the vocabulary has its own target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distill.heal.divergence import Divergence
from foundation.chunked import Logits, cap, multiplied, over_chunks
from foundation.errors import ModelError
from foundation.head import Head

if TYPE_CHECKING:
    import torch

BUFFERS = 3  # [n, V] of a chunk, without soft-cap and half precision


def chunked_divergence(
    hidden: torch.Tensor,
    head: Head,
    target: torch.Tensor,
    target_head: Head,
    divergence: Divergence,
    *,
    chunk_rows: int = 0,
) -> torch.Tensor:
    """Sum over N positions of a divergence; its gradient flows into `hidden` [N, D] and what `head` trains.

    target [N, D_t] and target_head are the teacher's; nothing flows into them. chunk_rows = 0: as many
    positions at once as CHUNK_BYTES holds. A second backward pass through the result is refused: the gradient
    is scaled in place. Raises ModelError when the two heads speak of different numbers of ids.
    """
    import torch

    if head.vocab_tokens != target_head.vocab_tokens:
        raise ModelError(
            f"the student's head has {head.vocab_tokens} ids, the teacher's {target_head.vocab_tokens}",
            hint="heal toward the model that this one was cut from",
        )
    with torch.no_grad():
        taught = multiplied(target, target_head)
    room: list[torch.Tensor] = []  # [n, V] twice, made with the first chunk, which is the longest

    def per_chunk(
        z: torch.Tensor, at: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Callable[[], torch.Tensor]]:
        if not room:
            room.extend(torch.empty_like(z) for _ in range(BUFFERS - 1))
        t, spare = (buffer[: len(z)] for buffer in room)
        Logits(target_head, taught, z.dtype).write(at, t)
        cap(t, target_head)
        loss, dz = divergence(z, t, spare)
        return loss, {}, lambda: dz

    total, _ = over_chunks(hidden, head, per_chunk, buffers=BUFFERS, chunk_rows=chunk_rows)
    return total
