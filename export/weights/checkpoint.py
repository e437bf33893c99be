"""The weights of a Hugging Face folder, some rows of a tensor at a time, as numpy and without torch.

A safetensors file is a table of contents in JSON and then raw bytes. It is read here by hand, because
numpy has no bfloat16 and the library's numpy side refuses such files: a bfloat16 is the upper half of
a float32, so a shift restores it. Rows are read into one buffer and not mapped: mapped pages count as
memory of the process, so that a 30 GB model seemed to need 30 GB.
Untrusted input: sizes, offsets and names are checked. Pickled checkpoints (*.bin, *.pt) are refused.
Source: https://github.com/huggingface/safetensors (format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from foundation.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits are kept
BLOCK_BYTES = 1 << 20  # of a tensor in memory at once: with its copy in another type it stays in the cache
HEADER_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning


class Checkpoint:
    """All tensors of a folder's *.safetensors, sharded or not; or of its one `file`, an adapter's for one.

    Raises ModelError: no such files, damaged headers, or a tensor type other than F32, F16, BF16.
    """

    def __init__(self, folder: Path, file: str = "") -> None:
        self.folder = folder
        self._entries: dict[str, Entry] = {}
        for path in [folder / file] if file else _files(folder):
            for name, entry in _table(path):
                if name in self._entries:
                    raise ModelError(f"tensor {name} is in {self._entries[name].file.name} and in {path.name}")
                self._entries[name] = entry

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def blocks(self, name: str, multiple: int = 1) -> Iterator[np.ndarray]:
        """The tensor's rows in order, some at a time: always a multiple of `multiple`, but for the last.

        float32 or float16, or uint16 with the bits of bfloat16. A block may be changed, and is valid until the
        next one is asked for. Raises ModelError when the file ends too early.
        """
        import numpy as np

        entry = self._entries[name]
        rows, inner = entry.shape[0] if entry.shape else 1, entry.shape[1:]
        row_bytes = prod(inner) * ITEM_BYTES[entry.dtype]
        step = max(BLOCK_BYTES // max(row_bytes, 1) // multiple, 1) * multiple
        buffer = bytearray(min(step, rows) * row_bytes)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                view = memoryview(buffer)[: count * row_bytes]
                _fill(view, stream, name)
                yield np.frombuffer(view, STORED[entry.dtype]).reshape(count, *inner)

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, whatever the file keeps: for small ones."""
        import numpy as np

        blocks = [floats(block).copy() for block in self.blocks(name)]
        return np.concatenate(blocks).reshape(self.shape(name)) if blocks else np.empty(self.shape(name), "f4")


def floats(values: np.ndarray) -> np.ndarray:
    """float32 of what `Checkpoint.blocks` gives."""
    import numpy as np

    if values.dtype == np.uint16:
        values = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)


def _fill(view: memoryview, stream: IO[bytes], name: str) -> None:
    """Read until `view` is full."""
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(
                f"tensor {name}: {getattr(stream, 'name', 'its file')} ends before it",
                hint="the file was cut while it was read; download or save it again",
            )
        view = view[count:]


def _files(folder: Path) -> list[Path]:
    """The weight files that the folder's index names, or its only one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not an index of shards: {error!r}") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{index.name} names {name!r}, which is no file of that folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json",
        hint="save the model with save_pretrained; pickled weights (*.bin, *.pt) are not read",
    )


def _table(file: Path) -> Iterator[tuple[str, Entry]]:
    """The tensors that a file's header lists, every number checked against the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, HEADER_LIMIT_BYTES):
            raise ModelError(f"{file} is not a safetensors file: its header claims {length} of {size} bytes")
        try:
            table = json.loads(stream.read(length))
            if not isinstance(table, dict):
                raise ValueError(f"its header is a {type(table).__name__}, not a table")
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file} is not a safetensors file: {error}") from error
    for name, row in table.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(row["dtype"]), tuple(int(n) for n in row["shape"])
            start, end = (int(n) for n in row["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: tensor {name} has a damaged entry: {error!r}") from error
        if dtype not in ITEM_BYTES:
            raise ModelError(
                f"{file}: tensor {name} is {dtype}; {', '.join(ITEM_BYTES)} can be exported",
                hint="save the model in float32, float16 or bfloat16",
            )
        whole = 0 <= start <= end <= size - 8 - length and min(shape, default=0) >= 0
        if not whole or end - start != prod(shape) * ITEM_BYTES[dtype]:
            raise ModelError(f"{file}: tensor {name} has wrong offsets; the file is damaged or cut short")
        yield name, Entry(file, dtype, shape, 8 + length + start)
