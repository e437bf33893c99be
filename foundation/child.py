"""A function in a process of its own: llama.cpp ends the process it is in when one of its assertions fails.

    in_child("module:function", {"path": "..."}, report)   ->   function(path="...", report=...)

Arguments and the answer are JSON, nothing is pickled. Progress and notes of the child reach the caller's
report, and a stop that is asked of it reaches the child's. What the child refuses is raised here as if it
had been called here; its death by a signal is a ModelError with the last lines that it printed.
The child dies with its parent. Memory that it took is given back when it ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from foundation import errors
from foundation.errors import ModelError, SamovarError, StopRequested
from foundation.process import die_with, environment
from foundation.report import Report

STOP = b"stop\n"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0  # for a child that is asked to stop; one inside llama.cpp can not hear it
_LAST_LINES = 6
_EVENTS_A_SECOND = 10


class ChildBroke(Exception):
    """A defect in the child; the text is its traceback."""


def in_child(function: str, arguments: Mapping[str, Any], report: Report) -> Any:
    """What `function` ("module:name") returns for `arguments` and a keyword `report`; JSON both ways.

    Raises what the function raises of our own errors; ModelError when a signal ended the child; StopRequested
    when `report` was asked to stop, by the child itself or, if it can not hear, by ending it; ChildBroke.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "foundation.child", function, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment(1),
            start_new_session=True,  # a Ctrl-C is for the one who asks
        )
        try:
            return _follow(child, function, arguments, report, said)
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            _hand_on(said)


def _follow(
    child: subprocess.Popen[bytes],
    function: str,
    arguments: Mapping[str, Any],
    report: Report,
    said: IO[bytes],
) -> Any:
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # a child that died at once is found below
        child.stdin.write(json.dumps(dict(arguments)).encode() + b"\n")
        child.stdin.flush()
    answers: list[dict[str, Any]] = []
    reader = threading.Thread(target=_read, args=[child.stdout, answers.append], daemon=True)
    reader.start()
    told, asked_at = 0, 0.0
    while True:
        reader.join(_POLL_SECONDS)
        for event in answers[told:]:
            told += 1
            if event["kind"] == "progress":
                report.progress(event["done"], event["total"], event["unit"], **event["figures"])
            elif event["kind"] == "note":
                report.note(event["text"])
            elif event["kind"] == "answer":
                return _answer(event)
        if not reader.is_alive() and told == len(answers):
            raise _died(child.wait(), function, said)
        if not asked_at and report.stop_requested():
            asked_at = time.monotonic()
            with contextlib.suppress(OSError):
                child.stdin.write(STOP)
                child.stdin.flush()
        if asked_at and time.monotonic() - asked_at > _GRACE_SECONDS:
            raise StopRequested("stopped as asked", hint="the same command goes on from here")


def _read(pipe: IO[bytes], tell: Callable[[dict[str, Any]], None]) -> None:
    for line in pipe:
        with contextlib.suppress(ValueError):
            tell(json.loads(line))


def _answer(event: Mapping[str, Any]) -> Any:
    """The value, or the child's error as it would have been raised here."""
    if event["outcome"] == "done":
        return event["value"]
    if event["outcome"] == "broken":
        raise ChildBroke(event["message"])
    known = getattr(errors, event["error"], SamovarError)
    if known is errors.RecipeError:
        raise known(event["message"].split("\n"), hint=event["hint"])
    raise known(event["message"], hint=event["hint"])


def _died(code: int, function: str, said: IO[bytes]) -> Exception:
    """What to say of a child that gave no answer."""
    said.seek(0)
    lines = [line for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    last = " | ".join(lines[-_LAST_LINES:]) or "nothing was printed"
    if code >= 0:
        return ChildBroke(f"{function} ended with code {code} and no answer: {last}")
    name = signal.Signals(-code).name
    hint = "SIGKILL is mostly the system running out of memory" if name == "SIGKILL" else ""
    return ModelError(f"the process that worked on it was ended by {name}: {last}", hint=hint)


def _hand_on(said: IO[bytes]) -> None:
    """What the child printed goes where our own stderr goes: the run's log."""
    said.seek(0)
    if text := said.read().decode("utf-8", "replace"):
        sys.stderr.write(text)


# ------------------------------------------------------------------------------------------ in the child


class _PipeReport:
    """The Report of the child: lines of JSON on its answer pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._stop = threading.Event()
        self._told = 0.0

    def tell(self, kind: str, **more: Any) -> None:
        data = json.dumps({"kind": kind} | more).encode() + b"\n"
        while data:
            data = data[os.write(self._pipe, data) :]

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        now = time.monotonic()
        if done >= total or now - self._told >= 1 / _EVENTS_A_SECOND:
            self.tell("progress", done=done, total=total, unit=unit, figures=figures)
            self._told = now

    def note(self, text: str) -> None:
        self.tell("note", text=text)

    def checkpoint_requested(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def listen(self, lines: Iterator[bytes]) -> None:
        """Hear the parent's wish to stop; the end of its pipe is the end of the parent."""
        for line in lines:
            if line == STOP:
                self._stop.set()
        os._exit(1)


def main() -> None:
    """python -m foundation.child MODULE:FUNCTION PARENT, arguments as one line of JSON on stdin."""
    function, parent = sys.argv[1], int(sys.argv[2])
    die_with(parent)
    answer, stdin = os.dup(1), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what is printed, by Python or by C, is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    line = stdin.readline()
    if not line.endswith(b"\n"):
        os._exit(1)  # the parent died before it had said what to do
    report = _PipeReport(answer)
    threading.Thread(target=report.listen, args=[iter(stdin)], daemon=True, name="parent").start()
    report.tell("answer", **_call(function, json.loads(line), report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads of libraries


def _call(function: str, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Call it, with every way it can end turned into a table."""
    import traceback

    from foundation.files import disk_trouble

    try:
        module, _, name = function.partition(":")
        value = getattr(importlib.import_module(module), name)(**arguments, report=report)
        return {"outcome": "done", "value": value}
    except SamovarError as error:
        told = error
    except Exception as error:
        trouble = disk_trouble(error, Path.cwd())
        if trouble is None:
            return {"outcome": "broken", "message": traceback.format_exc()}
        told = trouble
    return {"outcome": "failed", "error": type(told).__name__, "message": told.message, "hint": told.hint}


if __name__ == "__main__":
    main()
