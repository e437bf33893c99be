"""What a stage leaves behind: a folder of files and the manifest that says what they are.

    NAME.partial/     being made: files, .work/ (scratch for resuming), .fingerprint (what it will be; kind)
    NAME/             finished: files, settings.json, manifest.json
    NAME.replaced/    a finished one on its way out, for the moment of its replacement
    NAME.fresh/       a NAME.partial being begun, with what it keeps of the one before it

An artifact is known by its content. Its *digest* is that of its sorted (path, sha256); manifest.json and
settings.json stay out of it, for they hold times and memory. Its *fingerprint* says what it was made
from: kind, version, settings, seed, and the content digests of its inputs. Same fingerprint: no need to
make it again.

The steps of finishing, in this order, each of them whole or not done at all:

    record     1. settings.json   2. manifest.json
    publish    3. delete .work and .fingerprint   4. NAME -> NAME.replaced   5. NAME.partial -> NAME
               6. delete NAME.replaced, its manifest first

A kill between any two leaves a state that `settle` and `begin` understand: before 2 the stage goes on
from .work; after 2 only publish is repeated; between 4 and 5 `settle` puts NAME.replaced back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foundation.errors import ArtifactError
from foundation.files import (
    TEMPORARY,
    read_json,
    reading_suffix,
    sha256_file,
    sync_folder,
    tree_digest,
    write_json,
    writing,
)
from foundation.stage import Figures

FORMAT = 1
MANIFEST = "manifest.json"
SETTINGS = "settings.json"
WORK = ".work"
MARK = ".fingerprint"


@dataclass(frozen=True)
class Identity:
    """All that decides an artifact's bytes. `inputs`: role -> content digest, or a list of them."""

    kind: str
    version: int
    settings: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, str | list[str]]

    @cached_property
    def fingerprint(self) -> str:
        value = [self.kind, self.version, self.settings, self.seed, self.inputs]
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a finished artifact says of itself. `files`: path -> (size in bytes, sha256)."""

    identity: Identity
    files: Mapping[str, tuple[int, str]]
    figures: Figures
    seconds: float  # of the process that finished it
    peak_memory_bytes: int

    @cached_property
    def digest(self) -> str:
        return tree_digest((path, sha256) for path, (_, sha256) in self.files.items())

    @property
    def tokenizer(self) -> str | None:
        """sha256 of the outermost tokenizer.json, by which vocabularies are compared."""
        found = [path for path in self.files if path.rpartition("/")[2] == "tokenizer.json"]
        return self.files[min(found, key=lambda path: (path.count("/"), path))][1] if found else None

    def role_digest(self, path: str) -> str:
        """Content digest of the file or folder `path` in the artifact, as DigestCache.content gives it."""
        if path in self.files:
            return tree_digest([(reading_suffix(Path(path)), self.files[path][1])])
        inside = {name.removeprefix(path + "/"): entry for name, entry in self.files.items()
                  if name.startswith(path + "/")}  # fmt: skip
        visible = [(name, entry[1]) for name, entry in inside.items() if not _hidden(name)]
        if not visible:
            raise ArtifactError(f"a {self.identity.kind} stage did not write its {path}")
        return tree_digest(visible)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.identity.kind,
            "version": self.identity.version,
            "settings": self.identity.settings,
            "seed": self.identity.seed,
            "inputs": self.identity.inputs,
            "fingerprint": self.identity.fingerprint,
            "files": {path: {"size_bytes": size, "sha256": sha} for path, (size, sha) in self.files.items()},
            "digest": self.digest,
            "tokenizer": self.tokenizer,
            "figures": self.figures,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Raises ArtifactError when the manifest does not agree with itself."""
        try:
            if value["format"] != FORMAT:
                raise ArtifactError(f"format {value['format']!r} is not {FORMAT}, the one known here")
            keys = ("kind", "version", "settings", "seed", "inputs")
            manifest = cls(
                identity=Identity(**{key: value[key] for key in keys}),
                files={path: (int(e["size_bytes"]), str(e["sha256"])) for path, e in value["files"].items()},
                figures=value["figures"],
                seconds=value["seconds"],
                peak_memory_bytes=value["peak_memory_bytes"],
            )
            stated = (value["digest"], value["fingerprint"], value["tokenizer"])
            if stated != (manifest.digest, manifest.identity.fingerprint, manifest.tokenizer):
                raise ArtifactError("it was altered: its digests do not follow from its entries")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"it is not a manifest: {error!r}") from error
        return manifest


