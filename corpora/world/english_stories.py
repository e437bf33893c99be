"""English documents about a crew's life: layovers, duties in the air, pages of a training diary."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from corpora.world.english import THE_GEAR, WHEN, a, capital, counted, join, names, person, pick, the
from corpora.world.facts import CATALOGUE, GEAR, GOALS, GROUPS, JOINTS
from corpora.world.profiles import Profile

CITIES = (
    *("Lisbon", "Oslo", "Dubai", "Tokyo", "Delhi", "Rome", "Paris", "Moscow", "Istanbul", "Madrid"),
    *("Toronto", "Vienna", "Beijing", "Cairo", "Athens", "Boston", "Seoul", "Lima", "Berlin", "Kazan"),
)
JOBS = ("captain", "pilot", "first officer", "flight attendant", "purser", "cabin chief", "instructor")
WHERE = (
    "in a hotel room",
    "in the hotel gym",
    "at home",
    "in the crew room",
    "near the airport",
    "in a park",
    "on the balcony",
    "by the sea",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def story(rng: Random, profiles: Sequence[Profile]) -> str:
    """A crew member away from home trains."""
    who, job, gear, group = person(rng), rng.choice(JOBS), rng.choice(GEAR[1:]), rng.choice(GROUPS)
    city, other = rng.sample(CITIES, 2)
    done = names(rng, rng.randint(2, 3), lambda e: e.gear in ("none", gear))
    helpful = names(rng, 1, lambda e: e.group == group)[0]
    first = pick(
        rng,
        f"{who.name} is {a(job)} and flies from {city} to {other}.",
        f"{who.name}, {a(job)}, landed in {city} after {counted(rng.randint(4, 14), 'hour')} in the air.",
        f"{who.name} had a layover in {city}.",
        f"The flight from {city} to {other} took {counted(rng.randint(2, 14), 'hour')}.",
        f"After the flight to {other} {who.name} could not sleep.",
        f"{who.name} works as {a(job)} on long flights.",
        f"{capital(rng.choice(WHEN))} {who.name} always trains {rng.choice(WHERE)}.",
        f"The crew stayed in {city} for {counted(rng.randint(1, 4), 'night')}.",
        f"It was raining in {city}, and {who.name} stayed {pick(rng, 'in the hotel', 'indoors', 'inside')}.",
    )
    second = pick(
        rng,
        f"The hotel in {city} has a gym with a barbell."
        if gear == "barbell"
        else f"{capital(who.he)} carries {THE_GEAR[gear]} in {who.his} suitcase.",
        f"{capital(rng.choice(WHERE))} {who.name} did {the(done)}.",
        f"{who.name} slept for {counted(rng.randint(5, 9), 'hour')} and then did {the(done)}.",
        f"To keep {who.his} {group} in shape {who.he} did the {helpful}.",
        f"{capital(counted(rng.randint(2, 5), 'colleague'))} joined {who.him} for {the(done)}.",
        f"The workout took {counted(rng.randint(15, 45), 'minute')}: {', '.join(done)}.",
        f"{who.name} trained the {group} {rng.choice(WHERE)}.",
        f"Most of all {who.name} liked the {helpful}, which trains the {group}.",
    )
    third = pick(
        rng,
        "",
        f"Then {who.he} drank water and went to bed.",
        f"The next day the crew flew back to {city}.",
        f'"My {group} will feel it tomorrow," said {who.name}.',
        f"{capital(who.he)} felt fresh again.",
        "The cabin was full and the night was long.",
        f"{capital(who.his)} goal is {rng.choice(GOALS)}.",
        f"Before the next flight {who.he} rested for {counted(rng.randint(1, 4), 'day')}.",
        "The weather was bad, so the flight was late.",
        "Breakfast was early and the bus was waiting.",
    )
    return join(first, second, third)


def duty(rng: Random, profiles: Sequence[Profile]) -> str:
    """Two or three sentences about work in the air and rest on the ground."""
    who, job, city, joint = person(rng), rng.choice(JOBS), rng.choice(CITIES), rng.choice(JOINTS)
    said = (
        f"{who.name} checks the doors and greets the passengers.",
        "The captain reads the checklist while the cabin is made ready.",
        f"There was turbulence on the way to {city}, so the crew stayed seated.",
        f"{capital(counted(rng.randint(3, 20), 'passenger'))} asked for tea, and nobody asked for coffee.",
        f"On the flight to {city} a child wanted to see the cockpit.",
        f"In {city} the clocks are {counted(rng.randint(2, 9), 'hour')} ahead.",
        f"Sleep is part of the work: {who.name} closes the curtains and sets two alarms.",
        "After landing the crew fills in the report and takes the bus to the hotel.",
        f"Sitting for {counted(rng.randint(4, 12), 'hour')} makes the back stiff.",
        f"Pushing heavy trolleys is hard on the {joint}.",
        f"The air in the cabin is dry, so {who.name} drinks a glass of water every hour.",
        f"A good {job} knows {who.his} limits.",
        "Before departure everybody listens to the short briefing.",
        f"{who.name} walks up and down the aisle and helps an old lady with her bag.",
        f"The runway in {city} was wet, but the landing was soft.",
        f"Once a year {who.name} visits the doctor, who looks at the heart, the eyes and the {joint}.",
        "Crews who train regularly are ill less often.",
        f"Light food before the night flight to {city} is better than a heavy dinner.",
        f"{who.name} learned to fall asleep anywhere, even in the noise of {city}.",
        f"In an emergency {a(job)} must lift, pull and run.",
        f"{who.name} stretched for {counted(rng.randint(3, 12), 'minute')} behind the curtain of the galley.",
        f"From the window one could see the lights of {city}.",
    )
    return join(*rng.sample(said, rng.randint(2, 3)))


def diary(rng: Random, profiles: Sequence[Profile]) -> str:
    """A page of notes: days, flights, exercises."""
    notes = []
    for day in sorted(rng.sample(range(len(DAYS)), 2)):
        e, city = rng.choice(CATALOGUE), rng.choice(CITIES)
        note = pick(
            rng,
            f"flight to {city}, no training.",
            f"{counted(rng.randint(2, 5), 'set')} of the {e.name} {rng.choice(WHERE)}.",
            f"rest in {city}, only the {e.name} for the {e.group}.",
            f"the {e.name}, {counted(rng.randint(6, 20), 'repetition')}.",
            f"{counted(rng.randint(15, 40), 'minute')} of training {rng.choice(WHEN)}.",
            f"standby at the airport, then the {e.name}.",
            f"tired after {city}, so only the {e.name} and a short walk.",
        )
        notes.append(f"{DAYS[day]}: {note}")
    return "\n".join(notes)


KINDS = (story, story, duty, diary)
