"""English documents about exercises, rules and profiles: the facts told as short natural texts.

One function a kind of document; each draws its facts and its wording from `rng`. Whatever a text says of an
exercise, a joint or a rule is read from facts.py. A crew member's full profile appears only in `case`, and
comes from the training profiles that the caller hands in. Stories stand in english_stories.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from corpora.world.facts import CATALOGUE, GEAR, GOALS, GROUPS, JOINTS, LEVELS, RANK, Exercise
from corpora.world.pairs import workout_of
from corpora.world.profiles import Profile

MEN = ("Oliver", "Marco", "Daniel", "Tom", "Peter", "Samir", "Victor", "Henry", "Leo", "Paul", "Kenji")
WOMEN = ("Anna", "Grace", "Maria", "Julia", "Nina", "Laura", "Emma", "Sofia", "Ruth", "Mei", "Clara")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
THE_GEAR = {"none": "no gear", "bands": "bands", "dumbbells": "dumbbells", "barbell": "a barbell"}
WANTS = {
    "strength": ("strength", "more strength", "to become stronger"),
    "endurance": ("endurance", "more endurance", "to last longer on long duties"),
    "flexibility": ("flexibility", "more flexibility", "to move with ease"),
}
WHEN = (
    "before a flight",
    "after a long flight",
    "on a day off",
    "during a layover",
    "in the morning",
    "in the evening",
    "between two flights",
    "after a night in the air",
)


class Person(NamedTuple):
    name: str
    he: str
    his: str
    him: str


def person(rng: Random) -> Person:
    if rng.random() < 0.5:
        return Person(rng.choice(MEN), "he", "his", "him")
    return Person(rng.choice(WOMEN), "she", "her", "her")


def pick(rng: Random, *wordings: str) -> str:
    return rng.choice(wordings)


def join(*sentences: str) -> str:
    """The sentences as one paragraph; empty ones are left out."""
    return " ".join(sentence for sentence in sentences if sentence)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def a(words: str) -> str:
    """a pilot; an instructor."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def the(names: Sequence[str]) -> str:
    """the knee; the knee and the spine."""
    return listed([f"the {name}" for name in names])


def counted(number: int, one: str) -> str:
    """one minute; two minutes; 15 minutes."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {one if number == 1 else one + 's'}"


def names(rng: Random, count: int, said: Callable[[Exercise], bool]) -> list[str]:
    """Up to `count` random exercises of which `said` holds."""
    found = [exercise.name for exercise in CATALOGUE if said(exercise)]
    return rng.sample(found, min(count, len(found)))


def describe(rng: Random, profiles: Sequence[Profile]) -> str:
    """What one exercise is, needs, serves and loads."""
    e = rng.choice(CATALOGUE)
    group, goals, loads, gear = f"the {e.group}", listed(e.goals), the(e.loads), THE_GEAR[e.gear]
    first = pick(
        rng,
        f"The {e.name} trains {group}.",
        f"The {e.name} is {a(e.level)} exercise for {group}.",
        f"With the {e.name} you train {group}.",
        f"The {e.name} works {group} and builds {goals}.",
        f"If you want to train {group}, try the {e.name}.",
        f"Among the exercises for {group} there is the {e.name}.",
    )
    if e.gear == "none":
        needs = pick(
            rng,
            "It needs no gear.",
            "You can do it without any gear.",
            "It needs only a little space on the floor.",
            "No gear is needed, so it fits any hotel room.",
            "It uses only the weight of the body.",
        )
    else:
        needs = pick(
            rng,
            f"It needs {gear}.",
            f"You need {gear} for it.",
            f"It is done with {gear}.",
            f"Without {gear} it can not be done.",
        )
    serves = pick(
        rng,
        f"It serves {goals}.",
        f"It suits the {e.level} level.",
        f"Its goal is {goals}.",
        f"Its level is {e.level}.",
        f"Crews who want {rng.choice(e.goals)} like it.",
    )
    care = pick(
        rng,
        f"It loads {loads}.",
        f"Do not do it if you must protect {loads}.",
        f"Take care: it loads {loads}.",
        f"Leave it out when {loads} must rest.",
        f"Whoever protects {loads} chooses something else.",
    )
    dose = pick(
        rng,
        "",
        f"Do {counted(rng.randint(2, 5), 'set')} of {counted(rng.randint(6, 15), 'repetition')}.",
        f"Start with {counted(rng.randint(5, 12), 'repetition')}.",
        f"Rest for {counted(rng.randint(1, 3), 'minute')} between the sets.",
        "Breathe out when it gets hard.",
        "Move slowly and keep the back straight.",
    )
    middle = [needs, serves, care]
    rng.shuffle(middle)
    return join(first, *middle[: rng.randint(2, 3)], dose)


def advise(rng: Random, profiles: Sequence[Profile]) -> str:
    """What to leave out for a joint's sake, and what to do instead."""
    joint, who = rng.choice(JOINTS), person(rng)
    bad = names(rng, rng.randint(1, 3), lambda e: joint in e.loads)
    good = names(rng, rng.randint(1, 3), lambda e: joint not in e.loads)
    first = pick(
        rng,
        f"If your {joint} hurts, leave out {the(bad)}.",
        f"To protect the {joint}, avoid {the(bad)}.",
        f"{capital(the(bad))} {'loads' if len(bad) == 1 else 'load'} the {joint}.",
        f"A crew member with a weak {joint} should not do {the(bad)}.",
        f"{who.name} must protect the {joint}, so {who.he} does not do {the(bad)}.",
        f"The doctor told {who.name} to protect the {joint}. Since then {who.he} has left out {the(bad)}.",
        f"{capital(the(bad))}: not for those who protect the {joint}.",
    )
    second = pick(
        rng,
        f"Choose {the(good)} instead.",
        f"Safe for the {joint}: {', '.join(good)}.",
        f"{capital(the(good))} {'is' if len(good) == 1 else 'are'} safe for the {joint}.",
        f"It is better to take {the(good)}.",
    )
    third = pick(
        rng,
        "",
        f"A tired {joint} needs rest {rng.choice(WHEN)}.",
        "Pain is a reason to stop.",
        "Ask the doctor if the pain stays.",
        f"Warm up for {counted(rng.randint(3, 10), 'minute')} first.",
        "Health is worth more than records.",
    )
    return join(first, second, third)


