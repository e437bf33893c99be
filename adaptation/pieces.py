"""What a new token was before: its pieces under the old tokenizer, and averages of their rows.

A token's pieces come from the old merges run on the token as the vocabulary spells it. Going through text
would not do: a token on the way to a word may hold half a character, and SentencePiece puts a space before
every text.

The averages are the matrix T of LEP (arXiv 2412.21140, eq. 13), never built: rows are gathered and summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 16_384  # rows averaged at once


def old_pieces(tokens: Iterable[str], old: TokenizerJson) -> list[list[int]]:
    """For each new token, its ids under `old`. Raises ModelError for a token that has none."""
    model = old.backend().model
    pieces = []
    for token in tokens:
        found = model.tokenize(token)
        whole = "".join(piece.value for piece in found) == token if old.family == "bytes" else bool(found)
        if not token or not whole:
            raise ModelError(
                f"token {token!r} has no pieces under the old tokenizer {old.folder}",
                hint="the extended tokenizer must come from this model's own (adaptation.vocabulary)",
            )
        pieces.append([piece.id for piece in found])
    return pieces


def averages(matrix: Tensor, pieces: Sequence[Sequence[int]], decay: float = 0.0) -> Tensor:
    """Row n = sum of w_i * matrix[pieces[n][i]] with w_i ~ exp(-decay * i) and sum 1; in fp64.  # [N, D]

    Raises ModelError on an empty piece list: its mean would be NaN.
    """
    import torch

    empty = [n for n, ids in enumerate(pieces) if not ids]
    if empty:
        raise ModelError(f"{len(empty)} tokens have no pieces, the first is number {empty[0]}")
    out = torch.empty(len(pieces), matrix.shape[1], dtype=torch.float64)  # [N, D]
    for start in range(0, len(pieces), BLOCK_ROWS):
        block = pieces[start : start + BLOCK_ROWS]
        lengths = torch.tensor([len(ids) for ids in block])
        inside = torch.arange(int(lengths.max())) < lengths[:, None]  # [n, longest]
        weights = torch.exp(-decay * torch.arange(inside.shape[1], dtype=torch.float64)) * inside
        weights /= weights.sum(dim=1, keepdim=True)
        owner = torch.arange(len(block)).repeat_interleave(lengths)
        rows = matrix[torch.tensor([i for ids in block for i in ids])].double() * weights[inside][:, None]
        out[start : start + len(block)] = (
            torch.zeros(len(block), matrix.shape[1]).double().index_add_(0, owner, rows)
        )
    return out
