"""A real catalogue of exercises, in the form of free-exercise-db: what a profile may do, and its past.

The form: a JSON array, or JSON lines, of objects with name, level, equipment (or null), category,
primaryMuscles and secondaryMuscles. A profile has level, equipment ("dumbbell", or "bands, kettlebells";
the body alone is always allowed), avoid (a muscle to spare, or "none") and goal (a key of GOALS).
Exercises without a stated equipment are left out: some of them need a sled or a tyre.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from foundation.dataio import lines, records
from foundation.errors import InputError

LEVELS = ("beginner", "intermediate", "expert")
BODY = "body only"
GOALS = {
    "strength": ("strength", "powerlifting", "strongman"),
    "power": ("plyometrics", "olympic weightlifting"),
    "mobility": ("stretching",),
    "endurance": ("cardio", "plyometrics"),
}
PROFILE = ("level", "equipment", "goal", "avoid")
FEWEST = 12  # exercises that a profile must have to choose from: three workouts of four
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Exercise:
    name: str
    level: str
    equipment: str | None
    category: str
    muscles: tuple[str, ...]  # primary and secondary


class Catalogue:
    """The exercises by their names, without case."""

    def __init__(self, exercises: list[Exercise]) -> None:
        self.by_name = {exercise.name.lower(): exercise for exercise in exercises}
        self._exercises = exercises
        self.allowed = lru_cache(maxsize=4096)(self._allowed)

    def problems(self, axes: Mapping[str, Any]) -> list[str]:
        """What in a grid's values this catalogue can not answer."""
        known = {
            "level": set(LEVELS),
            "goal": set(GOALS),
            "avoid": {"none"} | {muscle for e in self._exercises for muscle in e.muscles},
            "equipment": {BODY} | {e.equipment for e in self._exercises if e.equipment},
        }
        found = [
            f"grid: axis '{name}' is missing; the catalogue needs it" for name in PROFILE if name not in axes
        ]
        for name in PROFILE:
            for value in axes.get(name, ()):
                parts = str(value).split(", ") if name == "equipment" else [str(value)]
                found += [
                    f"grid.{name}: {part!r} is not in the catalogue; it has {', '.join(sorted(known[name]))}"
                    for part in parts
                    if part not in known[name]
                ]
        return found

    def _allowed(self, level: str, equipment: str, avoid: str) -> tuple[Exercise, ...]:
        owned = {BODY, *equipment.split(", ")}
        return tuple(
            e
            for e in self._exercises
            if LEVELS.index(e.level) <= LEVELS.index(level) and e.equipment in owned and avoid not in e.muscles
        )

    def fits(self, profile: Mapping[str, Any]) -> bool:
        """True when the profile has enough to choose from, half of it serving its goal."""
        pool = self.allowed(profile["level"], profile["equipment"], profile["avoid"])
        return len(pool) >= FEWEST and sum(serves(e, profile["goal"]) for e in pool) >= FEWEST // 2

    def fields(self, profile: Mapping[str, Any], entries: int, past: int, rng: Random) -> dict[str, Any]:
        """`listed` (names), {catalogue} (its text) and {history} (`past` workouts, latest last) of a profile.

        At least half of the excerpt serves the goal, where the catalogue has as many.
        """
        pool = list(self.allowed(profile["level"], profile["equipment"], profile["avoid"]))
        rng.shuffle(pool)
        serving = [e for e in pool if serves(e, profile["goal"])][: -(-entries // 2)]
        others = [e for e in pool if e not in serving]
        excerpt = sorted([*serving, *others][:entries], key=lambda e: e.name)
        history = "\n".join(_past(excerpt, number, rng) for number in range(past, 0, -1))
        listed = "\n".join(f"- {e.name} ({e.equipment}; {', '.join(e.muscles[:2])})" for e in excerpt)
        return {"listed": [e.name for e in excerpt], "catalogue": listed, "history": history}


def serves(exercise: Exercise, goal: str) -> bool:
    return exercise.category in GOALS[goal]


def _past(excerpt: list[Exercise], ago: int, rng: Random) -> str:
    done = ", ".join(
        f"{e.name} {rng.randint(2, 4)} x {rng.choice((6, 8, 10, 12))}" for e in rng.sample(excerpt, 3)
    )
    return f"-{ago}: {done}"


def load(path: Path) -> Catalogue:
    """Read a catalogue. Raises InputError with every fault (the first MAX_PROBLEMS), each with its entry."""
    exercises, problems = [], []
    seen: set[str] = set()
    for where, entry in entries_of(path):
        try:
            exercise = _exercise(entry)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if exercise.name.lower() in seen:
            problems.append(f"{where}: the name {exercise.name!r} stands twice")
        seen.add(exercise.name.lower())
        exercises.append(exercise)
    if problems or not exercises:
        more = f"\nand {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise InputError(
            "\n".join(problems[:MAX_PROBLEMS]) + more if problems else f"{path}: holds no exercise",
            hint="each entry has name, level, equipment, category, primaryMuscles and secondaryMuscles",
        )
    return Catalogue(exercises)


def entries_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of a JSON array of objects, or of JSON lines. Raises InputError on anything else."""
    first = next((line for _, line in lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        return [(f"{path}, line {number}", record) for number, record in records(path)]
    try:
        value = json.loads("\n".join(line for _, line in lines(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: a JSON array that can not be read: {error}") from None
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise InputError(f"{path}, entry {number}: a {type(entry).__name__}; a JSON object is needed")
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{path}, entry {number}: half of a surrogate pair (\\ud800 to \\udfff) is no character",
                hint="write the whole pair, or the character itself in UTF-8",
            ) from None
    return [(f"{path}, entry {number}", entry) for number, entry in enumerate(value, 1)]


def _exercise(entry: dict[str, Any]) -> Exercise:
    wrong = [
        key for key in ("name", "category") if not isinstance(entry.get(key), str) or not entry[key].strip()
    ]
    wrong += ["level"] if entry.get("level") not in LEVELS else []
    wrong += ["equipment"] if not isinstance(entry.get("equipment"), str | None) else []
    muscles = [entry.get("primaryMuscles"), entry.get("secondaryMuscles", [])]
    if not all(isinstance(part, list) and all(isinstance(m, str) for m in part) for part in muscles):
        wrong.append("primaryMuscles or secondaryMuscles")
    if wrong:
        raise ValueError("; ".join(f"{key} = {str(entry.get(key))[:40]!r}" for key in wrong))
    return Exercise(
        entry["name"], entry["level"], entry.get("equipment"), entry["category"], (*muscles[0], *muscles[1])
    )