# ---------------------------------------------------------------------------------------------- reading


def partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def old_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def load(folder: Path) -> Manifest | None:
    """The manifest of the finished artifact `folder`; None where there is none.

    While a replacement is half done, the one put aside still counts. Raises ArtifactError when a
    manifest is there and can not be believed.
    """
    for place in (folder, old_of(folder)):
        if (place / MANIFEST).is_file():
            return _read_manifest(place)
        if place.exists():
            return None
    return None


def hint_for(folder: Path, missing: str, otherwise: str) -> str:
    """What to do about a `folder` without the file `missing`: name the folder that was meant, or `otherwise`.

    Who gives the folder of a stage has it one level below; who gives the file itself, one above.
    """
    if folder.is_file() and (folder.parent / missing).is_file():
        return f"that is a file; give its folder, {folder.parent}"
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{missing}"))
    if not found:
        return otherwise
    given = "the folder of a stage" if (folder / MANIFEST).is_file() else "one folder too high"
    return f"that is {given}; give {' or '.join(map(str, found[:5]))}"


def partial_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the unfinished NAME.partial, or None where nothing can be resumed."""
    partial = partial_of(folder)
    if (partial / MANIFEST).is_file():
        return _read_manifest(partial).identity.fingerprint
    return next(iter(_mark(partial)), None)


def kinds_at(folder: Path) -> set[str]:
    """Kinds of the stages whose work, finished or not, would be replaced by making `folder` anew."""
    kinds = {manifest.identity.kind} if (manifest := load(folder)) else set()
    return kinds | set(_mark(partial_of(folder))[1:])


def verify(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> list[str]:
    """Every altered, missing or extra file of a finished artifact, one line each; empty when it is whole.

    Raises ArtifactError when there is no manifest to compare with, or it was altered itself.
    """
    manifest = load(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} has no manifest", hint="it was not finished; run its recipe again")
    place = folder if (folder / MANIFEST).is_file() else old_of(folder)
    problems = []
    for path, (size, digest) in sorted(manifest.files.items()):
        file = place / path
        if file.is_symlink() or not file.is_file():
            problems.append(f"missing: {path}")
        elif (now := file.stat().st_size) != size:
            problems.append(f"altered: {path} ({now} bytes, the manifest says {size})")
        elif sha256(file) != digest:
            problems.append(f"altered: {path} (its sha256 is not the manifest's)")
    if read_json(place / SETTINGS) != manifest.identity.settings:
        problems.append(f"altered: {SETTINGS} (it is not what the manifest says)")
    return problems + [f"extra: {path}" for path in extra_files(place, manifest)]


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Visible files in a finished artifact that its manifest does not name: not ours, so never deleted."""
    extra = set(_files(folder)) - set(manifest.files)
    return sorted(path for path in extra if not _hidden(path))


# ---------------------------------------------------------------------------------------------- writing


def settle(folder: Path) -> None:
    """Put right what a kill in the middle of `publish` left. Call it under the run's lock."""
    old = old_of(folder)
    if not _is_there(old):
        return
    with writing(folder):
        if not folder.exists() and (old / MANIFEST).is_file():
            folder.unlink(missing_ok=True)  # a link to nowhere
            old.rename(folder)
            sync_folder(folder.parent)
        else:
            _remove(old)


def begin(folder: Path, fingerprint: str, kind: str = "", keeps: Mapping[str, str] | None = None) -> Path:
    """The NAME.partial to work in: the one with this fingerprint as it stands, or a fresh one of `kind`.

    `keeps` names what is not thrown away with work of another fingerprint, because its worth does not depend
    on the settings (a teacher's paid answers): path in a NAME.partial of that kind -> path in a finished NAME.
    Raises ArtifactError rather than ever replacing a folder, or a file in it, that Samovar did not write.
    """
    _refuse_foreign(folder)
    partial, fresh = partial_of(folder), folder.with_name(folder.name + ".fresh")
    with writing(partial):
        if (fresh / MARK).is_file() and not _is_there(partial):  # a kill came between the last two lines below
            fresh.rename(partial)
        if partial_fingerprint(folder) == fingerprint:
            return partial
        if _is_there(fresh):
            _remove(fresh)
        fresh.mkdir(parents=True)
        for path, source in _kept(folder, kind, keeps or {}):
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, fresh / path)
        (fresh / MARK).write_text(f"{fingerprint} {kind}".strip() + "\n")
        sync_folder(fresh)
        if _is_there(partial):
            _remove(partial)
        fresh.rename(partial)
        sync_folder(partial.parent)
    return partial


