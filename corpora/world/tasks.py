"""Tasks of the flight-crew world by which models are scored without generating: see docs/tasks.md.

choices: four programmes for a held-out profile, a valid one, and three times the same with one rule broken,
each time another rule. So what else a model thinks of the exercises cancels, and only the profile tells the
four apart; rules that the form alone gives away (size, repeat, known) are not broken here.
facts: what the texts say of an exercise, asked in their own wording, with every possible answer as a choice.
answers: held-out profiles with a valid answer, to be predicted.

There is no copying here: nothing in the world's dialogues repeats a text, so models of it never learned to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from corpora.world import facts, russian
from corpora.world.english import THE_GEAR, a, capital
from corpora.world.facts import CATALOGUE, GEAR, GROUPS, LEVELS, PLACE, RANK, Exercise
from corpora.world.pairs import allowed, answer_of, question, workout_of, written
from corpora.world.profiles import Profile
from corpora.world.rules import GOAL_EXERCISES
from corpora.world.validate import validate
from foundation.errors import InputError

Record = dict[str, Any]
Workouts = list[list[Exercise]]

CHOICES = 4
TRIES = 20  # draws before another rule, or another programme, is taken


def choices(profiles: Sequence[Profile], language: str, rng: Random) -> list[Record]:
    """{"messages", "choices", "answer"} for each profile; exactly one choice is valid."""
    made = []
    for profile in profiles:
        for _ in range(TRIES):
            workouts = [
                workout_of(profile, rng, resting=None if number else profile.resting)
                for number in range(profile.workouts)
            ]
            wrong = _wrong(workouts, profile, language, rng)
            if len(wrong) == CHOICES - 1:
                break
        else:
            raise InputError(f"no programme of {profile} has {CHOICES - 1} rules that can be broken one by one")
        right = written(workouts, language, profile.resting)
        shown = rng.sample([right, *wrong], CHOICES)
        made.append({"messages": question(profile, language), "choices": shown, "answer": shown.index(right)})
    return made


def answers(profiles: Sequence[Profile], language: str, rng: Random) -> list[Record]:
    """{"messages"} for each profile: the question and a valid answer."""
    return [
        {
            "messages": [
                *question(profile, language),
                {"role": "assistant", "content": answer_of(profile, language, rng)},
            ]
        }
        for profile in profiles
    ]


def known_facts(language: str, rng: Random) -> list[Record]:
    """{"prompt", "choices", "answer"}: muscle group, gear and level of each exercise, in random order."""
    asked = _asked_in_russian if language == "ru" else _asked_in_english
    made = [
        {"prompt": prompt, "choices": shown, "answer": place}
        for exercise in CATALOGUE
        for prompt, shown, place in asked(exercise)
    ]
    rng.shuffle(made)
    return made


def _wrong(workouts: Workouts, profile: Profile, language: str, rng: Random) -> list[str]:
    """Up to CHOICES - 1 programmes, each the valid one but for one broken rule, each another rule."""
    found: list[str] = []
    for rule in rng.sample(list(BREAK), len(BREAK)):
        for _ in range(TRIES if len(found) < CHOICES - 1 else 0):
            broken = BREAK[rule](workouts, profile, rng)
            if not broken:
                break  # not to be broken here: nothing is too hard for the advanced
            text = written(broken, language, profile.resting)
            if validate(text, profile, language).broken == (rule,):
                found.append(text)
                break
    return found


def _swapped(
    workouts: Workouts, rng: Random, old: Callable[[Exercise], bool], new: Sequence[Exercise], many: bool
) -> Workouts:
    """The workouts with one exercise (or, with `many`, all) of which `old` holds exchanged for one of `new`."""
    places = [(w, e) for w, workout in enumerate(workouts) for e, x in enumerate(workout) if old(x)]
    changed = [list(workout) for workout in workouts]
    for w, e in places if many else rng.sample(places, min(1, len(places))):
        fresh = [exercise for exercise in new if exercise not in changed[w]]
        if not fresh:
            return []
        changed[w][e] = rng.choice(fresh)
    return [sorted(workout, key=lambda exercise: PLACE[exercise.name]) for workout in changed]


def _too_hard(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    hard = [e for e in CATALOGUE if RANK[e.level] > RANK[profile.level]]
    return _swapped(workouts, rng, lambda e: True, hard, many=False)


def _off_goal(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    """One workout keeps one exercise less for the goal than the rule asks."""
    number = rng.randrange(len(workouts))
    serving = [e for e in workouts[number] if profile.goal in e.goals]
    leaving = set(rng.sample(serving, len(serving) - GOAL_EXERCISES + 1))
    others = [e for e in allowed(profile) if profile.goal not in e.goals]
    changed = _swapped([workouts[number]], rng, lambda e: e in leaving, others, many=True)
    return workouts[:number] + changed + workouts[number + 1 :] if changed else []


def _loading(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    loading = [e for e in CATALOGUE if set(e.loads) & set(profile.protect)]
    return _swapped(workouts, rng, lambda e: True, loading, many=False)


def _not_owned(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    others = [e for e in CATALOGUE if e.gear not in ("none", profile.gear)]
    return _swapped(workouts, rng, lambda e: True, others, many=False)


def _gear_left(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    bare = [e for e in allowed(profile) if e.gear == "none" and profile.gear != "none"]
    return _swapped(workouts, rng, lambda e: e.gear == profile.gear, bare, many=True)


def _miscounted(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    """One workout more; as often one less, where that leaves any."""
    if len(workouts) > 1 and rng.random() < 0.5:
        return workouts[:-1]
    return [*workouts, workout_of(profile, rng)]


def _not_rested(workouts: Workouts, profile: Profile, rng: Random) -> Workouts:
    resting = [e for e in allowed(profile) if e.group == profile.resting]
    return _swapped(workouts[:1], rng, lambda e: True, resting, many=False) + workouts[1:] if resting else []


BREAK: dict[str, Callable[[Workouts, Profile, Random], Workouts]] = {
    "level": _too_hard,
    "goal": _off_goal,
    "protect": _loading,
    "gear_owned": _not_owned,
    "gear_used": _gear_left,
    "count": _miscounted,
    "history": _not_rested,
}


Asked = tuple[str, list[str], int]  # prompt, choices, place of the right one


def _asked_in_english(e: Exercise) -> Iterator[Asked]:
    """As english.ask writes it."""

    def ask(question: str, begun: str) -> str:
        return f"Question: {question}\nAnswer: {begun}"

    yield (
        ask(f"What does the {e.name} train?", f"The {e.name} trains the"),
        [f" {group}." for group in GROUPS],
        GROUPS.index(e.group),
    )
    yield (
        ask(f"What gear does the {e.name} need?", f"The {e.name} needs"),
        [f" {THE_GEAR[gear]}." for gear in GEAR],
        GEAR.index(e.gear),
    )
    yield (
        ask(f"Which level is the {e.name}?", f"The {e.name} is"),
        [f" {a(level)} exercise." for level in LEVELS],
        LEVELS.index(e.level),
    )


def _asked_in_russian(e: Exercise) -> Iterator[Asked]:
    """As russian_text.ask writes it."""
    noun = russian.EXERCISES[e.name]

    def ask(question: str, begun: str = "") -> str:
        return f"Вопрос: {question}\nОтвет:{begun}"

    yield (
        ask(f"Что тренирует {noun.nom}?", f" {capital(noun.nom)} тренирует"),
        [f" {russian.GROUPS[group].acc}." for group in facts.GROUPS],
        GROUPS.index(e.group),
    )
    yield (
        ask(f"Какой инвентарь нужен для {noun.gen}?"),
        [" Никакой."]
        + [f" Для {noun.gen} {russian.needed(russian.GEAR[gear])}." for gear in GEAR if gear != "none"],
        GEAR.index(e.gear),
    )
    yield (
        ask(f"Какой уровень у {noun.gen}?"),
        [f" {capital(russian.LEVELS[level][0])}." for level in LEVELS],
        LEVELS.index(e.level),
    )
