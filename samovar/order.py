"""What is asked of a worker and of each of its ranks, how they do it, and how it went."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.artifact import Identity
from foundation.errors import ArtifactError, SamovarError, StopRequested
from foundation.events import plain
from foundation.files import Stamps, disk_trouble
from foundation.report import Report
from foundation.stage import Figures
from samovar.stages import resolve


@dataclass(frozen=True)
class Order:
    """What to run, as plain JSON. Paths are absolute; `inputs`: role -> path, or a list of them."""

    stage: str
    kind: str
    version: int
    run: str  # "module:function"
    settings_class: str  # "module:Settings"
    settings: Mapping[str, Any]
    inputs: Mapping[str, str | list[str]]
    digests: Mapping[str, str | list[str]]
    writes: Mapping[str, str]
    handed: Mapping[str, str]
    keeps: Mapping[str, str]
    folder: str
    uncounted: Mapping[str, Any]  # settings that are not part of the identity: they alter no byte
    hashed: Mapping[str, Stamps]  # local input -> its files' stamps when its digest was taken

    @property
    def identity(self) -> Identity:
        return Identity(self.kind, self.version, self.settings, int(self.settings["seed"]), self.digests)

    @property
    def all_settings(self) -> dict[str, Any]:
        return {**self.settings, **self.uncounted}

    @property
    def processes(self) -> int:
        """How many ranks do the work; 1 where the kind of stage has no such setting."""
        return int(self.all_settings.get("processes", 1))


@dataclass(frozen=True)
class Result:
    """How it went. `outcome`: done, stopped, failed (a refusal) or broken (a defect of ours)."""

    outcome: str
    message: str = ""
    hint: str = ""


def call(order: Order, out: Path, report: Report) -> Figures:
    """Call the stage's `run` to write under `out`. Raises what it raises."""
    settings = resolve(order.settings_class).model_validate_json(json.dumps(order.all_settings))
    inputs = {role: _as_paths(value) for role, value in order.inputs.items()}
    handed = {name: resolve(target) for name, target in order.handed.items()}
    return _figures(resolve(order.run)(settings, inputs, out, report, **handed) or {})


def result_of(error: BaseException, folder: Path) -> Result:
    """How it went with a stage that raised `error` while it wrote into `folder`.

    The traceback of a defect is printed to stderr, which is the run's log.
    """
    if isinstance(error, StopRequested):
        return Result("stopped", error.message, error.hint)
    if isinstance(error, SamovarError):
        return Result("failed", error.message, error.hint)
    if trouble := disk_trouble(error, folder):
        return Result("failed", trouble.message, trouble.hint)
    traceback.print_exception(error)
    last = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, MemoryError):
        return Result("failed", f"out of memory: {last}", "use smaller batches, or fewer jobs side by side")
    return Result("broken", last, "this is a defect; the traceback is in the run's log.txt")


def _figures(figures: Mapping[str, Any]) -> Figures:
    """Headline figures as plain JSON values; numpy's and torch's scalars become Python's."""
    found: Figures = {}
    for name, value in figures.items():
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, int | float | str):
            raise ArtifactError(f"figure '{name}' is {type(value).__name__}, not a number or a string")
        found[name] = plain(value)
    return found


def _as_paths(value: str | list[str]) -> Path | tuple[Path, ...]:
    return Path(value) if isinstance(value, str) else tuple(Path(item) for item in value)
