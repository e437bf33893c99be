"""The store: what a teacher said about each counted token, on disk, written once and read many times.

A folder: shards of whole conversations, and header.json, written last: its presence means complete. A
conversation is found by the digest of its ids and labels, never by its number: a student that tokenises or
templates differently finds nothing, and is told so, instead of learning from another token's distribution. The
bytes of a shard are the affair of shard_file.py and codec.py; docs/store.md describes them all.

Columns, one entry a counted token (a label), P of them in a conversation; all at the store's temperature:
  topk_ids [P, K] int32, 0 where no entry
  topk_logprobs [P, K] float32, -inf where no entry; in a sampled store these are log weights
  tail_logprob [P] = log(1 - sum of the entries' probabilities); -inf in a sampled store
  gold_logprob [P] of the gold next token, in or outside the entries
  log_z [P] log normaliser of the logits
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from distill.shard_file import (
    FORMAT,
    KEY_BYTES,
    MAX_BITS,
    MAX_ENTRIES,
    MAX_TOP_K,
    MAX_VOCAB,
    RECAPTURE,
    SAMPLED,
    ShardFile,
    write_shard,
)
from foundation.chat import IGNORED
from foundation.errors import ArtifactError, InputError, ModelError
from foundation.files import sha256_file, write_json
from foundation.model import read_config
from foundation.report import Report
from foundation.rows import Row, Rows
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "HEADER", "Header", "Shard", "TopKStore", "data_digest", "read_header", "row_key", "seal", "shard_facts",
    "shard_path", "template_digest", "verify", "write_shard",
]  # fmt: skip
HEADER = "header.json"
FORMER_HEADER = "meta.json"  # of format 1
RECAPTURED = "capture from the same data, with the same chat template and max_tokens"
MAX_HEADER_BYTES = 2**26  # some 300,000 shards

Count = Annotated[int, Field(ge=1, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Shard:
    """Facts of one shard, as the header holds them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    size_bytes: Count
    sha256: Digest
    rows: Count
    positions: Count


@dataclass(frozen=True)
class Header:
    """What a store is of. Two stores with equal headers hold equal bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    support: Literal["top_k", "sampled"]  # "top_k", or "sampled": entries are draws and carry weights
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)]  # the most entries that a position has
    mass: Annotated[float, Field(gt=0, le=1)]  # the fewest entries that reach it are kept; 1.0: always top_k
    draws: Annotated[int, Field(ge=0, lt=2**63)]  # of a sampled store, a position; 0 elsewhere
    bits: Annotated[int, Field(ge=1, le=MAX_BITS)]  # of a quantised log-probability
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    vocab_tokens: Annotated[int, Field(ge=1, le=MAX_VOCAB)]  # V of the distributions
    teacher: Digest  # digest of the teacher's folder
    tokenizer: Digest  # Tokenizer.digest
    tokenizer_tokens: Count
    template: Digest  # template_digest
    data: Digest  # data_digest
    rows: Count
    positions: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    format: int = FORMAT


def row_key(row: Row) -> bytes:
    """16 bytes that name a conversation: its token ids and which of them are counted."""
    digest = hashlib.sha256(row["input_ids"].astype("<i8").tobytes())
    digest.update((row["labels"] != IGNORED).tobytes())
    return digest.digest()[:KEY_BYTES]


def template_digest(tokenizer: Tokenizer) -> str:
    """sha256 of the chat template's text; of no text where there is none."""
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()


def data_digest(keys: list[bytes]) -> str:
    """sha256 of all row keys in the order of the data."""
    return hashlib.sha256(b"".join(keys)).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"shard-{number:05d}.topk"


def shard_facts(path: Path) -> Shard:
    """Facts of a whole shard. Raises ArtifactError where it is damaged or torn: every byte is read."""
    shard = ShardFile(path)
    shard.check_rows()
    facts = shard.facts
    return Shard(path.name, shard.size_bytes, sha256_file(path), facts.rows, facts.positions)


def seal(folder: Path, header: Header) -> None:
    """Write header.json: from now on the store is complete."""
    fields = dataclasses.asdict(header)
    write_json(folder / HEADER, {**fields, "digest": header_digest(fields)})


