"""Russian grammar, as much of it as the flight-crew texts need: cases, gender, numerals, people.

Regular nouns are declined by rule from their stem; the irregular ones (пловец, рывок, становая, бёрпи, plurals)
are written out. Forms are named after the English case names: nom, gen, dat, acc, ins, loc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from corpora.world.facts import CATALOGUE

VOWELS = "аеёиоуыэюя"
HUSHING = "жчшщ"
I_NOT_Y = "гкх" + HUSHING  # after these consonants и is written where others take ы


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun in one number. `gender` is m, f, n, or p for a plural."""

    nom: str
    gen: str
    dat: str
    acc: str
    ins: str
    loc: str
    gender: str


def feminine(nom: str) -> Noun:
    """планка, тяга, мельница: first declension in -а, the ending unstressed."""
    stem = nom[:-1]
    gen = stem + ("и" if stem[-1] in I_NOT_Y else "ы")
    ins = stem + ("ей" if stem[-1] in HUSHING + "ц" else "ой")
    return Noun(nom, gen, stem + "е", stem + "у", ins, stem + "е", "f")


def masculine(nom: str, *, stem: str = "", alive: bool = False) -> Noun:
    """выпад, боксёр: hard second declension. `stem` when a vowel drops out; `alive`: acc = gen."""
    stem = stem or nom
    ins = stem + ("ем" if stem[-1] in HUSHING else "ом")
    return Noun(nom, stem + "а", stem + "у", stem + "а" if alive else nom, ins, stem + "е", "m")


def neuter(nom: str) -> Noun:
    """приседание: second declension in -ие."""
    stem = nom[:-1]
    return Noun(nom, stem + "я", stem + "ю", nom, stem + "ем", stem + "и", "n")


def frozen(nom: str, gender: str) -> Noun:
    """бёрпи, Токио: one form for all cases."""
    return Noun(nom, nom, nom, nom, nom, nom, gender)


_ALIVE = ("дровосек", "верблюд", "боксёр", "скалолаз", "лучник")
_WRITTEN_OUT = {
    "пловец": masculine("пловец", stem="пловц", alive=True),
    "рывок": masculine("рывок", stem="рывк"),
    "бёрпи": frozen("бёрпи", "n"),
    "становая": Noun("становая", "становой", "становой", "становую", "становой", "становой", "f"),
}


def _exercise(nom: str) -> Noun:
    if nom in _WRITTEN_OUT:
        return _WRITTEN_OUT[nom]
    if nom.endswith("ие"):
        return neuter(nom)
    return feminine(nom) if nom.endswith("а") else masculine(nom, alive=nom in _ALIVE)


EXERCISES = MappingProxyType({exercise.name: _exercise(exercise.russian) for exercise in CATALOGUE})

_SOFT = {
    name: Noun(nom, stem + "и", stem + "и", nom, nom + "ю", stem + "и", "f")
    for name, nom, stem in (
        ("chest", "грудь", "груд"),
        ("endurance", "выносливость", "выносливост"),
        ("flexibility", "гибкость", "гибкост"),
        ("Казань", "Казань", "Казан"),
        ("Пермь", "Пермь", "Перм"),
    )
}

GROUPS = MappingProxyType(
    {
        "legs": Noun("ноги", "ног", "ногам", "ноги", "ногами", "ногах", "p"),
        "back": Noun("спина", "спины", "спине", "спину", "спиной", "спине", "f"),
        "chest": _SOFT["chest"],
        "arms": Noun("руки", "рук", "рукам", "руки", "руками", "руках", "p"),
        "core": masculine("пресс"),
    }
)
GOALS = MappingProxyType(
    {
        "strength": feminine("сила"),
        "endurance": _SOFT["endurance"],
        "flexibility": _SOFT["flexibility"],
    }
)
JOINTS = MappingProxyType(
    {
        "knee": Noun("колено", "колена", "колену", "колено", "коленом", "колене", "n"),
        "wrist": Noun("запястье", "запястья", "запястью", "запястье", "запястьем", "запястье", "n"),
        "spine": feminine("поясница"),
        "shoulder": Noun("плечо", "плеча", "плечу", "плечо", "плечом", "плече", "n"),
    }
)
GEAR = MappingProxyType(
    {
        "bands": masculine("эспандер"),
        "dumbbells": Noun("гантели", "гантелей", "гантелям", "гантели", "гантелями", "гантелях", "p"),
        "barbell": feminine("штанга"),
    }
)
CITIES = (
    *(feminine(nom) for nom in ("Москва", "Самара", "Прага", "Анкара", "Лима", "Вена")),
    *(_SOFT[nom] for nom in ("Казань", "Пермь")),
    *(masculine(nom) for nom in ("Лондон", "Париж", "Рим", "Стамбул", "Пекин", "Берлин", "Мадрид", "Лиссабон")),
    *(masculine(nom) for nom in ("Минск", "Екатеринбург", "Владивосток", "Новосибирск", "Хабаровск")),
    *(frozen(nom, "m") for nom in ("Токио", "Осло", "Сочи", "Дели", "Алматы")),
)

