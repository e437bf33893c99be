"""A training programme of the real catalogue as text, and the rules that make it valid.

    Workout 1
    - Goblet Squat: 3 x 12
    - Plank: 3 x 30 s
    Workout 2
    ...

The Russian heading is "Тренировка 1", seconds are "с"; names stay those of the catalogue. No text makes
`broken` raise: it is the automatic quality metric that AviationKD lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distill.synthesize.catalogue import BODY, LEVELS, Catalogue, Exercise, serves

WORKOUTS = 3
SIZES = range(3, 9)  # exercises in a workout
SETS, REPEATS, SECONDS = range(1, 7), range(1, 31), range(5, 121)
GOAL_SHARE = 0.5  # of all exercises
LONGEST = 6000  # characters
_HEAD = re.compile(r"(?:Workout|Тренировка) (\d)[.:]?")
_LINE = re.compile(r"- (.{1,100}): (\d{1,3}) ?[x×х] ?(\d{1,3})( ?[sс])?\.?")


@dataclass(frozen=True)
class Entry:
    name: str
    sets: int
    amount: int
    timed: bool


Programme = list[list[Entry]]


def parse(text: str) -> Programme | None:
    """The workouts that `text` writes down, or None when it has another structure."""
    if len(text) > LONGEST:
        return None
    workouts: Programme = []
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        if head := _HEAD.fullmatch(line):
            if int(head[1]) != len(workouts) + 1:
                return None
            workouts.append([])
        elif (entry := _LINE.fullmatch(line)) and workouts:
            workouts[-1].append(Entry(entry[1].strip(), int(entry[2]), int(entry[3]), bool(entry[4])))
        else:
            return None
    return workouts or None


Rule = Callable[[Programme, list[Exercise], Mapping[str, Any]], bool]
_RULES: dict[str, Rule] = {
    "count": lambda p, known, profile: len(p) == WORKOUTS,
    "size": lambda p, known, profile: all(len(workout) in SIZES for workout in p),
    "known": lambda p, known, profile: len(known) == sum(map(len, p)),
    "repeat": lambda p, known, profile: all(len({e.name.lower() for e in w}) == len(w) for w in p),
    "listed": lambda p, known, profile: {e.name for e in known} <= set(profile["listed"]),
    "level": lambda p, known, profile: all(
        LEVELS.index(e.level) <= LEVELS.index(profile["level"]) for e in known
    ),
    "equipment": lambda p, known, profile: all(
        e.equipment in {BODY, *profile["equipment"].split(", ")} for e in known
    ),
    "avoid": lambda p, known, profile: not any(profile["avoid"] in e.muscles for e in known),
    "goal": lambda p, known, profile: (
        sum(serves(e, profile["goal"]) for e in known) >= GOAL_SHARE * sum(map(len, p))
    ),
    "volume": lambda p, known, profile: all(
        e.sets in SETS and e.amount in (SECONDS if e.timed else REPEATS) for w in p for e in w
    ),
}
RULES = ("structure", *_RULES)


def broken(text: str, profile: Mapping[str, Any], catalogue: Catalogue) -> tuple[str, ...]:
    """Names of the broken rules; a text without the structure breaks that one alone.

    `profile` has level, equipment, avoid, goal and `listed`, the names that the prompt offered.
    """
    programme = parse(text)
    if programme is None:
        return ("structure",)
    found = [catalogue.by_name.get(entry.name.lower()) for workout in programme for entry in workout]
    known = [exercise for exercise in found if exercise is not None]
    return tuple(name for name, obeyed in _RULES.items() if not obeyed(programme, known, profile))
