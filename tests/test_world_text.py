"""The flight-crew world's texts: Russian forms and sentences against hand-written ones, numerals, variety."""

from __future__ import annotations

import re
from random import Random

import pytest

from corpora.world import english, english_stories, russian_stories, russian_text
from corpora.world.facts import CATALOGUE
from corpora.world.profiles import Profile, every_profile, split
from corpora.world.russian import CITIES, EXERCISES, along, counted, into, plural
from corpora.world.text import documents
from foundation.errors import InputError

TRAIN, HELD = split(every_profile(), 200, 17)

# genitive, accusative, instrumental, prepositional of every exercise, written by hand
FORMS = """
шаг: шага шаг шагом шаге
разгибание: разгибания разгибание разгибанием разгибании
дровосек: дровосека дровосека дровосеком дровосеке
разведение: разведения разведение разведением разведении
отведение: отведения отведение отведением отведении
проворот: проворота проворот проворотом провороте
спринт: спринта спринт спринтом спринте
мельница: мельницы мельницу мельницей мельнице
гоблет: гоблета гоблет гоблетом гоблете
сгибание: сгибания сгибание сгибанием сгибании
тяга: тяги тягу тягой тяге
разводка: разводки разводку разводкой разводке
мах: маха мах махом махе
подъём: подъёма подъём подъёмом подъёме
трастер: трастера трастер трастером трастере
пуловер: пуловера пуловер пуловером пуловере
зашагивание: зашагивания зашагивание зашагиванием зашагивании
жим: жима жим жимом жиме
наклон: наклона наклон наклоном наклоне
шраг: шрага шраг шрагом шраге
становая: становой становую становой становой
выкат: выката выкат выкатом выкате
взятие: взятия взятие взятием взятии
рывок: рывка рывок рывком рывке
приседание: приседания приседание приседанием приседании
марш: марша марш маршем марше
верблюд: верблюда верблюда верблюдом верблюде
планка: планки планку планкой планке
столик: столика столик столиком столике
кошка: кошки кошку кошкой кошке
скручивание: скручивания скручивание скручиванием скручивании
мостик: мостика мостик мостиком мостике
поворот: поворота поворот поворотом повороте
боксёр: боксёра боксёра боксёром боксёре
горка: горки горку горкой горке
раскрытие: раскрытия раскрытие раскрытием раскрытии
выпад: выпада выпад выпадом выпаде
лягушка: лягушки лягушку лягушкой лягушке
скалолаз: скалолаза скалолаза скалолазом скалолазе
отжимание: отжимания отжимание отжиманием отжимании
лодочка: лодочки лодочку лодочкой лодочке
пловец: пловца пловца пловцом пловце
пистолет: пистолета пистолет пистолетом пистолете
бёрпи: бёрпи бёрпи бёрпи бёрпи
стойка: стойки стойку стойкой стойке
складка: складки складку складкой складке
корзинка: корзинки корзинку корзинкой корзинке
лучник: лучника лучника лучником лучнике
"""


def test_every_exercise_is_declined_as_by_hand() -> None:
    expected = dict(line.split(": ") for line in FORMS.strip().splitlines())
    made = {
        noun.nom: f"{noun.gen} {noun.acc} {noun.ins} {noun.loc}"
        for noun in (EXERCISES[e.name] for e in CATALOGUE)
    }
    assert made == expected
    datives = {EXERCISES[name].dat for name in ("march", "plank", "squat", "swimmer", "deadlift", "burpee")}
    assert datives == {"маршу", "планке", "приседанию", "пловцу", "становой", "бёрпи"}
    genders = {EXERCISES[name].nom: EXERCISES[name].gender for name in ("march", "plank", "squat", "burpee")}
    assert genders == {"марш": "m", "планка": "f", "приседание": "n", "бёрпи": "n"}


def test_numerals_by_hand() -> None:
    assert [counted(n, "workout") for n in (1, 2, 4, 5, 11, 12, 21, 22, 25, 111)] == [
        "1 тренировка", "2 тренировки", "4 тренировки", "5 тренировок", "11 тренировок", "12 тренировок",
        "21 тренировка", "22 тренировки", "25 тренировок", "111 тренировок",
    ]  # fmt: skip
    assert counted(1, "minute", acc=True) == "1 минуту" and counted(21, "night", acc=True) == "21 ночь"
    assert counted(1, "day") == "1 день" and counted(3, "day") == "3 дня" and counted(7, "day") == "7 дней"
    assert plural(0, "a", "b", "c") == "c"


