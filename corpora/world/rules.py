"""The rules that make a programme valid, one line each, and the grammar of an answer.

An answer is one line a workout, `Workout 1: squat, plank, row.`; a profile with a history asks for one
line before them, `Rest: legs.`, naming the muscle group of the latest workout. Nothing else is read:
the rules look at names in the text, never at how likely they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType

from corpora.world.facts import BY_NAME, RANK, Exercise
from corpora.world.profiles import Profile
from corpora.world.words import GROUP_WORDS

LONGEST_ANSWER = 4000  # characters; the longest valid answer has fewer than 300
FEWEST, MOST = 3, 5  # exercises in a workout
GOAL_EXERCISES = 2  # of a workout
WORKOUT_GROUPS = 2  # muscle groups in a workout

WORKOUT_WORD = MappingProxyType({"en": "Workout", "ru": "Тренировка"})
REST_WORD = MappingProxyType({"en": "Rest", "ru": "Отдых"})


@dataclass(frozen=True, slots=True)
class Programme:
    """An answer as read: the resting group it names, and the names of each workout's exercises."""

    rest: str | None
    names: tuple[tuple[str, ...], ...]
    language: str

    @property
    def workouts(self) -> list[list[Exercise]]:
        """The known exercises of each workout; unknown names are left out."""
        known = BY_NAME[self.language]
        return [[known[name] for name in names if name in known] for names in self.names]

    @property
    def exercises(self) -> Iterable[Exercise]:
        return (exercise for workout in self.workouts for exercise in workout)


def parse(text: str, language: str) -> Programme | None:
    """The programme that `text` writes down, or None when its structure is not the one asked for."""
    if len(text) > LONGEST_ANSWER:
        return None
    lines = text.strip().split("\n")
    rest = None
    if lines[0].startswith(f"{REST_WORD[language]}: "):
        rest = _listed(lines.pop(0), f"{REST_WORD[language]}: ")
        if rest is None or len(rest) != 1:
            return None
    names = [
        _listed(line, f"{WORKOUT_WORD[language]} {number}: ") for number, line in enumerate(lines, start=1)
    ]
    workouts = tuple(names_of for names_of in names if names_of is not None)
    if not workouts or len(workouts) != len(names):
        return None
    return Programme(rest[0] if rest else None, workouts, language)


def _listed(line: str, head: str) -> tuple[str, ...] | None:
    """The names in `head` + `a, b, c.`; None for any other line."""
    line = line.rstrip()
    if not line.startswith(head) or not line.endswith("."):
        return None
    names = tuple(line[len(head) : -1].split(", "))
    return names if all(names) else None


def _history(programme: Programme, profile: Profile) -> bool:
    if profile.resting is None:
        return programme.rest is None
    named = programme.rest == GROUP_WORDS[programme.language][profile.resting]
    return named and all(exercise.group != profile.resting for exercise in programme.workouts[0])


Rule = Callable[[Programme, Profile], bool]

RULES: MappingProxyType[str, Rule] = MappingProxyType(
    {
        "count": lambda p, profile: len(p.names) == profile.workouts,
        "size": lambda p, profile: all(FEWEST <= len(names) <= MOST for names in p.names),
        "known": lambda p, profile: all(name in BY_NAME[p.language] for names in p.names for name in names),
        "repeat": lambda p, profile: all(len(set(names)) == len(names) for names in p.names),
        "level": lambda p, profile: all(RANK[e.level] <= RANK[profile.level] for e in p.exercises),
        "goal": lambda p, profile: all(
            len({e.name for e in workout if profile.goal in e.goals}) >= GOAL_EXERCISES
            for workout in p.workouts
        ),
        "groups": lambda p, profile: all(
            len({e.group for e in workout}) >= WORKOUT_GROUPS for workout in p.workouts
        ),
        "protect": lambda p, profile: (
            not any(joint in profile.protect for e in p.exercises for joint in e.loads)
        ),
        "gear_owned": lambda p, profile: all(e.gear in ("none", profile.gear) for e in p.exercises),
        "gear_used": lambda p, profile: (
            profile.gear == "none" or any(e.gear == profile.gear for e in p.exercises)
        ),
        "history": _history,
    }
)
RULE_NAMES = ("structure", *RULES)
