"""foundation/runstate.py: the table of the docstring, and evidence gathered from real directories."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.rundir import RunDirectory, acquire
from foundation.runstate import GRACE_SECONDS, STALE_SECONDS, TERMINAL, Evidence, State, gather, judge, state_of

NOW = 1_000_000.0
FRESH, STALE = NOW - 1, NOW - STALE_SECONDS - 1


def status(state: str, heartbeat: float = FRESH) -> dict[str, object]:
    return {"state": state, "heartbeat": heartbeat}


@pytest.mark.parametrize(
    ("said", "held", "born", "state"),
    [
        (status("finished"), False, 0, State.FINISHED),
        (status("failed"), False, 0, State.FAILED),
        (status("stopped", STALE), False, 0, State.STOPPED),
        (status("finished", STALE), True, 0, State.FINISHED),  # the last word before the lock is let go
        (status("running"), True, 0, State.RUNNING),
        (status("starting"), True, 0, State.RUNNING),
        (status("running", STALE), True, 0, State.STALLED),
        (status("running"), False, 0, State.CRASHED),
        (status("running", STALE), False, 0, State.CRASHED),
        (status("starting"), False, 0, State.STARTING),
        (status("starting", NOW - GRACE_SECONDS - 1), False, 0, State.CRASHED),
        (None, True, FRESH, State.STARTING),
        (None, True, STALE, State.STALLED),
        (None, False, FRESH, State.STARTING),
        (None, False, STALE, State.CRASHED),
        ({"state": "nonsense", "heartbeat": "soon"}, False, STALE, State.CRASHED),
    ],
)
def test_the_table(said: dict | None, held: bool, born: float, state: State) -> None:
    assert judge(Evidence(said, held, born, NOW)) == state


STATUS = st.dictionaries(
    st.sampled_from(["state", "heartbeat", "pid"]), st.sampled_from(list(State)) | st.floats(0, 2e6) | st.none()
)


@given(st.none() | STATUS, st.booleans(), st.floats(0, 2e6), st.floats(0, 2e6))
def test_the_laws(said: dict | None, held: bool, born: float, now: float) -> None:
    """A free lock is never running or stalled; a held one never crashed; a last word always counts."""
    state = judge(Evidence(said, held, born, now))
    last_word = said is not None and said.get("state") in TERMINAL
    if last_word:
        assert state == said["state"]
    elif held:
        assert state in (State.RUNNING, State.STALLED, State.STARTING)
    else:
        assert state in (State.CRASHED, State.STARTING)


def test_evidence_of_a_real_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.create()
    assert state_of(run) == State.STARTING
    lock = acquire(run.lock)
    assert gather(run).lock_held
    run.status.write_text(json.dumps({"state": "running", "heartbeat": time.time()}))
    assert state_of(run) == State.RUNNING
    lock.release()
    assert state_of(run) == State.CRASHED
    run.status.write_text("{ torn")
    os.utime(run.path, (0, 0))
    assert state_of(run) == State.CRASHED
