"""What a text is made of, as numbers: hashed n-grams of its characters, of its words, and of its shape.

N-grams of characters see spelling, encoding and endings in any language without knowing it; words see topics;
the shape, in which each letter is replaced by its script and case, sees layout, a digit inside a word, a full
stop that is missing. All are hashed into 2^bits buckets (Weinberger et al. 2009), so there is no vocabulary to
keep. The hash is this file's own arithmetic on 64-bit integers: a classifier trained today reads the same
features on any machine and under any version of any library.

    value of a bucket = 1 where a text has one of its n-grams, divided by the norm of all of a text's values

How often an n-gram is met says little and hides the rest. On the documents of benchmarks/quality_filter.py
(seed 17) AUC was .987, and .971 with log(1 + count) in place of 1; with n-grams of up to 5 characters and 2
words it was .966 with the shape, .887 without.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

START, GAP, END = "\x02", "\x1f", "\x03"  # where a text begins, was shortened, ends: n-grams see them
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no character is lost in the product
_KINDS = 1 << 16  # characters beyond the basic plane, emoji and such, are all of one kind


class Grams(NamedTuple):
    """Longest n-grams of each sort, of how much of a text, into how many buckets (2^bits)."""

    characters: int
    words: int
    shapes: int
    bits: int
    max_characters: int


def features(text: str, grams: Grams) -> tuple[np.ndarray, np.ndarray]:
    """Buckets int32 [F], ascending, and their values float32 [F], of norm 1.

    Of a longer text than max_characters the first and the last half of that are read.
    """
    import numpy as np

    text = shortened(unicodedata.normalize("NFC", text), grams.max_characters)
    letters = np.frombuffer(f"{START}{text}{END}".encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    shape = _kinds()[np.minimum(letters, _KINDS - 1)]
    hashes = rolled(letters, grams.characters, salt=0)
    hashes += rolled(np.array(words, dtype=np.uint64), grams.words, salt=64)
    hashes += rolled(shape, grams.shapes, salt=128)
    buckets = np.unique((np.concatenate(hashes) >> np.uint64(64 - grams.bits)).astype(np.int32))
    return buckets, np.full(len(buckets), len(buckets) ** -0.5, dtype=np.float32)


def shortened(text: str, max_characters: int) -> str:
    """`text`, or where it is too long its first and last part with a mark between them."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return text[:half] + GAP + text[-half:]


def rolled(codes: np.ndarray, longest: int, salt: int) -> list[np.ndarray]:
    """Hashes of all runs of 1, 2, .. `longest` codes, uint64: one array a length.

    A run is the polynomial of its codes modulo 2^64, stirred by the end of splitmix64 (Steele et al. 2014).
    """
    import numpy as np

    found = []
    run = np.zeros(len(codes) + 1, dtype=np.uint64)
    for length in range(1, min(longest, len(codes)) + 1):
        run = run[:-1] * np.uint64(_FACTOR) + codes[length - 1 :]  # [T - length + 1]
        mixed = run + np.uint64(salt + length)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found.append(mixed ^ (mixed >> np.uint64(31)))
    return found


def kind(character: str) -> int:
    """What a shape has in place of a character: one code for all digits, two for the cases of each script.

    By code points and general categories, the tables of which are fixed for what is assigned.
    """
    code = ord(character)
    category = unicodedata.category(character)
    if category == "Nd":
        return ord("0")
    if category[0] == "M":
        return ord("\u0301")
    if category[0] != "L":
        return min(code, _KINDS - 1)
    script = "a" if code < 0x250 else "я" if 0x400 <= code < 0x530 else "文"
    return ord(script.upper() if category == "Lu" else script)


@cache
def _kinds() -> np.ndarray:
    """`kind` of all characters of the basic plane, uint64 [65536]."""
    import numpy as np

    return np.array([kind(chr(code)) for code in range(_KINDS)], dtype=np.uint64)
