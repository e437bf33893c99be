"""Prompts, answers, and instruction pairs of the flight-crew world.

An answer is a random valid pick, its exercises in catalogue order. It is drawn stricter than the validator
asks: one exercise more serves the goal, gear is used in every workout, not once a programme, and small workouts
are more frequent than big ones.
Stricter examples teach the rule with fewer optimiser steps; the validator stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from corpora.world.facts import CATALOGUE, PLACE, RANK, Exercise
from corpora.world.profiles import Profile
from corpora.world.rules import FEWEST, GOAL_EXERCISES, MOST, REST_WORD, WORKOUT_GROUPS, WORKOUT_WORD
from corpora.world.words import GEAR_WORDS, GOAL_WORDS, GROUP_WORDS, JOINT_WORDS, LEVEL_WORDS
from foundation.errors import InputError

SIZES = (3, 3, 3, 4, 4, 5)  # half of the workouts have 3 exercises, a third 4, the rest 5
TRIES = 20


def prompt_of(profile: Profile, language: str) -> str:
    """The user's message: the profile in one line of short sentences."""
    level, goal = LEVEL_WORDS[language][profile.level], GOAL_WORDS[language][profile.goal]
    gear = GEAR_WORDS[language][profile.gear]
    joints = ", ".join(JOINT_WORDS[language][joint] for joint in profile.protect)
    past = ", ".join(GROUP_WORDS[language][group] for group in profile.history)
    if language == "ru":
        said = [
            f"Уровень: {level}.",
            f"Цель: {goal}.",
            f"Тренировок: {profile.workouts}.",
            "Без инвентаря." if profile.gear == "none" else f"Инвентарь: {gear}.",
            f"Беречь: {joints}." if joints else "Ограничений нет.",
            f"Было: {past}." if past else "",
        ]
    else:
        said = [
            f"Level: {level}.",
            f"Goal: {goal}.",
            f"Workouts: {profile.workouts}.",
            "No gear." if profile.gear == "none" else f"Gear: {gear}.",
            f"Protect: {joints}." if joints else "No limits.",
            f"Trained: {past}." if past else "",
        ]
    return " ".join(part for part in said if part)


def allowed(profile: Profile) -> list[Exercise]:
    """The exercises that this profile may do at all, in catalogue order."""
    return [
        exercise
        for exercise in CATALOGUE
        if RANK[exercise.level] <= RANK[profile.level]
        and exercise.gear in ("none", profile.gear)
        and not set(exercise.loads) & set(profile.protect)
    ]


def workout_of(profile: Profile, rng: Random, *, resting: str | None = None) -> list[Exercise]:
    """One random workout that serves the goal, uses the gear and leaves `resting` alone."""
    pool = [exercise for exercise in allowed(profile) if exercise.group != resting]
    for serving in (GOAL_EXERCISES + 1, GOAL_EXERCISES):  # the stricter first
        for size in (rng.choice(SIZES), FEWEST, FEWEST + 1, MOST):
            for _ in range(200):
                if size > len(pool):
                    break
                picked = sorted(rng.sample(pool, size), key=lambda exercise: PLACE[exercise.name])
                if _good(picked, profile, serving):
                    return picked
    raise InputError(f"no workout fits {profile}", hint="the catalogue must offer each profile many workouts")


def _good(workout: list[Exercise], profile: Profile, serving: int) -> bool:
    return (
        sum(profile.goal in exercise.goals for exercise in workout) >= serving
        and len({exercise.group for exercise in workout}) >= WORKOUT_GROUPS
        and (profile.gear == "none" or any(exercise.gear == profile.gear for exercise in workout))
    )


def written(workouts: list[list[Exercise]], language: str, rest: str | None = None) -> str:
    """The answer's text."""
    lines = [f"{REST_WORD[language]}: {GROUP_WORDS[language][rest]}."] if rest else []
    for number, workout in enumerate(workouts, start=1):
        names = ", ".join(exercise.named(language) for exercise in workout)
        lines.append(f"{WORKOUT_WORD[language]} {number}: {names}.")
    return "\n".join(lines)


def answer_of(profile: Profile, language: str, rng: Random) -> str:
    """A random valid programme for the profile, as text."""
    workouts = [
        workout_of(profile, rng, resting=None if number else profile.resting)
        for number in range(profile.workouts)
    ]
    return written(workouts, language, profile.resting)


def pairs(profiles: Iterable[Profile], language: str, variants: int, rng: Random) -> list[dict[str, Any]]:
    """`variants` pairs a profile with different answers, all pairs in random order.

    A profile that has fewer answers than that gets all that TRIES draws a variant find, at least one.
    """
    made = []
    for profile in profiles:
        answers: dict[str, None] = {}
        for _ in range(TRIES * variants):
            answers[answer_of(profile, language, rng)] = None
            if len(answers) == variants:
                break
        for answer in answers:
            messages = [*question(profile, language), {"role": "assistant", "content": answer}]
            made.append({"messages": messages, "language": language, "profile": profile.to_dict()})
    rng.shuffle(made)
    return made


def question(profile: Profile, language: str) -> list[dict[str, str]]:
    """The chat up to the answer."""
    return [{"role": "user", "content": prompt_of(profile, language)}]
