"""One shard of a top-K store as a file: its sections, its checks, one conversation at a time.

A shard comes from disk and may be torn, flipped or made to harm: every length is checked before it is used, the
index carries a CRC and so does every conversation, and the decoder reads nothing outside what it is given.
Whatever is wrong leaves as an ArtifactError that names the file. docs/store.md has the layout byte by byte.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foundation.errors import ArtifactError, InputError, MissingError, ModelError
from foundation.files import sync_folder, writing

if TYPE_CHECKING:
    import numpy as np

Columns = dict[str, "np.ndarray"]

FORMAT = 2
MAGIC = b"\x89TOPK\r\n\x00"  # no text: a transfer that alters the ends of lines is noticed at once
RANKED, VARIED, SAMPLED = 1, 2, 4  # flags
KEY_BYTES = 16
ROW_BYTES = KEY_BYTES + 12  # key, positions, bytes, CRC
HALF_BYTES = 2  # of a float16
CRC = struct.Struct("<I")
CONTEXTS, PARAMETERS = 26, 25  # contexts of a gap (bit lengths of an id), and Rice parameters
MAX_BITS, MAX_TOP_K, MAX_VOCAB = 12, 2**18, 2**24
MAX_ENTRIES = 2**28  # of a conversation as it is decoded, 8 bytes each
TRIED_POSITIONS = 4096  # on which the Rice parameters are chosen
RECAPTURE = "delete the folder of the capture and run it again"


class Facts(NamedTuple):
    """The fixed part of a shard, in the order of the file; sizes are in bytes, `top` is in nats."""

    magic: bytes
    format: int
    flags: int
    bits: int
    top_k: int
    vocab_tokens: int
    rows: int
    distinct: int  # ids in the table; 0 where ids are not ranked
    table_bytes: int
    top: float  # log weight of level 0; 0 unless sampled
    positions: int
    payload_bytes: int
    id_bits: int
    level_bits: int


FIXED = struct.Struct("<8sHHIIIIIIfQQQQ")


# ------------------------------------------------------------------------------------------------- writing


def write_shard(
    path: Path,
    columns: Columns,
    keys: list[bytes],
    lengths: list[int],
    *,
    vocab_tokens: int,
    bits: int,
    seed: int | None = None,
) -> None:
    """Write one shard, whole or not at all; the same arguments give the same bytes.

    columns: topk_ids, topk_logprobs [P, K]; tail_logprob, gold_logprob, log_z [P], concatenated over the
    conversations that `keys` (16 bytes each) name and `lengths` (positions each) part. A `seed` makes it a
    sampled shard: entries are log weights, rounded up or down at random so that the expectation of each stored
    weight is exact. Raises InputError for a conversation without a position, ModelError for columns that are no
    distribution.
    """
    import numpy as np

    if len(keys) != len(lengths) or sum(lengths) != len(columns["topk_ids"]):
        raise ValueError(f"{len(keys)} keys, {sum(lengths)} of {len(columns['topk_ids'])} positions")
    if 0 in lengths or not lengths:
        empty = [*lengths, 0].index(0)
        raise InputError(f"{path.name}: conversation {empty + 1} of the shard has no token to learn")
    top_k = columns["topk_ids"].shape[1]
    if not (1 <= bits <= MAX_BITS and _fit(top_k, vocab_tokens)):
        raise ValueError(f"bits = {bits}, K = {top_k}, V = {vocab_tokens}")
    if max(lengths) * top_k > MAX_ENTRIES:
        said = f"{max(lengths):,} positions of a conversation x {top_k} entries"
        raise InputError(f"{path.name}: {said}; at most {MAX_ENTRIES:,}", hint="lower top_k or max_tokens")
    facts, codes, payload = _encoded(columns, lengths, vocab_tokens, bits, seed)
    by_row = [lengths, [len(data) for data in payload], [zlib.crc32(data) for data in payload]]  # [3, R]
    facts = facts._replace(rows=len(keys), payload_bytes=sum(by_row[1]))
    index = FIXED.pack(*facts) + b"".join(keys) + np.array(by_row, dtype="<u4").tobytes() + codes
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with writing(path):
        with partial.open("wb") as file:
            file.write(index + CRC.pack(zlib.crc32(index)))
            file.writelines(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def _encoded(
    columns: Columns, lengths: list[int], vocab_tokens: int, bits: int, seed: int | None
) -> tuple[Facts, bytes, list[bytes]]:
    """(facts without what concerns rows, Rice parameters and id table, the bytes of each conversation)"""
    import numpy as np

    codec = _codec()
    sampled = seed is not None
    ids = np.ascontiguousarray(columns["topk_ids"], dtype=np.int32)  # [P, K]
    logprobs = np.ascontiguousarray(columns["topk_logprobs"], dtype=np.float32)  # [P, K]
    halves = _halves(columns, sampled)  # [3, P]
    least, most, often = codec.count_ids(ids, logprobs, vocab_tokens)
    if least < 0:
        raise ModelError(f"a position of the teacher's top-K {_said(least)}")
    ranks, rice, table = _ranks(ids, logprobs, often)
    top_k = ids.shape[1]
    top = float(logprobs.max()) if sampled else 0.0
    varied = least != top_k or most != top_k
    values = codec.level_values(bits, top_k)  # [L]
    bit_lengths = np.array([number.bit_length() for number in range(len(values) + 2)])  # [L + 2]
    widths = _widths(top_k, len(values), vocab_tokens, varied)
    words = np.empty((top_k * 14 + 16) * max(lengths) // 8 + 8, dtype=np.uint64)  # 112 bits an entry is enough
    payload: list[bytes] = []
    id_bits = level_bits = start = 0
    for length in lengths:
        row = slice(start, start + length)
        setup = (*codec.scale(bits, top_k), *widths, sampled, (seed or 0) % 2**62, start * top_k)
        tail = halves[0, row].astype(np.float64)
        size, ids_took, levels_took = codec.encode(
            ids[row], logprobs[row], tail, ranks, rice, values, bit_lengths, setup, top, words
        )
        if size < 0:
            raise ModelError(f"position {start + ids_took} of the teacher's top-K {_said(size)}")
        id_bits, level_bits = id_bits + ids_took, level_bits + levels_took
        entries = words[: size // 64 + 1].astype("<u8").tobytes()[: (size + 7) // 8]
        payload.append(halves[1 if sampled else 0 :, row].tobytes() + entries)
        start += length
    facts = Facts(
        MAGIC, FORMAT, RANKED * bool(table) | VARIED * varied | SAMPLED * sampled, bits, top_k, vocab_tokens, 0,
        int((often > 0).sum()) if table else 0, len(table), top, len(ids), 0, id_bits, level_bits,
    )  # fmt: skip
    return facts, rice.astype(np.uint8).tobytes() + table, payload


def _halves(columns: Columns, sampled: bool) -> np.ndarray:
    """tail, gold, log Z as float16 [3, P]; a finite number stays finite, and a tail below 0."""
    import numpy as np

    names = ("tail_logprob", "gold_logprob", "log_z")
    wide = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names])  # [3, P]
    if np.isnan(wide).any() or np.isposinf(wide).any() or np.isinf(wide[2]).any():
        hint = "its weights hold NaN or infinity"
        raise ModelError("the teacher's tail, gold or log Z is not a number", hint=hint)
    wide[np.isfinite(wide)] = wide[np.isfinite(wide)].clip(-65504, 65504)
    wide[0] = wide[0].clip(max=-(2.0**-24))
    return wide.astype("<f2")


def _ranks(ids: np.ndarray, logprobs: np.ndarray, often: np.ndarray) -> tuple[np.ndarray, np.ndarray, bytes]:
    """(rank of each id [V], Rice parameters [C], id table): ids as they are, or ranked where that is smaller.

    Ranks go by how often an id occurs, within an octave of ranks (2^b - 1 .. 2^(b+1) - 2) by the id: so the
    table is a few ascending sets.
    """
    import numpy as np

    codec = _codec()
    plain = _plain_bits(len(often))
    used = np.flatnonzero(often)  # [U]
    used = used[np.argsort(-often[used], kind="stable")]
    words, at = np.empty(len(used) + 8, dtype=np.uint64), 0
    for first, last in _octaves(len(used)):
        used[first:last].sort()
        parameter = _set_parameter(last - first, len(often))
        at = codec.encode_set(used[first:last], parameter, plain, at, words)
    table = words[: at // 64 + 1].astype("<u8").tobytes()[: (at + 7) // 8]
    ranks = np.zeros(len(often), dtype=np.int32)
    ranks[used] = np.arange(len(used))
    stride = -(-len(ids) // TRIED_POSITIONS)
    even = max(0, plain - ids.shape[1].bit_length())  # suits ids strewn evenly: for contexts that were not met
    choices = []
    for mapped, extra in ((ranks, table), (np.arange(len(often), dtype=np.int32), b"")):
        costs = codec.gap_costs(ids, logprobs, mapped, stride, plain)  # [C, R]
        rice = np.where(costs.any(1), costs.argmin(1), even)  # [C]
        choices.append((int(costs.min(1).sum()) * stride + 8 * len(extra), mapped, rice, extra))
    return min(choices, key=lambda choice: choice[0])[1:]


def _said(code: int) -> str:
    codec = _codec()
    said: dict[int, str] = {
        codec.BAD_ID: "names an id outside the vocabulary",
        codec.BAD_COUNT: "has no entry",
        codec.TWICE: "names an id twice",
        codec.NOT_NUMBERS: "is not all numbers",
        codec.NOT_ONE: "does not sum to 1 with its tail: they are not of one distribution",
    }
    return said[code]


# -------------------------------------------------------------------------------------------- both ways


def _codec() -> Any:
    try:
        from distill import codec
    except ImportError:
        hint = 'pip install -c constraints.txt "samovar[train]"'
        raise MissingError("the top-K store needs numba, which is not installed", hint=hint) from None
    return codec


def _fit(top_k: int, vocab_tokens: int) -> bool:
    return 1 <= top_k <= min(MAX_TOP_K, vocab_tokens) and vocab_tokens <= MAX_VOCAB


def _plain_bits(vocab_tokens: int) -> int:
    return (vocab_tokens - 1).bit_length()


def _widths(top_k: int, levels: int, vocab_tokens: int, varied: bool) -> tuple[int, int, int]:
    """Bits of a position's count of entries (0: it has top_k), of its largest level, of an id."""
    return top_k.bit_length() if varied else 0, levels.bit_length(), _plain_bits(vocab_tokens)


