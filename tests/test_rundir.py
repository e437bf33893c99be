"""foundation/rundir.py: whose directory it is, and that the lock tells the truth."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation.errors import RunError, RunLocked
from foundation.rundir import RunDirectory, acquire, holder, is_alive, is_held

HOLD = (
    "import sys, time; from pathlib import Path; from foundation.rundir import acquire\n"
    "lock = acquire(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def start_holder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_one_is_refused_at_once_and_told_who(tmp_path: Path) -> None:
    process = start_holder(tmp_path / "lock")
    start = time.monotonic()
    with pytest.raises(RunLocked) as caught:
        acquire(tmp_path / "lock")
    assert time.monotonic() - start < 1
    assert f"process {process.pid} on {socket.gethostname()} since 20" in caught.value.message
    assert is_held(tmp_path / "lock")
    process.communicate("")
    assert not is_held(tmp_path / "lock")
    acquire(tmp_path / "lock").release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = start_holder(tmp_path / "lock")
    process.kill()
    process.communicate()
    who = holder(tmp_path / "lock")
    assert who is not None and who["pid"] == process.pid and not is_alive(who)
    assert not is_held(tmp_path / "lock")
    acquire(tmp_path / "lock").release()


def test_the_lock_is_held_by_whoever_inherited_it(tmp_path: Path) -> None:
    """A worker that lives on keeps a new run out; once it is gone, the waiting run goes in."""
    lock = acquire(tmp_path / "lock")
    worker = subprocess.Popen(["sleep", "0.6"], pass_fds=[lock.handle])
    lock.release()
    dead = {"pid": 2**22 + 1, "host": socket.gethostname(), "since": 0.0, "process_start": 1}
    (tmp_path / "lock").write_text(json.dumps(dead))
    assert is_held(tmp_path / "lock")
    with pytest.raises(RunLocked, match="workers of a process that died"):
        acquire(tmp_path / "lock", patience_seconds=0.1)
    acquire(tmp_path / "lock", patience_seconds=10).release()
    assert worker.wait() == 0


def test_an_ordinary_child_does_not_inherit_it(tmp_path: Path) -> None:
    lock = acquire(tmp_path / "lock")
    child = subprocess.Popen(["sleep", "5"])
    lock.release()
    assert not is_held(tmp_path / "lock")
    child.kill()
    child.wait()


def test_a_reused_process_number_is_not_taken_for_the_holder() -> None:
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "process_start": 1}
    assert not is_alive(mine)
    assert is_alive(mine | {"host": "another-machine"}), "of another host nothing is known"


def test_no_lock_file_is_a_free_lock(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "lock")


def test_requests_are_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.create()
    assert not run.requested("stop")
    run.request("stop")
    assert run.requested("stop") and not run.requested("checkpoint")
    run.withdraw_requests()
    assert not run.requested("stop")


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(RunError, match="is no run directory and is not empty"):
        RunDirectory(tmp_path).create()
    with pytest.raises(RunError, match="is a file"):
        RunDirectory(tmp_path / "thesis.md").create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]


def test_run_json_is_written_once_and_the_recipe_as_it_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.create()
    run.describe('name = "чай"\r\n# no end of line')
    about = run.about.read_text()
    assert run.recipe.read_bytes() == 'name = "чай"\r\n# no end of line'.encode()
    run.describe("name = 'b'\n")
    assert run.recipe.read_text() == "name = 'b'\n"
    assert run.about.read_text() == about
    said = json.loads(about)
    assert said["packages"]["numpy"] and said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["cores"] >= 1 and said["memory_bytes"] > 2**20 and said["command"]
