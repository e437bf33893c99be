"""Candidates for new tokens: pieces of a SentencePiece model trained on the new language.

Unigram pieces are chosen by how much they shorten the whole corpus, so they are better candidates than BPE's;
Vikhr compared 33k to 80k pieces and found 40k best on the end task. BPE's pieces are more where text is scarce:
Unigram drops what it expects to see less than once. No byte fallback, digits split, NFC.

A candidate's weight says how often it is needed: by Unigram a million times its probability, by BPE how often
the sample makes it, on the way to longer pieces included, which is the count by which BPE itself goes.

Determinism: one thread, and lines drawn by a seeded reservoir before SentencePiece sees them.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from adaptation.merges import by_token, settle
from foundation.errors import InputError
from foundation.report import Report

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Trainer = Literal["unigram", "bpe"]
LONGEST_LINE_BYTES = 1 << 24  # SentencePiece passes over longer lines; its default is 4192
BATCH_LINES = 10_000  # encoded at once to count pieces


class Candidate(NamedTuple):
    """A piece in SentencePiece's spelling; the highest `score` is wanted first."""

    piece: str
    score: float
    weight: int


def propose(lines: list[str], pieces: int, trainer: Trainer, report: Report) -> list[Candidate]:
    """The pieces of a model of `lines`, in the model's order.

    `pieces` is a wish: a small corpus has fewer, and the report says so. Raises InputError when it is less
    than the corpus has characters.
    """
    model = _train(lines, pieces, trainer)
    size = model.get_piece_size()
    if size < pieces:
        name = {"unigram": "Unigram", "bpe": "BPE"}[trainer]
        report.note(f"the corpus gives {size} {name} pieces, {pieces} were asked for")
    ids = [i for i in range(size) if not model.is_control(i) and not model.is_unknown(i)]
    scores = {model.id_to_piece(i): model.get_score(i) for i in ids}
    if trainer == "unigram":
        return [Candidate(piece, score, weight_of(score)) for piece, score in scores.items()]
    made = _times_made(lines, model, scores)
    return [Candidate(piece, made[piece], max(1, made[piece])) for piece in scores]


def weight_of(log_probability: float) -> int:
    """Weight of a Unigram piece in the BPE that follows."""
    return max(1, int(1e6 * math.exp(log_probability)))


def _times_made(lines: list[str], model: SentencePieceProcessor, scores: dict[str, float]) -> Counter[str]:
    """How often each piece is made when the model reads `lines`: its merges, as many as are applied.

    A piece is made by the same merges wherever it stands (see uses.py), so those of each different one are
    looked up once.
    """
    cut: Counter[int] = Counter()
    for start in range(0, len(lines), BATCH_LINES):
        for encoded in model.encode(lines[start : start + BATCH_LINES], num_threads=1):
            cut.update(encoded)
    ranks = {piece: -score for piece, score in scores.items() if len(piece) > 1}
    made: Counter[str] = Counter()
    for i, times in cut.items():
        if not model.is_unknown(i):
            characters = list(model.id_to_piece(i))
            for piece in [*characters, *settle(characters, ranks, by_token)]:
                made[piece] += times
    return made


def _train(lines: list[str], pieces: int, trainer: Trainer) -> SentencePieceProcessor:
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=trainer,
            vocab_size=pieces,
            hard_vocab_limit=False,  # fewer pieces where the corpus does not hold so many
            split_digits=True,
            byte_fallback=False,
            normalization_rule_name="identity",  # the text is in NFC already; the default would change it
            max_sentence_length=LONGEST_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"SentencePiece can not make {pieces} pieces of this corpus: {error}", hint="ask for more `pieces`"
        ) from None
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
