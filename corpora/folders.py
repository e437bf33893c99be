"""Which files of a dataset's folder belong to a split: the rules of the Hugging Face `datasets` library.

In this order: what the README's front matter says under `configs`; shards data/SPLIT-00000-of-00005.*; a
folder, else a file, that has a split's name in its own; else all files are `train`. Only file names and that
front matter are read: no code of the folder is run, and nothing is fetched, whatever it says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from foundation.errors import InputError, MissingError
from foundation.files import visible_files

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_DESCRIBING = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}

Splits = Mapping[str, Sequence[str]]  # split -> paths below the folder


def split_files(folder: Path, names: Iterable[str], split: str, subset: str) -> list[Path]:
    """The files out of `names` (paths below `folder`) that hold `split` of `subset` ("" = the default one).

    Raises InputError naming the splits or subsets that there are.
    """
    data = [name for name in names if PurePosixPath(name).name not in _DESCRIBING]
    configs = _configs(folder)
    if configs:
        splits = _declared(folder, _chosen(folder, configs, subset), data)
    elif subset:
        raise InputError(f"{folder} has no subsets; {subset!r} was asked for", hint="leave out `subset`")
    else:
        splits = inferred(data)
    if not splits.get(split):
        there = ", ".join(name for name, files in splits.items() if files) or "none with files"
        raise InputError(
            f"{folder} has no split {split!r}; there: {there}",
            hint="name one with `split`; or give files by a pattern, which takes all it matches: "
            f"'{folder}/**/*.jsonl'",
        )
    return [folder / name for name in splits[split]]


def inferred(names: Sequence[str]) -> Splits:
    """Splits by the names alone."""
    shards: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for of_folders in (True, False):
        found = {
            split: [name for name in names if _is_named(name, words, of_folders)]
            for split, words in _KEYWORDS.items()
        }
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": list(names)}


def _is_named(name: str, words: Iterable[str], of_folders: bool) -> bool:
    """True when a folder on the way to `name`, or else the file itself, is called after one of `words`."""
    *folders, file = PurePosixPath(name).parts
    parts, end = (folders, "([-._ 0-9].*)?") if of_folders else ([file], "[-._ 0-9].*")
    return any(re.fullmatch(rf"(.*[-._ 0-9])?{word}{end}", part, re.DOTALL) for part in parts for word in words)


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The subsets that the README's front matter declares with files of their own; none when it has none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as file:
        text = file.read(2**20).decode("utf-8-sig", errors="replace")
    front = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if not front or "configs" not in front[1]:
        return {}
    try:
        import yaml
    except ImportError as error:
        hint = "pip install 'samovar[train]', or give the files by a pattern"
        raise MissingError(f"{readme} declares subsets; reading them needs pyyaml", hint=hint) from error
    try:
        card = yaml.safe_load(front[1])
        declared = card.get("configs") or [] if isinstance(card, dict) else []
        return {
            str(config.get("config_name", "default")): config
            for config in declared
            if config.get("data_files") or config.get("data_dir")
        }
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        hint = "mend it, or give the files by a pattern"
        raise InputError(f"{readme}: its `configs` can not be read: {error}", hint=hint) from error


def _chosen(folder: Path, configs: Mapping[str, dict[str, Any]], subset: str) -> dict[str, Any]:
    if not subset and len(configs) == 1:
        return next(iter(configs.values()))
    default = next((name for name, config in configs.items() if config.get("default")), "default")
    if (wanted := subset or default) in configs:
        return configs[wanted]
    seen = f"no subset {subset!r}" if subset else "several subsets and no default one"
    raise InputError(f"{folder} has {seen}; there: {', '.join(configs)}", hint="name one with `subset`")


def _declared(folder: Path, config: Mapping[str, Any], names: Sequence[str]) -> Splits:
    """Split -> files of one subset of the front matter."""
    below = str(config.get("data_dir") or "")
    entries = config.get("data_files")
    if not entries:
        prefix = below.strip("./") + "/"
        return inferred_below(prefix, [name for name in names if name.startswith(prefix)])
    if isinstance(entries, str | dict):
        entries = [entries]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        split, patterns = (
            (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            wanted = f"{below}/{pattern}" if below else str(pattern)
            if "://" in wanted or wanted.startswith("/") or ".." in PurePosixPath(wanted).parts:
                raise InputError(
                    f"{folder}/README.md names {wanted!r}, which lies outside of the folder",
                    hint="fetch it yourself, and give it by its path",
                )
            matched = {path.relative_to(folder).as_posix() for path in folder.glob(wanted)}
            fresh = [name for name in names if name in matched and name not in splits.get(str(split), ())]
            splits.setdefault(str(split), []).extend(fresh)
    return splits


def inferred_below(prefix: str, names: Sequence[str]) -> Splits:
    """`inferred` as if the folder `prefix` were the dataset's own."""
    found = inferred([name.removeprefix(prefix) for name in names])
    return {split: [prefix + name for name in files] for split, files in found.items()}


def readable(folder: Path, endings: Iterable[str]) -> tuple[list[str], list[str]]:
    """The visible files below `folder` with one of `endings`, and the others; both sorted."""
    names = visible_files(folder)
    fits = [name for name in names if name.lower().endswith(tuple(endings))]
    return fits, sorted({*names} - {*fits})


def linked_folders(folder: Path) -> list[str]:
    """The visible links to folders below `folder`, sorted: `visible_files` does not go there."""
    found = []
    for root, folders, _ in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in folders if (path := Path(root, name)).is_symlink()]
    return sorted(path.relative_to(folder).as_posix() for path in found)
