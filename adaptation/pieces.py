"""What a new token was before: the same token, or its pieces under the old tokenizer; averages of their rows.

Two tokens are the same where both are spelt alike and both are added tokens, or neither is: an added token is
matched in the text before any merge, so "<s>" as a control token and "<s>" as three characters of a text have
nothing in common. (Whether an added token is special only says when it is read and shown.)

The pieces of any other token come from the old merges run on the token as the vocabulary spells it. Going
through text would not do: a token on the way to a word may hold half a character, and SentencePiece puts a
space before every text. Only a control token that the old tokenizer does not know is read as the text it is.

The averages are the matrix T of LEP (arXiv 2412.21140, eq. 13), never built: rows are gathered and summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptation.tokenizer_json import BYTE_TOKEN, SPACE, TokenizerJson, from_byte_level, spelt_bytes
from foundation.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

BLOCK_ROWS = 2048  # rows averaged at once: a few hundred MB in fp64 where a row has 4096 numbers


def kept(new: TokenizerJson, old: TokenizerJson) -> dict[int, int]:
    """New id -> old id of the tokens that both have, by new id."""
    ours, theirs = added_tokens(new), added_tokens(old)
    plain = {token: i for token, i in old.vocab.items() if token not in theirs}
    same = {i: theirs[token] for token, i in ours.items() if token in theirs}
    for token, i in new.vocab.items():
        spelt = token if token in ours or new.family == old.family else _spelt(_raw(token, new), old)
        if token not in ours and spelt in plain:
            same[i] = plain[spelt]
    return dict(sorted(same.items()))


def token_map(new: TokenizerJson, old: TokenizerJson) -> list[list[int]]:
    """For each id below `new.size` its ids under `old`: the same token's, else its pieces'; [] for no token.

    Raises ModelError for a token that has no pieces.
    """
    same, control = kept(new, old), added_tokens(new)
    backend = old.backend()
    backend.encode_special_tokens = True
    pieces: list[list[int]] = [[] for _ in range(new.size)]
    for token, i in new.vocab.items():
        if i in same:
            pieces[i] = [same[i]]
        elif token in control:
            pieces[i] = backend.encode(token, add_special_tokens=False).ids
        else:
            pieces[i] = _pieces(token, new, old, backend)
        if not pieces[i]:
            raise ModelError(
                f"token {token!r} of {new.folder} has no pieces under the old tokenizer {old.folder}",
                hint="make the new tokenizer from this model's own (adaptation.vocabulary)",
            )
    return pieces


def added_tokens(tokenizer: TokenizerJson) -> dict[str, int]:
    """Added token -> id."""
    return {t["content"]: t["id"] for t in tokenizer.added}


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


def _pieces(token: str, new: TokenizerJson, old: TokenizerJson, backend: Tokenizer) -> list[int]:
    """Ids of a plain token under old's merges; none where they do not make up the whole of it."""
    raw = _raw(token, new)
    if new.family == old.family and not BYTE_TOKEN.fullmatch(token):
        spelt: str | None = token
    else:
        spelt = _spelt(raw, old)
    if spelt is not None:
        found = backend.model.tokenize(spelt)
        whole = "".join(piece.value for piece in found) == spelt if old.family == "bytes" else bool(found)
        return [piece.id for piece in found] if spelt and whole else []
    unknown = old.vocab.get(old.unknown or "", -1)
    ids = [old.vocab.get(f"<0x{byte:02X}>", unknown) for byte in raw or b""]
    return [] if -1 in ids else ids


def _raw(token: str, tokenizer: TokenizerJson) -> bytes | None:
    """The bytes that a plain token stands for; None where no text is ever cut into it."""
    if tokenizer.family == "bytes":
        try:
            return from_byte_level(token)
        except KeyError:
            return None
    if tokenizer.content["model"].get("byte_fallback") and BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(token[3:5])  # of <0x0A>
    return token.replace(SPACE, " ").encode()


def _spelt(raw: bytes | None, tokenizer: TokenizerJson) -> str | None:
    """`raw` as the tokenizer's vocabulary spells it; None where only tokens of single bytes would do."""
    if raw is None:
        return None
    if tokenizer.family == "bytes":
        return spelt_bytes(raw)
    try:
        return raw.decode().replace(" ", SPACE)
    except UnicodeDecodeError:
        return f"<0x{raw[0]:02X}>" if len(raw) == 1 and f"<0x{raw[0]:02X}>" in tokenizer.vocab else None
