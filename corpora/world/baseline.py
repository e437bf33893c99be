"""The share of profiles that one constant answer satisfies: what a model scores that never reads the profile.

Every valid share is printed beside this figure. The search is exact, not a sample. It rests on one remark:
if a constant programme is valid for some profiles, then the workout of it that uses the gear, written down
as often as the programme has workouts, is valid for all of them too. So the best constant answer is the best
single workout repeated, and branch and bound over workouts finds it. With histories the remark fails
for the first workout alone; there the figure returned is an upper bound of the share.
"""

from __future__ import annotations

from collections.abc import Sequence

from corpora.world.facts import CATALOGUE, GEAR, GOALS, RANK, WORKOUTS
from corpora.world.profiles import Profile
from corpora.world.rules import FEWEST, GOAL_EXERCISES, MOST, WORKOUT_GROUPS


def constant_share(profiles: Sequence[Profile]) -> float:
    """The greatest share (0..1) of `profiles` for which one and the same answer is valid."""
    if not profiles:
        return 0.0
    rests = sorted({profile.resting or "" for profile in profiles})
    cells = (
        [p for p in profiles if (p.workouts, p.gear, p.resting or "") == (count, gear, rest)]
        for count in WORKOUTS
        for gear in GEAR
        for rest in rests
    )
    best = 0
    for cell in cells:
        if len(cell) > best:
            best = max(best, _best_workout(cell, best))
    return best / len(profiles)


def _best_workout(cell: Sequence[Profile], floor: int) -> int:
    """The most profiles of the cell (same number of workouts, same gear) that one workout satisfies.

    Sets of profiles are bit masks. `floor`: results up to this many are of no interest.
    """
    gear = cell[0].gear

    def mask(chosen: Sequence[bool]) -> int:
        return sum(1 << place for place, yes in enumerate(chosen) if yes)

    wanted = {goal: mask([p.goal == goal for p in cell]) for goal in GOALS}
    pool = [
        (exercise, mask([RANK[exercise.level] <= RANK[p.level] and not set(exercise.loads) & set(p.protect)
                         for p in cell]))
        for exercise in CATALOGUE
        if exercise.gear in ("none", gear)
    ]  # fmt: skip
    best = floor

    def extend(
        start: int, size: int, ok: int, serves: dict[str, int], groups: frozenset[str], used: bool
    ) -> None:
        nonlocal best
        if size >= FEWEST and used and len(groups) >= WORKOUT_GROUPS:
            served = sum(wanted[goal] for goal in GOALS if serves[goal] >= GOAL_EXERCISES)
            best = max(best, (ok & served).bit_count())
        if size == MOST:
            return
        for place in range(start, len(pool)):
            exercise, fits = pool[place]
            if (ok & fits).bit_count() > best:
                more = {goal: serves[goal] + (goal in exercise.goals) for goal in GOALS}
                now = used or exercise.gear == gear
                extend(place + 1, size + 1, ok & fits, more, groups | {exercise.group}, now)

    nothing = dict.fromkeys(GOALS, 0)
    extend(0, 0, (1 << len(cell)) - 1, nothing, frozenset(), gear == "none")
    return best
