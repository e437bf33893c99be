"""A teacher read over the conversations of one shard, without ever holding the logits of a whole sequence.

Rows go through the model in batches of equal length, as far as there are any. The batches are a function of the
shard's rows and the settings alone, because a batch's shape changes the rounding of a forward pass: so the
bytes of a shard do not depend on who writes it or on what was written before. (They do depend on the device,
its libraries and, where those split sums over threads, on their number.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foundation.chat import IGNORED
from foundation.chunked import Product, cap
from foundation.errors import ModelError
from foundation.head import Head, hidden_of
from foundation.losses import counted, predicting
from foundation.rows import Row, collate

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}  # what a chunk of logits and all that is made of it may take
LOGIT_BYTES = 16  # float32, and at most 12 bytes of what is made of it

Keep = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], dict[str, "torch.Tensor"]]
"""keep(logits [N, V] float32, gold [N], uniform [N, draws]) -> columns of the store; logits may be used up."""


def answer_tokens(row: Row) -> int:
    """Counted positions of a row: labels that some earlier token predicts."""
    return int((row["labels"][1:] != IGNORED).sum())


def batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Places of `rows` in batches of at most `batch_tokens` tokens, padding included, the longest rows first.

    A row that is longer than that is a batch of its own. Longest first: what does not fit the memory fails at
    once.
    """
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place]["input_ids"]), place))
    made: list[list[int]] = []
    for place in order:
        if made and (len(made[-1]) + 1) * len(rows[made[-1][0]]["input_ids"]) <= batch_tokens:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def read_shard(
    model: Any,
    rows: Sequence[Row],
    keep: Keep,
    uniform: Sequence[np.ndarray],
    *,
    vocab_tokens: int,
    temperature: float,
    batch_tokens: int,
    pad_id: int,
    after_batch: Callable[[int, int], None] = lambda rows, positions: None,
) -> dict[str, np.ndarray]:
    """Columns of the counted positions of `rows`, row after row.  # [P, ...]

    `uniform` holds the random numbers of each row [P_row, draws]. `after_batch` hears of (rows, positions)
    done.
    """
    import numpy as np
    import torch

    lengths = [answer_tokens(row) for row in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns: dict[str, np.ndarray] = {}
    for places in batches(rows, batch_tokens):
        batch = collate([rows[place] for place in places], pad_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        drawn = torch.from_numpy(np.concatenate([uniform[place] for place in places])).to(model.device)
        read = _read_batch(model, batch, drawn, keep, vocab_tokens, temperature)
        where = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
        for name, values in read.items():
            if name not in columns:
                columns[name] = np.empty((starts[-1], *values.shape[1:]), dtype=values.dtype)
            columns[name][where] = values
        if not np.isfinite(read["log_z"]).all():
            raise ModelError(
                "the teacher's logits are not numbers",
                hint="its weights hold NaN or infinity, or precision is too low",
            )
        after_batch(len(places), len(where))
    return columns


def _read_batch(
    model: Any,
    batch: dict[str, torch.Tensor],
    uniform: torch.Tensor,
    keep: Keep,
    vocab_tokens: int,
    temperature: float,
) -> dict[str, np.ndarray]:
    import torch

    with torch.inference_mode():
        hidden, head = hidden_of(model, batch)  # [B, T, D]
        hidden = predicting(hidden, batch["labels"])  # [N, D]
        gold = counted(batch["labels"], batch["labels"])  # [N]
        parts = [
            keep(logits.div_(temperature), gold[at], uniform[at])
            for at, logits in chunked_logits(hidden, cut(head, vocab_tokens))
        ]
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def cut(head: Head, vocab_tokens: int) -> Head:
    """The head over ids below `vocab_tokens` alone: rows that pad it are not even multiplied."""
    bias = None if head.bias is None else head.bias[:vocab_tokens]
    factors = tuple((project, weight[:vocab_tokens]) for project, weight in head.factors)
    return replace(head, factors=factors, bias=bias)


def chunked_logits(hidden: torch.Tensor, head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
    """(a slice of positions, their logits [n, V] in float32), over the N positions of `hidden` [N, D].

    All chunks lie in one buffer: the logits are good until the next chunk is asked for, and may be used up.
    """
    import torch

    budget_bytes = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    rows = min(len(hidden), max(1, budget_bytes // (LOGIT_BYTES * head.vocab_tokens)))
    read = [project(hidden) for project, _ in head.factors]
    products = [
        Product(weight, head.operand if number == 0 else None, torch.float32)
        for number, (_, weight) in enumerate(head.factors)
    ]
    buffer = torch.empty((rows, head.vocab_tokens), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), rows):
        at = slice(start, min(start + rows, len(hidden)))
        logits = buffer[: at.stop - at.start]  # [n, V]
        for number, (product, values) in enumerate(zip(products, read, strict=True)):
            product.forward(product.operands(values[at]), logits, add=number > 0)
        if head.bias is not None:
            logits += head.bias
        cap(logits, head)
        yield at, logits