def header_digest(fields: dict[str, Any]) -> str:
    """sha256 of the header's fields as compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_header(folder: Path) -> Header:
    """The header of a finished store. Raises ArtifactError when there is none, or it was altered."""
    path = folder / HEADER
    if not path.is_file() and (folder / FORMER_HEADER).is_file():
        path = folder / FORMER_HEADER
    try:
        if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:  # a pipe would be waited for
            raise ValueError(path)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        inner = folder / "store"
        raise ArtifactError(
            f"{folder}: not a finished top-K store (no readable {HEADER})",
            hint=f"name the store in it, {inner}" if (inner / HEADER).is_file()
            else "run its distill.capture stage to the end",
        ) from None  # fmt: skip
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT or path.name != HEADER:
        raise ArtifactError(
            f"{folder}: store format {repr(version)[:40]}; this version reads {FORMAT}",
            hint="capture it again, or read it with the version of Samovar that wrote it",
        )
    stated = found.pop("digest", None)
    if stated != header_digest(found):
        raise ArtifactError(f"{path} was altered: its digest is not that of its fields", hint=RECAPTURE)
    try:  # what the digest is of, and not the text, which may have a key twice
        header = TypeAdapter(Header).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ascii(".".join(map(str, first["loc"])))[1:-1]
        raise ArtifactError(f"{path}: damaged: {where[:80]}: {first['msg']}", hint=RECAPTURE) from None
    if header.top_k > header.vocab_tokens:
        said = f"top_k = {header.top_k} of {header.vocab_tokens} ids"
        raise ArtifactError(f"{path}: damaged: {said}", hint=RECAPTURE)
    shards = header.shards
    if not (
        [shard.name for shard in shards] == [shard_path(folder, n).name for n in range(len(shards))]
        and header.rows == sum(shard.rows for shard in shards)
        and header.positions == sum(shard.positions for shard in shards)
    ):
        raise ArtifactError(f"{path}: damaged: its list of shards is not possible", hint=RECAPTURE)
    return header


class TopKStore:
    """A finished store, opened for reading: shards are mapped, conversations decoded when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.header = folder, read_header(folder)
        self._shards = [_opened(folder, self.header, shard) for shard in self.header.shards]
        keys = [key for shard in self._shards for key in shard.keys]
        if data_digest(keys) != self.header.data:
            raise ArtifactError(f"{folder}: its shards are not those of its {HEADER}", hint=RECAPTURE)
        self._where = {
            key: (number, place)
            for number, shard in enumerate(self._shards)
            for place, key in enumerate(shard.keys)
        }

    def columns(self, row: Row) -> dict[str, np.ndarray]:
        """The columns of one conversation, one entry a counted token, K = header.top_k wide.

        A position's entries stand in no particular order. Raises ModelError if the conversation is not stored,
        ArtifactError if its bytes are damaged.
        """
        where = self._where.get(row_key(row))
        if where is None:
            raise ModelError(
                f"{self.folder}: a conversation of {len(row['input_ids'])} tokens is not in the store",
                hint=RECAPTURED,
            )
        number, place = where
        shard = self._shards[number]
        if shard.lengths[place] != (row["labels"][1:] != IGNORED).sum():
            raise shard.damaged(f"conversation {place + 1} has {shard.lengths[place]} positions")
        return shard.columns(place, self.header.top_k)

    def check_student(self, folder: Path, setting: str, loss: str, supports: Mapping[str, str]) -> None:
        """Prove that the student in `folder` can learn from this store by `loss`, which is what `setting` says.

        supports: loss -> the kind of store that it reads. Raises InputError for another kind than this one,
        ModelError when the teacher speaks of ids that the student has no row for.
        """
        wanted, found = supports[loss], self.header.support
        if wanted != found:
            fitting = ", ".join(name for name, support in supports.items() if support == found)
            raise InputError(
                f"{setting} = {loss!r} reads a store with support = {wanted!r}; this one has {found!r}",
                hint=(f"set {setting} to one of {fitting}; or " if fitting else "")
                + f"capture with support = {wanted!r}",
            )
        ids = self.header.vocab_tokens
        rows = int(read_config(folder).get("vocab_size", ids))
        if rows < ids:
            raise ModelError(
                f"{folder}: the student has {rows} ids, the teacher's distributions {ids}",
                hint="both must share a vocabulary: give the student the teacher's tokenizer first",
            )

    def beside(self, rows: Rows[Row], tokenizer: Tokenizer, *, temperature: float) -> Rows[Row]:
        """`rows` with the teacher's columns laid beside their labels, [T, ...], zeros where nothing counts.

        Proves first that the student is asked what the teacher answered: the same tokenizer, chat template and
        temperature, and every conversation in the store. Raises ModelError otherwise.
        """
        header = self.header
        if tokenizer.digest != header.tokenizer:
            raise ModelError(
                f"{tokenizer.folder}: the student's tokenizer ({tokenizer.digest[:12]}, {len(tokenizer)} "
                f"tokens) is not the teacher's ({header.tokenizer[:12]}, {header.tokenizer_tokens} tokens)",
                hint="both must share a vocabulary; adapt the student with the teacher's tokenizer",
            )
        if template_digest(tokenizer) != header.template:
            raise ModelError(
                f"{tokenizer.folder}: the student's chat template ({template_digest(tokenizer)[:12]}) is not "
                f"the teacher's ({header.template[:12]})",
                hint="copy the teacher's chat_template.jinja beside the student's tokenizer",
            )
        if temperature != header.temperature:
            raise ModelError(
                f"{self.folder}: captured at temperature {header.temperature}, asked for at {temperature}",
                hint=f"set temperature = {header.temperature}, or capture again at {temperature}",
            )
        missing = [number for number in range(len(rows)) if row_key(rows[number]) not in self._where]
        if missing:
            tokens = len(rows[missing[0]]["input_ids"])
            raise ModelError(
                f"{self.folder}: {len(missing)} of {len(rows)} conversations are not in the store; the first "
                f"is number {missing[0] + 1}, {tokens} tokens long",
                hint=RECAPTURED,
            )
        return _Beside(self, rows)

    def parts(self) -> dict[str, int]:
        """Bytes of all shards by what they hold."""
        parts: Counter[str] = Counter()
        for shard in self._shards:
            parts.update(shard.parts())
        return dict(parts)


