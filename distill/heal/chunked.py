"""A divergence between two live models, computed over chunks of positions.

Neither model's logits [N, V] are ever held for a batch, nor their gradient: a chunk needs three buffers [n, V]
(the student's logits, the teacher's, one to work in), a fourth where the student's logits are soft-capped. The
gradient is made in the forward pass, right after the loss, as in foundation/chunked.py; readings at a few ids,
which that file computes from one buffer, can not say what is needed here, since every id of the vocabulary has
its own target.

Products take the operands as they are (bfloat16 on a GPU); logits, losses, and all sums are float32, or float64
where the student's head is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.heal.divergence import Divergence
from foundation.chunked import CHUNK_BYTES, Product, cap, half_products
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
    tensors = _tensors(hidden, head)
    with torch.no_grad():
        teacher = _Side(target_head, _tensors(target, target_head))
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    job = _Job(head, teacher, divergence, chunk_rows, wanted)
    total: torch.Tensor = _function().apply(job, *tensors)
    return total


def _tensors(hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    """What a head multiplies: (its input [N, D_f], its weight [V, D_f]) of each factor, and the bias [V]."""
    pairs = [(project(hidden), weight) for project, weight in head.factors]
    return [tensor for pair in pairs for tensor in pair] + ([] if head.bias is None else [head.bias])


@cache
def _function() -> Any:
    """The autograd function, made at first use, since torch is not imported with this module."""
    import torch

    class ChunkedDivergence(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, job: _Job, *tensors: torch.Tensor) -> torch.Tensor:
            with half_products(job.head.operand):
                total, ctx.gradients = job.run(_Side(job.head, list(tensors)))
            return total

        @staticmethod
        def backward(ctx: Any, factor: torch.Tensor) -> Any:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError("a chunked divergence can be differentiated once")
            return None, *(None if g is None else g.mul_(factor) for g in gradients)

    return ChunkedDivergence


class _Side(NamedTuple):
    """One of the two models at N positions."""

    head: Head
    tensors: list[torch.Tensor]  # as _tensors gives them

    @property
    def inputs(self) -> list[torch.Tensor]:
        return self.tensors[: 2 * len(self.head.factors) : 2]

    @property
    def bias(self) -> list[torch.Tensor]:
        """One or none."""
        return self.tensors[2 * len(self.head.factors) :]

    def products(self, dtype: torch.dtype) -> list[Product]:
        """One a factor. Beside the head itself a factor is thin (LoRA): full precision costs it little."""
        weights = self.tensors[1 : 2 * len(self.head.factors) : 2]
        return [Product(w, self.head.operand if n == 0 else dtype, dtype) for n, w in enumerate(weights)]


class _Job(NamedTuple):
    """One call: everything but the tensors that may have gradients."""

    head: Head  # the student's
    teacher: _Side
    divergence: Divergence
    chunk_rows: int
    wanted: list[bool]

    def run(self, student: _Side) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """(sum of the divergence, gradients of the student's tensors: None for those not wanted)."""
        import torch

        weight = student.tensors[1]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        products, targets = student.products(dtype), self.teacher.products(dtype)
        gradients = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if wanted else None
            for tensor, wanted in zip(student.tensors, self.wanted, strict=True)
        ]
        count, vocab = len(student.inputs[0]), student.head.vocab_tokens
        rows = max(1, min(self.chunk_rows or _rows_at_once(student.head, products[0], dtype), count))
        buffers = [torch.empty((rows, vocab), dtype=dtype, device=weight.device) for _ in range(BUFFERS)]
        total = buffers[0].new_zeros(())
        for start in range(0, count, rows):
            at = slice(start, min(start + rows, count))
            z, t, spare = (buffer[: at.stop - at.start] for buffer in buffers)  # [n, V]
            _logits(self.teacher, targets, at, t, sloped=False)
            read, slope = _logits(student, products, at, z, sloped=any(self.wanted))
            loss, dz = self.divergence(z, t, spare)
            total += loss.sum()
            if any(self.wanted):
                if student.head.scale != 1:
                    dz.mul_(student.head.scale)
                if slope is not None:
                    dz.mul_(slope)
                _spread(dz, read, products, gradients, at)
            del slope  # [n, V], which the next chunk makes anew
        return total, gradients


def _rows_at_once(head: Head, product: Product, dtype: torch.dtype) -> int:
    """Positions whose [n, V] buffers fit CHUNK_BYTES, with what soft-cap and half precision add."""
    device, vocab = product.weight.device.type, head.vocab_tokens
    bytes_each = (BUFFERS + (head.cap < math.inf)) * dtype.itemsize
    bytes_each += product.operand.itemsize if product.mixed else 0
    rows: int = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (bytes_each * vocab)
    return rows


def _logits(
    side: _Side, products: list[Product], at: slice, z: torch.Tensor, *, sloped: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Write the logits of some positions over z [n, V]; returns the products' operands and the cap's slope."""
    read = [product.operands(x[at]) for product, x in zip(products, side.inputs, strict=True)]
    for number, (product, x) in enumerate(zip(products, read, strict=True)):
        product.forward(x, z, add=number > 0)
    for vector in side.bias:
        z += vector
    return read, cap(z, side.head, sloped=sloped)


def _spread(
    dz: torch.Tensor,
    read: list[torch.Tensor],
    products: list[Product],
    gradients: list[torch.Tensor | None],
    at: slice,
) -> None:
    """Add what the logits' gradient dz [n, V] means for each tensor; dz is used up."""
    for vector in gradients[2 * len(products) :]:
        if vector is not None:
            vector += dz.sum(0)
    for number in reversed(range(len(products))):  # the head itself last: it may use dz up
        towards_input, towards_weight = gradients[2 * number : 2 * number + 2]
        chunk = None if towards_input is None else towards_input[at]
        products[number].backward(dz, read[number], chunk, towards_weight)
