"""What tests have a child process do (foundation.child)."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from foundation.errors import InputError
from foundation.report import Report, stop_if_asked


def double(number: int, report: Report) -> int:
    report.note("doubling")
    for done in range(1, 4):
        report.progress(done, 3, "step", loss=float(done))
    print("printed by Python")
    os.write(1, b"printed by C\n")
    return 2 * number


def whoami(report: Report) -> dict[str, Any]:
    return {"pid": os.getpid(), "parent": os.getppid()}


def refuse(report: Report) -> None:
    raise InputError("seen: tea", hint="bring coffee")


def break_down(report: Report) -> None:
    raise ZeroDivisionError("by zero")


def full_disk(report: Report) -> None:
    raise OSError(28, "No space left on device", "/some/file")


def abort(report: Report) -> None:
    sys.stderr.write("GGML_ASSERT(n > 0) failed\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGABRT)


def leave(report: Report) -> None:
    os._exit(3)


def wait_for_stop(report: Report) -> None:
    report.note("waiting")
    for _ in range(600):
        stop_if_asked(report)
        time.sleep(0.05)


def deaf(pid_file: str, report: Report) -> None:
    with open(pid_file, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(str(os.getpid()))
    report.note("deaf")
    time.sleep(600)
