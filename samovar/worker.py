"""One stage in a process of its own: `python -m samovar.worker`, started by run.py.

    stdin    one line of JSON: the Order; then nothing, until the parent dies and the pipe ends
    stdout   at the very end, one JSON object: the Result
    stderr   the run's log.txt: whatever the stage and its libraries print

Progress and notes are appended to the run's events.jsonl. A worker does not outlive its parent: the kernel
kills it on Linux, and everywhere a thread waits for the end of stdin. It may be killed at any moment;
artifact.py says what is then found by the next one. With `processes` > 1 the stage's work is done by ranks
under torchrun (torchrun.py), and the worker, which waits for them, finishes the artifact as always.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundation import artifact
from foundation.artifact import Manifest
from foundation.errors import ArtifactError, InputError, RunError
from foundation.events import EventLog
from foundation.files import stamps
from foundation.memory import peak_memory_bytes
from foundation.process import die_with
from foundation.report import Report
from samovar.order import Order, Result, call, result_of
from samovar.torchrun import RanksBroke, launch

EVENTS_A_SECOND = 5.0
_TEXT_LIMIT = 4000  # characters; the result must fit the pipe, for it is read when the worker is gone


@dataclass(frozen=True)
class Surroundings:
    """Where a worker reports to, and whom it must not outlive."""

    events: str
    stop: str  # the file whose presence asks for a stop
    parent: int  # process id
    lock: int | None = None  # descriptor of the run's lock, which the worker has inherited


class EventReport:
    """A Report that writes to events.jsonl: a few progress events a second, and always the last one."""

    def __init__(self, stage: str, events: EventLog, stop: Path) -> None:
        self.stage = stage
        self.events = events
        self.stop = stop
        self.checkpoint = stop.with_name("checkpoint")
        self._answered_ns = 0  # modification time of the last checkpoint request that was answered
        self._written = 0.0  # monotonic time of the last progress event
        self._held_back: dict[str, Any] | None = None

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if self._held_back and self._held_back["unit"] != unit:
            self.flush()
        now = time.monotonic()
        self._held_back = {"step": done, "total": total, "unit": unit, "figures": figures}
        if done >= total or now - self._written >= 1 / EVENTS_A_SECOND:
            self.flush()

    def note(self, text: str) -> None:
        self.events.write(self.stage, "note", text=text)

    def stop_requested(self) -> bool:
        return self.stop.exists()

    def checkpoint_requested(self) -> bool:
        try:
            asked_ns = self.checkpoint.stat().st_mtime_ns
        except OSError:
            return False
        if asked_ns == self._answered_ns:
            return False
        self._answered_ns = asked_ns
        return True

    def flush(self) -> None:
        """Write the progress that was held back."""
        if self._held_back:
            self.events.write(self.stage, "progress", **self._held_back)
            self._written, self._held_back = time.monotonic(), None


def execute(order: Order, report: Report, lock: int | None = None) -> Manifest:
    """Run the stage, or go on with it, and leave it finished in order.folder.

    `lock`: descriptor of the lock that every process of this stage must hold. Raises what the stage raises;
    its partial folder then stays for the next try.
    """
    folder, identity = Path(order.folder), order.identity
    out = artifact.begin(folder, identity.fingerprint, order.kind, order.keeps)
    if not artifact.is_recorded(folder):
        start = time.perf_counter()
        figures = launch(order, out, report, lock) if order.processes > 1 else call(order, out, report)
        seconds = time.perf_counter() - start
        _refuse_edited(order)
        for role, path in order.writes.items():
            if not (out / path).exists():
                raise ArtifactError(f"{order.kind} ended without writing its '{role}' ({path})")
        artifact.record(folder, identity, figures, round(seconds, 3), peak_memory_bytes())
    artifact.publish(folder)
    manifest = artifact.load(folder)
    assert manifest is not None, "publish leaves a manifest"
    return manifest


def _refuse_edited(order: Order) -> None:
    """Raise InputError when an input was edited since its digest was taken: the result is neither's."""
    for path, before in order.hashed.items():
        now = stamps(Path(path))
        if changed := sorted(file for file in {*before, *now} if before.get(file) != now.get(file)):
            artifact.distrust(Path(order.folder))
            hint = "run again, and leave the inputs as they are until it is done"
            raise InputError(f"the input {', '.join(changed)} was changed while it was used", hint=hint)


def attempt(order: Order, report: EventReport, lock: int | None = None) -> Result:
    """`execute`, with every way it can end turned into a Result."""
    try:
        try:
            execute(order, report, lock)
        finally:
            report.flush()
    except RanksBroke as error:
        return error.result
    except BaseException as error:
        return result_of(error, Path(order.folder))
    return Result("done")


def main() -> None:
    """Read the order, run it, answer, and leave without waiting for threads of libraries."""
    lifeline, answer = os.dup(0), os.dup(1)
    with os.fdopen(0, "rb", closefd=False) as stdin:
        line = stdin.readline()
    if not line.endswith(b"\n"):
        os._exit(1)  # the parent died before it had said what to do
    request = json.loads(line)
    order, around = Order(**request["order"]), Surroundings(**request["surroundings"])
    _die_with_parent(lifeline, around.parent)
    _redirect()
    try:
        report = EventReport(order.stage, EventLog(Path(around.events)), Path(around.stop))
        result = attempt(order, report, around.lock)
    except RunError as error:
        result = Result("failed", error.message, error.hint)
    text = json.dumps({key: value[:_TEXT_LIMIT] for key, value in asdict(result).items()})
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.write(answer, text.encode())
    os._exit(0 if result.outcome == "done" else 1)


def _redirect() -> None:
    """Everything printed from here on, by Python or by C, goes where stderr does; stdin is empty."""
    import faulthandler

    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()


def _die_with_parent(lifeline: int, parent: int) -> None:
    """`die_with`, and a second line that needs no kernel: the end of the pipe from the parent."""
    die_with(parent)

    def wait() -> None:
        while os.read(lifeline, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="lifeline").start()


if __name__ == "__main__":
    main()
