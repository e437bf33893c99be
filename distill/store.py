"""The store: what a teacher said about each response token, on disk, written once and read many times.

A folder: meta.json, and shards (safetensors) of whole conversations. A conversation is found by the digest of
its ids and labels, never by its number: a student that tokenises or templates differently finds nothing, and is
told so, instead of learning from another token's distribution.

Columns, one entry a counted token (label), P tokens in a shard:
  topk_ids [P, K]  topk_logprobs [P, K] descending  tail_logprob [P] = log(1 - sum of the K probabilities)
  gold_logit [P] = raw logit of the gold token, 0 where it is outside the top-K  log_z [P] = log normaliser
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.chat import IGNORED
from foundation.errors import ArtifactError, ModelError
from foundation.rows import Row, Rows
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
COLUMNS = ("topk_ids", "topk_logprobs", "tail_logprob", "gold_logit")
KEY_BYTES = 16


def row_key(row: Row) -> bytes:
    """16 bytes that name a conversation: its token ids and which of them are counted."""
    digest = hashlib.sha256(row["input_ids"].astype("<i8").tobytes())
    digest.update((row["labels"] != IGNORED).tobytes())
    return digest.digest()[:KEY_BYTES]


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, columns: dict[str, np.ndarray], keys: list[bytes], lengths: list[int]) -> None:
    """Write one shard whole or not at all; keys and lengths name its conversations, in order."""
    import numpy as np
    from safetensors.numpy import save

    packed = {
        **columns,
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),  # [R, 16]
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),  # [R + 1]
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(save(packed))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


class TopKStore:
    """A finished store, opened for reading."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ArtifactError(
                f"{folder}: not a finished top-K store (no readable meta.json)",
                hint="run its distill.capture stage to the end",
            ) from None
        if self.meta.get("format") != FORMAT:
            raise ArtifactError(
                f"{folder}: store format {self.meta.get('format')}; this version reads {FORMAT}"
            )
        self.folder = folder
        self._shards: list[Any] = [
            safe_open(str(shard_path(folder, n)), "numpy") for n in range(self.meta["shards"])
        ]
        self._where: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            starts = shard.get_tensor("starts")
            for place, key in enumerate(shard.get_tensor("keys")):
                self._where[key.tobytes()] = (number, int(starts[place]), int(starts[place + 1]))

    def columns(self, row: Row) -> dict[str, np.ndarray]:
        """The columns of one conversation, one entry a counted token. Raises ModelError if it is not stored."""
        try:
            number, start, stop = self._where[row_key(row)]
        except KeyError:
            raise ModelError(
                f"{self.folder}: a conversation of {len(row['input_ids'])} tokens is not in the store",
                hint="capture from the same data, with the same chat template and max_tokens",
            ) from None
        return {name: self._shards[number].get_slice(name)[start:stop] for name in COLUMNS}

    def beside(self, rows: Rows[Row], tokenizer: Tokenizer) -> Rows[Row]:
        """`rows` with the teacher's columns laid beside their labels, [T, ...], zeros where nothing counts.

        Raises ModelError at once when the tokenizer is not the teacher's, or a conversation is missing.
        """
        if tokenizer.digest != self.meta["tokenizer"]:
            raise ModelError(
                f"{tokenizer.folder}: the student's tokenizer ({tokenizer.digest[:12]}) is not the teacher's "
                f"({self.meta['tokenizer'][:12]})",
                hint="both must share a vocabulary; adapt the student with the teacher's tokenizer",
            )
        for number in range(len(rows)):
            row = rows[number]
            if row_key(row) not in self._where:
                self.columns(row)
        return _Beside(self, rows)


class _Beside:
    def __init__(self, store: TopKStore, rows: Rows[Row]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        import numpy as np

        row = self._rows[index]
        counted = row["labels"] != IGNORED  # [T]
        wide = dict(row)
        for name, values in self._store.columns(row).items():
            dtype = np.int64 if name == "topk_ids" else np.float32
            wide[name] = np.zeros((len(counted), *values.shape[1:]), dtype=dtype)  # [T, ...]
            wide[name][counted] = values
        return wide
