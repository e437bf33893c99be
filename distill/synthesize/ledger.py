"""The ledger: every answer of the teacher, appended as it comes, and never asked for twice.

One JSON object a line: {"key", "text", "tokens_in", "tokens_out", "cut"}. Everything else in this package is
a function of the answers and the settings, so the ledger is all the state there is: a run that goes on walks
through the same prompts and finds their answers here. A line torn by a kill is dropped. The file of one run
may be read by the next (role `answers`): a filter can be changed without paying for 67,392 answers again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distill.synthesize.asks import Ask, Reply, Teacher
from foundation.errors import InputError
from foundation.files import opened_for_lines
from foundation.report import Report

SYNC_SECONDS = 2.0  # what a loss of power may cost; a kill costs nothing that was written


class Ledger:
    """Answers by key. In memory stands only where each is: 67,392 x 3 answers would be half a gigabyte."""

    def __init__(self, path: Path, older: Sequence[Path], report: Report) -> None:
        """Read what is there. Raises InputError when a file of `older` is not a ledger."""
        self._at: dict[str, tuple[int, int]] = {}  # key -> (file, offset)
        self._used: set[str] = set()
        self._file = opened_for_lines(path)
        self._files = [self._file, *(source.open("rb") for source in older)]
        for number, source in enumerate(older, 1):
            for line, _ in self._scan(number):
                raise InputError(
                    f"{source}, line {line}: not a teacher's answer",
                    hint="`answers` reads the answers.jsonl of another distill.synthesize stage",
                )
        if damaged := sum(1 for _ in self._scan(0)):
            report.note(f"{damaged} damaged lines of the ledger were passed over; they are asked again")
        self._synced = time.monotonic()

    def _scan(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Index file `number`; gives the lines (from 1) that are no answers."""
        file, offset = self._files[number], 0
        file.seek(0)
        for line, raw in enumerate(file, 1):
            try:
                self._at[_read(raw)[0]] = (number, offset)
            except (ValueError, RecursionError):
                yield line, raw
            offset += len(raw)

    def ask(
        self, teacher: Teacher, asks: Sequence[Ask], stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each ask: the known ones first, then the teacher's, each kept before it is given.

        A teacher whose answers depend on their batch is asked all again where one is missing, so that the
        batches, and with them the bytes, are those of a run that was never broken off.
        """
        keys = [ask.key(teacher.identity) for ask in asks]
        missing = [index for index, key in enumerate(keys) if key not in self._at]
        if missing and not teacher.independent:
            missing = list(range(len(asks)))
        for index in sorted(set(range(len(asks))) - set(missing)):
            yield index, self._use(keys[index])
        if not missing:
            return
        try:
            for place, reply in teacher.answers([asks[index] for index in missing], stop):
                if not reply.fault:
                    self._keep(keys[missing[place]], reply)
                yield missing[place], reply
        finally:
            self.sync()

    def _use(self, key: str) -> Reply:
        self._used.add(key)
        return self._at_key(key)

    def _at_key(self, key: str) -> Reply:
        number, offset = self._at[key]
        self._files[number].seek(offset)
        return _read(self._files[number].readline())[1]

    def _keep(self, key: str, reply: Reply) -> None:
        self._at[key] = (0, self._file.seek(0, os.SEEK_END))
        self._used.add(key)
        self._file.write(_line(key, reply))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Everything kept so far is on the disk afterwards."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def published(self) -> Iterator[bytes]:
        """The lines of all answers that this run needed, sorted by key, and after them, sorted too, those that
        it found in its own file and did not need: paid for under earlier settings, and perhaps needed again.
        The same bytes however the run went.
        """
        unused = {key for key, (number, _) in self._at.items() if number == 0} - self._used
        for key in [*sorted(self._used), *sorted(unused)]:
            yield _line(key, self._at_key(key))

    def close(self) -> None:
        self.sync()
        for file in self._files:
            file.close()


def _line(key: str, reply: Reply) -> bytes:
    record = {"key": key, "text": reply.text, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
    return (json.dumps({**record, "cut": reply.cut}, ensure_ascii=False) + "\n").encode()


def _read(line: bytes) -> tuple[str, Reply]:
    """Key and answer of a line. Raises ValueError when it is none."""
    record = json.loads(line)
    wanted = {"key": str, "text": str, "tokens_in": int, "tokens_out": int, "cut": bool}
    if not isinstance(record, dict) or any(type(record.get(key)) is not kind for key, kind in wanted.items()):
        raise ValueError("not a teacher's answer")
    if not record["key"].isascii():  # ours are hexadecimal digits
        raise ValueError("not a teacher's answer")
    return record["key"], Reply(record["text"], record["tokens_in"], record["tokens_out"], record["cut"])
