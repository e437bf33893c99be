"""The [inputs] of a recipe on this machine: files, folders, patterns, and what lies on the Hugging Face hub.

`owner/name` is a model and `datasets/owner/name` a dataset, as in their addresses. Either is taken from the
local cache as it stands there, so that a run does not change because the hub did; pin it with @revision at the
end. It is downloaded only when it is missing and a run is about to start.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation.errors import InputError, MissingError, SamovarError
from foundation.files import DigestCache, refuse_dangling, visible_files
from samovar.recipe import Recipe

# What a model's folder on the hub holds beside the files that a stage reads: older or foreign copies.
_HUB_IGNORED = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*")
_FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst", ".toml", ".gguf")
# What no reader of corpora takes: code, pickles, archives, arrays, pictures and sound.
_HUB_DATASET_IGNORED = (
    "*.py", "*.pkl", "*.pickle", "*.zip", "*.tar", "*.tar.*", "*.7z",
    "*.pt", "*.pth", "*.bin", "*.npy", "*.npz", "*.h5",
    "*.png", "*.jpg", "*.jpeg", "*.wav", "*.mp3", "*.flac", "*.mp4",
)  # fmt: skip
_HUB_ID = re.compile(r"(datasets/)?[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_START = "start at the recipe's folder"
_SHARD = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})(\.[^/]*)")


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
    """What an input's value names: a file or folder, the matches of a pattern, or what the hub has."""
    path = (base / Path(value).expanduser()).absolute()
    if path.exists():
        return (path,)
    refuse_dangling(path)
    if glob.has_magic(value):
        pattern = str(Path(value).expanduser())  # Path.glob would refuse an absolute one
        matches = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207
        if matches:
            return tuple((base / match).absolute() for match in sorted(matches))
        raise InputError(f"no file matches '{value}' in {base}", hint=f"relative patterns {_START}")
    if _is_of_hub(value, base):
        return (_hub_snapshot(value, path, download),)
    raise InputError(f"'{value}' is not there: {path}", hint=f"relative paths {_START}")


def _is_of_hub(value: str, base: Path) -> bool:
    """True for a name as the hub has them that is nothing on this machine, not even a link to nowhere."""
    path = base / Path(value).expanduser()
    is_name = _HUB_ID.fullmatch(value) and not value.endswith(_FILE_SUFFIXES)
    return bool(is_name) and not path.exists() and not path.is_symlink()


def missing_inputs(inputs: Mapping[str, object], base: Path) -> list[str]:
    """One line for each path or pattern that names nothing here, or a link to nowhere. The hub is not asked."""
    problems = []
    for name, value in inputs.items():
        if isinstance(value, str):
            try:
                if _is_of_hub(value, base):
                    continue
                for path in find_input(value, base, False):
                    refuse_dangling(path)
            except (SamovarError, OSError, ValueError) as error:
                problems.append(f"input '{name}': {_in_a_line(error)}")
    return problems


def _in_a_line(error: Exception) -> str:
    """What is wrong and what to do about it, but for the hint that the caller gives for all problems."""
    if not isinstance(error, SamovarError):
        return str(error)
    return error.message if error.hint.endswith(_START) else f"{error.message}; {error.hint}"


def _hub_snapshot(value: str, path: Path, download: bool) -> Path:
    """The folder of a hub id: from the local cache as it is, else downloaded when that is allowed."""
    is_dataset = value.startswith("datasets/")
    thing, lacks, is_whole, ignored = (
        ("dataset", "no files, or not all of its shards", _is_whole_dataset, _HUB_DATASET_IGNORED)
        if is_dataset
        else ("model", "no config.json or not all of its .safetensors", _is_whole, _HUB_IGNORED)
    )
    repository, _, revision = value.removeprefix("datasets/").partition("@")
    command = f"hf download {repository}" + f" --revision {revision}" * bool(revision)
    command += " --repo-type dataset" * is_dataset
    offline = (
        f"give a local folder instead ({path} is not one), or on a machine with network run "
        f"`{command}` and copy its cache here (~/.cache/huggingface, or where HF_HOME says)"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        problem = f"'{value}' is a {thing} of the hub, and huggingface_hub is not installed"
        raise MissingError(problem, hint=f"pip install 'samovar[train]', or {offline}") from error
    wanted: dict[str, Any] = {"revision": revision or None, "ignore_patterns": list(ignored)}
    if is_dataset:
        wanted["repo_type"] = "dataset"
    for local in (True, False):
        if not local and not download:
            raise MissingError(
                f"'{value}' is no path here, and no whole {thing} in the local hub cache", hint=offline
            )
        try:
            folder = Path(snapshot_download(repository, local_files_only=local, **wanted))
        except Exception as error:  # its many exceptions differ between versions
            if not local:
                problem = f"'{value}' could not be downloaded: {_first_line(error)}"
                raise MissingError(problem, hint=offline) from error
        else:
            if is_whole(folder):
                return folder
    raise MissingError(f"'{value}' has {lacks}", hint=offline)


def _is_whole(folder: Path) -> bool:
    """False for a snapshot whose download was broken off: it lacks a config or a named shard."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _is_whole_dataset(folder: Path) -> bool:
    """False for a snapshot without files, or without one of the shards that the names of others count."""
    names = {*visible_files(folder)}
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    missing = (
        f"{match[1]}-{number:05d}-of-{match[2]}{match[3]}" not in names
        for match in shards
        for number in range(int(match[2]))
    )
    return bool(names) and not any(missing)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
