"""curves.jsonl: what training measured, one line an optimiser step, exact under kill and resume.

    {"step": 41, "loss": 2.31, "ce": 2.19, "kd": 0.6, "weight": 0.83, "grad_norm": 0.7, "learning_rate": 0.001}

Only what a second run gives again stands here; speed and memory go to the Report. A resumed run keeps the
lines up to its checkpoint and writes the others anew, so the file's bytes are those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from foundation.files import write_atomic

CURVES = "curves.jsonl"


class Curves:
    """The file, to go on after its first `step` lines: the others were measured after the checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        write_atomic(path, b"".join(lines[:step]))

    def add(self, figures: dict[str, float]) -> None:
        """Append the line of one step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def sync(self) -> None:
        """Bring all lines onto the disk itself: before the checkpoint that counts on them is sealed."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    @staticmethod
    def last(path: Path, count: int) -> list[dict[str, float]]:
        """The figures of the last `count` steps."""
        return [json.loads(line) for line in path.read_bytes().splitlines()[-count:]]
