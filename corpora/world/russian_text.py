"""Russian documents about exercises, rules and profiles: the facts told as short natural texts.

The same kinds of documents as english.py, written in Russian, not translated word by word: every noun takes
the case that its sentence asks for (russian.py), pronouns and verbs agree, numerals govern what they count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from corpora.world import facts
from corpora.world.english import capital, join, pick
from corpora.world.facts import CATALOGUE, RANK, Exercise
from corpora.world.pairs import workout_of
from corpora.world.profiles import Profile
from corpora.world.russian import (
    EXERCISES,
    GEAR,
    GOALS,
    GROUPS,
    JOINTS,
    LEVELS,
    MEN,
    WOMEN,
    Noun,
    agree,
    along,
    counted,
    listed,
    needed,
    person,
)

WHEN = (
    "перед рейсом",
    "после долгого рейса",
    "в выходной день",
    "во время стоянки",
    "утром",
    "вечером",
    "между рейсами",
    "после ночного полёта",
    "перед сном",
    "после завтрака",
)


def nouns(rng: Random, count: int, said: Callable[[Exercise], bool]) -> list[Noun]:
    """Up to `count` random exercises of which `said` holds."""
    found = [EXERCISES[exercise.name] for exercise in CATALOGUE if said(exercise)]
    return rng.sample(found, min(count, len(found)))


def each(found: Sequence[Noun], case: str) -> str:
    """The nouns in one case, as a list: планку, тягу и мостик."""
    return listed([getattr(noun, case) for noun in found])


def goals(exercise: Exercise, case: str) -> str:
    return each([GOALS[goal] for goal in exercise.goals], case)


def joints(names: Sequence[str], case: str) -> str:
    return each([JOINTS[name] for name in names], case)


def describe(rng: Random, profiles: Sequence[Profile]) -> str:
    """What one exercise is, needs, serves and loads."""
    e = rng.choice(CATALOGUE)
    noun, group, level = EXERCISES[e.name], GROUPS[e.group], LEVELS[e.level]
    name, he, him = capital(noun.nom), agree(noun, "Он", "Она", "Оно", "Они"), _him(noun)
    first = pick(
        rng,
        f"{name} тренирует {group.acc}.",
        f"{name} — упражнение для {group.gen}.",
        f"{name} — это упражнение {level[1]} уровня для {group.gen}.",
        f"{name} развивает {goals(e, 'acc')}.",
        f"{name} {agree(noun, 'полезен', 'полезна', 'полезно', 'полезны')} для {group.gen}.",
        f"Чтобы укрепить {group.acc}, сделай {noun.acc}.",
        f"Начни тренировку {group.gen} {along(noun.gen)}.",
        f"Среди упражнений для {group.gen} есть и {noun.nom}.",
    )
    if e.gear == "none":
        needs = pick(
            rng,
            "Инвентарь не нужен.",
            "Для этого хватит места на полу.",
            f"{capital(him)} делают без инвентаря.",
            f"{capital(him)} можно делать в любой гостинице.",
            "Нужен только вес своего тела.",
        )
    else:
        gear = GEAR[e.gear]
        needs = pick(
            rng,
            f"{capital(needed(gear))}.",
            f"Для {noun.gen} {needed(gear)}.",
            f"Без {gear.gen} это упражнение не сделать.",
            f"{capital(him)} делают {along(gear.ins)}.",
        )
    serves = pick(
        rng,
        f"Цель — {goals(e, 'nom')}.",
        f"Уровень — {level[0]}.",
        f"{he} подходит для {level[1]} уровня.",
        f"Это упражнение на {goals(e, 'acc')}.",
        f"{capital(him)} выбирают ради {goals(e, 'gen')}.",
    )
    care = pick(
        rng,
        f"{he} нагружает {joints(e.loads, 'acc')}.",
        f"Не делай {him}, если нужно беречь {joints(e.loads, 'acc')}.",
        f"Осторожно: нагрузка идёт на {joints(e.loads, 'acc')}.",
        f"При боли в {joints(e.loads, 'loc')} от {noun.gen} лучше отказаться.",
        f"Кто бережёт {joints(e.loads, 'acc')}, выбирает другое.",
    )
    sets, times = counted(rng.randint(2, 5), "set", acc=True), rng.choice((6, 8, 10, 12, 15))
    dose = pick(
        rng,
        "",
        f"Сделай {sets} по {counted(times, 'repetition')}.",
        f"Начни с малого: {counted(rng.randint(5, 12), 'repetition')}.",
        f"Между подходами отдыхай {counted(rng.randint(1, 3), 'minute', acc=True)}.",
        "На усилии делай выдох.",
        "Двигайся медленно и держи спину прямо.",
    )
    middle = [needs, serves, care]
    rng.shuffle(middle)
    return join(first, *middle[: rng.randint(2, 3)], dose)


def _him(noun: Noun) -> str:
    return agree(noun, "его", "её", "его", "их")


def advise(rng: Random, profiles: Sequence[Profile]) -> str:
    """What to leave out for a joint's sake, and what to do instead."""
    key, who = rng.choice(facts.JOINTS), person(rng)
    joint = JOINTS[key]
    bad = nouns(rng, rng.randint(1, 3), lambda e: key in e.loads)
    good = nouns(rng, rng.randint(1, 3), lambda e: key not in e.loads)
    loads, fits = ("нагружают", "подходят") if len(bad) > 1 else ("нагружает", "подходит")
    safe = "безопасны" if len(good) > 1 else agree(good[0], "безопасен", "безопасна", "безопасно", "безопасны")
    first = pick(
        rng,
        f"Если болит {joint.nom}, не делай {each(bad, 'acc')}.",
        f"Чтобы беречь {joint.acc}, откажись от {each(bad, 'gen')}.",
        f"{capital(each(bad, 'nom'))} {loads} {joint.acc}.",
        f"{who.name} бережёт {joint.acc} и поэтому не делает {each(bad, 'acc')}.",
        f"Врач велел {who.dat} беречь {joint.acc}. С тех пор {who.he} обходится без {each(bad, 'gen')}.",
        f"При {agree(joint, 'слабом', 'слабой', 'слабом', 'слабых')} {joint.loc} {each(bad, 'nom')} не {fits}.",
    )
    second = pick(
        rng,
        f"Вместо этого сделай {each(good, 'acc')}.",
        f"{capital(each(good, 'nom'))} {safe}.",
        f"Лучше начать {along(each(good, 'gen'))}.",
        f"Можно перейти к {each(good, 'dat')}.",
        f"Лучше заняться {each(good, 'ins')}.",
    )
    third = pick(
        rng,
        "",
        "Боль — это причина остановиться.",
        "Если боль не проходит, иди к врачу.",
        f"Перед тренировкой разминайся {counted(rng.randint(3, 10), 'minute', acc=True)}.",
        f"Особенно важно помнить об этом {rng.choice(WHEN)}.",
        "Здоровье дороже рекордов.",
    )
    return join(first, second, third)


