"""The flight-crew world's validator: hand-made programmes for every rule, an independent judge, garbage."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.world.baseline import constant_share
from corpora.world.facts import CATALOGUE, GEAR, GOALS, GROUPS, JOINTS, LEVELS
from corpora.world.pairs import allowed, answer_of, pairs, prompt_of, written
from corpora.world.profiles import every_profile, split
from corpora.world.rules import RULE_NAMES
from corpora.world.validate import Profile, load_profiles, validate
from foundation.errors import InputError

PLAIN = Profile("beginner", 1, "strength", "dumbbells", ("knee",))
TIRED = replace(PLAIN, history=("legs", "arms"))
TWICE = replace(TIRED, workouts=2)

# (profile, English answer, Russian answer, rules it breaks)
HAND_MADE = [
    (PLAIN, "Workout 1: curl, plank, crunch.", "Тренировка 1: сгибание, планка, скручивание.", ()),
    (PLAIN, "curl, plank, crunch", "сгибание, планка, скручивание", ("structure",)),
    (PLAIN, "Workout 2: curl, plank, crunch.", "Тренировка 2: сгибание, планка, скручивание.", ("structure",)),
    (PLAIN, "Workout 1: curl, plank, crunch", "Тренировка 1: сгибание, планка, скручивание", ("structure",)),
    (PLAIN, "Workout 1: curl, , crunch.", "Тренировка 1: сгибание, , скручивание.", ("structure",)),
    (
        PLAIN,
        "Here you are.\nWorkout 1: curl, plank, crunch.",
        "Вот.\nТренировка 1: сгибание, планка, скручивание.",
        ("structure",),
    ),
    (
        PLAIN,
        "Workout 1: curl, plank, crunch.\nWorkout 2: curl, plank, crunch.",
        "Тренировка 1: сгибание, планка, скручивание.\nТренировка 2: сгибание, планка, скручивание.",
        ("count",),
    ),
    (PLAIN, "Workout 1: curl, plank.", "Тренировка 1: сгибание, планка.", ("size",)),
    (
        PLAIN,
        "Workout 1: curl, plank, table, crunch, bridge, pike.",
        "Тренировка 1: сгибание, планка, столик, скручивание, мостик, горка.",
        ("size",),
    ),
    (
        PLAIN,
        "Workout 1: curl, plank, crunch, jogging.",
        "Тренировка 1: сгибание, планка, скручивание, бег.",
        ("known",),
    ),
    (
        PLAIN,
        "Workout 1: curl, plank, plank, crunch.",
        "Тренировка 1: сгибание, планка, планка, скручивание.",
        ("repeat",),
    ),
    (
        PLAIN,
        "Workout 1: curl, raise, plank, crunch.",
        "Тренировка 1: сгибание, подъём, планка, скручивание.",
        ("level",),
    ),
    (PLAIN, "Workout 1: curl, cat, twist.", "Тренировка 1: сгибание, кошка, поворот.", ("goal",)),
    (PLAIN, "Workout 1: curl, table, boxer.", "Тренировка 1: сгибание, столик, боксёр.", ("groups",)),
    (PLAIN, "Workout 1: curl, squat, plank.", "Тренировка 1: сгибание, приседание, планка.", ("protect",)),
    (
        PLAIN,
        "Workout 1: curl, hinge, plank, crunch.",
        "Тренировка 1: сгибание, наклон, планка, скручивание.",
        ("gear_owned",),
    ),
    (PLAIN, "Workout 1: plank, crunch, bridge.", "Тренировка 1: планка, скручивание, мостик.", ("gear_used",)),
    (
        PLAIN,
        "Rest: arms.\nWorkout 1: row, plank, crunch.",
        "Отдых: руки.\nТренировка 1: тяга, планка, скручивание.",
        ("history",),
    ),
    (
        TIRED,
        "Rest: arms.\nWorkout 1: row, plank, crunch.",
        "Отдых: руки.\nТренировка 1: тяга, планка, скручивание.",
        (),
    ),
    (TIRED, "Workout 1: row, plank, crunch.", "Тренировка 1: тяга, планка, скручивание.", ("history",)),
    (
        TIRED,
        "Rest: legs.\nWorkout 1: row, plank, crunch.",
        "Отдых: ноги.\nТренировка 1: тяга, планка, скручивание.",
        ("history",),
    ),
    (
        TIRED,
        "Rest: arms.\nWorkout 1: curl, plank, crunch.",
        "Отдых: руки.\nТренировка 1: сгибание, планка, скручивание.",
        ("history",),
    ),
    (
        TWICE,
        "Rest: arms.\nWorkout 1: row, plank, crunch.\nWorkout 2: curl, plank, crunch.",
        "Отдых: руки.\nТренировка 1: тяга, планка, скручивание.\nТренировка 2: сгибание, планка, скручивание.",
        (),
    ),
    (
        PLAIN,
        "Workout 1: pistol, plank.\nWorkout 2: clean, clean, swim.",
        "Тренировка 1: пистолет, планка.\nТренировка 2: взятие, взятие, плавание.",
        ("count", "size", "known", "repeat", "level", "goal", "groups", "protect", "gear_owned", "gear_used"),
    ),
]


@pytest.mark.parametrize(("profile", "english", "russian", "broken"), HAND_MADE)
def test_every_rule_by_hand(profile: Profile, english: str, russian: str, broken: tuple[str, ...]) -> None:
    for answer, language in ((english, "en"), (russian, "ru")):
        verdict = validate(answer, profile, language)
        assert (verdict.valid, verdict.broken) == (not broken, broken), answer


def test_the_hand_made_programmes_leave_no_rule_out() -> None:
    alone = {broken[0] for *_, broken in HAND_MADE if len(broken) == 1}
    assert alone == set(RULE_NAMES)


def test_the_other_language_is_not_understood() -> None:
    assert validate("Workout 1: curl, plank, crunch.", PLAIN, "ru").broken == ("structure",)
    assert validate("Тренировка 1: curl, plank, crunch.", PLAIN, "ru").broken[:1] == ("known",)
    with pytest.raises(InputError):
        validate("Workout 1: curl.", PLAIN, "de")


def naive(answer: str, profile: Profile, language: str) -> bool:
    """A second judge, written from the rules' wording with regular expressions and counting."""
    word, rest = ("Workout", "Rest") if language == "en" else ("Тренировка", "Отдых")
    russian_groups = {"legs": "ноги", "back": "спина", "chest": "грудь", "arms": "руки", "core": "пресс"}
    if profile.history:
        group = profile.history[-1] if language == "en" else russian_groups[profile.history[-1]]
        head = f"{rest}: {group}.\n"
        if not answer.startswith(head):
            return False
        answer = answer[len(head) :]
    found = re.findall(rf"^{word} ([1-9]): ([^\n]+)\.$", answer, flags=re.MULTILINE)
    if [number for number, _ in found] != [str(n + 1) for n in range(answer.count("\n") + 1)]:
        return False
    if len(found) != profile.workouts:
        return False
    rows = {(e.name if language == "en" else e.russian): e for e in CATALOGUE}
    used = False
    for place, (_, listing) in enumerate(found):
        names = listing.split(", ")
        if not 3 <= len(names) <= 5 or len(names) != len(set(names)) or not set(names) <= set(rows):
            return False
        workout = [rows[name] for name in names]
        used = used or any(e.gear == profile.gear for e in workout)
        if sum(profile.goal in e.goals for e in workout) < 2 or len({e.group for e in workout}) < 2:
            return False
        for e in workout:
            if LEVELS.index(e.level) > LEVELS.index(profile.level) or e.gear not in {"none", profile.gear}:
                return False
            if set(e.loads) & set(profile.protect):
                return False
            if place == 0 and profile.history and e.group == profile.history[-1]:
                return False
    return used or profile.gear == "none"


