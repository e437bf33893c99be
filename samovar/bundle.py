"""`samovar bundle`: whether a bundle is what its maker left, wherever it came from.

A bundle may come from anybody. What its list names is looked at only inside its folder; nothing in it is run,
and no model is loaded. A list can be rewritten with the files: this finds damage and what does not fit
together, and is no signature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import InputError, SamovarError

if TYPE_CHECKING:
    from foundation.report import Report

app = typer.Typer(help="Check the folder that ships.", no_args_is_help=True, rich_markup_mode=None)

INDEX = "bundle.json"
MAX_INDEX_BYTES = 64 << 20


@app.callback()
def _bundle() -> None:
    """Keeps `verify` a word of its own: an app of one command would swallow it."""


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or the stage that made it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a bundle with its list; names what is altered, missing, extra, or leads outside."""
    from samovar.cli import _print, _say
    from samovar.show import size
    from samovar.store import Bar

    folder = _bundle_in(bundle)
    with Bar(shown=not as_json) as bar:
        found = examine(folder, bar)
    if as_json:
        _print(found)
    else:
        whole = f"as it was made: {found['files']} files, {size(found['size_bytes'])}"
        _say("\n".join(f"{folder}: {problem}" for problem in found["problems"] or [whole]))
    raise typer.Exit(1 if found["problems"] else 0)


def examine(folder: Path, report: Report) -> dict[str, Any]:
    """The bundle's name, count and bytes of its files, and every problem in words.

    Raises InputError when there is no list that can be read.
    """
    index = read_index(folder)
    problems = list(_names(index["files"]))
    listed = {entry["path"]: entry for entry in index["files"] if _is_inside(entry["path"])}
    there = dict(_walk(folder))
    problems += [f"{name} is missing" for name in sorted(set(listed) - set(there))]
    problems += [
        f"{name} is extra: the list does not name it" for name in sorted(set(there) - {*listed, INDEX})
    ]
    problems += [f"{name} {fault}" for name, fault in sorted(there.items()) if fault]
    present = {name: listed[name] for name in sorted(listed) if there.get(name) == ""}
    altered = dict(_altered(folder, present, report))
    problems += [f"{name} {fault}" for name, fault in altered.items()]
    problems += _unfitting(folder, index, set(listed), set(present) - set(altered))
    return {
        "bundle": str(folder),
        "name": index.get("name"),
        "files": len(listed),
        "size_bytes": sum(entry["size_bytes"] for entry in listed.values()),
        "problems": problems,
    }


def read_index(folder: Path) -> dict[str, Any]:
    """bundle.json, each of its files having a path, a size and a digest. Raises InputError."""
    from export.bundle import FORMAT

    path, hint = folder / INDEX, "make the bundle again, or get it again from where it came"
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is no bundle: it has no {INDEX}", hint="name a bundle's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can not be read: {error}", hint=hint) from None
    version = index.get("format") if isinstance(index, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT:
        hint = "a newer Samovar made it: upgrade" if isinstance(version, int) and version > FORMAT else hint
        raise InputError(f"{path} has format {version!r}, 1..{FORMAT} are known", hint=hint)
    files = index.get("files")
    if not isinstance(files, list) or not all(map(_is_entry, files)):
        raise InputError(f"{path}: 'files' is no list of paths with sizes and digests", hint=hint)
    return dict(index)


def _is_entry(entry: Any) -> bool:
    kinds = {"path": str, "size_bytes": int, "sha256": str}
    return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())


def _is_inside(name: str) -> bool:
    """True for a plain path below the bundle: no root, no .., no other system's separators."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and ":" not in name and str(path) == name != "."
    return plain and not path.is_absolute() and ".." not in path.parts


def _names(files: list[dict[str, Any]]) -> Iterator[str]:
    """Problems of the list itself."""
    seen: set[str] = set()
    for entry in files:
        name = entry["path"]
        if not _is_inside(name):
            yield f"the list names {name[:80]!r}, which is no path inside the bundle"
        elif name.casefold() in seen:
            yield f"the list names {name} twice, on a disk where letters' case does not count"
        seen.add(name.casefold())


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, "" or what is wrong with it) of all files below; hidden ones, such as git's, are no content."""
    top = folder.resolve()
    for root, folders, names in os.walk(folder, followlinks=False):
        linked = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        for name in [*names, *linked]:
            path = Path(root, name)
            if name.startswith("."):
                continue
            inner = path.relative_to(folder).as_posix()
            try:
                outside = not path.resolve(strict=True).is_relative_to(top)
            except (OSError, RuntimeError):
                yield inner, "is a link that leads nowhere"
                continue
            if outside:
                yield inner, f"is a link that leads outside, to {path.readlink()}"
            else:
                yield inner, "" if path.is_file() else "is no file"


def _altered(folder: Path, listed: dict[str, dict[str, Any]], report: Report) -> Iterator[tuple[str, str]]:
    """Files of another size or content, and what is wrong with each."""
    from foundation.files import sha256_file

    total, done = sum(entry["size_bytes"] for entry in listed.values()), 0
    for name, entry in listed.items():
        found = (folder / name).stat().st_size
        if found != entry["size_bytes"]:
            yield name, f"has {found:,} bytes, the list says {entry['size_bytes']:,}"
        elif sha256_file(folder / name) != entry["sha256"]:
            yield name, "is altered: its content is not what the list says"
        done += entry["size_bytes"]
        report.progress(done, total, "byte")


def _unfitting(folder: Path, index: dict[str, Any], listed: set[str], sound: set[str]) -> Iterator[str]:
    """Parts that do not belong together. What is missing or altered was said: only `sound` ones are opened."""
    from export.bundle import adapter_faults
    from foundation import gguf_header
    from foundation.tokenizer import Tokenizer

    served, told = index.get("serve"), index.get("adapters", [])
    adapters = sorted(name for name in listed if name.startswith("adapters/"))
    named = [entry.get("path") for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
    if adapters != sorted(map(str, named)):
        yield f"adapters/ holds {', '.join(adapters) or 'nothing'}, the list tells of {named or 'none'}"
    if "hf/tokenizer.json" not in listed:
        yield "hf/ has no tokenizer"
    if not isinstance(served, str) or served not in listed:
        yield f"the file to serve, {str(served)[:80]!r}, is none of the bundle's"
        return
    try:
        if "hf/tokenizer.json" in sound and Tokenizer(folder / "hf").digest != index.get("tokenizer"):
            yield "hf/ has another tokenizer than the list says"
        if served not in sound:
            return
        gguf_header.check(folder / served)
        parts = {path.relative_to(folder).as_posix() for path in gguf_header.shards(folder / served)}
        if not parts <= sound:
            return
        for name in adapters:
            for fault in adapter_faults(folder / name, folder / served) if name in sound else ():
                yield f"{name} is no adapter of {served}: {fault}"
    except (SamovarError, OSError, ValueError) as error:
        yield error.message if isinstance(error, SamovarError) else f"{served}: {error}"


def _bundle_in(folder: Path) -> Path:
    """The bundle that `folder` is, or holds where it is a stage or a run."""
    inside = (folder, folder / "bundle", folder / "bundle" / "bundle")
    return next((place for place in inside if (place / INDEX).is_file()), folder)
