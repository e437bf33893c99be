"""The steps of one pruning: each is a whole model that can be used, measured, or gone on from.

    steps/NN/model/      a Hugging Face folder
    steps/NN/step.json   what went, what it cost, what is left; written last, so its presence means complete

Layers are named by their numbers in the original model everywhere in step.json, however many went before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.errors import ArtifactError, InputError
from foundation.files import sha256_file, tree_digest, visible_files, write_json, writing

FORMAT = 1
RECORD = "step.json"
AGAIN = "name the `steps` of a finished prune.iterate stage; if it is one, run that stage again"


STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
SHA256 = "^[0-9a-f]{64}$"
Score = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]  # one of them is a difference of two: let it round


class Method(BaseModel):
    """How the layers of a run were chosen, and whether the rest was healed."""

    model_config = STRICT

    importance: Literal["task", "influence", "angular", "kl"]
    rescore: bool
    heals: bool


class Step(BaseModel):
    """step.json. Scores are means over the tasks that choose the layers, in [0, 1]; None = not measured."""

    model_config = STRICT

    format: int = Field(ge=FORMAT, le=FORMAT)
    step: int = Field(ge=1)
    method: Method
    label: str = Field(min_length=1)
    original_layers: int = Field(ge=2)
    removed: tuple[int, ...] = Field(min_length=1)
    kept: tuple[int, ...] = Field(min_length=1)
    importance: dict[int, float]  # cost of removing a layer, or the block that begins with it
    interval: dict[str, Any] | None  # separation and runner_up: see importance.Costs
    score_original: Score
    score_before: Score
    score_cut: Score | None  # of the model that was cut and not healed
    score: Score  # of the model that the step left
    parameters: int = Field(ge=1)
    gguf_bytes: dict[str, int]
    healing: dict[str, float]  # the training's figures
    original: str = Field(pattern=SHA256)  # digest of the model that the first step was cut from
    model: str = Field(pattern=SHA256)  # and of the one that this step left


def folder_of(steps: Path, number: int) -> Path:
    return steps / f"{number:02d}"


def write_step(folder: Path, step: Step) -> None:
    """Raises RunError when the disk is full."""
    write_json(folder / RECORD, step.model_dump(mode="json"))


def read_step(folder: Path) -> Step | None:
    """The step in `folder`, None where none was finished. Raises ArtifactError for a record that is no such."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return Step.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: can not be read: {error.strerror}", hint=AGAIN) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{path}: {where}: {first['msg']}", hint=AGAIN) from None


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
