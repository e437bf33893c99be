"""A crew member's profile, all profiles of the world, and their split into train and held-out.

The split sorts the profiles by a hash of profile and seed and holds out the first ones, so it does not depend
on the order in which they are listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, combinations, product
from random import Random
from typing import Any

from corpora.world.facts import GEAR, GOALS, GROUPS, JOINTS, LEVELS, MOST_JOINTS, WORKOUTS
from foundation.errors import InputError

PAST_WORKOUTS = 2  # how many past workouts a history tells


@dataclass(frozen=True, slots=True)
class Profile:
    """What a programme must obey. `history` holds the muscle group of each past workout, latest last."""

    level: str
    workouts: int
    goal: str
    gear: str
    protect: tuple[str, ...] = ()
    history: tuple[str, ...] = ()

    @property
    def resting(self) -> str | None:
        """The muscle group that the first workout must leave alone, if there is a history."""
        return self.history[-1] if self.history else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "workouts": self.workouts,
            "goal": self.goal,
            "gear": self.gear,
            "protect": list(self.protect),
            "history": list(self.history),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """Raises InputError naming each value that is not of this world."""
        allowed = {"level": LEVELS, "workouts": WORKOUTS, "goal": GOALS, "gear": GEAR}
        lists = {"protect": JOINTS, "history": GROUPS}
        wrong = [f"{key} = {data.get(key)!r}" for key, values in allowed.items() if data.get(key) not in values]
        for key, values in lists.items():
            given = data.get(key, [])
            if not isinstance(given, list | tuple) or any(value not in values for value in given):
                wrong.append(f"{key} = {given!r}")
        if wrong:
            raise InputError(
                f"not a profile of the flight-crew world: {', '.join(wrong)}",
                hint=f"allowed: {allowed | lists}",
            )
        return cls(
            level=data["level"],
            workouts=int(data["workouts"]),
            goal=data["goal"],
            gear=data["gear"],
            protect=tuple(data.get("protect", ())),
            history=tuple(data.get("history", ())),
        )


def every_profile(*, history: bool = False, seed: int = 17) -> list[Profile]:
    """All 1,188 profiles; with `history`, each is given one past, drawn by `seed`."""
    protected = list(chain.from_iterable(combinations(JOINTS, size) for size in range(MOST_JOINTS + 1)))
    rng = Random(f"history {seed}")
    return [
        Profile(
            level, workouts, goal, gear, protect, tuple(rng.sample(GROUPS, PAST_WORKOUTS)) if history else ()
        )
        for level, workouts, goal, gear, protect in product(LEVELS, WORKOUTS, GOALS, GEAR, protected)
    ]


def split(profiles: list[Profile], held: int, seed: int) -> tuple[list[Profile], list[Profile]]:
    """(train, held-out) with exactly `held` profiles held out, each side in the order given.

    Raises InputError when `held` leaves nothing to train on.
    """
    if held >= len(profiles):
        raise InputError(
            f"held_profiles = {held}, but the world has only {len(profiles)} profiles",
            hint=f"hold out fewer than {len(profiles)}",
        )

    def place(profile: Profile) -> str:
        return hashlib.sha256(f"{seed} {profile}".encode()).hexdigest()

    out = set(sorted(profiles, key=place)[:held])
    return [p for p in profiles if p not in out], [p for p in profiles if p in out]