def _opened(folder: Path, header: Header, facts: Shard) -> ShardFile:
    """A shard of the header's store. Raises ArtifactError when it is missing, damaged or another's."""
    shard = ShardFile(folder / facts.name)
    seen, support = shard.facts, "sampled" if shard.facts.flags & SAMPLED else "top_k"
    if (shard.size_bytes, seen.rows, seen.positions) != (facts.size_bytes, facts.rows, facts.positions):
        raise shard.damaged(f"its sizes are not those in {HEADER}")
    same = (seen.vocab_tokens, seen.bits, support) == (header.vocab_tokens, header.bits, header.support)
    fits = seen.top_k <= header.top_k and shard.lengths.max() * header.top_k <= MAX_ENTRIES
    if not same or not fits:
        raise shard.damaged(f"of another kind than {HEADER} says")
    return shard


class _Beside:
    def __init__(self, store: TopKStore, rows: Rows[Row]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        import numpy as np

        row = self._rows[index]
        counted = row["labels"] != IGNORED  # [T]
        counted[0] = False  # the first token is nobody's prediction
        wide = dict(row)
        for name, values in self._store.columns(row).items():
            wide[name] = np.zeros((len(counted), *values.shape[1:]), dtype=values.dtype)  # [T, ...]
            wide[name][counted] = values
        return wide


def verify(folder: Path, report: Report) -> dict[str, int]:
    """Read every shard to its last bit; returns what was checked.

    Raises ArtifactError with every damaged file and what is wrong with it.
    """
    header = read_header(folder)
    faults = []
    for number, facts in enumerate(header.shards):
        report.progress(number, len(header.shards), "shard")
        try:
            shard = _opened(folder, header, facts)
            if sha256_file(shard.path) != facts.sha256:
                raise shard.damaged(f"its sha256 is not that in {HEADER}")
            for place in range(len(shard.keys)):
                shard.columns(place)
        except ArtifactError as error:
            faults.append(error.message)
    if faults:
        raise ArtifactError("\n".join(faults), hint=RECAPTURE)
    TopKStore(folder)
    report.progress(len(header.shards), len(header.shards), "shard")
    return {"shards": len(header.shards), "rows": header.rows, "positions": header.positions}
