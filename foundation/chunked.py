"""Losses of the next token, computed over chunks of positions: [N, V] is never held, nor its gradient.

Every loss of this project looks at the logits z [V] of a position only through a few numbers, its readings:
log q at K chosen ids (a teacher's entries, or the gold token), the log of the student's mass off them, and
log q at the gold token. So a loss is a plain function of readings, written elsewhere, and its gradient in z
follows from its derivatives a_k, c, b in them, in closed form:

    dz_j = a_j - A q_j  on the ids      dz_j = (c - A exp(off)) r_j  off them      A = sum a + b + c
    (+ b at the gold id)                r = softmax over the ids off them

Off the ids that is one number a row times what is already in the buffer, so a chunk needs one buffer [n, V],
worked on in place. The gradient is made in the forward pass, right after the readings: three matrix products
in all, as many as the logits held in full would take, and none is done twice.

The mass off the ids is summed over them with its own maximum, never had as 1 - sum q, which cancels.
Products take the operands as they are (bfloat16 on a GPU); logits, readings, and all sums are float32, or
float64 where hidden states and head are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from foundation.head import Head

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = {"cuda": 640 * 2**20, "cpu": 128 * 2**20}  # all [n, V] buffers of a chunk together
BLOCK_BYTES = 64 * 2**20  # of a weight that is converted before it is multiplied


class Readings(NamedTuple):
    """What a loss sees of the student at n positions. Log-probabilities are at the temperature asked for."""

    entries: torch.Tensor  # [n, K] log q at the ids; 0 where there is no entry
    off: torch.Tensor  # [n] log of the mass off the ids; -inf where they are the whole vocabulary
    gold: torch.Tensor  # [n] log q at the gold id, among the ids or not
    nll: torch.Tensor  # [n] -log q at the gold id at temperature 1
    logit: torch.Tensor  # [n] the model's logit at the gold id, detached


Gradients = list["torch.Tensor | None"]

PerPosition = Callable[[Readings, slice], "tuple[torch.Tensor, dict[str, torch.Tensor]]"]
"""(readings of the positions in a slice, the slice) -> (loss [n], figures: name -> [n], for the record)"""

PerChunk = Callable[
    ["torch.Tensor", slice], "tuple[torch.Tensor, dict[str, torch.Tensor], Callable[[], torch.Tensor]]"
]
"""(logits z [n, V] of the positions in a slice, the slice) -> (loss [n], figures: name -> [n], what then gives
d(sum of loss)/dz [n, V]); z may be used up"""


def chunked_nll(hidden: torch.Tensor, head: Head, gold: torch.Tensor, *, chunk_rows: int = 0) -> torch.Tensor:
    """Sum over N positions of -log p(gold); hidden [N, D], gold [N] ids."""
    import torch

    there = torch.ones_like(gold, dtype=torch.bool)[:, None]
    total, _ = chunked_loss(
        hidden, head, gold[:, None], there, gold, lambda read, _: (read.nll, {}), chunk_rows=chunk_rows
    )
    return total


def chunked_loss(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    present: torch.Tensor,
    gold: torch.Tensor,
    per_position: PerPosition,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of a loss over N positions, sums of its figures), both scalars; figures carry no gradient.

    hidden [N, D]; ids [N, K] int64, those of a row distinct where present [N, K] is true, any valid id where
    it is not; gold [N]. chunk_rows = 0: as many positions at once as CHUNK_BYTES holds. A second backward
    pass through the result is refused: the gradient is scaled in place.
    """
    reader = _Reader(ids, present, gold, per_position, temperature)
    return over_chunks(hidden, head, reader, buffers=1 + (temperature != 1), chunk_rows=chunk_rows)


