"""Rows for new tokens: each starts as the mean of the rows of its pieces under the old tokenizer.

A model whose vocabulary was extended this way says nearly what it said before, and training goes on from
there (RuAdapt, Vikhr). The LM head follows the same rule on its own rows, so tied matrices stay tied. Old
rows keep their bytes. Nothing is trained here (see pretrain.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adaptation.pieces import averages, old_pieces
from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError
from foundation.model import read_config
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, one
from foundation.tensors import HEAD, TensorFiles, write_config, write_tensors
from foundation.tokenizer import copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Settings(StageSettings):
    """How a token's pieces are weighed."""

    weighting: Literal["mean", "exponential"] = Field(
        "mean",
        description="equal weights, or exp(-decay * i) for the i-th piece, which favours beginnings",
    )
    decay: float = Field(0.5, gt=0, le=50, description="decay per piece of the exponential weights")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Give `model` the vocabulary of `tokenizer`; writes out/model."""
    model, extended = one(inputs, "model"), one(inputs, "tokenizer")
    old, new = TokenizerJson.read(model), TokenizerJson.read(extended)
    added = added_tokens(old, new)
    files = TensorFiles(model)
    old_rows = files.shape(files.embedding())[0]
    if old_rows < old.size:
        raise ModelError(f"{model}: {old_rows} rows of embeddings for {old.size} tokens")
    pieces = old_pieces(added.values(), old)
    _note_unknown(pieces, old, report)
    rows = max(old_rows, new.size)
    decay = settings.decay if settings.weighting == "exponential" else 0.0
    matrices = {files.embedding(), HEAD}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(files.items(), start=1):
            yield (
                name,
                grown(tensor, rows, list(added), averages(tensor, pieces, decay))
                if name in matrices
                else tensor,
            )
            report.progress(done, len(files), "tensor")

    folder = out / "model"
    write_tensors(folder, tensors())
    write_config(folder, read_config(model), rows)
    copy_tokenizer(extended, folder)
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", folder / "generation_config.json")
    return {
        "tokens_added": len(added),
        "embedding_rows": rows,
        "pieces_per_new_token": sum(map(len, pieces)) / max(1, len(pieces)),
    }


def added_tokens(old: TokenizerJson, new: TokenizerJson) -> dict[int, str]:
    """Id -> token of what `new` has beyond `old`, by id.

    Raises ModelError unless every old token keeps its id and the new ids follow without a gap.
    """
    moved = [token for token, i in old.vocab.items() if new.vocab.get(token) != i]
    if moved:
        raise ModelError(
            f"{new.folder} does not extend {old.folder}: {len(moved)} tokens are missing or have other ids, "
            f"among them {moved[:3]}",
            hint="extend this model's own tokenizer with adaptation.vocabulary",
        )
    added = {
        i: token for token, i in sorted(new.vocab.items(), key=lambda item: item[1]) if token not in old.vocab
    }
    if sorted(added) != list(range(old.size, new.size)):
        raise ModelError(f"{new.folder}: the ids of new tokens do not run from {old.size} to {new.size - 1}")
    return added


def grown(matrix: Tensor, rows: int, ids: list[int], values: Tensor) -> Tensor:
    """`matrix` with `rows` rows, `values` at `ids`, its other rows and its dtype kept.  # [rows, D]"""
    out = matrix.new_zeros(rows, matrix.shape[1])
    out[: matrix.shape[0]] = matrix
    out[ids] = values.to(matrix.dtype)
    return out


def _note_unknown(pieces: list[list[int]], old: TokenizerJson, report: Report) -> None:
    unknown = old.vocab.get(old.content["model"].get("unk_token") or "")
    count = sum(unknown in ids for ids in pieces)
    if count:
        report.note(f"{count} new tokens hold characters that the old tokenizer reads as unknown")
