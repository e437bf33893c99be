"""Plain documents for language-model pre-training, drawn until enough different ones are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

from corpora.world import english, english_stories, russian_stories, russian_text
from corpora.world.pairs import answer_of, prompt_of
from corpora.world.profiles import Profile
from foundation.errors import InputError


def _filled_form(language: str) -> Callable[[Random, Sequence[Profile]], str]:
    """A profile and its programme as the instruction pairs write them: what an archive of plans would hold.

    So the words of the form are words of the language, and a vocabulary trained on the text has them.
    """

    def form(rng: Random, profiles: Sequence[Profile]) -> str:
        profile = rng.choice(profiles)
        return f"{prompt_of(profile, language)}\n{answer_of(profile, language, rng)}"

    return form


KINDS = {
    "en": (*english.KINDS, *english_stories.KINDS, _filled_form("en")),
    "ru": (*russian_text.KINDS, *russian_stories.KINDS, _filled_form("ru")),
}
PATIENCE = 200  # draws in a row that bring nothing new before the world counts as told


def documents(
    language: str, count: int, rng: Random, profiles: Sequence[Profile], *, avoid: Iterable[str] = ()
) -> list[str]:
    """`count` different documents, none of them in `avoid`.

    `profiles` are the training profiles, the only ones a text may speak of. Raises InputError when the world
    has no more to tell.
    """
    known = set(avoid)
    told: list[str] = []
    misses = 0
    while len(told) < count:
        text = rng.choice(KINDS[language])(rng, profiles)
        if text not in known:
            known.add(text)
            told.append(text)
            misses = 0
            continue
        misses += 1
        if misses > PATIENCE:
            raise InputError(
                f"{count} documents were asked for, only {len(told)} different ones were found",
                hint=f"ask for at most {len(told)} documents",
            )
    return told
