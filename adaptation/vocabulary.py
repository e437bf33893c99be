"""A tokenizer for a language that the base cuts small: new tokens beside the base's, or instead of them.

Source: RuAdapt and LEP (arXiv 2412.21140). Words of the new language are found by a SentencePiece model
(candidates.py), chosen for what the base could take (words.py), and taught to BPE by merges (extension.py);
tokens needed on the way stay in. Three modes:

- extension: all that the base has, then the words. Ids of old tokens stay. New ids follow the tokenizer's last
  id, added tokens included; where the model's embedding has rows beyond (padding, which belongs to no token)
  the new tokens take those rows first. A text without a character of the new tokens is encoded as before.
- optimised: the base's tokens that the corpus uses (uses.py), then the words. Ids close up in their old order.
  A text whose tokens were all kept is cut as before, but for the new words.
- substitution: the base's bytes or characters and control tokens, then words of every script in the corpus
  until the vocabulary has the size asked for.

In all of them normalizer, pre-tokenizer, decoder, control tokens and chat template are the base's, every id
inside the tokenizer's files follows its token, and in SentencePiece's family llama.cpp encodes alike.

Not here: rows for the new tokens, and the ids in a model's config.json (embeddings.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from adaptation.candidates import Trainer, propose
from adaptation.extension import extend
from adaptation.fertility import measure
from adaptation.fertility_page import page
from adaptation.sample import Sample, check_script, draw, lines_of, names_of
from adaptation.tokenizer_json import BYTE_TOKEN, SPACE, TokenizerJson
from adaptation.uses import closed, count, frame, frame_words
from adaptation.words import SPLIT, Words, script_characters, select, speller
from foundation.dataio import documents
from foundation.errors import InputError
from foundation.files import write_atomic, write_json
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one


class Settings(StageSettings):
    """What becomes of the base's tokens, how many new ones, of which script, learnt from how much text."""

    mode: Literal["extension", "substitution", "optimised"] = Field(
        "extension",
        description="keep all of the base's tokens and add words; or learn a new vocabulary instead; "
        "or keep the tokens that the corpus uses and add words",
    )
    trainer: Trainer = Field("unigram", description="SentencePiece model that proposes words")
    add_tokens: int = Field(
        8000,
        ge=0,
        description="words that become one token, the most wanted first; tokens on the way come on top; "
        "not for substitution, and 0 only for optimised",
    )
    vocab_tokens: int = Field(
        0, ge=0, description="for substitution: size of the new vocabulary, control tokens included"
    )
    keep_from_uses: int = Field(
        1, ge=1, description="for optimised: a base token stays that the corpus uses so often"
    )
    pieces: int = Field(40_000, ge=100, description="pieces of the model that proposes words")
    script: str = Field(
        "[ А-Яа-яЁё]+",
        description="regular expression that a word must match whole; a leading space is part of it; "
        "not for substitution, which learns every script of the corpus",
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

    @model_validator(mode="after")
    def _fits_the_mode(self) -> Settings:
        if self.mode == "substitution" and not self.vocab_tokens:
            raise ValueError("mode = 'substitution' needs vocab_tokens, the size of the new vocabulary")
        if self.mode != "substitution" and self.vocab_tokens:
            raise ValueError(f"vocab_tokens = {self.vocab_tokens} is for mode = 'substitution'; set add_tokens")
        if self.mode == "extension" and not self.add_tokens:
            raise ValueError("mode = 'extension' with add_tokens = 0 would change nothing")
        idle = {"substitution": ("add_tokens", "script", "keep_from_uses"), "extension": ("keep_from_uses",)}
        if changed := self.changed(idle.get(self.mode, ())):
            raise ValueError(f"{', '.join(changed)}: no effect with mode = {self.mode!r}; leave it out")
        return self


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/tokenizer, from `model`'s and `corpus`, and out/report.json and out/report.md about it."""
    base, files = TokenizerJson.read(one(inputs, "model")), many(inputs, "corpus")
    named = zip(names_of(files), files, strict=True)
    sample = draw(
        {name: lines_of(documents([file])) for name, file in named}, settings.sample_lines, settings.seed
    )
    if settings.mode != "substitution" and settings.add_tokens:
        check_script(sample.train, settings.script)
    stop_if_asked(report)
    report.progress(1, 4, "part")
    start = _start(settings, base, files, out / ".work", report)
    made, words = _made(settings, start, sample, report)
    report.progress(3, 4, "part")
    made.write(out / "tokenizer")
    found = _found(settings, base, made, words, sample)
    write_json(out / "report.json", found)
    write_atomic(out / "report.md", page(found))
    report.progress(4, 4, "part")
    return _figures(found)


def _start(
    settings: Settings, base: TokenizerJson, files: Sequence[Path], work: Path, report: Report
) -> TokenizerJson:
    """What is left of the base before words are added."""
    if settings.mode == "extension":
        return base
    if settings.mode == "substitution":
        return base.shrunk(bare(base))
    used = count(base, files, work, report)
    tokens = {i: token for token, i in base.vocab.items()}
    kept = {tokens[i] for i, times in used.items() if times >= settings.keep_from_uses}
    for encoding in base.backend().encode_batch(frame(base.folder), add_special_tokens=False):
        kept.update(encoding.tokens)
    start = base.shrunk(closed(base, kept))
    report.note(f"{start.size} of the base's {len(base.vocab)} tokens stay")
    return start


def bare(base: TokenizerJson) -> set[str]:
    """The atoms that a vocabulary can not do without; characters stay only where no bytes could spell them."""
    if base.family == "bytes" or not base.content["model"].get("byte_fallback"):
        return base.atoms
    always = {SPACE, base.unknown or "", *(token["content"] for token in base.added)}
    return {token for token in base.atoms if token in always or BYTE_TOKEN.fullmatch(token)}


def _made(
    settings: Settings, start: TokenizerJson, sample: Sample, report: Report
) -> tuple[TokenizerJson, Words]:
    """The finished tokenizer, and the words it learnt."""
    if not settings.add_tokens and settings.mode == "optimised":
        return start, Words({}, 0, {})
    candidates = propose(sample.train, settings.pieces, settings.trainer, report)
    stop_if_asked(report)
    report.progress(2, 4, "part")
    full = len(candidates) + 3 >= settings.pieces  # SentencePiece counts <unk>, <s> and </s>
    more = "give more text, " + (f"or ask for more than pieces = {settings.pieces}, " if full else "")
    if settings.mode == "substitution":
        words = select(candidates, start, None, None, report)
        return _substitute(start, words, settings.vocab_tokens, more), words
    words = select(candidates, start, settings.script, settings.add_tokens, report)
    split = words.dropped.get(SPLIT, 0)
    if words.supported < settings.add_tokens and split > sum(words.dropped.values()) / 2:
        raise InputError(
            f"add_tokens = {settings.add_tokens}, but {split} of {len(candidates)} proposed words are {SPLIT} "
            f"before any merge, and {words.supported} are left",
            hint="this base can not spell that script in whole words, and more text will not help; take "
            f"another base, or set add_tokens = {words.supported}",
        )
    if not words.taken:
        raise InputError(
            f"no word of the corpus is left to add; dropped: {words.dropped}",
            hint="check that the corpus is in the new language, and that `script` matches its words",
        )
    if words.supported < settings.add_tokens:
        raise InputError(
            f"add_tokens = {settings.add_tokens}, but the corpus supports {words.supported} words; "
            f"dropped: {words.dropped}",
            hint=f"{more}or set add_tokens = {words.supported}; trainer = 'bpe' finds more in little text",
        )
    return extend(start, words.taken, script_characters(sample.train, settings.script)), words


def _substitute(start: TokenizerJson, words: Words, vocab_tokens: int, more: str) -> TokenizerJson:
    """`start` with the heaviest tokens on the way to the words, as many as there is room for."""
    spell, heaviest = speller(start), max(words.taken.values(), default=1)
    framing = [word for text in frame_words(start.folder) if (word := spell(text)) and word not in start.vocab]
    made = extend(start, words.taken | dict.fromkeys(framing, heaviest), [], max(0, vocab_tokens - start.size))
    if made.size > vocab_tokens:
        raise InputError(
            f"vocab_tokens = {vocab_tokens}, but bytes, characters and control tokens alone are {made.size}",
            hint=f"set vocab_tokens above {made.size}",
        )
    if made.size < vocab_tokens:
        raise InputError(
            f"vocab_tokens = {vocab_tokens}, but the corpus supports a vocabulary of {made.size}",
            hint=f"{more}or set vocab_tokens = {made.size}",
        )
    return made


def _found(
    settings: Settings, base: TokenizerJson, made: TokenizerJson, words: Words, sample: Sample
) -> dict[str, Any]:
    """The content of report.json."""
    kept = len(made.vocab.keys() & base.vocab.keys())
    return {
        "mode": settings.mode,
        "trainer": settings.trainer,
        "vocabulary": {
            "before": len(base.vocab),
            "after": len(made.vocab),
            "kept": kept,
            "added": len(made.vocab) - kept,
            "dropped": len(base.vocab) - kept,
        },
        "words": {
            "taken": sum(word in made.vocab for word in words.taken),
            "supported": words.supported,
            "dropped": words.dropped,
        },
        "lines_learnt_from": len(sample.train),
        "held": measure(sample.held, base, made),
    }


def _figures(found: dict[str, Any]) -> Figures:
    figures: Figures = {
        "words_added": found["words"]["taken"],
        "tokens_added": found["vocabulary"]["added"],
        "tokens_dropped": found["vocabulary"]["dropped"],
        "vocab_tokens": found["vocabulary"]["after"],
    }
    for figure in ("tokens_per_word", "characters_per_token", "words_in_one_token"):
        for when in ("before", "after"):
            value = found["held"]["all"][when][figure]
            if value is not None:
                figures[f"{figure}_{when}"] = value
    return figures
