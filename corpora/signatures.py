"""What a deduplication knows of every paragraph, on disk: the first of its passes, and how it is read back.

    rows-000000.npz ..   a block of paragraphs each: digest and length of every one, and of those that are long
                         enough to be near another, the key of every band and the size of the squeezed text
    text                 the squeezed texts of the latter, UTF-8, one after the other
    signed.json          how many there are of all; its presence says that the pass is over

A block is written text first and then at once, so what lies there is whole, and the pass goes on after it.
Nothing here grows in memory with the corpus but what a caller asks for.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corpora import minhash
from corpora.paragraphs import Unit, character_classes, folded, split
from foundation.dataio import documents
from foundation.errors import InputError, RunError
from foundation.files import read_json, write_atomic, write_json, writing
from foundation.report import Report, stop_if_asked

if TYPE_CHECKING:
    from corpora.deduplicate import Settings

BLOCK_CHARACTERS = 1 << 22
MISSES = (0.1, 0.9)  # see Sketch


@dataclass(frozen=True)
class Sketch:
    """How texts become band keys: the permutations a x + b, and so many bands of so many rows each.

    Bands and rows are datasketch's choice for the threshold, with a missed pair weighing nine times as much
    as a pair compared in vain: what shares a band is compared by its shingles before anything is removed.
    At 0.8 and 128 permutations: 14 bands of 9, which find 87 % of the pairs at 0.8 and 97 % at 0.85.
    """

    shingle: int  # characters
    a: np.ndarray  # [K] uint32
    b: np.ndarray  # [K] uint32
    bands: int  # none: only exact repeats are looked for
    rows: int

    @classmethod
    def of(cls, settings: Settings) -> Sketch:
        from datasketch import MinHash, MinHashLSH

        if settings.similarity == 1:
            return cls(settings.shingle_characters, np.empty(0, np.uint32), np.empty(0, np.uint32), 0, 0)
        chosen = MinHashLSH(settings.similarity, settings.permutations, weights=MISSES)
        a, b = MinHash(settings.permutations, settings.seed, scheme="affine32").permutations
        return cls(settings.shingle_characters, a.copy(), b.copy(), chosen.b, chosen.r)


@dataclass(frozen=True)
class Counts:
    """How much was read; of the blocks so far, or of all."""

    blocks: int = 0
    documents: int = 0
    paragraphs: int = 0
    near: int = 0  # paragraphs long enough to be near another
    text_bytes: int = 0  # of their squeezed texts
    read_bytes: int = 0  # of all texts as they were read


def sign(paths: Iterable[Path], settings: Settings, folder: Path, report: Report) -> Signed:
    """Read `paths` into `folder`, or what of them is missing there."""
    paths = list(paths)
    counts = _so_far(folder)
    if not (folder / "signed.json").is_file():
        if counts.documents:
            report.note(f"going on after {counts.documents} documents")
        sketch, classes = Sketch.of(settings), np.frombuffer(character_classes(), np.uint8)
        all_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        texts = islice(documents(paths), counts.documents, None)
        for number, size, paragraphs in _blocks(texts, settings.unit):
            columns, text = _block(paragraphs, settings.near_characters, sketch, classes)
            counts = Counts(
                counts.blocks + 1,
                counts.documents + number,
                counts.paragraphs + len(paragraphs),
                counts.near + len(columns["text_bytes"]),
                counts.text_bytes + len(text),
                counts.read_bytes + size,
            )
            _append(folder, columns, text, counts)
            report.progress(min(counts.read_bytes, all_bytes) >> 20, all_bytes >> 20, "MB read")
            stop_if_asked(report)
        if not counts.documents:
            raise InputError("the corpus holds no document", hint="name its files under `corpus`")
        write_json(folder / "signed.json", asdict(counts))
    return Signed(folder, counts)


def _so_far(folder: Path) -> Counts:
    """The counts after the last whole block."""
    blocks = len(list(folder.glob("rows-*.npz")))
    if not blocks:
        return Counts()
    with np.load(_rows(folder, blocks - 1)) as rows:
        return Counts(*rows["counts"].tolist())


def _rows(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:06d}.npz"


def _blocks(texts: Iterable[str], unit: Unit) -> Iterator[tuple[int, int, list[str]]]:
    """(documents, bytes of UTF-8, their paragraphs) in blocks; a document is never divided."""
    number = size = characters = 0
    paragraphs: list[str] = []
    for text in texts:
        number += 1
        size += len(text.encode())
        characters += len(text)
        paragraphs += (piece for piece in split(text, unit) if piece.strip())
        if characters >= BLOCK_CHARACTERS:
            yield number, size, paragraphs
            number, size, characters, paragraphs = 0, 0, 0, []
    if number:
        yield number, size, paragraphs


def _block(
    paragraphs: list[str], near_characters: int, sketch: Sketch, classes: np.ndarray
) -> tuple[dict[str, Any], bytes]:
    """Columns of a block and the squeezed text of those that may be near another."""
    forms = [folded(paragraph) for paragraph in paragraphs]
    codes = np.frombuffer("".join(forms).encode("utf-32-le"), np.uint32)
    ends = np.cumsum([len(form) for form in forms])
    codes, ends, utf8_bytes = minhash.squeeze(codes, ends, classes)
    starts = np.concatenate([[0], ends[:-1]])
    view = memoryview(codes).cast("B")
    digests = b"".join(
        hashlib.blake2b(view[4 * start : 4 * end], digest_size=16).digest()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    lengths = ends - starts
    near = lengths >= near_characters if sketch.bands else np.zeros(len(lengths), bool)
    keys = minhash.band_keys(
        codes, starts[near], ends[near], sketch.shingle, sketch.a, sketch.b, sketch.bands, sketch.rows
    )
    text = codes[np.repeat(near, lengths)].tobytes().decode("utf-32-le").encode()
    columns = {
        "digests": np.frombuffer(digests, np.uint64).reshape(-1, 2),
        "characters": lengths.astype(np.int32),
        "near": np.flatnonzero(near).astype(np.int32),
        "text_bytes": utf8_bytes[near],
    }
    return columns | {f"band-{band}": keys[band] for band in range(sketch.bands)}, text


def _append(folder: Path, columns: dict[str, Any], text: bytes, counts: Counts) -> None:
    """Make a block lasting; what a kill left of an earlier try is written over."""
    path = folder / "text"
    with writing(path):
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.truncate(counts.text_bytes - len(text))
            file.seek(counts.text_bytes - len(text))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        packed = io.BytesIO()
        np.savez(packed, counts=np.array(list(asdict(counts).values()), np.int64), **columns)
        write_atomic(_rows(folder, counts.blocks - 1), packed.getvalue())


class Signed:
    """What `sign` left, read one column at a time."""

    def __init__(self, folder: Path, counts: Counts) -> None:
        self.folder = folder
        self.counts = counts
        if (said := read_json(folder / "signed.json")) != asdict(counts):
            raise RunError(f"{folder}: {said} was written, {asdict(counts)} is there", hint="delete it")

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Column `name`, one block at a time."""
        for number in range(self.counts.blocks):
            with np.load(_rows(self.folder, number)) as rows:
                yield rows[name]

    def column(self, name: str) -> np.ndarray:
        """Column `name` of all blocks."""
        return np.concatenate(list(self.blocks(name)))

    def near(self) -> np.ndarray:
        """The paragraphs that may be near another, by their numbers in the corpus.  # [M]"""
        before, parts = 0, []
        for near, characters in zip(self.blocks("near"), self.blocks("characters"), strict=True):
            parts.append(near.astype(np.int64) + before)
            before += len(characters)
        return np.concatenate(parts)
