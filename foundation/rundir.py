"""A run on disk: the directory that a run owns and that everyone else may read.

    recipe.toml   the recipe, verbatim            status.json   state, progress, heartbeat, pid, exit code
    run.json      versions, machine, command      lock          flock held for the life of the run
    events.jsonl  see events.py                   log.txt       raw output of the stages
    digests.json  see files.DigestCache           control/      requests: a file `stop` or `checkpoint`
    NAME/ NAME.partial/                           see artifact.py

The lock is a flock on an open file, and the run hands that open file down to its workers. So the kernel
frees it when the last process of the run is gone, however it went, and never sooner: a run started right
after `kill -9` can not meet an orphan that still writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from foundation.errors import RunError, RunLocked
from foundation.files import read_json, write_atomic, write_json, writing

REQUESTS = ("stop", "checkpoint")
RESERVED = frozenset({"control", "lock"})  # names a stage may not have

_PACKAGES = (
    "samovar", "torch", "transformers", "tokenizers", "safetensors", "sentencepiece", "accelerate", "peft",
    "datasets", "gguf", "llama-cpp-python", "numpy",
)  # fmt: skip


class RunDirectory:
    """Paths and small files of one run. Making one touches nothing; `create` makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.about = path / "run.json"
        self.events = path / "events.jsonl"
        self.status = path / "status.json"
        self.lock = path / "lock"
        self.log = path / "log.txt"
        self.digests = path / "digests.json"
        self.control = path / "control"

    def exists(self) -> bool:
        """True when this is a run's directory, and not just any folder."""
        return self.recipe.is_file() or self.status.is_file()

    def create(self) -> None:
        """Make the folder. Raises RunError when it may not be written, or is full of something else."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file", hint="name another folder with --out")
        if self.path.is_dir() and not self.exists() and not self.lock.exists() and any(self.path.iterdir()):
            hint = "name a new folder with --out; nothing in this one was touched"
            raise RunError(f"{self.path} is no run directory and is not empty", hint=hint)
        with writing(self.path):
            self.control.mkdir(parents=True, exist_ok=True)

    def describe(self, recipe_text: str) -> None:
        """Keep the recipe as it is now, and once, at the first start, what runs it."""
        if not self.recipe.is_file() or self.recipe.read_bytes() != recipe_text.encode():
            write_atomic(self.recipe, recipe_text)
        if not self.about.is_file():
            write_json(self.about, machine() | {"command": sys.argv, "created": round(time.time(), 3)})

    def request(self, name: str) -> None:
        """Ask the run for something; `name` is one of REQUESTS."""
        assert name in REQUESTS, name
        with writing(self.control):
            self.control.mkdir(exist_ok=True)
            (self.control / name).touch()

    def requested(self, name: str) -> bool:
        return (self.control / name).exists()

    def withdraw_requests(self) -> None:
        """Forget what was asked of an earlier process."""
        with writing(self.control):
            for name in REQUESTS:
                (self.control / name).unlink(missing_ok=True)


class Lock:
    """The lock of a run directory, held until `release` and by every process given `handle`."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def release(self) -> None:
        os.close(self.handle)


def acquire(path: Path, *, patience_seconds: float = 10.0) -> Lock:
    """Take the lock file `path`, or raise RunLocked saying who holds it.

    A living holder is reported at once. When the holder is dead, its workers still have the lock for the
    moment they need to notice; that is waited for.
    """
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience_seconds
    while not _try_lock(handle):
        who = holder(path)
        alive = who is not None and is_alive(who)
        if alive or time.monotonic() > deadline:
            os.close(handle)
            raise _locked(path, who, alive)
        time.sleep(0.05)
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 3)}
    mine["process_start"] = _process_start(os.getpid())
    with writing(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(mine).encode() + b"\n", 0)
    return Lock(handle)


def is_held(path: Path) -> bool:
    """True while any process holds the lock file `path`. The question itself lasts microseconds."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def holder(path: Path) -> dict[str, Any] | None:
    """What the last holder wrote into the lock file: pid, host, since, process_start."""
    value = read_json(path)
    return value if isinstance(value, dict) and isinstance(value.get("pid"), int) else None


def is_alive(who: dict[str, Any]) -> bool:
    """Whether the holder lives. Of another host nothing can be known: it counts as alive."""
    if who.get("host") != socket.gethostname():
        return True
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _process_start(who["pid"]) == who.get("process_start")  # else the number was given out again


def machine() -> dict[str, Any]:
    """Versions and machine, as run.json keeps them. Reads package metadata and imports nothing."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "v": 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "packages": versions,
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _try_lock(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locked(path: Path, who: dict[str, Any] | None, alive: bool) -> RunLocked:
    run = path.parent
    if who is None or not alive:
        what = "by workers of a process that died" if who else "by an unknown process"
        return RunLocked(f"{run} is still held {what}", hint="wait a little, or end those processes")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who.get("since", 0)))
    return RunLocked(
        f"{run} is held by process {who['pid']} on {who.get('host')} since {since}",
        hint=f"watch it with: samovar status {run}   or end it with: samovar stop {run}",
    )


def _process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