def _octaves(count: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 3), [3, 7), .. up to `count`."""
    first = 0
    while first < count:
        yield first, min(2 * first + 1, count)
        first = 2 * first + 1


def _set_parameter(count: int, limit: int) -> int:
    """Rice parameter for the gaps of `count` numbers below `limit`: log2 of 0.7 times their mean."""
    return max(0, (limit * 7 // 10 // count).bit_length() - 1)


# ------------------------------------------------------------------------------------------------- reading


class ShardFile:
    """A shard, mapped into memory. Opening it checks its sizes and the CRC of its index.

    In memory stay some 100 bytes a conversation and, once one was read, 4 bytes for each id of the table.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.path = path
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
                raise self.damaged("not a regular file")
            self._bytes: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file can not be mapped
            raise self.damaged(f"can not be read ({error})") from None
        self.size_bytes = len(self._bytes)
        if self.size_bytes < FIXED.size:
            raise self.damaged(f"{self.size_bytes} bytes, too short for a shard")
        self.facts = facts = Facts(*FIXED.unpack(self._read(0, FIXED.size)))
        if facts.magic != MAGIC:
            raise self.damaged("not a shard of a top-K store")
        if facts.format != FORMAT:
            raise self.damaged(f"format {facts.format}; this version reads {FORMAT}")
        numbers, codes = FIXED.size + facts.rows * KEY_BYTES, FIXED.size + facts.rows * ROW_BYTES
        self._table = codes + CONTEXTS
        self._payload = self._table + facts.table_bytes + CRC.size
        if self._payload + facts.payload_bytes != self.size_bytes:
            raise self.damaged(f"{self.size_bytes} bytes; {self._payload + facts.payload_bytes} by its header")
        index_end = self._payload - CRC.size
        if CRC.unpack(self._read(index_end, self._payload))[0] != zlib.crc32(self._read(0, index_end)):
            raise self.damaged("the checksum of its index is wrong")
        self.keys = [self._read(at, at + KEY_BYTES) for at in range(FIXED.size, numbers, KEY_BYTES)]
        by_row = np.frombuffer(self._read(numbers, codes), dtype="<u4").astype(np.int64)
        self.lengths, sizes, self._crcs = by_row.reshape(3, -1)  # [R] each
        self._ends = self._payload + np.cumsum(sizes)  # [R]
        self._starts = self._ends - sizes  # [R]
        self._rice = np.frombuffer(self._read(codes, self._table), dtype=np.uint8).astype(np.int64)
        self._check(sizes)

    def _check(self, sizes: np.ndarray) -> None:
        """The facts are possible and agree with each other: the decoder relies on it."""
        facts = self.facts
        entries = 1 if facts.flags & VARIED else facts.top_k  # at least, of a position
        least = 8 * HALF_BYTES * self._halves + 2 * entries  # bits of a position: a code has 1 at least
        if not (
            1 <= facts.bits <= MAX_BITS
            and facts.flags <= RANKED | VARIED | SAMPLED
            and _fit(facts.top_k, facts.vocab_tokens)
            and bool(facts.flags & RANKED) == bool(facts.distinct)
            and facts.distinct <= min(facts.vocab_tokens, 8 * facts.table_bytes)
            and math.isfinite(facts.top)
            and (facts.top == 0 or facts.flags & SAMPLED)
            and facts.rows
            and self._rice.max() < PARAMETERS
            and self.lengths.min() >= 1
            and self.lengths.max() * facts.top_k <= MAX_ENTRIES
            and self.lengths.sum() == facts.positions
            and sizes.sum() == facts.payload_bytes
            and (8 * sizes > self.lengths * least).all()
            and facts.id_bits + facts.level_bits <= 8 * facts.payload_bytes
        ):
            raise self.damaged("its header is not possible")

    def damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: damaged: {what}", hint=RECAPTURE)

    def columns(self, place: int, top_k: int = 0) -> Columns:
        """The columns of conversation `place`, `top_k` (at least the shard's) entries wide.

        Raises ArtifactError when its bytes are not what was written.
        """
        import numpy as np

        facts, codec = self.facts, _codec()
        length, data = int(self.lengths[place]), self._row(place)
        split = self._halves * HALF_BYTES * length
        halves = np.frombuffer(data[:split], dtype="<f2").astype(np.float32).reshape(-1, length)
        tail = halves[0] if self._halves == 3 else np.full(length, -np.inf, dtype=np.float32)
        ids = np.zeros((length, max(top_k, facts.top_k)), dtype=np.int32)  # [P, K]
        logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)  # [P, K]
        values, weights = self._levels
        widths = _widths(facts.top_k, len(values), facts.vocab_tokens, bool(facts.flags & VARIED))
        setup = (facts.top_k, *widths, facts.top, bool(facts.flags & SAMPLED))
        if np.isnan(halves).any() or not (tail < 0).all() or codec.decode(
            _words(data[split:]), 8 * (len(data) - split), tail.astype(np.float64), self._named, self._rice,
            values, weights, setup, ids, logprobs,
        ):  # fmt: skip
            raise self.damaged(f"conversation {place + 1} can not be decoded")
        named = ("topk_ids", "topk_logprobs", "tail_logprob", "gold_logprob", "log_z")
        return dict(zip(named, (ids, logprobs, tail, halves[-2], halves[-1]), strict=True))

    def check_rows(self) -> None:
        """Compare the CRC of every conversation. Raises ArtifactError."""
        for place in range(len(self.keys)):
            self._row(place)

    def parts(self) -> dict[str, int]:
        """Bytes of the file by what they hold; they add up to its size."""
        facts = self.facts
        ids, levels = facts.id_bits // 8, facts.level_bits // 8
        return {
            "ids": ids,
            "levels": levels,
            "headers": facts.payload_bytes - ids - levels,
            "index": self._payload - facts.table_bytes,
            "table": facts.table_bytes,
        }

    @property
    def _halves(self) -> int:
        """float16 numbers of a position: a sampled one has no tail."""
        return 2 if self.facts.flags & SAMPLED else 3

    @cached_property
    def _named(self) -> np.ndarray:
        """Rank -> id.  # [U] int32"""
        import numpy as np

        facts, codec = self.facts, _codec()
        if not facts.flags & RANKED:
            return np.arange(facts.vocab_tokens, dtype=np.int32)
        words = _words(self._read(self._table, self._table + facts.table_bytes))
        named, at, limit = np.empty(facts.distinct, dtype=np.int32), 0, facts.vocab_tokens
        for first, last in _octaves(facts.distinct):
            parameter, size = _set_parameter(last - first, limit), 8 * facts.table_bytes
            at = codec.decode_set(words, size, at, parameter, _plain_bits(limit), limit, named[first:last])
            if at < 0:
                raise self.damaged("its table of ids can not be decoded")
        if np.bincount(named).max() > 1:
            raise self.damaged("its table names an id twice")
        return named

    @cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """(x, exp(-x)) of every level.  # [L] float64"""
        import numpy as np

        values = _codec().level_values(self.facts.bits, self.facts.top_k)
        return values, np.exp(-values)

    def _row(self, place: int) -> bytes:
        data = self._read(self._starts[place], self._ends[place])
        if zlib.crc32(data) != self._crcs[place]:
            raise self.damaged(f"the checksum of conversation {place + 1} is wrong")
        return data

    def _read(self, start: int, end: int) -> bytes:
        return self._bytes[start:end].tobytes()


def _words(data: bytes) -> np.ndarray:
    """Bytes as little-endian 64-bit words, and two more behind them: the decoder may look that far."""
    import numpy as np

    words = np.zeros(len(data) // 8 + 4, dtype=np.uint64)
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    return words
