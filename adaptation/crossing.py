"""Rows of a new vocabulary, read as the old one would have them: the bridge between a model and its reference.

A token of the new vocabulary is its pieces in the old one (pieces.token_map), so a row is the pieces of its
tokens one after another. Where the reference would have cut the same text otherwise, it reads what it was not
made for; such positions are found once, against its own tokenisation of every document, and marked.

    exact after token x_t   the old tokenisation of the document has a boundary after x_t, and what it has in
                            place of x_t are exactly the pieces that x_t stands for

In an extension by merges every position is exact: new merges come after all old ones, so the new tokens of a
text are joined old ones. Not so in a vocabulary learnt anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaptation.pieces import added_tokens, kept, token_map
from adaptation.tokenizer_json import BYTE_TOKEN, SPACE, TokenizerJson
from foundation.chat import IGNORED
from foundation.errors import ModelError
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, Rows
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

ROWS_BETWEEN_REPORTS = 2048


class Expanded(NamedTuple):
    """A batch as the reference reads it."""

    input_ids: torch.Tensor  # [B, T_old] old ids, padded at the right
    position_ids: torch.Tensor  # [B, T_old] from 0 in every document; padding is all at 0
    ends: torch.Tensor  # [B, T] place of each new token's last piece


class Crossing:
    """New ids as old ones. Raises ModelError when the two vocabularies have nothing in common."""

    def __init__(self, new: Path, old: Path) -> None:
        import numpy as np

        ours, theirs = TokenizerJson.read(new), TokenizerJson.read(old)
        check_related(ours, theirs)
        pieces = token_map(ours, theirs)
        self.lengths = np.asarray([len(ids) for ids in pieces], dtype=np.int64)  # [V_new]
        self.starts = np.cumsum(self.lengths) - self.lengths  # [V_new]
        self.flat = np.asarray([i for ids in pieces for i in ids], dtype=np.int64)
        self.old_tokens = np.zeros(theirs.size, dtype=bool)  # [V_old] there is a token of that id
        self.old_tokens[list(theirs.vocab.values())] = True
        self._tokenizer = Tokenizer(old)
        self._bytes = _token_bytes(theirs)

    @property
    def digest(self) -> str:
        """Changes with the old tokenizer."""
        return self._tokenizer.digest

    def first(self) -> np.ndarray:
        """First piece of each new id, -1 for an id without a token.  # [V_new]"""
        import numpy as np

        at = np.minimum(self.starts, len(self.flat) - 1)
        return np.where(self.lengths > 0, self.flat[at], -1)

    def pieces(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(old ids of `ids`, one token's after another's [T_old]; place after each token's last [T])."""
        import numpy as np

        counts = self.lengths[ids]
        ends = np.cumsum(counts)
        inside = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        return self.flat[np.repeat(self.starts[ids], counts) + inside], ends

    def exact(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """For each document whether the position after each of its tokens is exact.  # bool [T]"""
        import numpy as np

        for ids, own in zip(encoded, self._tokenizer.encode_batch(list(texts)), strict=True):
            found, ends = self.pieces(np.asarray(ids, dtype=np.int64))
            real = np.asarray([self._tokenizer.boundary_id, *own], dtype=np.int64)
            yield self._agreeing(found, ends, real)

    def _agreeing(self, found: np.ndarray, ends: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Which new tokens, ending at `ends` of `found`, stand in `real` piece for piece.  # bool [T]"""
        import numpy as np

        here, there = np.cumsum(self._bytes[found]), np.cumsum(self._bytes[real])
        unknown = (self._bytes[found] < 0).any() or (self._bytes[real] < 0).any()
        if unknown or here[-1] != there[-1]:  # places can not be told: as far as both are the same
            shortest = min(len(found), len(real))
            same = np.zeros(len(found), dtype=bool)
            same[:shortest] = np.logical_and.accumulate(found[:shortest] == real[:shortest])
        else:
            at = np.searchsorted(there, here)  # the real token that ends where a piece does, if one does
            begins = here - self._bytes[found]
            same = (there[at] == here) & (real[at] == found) & (there[at] - self._bytes[real[at]] == begins)
        wrong = np.concatenate([[0], np.cumsum(~same)])
        exact: np.ndarray = np.diff(wrong[ends], prepend=0) == 0
        return exact

    def expand(self, ids: torch.Tensor, position_ids: torch.Tensor) -> Expanded:
        """A batch [B, T] as the reference reads it, on the same device."""
        import torch

        device = ids.device
        lengths, starts, flat = (
            torch.from_numpy(table).to(device) for table in (self.lengths, self.starts, self.flat)
        )
        counts = lengths[ids]  # [B, T]
        after = counts.cumsum(1)  # [B, T]
        before = after - counts  # [B, T]
        owner = torch.arange(ids.numel(), device=device).repeat_interleave(counts.flatten())  # [pieces]
        past = counts.flatten().cumsum(0) - counts.flatten()
        inside = torch.arange(len(owner), device=device) - past[owner]
        row, column = owner // ids.shape[1], before.flatten()[owner] + inside
        opened = torch.where(position_ids == 0, before, 0).cummax(1).values  # [B, T] where its document begins
        wide = torch.zeros(len(ids), int(after[:, -1].max()), dtype=torch.int64, device=device)  # [B, T_old]
        places = torch.zeros_like(wide)
        wide[row, column] = flat[starts[ids].flatten()[owner] + inside]
        places[row, column] = column - opened.flatten()[owner]
        return Expanded(wide, places, after - 1)


def check_related(new: TokenizerJson, old: TokenizerJson) -> None:
    """Raise ModelError unless both are of one family and have plain tokens in common."""
    hint = "the reference is the model whose vocabulary was changed (adaptation.embeddings reads it as `model`)"
    if new.family != old.family:
        raise ModelError(
            f"{new.folder} spells its tokens in {new.family}, the reference {old.folder} in {old.family}",
            hint=hint,
        )
    if not any(i not in added_tokens(new).values() for i in kept(new, old)):
        raise ModelError(f"{new.folder} and the reference {old.folder} have no piece in common", hint=hint)


def new_tokens(new: Path, old: Path) -> list[int]:
    """Ids of the tokens that `old` does not have. Raises ModelError when there are none."""
    ours, theirs = TokenizerJson.read(new), TokenizerJson.read(old)
    check_related(ours, theirs)
    found = sorted(set(ours.vocab.values()) - kept(ours, theirs).keys())
    if not found:
        raise ModelError(
            f"rows = 'new', but the reference {old} has all {len(ours.vocab)} tokens of {new}",
            hint="the reference is the model before its vocabulary was changed; or rows = 'all'",
        )
    return found


def survey(
    parts: Sequence[Rows[Row]], crossing: Crossing, context_tokens: int, report: Report
) -> tuple[int, int]:
    """(counted positions, those of them that are exceptions) in all rows.

    Raises ModelError when a document's part in a row is longer for the reference than its context, or when
    all positions are exceptions.
    """
    counted = exceptions = 0
    rows = sum(map(len, parts))
    for number, row in enumerate(row for part in parts for row in map(part.__getitem__, range(len(part)))):
        _refuse_too_long(row, crossing, context_tokens)
        here = row["labels"][1:] != IGNORED
        counted += int(here.sum())
        exceptions += int((here & ~row["marks"][:-1]).sum())
        if number % ROWS_BETWEEN_REPORTS == 0:
            stop_if_asked(report)
            report.progress(number, rows, "row")
    if exceptions == counted:
        raise ModelError(
            f"the reference's own tokenisation agrees nowhere with its reading of the {counted} counted tokens",
            hint="the reference is the model whose vocabulary was changed; or set kl_weight = 0",
        )
    return counted, exceptions


def _refuse_too_long(row: Row, crossing: Crossing, context_tokens: int) -> None:
    """Raise ModelError when a document in `row` is longer for the reference than its context."""
    import numpy as np

    after = np.cumsum(crossing.lengths[row["input_ids"]])
    begins = np.flatnonzero(row["position_ids"] == 0)
    longest = int(np.diff(after[[*begins[1:] - 1, -1]], prepend=0).max())
    if longest > context_tokens:
        block = len(row["input_ids"])
        raise ModelError(
            f"a row of {block} tokens holds a document of {longest} tokens for the reference, whose context is "
            f"{context_tokens}",
            hint=f"lower block_tokens to {max(8, block * context_tokens // longest)} or less, "
            "or set kl_weight = 0",
        )


def _token_bytes(tokenizer: TokenizerJson) -> np.ndarray:
    """How many bytes of text a token of each id stands for; -1 for the unknown token.  # [V_old]"""
    import numpy as np

    out = np.zeros(tokenizer.size, dtype=np.int64)
    added = added_tokens(tokenizer)
    for token, i in tokenizer.vocab.items():
        if token in added:
            out[i] = len(token.encode())
        elif tokenizer.family == "bytes":
            out[i] = len(token)  # a character is a byte
        else:
            out[i] = 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace(SPACE, " ").encode())
    if tokenizer.family == "characters" and tokenizer.unknown in tokenizer.vocab:
        out[tokenizer.vocab[tokenizer.unknown]] = -1
    return out