def test_prepositions_by_hand() -> None:
    assert {into(w) for w in ("Владивосток", "Вену", "Риме", "Францию")} == {
        "во Владивосток", "в Вену", "в Риме", "во Францию",
    }  # fmt: skip
    assert {along(w) for w in ("штангой", "шага", "сгибанием", "взятия", "выпада", "гантелями")} == {
        "со штангой", "с шага", "со сгибанием", "со взятия", "с выпада", "с гантелями",
    }  # fmt: skip


def test_cities_by_hand() -> None:
    forms = {city.nom: (city.gen, city.acc, city.loc) for city in CITIES}
    assert forms["Москва"] == ("Москвы", "Москву", "Москве")
    assert forms["Прага"] == ("Праги", "Прагу", "Праге")
    assert forms["Казань"] == ("Казани", "Казань", "Казани")
    assert forms["Париж"] == ("Парижа", "Париж", "Париже")
    assert forms["Хабаровск"] == ("Хабаровска", "Хабаровск", "Хабаровске")
    assert forms["Сочи"] == ("Сочи", "Сочи", "Сочи")


def told(kind, draws: int = 8000, profiles=TRAIN) -> set[str]:
    """All sentences of that many documents of one kind."""
    rng = Random(1)
    return {
        sentence
        for _ in range(draws)
        for sentence in re.split(r"(?<=[.?!])\s", kind(rng, profiles))
    }  # fmt: skip


RUSSIAN_SENTENCES = {
    russian_text.describe: {
        "Становая полезна для спины.",
        "Приседание полезно для ног.",
        "Боксёр полезен для рук.",
        "Чтобы укрепить спину, сделай тягу.",
        "Начни тренировку груди с пуловера.",
        "Начни тренировку рук со шрага.",
        "Её делают со штангой.",
        "Для тяги нужны гантели.",
        "Для мельницы нужен эспандер.",
        "Её выбирают ради силы и выносливости.",
        "При боли в запястье и плече от стойки лучше отказаться.",
        "Не делай его, если нужно беречь поясницу.",
        "Бёрпи развивает выносливость.",
    },
    russian_text.advise: {
        "Врач велел Анне беречь поясницу.",
        "Врач велел Петру беречь колено.",
        "Лучше начать со складки.",
        "Планка безопасна.",
        "Приседание безопасно.",
        "Можно перейти к маршу.",
        "Лучше заняться взятием.",
    },
    russian_text.rule: {
        "Без гантелей не сделать тягу.",
        "Без штанги не сделать жим.",
        "На начальном уровне ещё рано делать пловца.",
        "Тренировка только для ног не годится: добавь упражнение для пресса.",
        "У кого есть гантели, тот берёт их хотя бы раз, например для сгибания.",
        "Планка нагружает запястье, поэтому запрещена тем, кто его бережёт.",
        "В тренировке может быть 5 упражнений.",
        "В тренировке может быть 3 упражнения.",
    },
    russian_stories.story: {
        "Потом она выпила воды и легла спать.",
        "Потом он выпил воды и лёг спать.",
        "До следующего рейса он отдыхал 1 день.",
        "До следующего рейса она отдыхала 3 дня.",
        "«Завтра руки будут болеть», — сказала Вера.",
        "«Завтра грудь будет болеть», — сказал Иван.",
        "На следующий день экипаж улетел обратно во Владивосток.",
        "Экипаж провёл в Казани 1 ночь.",
        "У Марии была стоянка в Праге.",
        "Иван тренировал ноги дома.",
    },
    russian_stories.duty: {
        "Полоса во Владивостоке была мокрой, но посадка вышла мягкой.",
        "Чай попросил 21 пассажир, а кофе — никто.",
        "Чай попросили 4 пассажира, а кофе — никто.",
        "Из окна были видны огни Праги.",
    },
    russian_text.compare: {"Складка труднее планки.", "И жим, и пуловер тренируют грудь."},
}


@pytest.mark.parametrize("kind", RUSSIAN_SENTENCES, ids=lambda kind: kind.__name__)
def test_hand_written_russian_sentences_are_told(kind) -> None:
    assert RUSSIAN_SENTENCES[kind] - told(kind) == set()


def test_hand_written_english_sentences_are_told() -> None:
    assert {
        "The deadlift is an intermediate exercise for the back.",
        "The squat is a beginner exercise for the legs.",
        "Without a barbell it can not be done.",
        "It loads the wrist and the shoulder.",
    } <= told(english.describe)
    assert {"Anna works as an instructor on long flights."} <= told(english_stories.story, 20_000)


