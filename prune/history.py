"""What prune.iterate leaves behind, read back: one run of removals, step by step.

    steps/01/model/      the model after the first step, a Hugging Face folder
    steps/01/step.json   what went in it, what that cost, how large the rest is: see steps.py
    steps/02/ ...
    steps/03.partial/    a step that was not finished, steps/03.rejected/ one below quality_floor: passed over

Layers are numbered as in the original model, in every step. A file of ours that does not follow from the ones
before it was altered, so everything here is refused rather than guessed. Not here: scores of these models.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from foundation.errors import ArtifactError, InputError
from foundation.shape import ModelShape
from prune.kept import kept_layers
from prune.steps import (
    AGAIN,
    RECORD,
    Method,
    Step,
    folder_of,
    link_tree,
    model_digest,
    read_step,
    write_step,
)

PASSED_OVER = (".partial", ".rejected")


class History(NamedTuple):
    """One run. `models[i]` is the folder that `steps[i]` left."""

    steps: tuple[Step, ...]
    models: tuple[Path, ...]

    @property
    def label(self) -> str:
        """Of the last step, where a run went on from another one; on one line, for tables and pictures."""
        return " ".join(self.steps[-1].label.split())

    @property
    def method(self) -> Method:
        return self.steps[-1].method

    @property
    def original_layers(self) -> int:
        return self.steps[0].original_layers

    @property
    def base(self) -> tuple[int, ...]:
        """Layers of the model that the run began with: all of the original's, or what earlier cuts left."""
        return tuple(sorted(self.steps[0].kept + self.steps[0].removed))

    @property
    def order(self) -> list[list[int]]:
        """Original numbers of the layers that went, by step."""
        return [list(step.removed) for step in self.steps]


def read_history(folder: Path) -> History:
    """The run in `folder`. Raises ArtifactError for a step that is missing, altered or does not follow."""
    found = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in found if path.name[0] != "." and path.suffix not in PASSED_OVER)
    if not names:
        raise ArtifactError(f"{folder}: no steps in it", hint=AGAIN)
    if strange := [name for name in names if not re.fullmatch(r"[0-9]{2,}", name)]:
        raise ArtifactError(f"{folder}: {strange[0]} is no step; they are called 01, 02, ...", hint=AGAIN)
    numbers = sorted(map(int, names))
    if missing := sorted(set(range(1, numbers[-1] + 1)) - set(numbers)) or [n for n in numbers if n < 1]:
        raise ArtifactError(f"{folder}: steps {numbers} are there, {missing[0]:02d} does not fit", hint=AGAIN)
    places = [folder_of(folder, number) for number in numbers]
    steps = [_read_step(place, number) for place, number in zip(places, numbers, strict=True)]
    history = History(tuple(steps), tuple(place / "model" for place in places))
    before = history.base
    if len(set(before)) < len(before) or not 0 <= before[0] <= before[-1] < history.original_layers:
        raise ArtifactError(
            f"{places[0] / RECORD}: layers {list(before)} of {history.original_layers}", hint=AGAIN
        )
    for place, step in zip(places, steps, strict=True):
        _check_follows(place, step, steps[0], before)
        before = step.kept
    return history


def _read_step(place: Path, number: int) -> Step:
    step = read_step(place)
    if step is None:
        raise ArtifactError(f"{place / RECORD}: is missing", hint=AGAIN)
    if step.step != number:
        raise ArtifactError(f"{place / RECORD}: says step {step.step}", hint=AGAIN)
    return step


def _check_follows(place: Path, step: Step, first: Step, before: tuple[int, ...]) -> None:
    """Raise ArtifactError unless `step` removes layers of `before`, and its model has what is then left."""
    path = place / RECORD
    for name in ("original", "original_layers"):
        if getattr(step, name) != getattr(first, name):
            raise ArtifactError(f"{path}: its {name} is not that of step 01", hint=AGAIN)
    left = tuple(layer for layer in before if layer not in step.removed)
    if len(left) + len(step.removed) != len(before) or step.kept != left:
        raise ArtifactError(
            f"{path}: {list(before)} less {list(step.removed)} are not {list(step.kept)}", hint=AGAIN
        )
    if not (place / "model" / "config.json").is_file() or not list((place / "model").glob("*.safetensors")):
        raise ArtifactError(f"{place / 'model'}: no config.json and weights in it", hint=AGAIN)
    if model_digest(place / "model") != step.model:
        raise ArtifactError(f"{place / 'model'}: its weights or config.json were altered", hint=AGAIN)
    if kept_layers(place / "model").kept != step.kept:
        raise ArtifactError(f"{path}: its layers are not those that its model has", hint=AGAIN)
    shape = ModelShape.from_folder(place / "model")
    if (shape.layers, shape.parameters()) != (len(left), step.parameters):
        raise ArtifactError(
            f"{place / 'model'}: {shape.layers} layers, {shape.parameters():,} parameters; "
            f"step.json says {len(left)} and {step.parameters:,}",
            hint=AGAIN,
        )


def branch(source: Path, number: int, steps: Path, original: str) -> list[Step]:
    """Put steps 1 to `number` of another pruning (0 = all of them) into `steps`, to go on from there.

    Raises ArtifactError when `source` holds no steps or they were altered, InputError when it has no such step
    or its steps were cut from another model than the one with the digest `original`.
    """
    history = read_history(source)
    count = len(history.steps)
    if number > count:
        raise InputError(
            f"{source} has steps 1 to {count}, not {number}", hint="set branch_step to one; 0 = the last"
        )
    if history.steps[0].original != original:
        raise InputError(
            f"the steps in {source} were cut from another model than `model`",
            hint="read the model that the first pruning read; only its layers can be counted on",
        )
    given = list(history.steps[: number or count])
    for step, model in zip(given, history.models, strict=False):
        target = folder_of(steps, step.step)
        if read_step(target) == step:
            continue
        shutil.rmtree(target, ignore_errors=True)
        link_tree(model, target / "model")
        write_step(target, step)
    return given