def over_chunks(
    hidden: torch.Tensor, head: Head, per_chunk: PerChunk, *, buffers: int, chunk_rows: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of a loss over N positions, sums of its figures), as in chunked_loss, of any loss of whole logits.

    buffers: how many [n, V] a chunk needs, its logits among them, without soft-cap and half precision.
    """
    import torch

    tensors = multiplied(hidden, head)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    job = _Job(head, per_chunk, buffers, chunk_rows, wanted)
    total, sums = _function().apply(job, *tensors)
    return total, dict(zip(job.names, sums.unbind(), strict=True))


def multiplied(hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    """What makes logits: (its input [N, D_f], its weight [V, D_f]) of each factor, and the bias [V]."""
    pairs = [(project(hidden), weight) for project, weight in head.factors]
    return [tensor for pair in pairs for tensor in pair] + ([] if head.bias is None else [head.bias])


@cache
def _function() -> Any:
    """The autograd function, made at first use, since torch is not imported with this module."""
    import torch

    class ChunkedLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, job: _Job, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with half_products(job.head.operand):
                total, sums, ctx.gradients = job.run(tensors)
            ctx.mark_non_differentiable(sums)
            return total, sums

        @staticmethod
        def backward(ctx: Any, factor: torch.Tensor, _: Any) -> Any:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError("a chunked loss can be differentiated once")
            return None, *(None if g is None else g.mul_(factor) for g in gradients)

    return ChunkedLoss


class _Job:
    """One call: everything but the tensors that may have gradients."""

    def __init__(
        self, head: Head, per_chunk: PerChunk, buffers: int, chunk_rows: int, wanted: list[bool]
    ) -> None:
        self.head, self.per_chunk, self.buffers = head, per_chunk, buffers
        self.chunk_rows, self.wanted = chunk_rows, wanted
        self.names: tuple[str, ...] = ()

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Gradients | None]:
        """(total, sums in the order of self.names, gradients of `tensors`: None for those not wanted)."""
        import torch

        weight = tensors[1]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        logits = Logits(self.head, tensors, dtype)
        gradients = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if wanted else None
            for tensor, wanted in zip(tensors, self.wanted, strict=True)
        ]
        count, vocab = len(tensors[0]), self.head.vocab_tokens
        rows = max(1, min(self.chunk_rows or self._rows_at_once(logits.products[0], dtype), count))
        buffer = torch.empty((rows, vocab), dtype=dtype, device=weight.device)
        total, parts = buffer.new_zeros(()), list[list[torch.Tensor]]()
        for start in range(0, max(count, 1), rows):  # once for no position at all: it names the figures
            at = slice(start, min(start + rows, count))
            z = buffer[: at.stop - at.start]  # [n, V]
            read = logits.write(at, z)
            slope = cap(z, self.head, sloped=any(self.wanted))
            loss, figures, differentiate = self.per_chunk(z, at)
            total += loss.detach().sum()
            parts.append([value.sum().to(dtype) for value in figures.values()])
            if any(self.wanted):
                dz = differentiate()
                if self.head.scale != 1:
                    dz.mul_(self.head.scale)
                if slope is not None:
                    dz.mul_(slope)
                logits.spread(dz, read, gradients, at)
                del dz
            del differentiate, slope  # they hold buffers [n, V], which the next chunk makes anew
        self.names = tuple(figures)
        sums = [torch.stack(chunks).sum() for chunks in zip(*parts, strict=True)]
        return total, torch.stack(sums) if sums else total.new_zeros(0), gradients if any(self.wanted) else None

    def _rows_at_once(self, product: Product, dtype: torch.dtype) -> int:
        """Positions whose [n, V] buffers fit CHUNK_BYTES, with what soft-cap and half precision add."""
        device = product.weight.device.type
        wide = self.buffers + (self.head.cap < math.inf)
        bytes_each = wide * dtype.itemsize + (product.operand.itemsize if product.mixed else 0)
        return CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (bytes_each * self.head.vocab_tokens)


class Logits:
    """Logits of N positions, a chunk at a time, and what their gradient means for what made them."""

    def __init__(self, head: Head, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """tensors: as `multiplied` gives them."""
        paired = 2 * len(head.factors)
        self.inputs, weights, self.bias = tensors[:paired:2], tensors[1:paired:2], tensors[paired:]
        # Beside the head itself a factor is thin (LoRA): full precision costs it little.
        self.products = [Product(w, head.operand if n == 0 else dtype, dtype) for n, w in enumerate(weights)]

    def write(self, at: slice, z: torch.Tensor) -> list[torch.Tensor]:
        """Write those of some positions, before scale and soft-cap, over z [n, V]; returns what was read."""
        read = [product.operands(x[at]) for product, x in zip(self.products, self.inputs, strict=True)]
        for number, (product, x) in enumerate(zip(self.products, read, strict=True)):
            product.forward(x, z, add=number > 0)
        for vector in self.bias:
            z += vector
        return read

    def spread(self, dz: torch.Tensor, read: list[torch.Tensor], gradients: Gradients, at: slice) -> None:
        """Add what dz [n, V] means for each of the tensors that has a gradient; dz is used up."""
        for vector in gradients[2 * len(self.products) :]:
            if vector is not None:
                vector += dz.sum(0)
        for number in reversed(range(len(self.products))):  # the head itself last: it may use dz up
            towards_input, towards_weight = gradients[2 * number : 2 * number + 2]
            chunk = None if towards_input is None else towards_input[at]
            self.products[number].backward(dz, read[number], chunk, towards_weight)


@dataclass(frozen=True)
class _Reader:
    """A PerChunk of a loss that sees readings alone."""

    ids: torch.Tensor
    present: torch.Tensor
    gold: torch.Tensor
    per_position: PerPosition
    temperature: float

    def __call__(
        self, z: torch.Tensor, at: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Callable[[], torch.Tensor]]:
        import torch

        gold, warm = self.gold[at][:, None], self.temperature != 1
        logit = z.gather(1, gold).squeeze(1)  # [n]
        cold = Spread(z.clone(), gold, torch.ones_like(gold, dtype=torch.bool)) if warm else None
        spread = Spread(z.div_(self.temperature) if warm else z, self.ids[at], self.present[at])
        leaves = [spread.entries, spread.off, logit / self.temperature - spread.log_z]
        if cold:
            leaves.append(-cold.entries[:, 0])
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            entries, off, at_gold = leaves[:3]
            read = Readings(entries, off, at_gold, leaves[3] if warm else -at_gold, logit)
            loss, figures = self.per_position(read, at)

        def differentiate() -> torch.Tensor:
            if not loss.requires_grad:
                return z.zero_()
            slopes = torch.autograd.grad(
                loss, leaves, torch.ones_like(loss), allow_unused=True, materialize_grads=True
            )
            on, off, at_gold = slopes[:3]
            spread.differentiate(on, off, at_gold, gold)
            if cold:
                nothing = torch.zeros_like(spread.off)
                cold.differentiate(-slopes[3][:, None], nothing, nothing, gold)
                z.div_(self.temperature).add_(cold.z)
            return z

        return loss, {name: value.detach() for name, value in figures.items()}, differentiate


def cap(z: torch.Tensor, head: Head, *, sloped: bool = False) -> torch.Tensor | None:
    """Apply the head's scale and soft-cap to z [n, V] in place; returns the cap's slope where `sloped` asks."""
    if head.cap == math.inf:
        z.mul_(head.scale) if head.scale != 1 else None
        return None
    z.mul_(head.scale / head.cap).tanh_()
    slope = z.square().neg_().add_(1) if sloped else None  # [n, V]
    z.mul_(head.cap)
    return slope


class Spread:
    """A softmax over [n, V] told as its entries at K ids a row and the rest; works in place on `z`."""

    def __init__(self, z: torch.Tensor, ids: torch.Tensor, present: torch.Tensor) -> None:
        import torch

        self.z, self.ids, self.present = z, ids, present
        there = z.gather(1, ids)  # [n, K]
        # Adding -inf or 0, not writing: where an id stands for no entry, its logit stays as it is.
        z.scatter_add_(1, ids, torch.zeros_like(there).masked_fill_(present, -math.inf))
        top = z.amax(1)
        top.masked_fill_(top == -math.inf, 0.0)  # every id is an entry
        z.sub_(top[:, None]).exp_()
        self.mass = z.sum(1)  # [n] relative to exp(top)
        rest = top + self.mass.log()
        self.log_z = there.masked_fill(~present, -math.inf).logsumexp(1).logaddexp(rest)  # [n]
        self.off = rest - self.log_z  # [n]
        self.entries = (there - self.log_z[:, None]).masked_fill_(~present, 0.0)  # [n, K]

    def differentiate(
        self, on: torch.Tensor, off: torch.Tensor, at_gold: torch.Tensor, gold: torch.Tensor
    ) -> None:
        """Turn z into dz, given a loss's derivatives in the entries [n, K], in `off` [n] and at gold [n, 1]."""
        on = on.masked_fill(~self.present, 0.0)
        whole = on.sum(1) + off + at_gold  # [n]
        share = (off - whole * self.off.exp()) / self.mass
        self.z.mul_(share.masked_fill_(self.mass == 0, 0.0)[:, None])
        mass = self.entries.exp().masked_fill_(~self.present, 0.0)
        self.z.scatter_add_(1, self.ids, on - whole[:, None] * mass)
        self.z.scatter_add_(1, gold, at_gold[:, None])