profiles = st.builds(
    Profile,
    level=st.sampled_from(LEVELS),
    workouts=st.integers(1, 3),
    goal=st.sampled_from(GOALS),
    gear=st.sampled_from(GEAR),
    protect=st.lists(st.sampled_from(JOINTS), max_size=2, unique=True).map(tuple),
    history=st.lists(st.sampled_from(GROUPS), max_size=2).map(tuple),
)
languages = st.sampled_from(["en", "ru"])


@given(profiles, languages, st.integers(0, 2**31))
def test_a_generated_answer_is_valid_for_both_judges(profile: Profile, language: str, seed: int) -> None:
    answer = answer_of(profile, language, Random(seed))
    assert validate(answer, profile, language) == validate(answer + "\n", profile, language)
    assert validate(answer, profile, language).broken == ()
    assert naive(answer, profile, language)


@settings(max_examples=300)
@given(profiles, profiles, languages, st.integers(0, 2**31))
def test_both_judges_agree_on_answers_for_someone_else(
    profile: Profile, other: Profile, language: str, seed: int
) -> None:
    rng = Random(seed)
    answer = answer_of(other, language, rng)
    assert validate(answer, profile, language).valid == naive(answer, profile, language)
    pool = [e for e in allowed(profile) if rng.random() < 0.95]
    loose = [rng.sample(pool, min(len(pool), rng.randint(2, 6))) for _ in range(profile.workouts)]
    text = written(loose, language, profile.resting)
    assert validate(text, profile, language).valid == naive(text, profile, language)


