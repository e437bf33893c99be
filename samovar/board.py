"""status.json while a run goes: the state of every stage, and a heartbeat from a thread of its own.

The heartbeat says "this process still runs", nothing more; see runstate.py for what follows from it. A
heartbeat that can not be written (a full disk) is skipped: the next one tries again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from foundation.errors import SamovarError
from foundation.events import Event, plain
from foundation.files import write_atomic, write_json
from foundation.rundir import RunDirectory
from foundation.runstate import HEARTBEAT_SECONDS, State

# event -> what the stage's entry says from then on
_STATE_OF = {
    "stage_started": "running",
    "stage_reused": "reused",
    "stage_finished": "finished",
    "stage_failed": "failed",
    "stage_stopped": "stopped",
}


class Board:
    """Keeps the status of a run and writes it. The main thread tells it events, its own thread writes."""

    def __init__(self, run: RunDirectory, stages: Iterable[str]) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._before = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._status: dict[str, Any] = {
            "v": 1,
            "state": State.STARTING,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": round(time.time(), 3),
            "exit_code": None,
            "message": "",
            "hint": "",
            "stages": {name: {"state": "waiting"} for name in stages},
        }

    def start(self) -> None:
        """Write the first status, so that what an earlier process said no longer counts."""
        with contextlib.suppress(FileNotFoundError):
            self._before = self._run.status.read_bytes()
        self._write()
        self._thread.start()

    def withdraw(self) -> bool:
        """Put back what the status said before `start`; False when it said nothing."""
        if not self._before:
            return False
        self._stop_beating()
        write_atomic(self._run.status, self._before)
        return True

    def running(self) -> None:
        with self._lock:
            self._status["state"] = State.RUNNING
        self._write()

    def event(self, event: Event) -> None:
        """Take one event into account; it is on disk with the next heartbeat."""
        stage, kind = event["stage"], event["kind"]
        if stage not in self._status["stages"]:
            return
        with self._lock:
            entry = self._status["stages"][stage]
            if kind in _STATE_OF:
                entry["state"] = _STATE_OF[kind]
            if kind == "progress":
                entry |= {key: event[key] for key in ("step", "total", "unit", "figures")}
            if kind in ("stage_finished", "stage_reused"):
                entry |= {key: event[key] for key in ("seconds", "figures")}

    def end(self, state: State, exit_code: int, message: str = "", hint: str = "") -> None:
        """The last word. Raises RunError when it can not be written."""
        self._stop_beating()
        self._status |= {"state": state, "exit_code": exit_code, "message": message, "hint": hint}
        self._write(durable=True)

    def _stop_beating(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(SamovarError, OSError):
                self._write()

    def _write(self, *, durable: bool = False) -> None:
        with self._lock:
            running = [name for name, entry in self._status["stages"].items() if entry["state"] == "running"]
            status = self._status | {"stage": running, "heartbeat": round(time.time(), 3)}
            write_json(self._run.status, plain(status), durable=durable)
