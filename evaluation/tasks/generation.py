"""Generation: a greedy answer beside a reference, by ROUGE-L (rouge.py).

An answer may be half as long again as the longest reference, in tokens; what runs on beyond that has lost its
precision anyway. A plain prompt's answer is read for as many lines as its reference has: a model without a
chat template has no token to say that it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.tasks.prompts import Record, Writer
from evaluation.tasks.rouge import rouge_l, words
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

LONGER = 1.5  # an answer's room, by the longest reference
LEAST_TOKENS = 8


@dataclass(frozen=True)
class Generation:
    """A prompt an item; `lines` is how many lines of its answer are read, 0 = all."""

    name: str
    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    lines: Sequence[int]
    answer_tokens: int
    stop_ids: frozenset[int]
    tokenizer: Tokenizer

    def scores(self, answers: Sequence[Sequence[int]]) -> np.ndarray:
        import numpy as np

        texts = [self.read(ids, lines) for ids, lines in zip(answers, self.lines, strict=True)]
        return np.asarray([rouge_l(*pair) for pair in zip(texts, self.references, strict=True)])  # [items]

    def figures(self, answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """Mean lengths in words: an answer that says too much and one that says too little score alike."""
        read = [self.read(ids, lines) for ids, lines in zip(answers, self.lines, strict=True)]
        return {
            "answer_words": fmean(len(words(text)) for text in read),
            "reference_words": fmean(len(words(text)) for text in self.references),
        }

    def read(self, ids: Sequence[int], lines: int) -> str:
        """An answer's text, as far as it is read."""
        text = self.tokenizer.decode(list(ids)).strip()
        return "\n".join(text.split("\n")[:lines]) if lines else text


def problem(record: Record) -> str:
    """What is wrong with a line's reference, or nothing."""
    reference = record["reference"]
    return "" if isinstance(reference, str) and words(reference) else '"reference" must be a text with words'


def make(name: str, records: Sequence[Record], writer: Writer) -> Generation:
    """The task of checked lines; items whose prompt and answer do not fit the model are left out."""
    room = {id(record): _room(record, writer.tokenizer) for record in records}
    prompts = [(record, writer.prompt(record)) for record in records]
    fit = [(record, ids) for record, ids in prompts if len(ids) + room[id(record)] <= writer.max_tokens]
    answer_tokens = max((room[id(record)] for record, _ in fit), default=0)
    fit = [(record, ids) for record, ids in fit if len(ids) + answer_tokens <= writer.max_tokens]
    writer.left_out(name, len(records), len(fit))
    return Generation(
        name,
        prompts=[ids for _, ids in fit],
        references=[record["reference"] for record, _ in fit],
        lines=[0 if "messages" in record else record["reference"].strip().count("\n") + 1 for record, _ in fit],
        answer_tokens=answer_tokens,
        stop_ids=writer.stop_ids(chat=any("messages" in record for record, _ in fit)),
        tokenizer=writer.tokenizer,
    )


def _room(record: Record, tokenizer: Tokenizer) -> int:
    """Tokens that an answer to `record` should be given."""
    return max(LEAST_TOKENS, round(LONGER * len(tokenizer.encode(record["reference"]))))
