"""Which paragraphs go: the passes of a deduplication after the first, each from what the one before it left.

Exact repeats are found by sorting digests, and all but the first go. Of the rest, those that share a band of
their signatures are found by sorting the keys of one band at a time, and linked: each to the one before it in
the same bucket. Then they are taken in the order of the corpus, and each is compared with the kept ones of its
buckets by the exact Jaccard share of their shingles; the first that reaches the threshold makes it go. So the
first of what is alike stays, whatever goes has a kept one it is like, and what is kept would be kept again.

Memory: some 40 bytes a paragraph, and 4 bytes a band for those that share one (14 bands by default); digests
and keys are sorted in parts. datasketch's index holds 5,200 bytes a paragraph in memory with those bands; its
storages other than memory are servers, and its Bloom filters say that something is like, not what.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corpora import minhash
from corpora.signatures import Signed
from foundation.errors import InputError
from foundation.files import write_atomic, writing
from foundation.report import Report, stop_if_asked

if TYPE_CHECKING:
    from corpora.deduplicate import Settings

PART = 1 << 21  # keys sorted at once
CHUNK = 1 << 15  # paragraphs decided between two saves
WALKED = 256  # kept texts looked at in one bucket, the nearest before
COMPARED = 64  # of all those, the ones that share most buckets: what one paragraph is compared with
CACHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Verdicts:
    """What goes, by its number in the corpus, in order; what it is like, which is kept; and how much."""

    gone: np.ndarray  # [G] int64
    like: np.ndarray  # [G] int64
    similarity: np.ndarray  # [G] float32, of the shingles; 1 for an exact repeat
    exact: int  # how many of them repeat an earlier paragraph to the letter


def decide(signed: Signed, settings: Settings, report: Report) -> Verdicts:
    """All passes; those that were finished before are only read."""
    first = exact_repeats(signed, settings.exact_characters, report)  # [N], -1 where kept
    like = first.copy()
    similarity = (like >= 0).astype(np.float32)
    if signed.counts.near:
        numbers = signed.near()  # [M]
        alive = first[numbers] < 0
        for band in range(_bands(signed)):
            link(signed, band, alive, report)
        members, near, shares = near_repeats(signed, settings, report)
        like[numbers[members]] = numbers[near]
        similarity[numbers[members]] = shares
    follow = np.flatnonzero(first >= 0)
    follow = follow[like[first[follow]] >= 0]  # the first of them went itself: they are like what it is like
    similarity[follow] = similarity[first[follow]]
    like[follow] = like[first[follow]]
    gone = np.flatnonzero(like >= 0)
    return Verdicts(gone, like[gone], similarity[gone], int((first >= 0).sum()))


def _bands(signed: Signed) -> int:
    with np.load(signed.folder / "rows-000000.npz") as rows:
        return sum(name.startswith("band-") for name in rows.files)


# ------------------------------------------------------------------------------------------------ by sorting


def exact_repeats(signed: Signed, shortest: int, report: Report) -> np.ndarray:
    """The first paragraph with the same digest, for all but this first one; else -1.  # [N]"""
    path = signed.folder / "exact.npy"
    if not path.is_file():
        found = np.full(signed.counts.paragraphs, -1, np.int64)
        long = signed.column("characters") >= shortest
        for members, _, firsts in equal_keys(lambda: signed.blocks("digests"), long, report):
            found[members] = firsts
        _save(path, found)
    first: np.ndarray = np.load(path)
    return first


def link(signed: Signed, band: int, alive: np.ndarray, report: Report) -> None:
    """Write band-BAND.npy: members of buckets, and the one before each in its bucket.  # [2, links]"""
    path = signed.folder / f"band-{band}.npy"
    if not path.is_file():

        def keys() -> Iterator[np.ndarray]:
            return (block[:, None] for block in signed.blocks(f"band-{band}"))

        found = [np.stack([members, before]) for members, before, _ in equal_keys(keys, alive, report)]
        _save(path, np.concatenate(found, axis=1))
        stop_if_asked(report)
    report.progress(band + 1, _bands(signed), "band")


