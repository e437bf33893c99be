"""The judge of an answer: does it obey the profile, and if not, which rules does it break?

Pure Python, no model: this is the automatic quality metric of the flight-crew world. It takes whatever a
model wrote; no text makes it raise. The rules stand in rules.py and are not loosened for weak models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora.world.facts import LANGUAGES
from corpora.world.profiles import Profile
from corpora.world.rules import RULES, parse
from foundation.errors import InputError

__all__ = ["Profile", "Verdict", "load_profiles", "validate"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`broken` names every broken rule; a text without the structure breaks that one alone, unread."""

    valid: bool
    broken: tuple[str, ...]


def validate(answer_text: str, profile: Profile, language: str) -> Verdict:
    """Judge one answer. Raises InputError only for a language that the world does not speak."""
    if language not in LANGUAGES:
        raise InputError(f"language {language!r}", hint=f"the world speaks {', '.join(LANGUAGES)}")
    programme = parse(answer_text, language)
    if programme is None:
        return Verdict(False, ("structure",))
    broken = tuple(name for name, obeyed in RULES.items() if not obeyed(programme, profile))
    return Verdict(not broken, broken)


def load_profiles(path: Path) -> list[dict[str, Any]]:
    """The lines of a profiles.jsonl as written, each checked: language, messages, profile.

    Raises InputError naming the first line that is not such a record.
    """
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                Profile.from_dict(record["profile"])
                if record["language"] not in LANGUAGES or not record["messages"]:
                    raise InputError("no such language, or no messages")
            except (ValueError, KeyError, TypeError, InputError) as problem:
                raise InputError(
                    f"{path.name}, line {number}: not a profile record ({problem})",
                    hint="the file is written by the stage kind corpora.world",
                ) from problem
            records.append(record)
    return records