@contextmanager
def half_products(operand: torch.dtype | None) -> Iterator[None]:
    """On a CPU, where autocast asks for bfloat16: let float32 operands be rounded to it inside the products.

    torch then takes oneDNN, which does so where the CPU has the units for it, and keeps float32 results; on
    others it stays exact, and is twice as fast as torch's own choice on AMD.
    """
    import torch

    setting = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if operand != torch.bfloat16 or setting is None:
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class Product:
    """x W^T and its two derivatives in `dtype`, whatever W [V, D] is stored in; W is never copied whole.

    On a GPU half-precision operands (W's own, or autocast's) are multiplied with a float32 result; elsewhere
    torch has no such product, and W is multiplied as float32. Where W has to be converted for it, that is done
    to a block of its rows at a time.
    """

    def __init__(self, weight: torch.Tensor, operand: torch.dtype | None, dtype: torch.dtype) -> None:
        wanted = operand or weight.dtype
        self.mixed = weight.device.type == "cuda" and wanted.itemsize < dtype.itemsize
        self.weight, self.dtype = weight, dtype
        self.operand = wanted if self.mixed else dtype

    def operands(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the type in which they are multiplied."""
        return hidden.to(self.operand)

    def forward(self, x: torch.Tensor, z: torch.Tensor, *, add: bool) -> None:
        """z [n, V] = x [n, D] W^T, or z += when `add` (not for mixed products)."""
        import torch

        for rows, weight in self._blocks():
            if self.mixed:
                torch.mm(x, weight.t(), out_dtype=self.dtype, out=z[:, rows])
            else:
                torch.addmm(z[:, rows], x, weight.t(), beta=float(add), out=z[:, rows])

    def backward(
        self, dz: torch.Tensor, x: torch.Tensor, dx: torch.Tensor | None, dw: torch.Tensor | None
    ) -> None:
        """dx [n, D] += dz W and dw [V, D] += dz^T x, each where it is not None; `dz` may be used up."""
        if self.mixed:
            self._backward_mixed(dz, x, dx, dw)
            return
        for rows, weight in self._blocks():
            if dx is not None:
                dx.addmm_(dz[:, rows], weight)
            if dw is not None:
                dw[rows].addmm_(dz[:, rows].t(), x)

    def _backward_mixed(
        self, dz: torch.Tensor, x: torch.Tensor, dx: torch.Tensor | None, dw: torch.Tensor | None
    ) -> None:
        import torch

        half = dz.to(self.operand)  # [n, V]
        if dx is not None:
            for rows, weight in self._blocks():
                dx += torch.mm(half[:, rows], weight, out_dtype=self.dtype)
        if dw is not None:  # dz is free now: a product for some rows of W lands in it, and is added from there
            width = x.shape[1]
            room = dz.view(-1) if dz.numel() >= width else dz.new_empty(width)
            step = room.numel() // width
            for start in range(0, len(dw), step):
                some = dw[start : start + step]
                part = room[: some.numel()].view_as(some)
                torch.mm(half[:, start : start + step].t(), x, out_dtype=self.dtype, out=part)
                some += part

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, W[rows] as it is multiplied), one after another; all at once where W needs no conversion."""
        if self.weight.dtype == self.operand:
            yield slice(None), self.weight
            return
        step = max(1, BLOCK_BYTES // (self.operand.itemsize * self.weight.shape[1]))
        for start in range(0, len(self.weight), step):
            yield slice(start, start + step), self.weight[start : start + step].to(self.operand)
