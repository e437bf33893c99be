"""Prompts and what follows them, as token ids: plain text after a boundary token, or a conversation.

No token reaches over the border between a prompt and what follows it, since a model is given whole prompts.
A continuation is written as the tokenizer writes it behind its prompt; where that would melt the border (a
prompt that ends in a space, then a word) it is encoded apart. In a chat it is always encoded apart, as
foundation/chat.py does in training, and the token that ends the turn is the last of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from foundation.chat import IGNORED, Chat
from foundation.dataio import Message
from foundation.errors import InputError
from foundation.rows import Row
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from foundation.report import Report

Record = dict[str, Any]  # one checked line of a task file


class Writer:
    """Lines of task files to ids, by one model's tokenizer; its chat template is needed by chats alone.

    `max_tokens` is what fits the model; a text that can be read in parts is read in windows of so many.
    """

    def __init__(self, tokenizer: Tokenizer, report: Report, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._report = report
        self._chat: Chat | None = None

    @property
    def chat(self) -> Chat:
        """Raises ModelError for a model without a chat template."""
        self._chat = self._chat or Chat(self.tokenizer)
        return self._chat

    def prompt(self, record: Record) -> list[int]:
        """Ids of "prompt" or "messages", ready for the model to go on."""
        if "messages" in record:
            return self.chat.prompt_ids(record["messages"])
        return [self.tokenizer.boundary_id, *self.tokenizer.encode(record["prompt"])]

    def continued(self, record: Record, text: str) -> Row:
        """The row of a prompt and `text` after it, labels on the tokens of `text`.

        Raises InputError when the tokenizer makes no token of it.
        """
        if "messages" in record:
            ids, labels = self.chat.encode([*record["messages"], {"role": "assistant", "content": text}])[-1]
            last = max((place for place, label in enumerate(labels) if label == IGNORED), default=0)
            labels[:last] = [IGNORED] * last  # earlier turns of the assistant are part of the prompt
        else:
            before = self.tokenizer.encode(record["prompt"])
            whole = self.tokenizer.encode(record["prompt"] + text)
            parted = whole[: len(before)] == before
            after = whole[len(before) :] if parted else self.tokenizer.encode(text)
            ids = [self.tokenizer.boundary_id, *before, *after]
            labels = [IGNORED] * (len(before) + 1) + after
        if all(label == IGNORED for label in labels):
            raise nothing_of(text)
        return row(ids, labels)

    def conversation(self, messages: list[Message]) -> list[Row]:
        """The rows of a whole conversation, labels on all of the assistant's tokens."""
        return [row(*encoded) for encoded in self.chat.encode(messages)]

    def fitting(
        self, name: str, records: Sequence[Record], write: Callable[[Record], list[Row]]
    ) -> list[tuple[Record, list[Row]]]:
        """Each record with its rows, where all of them fit; how many do not is told, and none is ever cut.

        Raises InputError when none fits.
        """
        written = [(record, write(record)) for record in records]
        fit = [
            (record, rows)
            for record, rows in written
            if max(len(row["input_ids"]) for row in rows) <= self.max_tokens
        ]
        self.left_out(name, len(records), len(fit))
        return fit

    def left_out(self, name: str, items: int, fit: int) -> None:
        """Tell how many of a task's items do not fit. Raises InputError when that is all of them."""
        if not fit:
            raise InputError(
                f"task {name}: none of its {items} items, its answer included, fits {self.max_tokens} tokens",
                hint="an item is never cut: raise max_tokens, up to the model's context, or give shorter ones",
            )
        if fit < items:
            self._report.note(
                f"task {name}: {items - fit} of {items} items, their answers included, are longer than "
                f"{self.max_tokens} tokens and are left out"
            )

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        """What ends an answer: the tokens that end a document or, with `chat`, a turn."""
        if chat:
            return self.chat.end_ids
        ends = (self.tokenizer.boundary_id, self.tokenizer.eos_id)
        return frozenset(end for end in ends if end is not None)


def row(ids: Sequence[int], labels: Sequence[int]) -> Row:
    """A row as models are fed with."""
    import numpy as np

    return {"input_ids": np.asarray(ids, dtype=np.int64), "labels": np.asarray(labels, dtype=np.int64)}  # [T]


def nothing_of(text: str) -> InputError:
    """The refusal of a text that is nothing to this tokenizer."""
    return InputError(f"{text[:60]!r}: the tokenizer makes no token of it", hint="leave that line out")