NUMERALS = {
    "минут": ("минута минуту", "минуты", "минут"),
    "час": ("час", "часа", "часов"),
    "повторени": ("повторение", "повторения", "повторений"),
    "подход": ("подход", "подхода", "подходов"),
    "тренировк": ("тренировка", "тренировки", "тренировок"),
    "дн": ("", "дня", "дней"),
    "пассажир": ("пассажир", "пассажира", "пассажиров"),
}


def test_all_numerals_and_prepositions_in_the_texts_agree() -> None:
    text = "\n".join(documents("ru", 4000, Random(2), TRAIN))
    seen = 0
    for number, word in re.findall(r"\b(\d+) (\w+)", text):
        for stem, (one, few, many) in NUMERALS.items():
            if word.startswith(stem):
                n = int(number)
                last = n % 10 if n // 10 % 10 != 1 else 0
                assert word in (one.split() if last == 1 else [few] if last in (2, 3, 4) else [many])
                seen += 1
    assert seen > 500
    assert not re.search(r"(?i)\b(в в[лрдст]|с с[гкпт]|с ш[рт]|с вз)", text)
    assert not re.search(r"[{}_]|  | [.,;]|\bNone\b", text)
    assert not re.search(r"[A-Za-z]", text)


def read_english(text: str) -> Profile | None:
    """The profile told in an English case, read back without the generator's help."""
    said = re.match(
        r"\w+ is an? (\w+).*? and wants (.+?)\. (?:He|She) plans (\w+) workouts? a week, (.+)", text
    )
    if not said:
        return None
    level, wants, number, rest = said.groups()
    signs = {"strength": "strength|stronger", "endurance": "endurance|last", "flexibility": "flexibility|move"}
    goal = next(goal for goal, sign in signs.items() if re.search(sign, wants))
    first, _, _ = rest.partition(". ")
    gear = next((gear for gear in ("bands", "dumbbells", "barbell") if gear in first), "none")
    protect = tuple(joint for joint in ("knee", "wrist", "spine", "shoulder") if joint in first)
    return Profile(level, {"one": 1, "two": 2, "three": 3}[number], goal, gear, protect)


def read_russian(text: str) -> Profile | None:
    said = re.match(r"У \w+ (\w+) уровень, цель — (\w+)\. В неделю \w+ (\d) \w+, (.+?)\. ", text)
    if not said:
        return None
    level, goal, number, rest = said.groups()
    words = {"начальный": "beginner", "средний": "intermediate", "продвинутый": "advanced",
             "сила": "strength", "выносливость": "endurance", "гибкость": "flexibility"}  # fmt: skip
    gears = {"эспандер": "bands", "гантели": "dumbbells", "штанга": "barbell"}
    joints = {"колено": "knee", "запястье": "wrist", "поясницу": "spine", "плечо": "shoulder"}
    gear = next((gear for word, gear in gears.items() if word in rest), "none")
    protect = tuple(joint for word, joint in joints.items() if word in rest)
    return Profile(words[level], int(number), words[goal], gear, protect)


def test_texts_speak_of_no_held_out_profile() -> None:
    for language, read in (("en", read_english), ("ru", read_russian)):
        texts = documents(language, 5000, Random(4), TRAIN)
        spoken = {profile for profile in map(read, texts) if profile}
        assert len(spoken) > 300
        assert spoken <= set(TRAIN)
    assert read_english(english.case(Random(1), HELD)) in HELD
    assert read_russian(russian_text.case(Random(1), HELD)) in HELD


@pytest.mark.parametrize(("language", "most_words"), [("en", 1500), ("ru", 1500)])
def test_texts_are_varied_and_never_told_twice(language: str, most_words: int) -> None:
    train = documents(language, 5000, Random(6), TRAIN)
    held = documents(language, 300, Random(7), TRAIN, avoid=train)
    assert len(set(train)) == 5000 and len(set(held)) == 300 and not set(train) & set(held)
    sentences = {s for text in train for s in re.split(r"(?<=[.?!])\s", text)}
    words = {word for text in train for word in re.findall(r"\w+", text.lower())}
    assert len(sentences) > 4000
    assert 450 < len(words) < most_words
    assert train == documents(language, 5000, Random(6), TRAIN)


def test_a_world_with_no_more_to_tell_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from corpora.world import text

    monkeypatch.setitem(text.KINDS, "en", (lambda rng, profiles: rng.choice(("one.", "two.")),))
    with pytest.raises(InputError, match="only 2"):
        documents("en", 3, Random(0), TRAIN)
