"""Weighted BPE: the merges are those of the textbook."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from adaptation.merges import by_pair, by_token, learn, settle


def naive_bpe(symbols: list[str], ranks: dict[Any, int], key: Any) -> list[str]:
    """The textbook: look for the best known pair over the whole word, again and again."""
    symbols = list(symbols)
    while True:
        best = None
        for i in range(len(symbols) - 1):
            rank = ranks.get(key(symbols[i], symbols[i + 1]))
            if rank is not None and (best is None or rank < best[0]):
                best = rank, i
        if best is None:
            return symbols
        i = best[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def naive_learn(words: dict[str, int], ranks: dict[Any, int], key: Any) -> list[Any]:
    """Count every pair of every word afresh before each merge, and encode every word from its characters."""
    ranks, keys = dict(ranks), []
    while True:
        counts: dict[Any, int] = {}
        for word, weight in words.items():
            symbols = naive_bpe(list(word), ranks, key)
            for left, right in pairwise(symbols):
                counts[key(left, right)] = counts.get(key(left, right), 0) + weight
        if not counts:
            return keys
        best = min(counts, key=lambda k: (-counts[k], len("".join(k)), "".join(k), k))
        keys.append(best)
        ranks[best] = len(ranks)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 4), min_size=1, max_size=8),
    st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", "ab", "bc"])] * 2), max_size=4, unique=True),
    st.sampled_from([by_pair, by_token]),
)
def test_merges_are_those_of_the_naive_algorithm(words: dict[str, int], known: list[Any], key: Any) -> None:
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(key(*pair) for pair in known))}
    start = [(naive_bpe(list(word), ranks, key), weight) for word, weight in words.items()]
    learnt = learn(start, ranks, key, lambda token: (len(token), token))
    assert [key(*pair) for pair in learnt] == naive_learn(words, ranks, key)


def test_merges_of_a_small_case_by_hand() -> None:
    """ab weighs 5 + 2, so it comes first; then abc (5); bd and abd tie at 2: only abd is left to make."""
    learnt = learn([("abc", 5), ("abd", 2)], {}, by_pair, lambda token: (len(token), token))
    assert learnt == [("a", "b"), ("ab", "c"), ("ab", "d")]


def test_ties_go_to_the_shorter_then_the_smaller() -> None:
    def order(token: str) -> tuple[int, str]:
        return len(token), token

    assert learn([(["b", "cc"], 1), (["b", "a"], 1), (["a", "b"], 1)], {}, by_pair, order) == [
        ("a", "b"),
        ("b", "a"),
        ("b", "cc"),
    ]


def test_settle_applies_the_lowest_rank_first() -> None:
    symbols = list("abcab")
    settle(symbols, {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}, by_pair)
    assert symbols == ["abc", "ab"]
