"""What a vocabulary is worth: how many tokens held-out text costs under it, before and after.

A word is what stands between white space, less the marks around it. It counts as one token when one token
covers all of it where it stands in its line, whatever else that token covers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adaptation.tokenizer_json import SPACE, TokenizerJson, from_byte_level

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Found = dict[str, Any]
Cut = tuple[str, ...]  # the tokens of a word
WHEN = ("before", "after")
EXAMPLES = 20  # words in each list
LINES = 5  # whole lines shown
LONGEST_LINE = 160  # characters of a line that is shown
BATCH_LINES = 1000


@dataclass
class Tally:
    """Sums over the lines of one file."""

    lines: int = 0
    spaced: int = 0  # words with the marks around them, as white space parts them
    characters: int = 0
    words: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHEN, 0))
    whole: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHEN, 0))  # words in one token

    def add(self, other: Tally) -> None:
        for name in ("lines", "spaced", "characters", "words"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for when in WHEN:
            self.tokens[when] += other.tokens[when]
            self.whole[when] += other.whole[when]

    def figures(self) -> Found:
        found: Found = {
            "lines": self.lines, "words": self.spaced, "characters": self.characters,
        }  # fmt: skip
        for when in WHEN:
            found[when] = {
                "tokens": self.tokens[when],
                "tokens_per_word": _share(self.tokens[when], self.spaced),
                "characters_per_token": _share(self.characters, self.tokens[when]),
                "words_in_one_token": _share(self.whole[when], self.words),
            }
        return found


@dataclass
class Word:
    """One word wherever it was seen: how often it was cut how, before and after."""

    cuts: Counter[tuple[Cut, Cut]] = field(default_factory=Counter)

    @property
    def times(self) -> int:
        return self.cuts.total()

    @cached_property
    def usual(self) -> tuple[Cut, Cut]:
        """The cut seen most often."""
        return min(self.cuts, key=lambda cut: (-self.cuts[cut], cut))

    @cached_property
    def saved(self) -> float:
        """Tokens a time."""
        return sum(times * (len(old) - len(new)) for (old, new), times in self.cuts.items()) / self.times


def measure(held: Mapping[str, list[str]], before: TokenizerJson, after: TokenizerJson) -> Found:
    """Figures of all held lines and of each file's; the words and lines that show what changed."""
    tokenizers = {"before": before, "after": after}
    backends = {when: tokenizer.backend() for when, tokenizer in tokenizers.items()}
    files: dict[str, Tally] = {}
    seen: dict[str, Word] = {}
    for name, lines in held.items():
        files[name] = Tally()
        for start in range(0, len(lines), BATCH_LINES):
            _count(lines[start : start + BATCH_LINES], tokenizers, backends, files[name], seen)
    everything = Tally()
    for tally in files.values():
        everything.add(tally)
    return {
        "all": everything.figures(),
        "files": [{"file": name} | tally.figures() for name, tally in files.items()],
        "words": _words(seen),
        "lines": [_shown(line, tokenizers, backends) for line in _examples(held)],
    }


def spans(line: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each word that holds a letter."""
    start = 0
    for word in line.split():
        start = line.index(word, start)
        first, end = start, start + len(word)
        start = end
        while first < end and _is_mark(line[first]):
            first += 1
        while first < end and _is_mark(line[end - 1]):
            end -= 1
        if any(char.isalpha() for char in line[first:end]):
            yield first, end


def readable(token: str, tokenizer: TokenizerJson) -> str:
    """A token as a person reads it: spaces as "▁", bytes that are no whole character as \\xd0."""
    if tokenizer.family == "characters":
        return token
    try:
        text = from_byte_level(token).decode("utf-8", errors="backslashreplace")
    except KeyError:  # an added token is written as itself
        return token
    return text.replace(" ", SPACE)


def _count(
    lines: list[str],
    tokenizers: Mapping[str, TokenizerJson],
    backends: Mapping[str, Tokenizer],
    tally: Tally,
    seen: dict[str, Word],
) -> None:
    """Take `lines` into `tally` and `seen`."""
    tally.lines += len(lines)
    tally.characters += sum(map(len, lines))
    tally.spaced += sum(len(line.split()) for line in lines)
    places = [list(spans(line)) for line in lines]
    tally.words += sum(map(len, places))
    cuts: dict[str, list[Cut]] = {when: [] for when in WHEN}
    for when, tokenizer in tokenizers.items():
        encoded = backends[when].encode_batch(lines, add_special_tokens=False)
        for found, encoding in zip(places, encoded, strict=True):
            tokens = encoding.tokens
            tally.tokens[when] += len(tokens)
            for inside in covering(found, encoding.offsets):
                cuts[when].append(tuple(readable(tokens[i], tokenizer) for i in inside))
                tally.whole[when] += len(inside) == 1
    names = [line[start:end] for line, found in zip(lines, places, strict=True) for start, end in found]
    for name, before, after in zip(names, cuts["before"], cuts["after"], strict=True):
        seen.setdefault(name, Word()).cuts[before, after] += 1


def covering(words: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[list[int]]:
    """For each word, the places of the tokens that hold a part of it; both are in the order of the text."""
    found: list[list[int]] = []
    first = 0
    for start, end in words:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        inside, place = [], first
        while place < len(offsets) and offsets[place][0] < end:
            if offsets[place][1] > max(start, offsets[place][0]):
                inside.append(place)
            place += 1
        found.append(inside)
    return found


def _words(seen: Mapping[str, Word]) -> Found:
    """The lists of words. Least improved are those that could be: more than one token before."""

    def listed(names: list[str]) -> list[Found]:
        return [
            {"word": name, "times": seen[name].times}
            | dict(zip(WHEN, map(list, seen[name].usual), strict=True))
            for name in names[:EXAMPLES]
        ]

    most = sorted(seen, key=lambda name: (-seen[name].saved, -seen[name].times, name))
    cut = [name for name in seen if len(seen[name].usual[0]) > 1 and seen[name].saved >= 0]
    least = sorted(cut, key=lambda name: (seen[name].saved, -seen[name].times, name))
    worse = [name for name in reversed(most) if seen[name].saved < 0]
    return {
        "different": len(seen),
        "improved": sum(word.saved > 0 for word in seen.values()),
        "worsened": len(worse),
        "most_improved": listed([name for name in most if seen[name].saved > 0]),
        "least_improved": listed(least),
        "most_worsened": listed(worse),
    }


def _examples(held: Mapping[str, list[str]]) -> list[str]:
    """A few lines, from as many files as can be, none too long to be read."""
    short = [[line for line in lines if len(line) <= LONGEST_LINE] for lines in held.values()]
    turns = max(map(len, short), default=0)
    return [lines[turn] for turn in range(turns) for lines in short if turn < len(lines)][:LINES]


def _shown(line: str, tokenizers: Mapping[str, TokenizerJson], backends: Mapping[str, Tokenizer]) -> Found:
    found: Found = {"line": line}
    for when, tokenizer in tokenizers.items():
        tokens = backends[when].encode(line, add_special_tokens=False).tokens
        found[when] = [readable(token, tokenizer) for token in tokens]
    return found


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] in "PSC"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
