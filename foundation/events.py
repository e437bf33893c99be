"""What happened, in order: events.jsonl, one JSON object a line, only ever appended to.

    {"v": 1, "seq": 41, "ts": 1760000000.123, "stage": "student", "kind": "progress", "step": 120, ...}

`kind` says what the event is; `stage` is None for those of the whole run. `seq` counts the lines of the
file over all writers and all resumes, without gaps: each writer holds the file's lock while it reads the
last number and appends. A line is one `os.write` under O_APPEND. A write torn by a full disk or a loss of
power is closed by the next writer and passed over by every reader.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from foundation.errors import RunError
from foundation.files import writing

VERSION = 1
_TAIL_BYTES = 1 << 16

Event = dict[str, Any]


class EventLog:
    """The writing end. Any number of processes may hold one on the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = -1  # file size when `_seq` was its last number
        self._seq = 0

    def write(self, stage: str | None, kind: str, step: int | None = None, **more: Any) -> None:
        """Append one event. `more` is any JSON; nan and infinities are written as strings.

        Raises RunError when the disk is full: the line then does not count.
        """
        with writing(self.path):
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            try:
                torn = self._catch_up()
                event = {"v": VERSION, "seq": self._seq + 1, "ts": round(time.time(), 3)}
                event |= {"stage": stage, "kind": kind, "step": step} | plain(more)
                text = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
                line = (b"\n" if torn else b"") + text.encode()
                if os.write(self._handle, line) < len(line):
                    raise RunError(f"the disk is full: an event was cut short in {self.path}")
                self._seq += 1
                self._size = os.fstat(self._handle).st_size
            finally:
                fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._handle)

    def _catch_up(self) -> bool:
        """Learn the last number when others wrote since; True when the last line has no end."""
        size = os.fstat(self._handle).st_size
        if size == self._size or size == 0:
            return False
        start = max(0, size - _TAIL_BYTES)
        tail = os.pread(self._handle, size - start, start)
        for line in reversed(tail.split(b"\n")[1 if start else 0 :]):
            if (event := parse(line)) is not None:
                self._seq = event["seq"]
                break
        return not tail.endswith(b"\n")


class Tail:
    """The reading end: each `read` gives the events that were appended since the one before.

    Starts over when the file was replaced or became shorter. A last line without its end waits.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset  # bytes of whole lines read so far
        self._inode: int | None = None

    def read(self) -> list[Event]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self._inode not in (None, stat.st_ino) or stat.st_size < self.offset:
                    self.offset = 0
                self._inode = stat.st_ino
                file.seek(self.offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [event for line in whole.splitlines() if (event := parse(line)) is not None]


def parse(line: bytes) -> Event | None:
    """The event in one line, or None where the line is torn or none of ours."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("seq"), int) else None


def plain(value: Any) -> Any:
    """`value` with every nan and infinity as a string, for JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
