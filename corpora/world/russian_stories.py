"""Russian documents about a crew's life: layovers, duties in the air, pages of a training diary."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from corpora.world import facts
from corpora.world.english import capital, join, pick
from corpora.world.facts import CATALOGUE
from corpora.world.profiles import Profile
from corpora.world.russian import (
    CITIES,
    EXERCISES,
    GEAR,
    GOALS,
    GROUPS,
    JOINTS,
    agree,
    counted,
    into,
    person,
)
from corpora.world.russian_text import WHEN, each, nouns

WHERE = (
    "в номере гостиницы",
    "в спортзале",
    "дома",
    "в комнате экипажа",
    "недалеко от аэропорта",
    "в парке",
    "на балконе",
    "у моря",
)
DAYS = ("Понедельник", "Вторник", "Среда", "Четверг", "Пятница", "Суббота", "Воскресенье")


def story(rng: Random, profiles: Sequence[Profile]) -> str:
    """A crew member away from home trains."""
    who, own, key = person(rng), rng.choice(facts.GEAR[1:]), rng.choice(facts.GROUPS)
    gear, group = GEAR[own], GROUPS[key]
    city, other = rng.sample(CITIES, 2)
    done = nouns(rng, rng.randint(2, 3), lambda e: e.gear in ("none", own))
    helpful = nouns(rng, 1, lambda e: e.group == key)[0]
    weaken = agree(group, "слабел", "слабела", "слабело", "слабели")
    hurt = agree(group, "будет", "будет", "будет", "будут")
    first = pick(
        rng,
        f"{who.name} работает {who.job_ins} и летает из {city.gen} {into(other.acc)}.",
        f"{capital(who.job)} {who.name} {who.did('прилетел')} {into(city.acc)} "
        f"после {pick(rng, 'ночного', 'долгого', 'трудного')} рейса.",
        f"У {who.gen} была стоянка {into(city.loc)}.",
        f"Рейс из {city.gen} {into(other.acc)} длился {counted(rng.randint(2, 14), 'hour')}.",
        f"После рейса {into(other.acc)} {who.name} не {who.did('мог', 'могла')} уснуть.",
        f"{capital(rng.choice(WHEN))} {who.name} всегда тренируется {rng.choice(WHERE)}.",
        f"Экипаж провёл {into(city.loc)} {counted(rng.randint(1, 4), 'night', acc=True)}.",
        f"{who.name} {who.did('вернулся', 'вернулась')} из {city.gen} "
        f"{pick(rng, 'поздно ночью', 'рано утром', 'днём', 'вечером')}.",
        f"{capital(into(city.loc))} шёл дождь, и {who.name} {who.did('остался', 'осталась')} в гостинице.",
    )
    second = pick(
        rng,
        f"В спортзале гостиницы {into(city.loc)} есть штанга."
        if own == "barbell"
        else f"В чемодане у {who.gen} {agree(gear, 'лежит', 'лежит', 'лежит', 'лежат')} {gear.nom}.",
        f"{capital(rng.choice(WHERE))} {who.name} {who.did('сделал')} {each(done, 'acc')}.",
        f"{who.name} {who.did('спал')} {counted(rng.randint(5, 9), 'hour')}, "
        f"а потом {who.did('сделал')} {each(done, 'acc')}.",
        f"Чтобы {group.nom} не {weaken}, {who.name} {who.did('сделал')} {helpful.acc}.",
        f"Тренировка заняла {counted(rng.randint(15, 45), 'minute', acc=True)}: "
        f"{', '.join(noun.nom for noun in done)}.",
        f"{who.name} {who.did('тренировал')} {group.acc} {rng.choice(WHERE)}.",
        f"Коллеги вместе с {who.did('ним', 'ней')} сделали {each(done, 'acc')}.",
        f"Больше всего {who.dat} "
        f"{agree(helpful, 'понравился', 'понравилась', 'понравилось', 'понравились')} {helpful.nom}.",
    )
    third = pick(
        rng,
        "",
        f"Потом {who.he} {who.did('выпил')} воды и {who.did('лёг', 'легла')} спать.",
        f"На следующий день экипаж улетел обратно {into(city.acc)}.",
        f"«Завтра {group.nom} {hurt} болеть», — {who.did('сказал')} {who.name}.",
        f"После этого {who.he} снова {who.did('был')} {who.did('бодр')}.",
        "Салон был полон, а ночь была длинной.",
        f"{capital(who.his)} цель — {rng.choice(tuple(GOALS.values())).nom}.",
        f"До следующего рейса {who.he} {who.did('отдыхал')} {counted(rng.randint(1, 4), 'day', acc=True)}.",
        "Из-за плохой погоды рейс задержали.",
        "Завтрак был ранним, а автобус уже ждал.",
    )
    return join(first, second, third)


def duty(rng: Random, profiles: Sequence[Profile]) -> str:
    """Two or three sentences about work in the air and rest on the ground."""
    who, city, joint = person(rng), rng.choice(CITIES), rng.choice(tuple(JOINTS.values()))
    said = (
        f"{who.name} проверяет двери и встречает пассажиров.",
        "Командир читает контрольную карту, пока экипаж готовит салон.",
        f"По пути {into(city.acc)} началась болтанка, и экипаж сел на свои места.",
        f"Чай {_asked(number := rng.randint(3, 30))} {counted(number, 'passenger')}, а кофе — никто.",
        f"В рейсе {into(city.acc)} ребёнок захотел увидеть кабину пилотов.",
        f"{capital(into(city.loc))} время отличается на {counted(rng.randint(2, 9), 'hour', acc=True)}.",
        f"Сон — часть работы: {who.name} закрывает шторы и заводит два будильника.",
        "После посадки экипаж пишет отчёт и едет на автобусе в гостиницу.",
        f"После {rng.randint(5, 12)} часов в кресле спина устаёт.",
        f"Тяжёлые тележки нагружают {joint.acc}.",
        f"Воздух в салоне сухой, поэтому {who.name} каждый час пьёт стакан воды.",
        f"{capital(who.job)} {who.name} знает свои пределы.",
        "Перед вылетом все слушают короткий инструктаж.",
        f"{who.name} ходит по проходу и помогает бабушке с сумкой.",
        f"Полоса {into(city.loc)} была мокрой, но посадка вышла мягкой.",
        f"Раз в год {who.name} идёт к врачу: тот проверяет сердце, зрение и {joint.acc}.",
        "Кто регулярно тренируется, тот реже болеет.",
        f"Перед ночным рейсом {into(city.acc)} лёгкая еда лучше плотного ужина.",
        f"{who.name} {who.did('научился', 'научилась')} засыпать где угодно, даже {into(city.loc)}.",
        "В опасной ситуации нужно уметь поднимать, тянуть и быстро бежать.",
        f"{who.name} {who.did('разминался', 'разминалась')} за шторкой "
        f"{counted(rng.randint(3, 12), 'minute', acc=True)}.",
        f"Из окна были видны огни {city.gen}.",
    )
    return join(*rng.sample(said, rng.randint(2, 3)))


def _asked(number: int) -> str:
    return "попросил" if number % 10 == 1 and number % 100 != 11 else "попросили"


def diary(rng: Random, profiles: Sequence[Profile]) -> str:
    """A page of notes: days, flights, exercises."""
    notes = []
    for day in sorted(rng.sample(range(len(DAYS)), 2)):
        e, city = rng.choice(CATALOGUE), rng.choice(CITIES)
        noun = EXERCISES[e.name]
        note = pick(
            rng,
            f"рейс {into(city.acc)}, без тренировки.",
            f"{noun.nom}, {counted(rng.randint(2, 5), 'set')} {rng.choice(WHERE)}.",
            f"отдых {into(city.loc)}, только {noun.nom} для {GROUPS[e.group].gen}.",
            f"{noun.nom}, {counted(rng.randint(6, 22), 'repetition')}.",
            f"{counted(rng.randint(15, 40), 'minute')} занятий {rng.choice(WHEN)}.",
            f"резерв в аэропорту, потом {noun.nom}.",
            f"усталость после {city.gen}, поэтому только {noun.nom} и короткая прогулка.",
        )
        notes.append(f"{DAYS[day]}: {note}")
    return "\n".join(notes)


KINDS = (story, story, duty, diary)