def rule(rng: Random, profiles: Sequence[Profile]) -> str:
    """One to three rules of a valid programme, with examples."""
    goal, key, own = rng.choice(facts.GOALS), rng.choice(facts.JOINTS), rng.choice(facts.GEAR[1:])
    group, other = (GROUPS[name] for name in rng.sample(facts.GROUPS, 2))
    level, joint, gear = rng.choice(facts.LEVELS[:2]), JOINTS[key], GEAR[own]
    serving = each(nouns(rng, 2, lambda e: goal in e.goals), "nom")
    owned = nouns(rng, 1, lambda e: e.gear == own)[0]
    hard = rng.choice([e for e in CATALOGUE if RANK[e.level] > RANK[level]])
    loading = nouns(rng, 1, lambda e: key in e.loads)[0]
    forbidden = agree(loading, "запрещён", "запрещена", "запрещено", "запрещены")
    worked = agree(group, "работал", "работала", "работало", "работали")
    said = (
        "В тренировке от трёх до пяти упражнений.",
        f"В тренировке может быть {counted(rng.randint(3, 5), 'exercise')}.",
        "В одной тренировке упражнение не повторяется.",
        "Тренировок в неделю столько, сколько указано в профиле.",
        pick(
            rng,
            "Не меньше двух упражнений тренировки служат цели. "
            f"Для {GOALS[goal].gen} это, например, {serving}.",
            f"Если цель — {GOALS[goal].nom}, тренировке нужны два таких упражнения, как {serving}.",
        ),
        f"Каждая тренировка нагружает не меньше двух групп мышц, например {group.acc} и {other.acc}.",
        f"Тренировка только для {group.gen} не годится: добавь упражнение для {other.gen}.",
        f"У кого есть {gear.nom}, тот берёт {_him(gear)} хотя бы раз, например для {owned.gen}.",
        f"Без {gear.gen} не сделать {owned.acc}.",
        f"На {LEVELS[level][2]} уровне ещё рано делать {EXERCISES[hard.name].acc}.",
        f"{capital(EXERCISES[hard.name].nom)} ждёт {LEVELS[hard.level][1]} уровня.",
        f"Кто бережёт {joint.acc}, не делает {loading.acc}.",
        f"{capital(loading.nom)} нагружает {joint.acc}, поэтому {forbidden} тем, кто {_him(joint)} бережёт.",
        f"Если в прошлый раз {worked} {group.nom}, в первой тренировке работает другое, например {other.nom}.",
    )
    opening = pick(
        rng,
        "",
        "",
        "Правило для экипажей.",
        "Какая программа верна?",
        "Запомни это.",
        "Инструктор объясняет.",
        "Сначала прочитай правило.",
    )
    return join(opening, *rng.sample(said, rng.randint(1, 3)))


