"""What measured files are called in scores: by their names, and by folder too where two names are alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foundation.errors import InputError


def names_of(paths: Sequence[Path], what: str) -> list[str]:
    """One name a path, all different. Raises InputError where folder and name together are not."""
    stems = [path.stem for path in paths]
    names = [p.stem if stems.count(p.stem) == 1 else f"{p.parent.name}.{p.stem}" for p in paths]
    if len(set(names)) < len(names):
        raise InputError(f"two {what} are called the same: {', '.join(names)}", hint="rename one of the files")
    return names
