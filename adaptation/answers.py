"""A model's own greedy answers, a batch at a time, and the file that keeps them.

Padding changes the last bits of a logit, so an answer can depend, by rounding, on its neighbours. A batch is
therefore kept whole or not at all: one line of the ledger, {"key", "answers": [{"text", "tokens", "ended"}]}. A
run that goes on makes the same batches, finds those that are answered, and comes to the same bytes. A line torn
by a kill is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.chat import Chat
from foundation.errors import ModelError
from foundation.files import opened_for_lines
from foundation.greedy import greedy
from foundation.report import Report, Silent, stop_if_asked
from foundation.rows import longest_first
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answer:
    """`ended`: the model ended it itself, within the tokens that it was given."""

    text: str
    tokens: int
    ended: bool


class Ledger:
    """Answered batches by key. Only whole lines count."""

    def __init__(self, path: Path, report: Report) -> None:
        self._batches: dict[str, list[Answer]] = {}
        self._used: list[str] = []
        self._file = opened_for_lines(path)
        self._file.seek(0)
        damaged = 0
        for raw in self._file:
            try:
                key, answers = _read(raw)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += 1
            else:
                self._batches[key] = answers
        self._file.seek(0, os.SEEK_END)
        if damaged:
            report.note(
                f"{damaged} damaged lines of the answers were passed over; their prompts are asked again"
            )

    def find(self, key: str) -> list[Answer] | None:
        """The answers of a batch, or None; what was found or kept is `published`."""
        found = self._batches.get(key)
        if found is not None:
            self._used.append(key)
        return found

    def keep(self, key: str, answers: list[Answer]) -> None:
        """Put a batch on the disk: afterwards no kill and no loss of power takes it away."""
        self._file.write(_line(key, answers))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._batches[key] = answers
        self._used.append(key)

    def published(self) -> Iterator[bytes]:
        """The lines that this run needed, in the order of its batches, and after them, sorted, all others:
        answered under other settings, and perhaps needed again. The same bytes however the run went.
        """
        for key in [*self._used, *sorted(set(self._batches) - set(self._used))]:
            yield _line(key, self._batches[key])

    def close(self) -> None:
        self._file.close()


def _line(key: str, answers: Sequence[Answer]) -> bytes:
    record = {"key": key, "answers": [asdict(answer) for answer in answers]}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _read(line: bytes) -> tuple[str, list[Answer]]:
    """Key and answers of a line. Raises ValueError, TypeError or KeyError when it is none."""
    record = json.loads(line)
    answers = [Answer(**answer) for answer in record["answers"]]
    kinds = {(type(a.text), type(a.tokens), type(a.ended)) for a in answers}
    if not isinstance(record["key"], str) or kinds != {(str, int, bool)}:
        raise ValueError("not a batch of answers")
    return record["key"], answers


def answer_all(
    prompts: Sequence[Sequence[int]],
    load: Callable[[], PreTrainedModel],
    identity: str,
    tokenizer: Tokenizer,
    ledger: Ledger,
    report: Report,
    *,
    answer_tokens: int,
    batch_rows: int,
) -> list[Answer]:
    """The answer to each prompt, in their order; the model is loaded when a batch is missing.

    `identity` names all that decides an answer beside the prompts and these arguments. Raises StopRequested
    between batches, ModelError where a batch does not fit the device's memory.
    """
    import torch

    found: dict[int, Answer] = {}
    model: PreTrainedModel | None = None
    ends: frozenset[int] = frozenset()
    for places in longest_first([len(prompt) for prompt in prompts], batch_rows):
        batch = [list(prompts[place]) for place in places]
        key = _key(identity, answer_tokens, batch)
        answers = ledger.find(key)
        if answers is None:
            stop_if_asked(report)
            if model is None:
                model = load()
                ends = ends_of(model, tokenizer)
            try:
                written = greedy(
                    model, batch, answer_tokens=answer_tokens, stop_ids=ends, pad_id=tokenizer.pad_id,
                    report=Silent(), batch_rows=len(batch),
                )  # fmt: skip
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"the model and a batch of {len(batch)} prompts do not fit the device's memory",
                    hint="lower batch_rows, or take precision = 'bf16' or 'nf4'",
                ) from None
            answers = [
                Answer(tokenizer.decode(ids).strip(), len(ids), len(ids) < answer_tokens) for ids in written
            ]
            ledger.keep(key, answers)
        found.update(zip(places, answers, strict=True))
        report.progress(len(found), len(prompts), "prompt")
    return [found[place] for place in range(len(prompts))]


def ends_of(model: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: the template's, the tokenizer's, and those that generation_config.json names."""
    config = model.generation_config
    named = config.eos_token_id if config is not None else None
    listed = named if isinstance(named, list) else [named]
    return Chat(tokenizer).end_ids | {end for end in listed if end is not None}


def _key(identity: str, answer_tokens: int, batch: list[list[int]]) -> str:
    text = json.dumps([identity, answer_tokens, batch], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
