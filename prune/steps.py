"""The steps of one pruning: each is a whole model that can be used, measured, or gone on from.

    steps/NN/model/      a Hugging Face folder
    steps/NN/step.json   what went, what it cost, what is left; written last, so its presence means complete

Layers are named by their numbers in the original model everywhere in step.json, however many went before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundation.errors import ArtifactError, InputError
from foundation.files import read_json, sha256_file, tree_digest, visible_files, write_json, writing

FORMAT = 1
RECORD = "step.json"


@dataclass(frozen=True)
class Step:
    """The record of one step. Scores are means over tasks, 0 to 1; None where they were not measured."""

    step: int
    label: str
    method: dict[str, Any]  # importance, rescore, heals
    original: str  # content digest of the model that the first step was cut from
    original_layers: int
    removed: list[int]
    kept: list[int]
    importance: dict[str, float]  # original number -> cost of removing it (or the block that begins with it)
    interval: dict[str, Any] | None  # separation and runner_up: see importance.Costs
    score_original: float
    score_before: float
    score_cut: float | None
    score_healed: float | None
    parameters: int
    gguf_bytes: dict[str, int]
    healing: dict[str, float | int]  # the loss at its end and the like
    model: str  # content digest of model/

    @property
    def score(self) -> float:
        """Of the model as it stands in this step."""
        found = self.score_cut if self.score_healed is None else self.score_healed
        return float("nan") if found is None else found


def folder_of(steps: Path, number: int) -> Path:
    return steps / f"{number:02d}"


def write_step(folder: Path, step: Step) -> None:
    """Raises RunError when the disk is full."""
    write_json(folder / RECORD, {"format": FORMAT, **asdict(step)})


def read_step(folder: Path) -> Step | None:
    """The step in `folder`, None where it is not complete. Raises ArtifactError for another format."""
    value = read_json(folder / RECORD)
    if not isinstance(value, dict):
        return None
    try:
        if value.pop("format") != FORMAT:
            raise KeyError("format")
        return Step(**value)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder / RECORD}: not the record of a pruning step ({error})",
            hint="prune again, into a new folder",
        ) from None


def read_steps(steps: Path) -> Iterator[Step]:
    """Complete steps, from the first to the last before a gap."""
    number = 1
    while step := read_step(folder_of(steps, number)):
        yield step
        number += 1


def model_digest(folder: Path) -> str:
    """Content digest of a model's weights and configuration; its tokenizer is compared elsewhere."""
    names = [n for n in visible_files(folder) if n == "config.json" or n.endswith(".safetensors")]
    return tree_digest((name, sha256_file(folder / name)) for name in names)


def branch(source: Path, number: int, steps: Path, original: str) -> None:
    """Put steps 1 to `number` of another pruning (0 = all of them) into `steps`, to go on from there.

    Raises InputError when `source` has no such step, or its steps were cut from another model than `original`.
    """
    found = list(read_steps(source))
    number = number or len(found)
    if not found or number > len(found):
        raise InputError(
            f"{source} has {len(found)} complete steps, not {number}",
            hint="branch_step is one of these; 0 = the last",
        )
    if found[0].original != original:
        raise InputError(
            f"the steps in {source} were cut from another model than `model`",
            hint="read the model that the first pruning read; only its layers can be counted on",
        )
    for step in found[:number]:
        target = folder_of(steps, step.step)
        if read_step(target) == step:
            continue
        shutil.rmtree(target, ignore_errors=True)
        link_tree(folder_of(source, step.step) / "model", target / "model")
        write_step(target, step)


def link_tree(source: Path, target: Path) -> None:
    """Another name for the same files; copies where the file system has no such thing. Replaces `target`.

    Safe, because a finished model is never written to: everything here replaces files and alters none.
    """
    shutil.rmtree(target, ignore_errors=True)
    with writing(target):
        shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
