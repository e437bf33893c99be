"""Files that survive a kill, and what a file's content is called.

Writing: a temporary file beside the target, fsync, rename, fsync of the folder. A reader therefore sees
the old content or the new one, never half of either.

Content: a file is named by its sha256, a folder by the sorted (path, sha256) of its files. Digests of
large inputs are kept in a `DigestCache` under (path, size, mtime), so that planning a run again costs
one stat a file.

Not here: formats (see dataio.py), and what a stage's output is (see artifact.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from foundation.errors import InputError, RunError, SamovarError

# What write_atomic, and the safetensors library, may leave behind when they are killed.
TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp|\.tmp[A-Za-z0-9]{6}")

PACKED = (".gz", ".bz2", ".xz", ".zst")  # endings after which the one before says what a file holds

_CHUNK_BYTES = 1 << 20
_RACY_NS = 2_000_000_000  # a file younger than this may change again under the same mtime


def write_atomic(path: Path, data: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` at once. `durable=False` leaves out the fsyncs: for heartbeats.

    Raises RunError when the disk is full or may not be written; the old content then stands.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """`write_atomic` of JSON with sorted keys: the same value gives the same bytes."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1, allow_nan=False)
    write_atomic(path, text + "\n", durable=durable)


def read_json(path: Path) -> Any:
    """The value in `path`, or None where it is missing or not whole JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_trouble(error: BaseException, path: Path) -> SamovarError | None:
    """The refusal that a full disk or a path that can not be used deserves; None for any other error."""
    if not isinstance(error, OSError):
        if "no space left" not in str(error).lower():  # libraries in Rust and C say it in their own errors
            return None
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = error.filename or path
    kept = "nothing finished was lost"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space on that disk; the same command then goes on from the last checkpoint"
        return RunError(f"the disk is full: could not write {place}; {kept}", hint=hint)
    if error.errno == errno.EROFS:
        hint = "name a folder that can be written with --out"
        return RunError(f"{place} lies on a read-only file system; {kept}", hint=hint)
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "give yourself the right to it, or name another folder with --out"
        return RunError(f"this user may not access {place}; {kept}", hint=hint)
    if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return RunError(f"{place} can not be used: {error.strerror}; {kept}", hint="check that path")
    return None


def check_space(folder: Path, needed_bytes: int, hint: str) -> None:
    """Raise RunError when the disk of `folder` has less than `needed_bytes` free. hint: what to do then."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RunError(f"{needed_bytes:,} bytes are needed, the disk of {folder} has {free:,} free", hint=hint)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around anything that writes under `path`: disk trouble leaves as RunError."""
    try:
        yield
    except SamovarError:
        raise
    except Exception as error:  # not all are OSErrors: see disk_trouble
        trouble = disk_trouble(error, path)
        if trouble is None:
            raise
        raise trouble from error


def sha256_file(path: Path) -> str:
    """sha256 of the file's bytes, in hex. Raises InputError for a pipe or a device: those may have no end."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file that can be read to its end", hint="replace it by a plain file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(entries: Iterable[tuple[str, str]]) -> str:
    """One digest of many files, given as (path, sha256) in any order."""
    text = json.dumps(sorted(entries), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def visible_files(folder: Path) -> list[str]:
    """Relative paths of the files below `folder`, sorted; hidden ones are no content and left out."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder).as_posix() for name in names if name[0] != "."]
    return sorted(found)


def refuse_dangling(path: Path) -> None:
    """Raise InputError naming each link, `path` itself or a visible one below it, that leads nowhere.

    They are not left out: what nobody missed then could be a shard of a model, or a year of a corpus.
    """
    files = [path / name for name in visible_files(path)] if path.is_dir() else [path]
    dangling = [file for file in files if file.is_symlink() and not file.exists()]
    if dangling:
        told = "; ".join(f"{link} is a link that leads nowhere, to {link.readlink()}" for link in dangling[:5])
        more = f"; and {len(dangling) - 5} more" if len(dangling) > 5 else ""
        raise InputError(told + more, hint="put back what it points to, or remove the link")


Stamps = dict[str, list[int]]


def stamps(path: Path) -> Stamps:
    """[size, mtime_ns] of the file `path`, or of each visible file in it: what an edit changes."""
    files = [path / name for name in visible_files(path)] if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue
        found[str(file)] = [stat.st_size, stat.st_mtime_ns]
    return found


def opened_for_lines(path: Path) -> BinaryIO:
    """The file, made where there is none, for reading and appending; cut after its last whole line.

    A kill can tear the line that was being written, and no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = path.open("rb+")
    whole = 0
    for raw in file:
        whole += len(raw) if raw.endswith(b"\n") else 0
    file.truncate(whole)
    return file


def reading_suffix(path: Path) -> str:
    """The end of a name that says how the file is read: its suffix, of a packed file the one before it too."""
    return "".join(path.suffixes[-2:]) if path.suffix.lower() in PACKED else path.suffix


class DigestCache:
    """sha256 of files, remembered in one JSON file as {path: [size, mtime_ns, sha256]}.

    Safe to share between runs, and safe to delete. A file changed in the last two seconds is hashed but
    not remembered: it could change again without a new mtime.
    """

    def __init__(self, store: Path | None = None) -> None:
        self.store = store
        known = read_json(store) if store else None
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}
        self._changed = False
        self.hashed: dict[str, Stamps] = {}  # input -> its stamps just before its digest was taken

    def sha256(self, path: Path) -> str:
        """sha256 of one file. The Hugging Face cache names its large files by their sha256 already."""
        if path.is_symlink():
            target = path.resolve()
            if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
                return target.name
        key, stat = str(path.absolute()), path.stat()
        match self._known.get(key):
            case [stat.st_size, stat.st_mtime_ns, str(digest)]:
                return digest
        digest = sha256_file(path)
        if time.time_ns() - stat.st_mtime_ns > _RACY_NS:
            self._known[key] = [stat.st_size, stat.st_mtime_ns, digest]
            self._changed = True
        return digest

    def content(self, path: Path) -> str:
        """Digest of an input: a folder by its files; a file as a folder of one, named by its suffix.

        A packed file is named by both of its suffixes, for the first says how it is read. So neither moving
        nor renaming an input makes a stage stale. Raises InputError when it is missing, an empty folder, or
        holds a link that leads nowhere.
        """
        refuse_dangling(path)
        self.hashed[str(path)] = stamps(path)
        if path.is_dir():
            names = visible_files(path)
            if not names:
                raise InputError(f"{path} is an empty folder", hint="name a folder that holds the input")
            return tree_digest((name, self.sha256(path / name)) for name in names)
        if not path.is_file():
            raise InputError(f"{path} is not there", hint="check the path; it is read from the recipe's folder")
        return tree_digest([(reading_suffix(path), self.sha256(path))])

    def save(self) -> None:
        """Write what was learned, if anything was and a store was named."""
        if self.store and self._changed:
            write_json(self.store, self._known, durable=False)
            self._changed = False
