"""Rows for a new vocabulary: a token that the model had keeps its row, any other starts from its old pieces.

A row that starts as the mean of the rows of its pieces says nearly what the model said before, and training
goes on from there (RuAdapt, Vikhr). The LM head follows the same rule on its own rows, its bias too, so tied
matrices stay tied. `random` rows are the control that the means are judged by. Nothing is trained here (see
pretrain.py).

Where every old token keeps its id, old rows keep their bytes, padding included. Any other vocabulary gets a
matrix of its own size. A row that belongs to no token (a hole between ids, padding to a multiple) is the mean
of all rows that do: its logit is then the mean of their logits, so by Jensen's inequality it never has more
than the average token's probability, whatever the text. A row of zeros has the logit zero, which may well be
the highest of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from adaptation.ids import follow_ids, write_generation_config
from adaptation.pieces import BLOCK_ROWS, averages, kept, token_map
from adaptation.tokenizer_json import TokenizerJson
from adaptation.weights import HEAD_BIAS, Model
from foundation.errors import ModelError
from foundation.model import read_config
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, one
from foundation.tensors import HEAD, write_config, write_tensors
from foundation.tokenizer import copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Settings(StageSettings):
    """How a token's pieces are weighed."""

    weighting: Literal["mean", "exponential", "random"] = Field(
        "mean",
        description="equal weights, or exp(-decay * i) for the i-th piece, which favours beginnings; random: "
        "no pieces, but a normal distribution with the mean and deviation of the old rows (a control)",
    )
    decay: float = Field(0.5, gt=0, le=50, description="decay per piece of the exponential weights")
    rows_multiple_of: int = Field(
        0, ge=0, le=4096, description="pad the embedding to a multiple of this many rows; 0 leaves it as it is"
    )

    @model_validator(mode="after")
    def _decay_has_an_effect(self) -> Settings:
        if self.weighting != "exponential" and self.changed(["decay"]):
            raise ValueError(f"decay: no effect with weighting = {self.weighting!r}; leave it out")
        return self


@dataclass(frozen=True)
class Rows:
    """Where each row of the new matrices comes from."""

    total: int
    copied: dict[int, int]  # new row -> old row
    made: dict[int, list[int]]  # new row -> old rows of its pieces
    empty: list[int]  # rows of no token
    tokens: list[int]  # rows of tokens
    old_tokens: list[int]  # old rows of tokens
    gone: int  # old tokens that the new vocabulary has not

    @classmethod
    def between(cls, new: TokenizerJson, old: TokenizerJson, old_rows: int, multiple: int) -> Rows:
        """Raises ModelError for a token without pieces, and for ids that mostly belong to no token."""
        if new.size > 2 * len(new.vocab):
            raise ModelError(
                f"{new.folder}: ids run to {new.size - 1} for {len(new.vocab)} tokens",
                hint="most rows would belong to no token: check the ids in tokenizer.json",
            )
        same, pieces = kept(new, old), token_map(new, old)
        extends = all(new.vocab.get(token) == i and same.get(i) == i for token, i in old.vocab.items())
        total = max(old_rows, new.size) if extends else new.size
        total = -(-total // multiple) * multiple if multiple else total
        made = {i: ids for i, ids in enumerate(pieces) if ids and i not in same}
        tokens, old_tokens = (sorted(set(t.vocab.values())) for t in (new, old))
        gone = len(old_tokens) - len(set(same.values()))
        if extends:
            same = {i: i for i in range(old_rows) if i not in made}
        empty = [i for i in range(total) if i not in same and i not in made]
        return cls(total, same, made, empty, tokens, old_tokens, gone)


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Give `model` the vocabulary of `tokenizer`; writes out/model."""
    model, new = Model.read_folder(one(inputs, "model")), TokenizerJson.read(one(inputs, "tokenizer"))
    old, files = model.tokenizer, model.files
    config = read_config(model.folder)
    if HEAD not in files and not config.get("tie_word_embeddings", True):
        raise ModelError(
            f"{model.folder}: no {HEAD}, but config.json says that head and embeddings are not tied",
            hint="copy config.json and weights from the same model",
        )
    rows = Rows.between(new, old, model.shape[0], settings.rows_multiple_of)
    config = follow_ids(config, old, new)
    if settings.weighting != "random":
        _note_unknown(list(rows.made.values()), old, report)
    apart = settings.weighting == "random" and model.own_head
    matrices = {files.embedding(): 0, HEAD: int(apart), HEAD_BIAS: 2}  # name -> what is added to the seed

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, name in enumerate(files, start=1):
            stop_if_asked(report)
            tensor = model.read(name)
            if name in matrices:
                tensor = regrown(tensor, rows, settings, settings.seed + matrices[name])
            yield name, tensor
            report.progress(done, len(files), "tensor")

    folder = out / "model"
    write_tensors(folder, tensors())
    write_config(folder, config, rows.total)
    copy_tokenizer(new.folder, folder)
    write_generation_config(model.folder, folder, old, new)
    return {
        "tokens_added": len(rows.made),
        "tokens_kept": len(rows.tokens) - len(rows.made),
        "tokens_gone": rows.gone,
        "embedding_rows": rows.total,
        "rows_without_a_token": rows.total - len(rows.tokens),
        "pieces_per_new_token": sum(map(len, rows.made.values())) / max(1, len(rows.made)),
    }


def regrown(matrix: Tensor, rows: Rows, settings: Settings, seed: int) -> Tensor:
    """`matrix` (or the head's bias) for the new vocabulary, in its dtype.  # [V_new, D]"""
    if matrix.ndim == 1:
        return regrown(matrix[:, None], rows, settings, seed)[:, 0]
    out = matrix.new_empty(rows.total, matrix.shape[1])
    out[list(rows.copied)] = matrix[list(rows.copied.values())]
    for ids, values in _made(matrix, rows, settings, seed):
        out[ids] = values.to(matrix.dtype)
    if rows.empty:
        out[rows.empty] = moments(out, rows.tokens)[0].to(matrix.dtype)
    return out


def moments(matrix: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rows `ids`, in fp64.  # [D], [D]"""
    blocks = [ids[start : start + BLOCK_ROWS] for start in range(0, len(ids), BLOCK_ROWS)]
    none = matrix.new_zeros(matrix.shape[1]).double()
    mean = sum((matrix[block].double().sum(0) for block in blocks), start=none) / len(ids)
    squares = sum(((matrix[block].double() - mean).square().sum(0) for block in blocks), start=none)
    return mean, (squares / len(ids)).sqrt()


def _made(matrix: Tensor, rows: Rows, settings: Settings, seed: int) -> Iterator[tuple[list[int], Tensor]]:
    """Blocks of (new rows, their values in fp64)."""
    import torch

    decay = settings.decay if settings.weighting == "exponential" else 0.0
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = moments(matrix, rows.old_tokens) if settings.weighting == "random" else (None, None)
    ids = list(rows.made)
    for start in range(0, len(ids), BLOCK_ROWS):
        block = ids[start : start + BLOCK_ROWS]
        if mean is None or deviation is None:
            yield block, averages(matrix, [rows.made[i] for i in block], decay)
        else:
            drawn = torch.randn(len(block), len(mean), generator=generator, dtype=torch.float64)
            yield block, mean + deviation * drawn


def _note_unknown(pieces: list[list[int]], old: TokenizerJson, report: Report) -> None:
    unknown = old.vocab.get(old.unknown or "")
    count = sum(unknown in ids for ids in pieces)
    if count:
        report.note(f"{count} new tokens hold characters that the old tokenizer reads as unknown")