@given(profiles, languages, st.integers(0, 2**31))
def test_a_swapped_exercise_breaks_the_rule_it_should(profile: Profile, language: str, seed: int) -> None:
    """Put a forbidden exercise in the place of the first one; the validator must say why it is forbidden."""
    rng = Random(seed)
    answer = answer_of(profile, language, rng)
    first = re.search(r"1: (\w+),", answer)
    assert first
    reasons = {
        "protect": [e for e in CATALOGUE if set(e.loads) & set(profile.protect)],
        "level": [e for e in CATALOGUE if LEVELS.index(e.level) > LEVELS.index(profile.level)],
        "gear_owned": [e for e in CATALOGUE if e.gear not in ("none", profile.gear)],
        "history": [e for e in CATALOGUE if profile.history and e.group == profile.history[-1]],
    }
    for rule, forbidden in reasons.items():
        if forbidden:
            name = rng.choice(forbidden).named(language)
            mutated = answer[: first.start(1)] + name + answer[first.end(1) :]
            assert rule in validate(mutated, profile, language).broken
    assert "count" in validate(answer + "\n" + answer.split("\n")[-1].replace(
        f" {profile.workouts}:", f" {profile.workouts + 1}:"), profile, language).broken  # fmt: skip


pieces = st.sampled_from(
    [
        "Workout ",
        "Тренировка ",
        "Rest: ",
        "1",
        "2",
        ": ",
        ", ",
        ".",
        "\n",
        "\r\n",
        "curl",
        "планка",
        "arms",
        "²",
    ]
)


@given(st.one_of(st.text(), st.lists(pieces, max_size=40).map("".join)), profiles, languages)
def test_no_text_makes_it_raise(text: str, profile: Profile, language: str) -> None:
    verdict = validate(text, profile, language)
    assert verdict.valid == (not verdict.broken)
    assert set(verdict.broken) <= set(RULE_NAMES)


def test_an_endless_answer_is_refused() -> None:
    endless = "Workout 1: " + ", ".join(["curl"] * 10**6) + "."
    assert validate(endless, PLAIN, "en").broken == ("structure",)


def test_the_catalogue_is_what_the_rules_take_for_granted() -> None:
    assert len(CATALOGUE) == 48
    for names in ([e.name for e in CATALOGUE], [e.russian for e in CATALOGUE]):
        assert len(set(names)) == 48
        assert all(name.isalpha() and name == name.lower() for name in names)
    for e in CATALOGUE:
        assert e.level in LEVELS and e.group in GROUPS and e.gear in GEAR
        assert set(e.goals) <= set(GOALS) and len(set(e.goals)) == len(e.goals) in (1, 2)
        assert set(e.loads) <= set(JOINTS) and len(set(e.loads)) == len(e.loads) in (1, 2)


def valid_workouts(profile: Profile) -> int:
    """How many one-workout programmes are valid, counted by trying all."""
    count = 0
    for size in (3, 4, 5):
        for workout in combinations(allowed(profile), size):
            count += validate(written([list(workout)], "en", profile.resting), profile, "en").valid
    return count


def test_every_profile_has_many_valid_programmes() -> None:
    """Beginners with two joints to protect have the least choice: all others may do at least what they may."""
    poorest = [p for p in every_profile() if (p.level, p.workouts, len(p.protect)) == ("beginner", 1, 2)]
    assert len(poorest) == 72
    assert min(map(valid_workouts, poorest)) >= 30
    rested = [replace(p, history=(group,)) for p in poorest for group in GROUPS]
    assert min(map(valid_workouts, rested)) >= 3


def test_profiles_are_all_there_once_and_survive_json() -> None:
    every = every_profile()
    assert len(every) == len(set(every)) == 3 * 3 * 3 * 4 * 11
    for profile in [*every, *every_profile(history=True)]:
        assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert every_profile(history=True, seed=1) != every_profile(history=True, seed=2)
    assert {len(p.history) for p in every_profile(history=True)} == {2}


@pytest.mark.parametrize(
    "wrong",
    [{"level": "expert"}, {"workouts": 4}, {"workouts": "1"}, {"protect": ["ear"]}, {"gear": None},
     {"history": "legs"}, {"goal": ["strength"]}, {"protect": [["knee"]]}],
)  # fmt: skip
def test_a_profile_of_another_world_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Profile.from_dict(PLAIN.to_dict() | wrong)


