"""Vocabulary extension: new tokens for a language that the base tokenizer cuts small.

Source: RuAdapt and LEP (arXiv 2412.21140). Words of the new language are found by a Unigram model
(unigram.py), and taught to the base's BPE by merges that follow its own (merges.py); tokens needed on the way
stay in.

What holds afterwards:
- Ids of old tokens stay. New ids follow the tokenizer's last id, added tokens included; where the model's
  embedding has rows beyond (padding, which belongs to no token) the new tokens take those rows first.
- A text without a character of the new tokens is encoded as before.
- In SentencePiece's family every split of a new token into two tokens is a merge of the same rank, so that
  llama.cpp, which knows tokens and scores but no merges, encodes alike.

Not here: rows for the new tokens (embeddings.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from adaptation.merges import Pair, by_pair, by_token, learn
from adaptation.tokenizer_json import SPACE, TokenizerJson, from_byte_level, to_byte_level
from adaptation.unigram import Sample, draw, lines_of, train, weight
from foundation.dataio import documents
from foundation.errors import InputError
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one


class Settings(StageSettings):
    """How many new tokens, of which script, learnt from how much text."""

    add_tokens: int = Field(
        8000,
        ge=1,
        description="words that become one token, the most probable first; tokens on the way come on top",
    )
    pieces: int = Field(40_000, ge=100, description="pieces of the Unigram model that proposes words")
    script: str = Field(
        "[ А-Яа-яЁё]+",
        description="regular expression that a word must match whole; a leading space is part of it",
    )
    sample_lines: int = Field(
        1_000_000, ge=1, description="lines of the corpus to learn from, drawn by the seed"
    )

    @field_validator("script")
    @classmethod
    def _compiles(cls, script: str) -> str:
        try:
            re.compile(script)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return script


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Extend the tokenizer of `model` by words of `corpus`; writes out/tokenizer."""
    base = TokenizerJson.read(one(inputs, "model"))
    sample = draw(lines_of(documents(many(inputs, "corpus"))), settings.sample_lines, settings.seed)
    stop_if_asked(report)
    report.progress(1, 4, "part")
    pieces = train(sample.train, settings.pieces, report)
    stop_if_asked(report)
    report.progress(2, 4, "part")
    words = select(pieces, base, settings.script, settings.add_tokens, report)
    made = extend(base, words, script_characters(sample.train, settings.script))
    report.progress(3, 4, "part")
    made.write(out / "tokenizer")
    figures = _figures(base, made, words, sample)
    report.progress(4, 4, "part")
    return figures


def select(
    pieces: Iterable[tuple[str, float]], base: TokenizerJson, script: str, most: int, report: Report
) -> dict[str, int]:
    """Word -> weight, in the base's spelling: the `most` probable pieces that pass every filter.

    A piece is dropped when it does not match `script`, when the base would normalise it or split it before
    its merges, and when the base has it. The limit counts what is left.
    Raises InputError when nothing is.
    """
    pattern, spell = re.compile(script), speller(base)
    kept: dict[str, float] = {}
    dropped: Counter[str] = Counter()
    for piece, log_probability in pieces:
        text = piece.replace(SPACE, " ")
        if not pattern.fullmatch(text):
            dropped["of another script"] += 1
        elif (word := spell(text)) is None:
            dropped["split by the base's pre-tokenizer"] += 1
        elif word in base.vocab:
            dropped["known to the base"] += 1
        else:
            kept[word] = max(log_probability, kept.get(word, log_probability))
    best = sorted(kept, key=lambda word: (-kept[word], word))[:most]
    report.note(
        f"{len(best)} words taken of {len(kept)}; dropped: "
        + ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))
    )
    if not best:
        raise InputError(
            f"no word of the corpus is left to add; dropped: {dict(sorted(dropped.items()))}",
            hint="check that the corpus is in the new language, and that `script` matches its words",
        )
    return {word: weight(kept[word]) for word in best}


def speller(base: TokenizerJson) -> Callable[[str], str | None]:
    """text -> the one chunk that the base's merges would see, or None when there is no such chunk."""
    backend = base.backend()
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def bytes_chunk(text: str) -> str | None:
        normal = normalizer.normalize_str(text) if normalizer else text
        chunks = [chunk for chunk, _ in pre_tokenizer.pre_tokenize_str(normal)]
        return chunks[0] if chunks == [to_byte_level(text)] else None

    def characters_chunk(text: str) -> str | None:
        chunk = text.replace(" ", SPACE)
        if SPACE in chunk[1:]:
            return None
        # A letter before it takes the space that some normalizers put before a text.
        normal = normalizer.normalize_str("a" + text) if normalizer else "a" + chunk
        return chunk if normal.replace(" ", SPACE).endswith("a" + chunk) else None

    return bytes_chunk if base.family == "bytes" else characters_chunk


def script_characters(lines: Iterable[str], script: str) -> list[str]:
    """Characters of the lines that match `script` alone, sorted."""
    pattern = re.compile(script)
    return sorted(char for char in set().union(*lines) if pattern.fullmatch(char))


def extend(base: TokenizerJson, words: dict[str, int], characters: list[str]) -> TokenizerJson:
    """`base` with merges, and the tokens they need, that make each word one token.

    `characters` are wanted as tokens too where tokens are characters; byte-level BPE has every character
    already.
    """
    if base.family == "bytes":
        symbols = _symbols(base, words)
        ranks: dict[Any, int] = {pair: rank for rank, pair in enumerate(base.merges)}
        learnt = learn(symbols, ranks, by_pair, _byte_order)
        tokens = dict.fromkeys(left + right for left, right in learnt)
        return base.extended([token for token in tokens if token not in base.vocab], base.merges + learnt)
    wanted = sorted({*characters, *"".join(words)} - {" "})
    spelt = base.extended([char for char in wanted if char not in base.vocab], base.merges)
    ranks = {}
    for rank, (left, right) in enumerate(base.merges):
        ranks.setdefault(left + right, rank)
    learnt = learn(_symbols(spelt, words), ranks, by_token, _character_order)
    tokens = dict.fromkeys(left + right for left, right in learnt)
    grown = spelt.extended([token for token in tokens if token not in spelt.vocab], base.merges)
    return grown.extended([], _all_splits(base, list(tokens), grown.vocab))


def _symbols(base: TokenizerJson, words: dict[str, int]) -> list[tuple[list[str], int]]:
    """Each word as the base's merges leave it, with its weight."""
    model = base.backend().model
    return [([token.value for token in model.tokenize(word)], heavy) for word, heavy in words.items()]


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


def _figures(base: TokenizerJson, made: TokenizerJson, words: dict[str, int], sample: Sample) -> Figures:
    """Fertility (tokens per word) and characters per token on the held lines, before and after."""
    word_count = sum(len(line.split()) for line in sample.held)
    char_count = sum(map(len, sample.held))
    figures: Figures = {
        "words_added": len(words),
        "tokens_added": made.size - base.size,
        "vocab_tokens": made.size,
    }
    for when, tokenizer in (("before", base), ("after", made)):
        encoded = tokenizer.backend().encode_batch(sample.held, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encoded)
        figures[f"tokens_per_word_{when}"] = tokens / word_count
        figures[f"characters_per_token_{when}"] = char_count / tokens
    return figures
