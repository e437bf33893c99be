"""The steps of one pruning: each is a whole model that can be used, measured, or gone on from.

    steps/NN/model/      a Hugging Face folder
    steps/NN/step.json   what went, what it cost, what is left; written last, so its presence means complete
    steps/NN.rejected/   one that fell below quality_floor

Layers are named by their numbers in the original model everywhere in step.json, however many went before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.errors import ArtifactError
from foundation.files import TEMPORARY, sha256_file, tree_digest, visible_files, write_json, writing

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
    healing: dict[str, int | float]  # the training's figures
    original: str = Field(pattern=SHA256)  # digest of the model that the first step was cut from
    model: str = Field(pattern=SHA256)  # and of the one that this step left


def folder_of(steps: Path, number: int) -> Path:
    return steps / f"{number:02d}"


def rejected(place: Path) -> Path:
    """Where a step is put that fell below quality_floor: kept to be looked at, no step to any reader."""
    return place.with_name(f"{place.name}.rejected")


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


def model_digest(folder: Path) -> str:
    """Content digest of a model's weights and configuration; its tokenizer is compared elsewhere."""
    names = [n for n in visible_files(folder) if n == "config.json" or n.endswith(".safetensors")]
    return tree_digest((name, sha256_file(folder / name)) for name in names)


def link_tree(source: Path, target: Path) -> None:
    """Another name for the same files; copies where the file system has no such thing. Replaces `target`.

    Safe, because a finished model is never written to: everything here replaces files and alters none.
    """
    shutil.rmtree(target, ignore_errors=True)
    with writing(target):
        shutil.copytree(source, target, copy_function=_link, ignore=_half_written)


def _half_written(_: str, names: list[str]) -> list[str]:
    """What a killed write left behind: no part of a model."""
    return [name for name in names if TEMPORARY.fullmatch(name)]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
