"""From text to rows of tokens, and from rows to batches, at a position that can be resumed exactly.

Rows lie on disk as a flat array and are read through a memory map, so a corpus may be larger than memory.
The order is a function of (seed, position) alone: going on after a kill means going on at a number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from foundation.chat import IGNORED, Chat
from foundation.dataio import Message, blaming
from foundation.errors import InputError
from foundation.files import read_json, write_json
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, "np.ndarray"]
Item = TypeVar("Item", covariant=True)
T = TypeVar("T")
Marks = Callable[[Sequence[str], Sequence[Sequence[int]]], Iterable["np.ndarray"]]
"""(documents, the ids of each, boundary token included) -> for each a bool a token [T]"""

TEXTS_AT_ONCE = 512
MARK = 1 << 31  # the top bit of a packed token: its mark; ids have the other 31


class Rows(Protocol[Item]):
    """Anything with a length that gives an item for a number: a list, a memory map, a store."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


class PackedRows:
    """Documents joined end to end and cut into rows of `block_tokens`; all tokens but a row's first are labels.

    The first has nothing before it: were it counted, a step would be divided by tokens that it has no loss of.

    With a `boundary_id` no document sees another: position_ids restart at every boundary token, from which
    transformers makes block-diagonal attention. That token is still a label, of the document that it ends.
    With `marked` the rows have a column "marks", what `pack` was told of each token.
    """

    def __init__(
        self, path: Path, block_tokens: int, *, boundary_id: int | None = None, marked: bool = False
    ) -> None:
        import numpy as np

        self._tokens = np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, block_tokens)  # [N, T]
        self._boundary_id, self._marked = boundary_id, marked

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int, /) -> Row:
        import numpy as np

        stored = np.asarray(self._tokens[index], dtype=np.int64)
        ids = stored & (MARK - 1)
        labels = ids.copy()
        labels[0] = IGNORED
        row: Row = {"input_ids": ids, "labels": labels}
        if self._boundary_id is not None:
            row["position_ids"] = since_boundary(ids, self._boundary_id)
        if self._marked:
            row["marks"] = stored >= MARK
        return row


def since_boundary(ids: np.ndarray, boundary_id: int) -> np.ndarray:
    """How many tokens before each belong to its document: 0 at a boundary token and at the start.  # [T]"""
    import numpy as np

    places = np.arange(len(ids))
    starts = np.where(ids == boundary_id, places, 0)
    return places - np.maximum.accumulate(starts)


