"""Near-duplicates: texts whose word n-grams overlap (Jaccard) by a threshold or more. Exact,
but for 64-bit digests in the place of the n-grams.

Prefix filtering (Bayardo, Ma, Srikant, "Scaling Up All Pairs Similarity Search", WWW 2007): with the n-grams
of all texts in one fixed order, sets A and B of Jaccard >= t share at least ceil(t |A|) grams, of which the
first k stand among the first |A| - ceil(t |A|) + k of A, and so of B. Only those are indexed, rare ones first,
so that what every answer says ("workout 1") costs nothing, and only texts that share k of them are compared.
Rarity is counted anew whenever the index has doubled; the order changes then, the answer never.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Set

WORDS = 3
SHARED = 4  # k: more compares fewer texts and indexes more grams
_WORD = re.compile(r"\w+")


def grams(text: str, words: int = WORDS) -> frozenset[int]:
    """The word n-grams of `text` without case, as 64-bit digests; a shorter text is one gram, "" is none."""
    found = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    count = max(1, len(found) - words + 1) if found else 0
    return frozenset(_digest(" ".join(found[start : start + words])) for start in range(count))


def _digest(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big")


def jaccard(a: Set[int], b: Collection[int]) -> float:
    """|A and B| / |A or B|; 0 where nothing is shared. `b` holds no gram twice."""
    shared = sum(gram in a for gram in b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


class NearDuplicates:
    """Kept texts, and the question whether a new one is near one of them."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: Jaccard share from which a text counts as repeated, 0 < t <= 1."""
        self.threshold = threshold
        self._names: list[str] = []
        self._sets: list[array[int]] = []  # 8 bytes a gram
        self._rarity: dict[int, int] = {}
        self._index: dict[int, list[int]] = {}
        self._recount_at = 64

    def add(self, name: str, text: str) -> None:
        """Keep `text`; `find` names it `name`."""
        self._names.append(name)
        self._sets.append(array("Q", grams(text)))
        if len(self._sets) < self._recount_at:
            self._insert(len(self._sets) - 1)
            return
        self._recount_at *= 2
        seen = Counter(gram for known in self._sets for gram in known)
        self._rarity = {gram: count for gram, count in seen.items() if count > 1}
        self._index = {}
        for number in range(len(self._sets)):
            self._insert(number)

    def find(self, text: str) -> tuple[str, float] | None:
        """(name, share) of the nearest kept text that reaches the threshold; the first one of equals."""
        found = grams(text)
        hits = Counter(number for gram in self._prefix(found) for number in self._index.get(gram, ()))
        least = self._shared(len(found))
        near = [n for n, count in hits.items() if count >= min(least, self._shared(len(self._sets[n])))]
        best = max(((jaccard(found, self._sets[number]), -number) for number in near), default=(0.0, 0))
        return (self._names[-best[1]], best[0]) if best[0] >= self.threshold else None

    def _insert(self, number: int) -> None:
        for gram in self._prefix(self._sets[number]):
            self._index.setdefault(gram, []).append(number)

    def _overlap(self, size: int) -> int:
        """Grams that a set of `size` must share with any other for a Jaccard share of the threshold."""
        return max(1, math.ceil(self.threshold * size - 1e-9))

    def _shared(self, size: int) -> int:
        return min(SHARED, self._overlap(size))

    def _prefix(self, found: Collection[int]) -> list[int]:
        size = len(found)
        length = size - self._overlap(size) + self._shared(size)
        return sorted(found, key=lambda gram: (self._rarity.get(gram, 0), gram))[:length]
