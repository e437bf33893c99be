"""Tensors by key, in memory up to a cap and in files beyond it, because a frontier of L hidden states may be
larger than the memory.

Every tensor that is put is taken once, in an order that comes round again: which ones lie in files is then all
the same, and no least-recently-used order is kept. Files are written plainly, never through a memory map,
where a full disk is a SIGBUS. They are scratch: no fsync, gone with the store, and those of a killed process go
at the next start. Not here: anything that must survive a kill.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from foundation.errors import RunError
from foundation.files import disk_trouble

if TYPE_CHECKING:
    import torch

SUFFIX = ".spill"


class Filed(NamedTuple):
    """Where a tensor lies, and what its bytes do not say."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    size_bytes: int


class Spill:
    """A store of tensors under keys; `folder` is for it alone. Use as a context manager.

    held_bytes and filed_bytes are what lies in memory and in files now, peak_held_bytes and peak_filed_bytes
    the most so far.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        """Remove what a killed process left in `folder`. Raises RunError when that can not be written."""
        self.folder, self.memory_bytes = folder, memory_bytes
        self.held_bytes = self.filed_bytes = self.peak_held_bytes = self.peak_filed_bytes = 0
        self._held: dict[Hashable, torch.Tensor] = {}
        self._filed: dict[Hashable, Filed] = {}
        self._files = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{SUFFIX}"):
                left.unlink()
        except OSError as error:
            self._refuse(error, folder)

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.clear()
        with suppress(OSError):  # somebody else's files keep it
            self.folder.rmdir()

    def __len__(self) -> int:
        return len(self._held) + len(self._filed)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep `tensor` under `key`, in place of what was there. It must not be written to afterwards.

        Raises RunError when the disk is full.
        """
        self.drop(key)
        if self.held_bytes + tensor.nbytes <= self.memory_bytes:
            # A slice would hold the memory of the whole that it was cut from, which nobody counts.
            part = tensor.untyped_storage().nbytes() > tensor.nbytes
            self._held[key] = tensor.clone() if part else tensor
            self.held_bytes += tensor.nbytes
            self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)
            return
        self._files += 1
        path = self.folder / f"{self._files:08d}{SUFFIX}"
        self._write(path, tensor)
        self._filed[key] = Filed(path, tensor.shape, tensor.dtype, tensor.device, tensor.nbytes)
        self.filed_bytes += tensor.nbytes
        self.peak_filed_bytes = max(self.peak_filed_bytes, self.filed_bytes)

    def take(self, key: Hashable) -> torch.Tensor:
        """What was put under `key`, on the device where it was, bit for bit; it is no longer here then.

        Raises KeyError for a key that is not there, RunError when somebody altered the file.
        """
        if key in self._held:
            tensor = self._held.pop(key)
            self.held_bytes -= tensor.nbytes
            return tensor
        tensor = _read(self._filed[key])
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget `key`, if it is there."""
        if key in self._held:
            self.held_bytes -= self._held.pop(key).nbytes
        elif key in self._filed:
            filed = self._filed.pop(key)
            filed.path.unlink(missing_ok=True)
            self.filed_bytes -= filed.size_bytes

    def clear(self) -> None:
        """Forget all keys."""
        for key in [*self._held, *self._filed]:
            self.drop(key)

    def _write(self, path: Path, tensor: torch.Tensor) -> None:
        import torch

        content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        try:
            with path.open("wb") as file:
                file.write(content.data)
        except OSError as error:
            path.unlink(missing_ok=True)
            self._refuse(error, path)

    def _refuse(self, error: OSError, path: Path) -> None:
        """Raise what `error` means for the user."""
        if error.errno == errno.EFBIG:  # a limit on the size of a file is a disk that is full for this one
            error = OSError(errno.ENOSPC, error.strerror, error.filename)
        trouble = disk_trouble(error, path)
        if trouble is None:
            raise error
        hint = trouble.hint
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint += f"; or raise spill_bytes (now {self.memory_bytes}), or read fewer rows at once"
        raise RunError(trouble.message, hint=hint) from error


def _read(filed: Filed) -> torch.Tensor:
    """The tensor in a file. It goes into memory aligned as torch's own: some kernels round by alignment."""
    import torch

    content = torch.empty(filed.size_bytes, dtype=torch.uint8)
    found = -1
    if filed.path.is_file():
        with filed.path.open("rb") as file:
            found = file.readinto(content.numpy().data)
    if found != filed.size_bytes:
        raise RunError(
            f"{filed.path}: {max(found, 0)} bytes of {filed.size_bytes} are there; another process altered it",
            hint="leave the run's folder alone while it runs; the same command goes on",
        )
    return content.view(filed.dtype).reshape(filed.shape).to(filed.device)
