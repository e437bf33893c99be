"""What lies where in a GGUF file, before a byte of it is written.

    file = header | keys | table of tensors | padding to 32 bytes | every tensor, each padded to 32 bytes

Pure arithmetic: no file is opened and no weight read. The writer takes places from it, predictions take sizes.
Above `shard_bytes` of weights a model becomes several files, as llama.cpp's own tools cut it: a tensor is never
cut, the first file has all keys, every file has its number, and llama.cpp opens them all by the first.

Source: docs/gguf.md of ggml, version 3, little endian; gguf-py's GGUFWriter, which tests compare with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from export.quants import types
from foundation.errors import ModelError

ALIGNMENT_BYTES = 32
VERSION = 3
MAX_FILES = 2**16 - 1  # split.count is a uint16
_TEXT, _LIST = 8, 9  # GGUF's numbers of value types
_UINT16, _INT32 = 2, 5
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file. `shape` is in PyTorch's order, rows first; `type` is ggml's name: "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    type: str

    @cached_property
    def size_bytes(self) -> int:
        """Raises ModelError when rows are no multiple of the type's block."""
        block, size = types.block(self.type)
        if self.shape[-1] % block:
            raise ModelError(
                f"{self.name}: rows of {self.shape[-1]} can not be {self.type}, whose block is {block}"
            )
        return int(prod(self.shape) // block * size)


@dataclass(frozen=True)
class Keys:
    """Keys with their values as they lie in the file. Joined by +, so that a costly part can be kept."""

    count: int
    packed: bytes

    @classmethod
    def of(cls, writer: Any) -> Keys:
        """All keys that a gguf.GGUFWriter was given."""
        entries = writer.kv_data[0]
        return cls(
            len(entries),
            b"".join(
                _text(key)
                + struct.pack("<I", entry.type)
                + _value(entry.value, int(entry.type), entry.sub_type)
                for key, entry in entries.items()
            ),
        )

    def __add__(self, other: Keys) -> Keys:
        return Keys(self.count + other.count, self.packed + other.packed)


@dataclass(frozen=True)
class File:
    """One file. `head` is everything before the weights; places are bytes from the file's beginning."""

    name: str
    head: bytes
    tensors: tuple[tuple[Tensor, int], ...]  # (tensor, place)
    size_bytes: int


class Layout:
    """The files of a model.

    keys: a gguf.GGUFWriter with keys and no tensors, or `Keys`. tensors: in file order. shard_bytes: at most so
    many bytes of weights a file; 0 for one file. A single tensor larger than that gets a file of its own.
    Raises ModelError: rows no multiple of a block, a name twice, more files than the format can count.
    """

    def __init__(
        self, keys: Any, tensors: Sequence[Tensor], shard_bytes: int = 0, *, stem: str = "model"
    ) -> None:
        keys = keys if isinstance(keys, Keys) else Keys.of(keys)
        names = {tensor.name for tensor in tensors}
        if len(names) != len(tensors):
            raise ModelError(f"{len(tensors)} tensors have only {len(names)} names")
        groups = list(_groups(tensors, shard_bytes))
        if len(groups) > MAX_FILES:
            raise ModelError(
                f"shard_bytes {shard_bytes} makes {len(groups)} files, {MAX_FILES} are possible",
                hint="choose larger shards",
            )
        if len(groups) == 1:
            self.files = [_file(f"{stem}.gguf", keys, tensors)]
        else:
            self.files = [
                _file(
                    f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf",
                    (keys if number == 0 else Keys(0, b"")) + _split(number, len(groups), len(tensors)),
                    group,
                )
                for number, group in enumerate(groups)
            ]
        self.size_bytes = sum(file.size_bytes for file in self.files)


def _groups(tensors: Sequence[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors of each file."""
    group: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if group and shard_bytes and filled + tensor.size_bytes > shard_bytes:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += tensor.size_bytes
    yield group


def _file(name: str, keys: Keys, tensors: Sequence[Tensor]) -> File:
    table, places, filled = [], [], 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        kind = types.TENSOR_TYPES[tensor.type]
        table.append(_text(tensor.name))
        table.append(struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, filled))
        places.append(filled)
        filled += padded(tensor.size_bytes)
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), keys.count) + keys.packed + b"".join(table)
    head = head.ljust(padded(len(head)), b"\0")
    placed = tuple((tensor, len(head) + place) for tensor, place in zip(tensors, places, strict=True))
    return File(name, head, placed, len(head) + filled)


def _split(number: int, files: int, tensors: int) -> Keys:
    """What every file of several says of itself."""
    rows = (("no", _UINT16, number), ("count", _UINT16, files), ("tensors.count", _INT32, tensors))
    return Keys(
        len(rows),
        b"".join(
            _text(f"split.{key}") + struct.pack("<I", kind) + _value(value, kind) for key, kind, value in rows
        ),
    )


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else bytes(value)
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, kind: int, inner: int | None = None) -> bytes:
    """A value without its type. inner: type of a list's entries; None: that of the first, as gguf-py has it."""
    import gguf

    if kind == _TEXT:
        return _text(value)
    if kind != _LIST:
        return struct.pack("<" + _NUMBERS[kind], value)
    if inner is None:
        inner = int(
            gguf.GGUFValueType.UINT8 if isinstance(value, bytes) else gguf.GGUFValueType.get_type(value[0])
        )
    start = struct.pack("<IQ", inner, len(value))
    if inner in _NUMBERS:
        return start + struct.pack(f"<{len(value)}{_NUMBERS[inner]}", *value)
    return start + b"".join(_value(item, inner) for item in value)


def padded(count: int) -> int:
    """`count` bytes filled up to the alignment."""
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