def pack(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    block_tokens: int,
    work: Path,
    *,
    apart: bool = False,
    marks: Marks | None = None,
    marks_from: str = "",
) -> PackedRows:
    """Tokenise `texts` once into `work`, each document after a boundary token, and cut them into rows.

    The last, unfilled row is dropped; a corpus shorter than one row is repeated until it fills one. With
    `apart` no document of a row sees another. `marks` gives each token a bit, stored beside it; `marks_from`
    names what it is made from. Raises InputError when there is no token at all. A finished file is used again
    by a resumed stage.
    """
    import numpy as np

    path, marker = work / "tokens.bin", work / "tokens.json"
    facts = {"tokenizer": tokenizer.digest, "block_tokens": block_tokens, "marks": marks_from}
    done = read_json(marker)
    size_bytes = path.stat().st_size if path.is_file() else -1
    if done != {**facts, "size_bytes": size_bytes}:
        work.mkdir(parents=True, exist_ok=True)
        left: list[int] = []
        partial = work / f"tokens.{os.getpid()}.partial"  # every rank of a distributed run packs the same
        with partial.open("wb") as file:
            written = 0
            for ids in _encoded(texts, tokenizer, marks):
                left += ids
                whole = len(left) // block_tokens * block_tokens
                np.asarray(left[:whole], dtype=np.uint32).tofile(file)
                written += whole
                left = left[whole:]
            if not written:
                if not left:
                    raise InputError("the corpus holds no text to train on")
                repeated = (left * (block_tokens // len(left) + 1))[:block_tokens]
                np.asarray(repeated, dtype=np.uint32).tofile(file)
        partial.replace(path)
        write_json(marker, {**facts, "size_bytes": path.stat().st_size})
    boundary_id = tokenizer.boundary_id if apart else None
    return PackedRows(path, block_tokens, boundary_id=boundary_id, marked=marks is not None)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, marks: Marks | None) -> Iterator[list[int]]:
    """Tokens of each document, boundary token first, with MARK added where `marks` says so."""
    import numpy as np

    for batch in batches_of(texts, TEXTS_AT_ONCE):
        encoded = [[tokenizer.boundary_id, *ids] for ids in tokenizer.encode_batch(batch)]
        if marks is None:
            yield from encoded
            continue
        for ids, marked in zip(encoded, marks(batch, encoded), strict=True):
            yield (np.asarray(ids, dtype=np.int64) + MARK * marked).tolist()


def batches_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


class ChatRows(NamedTuple):
    """Conversations as rows, and how many there are."""

    rows: list[Row]
    conversations: int  # that have a row
    too_long: int  # rows that were left out


def chat_rows(conversations: Iterable[list[Message]], tokenizer: Tokenizer, max_tokens: int) -> ChatRows:
    """The rows of conversations, labels on the assistant's tokens.

    A row longer than `max_tokens` is left out and counted, never cut: half an answer teaches the model to stop
    at random. Raises InputError when none is left, and as `rows_of_each` does.
    """
    rows: list[Row] = []
    used = too_long = 0
    for found in rows_of_each(conversations, tokenizer):
        fitting = [row for row in found if len(row["input_ids"]) <= max_tokens]
        too_long += len(found) - len(fitting)
        used += bool(fitting)
        rows += fitting
    if not rows:
        raise InputError(
            f"no conversation fits {max_tokens} tokens ({too_long} are longer)",
            hint="raise max_tokens, up to the context that the model was made for, or shorten them",
        )
    return ChatRows(rows, used, too_long)


def rows_of_each(conversations: Iterable[list[Message]], tokenizer: Tokenizer) -> Iterator[list[Row]]:
    """The rows of each conversation: one, or several where the template rewrites earlier turns (Chat.encode).

    Everything that trains on conversations or captures a teacher's answers to them splits them here. Raises
    ModelError and InputError, by file and line or else by number, for one that the template refuses.
    """
    import numpy as np

    chat = Chat(tokenizer)
    for number, messages in enumerate(conversations, 1):
        with blaming(messages, f"conversation {number}"):
            encoded = chat.encode(messages)
        yield [
            {
                "input_ids": np.asarray(ids, dtype=np.int64),  # [T]
                "labels": np.asarray(labels, dtype=np.int64),  # [T]
            }
            for ids, labels in encoded
        ]


class JoinedRows:
    """Conversations joined into rows of at most `block_tokens`, each seen by the model as if it stood alone.

    position_ids restart with every conversation, from which transformers makes block-diagonal attention where
    there is no attention mask. The first token of each is no label: nothing before it is its own. All other
    columns (a teacher's) come along. Which conversations share a row: first fit (Johnson 1973), in an order
    drawn from `seed`; at most 1.7 times as many rows as the best way needs, in practice a few per cent.
    """

    def __init__(self, rows: Rows[Row], block_tokens: int, seed: int) -> None:
        import numpy as np

        self._rows = rows
        lengths = [len(rows[place]["input_ids"]) for place in range(len(rows))]
        order = np.random.default_rng([seed, len(rows)]).permutation(len(rows)).tolist()
        self._groups = first_fit([lengths[place] for place in order], block_tokens)
        self._groups = [[order[place] for place in group] for group in self._groups]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int, /) -> Row:
        import numpy as np

        parts = [self._rows[place] for place in self._groups[index]]
        row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}  # [T, ...]
        row["position_ids"] = np.concatenate([np.arange(len(part["input_ids"])) for part in parts])  # [T]
        row["labels"][row["position_ids"] == 0] = IGNORED
        return row


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of `lengths` in groups of at most `capacity` together, each in the first with room for it."""
    import numpy as np

    room = np.empty(len(lengths), dtype=np.int64)  # of each group
    groups: list[list[int]] = []
    for place, length in enumerate(lengths):
        fits = room[: len(groups)] >= length
        group = int(fits.argmax()) if fits.any() else len(groups)
        if group == len(groups):
            groups.append([])
            room[group] = capacity
        groups[group].append(place)
        room[group] -= length
    return groups


def longest_first(lengths: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Places of `lengths` in batches of like ones, longest first: what does not fit memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]


class Endless(Generic[Item]):
    """`length` items drawn from `rows` epoch after epoch, each epoch in its own seeded order."""

    def __init__(self, rows: Rows[Item], length: int, seed: int) -> None:
        self._rows, self._length, self._seed = rows, length, seed
        self._epoch = -1
        self._order: Sequence[int] = ()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int, /) -> Item:
        import numpy as np

        if not 0 <= position < self._length:
            raise IndexError(position)
        epoch, place = divmod(position, len(self._rows))
        if epoch != self._epoch:
            draw = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, draw.permutation(len(self._rows)).tolist()
        return self._rows[self._order[place]]


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Rows of unequal length -> tensors [B, T, ...], padded at the right, with their attention mask [B, T].

    Columns other than input_ids and labels (a teacher's top-K) are padded with zeros. Rows with position_ids
    (joined conversations) get no mask: their padding, all at position 0, is then one conversation a token.
    """
    import numpy as np
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        padding = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
        out = np.full((len(rows), longest, *first.shape[1:]), padding, dtype=first.dtype)  # [B, T, ...]
        for place, row in enumerate(rows):
            out[place, : len(row[name])] = row[name]
        batch[name] = torch.as_tensor(out)
    if "position_ids" in batch:
        return batch
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest)[None, :] < lengths[:, None]).long()  # [B, T]
    return batch
