"""ROUGE-L (Lin 2004): how much of a reference an answer says, in the reference's order.

F1 of the longest common subsequence of words. Words are runs of Unicode's word characters in lower case; the
original's tokenizer keeps a to z and digits alone, so of a Russian text it keeps nothing. No stemming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of `text`, in lower case."""
    return WORD.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """F1 in [0, 1] of precision = common / words of the answer and recall = common / words of the reference."""
    said, wanted = words(answer), words(reference)
    total = len(said) + len(wanted)
    return 2 * common_words(said, wanted) / total if total else 0.0


def common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of its table is one integer's bits (Hyyrö 2004)."""
    places: dict[str, int] = {}  # word -> a bit for each of its places in a
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(a)) - 1
    steps = full  # bit i is 0 where the table's row rises at i
    for word in b:
        met = steps & places.get(word, 0)
        steps = (steps + met | steps - met) & full
    return len(a) - steps.bit_count()