def equal_keys(
    blocks: Callable[[], Iterator[np.ndarray]], wanted: np.ndarray, report: Report
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(members, the one before each, the first of all) of every group of equal keys among `wanted`.

    `blocks()` gives the keys [.., columns] of all, in order. They are sorted in parts of about PART,
    chosen by their remainders.
    """
    parts = max(1, -(-int(wanted.sum()) // PART))
    for part in range(parts):
        at, numbers, keys = 0, [], []
        for block in blocks():
            mine = wanted[at : at + len(block)] & (block[:, 0] % np.uint64(parts) == part)
            numbers.append(np.flatnonzero(mine) + at)
            keys.append(block[mine])
            at += len(block)
        number, key = np.concatenate(numbers), np.concatenate(keys)
        order = np.lexsort(key.T)  # stable: equal keys stay in the order of the corpus
        number, key = number[order], key[order]
        repeats = np.concatenate([[False], (key[1:] == key[:-1]).all(1)])[: len(number)]
        starts = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(number))))
        members = np.flatnonzero(repeats)
        yield number[members], number[members - 1], number[starts[members]]
        stop_if_asked(report)


def _save(path: Path, array: np.ndarray) -> None:
    packed = io.BytesIO()
    np.save(packed, array)
    write_atomic(path, packed.getvalue())


# --------------------------------------------------------------------------------------------- by comparing


def near_repeats(
    signed: Signed, settings: Settings, report: Report
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(those that go, the kept one that each is like, Jaccard share), by their numbers among the near.

    Decisions are saved every CHUNK paragraphs as near-000000.npz .., and resumed from.
    """
    members, previous = chains(signed)
    row_of = np.full(signed.counts.near, -1, np.int32)
    row_of[members] = np.arange(len(members))
    gone = np.zeros(signed.counts.near, bool)
    found = np.empty(previous.shape[1] * WALKED, np.int32)
    decided: list[np.ndarray] = []  # [3, ..] each
    with Texts(signed, settings.shingle_characters) as texts:
        for chunk, start in enumerate(range(0, len(members), CHUNK)):
            path = signed.folder / f"near-{chunk:06d}.npy"
            if not path.is_file():
                rows: list[tuple[float, float, float]] = []
                for near in members[start : start + CHUNK].tolist():
                    count = minhash.kept_neighbours(near, previous, row_of, gone, WALKED, found)
                    if count and (hit := _alike(near, found[:count], texts, settings.similarity)):
                        gone[near] = True
                        rows.append((near, *hit))
                _save(path, np.array(rows, np.float64).reshape(-1, 3).T)
                stop_if_asked(report)
            decided.append(np.load(path))
            gone[decided[-1][0].astype(np.int64)] = True
            report.progress(min(start + CHUNK, len(members)), len(members), "paragraph compared")
    every = np.concatenate([np.empty((3, 0)), *decided], axis=1)
    return every[0].astype(np.int64), every[1].astype(np.int64), every[2]


def _alike(near: int, found: np.ndarray, texts: Texts, similarity: float) -> tuple[int, float] | None:
    """(the first of `found` whose share reaches `similarity`, the share), those with most buckets first."""
    others, buckets = np.unique(found, return_counts=True)
    for other in others[np.argsort(-buckets, kind="stable")[:COMPARED]].tolist():
        share = minhash.jaccard(texts[near], texts[other])
        if share >= similarity:
            return other, share
    return None


def chains(signed: Signed) -> tuple[np.ndarray, np.ndarray]:
    """Near paragraphs that have one before them in a bucket [R], and which, in every band [R, bands] or -1."""
    if signed.counts.near >= 2**31:
        raise InputError(
            f"{signed.counts.near} long paragraphs; at most {2**31 - 1} can be told apart",
            hint="give the corpus in several parts, or raise near_characters",
        )
    paths = [signed.folder / f"band-{band}.npy" for band in range(_bands(signed))]
    linked = np.zeros(signed.counts.near, bool)
    for path in paths:
        linked[np.load(path)[0]] = True
    members = np.flatnonzero(linked)
    previous = np.full((len(members), len(paths)), -1, np.int32)
    for band, path in enumerate(paths):
        links = np.load(path)
        previous[np.searchsorted(members, links[0]), band] = links[1]
    return members, previous


class Texts:
    """Shingles of near paragraphs by number, from the file of squeezed texts; some are kept in memory."""

    def __init__(self, signed: Signed, shingle: int) -> None:
        self._ends = np.cumsum(np.concatenate([[0], *signed.blocks("text_bytes")]))
        self._path = signed.folder / "text"
        self._shingle = shingle
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    def __enter__(self) -> Texts:
        with writing(self._path):
            self._file = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __getitem__(self, number: int) -> np.ndarray:
        known = self._kept.get(number)
        if known is None:
            start, end = int(self._ends[number]), int(self._ends[number + 1])
            text = os.pread(self._file, end - start, start).decode()
            known = minhash.shingles(np.frombuffer(text.encode("utf-32-le"), np.uint32), self._shingle)
            if self._kept_bytes > CACHED_BYTES:
                self._kept, self._kept_bytes = {}, 0
            self._kept[number] = known
            self._kept_bytes += known.nbytes + 200
        return known


def sample(count: int, most: int, seed: int) -> set[int]:
    """At most `most` different places out of `count`."""
    return set(np.random.default_rng(seed).choice(count, min(count, most), replace=False).tolist())
