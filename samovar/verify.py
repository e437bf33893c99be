"""What `samovar verify` finds: every stage that a run should hold against the manifest it was left with.

Which stages those are is said by three witnesses, so that a folder deleted as a whole is missed: the
run's recipe.toml, its status.json, and the folders that are there.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from foundation import artifact
from foundation.errors import RunError, SamovarError
from foundation.files import read_json
from foundation.rundir import RunDirectory
from samovar.recipe import SAFE_NAME


def verify(place: Path) -> dict[str, list[str]]:
    """Stage -> its problems, none for one that is as it was written. `place`: a run, or a stage's folder.

    Raises RunError when there is no stage to look at.
    """
    if (place / artifact.MANIFEST).is_file():
        return {place.name: _problems(place)}
    names = dict.fromkeys([*_expected(RunDirectory(place)), *_present(place)])
    if not names:
        raise RunError(f"{place} holds no finished stage", hint="name a run directory, as runs/NAME")
    return {name: _problems(place / name) for name in names}


def _problems(folder: Path) -> list[str]:
    try:
        if artifact.load(folder) is None:
            return ["not finished: it has no manifest" if folder.is_dir() else "not there: it has no folder"]
        return artifact.verify(folder)
    except SamovarError as error:
        return [error.message]
    except OSError as error:
        return [f"can not be read: {error}"]


def _expected(run: RunDirectory) -> list[str]:
    """Names from the recipe and the status, as far as they can be read."""
    names: list[object] = []
    try:
        stages = tomllib.loads(run.recipe.read_text()).get("stage", [])
        names += [entry.get("name") for entry in stages]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        pass  # the other witnesses speak
    status = read_json(run.status)
    if isinstance(status, dict) and isinstance(status.get("stages"), dict):
        names += status["stages"]
    return [name for name in names if isinstance(name, str) and SAFE_NAME.fullmatch(name)]


def _present(place: Path) -> list[str]:
    found = (path for path in place.glob("*/") if path.suffix not in (".partial", ".replaced"))
    return sorted(path.name for path in found if (path / artifact.MANIFEST).is_file())
