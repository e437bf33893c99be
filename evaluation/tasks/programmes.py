"""Programmes: greedy answers to held-out profiles of the flight-crew world, judged by its validator.

The score of an item is 1 for a valid programme, else 0. It is what evaluation/programmes.py measures in a GGUF
file through llama.cpp, here for a model that is loaded, as pruning needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corpora.world.validate import Profile, validate
from evaluation.programmes import ANSWER_TOKENS
from evaluation.tasks.prompts import Record, Writer
from foundation.errors import InputError
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Programmes:
    """A prompt an item, with the profile and the language that its answer is judged by."""

    name: str
    prompts: Sequence[Sequence[int]]
    profiles: Sequence[Profile]
    languages: Sequence[str]
    stop_ids: frozenset[int]
    tokenizer: Tokenizer
    answer_tokens: int = ANSWER_TOKENS

    def scores(self, answers: Sequence[Sequence[int]]) -> np.ndarray:
        import numpy as np

        judged = zip(answers, self.profiles, self.languages, strict=True)
        return np.asarray(
            [
                float(validate(self.tokenizer.decode(list(ids)), profile, language).valid)
                for ids, profile, language in judged
            ]
        )

    def figures(self, answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """The share of valid programmes in each language."""
        import numpy as np

        scores, languages = self.scores(answers), np.asarray(self.languages)
        return {
            f"valid_{name}": float(scores[languages == name].mean()) for name in sorted(set(self.languages))
        }


def problem(record: Record) -> str:
    """What is wrong with a line's profile or language, or nothing."""
    try:
        Profile.from_dict(record["profile"])
        validate("", Profile.from_dict(record["profile"]), record.get("language", ""))
    except (InputError, TypeError, AttributeError) as error:
        return (
            f"no profile of the flight-crew world ({error.message if isinstance(error, InputError) else error})"
        )
    return ""


def make(name: str, records: Sequence[Record], writer: Writer) -> Programmes:
    """The task of checked lines; profiles whose prompt and answer do not fit the model are left out."""
    prompts = [(record, writer.prompt(record)) for record in records]
    fit = [(record, ids) for record, ids in prompts if len(ids) + ANSWER_TOKENS <= writer.max_tokens]
    writer.left_out(name, len(records), len(fit))
    return Programmes(
        name,
        prompts=[ids for _, ids in fit],
        profiles=[Profile.from_dict(record["profile"]) for record, _ in fit],
        languages=[record["language"] for record, _ in fit],
        stop_ids=writer.stop_ids(chat=True),
        tokenizer=writer.tokenizer,
    )
