"""What a recipe tells of how a model was made: the stages that led to its bundle, with the settings it wrote.

The bundle's stage sees no run and no other stage. A recipe that names its own file as an input can hand it
over (`recipe = "quickstart.toml"`), and so the card can say what the recipe says, and no more than that.
Paths of the machine are cut down to the last part; ids of the hub stay.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from foundation.errors import InputError

MAX_BYTES = 1 << 20
_NOT_SETTINGS = ("name", "kind", "reads")


def summary(path: Path, *, short: bool = False) -> dict[str, Any]:
    """Name, description, inputs and stages of the recipe at `path`, as JSON. `short`: with its [short] values.

    Where it makes one bundle, only what that bundle was made from. Raises InputError when it is no recipe.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        changes = document.get("short", {}) if short else {}
        stages = [_stage(entry, changes.get(entry["name"], {})) for entry in document["stage"]]
        stages, inputs = _leading_to_the_bundle(stages, document.get("inputs", {}))
        found = {
            "name": str(document["name"]),
            "description": str(document.get("description", "")),
            "seed": document.get("seed"),
            "inputs": _without_folders(inputs),
            "stages": stages,
        }
        json.dumps(found, allow_nan=False)  # dates and infinities are TOML and no setting
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} can not be read as a recipe: {type(error).__name__} {error}",
            hint="read the recipe's own .toml file as `recipe`",
        ) from None
    return found


def _stage(entry: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in entry.items() if key not in _NOT_SETTINGS} | changes
    reads = entry.get("reads", {})
    return {
        "name": str(entry["name"]),
        "kind": str(entry["kind"]),
        "reads": {role: value if isinstance(value, list) else [value] for role, value in reads.items()},
        "settings": _without_folders(settings),
    }


def _leading_to_the_bundle(
    stages: list[dict[str, Any]], inputs: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Stages and inputs that the one bundle rests on; all of them where there is another number of bundles."""
    bundles = [stage["name"] for stage in stages if stage["kind"] == "export.bundle"]
    if len(bundles) != 1:
        return stages, inputs
    needed = set(bundles)
    for stage in reversed(stages):  # what is read stands above
        if stage["name"] in needed:
            needed |= {str(name).partition(".")[0] for names in stage["reads"].values() for name in names}
            if stage["name"] in bundles:  # the recipe itself is none of the model's data
                needed -= set(stage["reads"].get("recipe", ()))
    return (
        [stage for stage in stages if stage["name"] in needed],
        {name: value for name, value in inputs.items() if name in needed},
    )


def _without_folders(value: Any) -> Any:
    """A value in which paths that begin at a root, a home or above are their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    if windows.drive:
        return windows.name
    path = PurePosixPath(value)
    outside = path.is_absolute() or value.startswith("~") or ".." in path.parts
    return path.name if outside and path.name else value
