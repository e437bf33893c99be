"""Weighted BPE over a list of words: merges that make every word one token.

As in RuAdapt: the words, with weights, are first split as the base tokenizer splits them; then the heaviest
pair is merged again and again until each word is whole. Ties go to the shorter, then the smaller string, so
the result depends on nothing but its arguments.

A merge is known by its `key`. In byte-level BPE that is the pair (left, right). In SentencePiece's BPE, as
llama.cpp runs it, any two neighbours whose concatenation is a token may merge, so the key is the
concatenation.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]
Ranks = Mapping[Any, float]  # key -> rank, the lowest is merged first
Key = Callable[[str, str], Hashable]


def by_pair(left: str, right: str) -> Pair:
    """Key of a merge in byte-level BPE."""
    return left, right


def by_token(left: str, right: str) -> str:
    """Key of a merge in SentencePiece's BPE."""
    return left + right


def settle(symbols: list[str], ranks: Ranks, key: Key) -> list[str]:
    """Apply known merges in place until none fits: the lowest rank first, the leftmost of equals.

    Returns what the merges made, in order.
    """
    made: list[str] = []
    while len(symbols) > 1:
        ranked = [(ranks.get(key(symbols[i], symbols[i + 1])), i) for i in range(len(symbols) - 1)]
        fitting = [(rank, i) for rank, i in ranked if rank is not None]
        if not fitting:
            break
        _, i = min(fitting)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        made.append(symbols[i])
    return made


def learn(
    words: Iterable[tuple[Sequence[str], int]],
    ranks: Ranks,
    key: Key,
    order: Callable[[str], tuple[Any, ...]],
) -> list[Pair]:
    """New merges, in order, after which every word is one token; `ranks` holds the known ones.

    `words` are (symbols, weight), the symbols settled under `ranks`. `order` of the merged string breaks ties
    between pairs of equal weight. Each returned pair is the one by which its key was first seen.
    """
    ranks = dict(ranks)
    state = [(list(symbols), weight) for symbols, weight in words]
    counts: dict[Hashable, int] = defaultdict(int)
    places: dict[Hashable, set[int]] = defaultdict(set)  # key -> words it may occur in
    pairs: dict[Hashable, Pair] = {}

    def tally(index: int, sign: int) -> set[Hashable]:
        symbols, weight = state[index]
        touched = set()
        for pair in pairwise(symbols):
            name = key(*pair)
            counts[name] += sign * weight
            places[name].add(index)
            pairs.setdefault(name, pair)
            touched.add(name)
        return touched

    def entry(name: Hashable) -> tuple[Any, ...]:
        left, right = pairs[name]
        return -counts[name], *order(left + right), left, name

    for index in range(len(state)):
        tally(index, +1)
    heap = [entry(name) for name in counts]
    heapq.heapify(heap)
    merges: list[Pair] = []
    rank = max(ranks.values(), default=-1)
    while heap:
        negative, *_, name = heapq.heappop(heap)
        if not negative or counts[name] != -negative:
            continue  # an older entry of a pair that was counted again since
        rank += 1
        ranks[name] = rank
        merges.append(pairs[name])
        touched: set[Hashable] = set()
        for index in sorted(places.pop(name)):
            touched |= tally(index, -1)
            settle(state[index][0], ranks, key)
            touched |= tally(index, +1)
        for other in touched:
            if counts[other]:
                heapq.heappush(heap, entry(other))
    return merges
