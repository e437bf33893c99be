"""The header of a GGUF file: its keys and the names of its tensors, and whether llama.cpp can take them.

llama.cpp ends the process on some numbers that no sound file holds. They are looked at here before it sees
the file. Lists of texts (the vocabulary) are passed over, so this takes milliseconds where gguf's own reader
takes seconds. Source: docs/gguf.md of ggml, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from foundation.errors import ModelError

MAX_BLOCKS = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_CONTEXT = 2**24
MAX_LIST = 4096  # numbers of a list that are kept: those with one number a layer
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the parts of a split model
_BLOCK = re.compile(r"blk\.(\d+)\.")


def find(path: Path) -> Path:
    """The GGUF file to open at `path`: itself, the only one of a folder, or the first of its shards.

    Raises ModelError: none, or several that are not shards of one model.
    """
    if path.is_file():
        return path
    found = files(path)
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5]) or "no GGUF file"
    raise ModelError(f"{path} holds {names}; one is needed", hint="name the file itself")


def files(folder: Path) -> list[Path]:
    """The GGUF files of a folder by name; of a model in shards the first."""
    found = sorted(file for file in folder.glob("*.gguf") if file.is_file())  # a link may lead nowhere
    return [file for file in found if not (part := SHARD.search(file.name)) or int(part[1]) == 1]


def shards(path: Path) -> list[Path]:
    """All files of the model that begins with `path`: itself, or every shard. ModelError where one lacks."""
    part = SHARD.search(path.name)
    if part is None:
        return [path]
    stem, count = path.name[: part.start()], int(part[2])
    found = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in found if not file.is_file()]:
        raise ModelError(f"{path}: of its {count} shards {', '.join(missing[:3])} is missing")
    return found


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(keys with their values, names of the tensors). Raises ModelError when the header is not whole."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data).header()
        except (struct.error, ValueError, KeyError) as error:
            raise ModelError(f"{path} is refused: its header can not be read ({error!r})") from None


def check(path: Path) -> None:
    """Raise ModelError when the header holds numbers on which llama.cpp would end the process."""
    keys, names = read(path)
    arch = keys.get("general.architecture")
    faults = _faults({key.removeprefix(f"{arch}."): value for key, value in keys.items()}, names)
    if faults:
        raise ModelError(
            f"{path} is refused: {'; '.join(faults)}", hint="the file is damaged or hostile; export it again"
        )


def _faults(keys: dict[str, Any], names: list[str]) -> list[str]:
    """What is wrong with the numbers; a key that is missing is llama.cpp's to miss."""
    out = []
    for key, top in (
        ("block_count", MAX_BLOCKS),
        ("context_length", MAX_CONTEXT),
        ("embedding_length", 2**20),
        ("feed_forward_length", 2**24),
        ("attention.head_count", 2**16),
        ("attention.head_count_kv", 2**16),
    ):
        for value in _each(keys.get(key, [])):
            if type(value) is not int or not 1 <= value <= top:
                out.append(f"{key} is {value}, 1..{top} is allowed")
                break
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        value = keys.get(key, 1e-6)
        if type(value) is not float or not (math.isfinite(value) and value > 0):
            out.append(f"{key} is {value}, a finite number above 0 is needed")
    return out or _mismatches(keys, names)


def _mismatches(keys: dict[str, Any], names: list[str]) -> list[str]:
    """Numbers that are possible alone and do not fit each other."""
    out = []
    blocks, width = keys.get("block_count"), keys.get("embedding_length")
    heads, shared = keys.get("attention.head_count"), keys.get("attention.head_count_kv")
    found = {int(match[1]) for match in map(_BLOCK.match, names) if match}
    if names and keys.get("split.count", 1) <= 1 and blocks is not None and found != set(range(blocks)):
        out.append(f"block_count is {blocks}, the tensors are those of {len(found)} blocks")
    if type(heads) is int and type(shared) is int and heads % shared:
        out.append(f"{heads} heads can not share {shared} keys")
    if type(heads) is int and width and "attention.key_length" not in keys and width % heads:
        out.append(f"embedding_length {width} is no multiple of {heads} heads")
    return out


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _Reader:
    """A place in the bytes of a header, moving forward."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> tuple[dict[str, Any], list[str]]:
        magic, version = self._number("I"), self._number("I")
        if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
            raise ValueError(f"GGUF version {version}; 2 and 3 are known")
        tensors, count = self._number("Q"), self._number("Q")
        keys: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in keys:
                raise ValueError(f"two keys {key[:80]}")
            keys[key] = self._value(self._number("I"))
        names = []
        for _ in range(tensors):
            names.append(self._text())
            self._skip(8 * self._number("I") + 4 + 8)  # sizes, type, place
        return keys, names

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        return self._list() if kind == _LIST else self._number(_NUMBERS[kind])

    def _list(self) -> list[Any] | None:
        """A list of numbers; None for one of texts, or one too long to be about layers."""
        kind, count = self._number("I"), self._number("Q")
        if kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        form = _NUMBERS[kind]
        if count <= MAX_LIST:
            return [self._number(form) for _ in range(count)]
        self._skip(count * struct.calcsize("<" + form))
        return None

    def _number(self, form: str) -> Any:
        start = self._at
        self._at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, self._data, start)[0]

    def _text(self) -> str:
        size, start = self._number("Q"), self._at
        self._skip(size)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("it goes on past the end of the file")
