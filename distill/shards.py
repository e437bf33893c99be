"""The shards of one store while they are written: by several ranks, and in spite of stops and kills.

Shards are written whole, and which of them are there is all that a resumed capture needs to know. Under
torchrun rank r writes shards r, r + W, ...; rank 0 waits for the others by looking at the folder, which works
across machines and needs no process group, and seals the store. A shard's bytes are the same whoever writes it
(see teacher.py). While one shard is encoded in a thread, the next one goes through the model.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.sampling import uniforms
from distill.store import (
    HEADER,
    Header,
    Shard,
    data_digest,
    row_key,
    seal,
    shard_facts,
    shard_path,
    template_digest,
    write_shard,
)
from distill.teacher import answer_tokens, read_shard
from foundation.errors import ArtifactError, ModelError
from foundation.files import read_json, write_json, writing
from foundation.ranks import is_main
from foundation.report import Report, stop_if_asked
from foundation.rows import Row
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from distill.capture import Settings

POLL_SECONDS = 0.5
SUMS = ("entries", "tail_mass")  # over a shard's positions, kept beside it: the figures are their means


class Capture:
    """The shards of one store: which are missing, how one is made, and the header that closes them."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, rows: list[Row], out: Path) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.store, self.work, self.rows = out / "store", out / ".work", len(rows)
        size = settings.shard_rows
        self.parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.keys = [[row_key(row) for row in part] for part in self.parts]
        self.lengths = [[answer_tokens(row) for row in part] for part in self.parts]
        for folder in (self.store, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        if is_main():  # nothing is complete while it may still be written; a late rank must not undo the end
            (self.store / HEADER).unlink(missing_ok=True)

    def whole(self, number: int) -> Shard | None:
        """Facts of a shard that is on disk, undamaged and of these rows; None for any other."""
        if read_json(self._sums(number)) is None:
            return None
        try:
            shard = shard_facts(shard_path(self.store, number))
        except ArtifactError:
            return None
        same = (shard.rows, shard.positions) == (len(self.parts[number]), sum(self.lengths[number]))
        return shard if same else None

    def missing(self, numbers: Iterable[int], report: Report) -> list[int]:
        """Those of `numbers` that must be written, be it once more."""
        found = [number for number in numbers if self.whole(number) is None]
        for number in found:
            if (path := shard_path(self.store, number)).exists():
                report.note(f"{path.name} is damaged or of other data; it is captured again")
        return found

    def write(self, model: Any, numbers: list[int], report: Report) -> None:
        """Read and write these shards; one is encoded while the next is read. Honours a stop between two."""
        pace = _Pace(self, numbers, report)
        with ThreadPoolExecutor(1) as encoder:
            encoding: tuple[int, Future[int]] | None = None
            for number in numbers:
                if encoding and report.stop_requested():
                    encoding[1].result()
                    stop_if_asked(report)
                columns = self._read(model, number, pace)
                if encoding:  # never more than two shards in memory
                    pace.wrote(encoding[0], encoding[1].result())
                encoding = number, encoder.submit(self._encode, number, columns)
            if encoding:
                encoding[1].result()

    def _read(self, model: Any, number: int, pace: _Pace) -> dict[str, np.ndarray]:
        import torch

        chosen = self.settings
        draws = chosen.draws if chosen.support == "sampled" else 0
        pairs = zip(self.keys[number], self.lengths[number], strict=True)
        pace.begin(number)
        try:
            return read_shard(
                model,
                self.parts[number],
                chosen.keep,
                [uniforms(chosen.seed, key, length, draws) for key, length in pairs],
                vocab_tokens=len(self.tokenizer),
                temperature=chosen.temperature,
                batch_tokens=chosen.batch_tokens,
                pad_id=self.tokenizer.pad_id,
                after_batch=pace.batch,
            )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"the teacher and a batch of {chosen.batch_tokens} tokens do not fit the device's memory",
                hint="lower batch_tokens, or take precision = 'bf16' or 'nf4'",
            ) from None

    def _encode(self, number: int, columns: dict[str, np.ndarray]) -> int:
        """Write one shard, and before it the sums that the figures need; returns the shard's bytes."""
        import numpy as np

        path, sampled = shard_path(self.store, number), self.settings.support == "sampled"
        sums = {
            "entries": int((columns["topk_logprobs"] > -np.inf).sum()),
            "tail_mass": float(np.exp(columns["tail_logprob"].astype(np.float64)).sum()),
        }
        with writing(path):
            write_json(self._sums(number), sums)
            write_shard(
                path,
                columns,
                self.keys[number],
                self.lengths[number],
                vocab_tokens=len(self.tokenizer),
                bits=self.settings.bits,
                seed=(self.settings.seed << 24) + number if sampled else None,
            )
        return path.stat().st_size

    def _sums(self, number: int) -> Path:
        return self.work / f"{shard_path(self.store, number).stem}.json"

    def wait(self, mine: Container[int], report: Report) -> list[Shard]:
        """All shards, in order, once they are whole; those that are not in `mine` come from other ranks."""
        found: dict[int, Shard] = {}
        while True:
            for number in range(len(self.parts)):
                if number not in found and (shard := self.whole(number)):
                    found[number] = shard
                elif number not in found and number in mine:
                    path = shard_path(self.store, number)
                    raise ArtifactError(f"{path} was written and can not be read back", hint="check the disk")
            if len(found) == len(self.parts):
                return [found[number] for number in range(len(self.parts))]
            report.progress(sum(shard.rows for shard in found.values()), self.rows, "row")
            stop_if_asked(report)
            time.sleep(POLL_SECONDS)

    def seal(self, shards: list[Shard], teacher: str) -> Header:
        """Remove what a kill left half written, and close the store with its header."""
        chosen = self.settings
        header = Header(
            support=chosen.support,
            top_k=min(chosen.entries, len(self.tokenizer)),
            mass=chosen.mass,
            draws=chosen.draws if chosen.support == "sampled" else 0,
            bits=chosen.bits,
            temperature=chosen.temperature,
            vocab_tokens=len(self.tokenizer),
            teacher=teacher,
            tokenizer=self.tokenizer.digest,
            tokenizer_tokens=len(self.tokenizer),
            template=template_digest(self.tokenizer),
            data=data_digest([key for part in self.keys for key in part]),
            rows=self.rows,
            positions=sum(shard.positions for shard in shards),
            shards=tuple(shards),
        )
        for left in {path.name for path in self.store.iterdir()} - {shard.name for shard in shards}:
            (self.store / left).unlink()
        seal(self.store, header)
        return header

    def means(self) -> dict[str, float]:
        """Mean number of entries of a position, and mean mass outside them; exact, before the codec."""
        sums = [read_json(self._sums(number)) for number in range(len(self.parts))]
        positions = sum(map(sum, self.lengths))
        return {f"mean_{name}": sum(each[name] for each in sums) / positions for name in SUMS}


class _Pace:
    """Progress of a capture: rows of all ranks, positions and bytes of this one."""

    def __init__(self, capture: Capture, missing: list[int], report: Report) -> None:
        self._capture, self._missing, self._report = capture, set(missing), report
        self._rows = 0  # done
        self._positions, self._written_positions, self._written_bytes = 0, 0, 0
        self._started = time.monotonic()

    def begin(self, number: int) -> None:
        """Shard `number` is read from now on, and those before it are done."""
        self._rows = sum(
            len(part)
            for n, part in enumerate(self._capture.parts)
            if (n < number if n in self._missing else shard_path(self._capture.store, n).exists())
        )

    def batch(self, rows: int, positions: int) -> None:
        """So many more were read."""
        self._rows += rows
        self._positions += positions
        seconds = max(time.monotonic() - self._started, 1e-9)
        figures = {"positions_per_second": self._positions / seconds}
        if self._written_positions:
            figures["bytes_per_position"] = self._written_bytes / self._written_positions
        self._report.progress(self._rows, self._capture.rows, "row", **figures)

    def wrote(self, number: int, size_bytes: int) -> None:
        """Shard `number` is on disk."""
        self._written_positions += sum(self._capture.lengths[number])
        self._written_bytes += size_bytes