# level: masculine nominative, genitive, prepositional ("на начальном уровне")
LEVELS = MappingProxyType(
    {
        "beginner": ("начальный", "начального", "начальном"),
        "intermediate": ("средний", "среднего", "среднем"),
        "advanced": ("продвинутый", "продвинутого", "продвинутом"),
    }
)

# nominative of one, few, many; then the accusative of one ("за 1 минуту")
COUNTED = MappingProxyType(
    {
        "workout": ("тренировка", "тренировки", "тренировок", "тренировку"),
        "exercise": ("упражнение", "упражнения", "упражнений", "упражнение"),
        "repetition": ("повторение", "повторения", "повторений", "повторение"),
        "set": ("подход", "подхода", "подходов", "подход"),
        "minute": ("минута", "минуты", "минут", "минуту"),
        "hour": ("час", "часа", "часов", "час"),
        "day": ("день", "дня", "дней", "день"),
        "night": ("ночь", "ночи", "ночей", "ночь"),
        "passenger": ("пассажир", "пассажира", "пассажиров", "пассажира"),
    }
)


def plural(number: int, one: str, few: str, many: str) -> str:
    """тренировка (1, 21), тренировки (2-4, 22), тренировок (5-20, 111): the form alone."""
    if number % 10 == 1 and number % 100 != 11:
        return one
    if number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14):
        return few
    return many


def counted(number: int, thing: str, *, acc: bool = False) -> str:
    """`2 тренировки`; with `acc` the accusative: `1 тренировку`, `21 минуту`."""
    one, few, many, accusative = COUNTED[thing]
    return f"{number} {plural(number, accusative if acc else one, few, many)}"


def agree(noun: Noun, masculine: str, feminine: str, neuter: str, plural: str) -> str:
    """The form that agrees with the noun: of полезен, полезна, полезно, полезны for планка полезна."""
    return {"m": masculine, "f": feminine, "n": neuter, "p": plural}[noun.gender]


def needed(noun: Noun) -> str:
    """нужен эспандер, нужна штанга, нужны гантели."""
    return f"{agree(noun, 'нужен', 'нужна', 'нужно', 'нужны')} {noun.nom}"


def into(words: str) -> str:
    """The preposition в, which is во before a cluster that begins with в or ф: в Риме, во Владивостоке."""
    return f"{_lengthened('в', words, 'вф')} {words}"


def along(words: str) -> str:
    """The preposition с, which is со before a cluster that begins with с, з, ш, ж or в: со штангой."""
    return f"{_lengthened('с', words, 'сзшжв')} {words}"


def _lengthened(preposition: str, words: str, heads: str) -> str:
    first, second = words[0].lower(), words[1].lower()
    return preposition + ("о" if first in heads and second not in VOWELS else "")


def listed(words: Sequence[str]) -> str:
    """а; а и б; а, б и в."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} и {words[-1]}"


@dataclass(frozen=True, slots=True)
class Person:
    """A crew member; `she` decides past verbs and pronouns. `job_ins`: работает пилотом."""

    name: str
    gen: str
    dat: str
    job: str
    job_ins: str
    she: bool

    def did(self, he: str, she: str = "") -> str:
        """The past form: did("сделал") is сделала for a woman; irregular feminines are given."""
        return (she or he + "а") if self.she else he

    @property
    def he(self) -> str:
        return "она" if self.she else "он"

    @property
    def his(self) -> str:
        return "её" if self.she else "его"


# nominative, genitive, dative
MEN = (
    ("Олег", "Олега", "Олегу"),
    ("Иван", "Ивана", "Ивану"),
    ("Пётр", "Петра", "Петру"),
    ("Максим", "Максима", "Максиму"),
    ("Виктор", "Виктора", "Виктору"),
    ("Андрей", "Андрея", "Андрею"),
    ("Сергей", "Сергея", "Сергею"),
    ("Руслан", "Руслана", "Руслану"),
    ("Тимур", "Тимура", "Тимуру"),
    ("Денис", "Дениса", "Денису"),
)
WOMEN = (
    ("Анна", "Анны", "Анне"),
    ("Ольга", "Ольги", "Ольге"),
    ("Мария", "Марии", "Марии"),
    ("Нина", "Нины", "Нине"),
    ("Елена", "Елены", "Елене"),
    ("Вера", "Веры", "Вере"),
    ("Юлия", "Юлии", "Юлии"),
    ("Дарья", "Дарьи", "Дарье"),
    ("Алина", "Алины", "Алине"),
    ("Софья", "Софьи", "Софье"),
)
# nominative, instrumental
MALE_JOBS = (
    ("командир", "командиром"),
    ("пилот", "пилотом"),
    ("второй пилот", "вторым пилотом"),
    ("бортпроводник", "бортпроводником"),
    ("инструктор", "инструктором"),
)
FEMALE_JOBS = (
    ("бортпроводница", "бортпроводницей"),
    ("стюардесса", "стюардессой"),
    ("старшая бортпроводница", "старшей бортпроводницей"),
)


def person(rng: Random) -> Person:
    if rng.random() < 0.5:
        return Person(*rng.choice(WOMEN), *rng.choice(FEMALE_JOBS), she=True)
    return Person(*rng.choice(MEN), *rng.choice(MALE_JOBS), she=False)