def rule(rng: Random, profiles: Sequence[Profile]) -> str:
    """One to three rules of a valid programme, with examples."""
    goal, joint, group, other = rng.choice(GOALS), rng.choice(JOINTS), *rng.sample(GROUPS, 2)
    gear, level = rng.choice(GEAR[1:]), rng.choice(LEVELS[:2])
    serving = listed(names(rng, 2, lambda e: goal in e.goals))
    owned = names(rng, 1, lambda e: e.gear == gear)[0]
    hard = rng.choice([e for e in CATALOGUE if RANK[e.level] > RANK[level]])
    loading = names(rng, 1, lambda e: joint in e.loads)[0]
    was = "were" if group in ("legs", "arms") else "was"
    said = (
        "A workout has three, four or five exercises.",
        "No exercise appears twice in a workout.",
        "A programme has as many workouts as the profile says.",
        pick(
            rng,
            f"At least two exercises of a workout serve the goal. For {goal} these may be {serving}.",
            f"If the goal is {goal}, a workout needs two exercises such as {serving}.",
        ),
        f"Each workout trains at least two muscle groups, such as the {group} and the {other}.",
        f"A workout only for the {group} is not valid: add something for the {other}.",
        f"Whoever owns {THE_GEAR[gear]} uses {'it' if gear == 'barbell' else 'them'} at least once, "
        f"for the {owned} perhaps.",
        f"Without {THE_GEAR[gear]} there is no {owned}.",
        f"At the {level} level the {hard.name} is too hard, because it is {hard.level}.",
        f"The {hard.name} waits until the level is {hard.level}.",
        f"Whoever protects the {joint} does not do the {loading}.",
        f"The {loading} loads the {joint}, so a profile that protects the {joint} forbids it.",
        f"If the {group} {was} trained last, the first workout trains something else, such as the {other}.",
    )
    opening = pick(
        rng,
        "",
        "",
        "A rule for crews.",
        "What makes a programme valid?",
        "Remember this.",
        "The instructor explains.",
        "Before you plan, read the rule.",
    )
    return join(opening, *rng.sample(said, rng.randint(1, 3)))