def test_the_split_is_seeded_disjoint_and_independent_of_order() -> None:
    every = every_profile()
    train, held = split(every, 200, 17)
    assert len(held) == 200 and set(train) | set(held) == set(every) and not set(train) & set(held)
    assert set(split(every[::-1], 200, 17)[1]) == set(held)
    assert set(split(every, 200, 18)[1]) != set(held)
    assert {p.level for p in held} == set(LEVELS) and {p.gear for p in held} == set(GEAR)
    with pytest.raises(InputError):
        split(every, len(every), 17)


def test_the_constant_baseline_is_the_best_there_is() -> None:
    """Against trying every workout of the exercises that beginners without gear may do at all."""
    crew = [p for p in every_profile() if (p.level, p.workouts, p.gear) == ("beginner", 1, "none")]
    crew = Random(5).sample(crew, 20)
    pool = [e for e in CATALOGUE if e.level == "beginner" and e.gear == "none"]
    best = 0
    for size in (3, 4, 5):
        for workout in combinations(pool, size):
            answer = written([list(workout)], "en")
            best = max(best, sum(validate(answer, p, "en").valid for p in crew))
    assert constant_share(crew) == best / 20 > 0


def test_no_answer_beats_the_constant_baseline_and_it_stays_low() -> None:
    for history in (False, True):
        _, held = split(every_profile(history=history), 200, 17)
        share = constant_share(held)
        rng = Random(3)
        candidates = [answer_of(rng.choice(held), "en", rng) for _ in range(150)]
        found = max(sum(validate(answer, p, "en").valid for p in held) / 200 for answer in candidates)
        assert 0 < found <= share <= 0.20
    assert constant_share([]) == 0.0


def test_prompts_by_hand() -> None:
    assert prompt_of(TWICE, "en") == (
        "Level: beginner. Goal: strength. Workouts: 2. Gear: dumbbells. Protect: knee. Trained: legs, arms."
    )
    assert prompt_of(TWICE, "ru") == (
        "Уровень: начальный. Цель: сила. Тренировок: 2. Инвентарь: гантели. Беречь: колено. Было: ноги, руки."
    )
    free = Profile("advanced", 3, "flexibility", "none")
    assert prompt_of(free, "en") == "Level: advanced. Goal: flexibility. Workouts: 3. No gear. No limits."
    assert prompt_of(free, "ru") == (
        "Уровень: продвинутый. Цель: гибкость. Тренировок: 3. Без инвентаря. Ограничений нет."
    )
    for language in ("en", "ru"):
        every = [*every_profile(), *every_profile(history=True)]
        assert len({prompt_of(p, language) for p in every}) == len(every)


def test_pairs_are_valid_different_compact_and_in_catalogue_order() -> None:
    train, _ = split(every_profile(), 200, 17)
    order = {language: [e.named(language) for e in CATALOGUE] for language in ("en", "ru")}
    for language in ("en", "ru"):
        made = pairs(train[::5], language, 3, Random(1))
        assert len(made) == 3 * len(train[::5])
        assert len({json.dumps(pair["messages"]) for pair in made}) == len(made)
        for pair in made:
            user, assistant = pair["messages"]
            profile = Profile.from_dict(pair["profile"])
            assert user == {"role": "user", "content": prompt_of(profile, language)}
            assert assistant["role"] == "assistant" and pair["language"] == language
            assert validate(assistant["content"], profile, language).valid
            assert len(re.findall(r"\w+|[^\w\s]|\n", user["content"] + " " + assistant["content"])) <= 75
            for line in assistant["content"].split("\n"):
                places = [order[language].index(n) for n in line[:-1].split(": ")[1].split(", ")]
                assert places == sorted(places)


def test_a_profile_with_few_answers_gets_those_it_has() -> None:
    poor = Profile("beginner", 1, "endurance", "none", ("knee", "shoulder"), ("core",))
    assert valid_workouts(poor) == 3
    assert len(pairs([poor], "en", 10, Random(0))) == 3


def test_records_of_profiles_are_checked(tmp_path) -> None:
    path = tmp_path / "profiles.jsonl"
    good = {"language": "ru", "messages": [{"role": "user", "content": "?"}], "profile": PLAIN.to_dict()}
    path.write_text(json.dumps(good) + "\n")
    assert load_profiles(path) == [good]
    for bad in ("{", "[]", "{}", json.dumps(good | {"language": "de"}), json.dumps(good | {"profile": {}})):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(InputError, match="line 2"):
            load_profiles(path)