def ask(rng: Random, profiles: Sequence[Profile]) -> str:
    """A question and its answer."""
    e = rng.choice(CATALOGUE)
    noun, useful = EXERCISES[e.name], agree(EXERCISES[e.name], "полезен", "полезна", "полезно", "полезны")
    joint, gear = rng.choice(facts.JOINTS), rng.choice(facts.GEAR[1:])
    group, goal = rng.choice(facts.GROUPS), rng.choice(facts.GOALS)
    needs = agree(GEAR[gear], "нужен", "нужна", "нужно", "нужны")
    question, answer = rng.choice(
        (
            (f"Что тренирует {noun.nom}?", f"{capital(noun.nom)} тренирует {GROUPS[e.group].acc}."),
            (
                f"Какой инвентарь нужен для {noun.gen}?",
                "Никакой." if e.gear == "none" else f"Для {noun.gen} {needed(GEAR[e.gear])}.",
            ),
            (f"Какой уровень у {noun.gen}?", f"{capital(LEVELS[e.level][0])}."),
            (f"Чем {useful} {noun.nom}?", f"{capital(noun.nom)} развивает {goals(e, 'acc')}."),
            (f"Какая нагрузка у {noun.gen}?", f"{capital(noun.nom)} нагружает {joints(e.loads, 'acc')}."),
            (
                f"Можно ли делать {noun.acc}, если надо беречь {JOINTS[joint].acc}?",
                f"Нет, {noun.nom} нагружает {JOINTS[joint].acc}." if joint in e.loads else "Да, можно.",
            ),
            (
                f"Развивает ли {noun.nom} {GOALS[goal].acc}?",
                f"Да, {noun.nom} развивает {GOALS[goal].acc}."
                if goal in e.goals
                else f"Нет, только {goals(e, 'acc')}.",
            ),
            (
                f"Назови два упражнения для {GROUPS[group].gen}.",
                f"{capital(each(nouns(rng, 2, lambda x: x.group == group), 'nom'))}.",
            ),
            (
                f"Назови три упражнения, для которых {needs} {GEAR[gear].nom}.",
                f"{capital(each(nouns(rng, 3, lambda x: x.gear == gear), 'nom'))}.",
            ),
            (
                f"Какие упражнения развивают {GOALS[goal].acc}?",
                f"Например, {each(nouns(rng, 3, lambda x: goal in x.goals), 'nom')}.",
            ),
        )
    )
    voices = (("Вопрос", "Ответ"), ("Экипаж", "Тренер"), (rng.choice(MEN)[0], rng.choice(WOMEN)[0]))
    asks, answers = rng.choice(voices)
    return f"{asks}: {question}\n{answers}: {answer}"


def compare(rng: Random, profiles: Sequence[Profile]) -> str:
    """Two exercises side by side."""
    a, b = rng.sample(CATALOGUE, 2)
    one, two = EXERCISES[a.name], EXERCISES[b.name]
    first = (
        f"И {one.nom}, и {two.nom} тренируют {GROUPS[a.group].acc}."
        if a.group == b.group
        else f"{capital(one.nom)} тренирует {GROUPS[a.group].acc}, а {two.nom} — {GROUPS[b.group].acc}."
    )
    harder = RANK[a.level] - RANK[b.level]
    second = (
        f"{capital(one.nom)} {'труднее' if harder > 0 else 'легче'} {two.gen}."
        if harder
        else f"Оба упражнения {LEVELS[a.level][1]} уровня."
    )
    third = pick(
        rng,
        f"Оба нагружают {joints(a.loads, 'acc')}."
        if a.loads == b.loads
        else f"Первое упражнение нагружает {joints(a.loads, 'acc')}, второе — {joints(b.loads, 'acc')}.",
        f"{capital(one.nom)} развивает {goals(a, 'acc')}, {two.nom} — {goals(b, 'acc')}.",
        f"После {one.gen} можно перейти к {two.dat}.",
        f"{capital(one.nom)} хорошо сочетается {along(two.ins)}.",
    )
    parts = [second, third]
    rng.shuffle(parts)
    return join(first, *parts[: rng.randint(1, 2)])


def case(rng: Random, profiles: Sequence[Profile]) -> str:
    """A crew member with a profile, and a workout that fits; the profile is one of those handed in."""
    profile, who = rng.choice(profiles), person(rng)
    chosen = [EXERCISES[e.name] for e in workout_of(profile, rng, resting=profile.resting)]
    gear = "инвентаря нет" if profile.gear == "none" else f"есть {GEAR[profile.gear].nom}"
    care = f"нужно беречь {joints(profile.protect, 'acc')}" if profile.protect else "ограничений нет"
    planned = "запланирована" if profile.workouts == 1 else "запланировано"
    fits = pick(
        rng,
        f"Тренировка для {who.gen}: {', '.join(noun.nom for noun in chosen)}.",
        f"Поэтому {who.name} делает {each(chosen, 'acc')}.",
        f"{who.dat} подойдут {each(chosen, 'nom')}.",
        f"Тренер советует начать {along(each(chosen, 'gen'))}.",
    )
    return join(
        f"У {who.gen} {LEVELS[profile.level][0]} уровень, цель — {GOALS[profile.goal].nom}.",
        f"В неделю {planned} {counted(profile.workouts, 'workout')}, {gear}, {care}.",
        fits,
    )


KINDS = (describe, describe, advise, rule, ask, compare, case, case)
