"""A process of ours: what it inherits, and whom it must not outlive."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from foundation.rundir import usable_cores

_LOOK_SECONDS = 1.0


def environment(jobs: int) -> dict[str, str]:
    """The environment of one of `jobs` processes side by side: its share of the cores, unless the user said
    how many threads, and nothing that differs between two runs.
    """
    threads = str(max(1, usable_cores() // jobs))
    env = os.environ | {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env.setdefault(name, threads)
    here = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [here, env.get("PYTHONPATH", "")]))
    return env


def die_with(parent: int) -> None:
    """End this process as soon as `parent` is gone: its work is on disk, and nobody is left to tell.

    On Linux the kernel does it, at once and whatever this process is busy with; elsewhere a thread looks
    every second.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it went before the line above
        os._exit(1)
    if sys.platform != "linux":
        threading.Thread(target=_look_for, args=[parent], daemon=True, name="parent").start()


def _look_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
