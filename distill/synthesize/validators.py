"""The table of validators: what a recipe may name to judge an answer. A recipe can name no code.

A new one is an entry here: the fields that it reads of the prompt's record, and a function that gives the
names of the broken rules, for any text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from corpora.world.facts import LANGUAGES
from corpora.world.profiles import Profile
from corpora.world.validate import validate
from distill.synthesize import programme
from distill.synthesize.catalogue import PROFILE, Catalogue
from foundation.errors import InputError


@dataclass(frozen=True)
class Validator:
    """`needs`: keys of the record; `broken`: (answer, record, catalogue) -> names of the broken rules."""

    needs: tuple[str, ...]
    broken: Callable[[str, Mapping[str, Any], Catalogue | None], tuple[str, ...]]
    needs_catalogue: bool = False
    check: Callable[[Mapping[str, Any]], str] = lambda record: ""  # what makes a record unfit, or ""


def _world(text: str, record: Mapping[str, Any], catalogue: Catalogue | None) -> tuple[str, ...]:
    return validate(text, Profile.from_dict(record["profile"]), record["language"]).broken


def _fit_for_world(record: Mapping[str, Any]) -> str:
    try:
        Profile.from_dict(record["profile"])
    except (InputError, AttributeError, TypeError, ValueError) as error:
        return f"profile: {error}".split("\n")[0]
    return "" if record["language"] in LANGUAGES else f"language {record['language']!r}"


def _exercises(text: str, record: Mapping[str, Any], catalogue: Catalogue | None) -> tuple[str, ...]:
    assert catalogue is not None, "needs_catalogue was checked before the first prompt"
    return programme.broken(text, record, catalogue)


VALIDATORS: dict[str, Validator] = {
    "none": Validator((), lambda text, record, catalogue: ()),
    "world": Validator(("profile", "language"), _world, check=_fit_for_world),
    "exercises": Validator((*PROFILE, "listed"), _exercises, needs_catalogue=True),
}
