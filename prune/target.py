"""How far a model is pruned: layers, parameters, or bytes of the file that will ship.

All layers of the families that can be cut weigh the same in parameters, and what a file weighs is known before
it is written, so every target is turned into a number of layers before the first one goes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from foundation.errors import ModelError
from foundation.settings import StageSettings
from foundation.shape import ModelShape

FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_K_M"]
FileBytes = Callable[..., int]
"""(folder, type, layers=n) -> bytes of the GGUF file of that model with n layers"""

TARGETS = ("remove_layers", "keep_layers", "keep_parameters", "keep_bytes")


class TargetSettings(StageSettings):
    """When to stop: one of the four, and a floor of quality, alone or beside it."""

    remove_layers: int | None = Field(None, ge=1, description="target: so many layers fewer than `model`")
    keep_layers: int | None = Field(None, ge=1, description="target: so many layers are left")
    keep_parameters: int | None = Field(None, ge=1, description="target: at most so many parameters")
    keep_bytes: int | None = Field(None, ge=1, description="target: at most so many bytes as keep_bytes_as")
    keep_bytes_as: FileType = Field("Q4_K_M", description="the GGUF type that keep_bytes speaks of")
    quality_floor: float | None = Field(
        None, gt=0, le=1, description="stop before the score falls below this share of the original's"
    )

    @model_validator(mode="after")
    def _one_target(self) -> TargetSettings:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: one target is enough")
        if not given and self.quality_floor is None:
            raise ValueError(f"a target is missing: one of {', '.join(TARGETS)}, or quality_floor")
        return self


def layers_to_keep(settings: TargetSettings, folder: Path, file_bytes: FileBytes) -> int:
    """Layers of the model in `folder` that stay; 1 where only a quality floor is given.

    Raises ModelError for a target that the model has reached already, or that one layer alone exceeds.
    """
    shape = ModelShape.from_folder(folder)
    if settings.remove_layers is not None:
        if settings.remove_layers >= shape.layers:
            raise ModelError(
                f"remove_layers = {settings.remove_layers}; the model has {shape.layers}, and one must stay",
                hint=f"at most remove_layers = {shape.layers - 1}",
            )
        return shape.layers - settings.remove_layers
    if settings.keep_layers is not None:
        _check_begun(
            settings.keep_layers >= shape.layers, f"keep_layers = {settings.keep_layers}", shape.layers
        )
        return settings.keep_layers
    if settings.keep_parameters is not None:
        size = {n: shape.with_layers(n).parameters() for n in range(1, shape.layers + 1)}
        return _largest(size, settings.keep_parameters, "parameters")
    if settings.keep_bytes is not None:
        kind = settings.keep_bytes_as
        size = {n: file_bytes(folder, kind, layers=n) for n in range(1, shape.layers + 1)}
        return _largest(size, settings.keep_bytes, f"bytes as {kind}")
    return 1


def _largest(size: dict[int, int], limit: int, unit: str) -> int:
    """The most layers whose size is within `limit`."""
    most = max(size)
    if size[1] > limit:
        raise ModelError(
            f"one layer alone leaves {size[1]:,} {unit}; allowed were {limit:,}",
            hint="embeddings do not go with the layers: raise the target, or take a smaller vocabulary",
        )
    _check_begun(size[most] <= limit, f"{limit:,} {unit}: it has {size[most]:,}", most)
    return max(layers for layers, found in size.items() if found <= limit)


def _check_begun(reached: bool, target: str, layers: int) -> None:
    if reached:
        raise ModelError(
            f"the model of {layers} layers is within its target already ({target})", hint="set a smaller target"
        )