def ask(rng: Random, profiles: Sequence[Profile]) -> str:
    """A question and its answer."""
    e = rng.choice(CATALOGUE)
    joint, gear, group, goal = rng.choice(JOINTS), rng.choice(GEAR), rng.choice(GROUPS), rng.choice(GOALS)
    question, answer = rng.choice(
        (
            (f"What does the {e.name} train?", f"The {e.name} trains the {e.group}."),
            (f"What gear does the {e.name} need?", f"The {e.name} needs {THE_GEAR[e.gear]}."),
            (f"Which level is the {e.name}?", f"The {e.name} is {a(e.level)} exercise."),
            (f"What is the {e.name} good for?", f"It is good for {listed(e.goals)}."),
            (f"What does the {e.name} load?", f"It loads {the(e.loads)}."),
            (
                f"Can I do the {e.name} with a weak {joint}?",
                f"No, the {e.name} loads the {joint}."
                if joint in e.loads
                else f"Yes, the {e.name} is safe for the {joint}.",
            ),
            (
                f"Does the {e.name} serve {goal}?",
                "Yes, it does." if goal in e.goals else f"No, it serves {listed(e.goals)}.",
            ),
            (
                f"Name two exercises for the {group}.",
                f"{capital(listed(names(rng, 2, lambda x: x.group == group)))}.",
            ),
            (
                f"Name three exercises with {THE_GEAR[gear]}.",
                f"{capital(listed(names(rng, 3, lambda x: x.gear == gear)))}.",
            ),
            (
                f"Which exercises build {goal}?",
                f"For example {listed(names(rng, 3, lambda x: goal in x.goals))}.",
            ),
        )
    )
    voices = (("Question", "Answer"), ("Crew", "Coach"), (rng.choice(MEN), rng.choice(WOMEN)))
    asks, answers = rng.choice(voices)
    return f"{asks}: {question}\n{answers}: {answer}"


def compare(rng: Random, profiles: Sequence[Profile]) -> str:
    """Two exercises side by side."""
    one, two = rng.sample(CATALOGUE, 2)
    first = (
        f"Both the {one.name} and the {two.name} train the {one.group}."
        if one.group == two.group
        else f"The {one.name} trains the {one.group}, and the {two.name} trains the {two.group}."
    )
    harder = RANK[one.level] - RANK[two.level]
    second = (
        f"The {one.name} is {'harder' if harder > 0 else 'easier'} than the {two.name}."
        if harder
        else f"Both belong to the {one.level} level."
    )
    third = pick(
        rng,
        f"The {one.name} needs {THE_GEAR[one.gear]}, the {two.name} needs {THE_GEAR[two.gear]}.",
        f"Both load {the(one.loads)}."
        if one.loads == two.loads
        else f"The first loads {the(one.loads)}, the second loads {the(two.loads)}.",
        f"The {one.name} serves {listed(one.goals)}; the {two.name} serves {listed(two.goals)}.",
        f"After the {one.name} you may go on to the {two.name}.",
    )
    parts = [second, third]
    rng.shuffle(parts)
    return join(first, *parts[: rng.randint(1, 2)])


def case(rng: Random, profiles: Sequence[Profile]) -> str:
    """A crew member with a profile, and a workout that fits; the profile is one of those handed in."""
    profile, who = rng.choice(profiles), person(rng)
    chosen = [e.name for e in workout_of(profile, rng, resting=profile.resting)]
    level = "a beginner" if profile.level == "beginner" else f"{a(profile.level)} athlete"
    gear = "has no gear" if profile.gear == "none" else f"owns {THE_GEAR[profile.gear]}"
    care = f"must protect {the(profile.protect)}" if profile.protect else "has no limits"
    fits = pick(
        rng,
        f"A workout for {who.name}: {', '.join(chosen)}.",
        f"So {who.he} does {the(chosen)}.",
        f"{capital(the(chosen))} fit {who.his} profile.",
        f"The coach gave {who.name} this workout: {', '.join(chosen)}.",
    )
    return join(
        f"{who.name} is {level} and wants {rng.choice(WANTS[profile.goal])}.",
        f"{capital(who.he)} plans {counted(profile.workouts, 'workout')} a week, {gear} and {care}.",
        fits,
    )


KINDS = (describe, describe, advise, rule, ask, compare, case, case)
