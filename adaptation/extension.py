"""A tokenizer taught new words: merges after its own, and the tokens that they make.

In SentencePiece's family every split of a new token into two tokens is a merge of the same rank, so that
llama.cpp, which knows tokens and scores but no merges, encodes alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adaptation.merges import Pair, by_pair, by_token, learn
from adaptation.tokenizer_json import TokenizerJson, from_byte_level


def extend(
    base: TokenizerJson, words: dict[str, int], characters: list[str], room: int | None = None
) -> TokenizerJson:
    """`base` with merges, and the tokens they need, that make each word one token.

    `characters` are wanted as tokens too where tokens are characters; byte-level BPE has every character
    already. `room` is the most tokens that may be added: the heaviest merges come first, so that what does not
    fit any more are the ends of the rarest words. Characters always fit.
    """
    if base.family == "bytes":
        symbols = _symbols(base, words)
        ranks: dict[Any, int] = {pair: rank for rank, pair in enumerate(base.merges)}
        learnt = _fitting(learn(symbols, ranks, by_pair, _byte_order), base.vocab, room)
        tokens = dict.fromkeys(left + right for left, right in learnt)
        return base.extended([token for token in tokens if token not in base.vocab], base.merges + learnt)
    wanted = sorted({*characters, *"".join(words)} - {" "})
    spelt = base.extended([char for char in wanted if char not in base.vocab], base.merges)
    ranks = {}
    for rank, (left, right) in enumerate(base.merges):
        ranks.setdefault(left + right, rank)
    left_over = None if room is None else max(0, room - (spelt.size - base.size))
    learnt = _fitting(learn(_symbols(spelt, words), ranks, by_token, _character_order), spelt.vocab, left_over)
    tokens = dict.fromkeys(left + right for left, right in learnt)
    grown = spelt.extended([token for token in tokens if token not in spelt.vocab], base.merges)
    return grown.extended([], _all_splits(base, list(tokens), grown.vocab))


def _symbols(base: TokenizerJson, words: dict[str, int]) -> list[tuple[list[str], int]]:
    """Each word as the base's merges leave it, with its weight."""
    model = base.backend().model
    return [([token.value for token in model.tokenize(word)], heavy) for word, heavy in words.items()]


def _fitting(learnt: list[Pair], known: Iterable[str], room: int | None) -> list[Pair]:
    """The first merges that make at most `room` tokens."""
    if room is None:
        return learnt
    made = set(known)
    most = len(made) + room
    for place, (left, right) in enumerate(learnt):
        made.add(left + right)
        if len(made) > most:
            return learnt[:place]
    return learnt


def _all_splits(base: TokenizerJson, tokens: list[str], vocab: dict[str, int]) -> list[Pair]:
    """Merges of SentencePiece's family: every split of a token into two tokens, tokens by rank.

    The base's merges stay in their order. An old token that new tokens can be put together to gets those
    merges beside its own, where llama.cpp would apply them.
    """

    def splits(token: str) -> list[Pair]:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        return [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]

    known, seen = set(base.merges), set()
    merges: list[Pair] = []
    for left, right in base.merges:
        merges.append((left, right))
        if left + right not in seen:
            seen.add(left + right)
            new = [cut for cut in splits(left + right) if cut not in known]
            merges += [cut for cut in new if cut[0] not in base.vocab or cut[1] not in base.vocab]
    return merges + [cut for token in tokens for cut in splits(token)]


def _byte_order(token: str) -> tuple[Any, ...]:
    raw = from_byte_level(token)
    return len(raw.decode("utf-8", errors="replace")), len(raw), token


def _character_order(token: str) -> tuple[Any, ...]:
    return len(token), len(token.encode("utf-8")), token
