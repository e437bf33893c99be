"""What state a run is in, from evidence alone: nobody is asked, and silence alone proves nothing.

| status.json says        | lock | heartbeat | state                        |
|-------------------------|------|-----------|------------------------------|
| finished/failed/stopped | any  | any       | that                         |
| anything else           | held | fresh     | running                      |
| anything else           | held | stale     | stalled                      |
| nothing yet             | held | -         | starting, later stalled      |
| nothing yet, "starting" | free | young     | starting                     |
| anything else           | free | any       | crashed                      |

A lock answers at once, whatever way its holder went; a heartbeat only tells a working holder from a
stuck one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from foundation.files import read_json
from foundation.rundir import RunDirectory, is_held

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 20.0
GRACE_SECONDS = 10.0


class State(StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    RUNNING = "running"
    STALLED = "stalled"
    CRASHED = "crashed"
    STARTING = "starting"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.STOPPED})


@dataclass(frozen=True)
class Evidence:
    """All that `judge` looks at. `status`: content of status.json; `born`, `now`: seconds since the epoch."""

    status: Mapping[str, Any] | None
    lock_held: bool
    born: float
    now: float


def judge(evidence: Evidence) -> State:
    """The state that the evidence proves."""
    status = evidence.status or {}
    said = status.get("state")
    if said in TERMINAL:
        return State(said)
    beat = status.get("heartbeat")
    last = float(beat) if isinstance(beat, int | float) else evidence.born
    silent_seconds = evidence.now - last
    if evidence.lock_held:
        if silent_seconds > STALE_SECONDS:
            return State.STALLED
        return State.RUNNING if status else State.STARTING
    if said in (None, State.STARTING) and silent_seconds < GRACE_SECONDS:
        return State.STARTING
    return State.CRASHED


def gather(run: RunDirectory) -> Evidence:
    """The evidence as it lies on disk now. The lock is read before the status.

    In this order a run that ends in between is seen with its last word; the other way round it would
    seem crashed.
    """
    held = is_held(run.lock)
    status = read_json(run.status)
    born = run.path.stat().st_mtime if run.path.exists() else 0.0
    return Evidence(status if isinstance(status, dict) else None, held, born, time.time())


def state_of(run: RunDirectory) -> State:
    return judge(gather(run))
