"""The lines that a vocabulary is learnt from, and those held back to measure it on.

Lines are drawn by a seeded reservoir, so a corpus of any size fits; a file's held lines stay its own, because
a report over a mixture hides what happens to each of its languages.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foundation.errors import InputError

HELD_EVERY = 50  # one line in so many is kept from training, to measure on
HELD_MOST = 2000  # lines in all, but every file may have HELD_MOST_OF_FILE
HELD_MOST_OF_FILE = 200  # lines


@dataclass
class Sample:
    """Lines to train on, and by file the lines held back to measure on."""

    train: list[str] = field(default_factory=list)
    held: dict[str, list[str]] = field(default_factory=dict)


def lines_of(documents: Iterable[str]) -> Iterator[str]:
    """Lines of the documents that are not blank, in NFC."""
    for document in documents:
        for line in unicodedata.normalize("NFC", document).split("\n"):
            if line := line.strip():
                yield line


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name of each file: its own, with its folder's where two files share one.

    Never the whole path: a report must not change when a run is moved.
    """
    plain = Counter(path.name for path in paths)
    named = [path.name if plain[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    again = Counter(named)
    return [name if again[name] == 1 else f"{name} ({place})" for place, name in enumerate(named, start=1)]


def draw(files: Mapping[str, Iterable[str]], most: int, seed: int) -> Sample:
    """Hold back every 50th line, and draw up to `most` of the others, each as likely as any other."""
    sample, dice, seen, number = Sample(), random.Random(seed), 0, 0
    most_held = max(HELD_MOST // max(1, len(files)), HELD_MOST_OF_FILE)
    for name, lines in files.items():
        held = sample.held.setdefault(name, [])
        for line in lines:
            number += 1
            if number % HELD_EVERY == 0 and len(held) < most_held:
                held.append(line)
                continue
            seen += 1
            if len(sample.train) < most:
                sample.train.append(line)
            elif (place := dice.randrange(seen)) < most:
                sample.train[place] = line
    if not any(sample.held.values()):
        raise InputError(
            f"the corpus has {len(sample.train)} lines of text; at least {HELD_EVERY} are needed",
            hint="give more text, or shorter lines",
        )
    return sample


def check_script(lines: Iterable[str], script: str) -> None:
    """Raise InputError, with the scripts that were seen, when no word holds anything that `script` matches."""
    pattern, letters = re.compile(script), Counter[str]()
    for line in lines:
        for word in line.split():
            if any(found[0].strip() for text in (word, f" {word}") for found in pattern.finditer(text)):
                return
        letters.update(line)
    raise InputError(
        f"nothing in the corpus matches script = {script!r}; its letters are {_shares(letters)}",
        hint="give text in the new language, or set `script` to its letters",
    )


def _shares(characters: Mapping[str, int]) -> str:
    """`98.2 % Latin, 1.8 % Greek`, by the first word of a letter's name in Unicode."""
    scripts: Counter[str] = Counter()
    for char, times in characters.items():
        if char.isalpha():
            scripts[unicodedata.name(char, "unnamed").split()[0]] += times
    said = [
        f"{100 * times / scripts.total():.1f} % {name if name == 'CJK' else name.title()}"
        for name, times in sorted(scripts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return ", ".join(said[:5]) or "none at all"