def _kept(folder: Path, kind: str, keeps: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """(path in a new partial, the file to copy there), from unfinished work of `kind` or else from finished."""
    partial, manifest = partial_of(folder), load(folder)
    for path, finished in keeps.items():
        if kind in _mark(partial)[1:] and (partial / path).is_file():
            yield path, partial / path
        elif manifest and manifest.identity.kind == kind and (folder / finished).is_file():
            yield path, folder / finished


def foreign(folder: Path) -> str:
    """What replacing `folder` would delete that no stage wrote, in words; empty when nothing."""
    if not folder.exists():
        return ""
    if not folder.is_dir() or (not (folder / MANIFEST).is_file() and any(folder.iterdir())):
        return f"{folder} is there and was not made by a stage"
    if (folder / MANIFEST).is_file() and (extra := extra_files(folder, _read_manifest(folder))):
        return f"{folder} holds files that no stage wrote: {', '.join(extra)}"
    return ""


def _refuse_foreign(folder: Path) -> None:
    if problem := foreign(folder):
        raise ArtifactError(problem, hint="move that away, then run again: the folder is about to be replaced")


def distrust(folder: Path) -> None:
    """Let nobody go on with NAME.partial: what is in it was made from something else than it says."""
    (partial_of(folder) / MARK).unlink(missing_ok=True)


def is_recorded(folder: Path) -> bool:
    """True when NAME.partial has its manifest, so that only `publish` is left to do."""
    return (partial_of(folder) / MANIFEST).is_file()


def record(
    folder: Path, identity: Identity, figures: Figures, seconds: float, peak_memory_bytes: int
) -> Manifest:
    """Hash and fsync every file of NAME.partial, then write its manifest: from here on it is finished."""
    partial = partial_of(folder)
    with writing(partial):
        files = {}
        for path in _files(partial):
            file = partial / path
            if TEMPORARY.fullmatch(file.name):
                file.unlink()
                continue
            if file.is_symlink():
                raise ArtifactError(f"{file} is a link; an artifact holds regular files only")
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            files[path] = (file.stat().st_size, sha256_file(file))
        for parent in {(partial / path).parent for path in files}:
            sync_folder(parent)
        if not files:
            raise ArtifactError(f"the {identity.kind} stage wrote no file into {partial}")
        manifest = Manifest(identity, files, figures, seconds, peak_memory_bytes)
        write_json(partial / SETTINGS, dict(identity.settings))
        write_json(partial / MANIFEST, manifest.to_json())
    return manifest


def publish(folder: Path) -> None:
    """Make the recorded NAME.partial the finished NAME. What stood there goes only after it is replaced."""
    partial, old = partial_of(folder), old_of(folder)
    _refuse_foreign(folder)
    with writing(folder):
        shutil.rmtree(partial / WORK, ignore_errors=True)
        (partial / MARK).unlink(missing_ok=True)
        if _is_there(old):
            _remove(old)
        if _is_there(folder):
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
        if _is_there(old):
            _remove(old)


def _remove(folder: Path) -> None:
    """Delete an artifact or a partial so that a kill half-way leaves nothing that looks usable.

    Of a link to another place only the link goes: what it points to was put there by somebody.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # the latter for a link to nowhere


def _mark(partial: Path) -> list[str]:
    """What .fingerprint holds: the fingerprint and the kind; empty where nothing was begun."""
    try:
        return (partial / MARK).read_text().split()
    except OSError:
        return []


def _files(folder: Path) -> list[str]:
    """Relative paths of an artifact's own files, sorted: all but scratch, mark, manifest and settings."""
    found = []
    for root, folders, names in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name != WORK]
            names = [name for name in names if name not in (MANIFEST, SETTINGS, MARK)]
        names += [name for name in folders if Path(root, name).is_symlink()]
        found += [Path(root, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    value = read_json(path)
    try:
        return Manifest.from_json(value if isinstance(value, dict) else {})
    except ArtifactError as error:
        hint = f"delete {folder}; the same command then makes it again"
        raise ArtifactError(f"{path} can not be used: {error.message}", hint=hint) from error
