"""Candidates for new tokens: pieces of a SentencePiece Unigram model trained on the new language.

Unigram pieces are chosen by how much they shorten the whole corpus, so they are better candidates than BPE's;
Vikhr compared 33k to 80k pieces and found 40k best on the end task. No byte fallback, digits split, NFC.

Determinism: one thread, and lines drawn by a seeded reservoir before SentencePiece sees them.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from foundation.errors import InputError
from foundation.report import Report

SPACE = "▁"
HELD_EVERY = 50  # one line in so many is kept from training, to measure on
HELD_MOST = 2000  # lines
LONGEST_LINE_BYTES = 1 << 24  # SentencePiece passes over longer lines; its default is 4192


@dataclass
class Sample:
    """Lines to train on, and lines held back to measure on."""

    train: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def lines_of(documents: Iterable[str]) -> Iterator[str]:
    """Lines of the documents that are not blank, in NFC."""
    for document in documents:
        for line in unicodedata.normalize("NFC", document).split("\n"):
            if line := line.strip():
                yield line


def draw(lines: Iterable[str], most: int, seed: int) -> Sample:
    """Hold back every 50th line, and draw up to `most` of the others, each as likely as any other."""
    sample, dice, seen = Sample(), random.Random(seed), 0
    for number, line in enumerate(lines):
        if number % HELD_EVERY == HELD_EVERY - 1 and len(sample.held) < HELD_MOST:
            sample.held.append(line)
            continue
        seen += 1
        if len(sample.train) < most:
            sample.train.append(line)
        elif (place := dice.randrange(seen)) < most:
            sample.train[place] = line
    if not sample.held:
        raise InputError(
            f"the corpus has {len(sample.train)} lines of text; at least {HELD_EVERY} are needed",
            hint="give more text, or shorter lines",
        )
    return sample


def train(lines: list[str], pieces: int, report: Report) -> list[tuple[str, float]]:
    """(piece, log-probability) of a Unigram model, in SentencePiece's spelling and order.

    `pieces` is a wish: a small corpus has fewer, and the report says so. Raises InputError when it is less
    than the corpus has characters.
    """
    import io

    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="unigram",
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
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    size = model.get_piece_size()
    if size < pieces:
        report.note(f"the corpus gives {size} Unigram pieces, {pieces} were asked for")
    return [
        (model.id_to_piece(i), model.get_score(i))
        for i in range(size)
        if not model.is_control(i) and not model.is_unknown(i)
    ]


def weight(log_probability: float) -> int:
    """Weight of a piece in the BPE that follows."""
    return max(1, int(1e6 * math.exp(log_probability)))
