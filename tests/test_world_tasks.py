"""The world's tasks: one right choice, checked by validator and catalogue, and against answers that cheat."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from corpora.world import english, russian, russian_text
from corpora.world.facts import CATALOGUE, GEAR, GROUPS, LEVELS
from corpora.world.pairs import prompt_of
from corpora.world.profiles import Profile, every_profile, split
from corpora.world.tasks import answers, choices, known_facts
from corpora.world.validate import validate


def held(history: bool) -> list[Profile]:
    return split(every_profile(history=history), 200, 17)[1]


@pytest.mark.parametrize("language", ["en", "ru"])
@pytest.mark.parametrize("history", [False, True])
def test_one_choice_is_valid_and_each_other_breaks_a_rule_of_its_own(language: str, history: bool) -> None:
    profiles = held(history)
    made = choices(profiles, language, Random("a"))
    broken: Counter[str] = Counter()
    places: Counter[int] = Counter()
    for profile, item in zip(profiles, made, strict=True):
        assert [m["role"] for m in item["messages"]] == ["user"]
        assert item["messages"][0]["content"] == prompt_of(profile, language)
        verdicts = [validate(text, profile, language) for text in item["choices"]]
        assert len(verdicts) == 4 and [v.valid for v in verdicts].index(True) == item["answer"]
        rules = [v.broken for v in verdicts if not v.valid]
        assert len(rules) == len(set(rules)) == 3 and all(len(rule) == 1 for rule in rules)
        broken.update(rule for (rule,) in rules)
        places[item["answer"]] += 1
    assert set(broken) == {"level", "goal", "protect", "gear_owned", "gear_used", "count"} | (
        {"history"} if history else set()
    )
    assert min(broken.values()) > 30  # no rule is left to chance
    assert min(places.values()) > 25  # of 200 in four places: 50 each, less four standard deviations


@pytest.mark.parametrize("language", ["en", "ru"])
def test_form_alone_does_not_tell_the_right_choice(language: str) -> None:
    made = choices(held(False), language, Random("b"))
    for pick in (min, max):
        right = sum(
            (lengths := [len(text) for text in item["choices"]]).index(pick(lengths)) == item["answer"]
            for item in made
        )
        assert right / len(made) < 0.35  # a blind choice: .25, standard error .03


def test_every_profile_has_its_choices() -> None:
    assert len(choices(every_profile(history=True)[::7], "ru", Random(3))) == len(every_profile()[::7])


@pytest.mark.parametrize("language", ["en", "ru"])
def test_answers_are_valid(language: str) -> None:
    for profile, item in zip(held(False), answers(held(False), language, Random(2)), strict=True):
        user, assistant = item["messages"]
        assert user == {"role": "user", "content": prompt_of(profile, language)}
        assert assistant["role"] == "assistant" and validate(assistant["content"], profile, language).valid


@pytest.mark.parametrize("language", ["en", "ru"])
def test_facts_are_those_of_the_catalogue_in_the_words_of_the_texts(language: str) -> None:
    """Each question with its right answer is a document that the texts really hold, and no wrong one is."""
    ask = english.ask if language == "en" else russian_text.ask
    rng = Random(7)
    told = set()
    for _ in range(30_000):
        question, _, answer = ask(rng, []).partition("\n")
        told.add(f"{question.partition(': ')[2]}\n{answer.partition(': ')[2]}")
    made = known_facts(language, Random(1))
    assert len(made) == 3 * len(CATALOGUE)
    for item in made:
        found = []
        for choice in item["choices"]:
            question, _, answer = (item["prompt"] + choice).partition("\n")
            found.append(f"{question.partition(': ')[2]}\n{answer.partition(': ')[2]}" in told)
        assert found.index(True) == item["answer"] and sum(found) == 1, item


def test_facts_of_one_exercise_by_hand() -> None:
    """row: dumbbells, beginner, back, as the table of facts has it; тяга."""
    items = {item["prompt"]: item["choices"][item["answer"]] for item in known_facts("en", Random(1))}
    assert items["Question: What does the row train?\nAnswer: The row trains the"] == " back."
    assert items["Question: What gear does the row need?\nAnswer: The row needs"] == " dumbbells."
    assert items["Question: Which level is the row?\nAnswer: The row is"] == " a beginner exercise."
    items = {item["prompt"]: item["choices"][item["answer"]] for item in known_facts("ru", Random(1))}
    assert items["Вопрос: Что тренирует тяга?\nОтвет: Тяга тренирует"] == " спину."
    assert items["Вопрос: Какой инвентарь нужен для тяги?\nОтвет:"] == " Для тяги нужны гантели."
    assert items["Вопрос: Какой уровень у тяги?\nОтвет:"] == " Начальный."
    assert {len(item["choices"]) for item in known_facts("ru", Random(1))} == {
        len(GROUPS),
        len(GEAR),
        len(LEVELS),
    }
    assert set(russian.GROUPS) == set(GROUPS)
