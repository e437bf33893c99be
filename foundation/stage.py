"""What a stage is given, and what it may return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from foundation.errors import RecipeError
from foundation.settings import StageSettings

Reads = Mapping[str, Sequence[tuple[str, StageSettings] | str]]
"""What a recipe lets a stage read, by role: kind and settings of a stage, or an input as it is written."""
Inputs = Mapping[str, Path | tuple[Path, ...]]
Figures = dict[str, float | int | str]


def one(inputs: Inputs, role: str) -> Path:
    """The single path of `role`."""
    path = inputs[role]
    if isinstance(path, tuple):
        raise RecipeError([f"role {role!r} takes one input, given {len(path)}"])
    return path


def many(inputs: Inputs, role: str) -> tuple[Path, ...]:
    """All paths of `role`; none when it was not given."""
    path = inputs.get(role, ())
    return path if isinstance(path, tuple) else (path,)
