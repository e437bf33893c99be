"""Checkpoints that count only when complete: COMPLETE, written last, holds the size of every other file.

Trainer writes them as work/checkpoint-STEP. What a kill or a loss of power left half-written is removed, and
the one before is used. Under torchrun all of this is rank 0's work; see foundation/tune.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from foundation.files import read_json, write_json

COMPLETE = "COMPLETE"
KEPT_CHECKPOINTS = 2


def seal(checkpoint: Path) -> None:
    """Write COMPLETE, the sizes of all files, once these are on the disk itself and not in its cache."""
    sizes = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    write_json(checkpoint / COMPLETE, sizes)


def remove_old(work: Path) -> None:
    """Keep the newest complete checkpoints alone."""
    for old in complete_checkpoints(work)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def remove_torn(work: Path) -> None:
    """Remove checkpoints that were not written to their end, or are damaged."""
    for torn in set(work.glob("checkpoint-*")) - set(complete_checkpoints(work)):
        shutil.rmtree(torn)


def complete_checkpoints(work: Path) -> list[Path]:
    """Checkpoints that were written to their end and are still whole, oldest first."""
    return sorted((path for path in work.glob("checkpoint-*") if _is_whole(path)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many optimiser steps were done when it was saved."""
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    """True when COMPLETE is there and every file has the size that it had then."""
    sizes = read_json(checkpoint / COMPLETE)
    return isinstance(sizes, dict) and all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )
