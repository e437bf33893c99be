"""The [inputs] of a recipe on this machine: files, folders, patterns, and models of the Hugging Face hub.

A hub model is taken from the local cache as it stands there, so that a run does not change because the hub
did; pin it with owner/name@revision. It is downloaded only when it is missing and a run is about to start.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation.errors import InputError, MissingError, SamovarError
from foundation.files import DigestCache
from samovar.recipe import Recipe

# What a model's folder on the hub holds beside the files that a stage reads: older or foreign copies.
_HUB_IGNORED = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*")
_FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst", ".toml", ".gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class Inputs:
    """The recipe's [inputs] as they lie on this machine: paths and content digests, found when asked."""

    def __init__(self, recipe: Recipe, cache: DigestCache, *, download: bool) -> None:
        self._recipe = recipe
        self._cache = cache
        self._download = download
        self._found: dict[str, tuple[Path, ...]] = {}
        self._digests: dict[str, list[str]] = {}

    def paths(self, name: str) -> tuple[Path, ...]:
        """One path, or the sorted matches of a pattern. Raises InputError or MissingError, with a way out."""
        if name not in self._found:
            self._found[name] = find_input(self._recipe.inputs[name], self._recipe.path.parent, self._download)
        return self._found[name]

    def digests(self, name: str) -> list[str]:
        """Content digests of `paths`, read once: what changes during a run makes the next one stale."""
        if name not in self._digests:
            self._digests[name] = [self._cache.content(path) for path in self.paths(name)]
        return self._digests[name]


def find_input(value: str, base: Path, download: bool) -> tuple[Path, ...]:
    """What an input's value names: a file or folder, the matches of a pattern, or a model of the hub."""
    path = (base / Path(value).expanduser()).absolute()
    if path.exists():
        return (path,)
    if glob.has_magic(value):
        pattern = str(Path(value).expanduser())  # Path.glob would refuse an absolute one
        matches = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207
        if matches:
            return tuple((base / match).absolute() for match in sorted(matches))
        raise InputError(
            f"no file matches '{value}' in {base}", hint="relative patterns start at the recipe's folder"
        )
    if _HUB_ID.fullmatch(value) and not value.endswith(_FILE_SUFFIXES):
        return (_hub_snapshot(value, path, download),)
    raise InputError(f"'{value}' is not there: {path}", hint="relative paths start at the recipe's folder")


def missing_inputs(inputs: Mapping[str, object], base: Path) -> list[str]:
    """One line for each path or pattern that names nothing here. Models of the hub are not looked for."""
    problems = []
    for name, value in inputs.items():
        if isinstance(value, str) and (not _HUB_ID.fullmatch(value) or value.endswith(_FILE_SUFFIXES)):
            try:
                find_input(value, base, False)
            except (SamovarError, OSError, ValueError) as error:
                said = error.message if isinstance(error, SamovarError) else str(error)
                problems.append(f"input '{name}': {said}")
    return problems


def _hub_snapshot(value: str, path: Path, download: bool) -> Path:
    """The folder of a hub model: from the local cache as it is, else downloaded when that is allowed."""
    command = f"hf download {value.replace('@', ' --revision ')}"
    offline = (
        f"give a local folder instead ({path} is not one), or on a machine with network run "
        f"`{command}` and copy its cache here (~/.cache/huggingface, or where HF_HOME says)"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        problem = f"'{value}' is a model of the hub, and huggingface_hub is not installed"
        raise MissingError(problem, hint=f"pip install 'samovar[train]', or {offline}") from error
    repository, _, revision = value.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None, "ignore_patterns": list(_HUB_IGNORED)}
    for local in (True, False):
        if not local and not download:
            raise MissingError(
                f"'{value}' is no path here, and no whole model in the local hub cache", hint=offline
            )
        try:
            folder = Path(snapshot_download(repository, local_files_only=local, **wanted))
        except Exception as error:  # its many exceptions differ between versions
            if not local:
                problem = f"'{value}' could not be downloaded: {_first_line(error)}"
                raise MissingError(problem, hint=offline) from error
        else:
            if _is_whole(folder):
                return folder
    raise MissingError(f"'{value}' has no config.json or not all of its .safetensors", hint=offline)


def _is_whole(folder: Path) -> bool:
    """False for a snapshot whose download was broken off: it lacks a config or a named shard."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
