"""One stage as several processes: which of them this is, and what only one of them does.

torchrun tells it through the environment; a process alone is rank 0 of 1. All ranks of a stage call the same
function on the same inputs and see the same folder. What must be written once, rank 0 writes, and the others
wait until it is there. They look at the folder: a collective would run into its time limit where rank 0
tokenises for an hour, and needs a process group, which is only made when training starts. A rank that dies
ends the others, so nobody waits for it in vain.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

POLL_SECONDS = 0.1


def rank() -> int:
    """The number of this process among those that work on the stage together, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes work on the stage together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the one process that writes what there is once: models, markers, figures."""
    return rank() == 0


def once(there: Callable[[], bool], make: Callable[[], object]) -> None:
    """Let rank 0 `make` what is not `there` yet, and every rank go on when it is.

    `there` must turn true only when everything is whole: a file that is written last, and at once.
    """
    if is_main():
        if not there():
            make()
        return
    while not there():
        time.sleep(POLL_SECONDS)
