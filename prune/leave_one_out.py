"""What a model thinks of rows without each of its layers, for half the layer passes, with the same answers.

Layers 0 to i - 1 of the model without layer i are those of the whole model, so it starts at layer i + 1 with
the whole model's input of layer i. Over L layers that is L + L(L - 1)/2 passes of a batch through a layer;
running each of the L models whole takes L(L - 1). Depth is walked once: at layer j all models without an
earlier layer go through it together, so its weights are touched once a batch. L hidden states [B, T, D] are
held, above a cap in files (prune/spill.py).

Where `variants_at_once` is 1 the readings are, bit for bit, those of a model whose layer was removed, read in
the same batches; with more they differ by how the matrix products are rounded. Not here: scores, which the
tasks make of readings, and which layer goes (LayerKD, Kovalev & Tikhomirov 2025).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.chat import IGNORED
from foundation.errors import InputError
from foundation.files import write_atomic
from foundation.head import hidden_of
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, collate, longest_first
from foundation.task import Reading, read_tokens
from prune.spill import Spill
from prune.walk import Walk

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = {"cuda": 16384, "cpu": 2048}  # of all variants that go through a layer together
FORMAT = "1"  # of the files of readings

Table = dict[str, "np.ndarray"]
"""Readings of a batch by L + 1 models, the whole one first: nll, hit, kl [L + 1, n] over its rows in order."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Readings of all rows in the caller's order, and passes of one batch through one layer."""

    whole: list[Reading]
    without: list[list[Reading]]  # [L][rows]
    passes: int
    naive_passes: int  # L(L - 1) a batch: what L models run whole would take, the whole model not counted


def leave_one_out(
    model: PreTrainedModel,
    rows: Sequence[Row],
    report: Report,
    *,
    pad_id: int,
    work: Path,
    identity: str,
    batch_rows: int = 8,
    spill_bytes: int = 4 * 2**30,
    variants_at_once: int = 0,
    with_kl: bool = False,
    original: PreTrainedModel | None = None,
) -> LeaveOneOut:
    """Readings of `rows` by `model`, in evaluation mode, and by `model` without each of its L layers.

    `with_kl`: KL(original || this model) too, `original` being the whole model where none is given; its passes
    are not counted. `variants_at_once`: so many models go through a layer together; 0: as many as
    TOKENS_AT_ONCE allows. Hidden states above `spill_bytes` go to files under `work`.

    Each finished batch is kept under `work`, so a kill costs at most one, and the result is the same bits.
    `identity` names the weights of `model` and `original`: kept batches of another identity are not used.

    Raises InputError when there are no rows, RunError when the disk is full.
    """
    import torch

    if not rows:
        raise InputError("there are no rows to score layers on")
    layers = len(model.model.layers)
    groups = longest_first([len(row["input_ids"]) for row in rows], batch_rows)
    facts = [FORMAT, identity, layers, pad_id, batch_rows, variants_at_once, with_kl, original is not None]
    stem = _digest(facts, rows)
    readings: list[list[Any]] = [[None] * len(rows) for _ in range(layers + 1)]
    passes = 0
    with torch.inference_mode(), Spill(work / "spill", spill_bytes) as states:
        for number, places in enumerate(groups):
            chosen = [rows[place] for place in places]
            path = work / f"{stem}-{number:06d}.npz"
            table = _load(path, layers + 1, chosen)
            if table is None:
                stop_if_asked(report)
                table = _read_batch(model, chosen, states, pad_id, variants_at_once, with_kl, original)
                _save(path, table)
            passes += int(table.pop("passes"))
            for ours, theirs in zip(readings, _by_row(table, chosen), strict=True):
                for place, reading in zip(places, theirs, strict=True):
                    ours[place] = reading
            report.progress(
                number + 1, len(groups), "batch",
                held_bytes=states.peak_held_bytes, spilled_bytes=states.peak_filed_bytes,
            )  # fmt: skip
    return LeaveOneOut(readings[0], readings[1:], passes, len(groups) * layers * (layers - 1))


def _read_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    states: Spill,
    pad_id: int,
    variants_at_once: int,
    with_kl: bool,
    original: PreTrainedModel | None,
) -> Table:
    """Readings of one batch by L + 1 models, and `passes`."""
    import numpy as np

    batch = {name: value.to(model.device) for name, value in collate(rows, pad_id).items()}
    walk = Walk(model, batch, states.put)
    reference = None
    if with_kl:
        reference = (walk.hidden, walk.head) if original is None else hidden_of(original, batch)
    told = [read_tokens(walk.hidden, walk.head, batch["labels"], reference)]
    if not variants_at_once:
        budget = TOKENS_AT_ONCE.get(walk.hidden.device.type, TOKENS_AT_ONCE["cuda"])
        variants_at_once = max(1, budget // batch["labels"].numel())
    for outputs in _without_each(walk, states, variants_at_once):
        told.append(read_tokens(walk.finish(outputs), walk.head, batch["labels"], reference))
    table = {"passes": np.asarray(walk.passes)}
    for name in Reading._fields:
        columns = [np.concatenate([getattr(row, name) for row in by_row]) for by_row in told]
        table[name] = np.stack(columns)  # [L + 1, n]
    return table


def _without_each(walk: Walk, states: Spill, at_once: int) -> Iterator[torch.Tensor]:
    """Outputs [B, T, D] of the last layer for the model without layer 0, without layer 1, and so on.

    states[i] comes as the whole model's input of layer i, and is what the model without layer i has come to.
    """
    import torch

    layers = len(walk.layers)
    for layer in range(1, layers):
        for start in range(0, layer, at_once):
            variants = range(start, min(start + at_once, layer))
            each = [states.take(variant) for variant in variants]
            hidden = each[0] if len(each) == 1 else torch.cat(each)  # [n * B, T, D]
            del each
            outputs = walk.layer(layer, hidden)
            for variant, part in zip(variants, outputs.split(walk.batch_rows), strict=True):
                states.put(variant, part)
    for variant in range(layers):
        yield states.take(variant)


def _by_row(table: Table, rows: Sequence[Row]) -> Iterator[list[Reading]]:
    """For each model the readings of `rows`."""
    import numpy as np

    ends = np.cumsum(_counts(rows))[:-1]
    for of_model in zip(*(table[name] for name in Reading._fields), strict=True):
        columns = [np.split(values, ends) if values.size else [values] * len(rows) for values in of_model]
        yield [Reading(*row) for row in zip(*columns, strict=True)]


def _counts(rows: Sequence[Row]) -> list[int]:
    """Counted tokens of each row."""
    return [int((row["labels"][1:] != IGNORED).sum()) for row in rows]


def _digest(facts: list[Any], rows: Sequence[Row]) -> str:
    """What the readings follow from, in 16 digits."""
    import numpy as np

    digest = hashlib.sha256(repr(facts).encode())
    for row in rows:
        for name, column in sorted(row.items()):
            digest.update(f"{name} {column.dtype} {column.shape} ".encode())
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def _save(path: Path, table: Table) -> None:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **table)  # type: ignore[arg-type]  # numpy's stub takes a column for its own allow_pickle
    write_atomic(path, content.getvalue())


def _load(path: Path, models: int, rows: Sequence[Row]) -> Table | None:
    """The readings in `path`; None where there are none, or a disk has altered them."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            table = {name: file[name] for name in (*Reading._fields, "passes")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = table["nll"].shape == table["hit"].shape == (models, sum(_counts(rows)))
    return table if whole else None
